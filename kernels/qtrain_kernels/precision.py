"""Matrix products in the precision that their operands have, whatever torch is allowed to do with float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_SETTINGS: dict[str, Any] = {
    "cuda": torch.backends.cuda.matmul,
    "cpu": torch.backends.mkldnn.matmul,  # pyright: ignore[reportAttributeAccessIssue]
}


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in the dtype of the two, under any autocast. Float32 stays float32 also where
    torch.set_float32_matmul_precision or torch.backends allow TF32 (CUDA) or bfloat16 (CPU): quantised values would
    lose bits, and codes would change."""
    with torch.autocast(left.device.type, enabled=False), _ieee(left):
        return left @ right


@contextmanager
def _ieee(x: Tensor) -> Iterator[None]:
    """Torch's setting for float32 products like x's at "ieee", for all threads; after it as it was, at its own level
    even if it had come from a general one."""
    settings = _SETTINGS.get(x.device.type) if x.dtype == torch.float32 else None
    if settings is None or settings.fp32_precision in ("none", "ieee"):  # none: torch's default, which is ieee
        yield
        return
    allowed = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = allowed
