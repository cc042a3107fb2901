"""Memory and time of each way to fine-tune, on a model of 30 million parameters, beside each other.

python experiments/finetune/costs.py runs/finetune/signatures.jsonl    # of data.py

llama_30m with random weights and a vocabulary of bytes is tuned for STEPS steps of 2,048 tokens in micro-batches of
512, ROUNDS times, one method after the other. Speeds are medians of the last half of the steps, and ratios those of one
round. Peaks are those of the whole process; from them is taken that of a process that has imported the trainer and does
nothing.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from run import EQUAL, METHODS

from qtrain.data.tokenizer import ByteTokenizer, tokenizer_files
from qtrain.models import hf
from qtrain.models.decoder import Decoder
from qtrain.train import compose

ROOT = Path(__file__).resolve().parents[2]
STEPS, ROUNDS, MIB = 4, 3, 2**20
FEW = [
    f"trainer.tokens={STEPS * 2048}", "trainer.micro_batch_size=2", "data.val_tokens=2048",
    "callbacks.log_every_steps=1", "callbacks.telemetry_every_steps=0", "optimizer.lr=1e-4",
]  # fmt: skip
NOTHING = "import qtrain.training.session as s; from qtrain.training.observers.measure import memory_bytes as m; "


def main() -> None:
    data = Path(sys.argv[1]).resolve()
    idle = subprocess.check_output([sys.executable, "-c", NOTHING + "import torch; print(m(torch.device('cpu')))"])
    with tempfile.TemporaryDirectory() as folder:
        base = write_base(Path(folder) / "base")
        found: dict[str, list[tuple[float, int]]] = {name: [] for name in METHODS}
        for number in range(ROUNDS):
            for name, (settings, _) in METHODS.items():
                run = Path(folder) / f"{name}-{number}"
                command = [sys.executable, "train.py", "+experiment=finetune", f"model=hf:{base}", *settings, *EQUAL]
                command += [*FEW, f"data.files={data}", f"run_dir={run}"]
                subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
                found[name].append(cost(run))
            print(f"{number + 1} of {ROUNDS} rounds\n{table(found, int(idle))}", flush=True)


def table(found: dict[str, list[tuple[float, int]]], idle: int) -> str:
    lines = ["| method | tokens/s | of full | peak, MiB | above an idle process |", "|---|---|---|---|---|"]
    for name, each in found.items():
        ratios = [speed / full for (speed, _), (full, _) in zip(each, found["full"], strict=True)]
        speed, peak = statistics.median(speed for speed, _ in each), max(peak for _, peak in each)
        of_full = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {name} | {speed:,.0f} | {of_full} | {peak / MIB:,.0f} | {(peak - idle) / MIB:,.0f} |")
    return "\n".join(lines)


def write_base(folder: Path) -> Path:
    tokenizer = ByteTokenizer()
    model = Decoder(compose(["recipe=bf16", "model=llama_30m"]).model, tokenizer.vocab_size)
    state = dict(model.named_parameters())
    folder.mkdir()
    config = hf.config_of(model.config, tokenizer.vocab_size, tokenizer.eos_id)
    hf.save(folder, config, {name: value.shape for name, value in state.items()}, lambda name: state[name].detach())
    for name, text in tokenizer_files(tokenizer).items():
        (folder / name).write_text(text)
    return folder


def cost(run: Path) -> tuple[float, int]:
    """(tokens a second, peak bytes)"""
    lines = [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
    speeds = [line["tokens_per_second"] for line in lines if line["step"] > STEPS // 2]
    return statistics.median(speeds), lines[-1]["memory_bytes"]


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
