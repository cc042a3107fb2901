"""Few rows times a packed weight: time over torch's product in bfloat16, and the share of the bandwidth of a copy.

    python kernels/bench/bench_few_rows.py
    python kernels/bench/bench_few_rows.py --features 4096 --out-features 14336 --out kernels/bench/results

x (R, K) in bfloat16 times the transpose of a weight (N, K), as `qtrain.pack` keeps it. GB/s: the bytes of the weight,
of x and of the result, once. A product takes one weight after the other of as many as a GPU's cache does not hold
(`COLD` bytes), as a model takes its layers; a copy is a clone of so many bytes, in the same rounds. x bfloat16: speed
over torch's product with a weight in bfloat16. x dequantised: speed over dequantising the weight and that product.
A result that is further from the product in float64 than (K + 64) 2^-23 sum |x w| is an error, and has no time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from statistics import median
from typing import Any

import torch
from harness import Case, Row, arguments, in_turns, launched, ratio, run
from torch import Tensor

from qtrain_kernels import dispatch
from qtrain_kernels.formats import get_format
from qtrain_kernels.plans import Plan
from qtrain_kernels.qtensor import Layout, QTensor, quantize

FORMATS = ("int4_sym/32/float16", "int4_sym/128/float16", "mxfp4", "nvfp4", "int4", "mxfp8_e4m3")
ROWS = (1, 8, 16, 64)
COLD = {"cpu": 2**22, "cuda": 2**28}  # bytes of weights; an H100 has 50 MB of cache, and a CPU's is not the question


def layout_of(name: str, n: int, k: int) -> Layout:
    """Packed, by the format's default scale rule."""
    fmt = get_format(name)
    plan = Plan(fmt.element, fmt.scale_kind, fmt.block_size, fmt.default_scale, scale_element=fmt.scale_element)
    return Layout(plan, (n, k), storage="packed")


def in_turn(product: Callable[[Any], Tensor], weights: list[Any]) -> Callable[[], Tensor]:
    """A call takes the next weight."""
    turns = cycle(weights)
    return lambda: product(next(turns))


def measure(name: str, rows: int, size: tuple[int, int], options: argparse.Namespace) -> Row:
    (k, n), device = size, options.device
    layout, draws = layout_of(name, n, k), torch.Generator().manual_seed(rows)
    module = dispatch.few_rows(options.backend, device, layout)
    weight, x = (torch.randn(each, k, generator=draws).to(device, torch.bfloat16) for each in (n, rows))
    q = quantize(weight, layout, backend=options.backend)
    held = sum(tensor.nbytes for tensor in q.tensors())
    packed = [module.FewRows(each) for each in cloned(q, COLD[device] // held + 1)]
    plain = [weight.clone() for _ in range(COLD[device] // weight.nbytes + 1)]
    if not options.rehearse:
        check(packed[0](x), x, q)
    functions = {
        "ours": in_turn(lambda each: each(x), packed),
        "bfloat16": in_turn(lambda each: x @ each.T, plain),
        "dequantised": lambda: x @ q.dequantize(options.backend).to(torch.bfloat16).T,
        "copy": torch.empty(COLD[device], dtype=torch.uint8, device=device).clone,
    }
    times = in_turns(functions, options.rounds, device)
    moved, seconds = held + x.nbytes + 4 * rows * n, median(times["ours"])
    return {
        "ms": seconds * 1e3,
        "GB/s": moved / seconds / 1e9,
        "of copy bandwidth": moved / (2 * COLD[device]) * ratio(times, "copy", "ours"),
        "x bfloat16": ratio(times, "bfloat16", "ours"),
        "x dequantised": ratio(times, "dequantised", "ours"),
        **launched(functions["ours"], device),
    }


def cloned(q: QTensor, count: int) -> list[QTensor]:
    """So many copies, the first of which is q."""
    return [q, *(QTensor.of(q.layout, [each.clone() for each in q.tensors()]) for _ in range(count - 1))]


def check(found: Tensor, x: Tensor, q: QTensor) -> None:
    """ValueError where a result is further from the exact one than sums in float32 explain."""
    values = q.dequantize("reference").double()
    exact, size = x.double() @ values.T, x.double().abs() @ values.abs().T
    off = (found.double() - exact).abs() / ((x.shape[1] + 64) * 2.0**-23 * size)
    if not (off <= 1).all():
        wrong = (~(off <= 1)).count_nonzero().item()
        raise ValueError(f"{wrong} of {off.numel()} results are wrong, by up to {off.max().item():.3g} times the bound")


def cases(k: int, n: int, options: argparse.Namespace) -> Iterator[Case]:
    """Each format that the backend multiplies in its bits, by each number of rows that it takes."""
    for name in FORMATS:
        layout = layout_of(name, n, k)
        module = dispatch.few_rows(options.backend, options.device, layout)
        for rows in ROWS:
            if module is not None and rows <= module.most(layout):
                yield f"{name}, {rows}x{k}x{n}", partial(measure, name, rows, (k, n), options)


def main() -> int:
    options = arguments(__doc__, features=1024, out_features=1024, rounds=5)
    size = options.features, options.out_features
    name, title = f"few-rows-{size[0]}x{size[1]}", f"few rows times a packed weight, {size[0]} -> {size[1]}"
    return run(name, title, "weight", cases(*size, options), options)


if __name__ == "__main__":
    sys.exit(main())
