"""Noise drawn in every micro-batch against noise drawn once a step: error of the mean gradient, and time of a step.

    python experiments/numerics/redraw.py

nano on the bytes of Python's standard library, float32, 8 micro-batches of one sequence. The exact gradient is that of
the recipe's own forward, with nothing quantised in the backward.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

import qtrain
from qtrain.config.recipe import read_recipe
from qtrain.config.settings import configs_dir, parse
from qtrain.models.decoder import Decoder
from qtrain.models.families.llama import Llama
from qtrain.training.losses import next_token_loss

RECIPES = ("quartet_v1", "quartet_ii", "tetrajet_v2_baseline", "quartet")
SETTINGS = ("step", "micro_batch")
MICRO_BATCHES = 8


def text() -> Tensor:
    """(micro-batches, 1, 257) bytes of the standard library's first modules."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    data = b"".join(path.read_bytes() for path in files[:20])
    length = 257
    starts = torch.linspace(0, len(data) - length, MICRO_BATCHES).long().tolist()
    return torch.tensor([[list(data[start : start + length])] for start in starts])


def build(recipe: dict) -> nn.Module:
    """nano, the same weights at every call, converted."""
    config = parse(Llama, yaml.safe_load((configs_dir() / "model" / "nano.yaml").read_text()))
    torch.manual_seed(0)
    model = Decoder(config, vocab_size=257)
    qtrain.convert(model, recipe)
    return model


def exact(name: str) -> dict:
    """The recipe with its own forward, and a backward that quantises nothing."""
    tree = read_recipe(name).model_dump()
    fprop = {operand: spec | {"format": spec["format"] or tree["format"]} for operand, spec in tree["fprop"].items()}
    kept = {"format": "none", "source": "forward"}
    backward = {"dgrad": {"dy": {"format": "none"}, "w": kept}, "wgrad": {"dy": {"format": "none"}, "x": kept}}
    return {"name": name, "fprop": fprop} | backward


def mean_gradient(model: nn.Module, data: Tensor, step: int) -> Tensor:
    model.zero_grad()
    for micro_batch, tokens in enumerate(data):
        qtrain.set_step(model, step, micro_batch)
        (next_token_loss(model, tokens) / len(data)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16, help="steps over which errors are averaged")
    steps = parser.parse_args().steps
    torch.set_num_threads(1)  # of which the processor's time is measured, whatever else the machine does
    data = text()
    print(
        "| recipe | error, once a step | error, every micro-batch | ratio | ms, once a step | ms, every micro-batch |"
    )
    print("|---|---|---|---|---|---|")
    for name in RECIPES:
        models = {redraw: build({"name": name, "redraw": redraw}) for redraw in SETTINGS}
        truth = mean_gradient(build(exact(name)), data, 0)
        errors: dict[str, list[float]] = {redraw: [] for redraw in SETTINGS}
        times: dict[str, list[float]] = {redraw: [] for redraw in SETTINGS}
        for step in range(steps + 1):
            for redraw, model in models.items():
                start = time.process_time()
                found = mean_gradient(model, data, step)
                if step:  # the first compiles
                    times[redraw].append(1e3 * (time.process_time() - start))
                    errors[redraw].append(((found - truth).square().sum() / truth.square().sum()).item())
        error = {redraw: statistics.mean(errors[redraw]) for redraw in SETTINGS}
        spent = {redraw: statistics.median(times[redraw]) for redraw in SETTINGS}
        print(
            f"| {name} | {error['step']:.4f} | {error['micro_batch']:.4f} | {error['step'] / error['micro_batch']:.2f} "
            f"| {spent['step']:.0f} | {spent['micro_batch']:.0f} | {spent['step'] / spent['micro_batch']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
