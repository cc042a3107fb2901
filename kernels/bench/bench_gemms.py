"""Matrix products of a device in each precision: time, operations a second, error, and the kernel that ran.

    python kernels/bench/bench_gemms.py
    python kernels/bench/bench_gemms.py --sizes 8192x8192x8192,16384x4096x14336 --out kernels/bench/results

Left (M, K) times right (K, N), the right one transposed in memory, as linear layers have them, of Gaussian values or
random integers. The first rows are torch's own products, by each scaling of FP8 that there is; a device that lacks one
says so in its row. int8_matmul and fp8_matmul are ours, with their epilogues; quantize brings both operands into FP8.
Error: of the first 256 rows against the product of the same operands in float64, relative, by norms.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from harness import Case, Row, arguments, in_turns, launched, run
from peaks import utilisation
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from qtrain_kernels import gemm
from qtrain_kernels.formats import E4M3
from qtrain_kernels.plans import Plan
from qtrain_kernels.qtensor import Layout, QTensor, quantize

CHECKED_ROWS = 256
SCALE_BLOCK = 128
Size = tuple[int, int, int]


@dataclass(frozen=True)
class Product:
    """A product to time, and its first rows as they should be, in float64."""

    precision: str
    run: Callable[[], Tensor]
    exact: Callable[[], Tensor]


def gaussian(rows: int, columns: int, device: str) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator(device).manual_seed(rows), device=device)


def in_float64(left: Tensor, right: Tensor, left_scale: Any = 1.0, right_scale: Any = 1.0) -> Tensor:
    """Of the first rows of left, times the scales of both: broadcast over them."""
    rows = slice(CHECKED_ROWS)
    left_scale = left_scale[rows] if isinstance(left_scale, Tensor) and left_scale.ndim else left_scale
    return (left[rows].double() * left_scale) @ (right.double() * right_scale)


def bfloat16(size: Size, device: str) -> Product:
    m, k, n = size
    left, right = gaussian(m, k, device).bfloat16(), gaussian(n, k, device).bfloat16().T
    return Product("bfloat16", lambda: left @ right, lambda: in_float64(left, right))


def integers(size: Size, device: str, halves: bool, ours: bool) -> Product:
    """halves: centred codes of 8 bits, which are stored less 1/2."""
    m, k, n = size
    left, right = (
        torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(k)).to(device)
        for shape in ((m, k), (n, k))
    )
    right, offset = right.T, 0.5 * halves
    run = (lambda: gemm.int8_matmul(left, right, offset, offset)) if ours else (lambda: torch._int_mm(left, right))
    return Product("int8", run, lambda: in_float64(left.double() + offset, right.double() + offset))


def fp8(size: Size, device: str, scaling: str, fast: bool) -> Product:
    """scaling: one scale for each row and column, for each tensor, or for 128 elements along K of both sides."""
    m, k, n = size
    left = gaussian(m, k, device).to(torch.float8_e4m3fn)
    right = gaussian(n, k, device).to(torch.float8_e4m3fn).T
    kind, left_scale, right_scale = {
        "rows": lambda: (ScalingType.RowWise, positive(m, 1, device), positive(1, n, device)),
        "tensors": lambda: (ScalingType.TensorWise, positive(1, 1, device)[0, 0], positive(1, 1, device)[0, 0]),
        "1x128": lambda: (
            ScalingType.BlockWise1x128,
            positive(k // SCALE_BLOCK, m, device).T,
            positive(k // SCALE_BLOCK, n, device).T,
        ),
    }[scaling]()

    def exact() -> Tensor:
        if scaling != "1x128":
            return in_float64(left, right, left_scale, right_scale)
        spread = [scale.repeat_interleave(SCALE_BLOCK, 1) for scale in (left_scale, right_scale)]
        return in_float64(left, right, spread[0], spread[1].T)

    def run() -> Tensor:
        return scaled_mm(left, right, left_scale, kind, right_scale, kind, use_fast_accum=fast)

    return Product("fp8", run, exact)


def positive(rows: int, columns: int, device: str) -> Tensor:
    """Scales between 1/2 and 3/2."""
    return torch.rand(rows, columns, generator=torch.Generator(device).manual_seed(rows), device=device) + 0.5


def by_lines(size: Size, device: str, fast: bool, quantizes: bool) -> Product:
    """Our product of FP8 with a scale a line; quantizes: with what brings bfloat16 operands into it."""
    m, k, n = size
    left, right = gaussian(m, k, device).bfloat16(), gaussian(n, k, device).bfloat16()
    plan, product = Plan(E4M3, "float32", None, "absmax"), gemm.TABLE["fp8_fast" if fast else "fp8"]

    def operands() -> tuple[QTensor, QTensor]:
        a, b = (quantize(x, Layout(plan, (len(x), k), storage="float8")) for x in (left, right))
        return a, b.t

    found = operands()

    def exact() -> Tensor:
        a, b = found
        return in_float64(a.codes, b.codes.T, a.tensor_scale, b.tensor_scale)

    return Product("fp8", lambda: gemm.scaled(*product.run(*(operands() if quantizes else found))), exact)


TORCH: dict[str, Callable[[Size, str], Product]] = {
    "bfloat16": bfloat16,
    "int8": partial(integers, halves=False, ours=False),
    "fp8 by rows": partial(fp8, scaling="rows", fast=False),
    "fp8 by rows, fast": partial(fp8, scaling="rows", fast=True),
    "fp8 by tensors": partial(fp8, scaling="tensors", fast=False),
    "fp8 by tensors, fast": partial(fp8, scaling="tensors", fast=True),
    "fp8 by 1x128": partial(fp8, scaling="1x128", fast=False),
}
OURS: dict[str, Callable[[Size, str], Product]] = {
    "int8_matmul": partial(integers, halves=False, ours=True),
    "int8_matmul, halves": partial(integers, halves=True, ours=True),
    "fp8_matmul": partial(by_lines, fast=False, quantizes=False),
    "fp8_matmul, fast": partial(by_lines, fast=True, quantizes=False),
    "quantize and fp8_matmul": partial(by_lines, fast=False, quantizes=True),
}


def measure(make: Callable[[Size, str], Product], size: Size, options: argparse.Namespace) -> Row:
    product = make(size, options.device)
    exact = product.exact()
    error = (product.run()[:CHECKED_ROWS].double() - exact).norm() / exact.norm()
    seconds = median(in_turns({"ours": product.run}, options.rounds, options.device)["ours"])
    flops = {product.precision: 2.0 * size[0] * size[1] * size[2]}
    device_name = torch.cuda.get_device_name() if options.device == "cuda" else ""
    return {
        "ms": seconds * 1e3,
        "TFLOP/s": sum(flops.values()) / seconds / 1e12,
        "of peak in use": utilisation(flops, seconds, device_name)["of peak in use"],
        "relative error": error.item(),
        **launched(product.run, options.device),
    }


def cases(
    sizes: list[Size], products: dict[str, Callable[[Size, str], Product]], options: argparse.Namespace
) -> Iterator[Case]:
    """Those of a device. CPUs have no FP8 products in blocks."""
    for size in sizes:
        for name, make in products.items():
            if options.device == "cuda" or name != "fp8 by 1x128":
                yield f"{name}, {'x'.join(map(str, size))}", partial(measure, make, size, options)


def sizes_of(options: argparse.Namespace) -> list[Size]:
    """M, K and N of each product in options.sizes."""
    sizes = [tuple(map(int, size.split("x"))) for size in options.sizes.split(",")]
    return [(m, k, n) for m, k, n in sizes]


def main() -> int:
    options = arguments(__doc__, sizes="1024x1024x1024", rounds=5)
    found = cases(sizes_of(options), TORCH | OURS, options)
    return run(
        f"gemms-{options.sizes.replace(',', '-')}", f"products M x K x N, {options.sizes}", "product", found, options
    )


if __name__ == "__main__":
    sys.exit(main())
