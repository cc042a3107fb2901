"""Rotations and the tensor scale of rotated values on the GPU by Triton, without writing what is rotated: the twins of
reference.rotate, unrotate and tensor_scale, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qtrain_kernels import reference
from qtrain_kernels.checks import check_mask, check_spans
from qtrain_kernels.plans import Plan, Rotation
from qtrain_kernels.quantize import TRITON, check_kernel, check_matrix, launch, signs_of, tile_of


@dataclass(frozen=True)
class Turn:
    """What a rotation's kernel is compiled for."""

    dim: int
    rotation: int | None
    rows: int
    columns: int
    inverse: bool = False
    output: Literal["bfloat16", "float32"] = "float32"
    single: bool = False


def rotate(x: Tensor, rotation: Rotation | None) -> Tensor:
    """Equals reference.rotate bit for bit: x (outer, span, inner) float32 or bfloat16 -> x D H, float32. ValueError for
    a device, dtype, size or rotation that there is no kernel for."""
    return x.float() if rotation is None else _turned(x, rotation, None, torch.float32, False)


def unrotate(x: Tensor, rotation: Rotation | None, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Equals reference.unrotate bit for bit: (x * mask) (D H)^-1 in dtype. ValueError as `rotate`."""
    if rotation is None:
        return reference.unrotate(x, None, mask, dtype)
    return _turned(x, rotation, mask, dtype, True)


def tensor_scale(x: Tensor, plan: Plan, rotation: Rotation | None = None) -> Tensor | float:
    """Equals reference.tensor_scale bit for bit. Largest magnitudes are found without writing x rotated; sums over
    rows are the reference's, of x rotated here. ValueError as `rotate`."""
    check_spans(x, x.device.type)
    constant = reference.constant_scale(plan)
    if constant is not None:
        return constant
    if not x.numel():
        return reference.tensor_scale(x, plan)
    rule = plan.line_rule
    if rule is not None and rule.statistic == "amax":
        return reference.scale_of_amax(_amax(x, rotation, plan.whole), rule)
    return reference.tensor_scale(rotate(x, rotation), plan)


def _matrix(x: Tensor, width: int) -> tuple[Tensor, int]:
    """x (outer, span, inner) as a matrix, and the dim along which its blocks of `width` lie."""
    check_spans(x, x.device.type)
    outer, span, inner = x.shape
    x = x.detach().contiguous()
    if inner != 1:
        return x.view(outer * span, inner), -2
    if x.numel() % width:
        raise ValueError(f"x must fill rotations of {width}; got {tuple(x.shape)}; pad it with zeros")
    return x.view(x.numel() // width, width), -1


def _turned(x: Tensor, rotation: Rotation, mask: Tensor | None, dtype: torch.dtype, inverse: bool) -> Tensor:
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"a rotation gives bfloat16 or float32; asked for {dtype}")
    check_kernel(None, rotation.size)
    check_mask(mask, x)
    matrix, dim = _matrix(x, rotation.size)
    check_matrix(matrix, dim, rotation.size)
    mask = None if mask is None else mask.contiguous().view(matrix.shape)
    return _turn(matrix, mask, signs_of(rotation, x), rotation.size, dim, inverse, dtype).view(x.shape)


def _amax(x: Tensor, rotation: Rotation | None, single: bool) -> Tensor:
    """() or (outer, 1, inner) float32: the largest magnitude of each row or column of x rotated, or of all."""
    outer, span, inner = x.shape
    size = None if rotation is None else rotation.size
    check_kernel(None, size)
    matrix, dim = _matrix(x, span)
    if dim == -2 and outer > 1 and not single:
        raise ValueError(f"columns with one scale each need an outer size of 1; got {tuple(x.shape)}")
    check_matrix(matrix, dim, size or 1)
    largest = _largest(matrix, signs_of(rotation, x), size, dim, single)
    return largest if single else largest.view(outer, 1, inner)


@TRITON.operator
def _turn(
    x: Tensor, mask: Tensor | None, signs: Tensor | None, size: int, dim: int, inverse: bool, dtype: torch.dtype
) -> Tensor:
    """x (M, K) rotated along dim in blocks of size, or masked and rotated back."""
    from qtrain_kernels.triton_quantize import rotate_kernel

    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel():
        tile = tile_of(dim, size, x.shape[1])
        output = "bfloat16" if dtype == torch.bfloat16 else "float32"
        job = Turn(dim, size, tile.rows, tile.columns, inverse, output)
        launch(rotate_kernel, x, tile, mask, signs, y, *x.shape, job)
    return y


@TRITON.fake(_turn)
def _(
    x: Tensor, mask: Tensor | None, signs: Tensor | None, size: int, dim: int, inverse: bool, dtype: torch.dtype
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@TRITON.operator
def _largest(x: Tensor, signs: Tensor | None, size: int | None, dim: int, single: bool) -> Tensor:
    """float32 magnitudes of x (M, K) rotated along dim: (), (M,) for dim -1 or (K,) for -2."""
    from qtrain_kernels.triton_quantize import amax_kernel

    bits = torch.zeros(_lines(x, dim, single), dtype=torch.int32, device=x.device)
    if x.numel():
        tile = tile_of(dim, size or 1, x.shape[1])
        job = Turn(dim, size, tile.rows, tile.columns, single=single)
        launch(amax_kernel, x, tile, signs, bits, *x.shape, job)
    return bits.view(torch.float32)


@TRITON.fake(_largest)
def _(x: Tensor, signs: Tensor | None, size: int | None, dim: int, single: bool) -> Tensor:
    return x.new_empty(_lines(x, dim, single), dtype=torch.float32)


def _lines(x: Tensor, dim: int, single: bool) -> tuple[int, ...]:
    return () if single else (x.shape[-3 - dim],)
