"""Quantise and dequantise a float32 matrix: time, share of a copy's speed, against the reference and torchao.

    python kernels/bench/bench_quantize.py
    python kernels/bench/bench_quantize.py --size 8192 --rounds 20 --out kernels/bench/results

A copy is `x.clone()`: it reads what a quantiser reads and writes what it writes, into fresh memory as that does. GB/s
counts one read and one write of the matrix. Equal: the share of values that are the reference's, bit for bit; where
one is not, no time is shown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from harness import Row, arguments, equality, in_turns, ratio, run, sqnr
from torch import Tensor

import qtrain

CASES: dict[str, dict[str, Any]] = {
    "MXFP4": {"format": "mxfp4"},
    "MXFP4, Hadamard 32": {"format": "mxfp4", "rotation": "hadamard32"},
    "MXFP4 std, Hadamard 32": {"format": "mxfp4", "scale": "std", "rotation": "hadamard32"},
    "MXFP4 least error": {"format": "mxfp4", "scale": "mse"},
    "MXFP4 stochastic, Hadamard 32": {
        "format": "mxfp4", "scale": "floor_three_quarters", "rounding": "stochastic", "rotation": "hadamard32",
    },
    "MXFP8": {"format": "mxfp8_e4m3"},
    "NVFP4": {"format": "nvfp4"},
    "NVFP4 four over six": {"format": "nvfp4", "scale": "four_over_six"},
    "NVFP4 MS-EDEN, Hadamard 128": {
        "format": "nvfp4", "scale": "absmax_fitted", "rounding": "eden", "rotation": "hadamard128",
    },
    "INT4, Hadamard 128": {"format": "int4", "rotation": "hadamard128"},
}  # fmt: skip


def torchao_cast(format: str) -> Callable[[Tensor], Tensor] | None:
    """torchao's MX cast and back, eager; None where it has none of this format or is not installed."""
    try:
        from torchao.prototype.mx_formats.mx_tensor import MXTensor
    except ImportError:
        return None
    element = {"mxfp4": torch.float4_e2m1fn_x2, "mxfp8_e4m3": torch.float8_e4m3fn}.get(format)
    return None if element is None else lambda x: MXTensor.to_mx(x, element, 32).dequantize(torch.float32)


def measure(name: str, x: Tensor, options: argparse.Namespace) -> Row:
    case, device = CASES[name], x.device.type
    ours = partial(qtrain.fake_quantize, x, backend=options.backend, **case)
    reference = partial(qtrain.fake_quantize, x, backend="reference", **case)
    found = ours()
    quality = {"SQNR dB": sqnr(found, x), **equality([(found, reference())], options)}
    if quality["equal"] not in (1, None):
        return quality
    peer = torchao_cast(case["format"]) if set(case) == {"format"} else None
    functions = {"ours": ours, "copy": x.clone, "reference": reference}
    if peer is not None:
        functions["torchao"] = partial(peer, x)
    times = in_turns(functions, options.rounds, device)
    seconds = median(times["ours"])
    return {
        "ms": seconds * 1e3,
        "GB/s": 2 * x.nbytes / seconds / 1e9,
        "of copy speed": ratio(times, "copy", "ours"),
        "x reference": ratio(times, "reference", "ours"),
        "x torchao": ratio(times, "torchao", "ours") if peer is not None else None,
        **quality,
    }


def main() -> int:
    options = arguments(__doc__, size=4096, rounds=5)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.size, options.size, generator=generator).to(options.device)
    cases = ((name, partial(measure, name, x, options)) for name in CASES)
    title = f"quantise and dequantise {options.size} x {options.size} float32"
    return run(f"quantize-{options.size}", title, "case", cases, options)


if __name__ == "__main__":
    sys.exit(main())
