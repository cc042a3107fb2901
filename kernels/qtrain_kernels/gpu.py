"""Backend triton: the operations of reference.py by Triton's kernels, equal to it bit for bit."""

from __future__ import annotations

from qtrain_kernels.hadamard import rotate, tensor_scale, unrotate
from qtrain_kernels.packing import join, pack, split, unpack
from qtrain_kernels.quantize import encode, missing_kernel, obstacle, operand
from qtrain_kernels.reference import fake_quantize_by

__all__ = [
    "encode", "fake_quantize", "join", "missing_kernel", "obstacle", "operand", "pack", "rotate", "split",
    "tensor_scale", "unpack", "unrotate",
]  # fmt: skip

fake_quantize = fake_quantize_by(operand, unrotate)
