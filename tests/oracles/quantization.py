"""Plain float64 computations of what the papers say, importing nothing of qtrain: numpy, brute force, no tricks.

Grids are lists of codes, rounding searches them, exponents come from frexp, rotations from scipy's Hadamard.
recipes.py puts these together to the three GEMMs of each method.
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


def neighbours(u: Array, grid: list[float]) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Two adjacent codes, at or below and above u once that saturates, and whether the lower one's rank is even."""
    levels = np.array(grid)
    rank = np.clip(np.searchsorted(levels, u, side="right") - 1, 0, len(grid) - 2)
    return levels[rank], levels[rank + 1], (rank - (len(grid) - 1) // 2) % 2 == 0


def nearest(u: Array, grid: list[float]) -> Array:
    """The nearest code of each element; of two equally near, the one of even rank, counted from zero."""
    lower, upper, lower_is_even = neighbours(u, grid)
    below, above = u - lower, upper - u
    return np.where((below < above) | ((below == above) & lower_is_even), lower, upper)


def stochastic(u: Array, grid: list[float], uniform: Array) -> Array:
    """The lower or upper neighbour, the upper one where uniform in [0, 1) is below the part of the way to it."""
    lower, upper, _ = neighbours(u, grid)
    return np.where(uniform * (upper - lower) < u - lower, upper, lower)


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


def phase_forward(x: Array) -> tuple[Array, Array]:
    """Rotated x over a scale per row, root mean square / 1.1637, then the power of two of least error for each block of
    32: floor(log2 amax) - 2 or a neighbour, the earliest of equals. Values and clip mask."""
    row = np.sqrt((x * x).mean(-1, keepdims=True)) / 1.1637
    blocks = blocks_of(x / np.where(row == 0, 1.0, row), 32)
    largest = np.abs(blocks).max(-1, keepdims=True)
    floor = np.vectorize(lambda a: 2.0 ** (power_below(a) - 2) if a else 1.0)(largest)
    best = values = least = None
    for scale in (floor, floor / 2, floor * 2):
        found = nearest(np.clip(blocks / scale, -6, 6), E2M1_GRID) * scale
        error = ((found - blocks) ** 2).sum(-1, keepdims=True)
        if best is None or values is None or least is None:
            best, values, least = scale, found, error
        else:
            better = error < least
            best, values, least = (np.where(better, *p) for p in ((scale, best), (found, values), (error, least)))
    assert best is not None and values is not None
    return values.reshape(x.shape) * row, (np.abs(blocks / best) < 6).reshape(x.shape)


def quartet_backward(x: Array, uniform: Array | None = None) -> Array:
    """Quartet's backward quantiser of rotated x: codes of 3/4 x / 2^e, e = floor(log2 amax) - 2, times 4/3 2^e. To
    nearest, or stochastically where uniform in [0, 1) is given."""
    blocks = blocks_of(x, 32)
    largest = np.abs(blocks).max(-1, keepdims=True)
    scale = np.vectorize(lambda a: 2.0 ** (power_below(a) - 2) if a else 1.0)(largest) / 0.75
    u = blocks / scale
    codes = nearest(u, E2M1_GRID) if uniform is None else stochastic(u, E2M1_GRID, blocks_of(uniform, 32))
    return (codes * scale).reshape(x.shape)


def gaussian_error(clip: float, grid: list[float]) -> float:
    """E|x - q(x)|^2 over N(0, 1) of a grid scaled so that its largest code is clip, by numerical integration."""
    levels = np.array(grid) * (clip / max(grid))
    z = np.linspace(-10, 10, 400001)
    density = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    edges = (levels[1:] + levels[:-1]) / 2
    error = (z - levels[np.searchsorted(edges, z)]) ** 2
    return float(np.sum(error * density) * (z[1] - z[0]))
