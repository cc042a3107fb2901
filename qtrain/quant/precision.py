"""Matrix products in the precision that their operands have, whatever torch is allowed to do with float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_EXACT = ("none", "ieee")  # none: torch's default, which is ieee


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right. Float32 operands are multiplied as float32, also where torch.set_float32_matmul_precision or
    torch.backends allow TF32 (CUDA) or bfloat16 (CPU): a rotation would lose 13 bits, and codes would change."""
    backend = _backend(left.device.type)
    allowed = backend.fp32_precision if left.dtype == torch.float32 and backend is not None else "ieee"
    if allowed in _EXACT:
        return left @ right
    backend.fp32_precision = "ieee"
    try:
        return left @ right
    finally:
        backend.fp32_precision = allowed


def _backend(device_type: str) -> Any:
    """What holds the setting of a device; None for devices that have none."""
    return {"cuda": torch.backends.cuda.matmul, "cpu": torch.backends.mkldnn.matmul}.get(device_type)
