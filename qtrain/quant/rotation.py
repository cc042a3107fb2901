"""Orthonormal block Hadamard rotations, with random signs before them: x -> x D H, blocks along the contraction dim.

One float32 matmul with the (n, n) matrix D H, the same for every backend; the inverse is the same with its transpose.
The n signs are shared by all blocks of both operands of a GEMM, so the product of the two is unchanged.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from qtrain.quant.precision import matmul
from qtrain_kernels.reference import mix


@cache
def hadamard(n: int, device: torch.device) -> Tensor:
    """(n, n) float32 Hadamard / sqrt(n), orthogonal: Sylvester's for a power of two, which is its own inverse; else
    Sylvester's times Paley's of order q + 1, q a prime of the form 4k + 3. ValueError where n has none."""
    order = n
    while order > 1 and order % 2 == 0 and not _has_paley(order):
        order //= 2
    if n < 1 or (order > 1 and not _has_paley(order)):
        raise ValueError(f"hadamard{n}: no Hadamard matrix of this order is known here; use blocks of a power of two")
    if not n & (n - 1):
        order = 1
    with torch.inference_mode(False), unset_fake_temporarily():  # it is kept: whoever asks first must not mark it
        matrix = _paley(order) if order > 1 else torch.ones(1, 1, dtype=torch.float64, device="cpu")
        while matrix.shape[0] < n:
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
        return (matrix / n**0.5).to(device, torch.float32)


def _has_paley(order: int) -> bool:
    q = order - 1
    return q % 4 == 3 and all(q % divisor for divisor in range(2, math.isqrt(q) + 1))


def _paley(order: int) -> Tensor:
    """Paley's first construction (1933): I + S, S skew, from which differences are squares modulo q = order - 1."""
    q = order - 1
    residue = torch.full((q,), -1.0, dtype=torch.float64, device="cpu")
    residue[torch.arange(q, device="cpu").square() % q] = 1.0
    residue[0] = 0.0
    index = torch.arange(q, device="cpu")
    matrix = torch.ones(order, order, dtype=torch.float64, device="cpu")
    matrix[1:, 0] = -1.0
    matrix[1:, 1:] = residue[(index[:, None] - index) % q] + torch.eye(q, dtype=torch.float64, device="cpu")
    return matrix


def signs(n: int, key: Tensor) -> Tensor:
    """(n,) float32 of ±1, a function of key (2,) int32."""
    index = torch.arange(n, dtype=torch.int32, device=key.device)
    return (mix(index, key) & 1).to(torch.float32) * 2.0 - 1.0


def rotation_matrix(n: int, key: Tensor | None, device: torch.device) -> Tensor:
    """D H, (n, n) float32; key None leaves out the signs D."""
    matrix = hadamard(n, device)
    return matrix if key is None else signs(n, key)[:, None] * matrix


def rotate(x: Tensor, matrix: Tensor | None, dim: int = -1) -> Tensor:
    """x (M, N) float32 with its blocks along dim (-1 or -2) multiplied by matrix; matrix.T inverts. None: x itself."""
    if matrix is None:
        return x
    n = matrix.shape[0]
    with torch.autocast(x.device.type, enabled=False):
        if dim == -1:
            return matmul(x.reshape(-1, n), matrix).view(x.shape)
        return matmul(matrix.T, x.reshape(-1, n, x.shape[1])).view(x.shape)
