"""What rotations and MR-GPTQ do for MXFP4 and NVFP4, weights and inputs, on runs that were trained without a recipe.

python experiments/ptq_vs_qat/formats.py RUN [RUN ...]    # goes on after a stop; a row that is there is not made again
python experiments/ptq_vs_qat/formats.py --table          # the rows as the README has them

Each run is quantised in each format, under each rotation, by each method; formats.csv gets a row for each. Gaps are in
nats per token above the run's own loss on its validation text.
"""

from __future__ import annotations

import csv
import itertools
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from run import mean

from qtrain.post_training import quantize

RESULTS = Path(__file__).with_name("formats.csv")
COLUMNS = ("run", "format", "rotation", "method", "loss_gap")
CALIBRATION = 131_072
FORMATS = {
    "mxfp4": ("floor_three_quarters", ("null", "hadamard32", "hadamard128")),
    "nvfp4": ("absmax", ("null", "hadamard16", "hadamard128")),
}
WAYS = {"rtn": "to nearest", "mr_gptq": "MR-GPTQ", "gptq": "GPTQ"}
OFF = [
    f"recipe.{operand}.{key}={value}"
    for operand in ("dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x")
    for key, value in (("format", "none"), ("scale", "null"), ("rotation", "null"), ("signs", "none"))
]


def main() -> None:
    if sys.argv[1:] == ["--table"]:
        print(table(rows()))
        return
    made = {tuple(row[key] for key in COLUMNS[:-1]) for row in rows()}
    cases = [(format, rotation) for format, (_, rotations) in FORMATS.items() for rotation in rotations]
    for method, run, (format, rotation) in itertools.product(WAYS, map(Path, sys.argv[1:]), cases):
        key = run.name, format, rotation, method
        if key not in made:
            add((*key, f"{gap(run, format, rotation, method):.5f}"))


def gap(source: Path, format: str, rotation: str, method: str) -> float:
    """Nats per token above the loss of the run."""
    settings = {"format": format, "scale": FORMATS[format][0], "rotation": rotation, "estimator": "ste"}
    own = [f"recipe.fprop.{side}.{key}={value}" for side in "xw" for key, value in settings.items()]
    with tempfile.TemporaryDirectory() as folder:
        done = quantize(str(source), Path(folder) / "out", ["recipe=quartet", *own, *OFF], method, CALIBRATION)
    return done.val_loss - done.val_loss_before


def add(values: tuple[str, ...]) -> None:
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        writer.writerow(values)
    print(*values, flush=True)


def rows() -> list[dict[str, str]]:
    return list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []


def table(found: list[dict[str, str]]) -> str:
    """Gaps, and what MR-GPTQ with each rotation takes from rounding to nearest without one, run by run; means over the
    runs with 95% intervals of Student's t."""
    gaps: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for row in found:
        gaps[row["format"], row["rotation"], row["method"]][row["run"]] = float(row["loss_gap"])
    lines = [f"| format | rotation | {' | '.join(WAYS.values())} | MR-GPTQ takes |", f"|{'---|' * (3 + len(WAYS))}"]
    for format, rotation in dict.fromkeys(key[:2] for key in gaps):
        each = [gaps.get((format, rotation, method), {}) for method in WAYS]
        plain, mine = gaps[format, "null", "rtn"], gaps.get((format, rotation, "mr_gptq"), {})
        taken = [plain[run] - gap for run, gap in mine.items()]
        cells = [mean([*values]) if values else "" for values in (*(runs.values() for runs in each), taken)]
        lines.append(f"| {format} | {'none' if rotation == 'null' else rotation} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
