"""Published FP4 training schemes in plain float64, written from their papers and code: numpy, nothing of qtrain.

Shapes, names and randomness are those of recipes.py. Keyword arguments give the nearest methods that differ.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from oracles.quantization import E2M1_GRID, Array, blocks_of, minifloat_grid, quartet_backward, rotate, rotation
from oracles.recipes import (
    E4M3,
    Draws,
    Grid,
    Result,
    amax,
    ceil_power,
    filled,
    floor_power,
    nvfp4,
    per_tensor,
    requantised,
    scaled,
    tiles_of,
    untiled,
)

Use = Callable[[Array, str], Array]  # q(v, use) quantises v (rows, contraction), drawing for the operand `use`

UNIFORM = [float(k) for k in range(-7, 8)]  # INT4; E1M2 is half of it
AUTHORS_UE5M3 = minifloat_grid(5, 3, 61440.0)  # the top exponent is reserved


def gemms(x: Array, w: Array, dy: Array, q: Use, block: int, h: Callable[[str], Array] | None = None) -> Result:
    """All six operands from high precision, filled with zeros to whole blocks. h(gemm): what both are rotated by."""

    def product(gemm: str, left: Array, right: Array, names: str) -> Array:
        matrix = rotation(1) if h is None else h(gemm)
        operands = (rotate(filled(v, block), matrix) for v in (left, right))
        sides = [q(v, f"{gemm}.{name}") for v, name in zip(operands, names.split(), strict=True)]
        return sides[0] @ sides[1].T

    return product("fprop", x, w, "x w"), product("dgrad", dy, w.T, "dy w"), product("wgrad", dy.T, x.T, "dy x")


# ---------------------------------------------------------------------------------------------------- blocks of sixteen


def ufp4(
    x: Array, w: Array, dy: Array, draws: Draws, grid: Grid = UNIFORM, forward: bool = True, signs: bool = True
) -> Result:
    """UFP4 (arXiv 2606.20381): a uniform grid under a float scale per block; randomised Hadamard of 16 in all three
    GEMMs; dY rounded stochastically. forward, signs: False leaves fprop unrotated, and every rotation without signs."""

    def q(v: Array, use: str) -> Array:
        blocks = blocks_of(v, 16)
        uniform = draws.uniform(use, blocks.shape) if use.endswith(".dy") else None
        return scaled(blocks, amax(blocks) / max(grid), grid, uniform).reshape(v.shape)

    def h(gemm: str) -> Array:
        if gemm == "fprop" and not forward:
            return rotation(1)
        return rotation(16, draws.signs(f"{gemm}.signs", 16) if signs else None)

    return gemms(x, w, dy, q, 16, h)


def fp4_all_the_way(
    x: Array,
    w: Array,
    dy: Array,
    draws: Draws,
    stochastic: tuple[str, ...] = ("dgrad.dy", "wgrad.dy", "wgrad.x"),
    limit: float = 6.0,
) -> Result:
    """FP4 All the Way (arXiv 2505.19115): NVFP4; the gradient, and the activations of the update, stochastically.
    limit: what amax of a block becomes under stochastic rounding."""

    def q(v: Array, use: str) -> Array:
        return nvfp4(v, limit, uniform=draws.uniform(use, v.shape)) if use in stochastic else nvfp4(v)

    return gemms(x, w, dy, q, 16)


def ue5m3_fp4(
    x: Array, w: Array, dy: Array, draws: Draws, rows: int = 16, target: float = 448.0, saved: bool = False
) -> Result:
    """UE5M3 FP4 (arXiv 2609.02846): 16x16 weights, the same in both GEMMs; dY stochastically; no rotation. target: the
    block scale of the tensor's largest magnitude. rows: of a weight's tile. saved: wgrad takes the forward's x."""
    q = partial(nvfp4, scales=AUTHORS_UE5M3, cap=target)
    xq, wq = q(x), q(w, rows=rows)
    dyt, xt = filled(dy.T, 16), filled((xq if saved else x).T, 16)
    dx = q(dy, uniform=draws.uniform("dgrad.dy", dy.shape)) @ wq
    return xq @ wq.T, dx, q(dyt, uniform=draws.uniform("wgrad.dy", dyt.shape)) @ q(xt).T


# ---------------------------------------------------------------------------------------------------------------- MXFP4


def power(largest: Array, rule: str) -> Array:
    """The power of two of a block; 1 where all of it is zero. floor: OCP's. even: floor of the largest magnitude once
    it is rounded to E2M1's one mantissa bit. rceil: the least that clips nothing."""
    safe = np.where(largest == 0, 1.0, largest)
    below = floor_power(safe)
    return {
        "floor": below / 4,
        "even": np.where(safe >= 1.75 * below, 2, 1) * below / 4,
        "rceil": ceil_power(safe / 6),
    }[rule]


def amd_mxfp4(
    x: Array,
    w: Array,
    dy: Array,
    draws: Draws,
    rule: str = "even",
    size: int = 16,
    signs: bool = False,
    everywhere: bool = True,
) -> Result:
    """AMD's MXFP4 (arXiv 2605.09825): one fixed Hadamard matrix of 16 before all six quantisers, nearest codes. signs:
    a randomised one. everywhere: False rotates wgrad alone."""

    def q(v: Array, use: str) -> Array:
        blocks = blocks_of(v, 32)
        return scaled(blocks, power(amax(blocks), rule), E2M1_GRID).reshape(v.shape)

    def h(gemm: str) -> Array:
        if not everywhere and gemm != "wgrad":
            return rotation(1)
        return rotation(size, draws.signs(f"{gemm}.signs", size) if signs else None)

    return gemms(x, w, dy, q, 32, h)


def mxfp4_2d(
    x: Array, w: Array, dy: Array, draws: Draws, rule: str = "rceil", tile: int = 32, stochastic: bool = True
) -> Result:
    """MXFP4 in tiles of 32x32, whose transpose has the same codes: the backward takes the forward's x and w. tile: 16
    for finer ones. stochastic: of dY, which each GEMM draws anew, tile after tile."""

    def q(v: Array, use: str | None = None) -> Array:
        whole = filled(filled(v, tile).T, tile).T
        tiles = tiles_of(whole, tile, tile)
        uniform = draws.uniform(use, tiles.shape) if use is not None and stochastic else None
        return untiled(scaled(tiles, power(amax(tiles), rule), E2M1_GRID, uniform), tile, tile)[: len(v), : v.shape[1]]

    xq, wq = q(x), q(w)
    return xq @ wq.T, q(dy, "dgrad.dy") @ wq, q(dy, "wgrad.dy").T @ xq


def mxfp4_backward(
    x: Array,
    w: Array,
    dy: Array,
    draws: Draws,
    fp8: bool = False,
    saved: bool = True,
    block: int = 64,
    signs: bool = True,
    stochastic: bool = True,
) -> Result:
    """Training LLMs with MXFP4 (arXiv 2502.20586): a backward in MXFP4, each operand rotated by a randomised Hadamard
    of 64 and 3/4 of it rounded stochastically. fp8: a forward in E4M3, a scale per tensor; saved: wgrad takes its x."""
    xq, wq = (per_tensor(v, E4M3) for v in (x, w)) if fp8 else (x, w)

    def q(v: Array, use: str) -> Array:
        return quartet_backward(v, draws.uniform(use, v.shape) if stochastic else None)

    return xq @ wq.T, *requantised(xq if saved else x, w, dy, draws, block, q, signs)
