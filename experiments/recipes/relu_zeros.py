"""Which code should LSQ's centred grid give an exact zero, of which a ReLU makes many? -1/2 as here, or +1/2?

python experiments/recipes/relu_zeros.py            # a line per number of bits; --bits 2: one of them

A network 64-128-128-128-32 with ReLU learns the outputs of a tanh network from N(0, 1) inputs: float32, 400 steps of
256. The two square layers, whose inputs are ReLU's, are quantised by `lsq`; the others are not. Printed: the squared
error on 4,096 new inputs over the variance of the outputs, by seed, for both codes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn

import qtrain
from qtrain_kernels import reference
from qtrain_kernels.formats import Element

STEPS, BATCH, SEEDS = 400, 256, 4


@contextmanager
def zeros_above() -> Iterator[None]:
    """Centred codes as the released LSQ makes them, round(u - 1/2) + 1/2: zero takes +1/2."""
    below = reference.round_nearest

    def above(u: Tensor, element: Element) -> Tensor:
        if not element.offset:
            return below(u, element)
        return torch.round(u.clamp(-element.max, element.max) - 0.5) + 0.5

    reference.round_nearest = above
    try:
        yield
    finally:
        reference.round_nearest = below


def relative_error(bits: int | None, seed: int) -> float:
    """bits: of the square layers; None leaves them in float32."""
    torch.manual_seed(seed)
    teacher = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32))
    for parameter in teacher.parameters():
        parameter.data.mul_(2.0)
    sizes = (64, 128, 128, 128, 32)
    layers = [nn.Linear(*pair) for pair in pairwise(sizes)]
    student = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])
    if bits is not None:
        qtrain.convert(student, {"name": "lsq", "bits": bits}, skip=["0", "6"], backend="reference")
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = torch.Generator().manual_seed(seed + 1000)

    def error(count: int) -> Tensor:
        x = torch.randn(count, 64, generator=generator)
        with torch.no_grad():
            y = teacher(x)
        return (student(x) - y).square().mean() / y.var()

    for step in range(STEPS):
        qtrain.set_step(student, step)
        loss = error(BATCH)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    student.eval()
    with torch.no_grad():
        return error(4096).item()


def shown(bits: int | None) -> str:
    return " ".join(f"{relative_error(bits, seed):.3f}" for seed in range(SEEDS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, choices=range(1, 9), nargs="*", default=[1, 2, 4])
    bits = parser.parse_args().bits
    print(f"float32: {shown(None)}", flush=True)
    for each in bits:
        print(f"{each} bits, zero to -1/2: {shown(each)}", flush=True)
        with zeros_above():
            print(f"{each} bits, zero to +1/2: {shown(each)}", flush=True)


if __name__ == "__main__":
    main()
