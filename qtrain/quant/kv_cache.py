"""Keys and values of a generation in the bits of a number format."""

# M rows: each a token's key or value of one head, d its elements

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qtrain.config.recipe import QuantSpec
from qtrain.config.settings import Backend, parse
from qtrain.errors import UserError
from qtrain.quant.quantizer import Quantizer
from qtrain_kernels.formats import get_format
from qtrain_kernels.qtensor import Layout, QTensor

HALF = "bf16"


class HalfCodec:
    """In bfloat16."""

    def encode(self, rows: Tensor) -> list[Tensor]:
        return [rows.bfloat16()]

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return parts[0].to(dtype)


class QuantCodec:
    """Packed in a format, each row by itself: a token's key or value of a head has its own scale, or scales of blocks,
    so what is kept of a token never changes and needs no token that follows."""

    def __init__(self, spec: QuantSpec, backend: Backend = "auto") -> None:
        """UserError for a spec that draws random bits, rotates, or has a scale of the whole tensor, and for a format
        that cannot be packed."""
        self.quantizer = Quantizer.build(spec, backend)
        plan = self.quantizer.plan
        layout = self.quantizer.layout((1, self.quantizer.multiple))
        reason = layout.lacks("packed")
        assert plan is not None
        if self.quantizer.draws or self.quantizer.rotates or self.quantizer.learned:
            reason = "a cache rounds to nearest, without rotations and learned scales"
        elif plan.per_tensor or plan.scale_kind == "minifloat":
            reason = "it has a scale of the whole tensor, which tokens that follow would change"
        if reason is not None:
            raise UserError(f"keys and values cannot be kept as {self.quantizer}: {reason}")

    def encode(self, rows: Tensor) -> list[Tensor]:
        q = self.quantizer.operand(rows, self._layout(rows.shape[0], rows.shape[1]))
        self._size = rows.shape[1]
        return q.tensors()

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        layout = self._layout(parts[0].shape[0], self._size)
        return QTensor.of(layout, parts).dequantize(self.quantizer.backend).to(dtype)

    def _layout(self, rows: int, size: int) -> Layout:
        if size % self.quantizer.multiple:
            raise UserError(
                f"keys and values of {size} elements do not fill the blocks of {self.quantizer.multiple} of "
                f"{self.quantizer}; name a format with shorter blocks, or of rows"
            )
        return self.quantizer.layout((rows, size), -1, "packed")


def kv_codec(name: str) -> HalfCodec | QuantCodec:
    """How a cache of keys and values is kept: bf16, or the name of a number format. Scales are those of the largest
    magnitude, so that no key is clipped: absmax, of E8M0 scales floor, beside zero points minmax. UserError for what
    cannot be kept."""
    if name == HALF:
        return HalfCodec()
    try:
        fmt = get_format(name)
    except ValueError as error:
        raise UserError(f"no cache in {name!r}: {error}; or {HALF}") from None
    scale = "minmax" if fmt.element.zero_point else "floor" if fmt.scale_kind == "e8m0" else "absmax"
    return QuantCodec(parse(QuantSpec, {"format": name, "scale": scale}))
