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
from functools import cached_property, partial
from statistics import median
from typing import Any, Literal

import torch
from harness import Case, Row, arguments, equality, in_turns, ratio, run, sqnr
from torch import Tensor

from qtrain_kernels import dispatch, gpu, reference
from qtrain_kernels.formats import get_format
from qtrain_kernels.plans import Mask, Packed, Plan, Rotation, can_pack, stored_integer
from qtrain_kernels.qtensor import Layout, Storage, quantize

Along = Literal["rows", "columns"]
E2M1, INT4 = get_format("mxfp4").element, get_format("int4").element
MXFP4 = Plan(E2M1, "e8m0", 32, "floor")
NVFP4 = Plan(E2M1, "minifloat", 16, "absmax", scale_element=get_format("nvfp4").scale_element)
PLANS: dict[str, tuple[Plan, int | None, torch.dtype]] = {  # plan, rotation, dtype of the operand
    "MXFP4": (MXFP4, None, torch.bfloat16),
    "MXFP4 std, clip": (replace(MXFP4, rule="std", mask=Mask("inside", 6.0)), 32, torch.bfloat16),
    "MXFP4 three quarters": (replace(MXFP4, rule="floor_three_quarters"), 32, torch.bfloat16),
    "MXFP4 stochastic": (replace(MXFP4, rule="floor_three_quarters", rounding="stochastic"), 32, torch.bfloat16),
    "MXFP4 least error": (replace(MXFP4, rule="mse"), None, torch.bfloat16),
    "MXFP8": (Plan(get_format("mxfp8_e4m3").element, "e8m0", 32, "rceil"), None, torch.bfloat16),
    "NVFP4": (NVFP4, 16, torch.bfloat16),
    "NVFP4 four over six": (replace(NVFP4, rule="four_over_six"), 16, torch.bfloat16),
    "NVFP4 MS-EDEN": (
        replace(NVFP4, rule="absmax_fitted", rounding="eden", correction=16), 128, torch.bfloat16,
    ),
    "INT4 QuEST, trust": (Plan(INT4, "float32", None, "gaussian", mask=Mask("error", 0.5)), 128, torch.int8),
    "FP8 by rows": (Plan(get_format("fp8_e4m3").element, "float32", None, "absmax"), None, torch.bfloat16),
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
        self.plan, size, self.dtype = PLANS[name]
        self.x, self.rows = x, along == "rows"
        self.rotation = None if size is None else Rotation(size, signs_on(x.device, size))
        self.lines = x[:, :, None] if self.rows else x[None]
        self.key = key_on(x.device)
        self.backend = backend
        self.get = partial(dispatch.get, backend=backend, device_type=x.device.type)

    @cached_property
    def scale(self) -> Tensor | float:
        return reference.tensor_scale(self.lines, self.plan, self.rotation)

    @cached_property
    def arguments(self) -> tuple[Any, ...]:
        """Of `operand`; block scales along rows alone, where the backward packs them."""
        span = self.plan.span or self.lines.shape[1]
        view = self.x.reshape(-1, span, self.lines.shape[2])
        return view, self.scale, self.key, self.plan, self.dtype, self.rotation, self.rows

    def both(self, operation: str, *arguments: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """The backend's operation and the reference's with their arguments."""
        return partial(self.get(operation), *arguments), partial(getattr(reference, operation), *arguments)

    def operand(self) -> Operation:
        """A whole QTensor, its tensor scale and mask included."""
        storage: Storage = "int8" if self.dtype == torch.int8 else "bfloat16"
        layout = Layout(self.plan, (self.x.shape[0], self.x.shape[1]), -1 if self.rows else -2)
        layout = layout.stored(storage, blocks=self.rows)
        key = self.key if self.plan.rounding_mode.draws else None

        def run(backend: str) -> list[Tensor]:
            return quantize(self.x, layout, self.rotation, key, backend=backend).tensors()

        undefined = self.without_integer if self.dtype == torch.int8 else None
        ours, wanted = partial(run, self.backend), partial(run, "reference")
        return Operation(ours, wanted, (self.x, key), self.restored, undefined)

    def without_integer(self) -> Tensor:
        """Where a code is NaN."""
        view, scale, key, plan, *_ = self.arguments
        return ~reference.encode(view, scale, key, plan, self.rotation)[0].isfinite().view(self.x.shape)

    def restored(self, found: Any) -> Tensor:
        values, unit = found[0].float(), 1.0
        if self.dtype == torch.int8:
            unit, offset = stored_integer(self.plan.element)
            values = values + offset
        values = values.view(self.lines.shape) * unit * self.scale
        return reference.unrotate(values, self.rotation, None, torch.float32)

    def packed(self) -> tuple[Tensor, Tensor | None, Packed]:
        """Values, block scales, and both packed."""
        values, blocks, _ = reference.operand(*self.arguments)
        return values, blocks, reference.pack(values, blocks, self.plan)

    def pack(self) -> Operation:
        values, blocks, _ = self.packed()
        ours, wanted = self.both("pack", values, blocks, self.plan)
        return Operation(ours, wanted, (values, blocks))

    def unpack(self) -> Operation:
        values, _, packed = self.packed()
        ours, wanted = self.both("unpack", packed, values.shape, self.plan, self.dtype)
        return Operation(ours, wanted, tuple(packed))

    def mask(self) -> Tensor:
        found = reference.operand(*self.arguments)[2]
        assert found is not None
        return found

    def unrotate(self) -> Operation:
        mask = self.mask().view(self.lines.shape)
        ours, wanted = self.both("unrotate", self.lines, self.rotation, mask, torch.bfloat16)
        return Operation(ours, wanted, (self.x, mask))

    def join(self) -> Operation:
        mask = self.mask().flatten()
        ours, wanted = self.both("join", mask, 1)
        return Operation(ours, wanted, (mask,))

    def split(self) -> Operation:
        mask = self.mask().flatten()
        joined = reference.join(mask, 1)
        ours, wanted = self.both("split", joined, 1, mask.numel())
        return Operation(ours, wanted, (joined,))


def operations(x: Tensor, along: Along, backend: str) -> Iterator[tuple[str, Callable[[], Operation]]]:
    """Every operation on operands of x by each of PLANS, named. What runs before the operation runs in the call."""
    for name, (plan, size, _) in PLANS.items():
        on = Operand(name, x, along, backend)
        yield f"operand, {name}, {along}", on.operand
        if along == "rows" and can_pack(plan) and not plan.rounding_mode.corrects:
            yield f"pack, {name}", on.pack
            yield f"unpack, {name}", on.unpack
        if along == "rows" and plan.mask is not None:
            if size is not None:
                yield f"unrotate with mask, {name}", on.unrotate
            yield f"join of the mask, {name}", on.join
            yield f"split of the mask, {name}", on.split
    if along == "rows" and backend == "triton" and x.shape[0] % 32 == 0:
        yield "quantize_both, MXFP4 stochastic", partial(both_dims, x)


def both_dims(x: Tensor) -> Operation:
    """One reading of a matrix for both of its dims, against two of the reference; Triton's alone."""
    plan, size, _ = PLANS["MXFP4 stochastic"]
    assert size is not None and plan.block is not None
    key, signs = key_on(x.device), signs_on(x.device, size)
    rotation, shape = Rotation(size, signs), (x.shape[0], x.shape[1])
    layouts = [Layout(plan, shape, dim, "bfloat16") for dim in (-1, -2)]

    def wanted() -> list[Tensor]:
        return [quantize(x, layout, rotation, key, backend="reference").codes for layout in layouts]

    sides = [gpu.Side(layout, rotation, key) for layout in layouts]
    return Operation(lambda: gpu.quantize_both(x, *sides), wanted, (x,))


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
