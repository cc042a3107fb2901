"""Packing on the GPU by Triton: the twins of reference.pack, unpack, join and split, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qtrain_kernels.checks import check_fields, check_packable, check_packed
from qtrain_kernels.plans import Packed, Plan, field_width, grids, scale_nan, stored_integer
from qtrain_kernels.quantize import TRITON, Spec, Tile, check_kernel, launch, obstacle, read_spec

SIZE = 4096  # elements of a program; blocks divide it


@dataclass(frozen=True)
class Form:
    """What a kernel of packing is compiled for. bits, width: of a code, and of the field that holds it; scale_nan: a
    scale's byte; values: integers (of `unit` and `offset`), bfloat16, or neither: float32."""

    plan: Plan
    bits: int
    width: int
    scale_nan: int
    unit: float
    offset: float
    integers: bool
    bfloat16: bool


@cache
def _form(plan: Plan, dtype: torch.dtype) -> Form:
    unit, offset = stored_integer(plan.element)
    width = field_width(plan.element)
    kinds = {"integers": dtype == torch.int8, "bfloat16": dtype == torch.bfloat16}
    return Form(plan, plan.element.bits, width, scale_nan(plan), unit, offset, **kinds)


def pack(values: Tensor, blocks: Tensor | None, plan: Plan) -> Packed:
    """Equals reference.pack bit for bit. ValueError for a device, dtype or block that there is no kernel for."""
    _check(values, plan)
    check_packable(values, blocks, plan)
    blocks = None if blocks is None else blocks.contiguous()
    found = _pack(values.detach().contiguous(), blocks, str(Spec(grids(plan))))
    return Packed(found[0], found[1] if len(found) > 1 else None)


def unpack(packed: Packed, shape: torch.Size, plan: Plan, dtype: torch.dtype) -> Tensor:
    """Equals reference.unpack bit for bit. ValueError as `pack`."""
    _check_device(packed.codes)
    check_packed(packed, shape, plan)
    check_kernel(plan, None)
    scales = None if packed.scales is None else packed.scales.contiguous()
    return _unpack(packed.codes.contiguous(), scales, str(Spec(grids(plan))), list(shape), dtype)


def join(fields: Tensor, width: int) -> Tensor:
    """Equals reference.join bit for bit. ValueError as `pack`."""
    _check_device(fields)
    check_fields(fields, width)
    return _join(fields.contiguous(), width)


def split(joined: Tensor, width: int, count: int) -> Tensor:
    """Equals reference.split bit for bit. ValueError as `pack`."""
    _check_device(joined)
    check_fields(joined, width, count)
    return _split(joined.contiguous(), width, count)


def _check_device(x: Tensor) -> None:
    reason = obstacle(x.device.type)
    if reason:
        raise ValueError(f"backend 'triton' cannot run on {x.device.type}: {reason}")


def _check(values: Tensor, plan: Plan) -> None:
    _check_device(values)
    check_kernel(plan, None)
    if values.dtype not in (torch.float32, torch.bfloat16, torch.int8):
        raise ValueError(f"backend 'triton' packs float32, bfloat16 or int8; got {values.dtype}")


def _launch(kernel: object, x: Tensor, packed: Tensor, scales: tuple[Tensor | None, ...], form: Form | int) -> None:
    """One program for each SIZE elements of x. Both sizes are arguments of their own: of one, a kernel does not see how
    the other divides, and goes byte by byte."""
    if x.numel():
        launch(kernel, x.view(-1, 1), Tile(SIZE, 1, 4), packed, *scales, x.numel(), packed.numel(), form, SIZE)


def _bytes(count: int, width: int, like: Tensor) -> Tensor:
    return torch.empty(-(-count * width // 8), dtype=torch.uint8, device=like.device)


def _empty_packed(values: Tensor, blocks: Tensor | None, plan: Plan) -> list[Tensor]:
    codes = _bytes(values.numel(), field_width(plan.element), values)
    return [codes] if blocks is None else [codes, _bytes(blocks.numel(), 8, values)]


@TRITON.operator
def _pack(values: Tensor, blocks: Tensor | None, spec: str) -> list[Tensor]:
    """Codes, and scales where there are blocks; of the plan in a Spec."""
    from qtrain_kernels.triton_packing import pack_kernel

    plan = read_spec(spec).plan
    found = _empty_packed(values, blocks, plan)
    scales = None if blocks is None else found[1]
    _launch(pack_kernel, values, found[0], (blocks, scales), _form(plan, values.dtype))
    return found


@TRITON.fake(_pack)
def _(values: Tensor, blocks: Tensor | None, spec: str) -> list[Tensor]:
    return _empty_packed(values, blocks, read_spec(spec).plan)


@TRITON.operator
def _unpack(codes: Tensor, scales: Tensor | None, spec: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    from qtrain_kernels.triton_packing import unpack_kernel

    values = torch.empty(shape, dtype=dtype, device=codes.device)
    _launch(unpack_kernel, values, codes, (scales,), _form(read_spec(spec).plan, dtype))
    return values


@TRITON.fake(_unpack)
def _(codes: Tensor, scales: Tensor | None, spec: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


@TRITON.operator
def _join(fields: Tensor, width: int) -> Tensor:
    from qtrain_kernels.triton_packing import join_kernel

    joined = _bytes(fields.numel(), width, fields)
    _launch(join_kernel, fields, joined, (), width)
    return joined


@TRITON.fake(_join)
def _(fields: Tensor, width: int) -> Tensor:
    return _bytes(fields.numel(), width, fields)


@TRITON.operator
def _split(joined: Tensor, width: int, count: int) -> Tensor:
    from qtrain_kernels.triton_packing import split_kernel

    fields = torch.empty(count, dtype=torch.uint8, device=joined.device)
    _launch(split_kernel, fields, joined, (), width)
    return fields


@TRITON.fake(_split)
def _(joined: Tensor, width: int, count: int) -> Tensor:
    return joined.new_empty(count)
