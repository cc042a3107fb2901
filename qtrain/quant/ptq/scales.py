"""Scales of a weight: by the recipe's rule, or searched for the least error."""

# N out features, K in features, B = K / elements that share a scale

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qtrain.quant.quantizer import Quantizer
from qtrain_kernels.plans import Plan
from qtrain_kernels.qtensor import Layout, QTensor
from qtrain_kernels.reference import SCALE_DTYPES, lowest, nearest_code, round_nearest, zero_points

ROWS_AT_ONCE = 64  # whose candidates are compared while they lie in the cache
SMALLEST = 0.2  # of the candidates: the rule's scale less up to four fifths of it (GPTQ's and FP-Quant's search)


@dataclass(frozen=True)
class Scales:
    """block: (N / rows, B) float32, as a QTensor has them; None without blocks. tensor: () or (N, 1) float32; None
    where the plan has a constant. layout: float32 with its block scales. zero_point: (N, B) float32 whole numbers; None
    where the element has none."""

    block: Tensor | None
    tensor: Tensor | None
    layout: Layout
    zero_point: Tensor | None = None

    def of_columns(self, begin: int, end: int) -> Tensor:
        """What codes of these columns are multiplied by, (N, end - begin) or (N, 1) float32."""
        whole = torch.tensor(self.layout.constant) if self.tensor is None else self.tensor
        if self.block is None:
            return whole.expand(self.layout.shape[0], 1)
        blocks = torch.arange(begin, end, device=self.block.device) // (self.layout.size or 1)
        rows = self.block[:, blocks].repeat_interleave(self.layout.rows, 0)[: self.layout.shape[0]]
        return rows * whole

    def zero_points_of_columns(self) -> Tensor | None:
        """What lies between levels and codes, (N, K) float32; None where nothing does."""
        return None if self.zero_point is None else self.zero_point.repeat_interleave(self.layout.size or 1, 1)

    def qtensor(self, codes: Tensor) -> QTensor:
        """codes: (N, K) float32 on the grid -> the matrix, in floats beside its block scales."""
        values = codes if self.block is None else codes * self._block_of_each()
        zeros = None if self.zero_point is None else self.zero_point.to(torch.uint8)
        return QTensor(values, self.block if self.layout.blocks else None, self.tensor, None, self.layout, zeros)

    def _block_of_each(self) -> Tensor:
        assert self.block is not None
        each = self.block.repeat_interleave(self.layout.rows, 0).repeat_interleave(self.layout.size or 1, 1)
        return each[: self.layout.shape[0], : self.layout.shape[1]]


def scales_of(
    weight: Tensor, quantizer: Quantizer, steps: int = 0, norm: float = 2.4, importance: Tensor | None = None
) -> Scales:
    """Of a weight (N, K) float32 in rotated space: by the quantiser's own rule, and with `steps`, of so many scales
    from that down to a fifth of it the one of the least sum of |error|^norm * importance over what shares the scale.

    importance: (K,) of the columns, or None. A scale in e8m0 is tried as a power of two, one in a minifloat or
    in 16 bits as the nearest of its format; a format whose only scale is that of the tensor keeps it. With a smaller
    scale, the smallest value of a block that a zero point is made of is smaller as well.
    """
    layout = quantizer.layout((weight.shape[0], weight.shape[1]), blocks=True).unmasked
    found = quantizer.operand(weight, layout)
    zeros = None if found.zero_point is None else found.zero_point.float()
    scales = Scales(found.block_scale, found.tensor_scale, layout, zeros)
    if steps and (layout.size is not None or not _whole(layout.plan)) and layout.rows == 1:
        return _searched(weight, scales, steps, norm, importance)
    return scales


def nearest(weight: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
    """A weight (N, K) to nearest: codes (N, K) float32 on the grid, and what they stand for."""
    scale = scales.of_columns(0, weight.shape[1])
    scale = torch.where(scale == 0, 1.0, scale)
    assert scales.layout.plan is not None
    codes = nearest_code(weight / scale, scales.layout.plan.element, scales.zero_points_of_columns())
    return codes, codes * scale


def _whole(plan: Plan | None) -> bool:
    return plan is None or plan.whole


def _searched(weight: Tensor, scales: Scales, steps: int, norm: float, importance: Tensor | None) -> Scales:
    layout = scales.layout
    size = layout.size or layout.shape[1]
    parts = []
    for begin in range(0, len(weight), ROWS_AT_ONCE):
        rows = slice(begin, begin + ROWS_AT_ONCE)
        w = weight[rows].unflatten(1, (-1, size))
        above = torch.tensor(layout.constant) if scales.tensor is None else scales.tensor
        above = above[rows, :, None] if above.ndim else above
        if scales.block is None:
            first, above = scales.tensor[rows, :, None], torch.tensor(1.0)  # type: ignore[index]  (N, 1): of rows
        else:
            first = scales.block[rows, :, None]
        each = None if importance is None else importance.view(1, -1, size)
        parts.append(_best(w, first, above, layout, steps, norm, each).squeeze(3))
    best, *zeros = torch.cat(parts, 1)
    if scales.block is None:
        return Scales(None, best, layout)
    return Scales(best, scales.tensor, layout, *zeros)


def _best(
    w: Tensor, first: Tensor, above: Tensor, layout: Layout, steps: int, norm: float, importance: Tensor | None
) -> Tensor:
    """(1 or 2, rows, B, 1): of what shares them the scale, and the zero point where the element has such."""
    assert layout.plan is not None
    element, best, least = layout.plan.element, None, torch.full_like(first, torch.inf)
    for factor, scale in _candidates(first, layout.plan, steps):
        whole = torch.where(scale * above == 0, 1.0, scale * above)
        zero = zero_points(lowest(w, dim=2) * factor, scale, element) if element.zero_point else None
        error = (nearest_code(w / whole, element, zero) * whole - w).abs_().pow_(norm)
        error = (error if importance is None else error * importance).sum(2, keepdim=True)
        tried = scale[None] if zero is None else torch.stack((scale, zero))
        best = tried if best is None else torch.where(error < least, tried, best)
        least = torch.minimum(error, least)
    assert best is not None
    return best


def _candidates(first: Tensor, plan: Plan, steps: int) -> Iterator[tuple[float, Tensor]]:
    """(factor, the rule's scale times it as the format has it). The rule's scale comes first, so that it wins ties."""
    if plan.scale_kind == "e8m0" and plan.block is not None:
        yield from ((2.0**-shift, first * 2.0**-shift) for shift in (0, 1, 2, -1))
        return
    for step in range(steps):
        factor = 1 - (1 - SMALLEST) * step / steps
        scale = first * factor
        if plan.scale_element is not None:
            scale = round_nearest(scale, plan.scale_element)
        elif plan.block is not None:
            scale = scale.to(SCALE_DTYPES[plan.scale_kind]).float()
        yield factor, torch.where(scale == 0, first, scale)
