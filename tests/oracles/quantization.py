"""Plain float64 computations of what the papers say, importing nothing of qtrain: numpy, brute force, no tricks.

Grids are lists of codes, rounding looks at every code, exponents come from frexp, rotations from scipy's Hadamard.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import hadamard as sylvester

Array = NDArray[np.float64]

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1_GRID = sorted({sign * code for code in E2M1 for sign in (-1, 1)})


def minifloat_grid(exponent_bits: int, mantissa_bits: int, largest: float) -> list[float]:
    """Every value of every bit pattern of a minifloat with IEEE bias and subnormals, up to largest."""
    bias = 2 ** (exponent_bits - 1) - 1
    values = set()
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            lead, power = (1, exponent - bias) if exponent else (0, 1 - bias)
            values.add((lead + mantissa / 2**mantissa_bits) * 2.0**power)
    return sorted({sign * value for value in values if value <= largest for sign in (-1, 1)})


def centred_grid(bits: int) -> list[float]:
    return [k + 0.5 for k in range(-(2 ** (bits - 1)), 2 ** (bits - 1))]


def nearest(u: Array, grid: list[float]) -> Array:
    """The nearest code of each element; of two equally near, the one of even rank, counted from zero."""
    levels, middle = np.array(grid), (len(grid) - 1) // 2
    distance = np.abs(u[..., None] - levels)
    odd = (np.arange(len(grid)) - middle) % 2
    return levels[np.argmin(np.where(distance == distance.min(-1, keepdims=True), odd, 2), -1)]


def blocks_of(x: Array, block: int) -> Array:
    return x.reshape(*x.shape[:-1], -1, block)


def power_below(value: float) -> int:
    """floor(log2(value)) of a positive number."""
    return math.frexp(value)[1] - 1


def rotation(n: int, signs: Array | None = None) -> Array:
    """D H: signs on the rows, orthonormal."""
    matrix = sylvester(n).astype(np.float64) / math.sqrt(n)
    return matrix if signs is None else np.diag(signs) @ matrix


def rotate(x: Array, matrix: Array) -> Array:
    """Blocks of the last dim times matrix."""
    return (blocks_of(x, len(matrix)) @ matrix).reshape(x.shape)


def quartet_forward(x: Array) -> tuple[Array, Array]:
    """Released Quartet forward quantiser of rotated x: values and clip mask, blocks of 32 along the last dim."""
    blocks = blocks_of(x, 32)
    scale = np.vectorize(lambda s: 2.0 ** power_below(0.4870795 * s + 1e-8))(blocks.std(-1, keepdims=True))
    u = blocks / scale
    return (nearest(np.clip(u, -6, 6), E2M1_GRID) * scale).reshape(x.shape), (np.abs(u) < 6).reshape(x.shape)


def quartet_backward(x: Array) -> Array:
    """Quartet's backward quantiser of rotated x, round to nearest: codes of 3/4 x / 2^e, times 4/3 2^e."""
    blocks = blocks_of(x, 32)
    largest = np.abs(blocks).max(-1, keepdims=True)
    scale = np.vectorize(lambda a: 2.0 ** (power_below(a) - 2) if a else 1.0)(largest)
    return (nearest(0.75 * blocks / scale, E2M1_GRID) * scale / 0.75).reshape(x.shape)


def quest(x: Array, grid: list[float], clip: float, trust: float) -> tuple[Array, Array]:
    """QuEST of rotated rows: values and trust mask; clip (of the largest code) and trust in RMS."""
    rms = np.sqrt((x**2).mean(-1, keepdims=True))
    step = clip * rms / max(grid)
    values = nearest(np.clip(x / step, -max(grid), max(grid)), grid) * step
    if len(grid) == 2:
        return values, np.abs(x) <= 1.30 * clip * rms
    return values, np.abs(values - x) <= trust * rms


def quartet_linear(x: Array, w: Array, dy: Array, signs_n: Array, signs_t: Array) -> tuple[Array, Array, Array]:
    """Algorithm 1 with round to nearest: Y, dX, dW of Y = X W^T. x (T, K), w (N, K), dy (T, N)."""
    fixed = rotation(32)
    xq, x_mask = quartet_forward(rotate(x, fixed))
    wq, w_mask = quartet_forward(rotate(w, fixed))
    along_n, along_t = rotation(32, signs_n), rotation(32, signs_t)
    dx = quartet_backward(rotate(dy, along_n)) @ quartet_backward(rotate(wq.T, along_n)).T
    dw = quartet_backward(rotate(dy.T, along_t)) @ quartet_backward(rotate(xq.T, along_t)).T
    return xq @ wq.T, rotate(dx * x_mask, fixed.T), rotate(dw * w_mask, fixed.T)


def quest_linear(
    x: Array, w: Array, dy: Array, grid: list[float], clip: float, trust: float
) -> tuple[Array, Array, Array]:
    """QuEST: quantised forward values in the backward's GEMMs, then mask, then inverse rotation (128)."""
    fixed = rotation(128)
    xq, x_mask = quest(rotate(x, fixed), grid, clip, trust)
    wq, w_mask = quest(rotate(w, fixed), grid, clip, trust)
    return xq @ wq.T, rotate((dy @ wq) * x_mask, fixed.T), rotate((dy.T @ xq) * w_mask, fixed.T)


def gaussian_error(clip: float, grid: list[float]) -> float:
    """E|x - q(x)|^2 over N(0, 1) of a grid scaled so that its largest code is clip, by numerical integration."""
    levels = np.array(grid) * (clip / max(grid))
    z = np.linspace(-10, 10, 400001)
    density = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    edges = (levels[1:] + levels[:-1]) / 2
    error = (z - levels[np.searchsorted(edges, z)]) ** 2
    return float(np.sum(error * density) * (z[1] - z[0]))
