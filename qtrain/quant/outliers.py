"""What of a weight stays in 16 bits beside its codes: whole input columns, and single elements.

# T tokens, N out features, K in features, C outlier columns, E outlier elements

The layer computes y = Q(x') (Q(W) + S)^T + x_C W_C^T. x' is x with zeros in the outlier columns, so these do not
enlarge the scale of the others. S (N, K) is zero but for E elements, lies in the rotated space of Q(W), and multiplies
the inputs unquantised, as W_C does. Columns are kept by QUIK (arXiv 2310.09259) and LLM.int8 (arXiv 2208.07339),
elements by SpQR (arXiv 2306.03078); `qtrain.quant.ptq.outliers` chooses them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qtrain.config.settings import Backend
from qtrain.quant.quantizer import rotate, unrotate
from qtrain_kernels.plans import Rotation
from qtrain_kernels.precision import matmul

PARTS = {
    "columns": torch.int32,
    "column_weight": torch.bfloat16,
    "counts": torch.int16,
    "places": torch.int16,
    "values": torch.bfloat16,
}
WIDEST = 0xFFFF  # inputs of a layer: counts and places are the low 16 bits of whole numbers


class FixedDtypes(nn.Module):
    """A module whose buffers move between devices and keep their dtypes, whatever the model's becomes."""

    def _apply(self, fn: Any, recurse: bool = True) -> FixedDtypes:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self.get_buffer(name)
            if after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self


class Outliers(FixedDtypes):
    """columns: (C,) int32, of the inputs; column_weight: (N, C) bfloat16, W_C. S in compressed rows: counts (N,) int16,
    elements in each row; places (E,) int16, their columns; values (E,) bfloat16. An element takes 32 bits."""

    columns: Tensor
    column_weight: Tensor
    counts: Tensor
    places: Tensor
    values: Tensor

    def __init__(self, columns: Tensor, column_weight: Tensor, counts: Tensor, places: Tensor, values: Tensor) -> None:
        super().__init__()
        for (name, dtype), part in zip(PARTS.items(), (columns, column_weight, counts, places, values), strict=True):
            self.register_buffer(name, part.to(dtype))

    @classmethod
    def of(cls, columns: Tensor, column_weight: Tensor, beside: Tensor) -> Outliers | None:
        """beside: S, dense. None where nothing is kept. ValueError for values that 16 bits do not hold, and for more
        inputs than 16 bits count."""
        rows, places = beside.nonzero(as_tuple=True)
        if not columns.numel() and not places.numel():
            return None
        if beside.shape[1] > WIDEST:
            raise ValueError(
                f"outliers are kept of at most {WIDEST:,} inputs, and it has {beside.shape[1]:,}; leave the layer out "
                "by recipe.skip"
            )
        found = cls(columns, column_weight, (beside != 0).sum(1), places, beside[rows, places])
        if not (found.column_weight.isfinite().all() and found.values.isfinite().all()):
            raise ValueError("outliers of the weight are not finite in bfloat16; leave the layer out by recipe.skip")
        return found

    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())

    def without_columns(self, x: Tensor) -> Tensor:
        """x (T, K) -> x', the inputs of the codes."""
        return x.index_fill(1, self.columns.long(), 0)

    def product(self, x: Tensor, rotation: Rotation | None, backend: Backend, dtype: torch.dtype) -> Tensor:
        """x (T, K) -> what (T, N) is added to the product of the codes, in dtype."""
        y = matmul(x[:, self.columns.long()].to(dtype), self.column_weight.to(dtype).T)
        if not self.values.numel():
            return y
        turned = rotate(self.without_columns(x.detach()), rotation, backend)
        return y + matmul(turned.to(dtype), self.elements(x.shape[1]).to(dtype).T)

    def elements(self, in_features: int) -> Tensor:
        """S, dense: (N, K) float32."""
        dense = torch.zeros(len(self.counts), in_features, device=self.values.device)
        rows = torch.arange(len(self.counts), device=dense.device).repeat_interleave(self.counts.int() & 0xFFFF)
        return dense.index_put_((rows, self.places.long() & 0xFFFF), self.values.float())

    def whole(self, codes: Tensor, rotation: Rotation | None, backend: Backend) -> Tensor:
        """Q(W) (N, K) float32 -> the weight that x is multiplied by, out of its rotation, float32."""
        weight = unrotate(codes + self.elements(codes.shape[1]), rotation, backend)
        return weight.index_copy(1, self.columns.long(), self.column_weight.float())

    def extra_repr(self) -> str:
        return f"columns={self.columns.numel()}, elements={self.values.numel()}"
