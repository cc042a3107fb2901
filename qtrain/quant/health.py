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

from qtrain.quant.functional import Observed
from qtrain.quant.quantizer import Quantizer, rotate
from qtrain_kernels.plans import Plan
from qtrain_kernels.qtensor import QTensor
from qtrain_kernels.reference import SCALE_DTYPES, amax, extent

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
    fp8_rounded (operands of products in FP8): the share of elements that FP8 rounds, because their line holds far
        larger ones.
    kurtosis: E[x^4] / E[x^2]^2, 3 for a normal distribution. max_to_mean: max |x| / mean |x|.

    Outliers are counted in all that came in, for they gather in few lines. All else is of x, which is quantised with
    the zeros that fill it up: of no more than max_lines, evenly spaced; of formats in tiles of rows, of all.
    """
    plan, operand, dim, backend = seen.quantizer.plan, seen.operand, seen.dim, seen.quantizer.backend
    assert plan is not None
    lines, in_tiles = seen.x.shape[0 if dim == -1 else 1], seen.quantizer.tile[0] > 1
    stride = 1 if in_tiles else -(-lines // max_lines) | 1  # odd: no rhythm of sequences or heads, which are even
    passes = operand.passes(backend)
    if stride > 1:
        operand, passes = _every(operand, stride), None if passes is None else _lines(passes, stride, dim)
    x = rotate(_lines(seen.x, stride, dim).contiguous(), seen.rotation, backend, dim)
    scale = operand.layout.constant if operand.tensor_scale is None else operand.tensor_scale
    in_units = x / (torch.where(scale == 0, 1.0, scale) if isinstance(scale, Tensor) else scale)
    held = operand.dequantize(backend).float()
    found = {"sqnr_db": _sqnr(x, held)} | _outliers(seen.x if seen.raw is None else seen.raw)
    found |= _range(in_units, operand, plan, seen.quantizer, dim)
    if passes is not None:
        found["mask_density"] = passes.float().mean()
    if seen.fp8_rounded is not None:
        found["fp8_rounded"] = seen.fp8_rounded
    return found


def _lines(matrix: Tensor, stride: int, dim: int) -> Tensor:
    return matrix[::stride] if dim == -1 else matrix[:, ::stride]


def _every(operand: QTensor, stride: int) -> QTensor:
    """Every stride-th line of an operand in a flat storage, without its mask."""
    dim, scale, blocks, zeros = operand.layout.dim, operand.tensor_scale, operand.block_scale, operand.zero_point
    codes = _lines(operand.codes, stride, dim)
    return replace(
        operand.unmasked,
        codes=codes,
        tensor_scale=_lines(scale, stride, dim) if scale is not None and scale.ndim else scale,
        block_scale=None if blocks is None else _lines(blocks, stride, dim),
        zero_point=None if zeros is None else _lines(zeros, stride, dim),
        layout=replace(operand.layout.unmasked, shape=(codes.shape[0], codes.shape[1])),
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


def _range(in_units: Tensor, operand: QTensor, plan: Plan, quantizer: Quantizer, dim: int) -> dict[str, Tensor]:
    """What lies beyond the grid, and beyond the scales' own. in_units: x over its tensor scale."""
    if operand.block_scale is None:
        return {"clipped": (in_units.abs() > plan.element.max * ROUNDING).float().mean()}

    def of_spans(blocks: Tensor) -> Tensor:
        return blocks[:, None] if dim == -2 and quantizer.tile[0] == 1 else blocks.reshape(-1, 1, 1)

    assert plan.block is not None
    element, blocks = plan.element, of_spans(operand.block_scale).abs() * ROUNDING  # learned ones fall below zero
    zeros = 0.0 if operand.zero_point is None else of_spans(operand.zero_point).float()
    spans = replace(operand.layout, plan=replace(plan, correction=None)).spans(in_units)
    beyond = (spans < blocks * (element.min - zeros)) | (spans > blocks * (element.max - zeros))
    wanted = (extent(spans) if element.zero_point else amax(spans)) / element.max
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
    dtype = torch.finfo(SCALE_DTYPES[plan.scale_kind])
    return dtype.tiny * dtype.eps, dtype.max  # the smallest is a subnormal
