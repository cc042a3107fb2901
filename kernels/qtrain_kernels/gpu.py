"""Backend triton: the operations of reference.py by Triton's kernels, equal to it bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from qtrain_kernels.hadamard import rotate, tensor_scale, unrotate
from qtrain_kernels.quantize import encode, obstacle, operand
from qtrain_kernels.reference import Plan, Rotation

__all__ = ["encode", "fake_quantize", "obstacle", "operand", "rotate", "tensor_scale", "unrotate"]


def fake_quantize(
    x: Tensor,
    scale: Tensor | float,
    key: Tensor | None,
    plan: Plan,
    dtype: torch.dtype,
    rotation: Rotation | None = None,
) -> Tensor:
    """Equals reference.fake_quantize bit for bit."""
    values, _ = operand(x, scale, key, plan, torch.float32, rotation)
    return unrotate(values * scale, rotation, None, dtype)
