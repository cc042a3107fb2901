"""Orthonormal block Hadamard rotations, with random signs before them: x -> x D H, blocks along the contraction dim.

The signs are shared by all blocks of both operands of a GEMM, so the product of the two is unchanged.
`qtrain_kernels.reference.rotate` defines the arithmetic.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from qtrain_kernels.plans import Rotation


def hadamard(size: int, key: Tensor | None, device: torch.device) -> Rotation:
    """Blocks of `size` with signs that key, (2,) int32, draws; None: without signs. ValueError where no Hadamard matrix
    of this order is known here."""
    return Rotation(size, key, base(size, device))


@cache
def base(size: int, device: torch.device) -> Tensor | None:
    """None for a power of two. Else the Hadamard matrix, float32 of ±1, that with Sylvester's makes this order: Paley's
    of order q + 1, q a prime of the form 4k + 3, the smallest that will do. ValueError where there is none."""
    if size > 0 and not size & (size - 1):
        return None
    halved = (size >> k for k in range(size.bit_length()) if size % (1 << k) == 0)
    order = min((order for order in halved if _has_paley(order)), default=None)
    if size < 1 or order is None:
        raise ValueError(f"hadamard{size}: no Hadamard matrix of this order is known; use blocks of a power of two")
    with torch.inference_mode(False), unset_fake_temporarily():  # it is kept: whoever asks first must not mark it
        return _paley(order).to(device)


def _has_paley(order: int) -> bool:
    q = order - 1
    return q % 4 == 3 and all(q % divisor for divisor in range(2, math.isqrt(q) + 1))


def _paley(order: int) -> Tensor:
    """Paley's first construction (1933): I + S, S skew, from which differences are squares modulo q = order - 1."""
    q = order - 1
    residue = torch.full((q,), -1.0, device="cpu")
    residue[torch.arange(q, device="cpu").square() % q] = 1.0
    residue[0] = 0.0
    index = torch.arange(q, device="cpu")
    matrix = torch.ones(order, order, device="cpu")
    matrix[1:, 0] = -1.0
    matrix[1:, 1:] = residue[(index[:, None] - index) % q] + torch.eye(q, device="cpu")
    return matrix
