"""First contact with a GPU: what is wrong, then what is slow. One stage a process; every row is kept as it is known.

    python kernels/bench/first_contact.py env --out build/bench
    python kernels/bench/first_contact.py env peaks equal --out build/bench --budget 150   # one after the other
    TRITON_INTERPRET=1 python kernels/bench/first_contact.py equal --device cpu            # without a GPU, slowly
    python kernels/bench/first_contact.py equal --rehearse                                 # compiled, not launched

env: versions, device, compiler, missing packages. peaks: a copy, and products in each precision, which are the ceilings
of this card. equal: each Triton kernel against the reference on the device, bit for bit, along rows and columns, at odd
sizes, on hard values. speed: the same kernels at 16384 x 4096, over a copy in the same rounds. gemms: the products of
linear layers. few_rows: few rows times packed weights, over a copy and torch's product. layers: each recipe's layer by
Triton against the reference, then its time over bfloat16's. training: tokens a second of a small Llama. The sizes are
smaller on CPU.

A kernel, layer or product that fails costs one row, which names the error. A kernel or layer with one wrong bit has no
time. The exit code is 1 if any row failed, was wrong, or was left out for lack of time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import bench_few_rows
import bench_gemms
import bench_kernels
import bench_linear
import bench_training
import packages
import torch
from harness import Case, Row, checked_options, equality, in_turns, parser, run
from torch import Tensor

GEMMS = ("auto", "fp8", "fp8_fast")


BY_DEVICE: dict[str, dict[str, Any]] = {  # the defaults of options
    "cuda": {
        "sizes": "16384x4096x4096,16384x4096x14336", "square": 8192, "model": "llama_30m", "vocabulary": 32000,
        "batch": 128,
    },
    # These compile the kernels of the large sizes: those depend on whether 128 and 256 divide a size, not on the size.
    "cpu": {"sizes": "128x256x256", "square": 128, "model": "nano", "vocabulary": 257, "batch": 1},
}  # fmt: skip


def env_cases(options: argparse.Namespace) -> Iterator[Case]:
    """One row for each fact of the machine."""
    for name, fact in packages.facts(options.device).items():
        yield name, partial(found, fact)


def found(fact: Callable[[], str]) -> Row:
    return {"found": fact()}


def peak_cases(options: argparse.Namespace) -> Iterator[Case]:
    copied = 32 * options.square**2  # 2 GiB on CUDA
    yield f"copy of {copied / 2**20:g} MiB", partial(copy, copied, options)
    square = options.square, options.square, options.square
    yield from bench_gemms.cases([square], bench_gemms.TORCH, options)


def copy(size: int, options: argparse.Namespace) -> Row:
    """Bandwidth of a clone of so many bytes: one read and one write."""
    x = torch.zeros(size, dtype=torch.uint8, device=options.device)
    seconds = median(in_turns({"copy": x.clone}, options.rounds, options.device)["copy"])
    return {"ms": seconds * 1e3, "GB/s": 2 * x.nbytes / seconds / 1e9}


def equal_cases(options: argparse.Namespace) -> Iterator[Case]:
    """Each operation along rows and columns, at a size that tiles fill in bfloat16 and at an odd one in float32."""
    for lines, length, dtype in ((256, 384, torch.bfloat16), (37, 384, torch.float32)):
        for along in ("rows", "columns"):
            x = hard_lines(lines, length)
            x = (x if along == "rows" else x.T.contiguous()).to(options.device, dtype)
            shape = f"{'x'.join(map(str, x.shape))} {str(dtype).removeprefix('torch.')}"
            for name, build in bench_kernels.operations(x, along, options.backend):
                yield f"{name}, {shape}", partial(equal, build, options)


def hard_lines(lines: int, length: int) -> Tensor:
    """(lines, length) float32. Gaussian lines over 21 octaves; among them zeros, subnormals, ties of the coarse grids,
    powers of two, numbers beside the largest float, and one NaN and one infinity, each in a line of its own."""
    generator = torch.Generator().manual_seed(lines + length)
    x = torch.randn(lines, length, generator=generator)
    x *= torch.exp2(torch.randint(-12, 9, (lines, 1), generator=generator).float())
    x[0] = 0
    x[1] *= 1e-40
    x[2] = torch.randint(-32, 33, (length,), generator=generator) / 8
    x[3] = torch.exp2(torch.randint(-6, 7, (length,), generator=generator).float())
    x[4] = x[4].sign() * 3.3e38
    x[5, 3], x[6, 5] = float("nan"), float("inf")
    return x


def equal(build: Callable[[], bench_kernels.Operation], options: argparse.Namespace) -> Row:
    operation = build()
    return equality(operation.pairs(operation.ours()), options)


def speed_cases(options: argparse.Namespace) -> Iterator[Case]:
    rows, columns, _ = bench_gemms.sizes_of(options)[0]
    return bench_kernels.cases(rows, columns, options)


def gemm_cases(options: argparse.Namespace) -> Iterator[Case]:
    return bench_gemms.cases(bench_gemms.sizes_of(options), bench_gemms.TORCH | bench_gemms.OURS, options)


def few_rows_cases(options: argparse.Namespace) -> Iterator[Case]:
    for _, k, n in bench_gemms.sizes_of(options):
        yield from bench_few_rows.cases(k, n, options)


def layer_cases(options: argparse.Namespace) -> Iterator[Case]:
    for size in bench_gemms.sizes_of(options):
        for name, measure in bench_linear.cases(*size, GEMMS, options):
            yield f"{name}, {'x'.join(map(str, size))}", measure


def training_cases(options: argparse.Namespace) -> Iterator[Case]:
    return bench_training.cases(argparse.Namespace(**vars(options), recipes="bf16,quartet", compile=0, gemm="auto"))


STAGES: dict[str, tuple[str, Callable[[argparse.Namespace], Iterator[Case]]]] = {
    "env": ("fact", env_cases),
    "peaks": ("peak", peak_cases),
    "equal": ("operation", equal_cases),
    "speed": ("operation", speed_cases),
    "gemms": ("product", gemm_cases),
    "few_rows": ("weight", few_rows_cases),
    "layers": ("recipe", layer_cases),
    "training": ("recipe", training_cases),
}


def main() -> int:
    options = stage_options()
    if len(options.stages) > 1:
        return in_processes(options.stages)
    (stage,) = options.stages
    column, cases = STAGES[stage]
    return run(f"first-{stage}", f"first contact: {stage}", column, cases(options), options)


def stage_options() -> argparse.Namespace:
    found = parser(__doc__, rounds=5, layers=0, seq_len=0)
    found.add_argument("stages", nargs="+", choices=STAGES, metavar="stage", help=" | ".join(STAGES))
    for name, value in BY_DEVICE["cuda"].items():
        shown = f"default {value} on cuda, {BY_DEVICE['cpu'][name]} on cpu"
        found.add_argument(f"--{name}", type=type(value), help=shown)
    options = checked_options(found)
    for name, value in BY_DEVICE[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.backend == "auto":
        options.backend = "triton"
    return options


def in_processes(stages: list[str]) -> int:
    """One stage after the other, each in a process of its own: a CUDA error may leave a process without a device."""
    others = [argument for argument in sys.argv[1:] if argument not in stages]
    codes = [subprocess.run([sys.executable, __file__, stage, *others], check=False).returncode for stage in stages]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
