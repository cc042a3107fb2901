"""The memory of a training step as the plan says it, and as the operating system sees it. Writes results.csv beside it.

python experiments/memory/measure.py

Each case is a process of its own: two optimiser steps on random tokens. Measured is the largest resident memory, less
what the process held before, after two steps of a tiny model that load the libraries.
"""

from __future__ import annotations

import csv
import ctypes
import gc
import multiprocessing
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from qtrain.optim.groups import build_optimizer
from qtrain.plan import make_plan
from qtrain.train import compose
from qtrain.training.activations import checkpoint_activations
from qtrain.training.build import build_model
from qtrain.training.causal_lm import CausalLM
from qtrain.training.memory import measure_memory
from qtrain.training.parallel import blocks_of

RESULTS = Path(__file__).with_name("results.csv")
VOCABULARY = 32_768
MODELS = {
    "nano": ["model=nano"],
    "mini": ["model=mini"],
    "100M": ["model=mini", "model.dim=768", "model.n_layers=12", "model.n_heads=12", "model.ffn_dim=2048"],
}
WAYS = {
    "as it is": [],
    "chunked loss": ["trainer.chunked_loss=true"],
    "selective, chunked loss": ["trainer.checkpoint_activations=selective", "trainer.chunked_loss=true"],
    "full, chunked loss": ["trainer.checkpoint_activations=full", "trainer.chunked_loss=true"],
    "full, chunked loss, 8-bit states": [
        "trainer.checkpoint_activations=full",
        "trainer.chunked_loss=true",
        "optimizer=adamw8bit",
    ],
}
SHARED = [
    "trainer.precision=32-true",
    f"model.vocab_size={VOCABULARY}",
    "model.seq_len=512",
    "trainer.micro_batch_size=2",
    "trainer.batch_tokens=1024",
]


def main() -> None:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "131072"  # glibc gives each larger block back when it is freed
    rows = list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []
    done = {(row["model"], row["recipe"], row["way"]) for row in rows}
    for name, model in MODELS.items():
        for recipe in ("bf16", "quartet"):
            for way, settings in WAYS.items():
                if (name, recipe, way) in done:
                    continue
                arguments = [*SHARED, *model, *settings, f"recipe={recipe}"]
                planned, measured = in_a_process(arguments)
                row = {"model": name, "recipe": recipe, "way": way, "planned_mib": planned, "measured_mib": measured}
                rows.append(row | {"ratio": round(planned / measured, 3)})
                print(rows[-1], file=sys.stderr, flush=True)
                with RESULTS.open("w", newline="") as file:
                    writer = csv.DictWriter(file, rows[0])
                    writer.writeheader()
                    writer.writerows(rows)


def in_a_process(arguments: list[str]) -> tuple[float, float]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(arguments, sender))
    process.start()
    found = receiver.recv()
    process.join()
    return found


def measure(arguments: list[str], sender: Connection) -> None:
    planned = measure_memory(compose(arguments), make_plan(compose(arguments)), torch.device("cpu")).peak
    tiny = ["model.dim=128", "model.ffn_dim=128", "model.n_layers=1", "model.n_heads=2"]
    take_steps([*arguments, *tiny], 64)  # loads the libraries
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    take_steps(arguments, VOCABULARY)
    sender.send((round(planned / 2**20, 1), round((resident("VmHWM") - before) / 2**20, 1)))


def take_steps(arguments: list[str], vocabulary: int) -> None:
    config = compose([*arguments, f"model.vocab_size={vocabulary}"])
    module = CausalLM(config, make_plan(config), build_model(config, vocabulary))
    optimizer = build_optimizer(module.model, config.optimizer)
    checkpoint_activations(blocks_of(module.model), config.trainer.checkpoint_activations)
    for step in range(2):
        tokens = torch.randint(vocabulary, (config.trainer.micro_batch_size, config.model.seq_len + 1))
        module.begin_step(step, tokens)
        module.micro_batch_loss(module.model, tokens, step, 0, 0, 1).backward()
        optimizer.step()
        optimizer.zero_grad()


def resident(name: str) -> int:
    """Bytes, as /proc has them."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
