"""Double quantisation (QLoRA, arXiv 2305.14314): the scales of a packed weight's blocks in 8 bits, and how they read.

The mean of all scales is subtracted. Of what is left, blocks of 256 are divided by their largest magnitude, and each
value becomes the nearest of 256 numbers, `DYNAMIC_MAP`. A scale of 32 bits for 64 weights then costs 0.127 bits a
weight in place of 0.5.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qtrain.errors import UserError
from qtrain.quant.functional import Numerics
from qtrain.quant.packed import PackedLinear
from qtrain_kernels.qtensor import QTensor

BLOCK = 256


def _dynamic_map() -> tuple[float, ...]:
    """256 numbers, ascending: 0, 1, and in each decade from 10^-7 to 10^-1 twice as many as in the one below, evenly
    spread, with both signs. The 8-bit map of bitsandbytes."""
    found = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, device="cpu", dtype=torch.float32)
        middles = (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        found += [sign * middle for middle in middles for sign in (1.0, -1.0)]
    return tuple(sorted(found))


DYNAMIC_MAP = _dynamic_map()


def quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """scales, float32 of any shape -> codes, uint8 in their shape; largest (blocks of 256,); mean () of float32."""
    mean = scales.mean()
    blocks = F.pad((scales - mean).flatten(), (0, -scales.numel() % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1)
    known = torch.tensor(DYNAMIC_MAP, device=scales.device)
    u = blocks / torch.where(largest == 0, 1.0, largest)[:, None]
    codes = torch.bucketize(u, (known[1:] + known[:-1]) / 2).to(torch.uint8)
    return codes.flatten()[: scales.numel()].view(scales.shape), largest, mean


def dequantize_scales(codes: Tensor, largest: Tensor, mean: Tensor) -> Tensor:
    """`quantize_scales` undone but for its rounding: float32 in the shape of codes."""
    known = torch.tensor(DYNAMIC_MAP, device=codes.device)
    each = largest.repeat_interleave(BLOCK)[: codes.numel()].view(codes.shape)
    return known[codes.long()] * each + mean


class DoubledLinear(PackedLinear):
    """A PackedLinear whose block scales, float32 ones, are kept in 8 bits: block_scale (N, K / block) uint8, with
    largest_scale (blocks of 256,) and mean_scale () float32."""

    largest_scale: Tensor
    mean_scale: Tensor

    def __init__(
        self, weight: QTensor, bias: Tensor | None, numerics: Numerics, name: str, keys: Tensor,
        input_scale: Tensor | None = None,
    ) -> None:  # fmt: skip
        """As PackedLinear's. UserError for a format whose blocks have no float32 scales, and for learned ones."""
        super().__init__(weight, bias, numerics, name, keys, input_scale)
        scales = weight.block_scale
        if numerics.fprop.right.learned:
            raise UserError(
                f"{name}: double quantisation is of scales that are found, and its recipe learns them; "
                "take another scale rule, or set tune.adapter.double_quantization=false"
            )
        if scales is None or scales.dtype != torch.float32:
            raise UserError(
                f"{name}: double quantisation stores float32 scales of blocks in 8 bits, and "
                f"{numerics.fprop.right.spec.format} has none; take a format with such, as nf4, or set "
                "tune.adapter.double_quantization=false"
            )
        if scales.device.type == "meta":
            parts = scales.to(torch.uint8), scales.new_empty(-(-scales.numel() // BLOCK)), scales.new_empty(())
        else:
            parts = quantize_scales(scales)
        for part, tensor in zip(("block_scale", "largest_scale", "mean_scale"), parts, strict=True):
            self.register_buffer(part, tensor)

    @property
    def weight(self) -> QTensor:
        scales = dequantize_scales(self.get_buffer("block_scale"), self.largest_scale, self.mean_scale)
        return QTensor(self.codes, scales, self.get_buffer("tensor_scale"), None, self.layout)
