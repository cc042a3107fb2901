"""How an operand fares in its quantiser: a few numbers to watch a layer by.

Errors are taken where rounding happens, after the rotation, of the very values that enter the GEMM; outliers of what
comes in, before it, before HALO-2's rotation of rows, and without the zeros that fill up blocks. An operand of the
backward that comes from the forward's codes is compared with those, not with the master.
"""

# M, N the operand's matrix; a line is one row of it along dim -1, one column along dim -2

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qtrain.quant.linear import Observed
from qtrain.quant.quantizer import Operand, Quantizer, rotate
from qtrain_kernels.plans import Plan

ROUNDING = 1 + 2.0**-20  # what lies on the grid's edge may be beyond it by float32's rounding


@torch.no_grad()
def operand_health(seen: Observed, max_lines: int) -> dict[str, Tensor]:
    """Name -> () float32 on the operand's device; not finite where an operand of zeros or an exact one makes it so.

    sqnr_db: 10 log10 of the sum of x^2 over that of (x_hat - x)^2.
    clipped: the fraction of elements beyond the largest code times their scale (EDEN's correction included).
    scale_underflow, scale_overflow (formats with blocks): the fraction of blocks whose largest magnitude could lie on
        the largest code only with a scale below, or above, all positive ones of the scale's format. Blocks of zeros ask
        for none; a block with NaN or infinity overflows.
    mask_density (operands with one): the fraction of elements that pass a gradient.
    kurtosis: E[x^4] / E[x^2]^2, 3 for a normal distribution. max_to_mean: max |x| / mean |x|.

    Outliers are counted in all that came in, for they gather in few lines. All else is of x, which is quantised with
    the zeros that fill it up: of no more than max_lines, evenly spaced; of formats in tiles of rows, of all.
    """
    plan, operand, dim = seen.quantizer.plan, seen.operand, seen.dim
    assert plan is not None
    lines, in_tiles = seen.x.shape[0 if dim == -1 else 1], seen.quantizer.tile[0] > 1
    stride = 1 if in_tiles else -(-lines // max_lines) | 1  # odd: no rhythm of sequences or heads, which are even
    if stride > 1:
        operand = _every(operand, stride, dim, lines)
    x = rotate(_lines(seen.x, stride, dim).contiguous(), seen.rotation, seen.quantizer.backend, dim)
    scale = operand.post_scale
    in_units = x / (torch.where(scale == 0, 1.0, scale) if isinstance(scale, Tensor) else scale)
    found = {"sqnr_db": _sqnr(x, operand.dequantize().float())} | _outliers(seen.x if seen.raw is None else seen.raw)
    found |= _range(in_units, operand.blocks, plan, seen.quantizer, dim)
    if operand.mask is not None:
        found["mask_density"] = operand.mask.float().mean()
    return found


def _lines(matrix: Tensor, stride: int, dim: int) -> Tensor:
    return matrix[::stride] if dim == -1 else matrix[:, ::stride]


def _every(operand: Operand, stride: int, dim: int, lines: int) -> Operand:
    """Every stride-th line of an operand whose blocks lie within lines."""
    scale, blocks = operand.post_scale, operand.blocks
    if blocks is not None and dim == -1:
        blocks = blocks.reshape(lines, -1)[::stride].reshape(-1, 1, 1)
    elif blocks is not None:
        blocks = blocks[:, :, ::stride]
    return replace(
        operand,
        values=_lines(operand.values, stride, dim),
        post_scale=_lines(scale, stride, dim) if isinstance(scale, Tensor) and scale.ndim else scale,
        mask=None if operand.mask is None else _lines(operand.mask, stride, dim),
        blocks=blocks,
    )


def _sqnr(x: Tensor, held: Tensor) -> Tensor:
    """In units of the largest magnitude: squares of small gradients are no float32."""
    largest = x.abs().amax()
    error = (held - x) / largest
    return 10 * torch.log10((x / largest).square().sum() / error.square().sum())


def _outliers(x: Tensor) -> dict[str, Tensor]:
    """In five passes over x: this is most of what health costs."""
    low, high = torch.aminmax(x)
    x = (x.float() / torch.maximum(-low, high)).flatten()
    square = x * x
    return {
        "kurtosis": torch.dot(square, square) * x.numel() / torch.dot(x, x).square(),
        "max_to_mean": x.numel() / torch.linalg.vector_norm(x, 1),
    }


def _range(in_units: Tensor, blocks: Tensor | None, plan: Plan, quantizer: Quantizer, dim: int) -> dict[str, Tensor]:
    """What lies beyond the grid, and beyond the scales' own. in_units: x over its tensor scale."""
    if blocks is None:
        return {"clipped": (in_units.abs() > plan.element.max * ROUNDING).float().mean()}
    assert plan.block is not None
    magnitudes = quantizer.in_blocks(in_units, dim).abs()
    beyond = magnitudes > blocks * (plan.element.max * ROUNDING)
    wanted = magnitudes.amax(1) / plan.element.max
    smallest, largest = _scale_limits(plan)
    return {
        "clipped": beyond.sum() / in_units.numel(),
        "scale_underflow": ((wanted > 0) & (wanted < smallest)).float().mean(),
        "scale_overflow": (~(wanted <= largest * ROUNDING)).float().mean(),
    }


def _scale_limits(plan: Plan) -> tuple[float, float]:
    """The smallest and largest positive scales of a format with blocks."""
    if plan.scale_element is not None:
        element = plan.scale_element
        assert element.mantissa_bits is not None
        return 2.0 ** (element.min_exponent - element.mantissa_bits), element.max
    if plan.scale_kind == "e8m0":
        return 2.0**-127, 2.0**127
    return torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
