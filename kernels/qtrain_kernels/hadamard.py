"""Rotations and the tensor scale of rotated values on the GPU by Triton, without writing what is rotated: the twins of
reference.rotate, unrotate and tensor_scale, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from qtrain_kernels import reference
from qtrain_kernels.checks import check_mask, check_same_device, check_spans
from qtrain_kernels.plans import Plan, Rotation
from qtrain_kernels.quantize import TRITON, Tile, check_kernel, check_matrix, launch, signs_of, tile_of


@dataclass(frozen=True)
class Turn:
    """What a rotation's kernel is compiled for. first, second: how two scales multiply what comes in, a number or how
    many of them are read; side: as of a Job; bits: eight of the mask in a byte."""

    dim: int
    rotation: int | None
    rows: int
    columns: int
    side: int
    inverse: bool = False
    output: Literal["bfloat16", "float32"] = "float32"
    single: bool = False
    first: float | Literal["single", "rows", "columns"] = 1.0
    second: float | Literal["single", "rows", "columns"] = 1.0
    bits: bool = False


def rotate(x: Tensor, rotation: Rotation | None) -> Tensor:
    """Equals reference.rotate bit for bit: x (outer, span, inner) float32 or bfloat16 -> x D H, float32. ValueError for
    a device, dtype, size or rotation that there is no kernel for."""
    return x.float() if rotation is None else _turned(x, rotation, None, torch.float32, False, ())


def unrotate(
    x: Tensor,
    rotation: Rotation | None,
    mask: Tensor | None,
    dtype: torch.dtype,
    scales: Sequence[Tensor | float] = (),
) -> Tensor:
    """Equals reference.unrotate bit for bit: (x * scales * mask) (D H)^-1 in dtype, in one kernel, of up to two scales:
    floats, () or one for each place of a dim of x, float32. ValueError as `rotate`."""
    if rotation is None and mask is None and not scales:
        return x.to(dtype)
    return _turned(x, rotation, mask, dtype, True, scales)


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
    if span and span % width == 0:
        return x.view(outer, span), -1
    if x.numel() % width:
        raise ValueError(f"x must fill rotations of {width}; got {tuple(x.shape)}; pad it with zeros")
    return x.view(x.numel() // width, width), -1


def _turned(
    x: Tensor,
    rotation: Rotation | None,
    mask: Tensor | None,
    dtype: torch.dtype,
    inverse: bool,
    scales: Sequence[Tensor | float],
) -> Tensor:
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"a rotation gives bfloat16 or float32; asked for {dtype}")
    size = None if rotation is None else rotation.size
    check_kernel(None, size)
    matrix, dim = _matrix(x, size or 1)
    check_matrix(matrix, dim, size or 1)
    if mask is not None and 8 * mask.numel() == x.numel() > 0 and matrix.shape[1] % 8 == 0:
        mask = mask.reshape(matrix.shape[0], -1)
    else:
        check_mask(mask, x)
        mask = None if mask is None else mask.contiguous().view(matrix.shape)
    if len(scales) > 2:
        raise ValueError(f"backend 'triton' multiplies by up to two scales; got {len(scales)}")
    read = [_lined(scale, x, matrix) if isinstance(scale, Tensor) else None for scale in scales]
    factors = [1.0 if isinstance(scale, Tensor) else scale for scale in scales]
    first, second = [*read, None, None][:2]
    found = _turn(
        matrix, mask, signs_of(rotation, x), first, second, [*factors, 1.0, 1.0][:2], size, dim, inverse, dtype
    )
    return found.view(x.shape)


def _lined(scale: Tensor, x: Tensor, matrix: Tensor) -> Tensor:
    """A scale that broadcasts to x, as () or (M, 1) or (1, K) of its matrix."""
    outer, span, inner = x.shape
    places: dict[tuple[int, ...], tuple[int, int]] = {}
    if inner == 1 and matrix.shape == (outer, span):
        places = {(outer, 1, 1): (outer, 1), (1, span, 1): (1, span)}
    elif outer == 1:
        places = {(1, span, 1): (span, 1), (1, 1, inner): (1, inner)}
    check_same_device(x, scale=scale)
    shape = () if scale.numel() == 1 else places.get(tuple(scale.shape))
    if scale.dtype != torch.float32 or shape is None:
        raise ValueError(
            f"a scale of {tuple(x.shape)} is a float, or float32, () or one for each place of one dim; "
            f"got {tuple(scale.shape)} {scale.dtype}"
        )
    return scale.detach().reshape(shape)


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
    x: Tensor,
    mask: Tensor | None,
    signs: Tensor | None,
    first: Tensor | None,
    second: Tensor | None,
    factors: list[float],
    size: int | None,
    dim: int,
    inverse: bool,
    dtype: torch.dtype,
) -> Tensor:
    """x (M, K) rotated along dim in blocks of size; or scaled, masked (mask: (M, K), or (M, K / 8) bits) and rotated
    back. first, second: (), (M, 1) or (1, K) float32, or one of the factors instead."""
    from qtrain_kernels.triton_quantize import rotate_kernel

    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel():
        tile = tile_of(dim, size or 1, x.shape[1])
        output = "bfloat16" if dtype == torch.bfloat16 else "float32"
        kinds = _kind(first, factors[0]), _kind(second, factors[1])
        bits = mask is not None and mask.shape != x.shape
        job = Turn(
            dim, size, tile.rows, tile.columns, _side(dim, size, tile), inverse, output, False, kinds[0], kinds[1], bits
        )
        launch(rotate_kernel, x, tile, mask, signs, first, second, y, *x.shape, job)
    return y


def _side(dim: int, size: int | None, tile: Tile) -> int:
    return tile.side if dim == -2 and size else 1


def _kind(scale: Tensor | None, factor: float) -> float | Literal["single", "rows", "columns"]:
    if scale is None:
        return factor
    return "single" if not scale.ndim else "rows" if scale.shape[1] == 1 else "columns"


@TRITON.fake(_turn)
def _(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=arguments[-1])


@TRITON.operator
def _largest(x: Tensor, signs: Tensor | None, size: int | None, dim: int, single: bool) -> Tensor:
    """float32 magnitudes of x (M, K) rotated along dim: (), (M,) for dim -1 or (K,) for -2."""
    from qtrain_kernels.triton_quantize import amax_kernel

    bits = torch.zeros(_lines(x, dim, single), dtype=torch.int32, device=x.device)
    if x.numel():
        tile = tile_of(dim, size or 1, x.shape[1])
        job = Turn(dim, size, tile.rows, tile.columns, _side(dim, size, tile), single=single)
        launch(amax_kernel, x, tile, signs, bits, *x.shape, job)
    return bits.view(torch.float32)


TRITON.fake(_largest)(lambda x, signs, size, dim, single: x.new_empty(_lines(x, dim, single), dtype=torch.float32))


def _lines(x: Tensor, dim: int, single: bool) -> tuple[int, ...]:
    return () if single else (x.shape[-3 - dim],)
