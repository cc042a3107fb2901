"""What INT4 and INT2 lose of the inputs of a trained model's linear layers, without a rotation and with one.

python experiments/recipes/input_errors.py RUN      # a run directory, as runs/experiments/recipes/bf16-...

Kurtosis (3 for a Gaussian) and squared error over squared values, on 16 windows of Python's own `argparse` module.
"""

from __future__ import annotations

import argparse
import inspect
from statistics import geometric_mean

import torch
from torch import Tensor, nn

import qtrain

COLUMNS = ("kurtosis", "INT4", "INT4 rotated", "INT2", "INT2 rotated")


def figures(x: Tensor) -> list[float]:
    def error(format: str, rotation: str | None) -> float:
        return ((qtrain.fake_quantize(x, format, rotation=rotation) - x).square().sum() / x.square().sum()).item()

    kurtosis = ((x - x.mean()) ** 4).mean() / x.var() ** 2
    return [kurtosis.item(), *(error(format, turn) for format in ("int4", "int2") for turn in (None, "hadamard128"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    model = qtrain.load_run(parser.parse_args().run)
    tokens = torch.tensor(list(inspect.getsource(argparse).encode()[: 16 * 256])).view(16, 256)
    found: dict[str, list[float]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            layer.register_forward_pre_hook(
                lambda _, given, name=name: found.update({name: figures(given[0].flatten(0, 1).float())})
            )
    with torch.no_grad():
        model(tokens)
    found["geometric mean"] = [geometric_mean(column) for column in zip(*found.values(), strict=True)]
    print(f"| input of | {' | '.join(COLUMNS)} |\n|{'---|' * (1 + len(COLUMNS))}")
    for name, values in found.items():
        print(f"| {name} | {' | '.join(f'{value:.3g}' for value in values)} |")


if __name__ == "__main__":
    main()
