"""Matrix products of integer codes, exact: INT8 by INT8, summed in INT32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LONGEST = 2**15  # of a contraction whose doubled products of 8 bits stay within int32: 255^2 * 2^15 < 2^31
CUDA_MULTIPLE, CUDA_ROWS = 8, 32  # torch._int_mm there: more than 16 rows; the other sizes multiples of 8


def int8_matmul(left: Tensor, right: Tensor, left_offset: float = 0.0, right_offset: float = 0.0) -> Tensor:
    """(left + left_offset) @ (right + right_offset), float32: the exact product, rounded once.

    left (M, K), right (K, N) int8; offsets 0 or 1/2.
    """
    # 4 (l + a/2)(r + b/2) = 4 l r + 2 b l + 2 a r + a b
    a, b = round(2 * left_offset), round(2 * right_offset)
    found = None
    for first in range(0, left.shape[1], LONGEST):
        rows, columns = left[:, first : first + LONGEST], right[first : first + LONGEST]
        product = _int_mm(rows, columns)
        if a or b:
            product = product.mul_(4).add_(a * b * rows.shape[1])
            product = product.add_(rows.sum(1, keepdim=True, dtype=torch.int32), alpha=2 * b)
            product = product.add_(columns.sum(0, keepdim=True, dtype=torch.int32), alpha=2 * a)
        found = product if found is None else found.long() + product
    if found is None:
        return torch.zeros(left.shape[0], right.shape[1], device=left.device)
    return found.float() * 0.25 if a or b else found.float()


def _int_mm(left: Tensor, right: Tensor) -> Tensor:
    """(M, K) @ (K, N) int8 -> int32, filled with zeros to the sizes that CUDA takes."""
    if _device_type(left) != "cuda":
        return torch._int_mm(left, right)
    rows, columns = left.shape[0], right.shape[1]
    missing = -left.shape[1] % CUDA_MULTIPLE
    left = F.pad(left, (0, missing, 0, max(CUDA_ROWS - rows, 0)))
    right = F.pad(right, (0, -columns % CUDA_MULTIPLE, 0, missing))
    return torch._int_mm(left, right)[:rows, :columns]


def _device_type(x: Tensor) -> str:
    return x.device.type
