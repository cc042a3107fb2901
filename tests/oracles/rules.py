"""Every scale rule, rounding, mask and sparsity in plain float64, one matrix at a time: numpy, nothing of qtrain.

# M, K the matrix; rows are cut into blocks of `block` (None: whole rows, or the whole matrix)
x ≈ codes * scale. Masks and codes are those of u = x / scale, in code units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from oracles.quantization import E2M1_GRID, Array, blocks_of, centred_grid, nearest, power_below, stochastic
from oracles.recipes import E4M3, INT4, kept

Scale = Callable[[Array], Array]  # blocks (..., n) -> (..., 1)


class Setting(NamedTuple):
    """What is asked for. kind: e8m0, minifloat, float32, float16, bfloat16 (of blocks), row, tensor. fit: the
    least-error scale of N(0, 1) in RMS. learned: the scale itself."""

    kind: str
    rule: str
    rounding: str = "nearest"
    mask: tuple[str, float] | None = None
    sparsity: str | None = None
    block: int | None = None
    grid: tuple[float, ...] = tuple(E2M1_GRID)
    fit: float = 0.4870795
    learned: float = 0.0


class Quantised(NamedTuple):
    """All (M, K)."""

    codes: Array
    scale: Array
    mask: np.ndarray | None


E2M1, SYMMETRIC, CENTRED = tuple(E2M1_GRID), tuple(INT4), tuple(centred_grid(4))
LEVELS = tuple(float(level) for level in range(16))  # beside a zero point
CENTRED_FIT = 2.5139305786 / 7.5
LIMITS = {"absmax": (6.0, 448.0), "absmax_headroom": (6 * 16 / 17, 448.0),
          "absmax_fitted": (6 * (16 / 17) / 0.93, 256.0), "four_over_six": (6.0, 256.0)}  # fmt: skip


def amax(x: Array) -> Array:
    return np.abs(x).max(-1, keepdims=True)


def lowest(x: Array) -> Array:
    return np.minimum(x.min(-1, keepdims=True), 0)


def rms(x: Array) -> Array:
    return np.sqrt((x * x).mean(-1, keepdims=True))


def floor_power(x: Array) -> Array:
    return np.vectorize(lambda v: 2.0 ** power_below(v))(x)


def power_of_log(x: Array, to_integer: Callable[[float], int]) -> Array:
    return np.vectorize(lambda v: 2.0 ** to_integer(math.log2(v)))(x)


def e8m0(blocks: Array, rule: str, fit: float) -> Array:
    """Of E2M1 codes: the largest, 6, has exponent 2."""
    largest, spread = amax(blocks), fit * blocks.std(-1, keepdims=True) + 1e-8
    if rule in ("mse", "mse_phase"):
        floor = floor_power(largest) / 4
        candidates = [floor, floor / 2, floor * 2]
        errors = [
            ((nearest(np.clip(blocks / s, -6, 6), E2M1_GRID) * s - blocks) ** 2).sum(-1, keepdims=True)
            for s in candidates
        ]
        return np.take_along_axis(
            np.concatenate(candidates, -1), np.concatenate(errors, -1).argmin(-1, keepdims=True), -1
        )
    return {
        "floor": lambda: floor_power(largest) / 4,
        "floor_three_quarters": lambda: floor_power(largest) / 4 / 0.75,
        "even": lambda: floor_power(largest + floor_power(largest) / 4) / 4,  # rounded to one mantissa bit first
        "ceil": lambda: power_of_log(largest, math.ceil) / 4,
        "rceil": lambda: power_of_log(largest / 6, math.ceil),
        "round": lambda: power_of_log(largest / 6, round),
        "gaussian": lambda: floor_power(fit * rms(blocks)),
        "std": lambda: floor_power(spread),
        "std_round": lambda: power_of_log(spread, round),
    }[rule]()


def minifloat(blocks: Array, rule: str) -> tuple[Array, Array]:
    """The scales on E4M3's grid, and that of the whole tensor above them."""
    limit, cap = LIMITS[rule]
    above = np.abs(blocks).max() / limit / cap
    scale = nearest(amax(blocks) / limit / above, E4M3)
    if rule == "four_over_six":
        four = nearest(amax(blocks) / 4 / above, E4M3)
        errors = [
            ((nearest(blocks / (s * above), E2M1_GRID) * s * above - blocks) ** 2).sum(-1, keepdims=True)
            for s in (scale, four)
        ]
        scale = np.where(errors[1] < errors[0], four, scale)
    return np.where(scale == 0, 1.0, scale), above


def float32(lines: Array, setting: Setting) -> Array:
    largest_code = max(setting.grid)
    clip = 12.68 * rms(lines) - 12.80 * np.abs(lines).mean(-1, keepdims=True)
    return {
        "absmax": amax(lines) / largest_code,
        "gaussian": setting.fit * rms(lines),
        "absmean": np.abs(lines).mean(-1, keepdims=True) + 1e-5,
        "sawb": np.where(clip > 0, clip, amax(lines)) / largest_code,
        "learned": np.full_like(amax(lines), setting.learned),
        "minmax": (np.maximum(lines.max(-1, keepdims=True), 0) - lowest(lines)) / largest_code,
    }[setting.rule]


def in_16_bits(scale: Array, kind: str) -> Array:
    """To nearest, ties to even: float16 by numpy, bfloat16 with 8 significant bits."""
    if kind == "float16":
        return scale.astype(np.float16).astype(np.float64)
    mantissa, exponent = np.frexp(scale)
    return np.ldexp(np.rint(mantissa * 256), exponent - 8)


def quantise(x: Array, setting: Setting, uniform: Callable[[tuple[int, ...]], Array]) -> Quantised:
    """x (M, K). uniform: numbers in [0, 1) by their position in a shape, (M, K) of the elements or (M, K / block)."""
    lines = x.reshape(1, 1, -1) if setting.kind == "tensor" else blocks_of(x, setting.block or x.shape[1])
    above: Array = np.ones(())
    if setting.kind == "e8m0":
        if setting.rule == "mse_phase":
            above = (rms(x) / 1.1637)[:, :, None]
        scale = e8m0(lines / above, setting.rule, setting.fit)
    elif setting.kind == "minifloat":
        scale, above = minifloat(lines, setting.rule)
    else:
        scale = float32(lines, setting)
        if setting.kind in ("float16", "bfloat16"):
            scale = in_16_bits(scale, setting.kind)
    grid = list(setting.grid)
    u = (lines / (scale * above)).reshape(x.shape)
    zero: Array = np.zeros(())
    if setting.rule == "minmax":
        zero = np.broadcast_to(np.clip(np.rint(-lowest(lines) / scale), 0, max(grid)), lines.shape).reshape(x.shape)
    u = u + zero
    codes = stochastic(u, grid, uniform(x.shape)) if setting.rounding == "stochastic" else nearest(u, grid)
    codes = codes - zero
    codes = codes * kept(x, setting.sparsity)
    if setting.rounding == "eden":
        square, product = (blocks_of(u * other, lines.shape[-1]).sum(-1) for other in (u, codes))
        scale = stochastic(scale[..., 0] * (square / product), E4M3, uniform(square.shape))[..., None]
    passes = None
    if setting.mask is not None:
        kind, limit = setting.mask
        passes = {"inside": np.abs(u) < limit, "within": np.abs(u) <= limit, "error": np.abs(codes - u) <= limit}[kind]
    return Quantised(codes, np.broadcast_to(scale * above, lines.shape).reshape(x.shape), passes)
