"""Backend triton: the operations of reference.py by Triton's kernels, equal to it bit for bit."""

from __future__ import annotations

from torch import Tensor

from qtrain_kernels import reference
from qtrain_kernels.hadamard import rotate, tensor_scale, unrotate
from qtrain_kernels.packing import join, pack, split, unpack
from qtrain_kernels.quantize import encode, missing_kernel, obstacle, operand
from qtrain_kernels.reference import random_signs

__all__ = [
    "fake_quantize", "join", "missing_kernel", "obstacle", "pack", "quantize", "random_signs", "rotate",
    "split", "unpack", "unrotate",
]  # fmt: skip
FUSED = False


def quantize(x, side):
    layout, rotation = side.layout, side.rotation
    plan = layout.plan
    if rotation is not None and layout.rows > 1:
        x, rotation = rotate(layout.whole_lines(x), rotation).view(x.shape), None
    scale = tensor_scale(layout.whole_lines(x), plan, rotation) if side.learned is None else side.learned
    spans, each = layout.spans(x), scale
    if isinstance(scale, Tensor) and scale.ndim:
        each = scale.repeat_interleave(spans.shape[0] // scale.shape[0], 0).expand(-1, -1, spans.shape[2]).contiguous()
    if layout.storage == "float8_128":
        codes, blocks, mask = encode(spans, each, side.key, plan, rotation)
    else:
        dtype = reference.DTYPES[layout.storage]
        codes, blocks, mask = operand(spans, each, side.key, plan, dtype, rotation, layout.blocks)
    return reference.parts_of(layout, codes, blocks, scale, None if mask is None else join(layout.unspan(mask), 1))


def fake_quantize(x, side, dtype):
    return reference.fake_quantize_by(quantize, unrotate, x, side, dtype)
