"""The torch twin of every operation: runs anywhere, and is the definition of correct.

Layout of every operand here: (outer, block, inner) float32, quantised along dim 1. An operand (M, K) quantised along K
is (M * K / block, block, 1); along M it is (M / block, block, K): no transpose is ever made. A format with one scale
per row has block = the whole contraction dim.

x ≈ codes * block_scale * tensor_scale. `tensor_scale` sees whole rows or tensors and is computed by this file on every
backend; `encode` sees one block at a time and is what other backends replace. Exponents are read from the bits of a
float32, never from log2, and every sum that decides a scale is `tree_sum`, so that compiled code can agree bit for bit.

NaN and infinity stay visible: either one in a block (or row, or, with a tensor scale, tensor) makes all of it NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qtrain_kernels.formats import E4M3, Element, ScaleFormat

HEADROOM = 0.75  # Quartet's backward: amax < 8 * 2^e, so 3/4 of it stays within 6 * 2^e
NVFP4_RANGE = 6.0 * 448.0  # the largest code times the largest block scale
STD_EPS = 1e-8


@dataclass(frozen=True)
class Mask:
    """Which elements pass a gradient. inside: |u| < limit; within: |u| <= limit; error: |codes - u| <= limit, where
    u = x / (block_scale * tensor_scale). A zero row passes all of its gradient in each of them."""

    kind: Literal["inside", "within", "error"]
    limit: float


@dataclass(frozen=True)
class Plan:
    """What an operand's quantiser does after rotation. block None: one scale per row.

    rule: one of formats.SCALE_RULES; rounding: nearest (ties to even) | stochastic; mask: None where no gradient asks.
    """

    element: Element
    scale_format: ScaleFormat
    block: int | None
    rule: str
    rounding: Literal["nearest", "stochastic"]
    mask: Mask | None = None


# ----------------------------------------------------------------------------------------------------------- reductions


def tree_sum(x: Tensor) -> Tensor:
    """Sum over dim 1, kept: halves are added until one element is left, an odd last one waiting for the next round."""
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        folded = x[:, :half] + x[:, half : 2 * half]
        x = torch.cat((folded, x[:, 2 * half :]), dim=1) if x.shape[1] % 2 else folded
    return x


def rms(x: Tensor) -> Tensor:
    """(outer, 1, inner) root mean square over dim 1."""
    return torch.sqrt(tree_sum(x * x) / x.shape[1])


def std(x: Tensor) -> Tensor:
    """(outer, 1, inner) standard deviation over dim 1 about the block's own mean, population variance."""
    centred = x - tree_sum(x) / x.shape[1]
    return torch.sqrt(tree_sum(centred * centred) / x.shape[1])


def amax(x: Tensor) -> Tensor:
    return x.abs().amax(dim=1, keepdim=True)


# -------------------------------------------------------------------------------------------------------- powers of two


def biased_exponent(bits: Tensor) -> Tensor:
    """The exponent field of float32 bits: floor(log2 |x|) + 127; 0 for zero and subnormals, 255 for inf and NaN."""
    return (bits >> 23) & 0xFF


def power_of_two(biased: Tensor) -> Tensor:
    """2^(biased - 127), biased in 0..255: the E8M0 scale. 0 is 2^-127, a float32 subnormal; 255 is NaN."""
    normal = (biased << 23).view(torch.float32)
    return torch.where(biased == 0, 2.0**-127, torch.where(biased == 255, float("nan"), normal))


def _reciprocal(scale: Tensor) -> Tensor:
    """1 / scale for a power of two, exact (2^127 gives the subnormal 2^-127)."""
    return 1.0 / scale


def _offset_exponent(bits: Tensor, increment: int, shift: int) -> Tensor:
    """Biased exponent of the scale: the field of (bits + increment), less shift, from 2^-127; inf and NaN stay 255."""
    biased = biased_exponent(bits)
    moved = (biased_exponent(bits + increment) - shift).clamp(0, 254)
    return torch.where(biased == 255, 255, moved)


def _e8m0_exponent(x: Tensor, plan: Plan) -> Tensor:
    """The biased E8M0 exponent by every rule that looks only at one magnitude of the block."""
    element, rule = plan.element, plan.rule
    emax = element.max_exponent
    if rule in ("floor", "floor_three_quarters", "mse"):
        return _offset_exponent(amax(x).view(torch.int32), 0, emax)
    if rule == "even":  # half a unit of the element's last mantissa bit carries into the exponent
        return _offset_exponent(amax(x).view(torch.int32), 1 << (22 - element.precision_bits), emax)
    if rule == "ceil":
        return _offset_exponent(amax(x).view(torch.int32), 0x7FFFFF, emax)
    if rule == "rceil":
        return _offset_exponent((amax(x) / element.max).view(torch.int32), 0x7FFFFF, 0)
    if rule == "round":  # mantissas above sqrt(2), the float32 1.41421354 = 0x3FB504F3, go up
        return _offset_exponent((amax(x) / element.max).view(torch.int32), 0x800000 - 0x3504F4, 0)
    assert element.gaussian is not None
    fitted = element.gaussian * std(x) + STD_EPS if rule == "std" else element.gaussian * rms(x)
    return _offset_exponent(fitted.view(torch.int32), 0, 0)


def _least_error_exponent(x: Tensor, floor: Tensor, element: Element) -> Tensor:
    """floor - 1, floor or floor + 1: the one with the least squared error of rounding to nearest; a tie takes the
    earlier of (floor, floor - 1, floor + 1). Errors are taken in units of the floor scale, so that none overflows."""
    u = x * _reciprocal(power_of_two(floor))
    best, least = floor, _squared_error(u, 1.0, element)
    for shift in (-1, 1):
        error = _squared_error(u, 2.0**shift, element)
        better = (error < least) & (floor + shift >= 0) & (floor + shift <= 254)
        best, least = torch.where(better, floor + shift, best), torch.where(better, error, least)
    return best


def _squared_error(u: Tensor, scale: float, element: Element) -> Tensor:
    difference = round_nearest(u * (1.0 / scale), element) * scale - u
    return tree_sum(difference * difference)


# --------------------------------------------------------------------------------------------------------------- scales


def tensor_scale(x: Tensor, plan: Plan) -> Tensor | float:
    """The scale above the blocks: (outer, 1, inner) float32 per row, () float32 per tensor, or a constant.

    A row or tensor of zeros gets scale 0, which `encode` takes as codes of zero inputs: the product is 0.
    """
    if plan.scale_format == "e8m0":
        return 1.0 / HEADROOM if plan.rule == "floor_three_quarters" else 1.0
    if plan.scale_format == "e4m3":
        return finite_or_nan(x.abs().amax() / NVFP4_RANGE)
    if plan.rule == "gaussian":
        assert plan.element.gaussian is not None
        return finite_or_nan(plan.element.gaussian * rms(x))
    return finite_or_nan(amax(x) / plan.element.max)


def block_scale(x: Tensor, scale: Tensor | float, plan: Plan) -> Tensor | None:
    """(outer, 1, inner) float32 values of the format's block scale; None for formats without blocks."""
    if plan.scale_format == "float32":
        return None
    if plan.scale_format == "e4m3":
        # A block scale that rounds to zero becomes 1: |u| is under 6 * 2^-10 there, which rounds to zero to nearest,
        # and keeps its mean under stochastic rounding.
        ratio = amax(x) / plan.element.max / _nonzero(torch.as_tensor(scale))
        rounded = round_nearest(ratio, E4M3)
        return torch.where(rounded == 0, 1.0, rounded)
    exponent = _e8m0_exponent(x, plan)
    if plan.rule == "mse":
        exponent = torch.where(exponent == 255, 255, _least_error_exponent(x, exponent, plan.element))
    return power_of_two(exponent)


def finite_or_nan(scale: Tensor) -> Tensor:
    return torch.where(scale < float("inf"), scale, float("nan"))


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)


# ------------------------------------------------------------------------------------------------------------- rounding


def _minifloat_step(u: Tensor, element: Element) -> tuple[Tensor, Tensor]:
    """The distance of neighbouring codes around u, a power of two, and its reciprocal."""
    assert element.mantissa_bits is not None
    biased = biased_exponent(u.view(torch.int32)).clamp_min(element.min_exponent + 127) - element.mantissa_bits
    return (biased << 23).view(torch.float32), ((254 - biased) << 23).view(torch.float32)


def _on_grid(u: Tensor, element: Element) -> tuple[Tensor, Tensor | float, float]:
    """(v, step, offset): codes are (an integer next to v, + offset) * step. u beyond the grid saturates; NaN stays."""
    u = u.clamp(-element.max, element.max)
    if element.mantissa_bits is None:
        return u * (1.0 / element.step) - element.offset, element.step, element.offset
    step, inv_step = _minifloat_step(u, element)
    return u * inv_step, step, 0.0


def round_nearest(u: Tensor, element: Element) -> Tensor:
    """The nearest code; ties go to the even integer of the grid. Centred: round(u + 1/2) - 1/2, as QuEST writes it."""
    if element.offset:
        return torch.round(u.clamp(-element.max, element.max) + 0.5) - 0.5
    v, step, _ = _on_grid(u, element)
    return torch.round(v) * step


def round_stochastic(u: Tensor, element: Element, uniform: Tensor) -> Tensor:
    """One of the two neighbouring codes, the upper one with a probability equal to the distance from the lower
    (to 2^-24, the resolution of uniform, float32 in [0, 1)). Codes stay; u beyond the grid saturates."""
    v, step, offset = _on_grid(u, element)
    lower = torch.floor(v)
    code = lower + torch.ceil((v - lower) - uniform)  # up where uniform < v - lower; no bool, see `_mask`
    return (code + offset if offset else code) * step


# ----------------------------------------------------------------------------------------------------------- randomness


def mix(index: Tensor, key: Tensor) -> Tensor:
    """32 random bits (int32) per element: a multiply-xorshift finaliser of the index, keyed twice.

    index: int32; key: (2,) int32. One word enters before the first multiplication, one between the two: with the first
    alone, two keys would give one noise field in two orders. Wrapping int32 arithmetic; shifts are logical by masking.
    """
    h = index ^ key[0]
    h = (h ^ ((h >> 16) & 0xFFFF)) * 0x7FEB352D
    h = h ^ key[1]
    h = (h ^ ((h >> 15) & 0x1FFFF)) * -0x7B935975  # 0x846CA68B
    return h ^ ((h >> 16) & 0xFFFF)


def uniform(index: Tensor, key: Tensor) -> Tensor:
    """float32 multiples of 2^-24 in [0, 1)."""
    return ((mix(index, key) >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def element_index(x: Tensor) -> Tensor:
    """int32 position of each element in the operand as quantised, row-major with the contraction dim last (wraps)."""
    outer, block, inner = x.shape
    along = torch.arange(outer * block, dtype=torch.int32, device=x.device).view(outer, block, 1)
    across = torch.arange(inner, dtype=torch.int32, device=x.device) * (outer * block)
    return along + across


# --------------------------------------------------------------------------------------------------------------- encode


def encode(
    x: Tensor, scale: Tensor | float, key: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Codes, block scales and the gradient's mask of one operand.

    x: (outer, block, inner) float32, rotated; scale: its tensor_scale; key: (2,) int32 for stochastic rounding.
    Returns codes float32 on the element's grid, block_scale (outer, 1, inner) or None, mask
    uint8 (1 passes the gradient) or None.
    """
    blocks = block_scale(x, scale, plan)
    u = _in_code_units(x, scale, blocks, plan)
    if plan.rounding == "stochastic":
        assert key is not None
        codes = round_stochastic(u, plan.element, uniform(element_index(x), key))
    else:
        codes = round_nearest(u, plan.element)
    return codes, blocks, None if plan.mask is None else _mask(u, codes, plan.mask)


def operand(
    x: Tensor, scale: Tensor | float, key: Tensor | None, plan: Plan, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """What a GEMM takes: codes * block_scale, exact in bfloat16 (and float32), and the mask. The tensor scale is left
    to the GEMM's result. Same arguments as `encode`."""
    codes, blocks, mask = encode(x, scale, key, plan)
    return (codes if blocks is None else codes * blocks).to(dtype), mask


def _in_code_units(x: Tensor, scale: Tensor | float, blocks: Tensor | None, plan: Plan) -> Tensor:
    if plan.scale_format == "e8m0":
        assert blocks is not None
        numerator = x * HEADROOM if plan.rule == "floor_three_quarters" else x
        return numerator * _reciprocal(blocks)
    divisor = _nonzero(torch.as_tensor(scale))
    return x / (divisor if blocks is None else divisor * blocks)


def _mask(u: Tensor, codes: Tensor, mask: Mask) -> Tensor:
    """uint8 0 or 1, by way of float32: inductor stores a bool per element through a scalar loop (9 ms against 0.9 ms
    for 1.5M elements on one core), and a conversion from float32 with vector instructions."""
    if mask.kind == "inside":
        passed = u.abs() < mask.limit
    elif mask.kind == "within":
        passed = u.abs() <= mask.limit
    else:
        passed = (codes - u).abs() <= mask.limit
    return torch.where(passed, 1.0, 0.0).to(torch.uint8)
