"""The two-level NVFP4 rule in numpy float32: one IEEE rounding per line, importing nothing of qtrain.

Layout: rows of x are cut into blocks of 16. Grids are read off the bit patterns, and every decision between two
neighbouring codes is made in float64, where both codes, their midpoint and any float32 are exact.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Single = NDArray[np.float32]
Double = NDArray[np.float64]

BLOCK = 16


def minifloat(exponent_bits: int, mantissa_bits: int) -> Double:
    """The value of each non-negative bit pattern, in their order: IEEE bias, subnormals, nothing reserved for NaN."""
    bias = 2 ** (exponent_bits - 1) - 1
    exponent, mantissa = np.divmod(np.arange(2 ** (exponent_bits + mantissa_bits)), 2**mantissa_bits)
    significand = np.where(exponent == 0, 0, 1) + mantissa / 2**mantissa_bits
    return significand * 2.0 ** (np.maximum(exponent, 1) - bias)


E2M1 = minifloat(2, 1)
E4M3 = minifloat(4, 3)[:-1]  # the last pattern is NaN; 448 before it


def nearest(u: Single | Double, levels: Double) -> Single:
    """The nearest of ±levels; a tie takes the even bit pattern, what lies beyond saturates, zeros keep their sign."""
    middles, magnitude = (levels[1:] + levels[:-1]) / 2, np.abs(u.astype(np.float64))
    pattern = np.searchsorted(middles, magnitude)  # how many midpoints lie below
    tie = np.append(middles, np.inf)[pattern] == magnitude
    return np.copysign(levels[pattern + (tie & (pattern % 2 == 1))], u).astype(np.float32)


class Quantised(NamedTuple):
    """codes and values: (M, K); block_scale: (M, K / 16); tensor_scale: a scalar. All float32."""

    codes: Single
    block_scale: Single
    tensor_scale: np.float32
    values: Single


def quantise(x: NDArray[Any]) -> Quantised:
    """x (M, K) finite, K % 16 == 0. s_tensor = amax / (6 * 448); s_block = e4m3(amax_block / 6 / s_tensor), and 1 where
    that is zero; codes of x / (s_tensor * s_block). A tensor scale of zero divides as 1 and multiplies as 0."""
    blocks = x.astype(np.float32).reshape(-1, BLOCK)
    largest = np.abs(blocks).max(1, keepdims=True)
    tensor_scale = np.float32(largest.max() / np.float32(6 * 448))
    divisor = tensor_scale if tensor_scale > 0 else np.float32(1)

    in_units_of_codes = largest / np.float32(6)
    ratio = in_units_of_codes / divisor
    block_scale = nearest(ratio, E4M3)
    block_scale = np.where(block_scale == 0, np.float32(1), block_scale)

    both = divisor * block_scale
    codes = nearest(blocks / both, E2M1)
    exact = codes * block_scale  # 2 and 4 significant bits: no rounding
    values = exact * tensor_scale
    rows = len(x)
    return Quantised(codes.reshape(x.shape), block_scale.reshape(rows, -1), tensor_scale, values.reshape(x.shape))
