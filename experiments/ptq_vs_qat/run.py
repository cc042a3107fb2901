"""Quantised after training or while training? Trains mini, quantises it, and writes a row for each into results.csv.

python experiments/ptq_vs_qat/run.py            # goes on after a stop; a row that is there is not made again
python experiments/ptq_vs_qat/run.py --table    # the rows as the README has them

Seed by seed: bfloat16's recipe (float32 where there are no units for it), each method of `qtrain quantize` on its
weights, the same weights trained on in each recipe for a quarter of the budget (QAT, and QAD with the model itself as
the teacher) and at 16 bits, and each recipe trained from the start at the whole budget. Bits are those of the file that
`qtrain export --to compressed-tensors` writes.
"""

from __future__ import annotations

import csv
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from scipy import stats

from qtrain.export import compressed_tensors, huggingface
from qtrain.post_training import METHODS, quantize
from qtrain.runs.directory import RunDirectory

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.csv"
RUNS = ROOT / "runs" / "ptq_vs_qat"
SEEDS = range(3)
SHARED = [
    "data=stdlib", "trainer.precision=32-true", "data.num_workers=0", "data.val_tokens=262_144",
    "callbacks.val_every_steps=512", "callbacks.telemetry_every_steps=0",
    "callbacks.progress_bar=false",
]  # fmt: skip
# What both ways of each line share: formats, scales and rotations of the forward.
FORWARDS = {
    "W2": ["recipe=quest_weight_only", "recipe.bits=2"],
    "W4A4 INT": ["recipe=quest"],
    "W4A4 MXFP4": ["recipe=quartet"],
}
# From the weights at 16 bits; one learning rate, not searched.
ON = ["+experiment=finetune", "trainer.tokens=262_144", "trainer.batch_tokens=2048", "optimizer.lr=5e-4"]
TUNED = {"QAT": [], "QAD": ["+tune=qad"]}
START = ["model=mini", "trainer.tokens=1_048_576"]
SOURCE = ("16 bits", "trained")  # what is quantised
CALIBRATION = 131_072
COLUMNS = ("seed", "forward", "method", "val_loss", "bits_per_weight", "file_bytes")


def main() -> None:
    if "--table" in sys.argv:
        print(table(rows()))
        return
    for seed in SEEDS:
        for forward, settings in FORWARDS.items():
            for method in METHODS:
                if not done(seed, forward, method):
                    out = RUNS / f"{forward}-{method}-{seed}".replace(" ", "_")
                    shutil.rmtree(out, ignore_errors=True)
                    found = quantize(str(trained(seed)), out, settings, method, CALIBRATION)
                    add(seed, forward, method, found.val_loss, out)
        on = [*ON, f"model=hf:{RUNS}/hf-{seed}"]
        row(seed, "16 bits", "trained on", [*on, "recipe=bf16"])
        for forward, settings in FORWARDS.items():
            for how, more in TUNED.items():
                row(seed, forward, how, [*on, *settings, *more])
            row(seed, forward, "trained", [*START, *settings])


def trained(seed: int) -> Path:
    """The run at 16 bits, trained where it is not finished, and beside it its weights as a checkpoint."""
    path = train(seed, *SOURCE, [*START, "recipe=bf16"])
    if not (RUNS / f"hf-{seed}").exists():
        huggingface.export(path, RUNS / f"hf-{seed}")
    return path


def row(seed: int, forward: str, method: str, settings: list[str]) -> None:
    if not done(seed, forward, method):
        trained(seed)
        train(seed, forward, method, settings)


def train(seed: int, forward: str, method: str, settings: list[str]) -> Path:
    path = RUNS / f"{forward}-{method}-{seed}".replace(" ", "_")
    command = [sys.executable, str(ROOT / "train.py"), *SHARED, *settings, f"seed={seed}", f"run_dir={path}"]
    if not RunDirectory(path).finished:
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    if not done(seed, forward, method):
        add(seed, forward, method, RunDirectory(path).summary["val_loss"], path)
    return path


def add(seed: int, forward: str, method: str, loss: float, run: Path) -> None:
    bits, size = 16.0, math.nan
    if forward in FORWARDS:
        out = run.with_name(f"{run.name}-packed")
        shutil.rmtree(out, ignore_errors=True)
        exported = compressed_tensors.export(run, out)
        bits, size = exported.bits_per_weight, exported.weight_bytes
    row = dict(zip(COLUMNS, (seed, forward, method, f"{loss:.6f}", f"{bits:.4f}", size), strict=True))
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(row, flush=True)


def rows() -> list[dict[str, str]]:
    return list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []


def done(seed: int, forward: str, method: str) -> bool:
    return any((row["seed"], row["forward"], row["method"]) == (str(seed), forward, method) for row in rows())


def table(found: list[dict[str, str]]) -> str:
    """Losses of each seed, and the gap to 16 bits of the same seed with its 95% interval by Student's t."""
    base = {row["seed"]: float(row["val_loss"]) for row in found if (row["forward"], row["method"]) == SOURCE}
    seeds = sorted(base)
    lines = [f"| forward | weights | bits a weight | {' | '.join(f'seed {seed}' for seed in seeds)} | gap to 16 bits |"]
    lines.append("|---|---|---|" + "---|" * (len(seeds) + 1))
    for forward, method in dict.fromkeys((row["forward"], row["method"]) for row in found):
        mine = {row["seed"]: row for row in found if (row["forward"], row["method"]) == (forward, method)}
        losses = [f"{float(mine[seed]['val_loss']):.4f}" if seed in mine else "" for seed in seeds]
        gap = mean([float(row["val_loss"]) - base[seed] for seed, row in mine.items()])
        gap = "" if (forward, method) == SOURCE else gap
        bits = next(iter(mine.values()))["bits_per_weight"]
        lines.append(f"| {forward} | {method} | {float(bits):.3g} | {' | '.join(losses)} | {gap} |")
    return "\n".join(lines)


def mean(values: list[float]) -> str:
    """With its 95% interval by Student's t, where there are several."""
    told = f"{statistics.fmean(values):+.4f}"
    if len(values) > 1:
        half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
        told += f" ± {half:.4f}"
    return told


if __name__ == "__main__":
    main()
