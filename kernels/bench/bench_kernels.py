"""Each operation of a backend alone: time, bytes moved, and its share of the bandwidth that a copy reaches.

    python kernels/bench/bench_kernels.py
    python kernels/bench/bench_kernels.py --rows 16384 --columns 4096 --out kernels/bench/results

On a matrix in bfloat16. Bytes: what the operation is given, read once, and what it gives, written once. A copy is
`x.clone()` of the matrix, in the same rounds. Equal: the share of all values that are the reference's, bit for bit;
where one is not, no time is shown. SQNR: of the matrix as quantised, dequantised and rotated back.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
from harness import Case, Row, arguments, equality, in_turns, ratio, run, sqnr
from torch import Tensor

from qtrain_kernels import dispatch, gpu, reference
from qtrain_kernels.formats import get_format
from qtrain_kernels.plans import Mask, Packed, Plan, Rotation, can_pack
from qtrain_kernels.qtensor import Layout, QTensor, Side, Storage, quantize

Along = Literal["rows", "columns"]
E2M1, INT4 = get_format("mxfp4").element, get_format("int4").element
MXFP4 = Plan(E2M1, "e8m0", 32, "floor")
NVFP4 = Plan(E2M1, "minifloat", 16, "absmax", scale_element=get_format("nvfp4").scale_element)
PLANS: dict[str, tuple[Plan, int | None, Storage]] = {  # plan, rotation, storage of the operand
    "MXFP4": (MXFP4, None, "bfloat16"),
    "MXFP4 std, clip": (replace(MXFP4, rule="std", mask=Mask("inside", 6.0)), 32, "bfloat16"),
    "MXFP4 three quarters": (replace(MXFP4, rule="floor_three_quarters"), 32, "bfloat16"),
    "MXFP4 stochastic": (replace(MXFP4, rule="floor_three_quarters", rounding="stochastic"), 32, "bfloat16"),
    "MXFP4 least error": (replace(MXFP4, rule="mse"), None, "bfloat16"),
    "MXFP8": (Plan(get_format("mxfp8_e4m3").element, "e8m0", 32, "rceil"), None, "bfloat16"),
    "NVFP4": (NVFP4, 16, "bfloat16"),
    "NVFP4 four over six": (replace(NVFP4, rule="four_over_six"), 16, "bfloat16"),
    "NVFP4 MS-EDEN": (
        replace(NVFP4, rule="absmax_fitted", rounding="eden", correction=16), 128, "bfloat16",
    ),
    "INT4 QuEST, trust": (Plan(INT4, "float32", None, "gaussian", mask=Mask("error", 0.5)), 128, "int8"),
    "FP8 by rows": (Plan(get_format("fp8_e4m3").element, "float32", None, "absmax"), None, "bfloat16"),
}  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """An operation by the backend and by the reference, on the same tensors.

    given: what the operation reads. restored: makes a result the matrix again. undefined: marks elements of the first
    result that may hold anything.
    """

    ours: Callable[[], Any]
    wanted: Callable[[], Any]
    given: tuple[Tensor | None, ...]
    restored: Callable[[Any], Tensor] | None = None
    undefined: Callable[[], Tensor] | None = None

    def pairs(self, found: Any) -> list[tuple[Tensor, Tensor]]:
        """The tensors of a result, each beside the reference's. ValueError where one has more than the other."""
        pairs = list(zip(tensors(found), tensors(self.wanted()), strict=True))
        if self.undefined is not None:
            hidden = self.undefined()
            pairs[0] = pairs[0][0].masked_fill(hidden, 0), pairs[0][1].masked_fill(hidden, 0)
        return pairs


def tensors(found: Any) -> list[Tensor]:
    """Those of a result."""
    if isinstance(found, Tensor):
        return [found]
    return [tensor for each in found if each is not None for tensor in tensors(each)]


def key_on(device: torch.device) -> Tensor:
    return torch.tensor([1374496523, -987654321], dtype=torch.int32, device=device)


def signs_on(device: torch.device, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return (torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1.0).to(device)


class Operand:
    """A matrix that is quantised along its rows or columns by one of PLANS, and the operations on it."""

    def __init__(self, name: str, x: Tensor, along: Along, backend: str):
        self.plan, size, storage = PLANS[name]
        self.x, dim = x, -1 if along == "rows" else -2
        self.plan = self.plan if dim == -1 else replace(self.plan, mask=None)  # masks are of forwards, along rows
        self.layout = Layout(self.plan, (x.shape[0], x.shape[1]), dim, storage)
        self.rotation = None if size is None else Rotation(size, signs_on(x.device, size))
        self.key = key_on(x.device) if self.plan.rounding_mode.draws else None
        self.lines = self.layout.whole_lines(x)
        self.get = partial(dispatch.get, backend=backend, device_type=x.device.type)

    def quantize(self, storage: Storage | None = None, packed: bool = False) -> Operation:
        """Into a storage, with packed codes beside it."""
        layout = self.layout.stored(storage or self.layout.storage)
        side = Side(layout, self.rotation, self.key, packed=packed)
        ours = partial(self.get("quantize"), self.x, side)
        if layout.held is layout:
            wanted = partial(reference.quantize, self.x, side)
        else:
            wanted = quantize(self.x, layout, self.rotation, self.key, backend="reference").tensors
        undefined = self.without_integer if layout.storage == "int8" else None
        return Operation(ours, wanted, (self.x, self.key), partial(self.restored, layout), undefined)

    def without_integer(self) -> Tensor:
        """Where a code is NaN."""
        return ~quantize(
            self.x, self.layout.stored("float32"), self.rotation, self.key, backend="reference"
        ).codes.isfinite()

    def restored(self, layout: Layout, found: Any) -> Tensor:
        codes, blocks, scale, mask, *_ = found
        values = QTensor(codes, blocks, scale, mask, layout).dequantize("reference").float()
        return reference.unrotate(layout.whole_lines(values), self.rotation, None, torch.float32)

    def unpack(self) -> Operation:
        packed = quantize(self.x, self.layout.stored("packed"), self.rotation, self.key, backend="reference")
        shape = torch.Size(
            (self.x.numel() // (self.plan.block or self.x.shape[1]), self.plan.block or self.x.shape[1], 1)
        )
        blocks = None if packed.block_scale is None else packed.block_scale.view(-1)
        dtype = torch.int8 if self.layout.storage == "int8" else torch.bfloat16
        given = Packed(packed.codes.view(-1), blocks), shape, self.plan, dtype
        ours, wanted = partial(self.get("unpack"), *given), partial(reference.unpack, *given)
        return Operation(ours, wanted, (packed.codes, blocks))

    def mask(self) -> Tensor:
        found = quantize(self.x, self.layout, self.rotation, self.key, backend="reference").mask
        assert found is not None
        return found

    def unrotate(self) -> Operation:
        mask = self.mask()
        given = self.lines, self.rotation, mask, torch.bfloat16
        return Operation(partial(self.get("unrotate"), *given), partial(reference.unrotate, *given), (self.x, mask))

    def split(self) -> Operation:
        given = mask, *_ = self.mask(), 1, self.x.numel()
        return Operation(partial(self.get("split"), *given), partial(reference.split, *given), (mask,))


def operations(x: Tensor, along: Along, backend: str) -> Iterator[tuple[str, Callable[[], Operation]]]:
    """Every operation on operands of x by each of PLANS, named. What runs before the operation runs in the call."""
    fused = backend == "triton" or (backend == "auto" and x.is_cuda)
    for name, (plan, size, _) in PLANS.items():
        on = Operand(name, x, along, backend)
        yield f"quantize, {name}, {along}", on.quantize
        if fused and plan.scale_kind == "e8m0":
            yield f"quantize in float8_128, {name}, {along}", partial(on.quantize, "float8_128")
        if along == "rows" and can_pack(plan):
            yield f"quantize and pack, {name}", partial(on.quantize, packed=True)
            yield f"unpack, {name}", on.unpack
        if along == "rows" and plan.mask is not None:
            if size is not None:
                yield f"unrotate with mask, {name}", on.unrotate
            yield f"split of the mask, {name}", on.split
    if along == "rows" and fused and x.shape[0] % 32 == 0:
        yield "quantize_both, MXFP4 stochastic", partial(both_dims, x)


def both_dims(x: Tensor) -> Operation:
    """One reading of a matrix for both of its dims, against two of the reference; Triton's alone."""
    sides = []
    for along in ("rows", "columns"):
        on = Operand("MXFP4 stochastic", x, along, "reference")
        sides.append(Side(on.layout, on.rotation, on.key))
    wanted = [partial(reference.quantize, x, side) for side in sides]
    return Operation(lambda: gpu.quantize_both(x, *sides), lambda: [each() for each in wanted], (x,))


def measure(build: Callable[[], Operation], x: Tensor, options: argparse.Namespace) -> Row:
    """Bytes, quality and, if every bit is the reference's, the time of an operation on x."""
    operation = build()
    found = operation.ours()
    moved = sum(tensor.nbytes for tensor in tensors((*operation.given, *tensors(found))))
    row: Row = {"bytes an element": moved / x.numel()}
    quality = {
        "SQNR dB": None if operation.restored is None else sqnr(operation.restored(found).view(x.shape), x),
        **equality(operation.pairs(found), options),
    }
    if quality["equal"] not in (1, None):
        return row | quality
    times = in_turns({"ours": operation.ours, "copy": x.clone}, options.rounds, x.device.type)
    seconds = median(times["ours"])
    return row | {
        "ms": seconds * 1e3,
        "GB/s": moved / seconds / 1e9,
        "of copy bandwidth": ratio(times, "copy", "ours") * moved / (2 * x.nbytes),
        **quality,
    }


def cases(rows: int, columns: int, options: argparse.Namespace) -> Iterator[Case]:
    """Of all operations on one Gaussian matrix (rows, columns) in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator).to(options.device, torch.bfloat16)
    for along in ("rows", "columns"):
        for name, build in operations(x, along, options.backend):
            yield name, partial(measure, build, x, options)


def main() -> int:
    options = arguments(__doc__, rows=2048, columns=4096, rounds=10)
    title = f"operations on {options.rows} x {options.columns} bfloat16"
    found = cases(options.rows, options.columns, options)
    return run(f"kernels-{options.rows}x{options.columns}", title, "operation", found, options)


if __name__ == "__main__":
    sys.exit(main())
