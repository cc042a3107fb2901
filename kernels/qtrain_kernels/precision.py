"""Matrix products in the precision that their operands have, whatever torch is allowed to do with float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_EXACT = ("none", "ieee")  # none: torch's default, which is ieee
_SETTINGS: dict[str, Any] = {
    "cuda": torch.backends.cuda.matmul,
    "cpu": torch.backends.mkldnn.matmul,  # pyright: ignore[reportAttributeAccessIssue]
}


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right. Float32 operands are multiplied as float32, also where torch.set_float32_matmul_precision or
    torch.backends allow TF32 (CUDA) or bfloat16 (CPU), and under autocast: quantised values would lose bits, and codes
    would change. Where fewer bits are allowed the setting is changed for the time of the product, for all threads, and
    set again after it, at its own level even if it had come from a general one."""
    settings = _SETTINGS.get(left.device.type)
    if settings is None or left.dtype != torch.float32 or settings.fp32_precision in _EXACT:
        with torch.autocast(left.device.type, enabled=False):
            return left @ right
    allowed = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        with torch.autocast(left.device.type, enabled=False):
            return left @ right
    finally:
        settings.fp32_precision = allowed
