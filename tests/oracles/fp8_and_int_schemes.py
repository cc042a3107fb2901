"""The three GEMMs of seven published schemes in plain float64: Transformer Engine's MXFP8 with 2-D weights and its
hybrid of MXFP8 and NVFP4, BitNet b1.58, Jetfire in INT8 and FP4, LUQ in FP4 by two readings. Conventions are those of
`recipes`: numpy, and nothing of qtrain. The eighth, DeepSeek-V3, is `recipes.fp8_blockwise(saved=True)`.
"""

from __future__ import annotations

import numpy as np
from oracles.quantization import E2M1_GRID, Array, rotate, rotation
from oracles.recipes import (
    E4M3,
    INT8,
    Draws,
    Grid,
    Result,
    ceil_power,
    filled,
    floor_power,
    mx,
    nvfp4,
    per_tensor,
    scaled,
    straight_through,
    tiles_of,
    untiled,
)

TERNARY = [-1.0, 0.0, 1.0]


def in_squares(v: Array, grid: Grid, size: int, scale_of: str, uniform: Array | None = None) -> Array:
    """v in tiles of size x size under one scale each, zeros behind both dims to whole tiles.

    scale_of: float32 takes amax / the largest code as it is; float16 rounds that to half precision, rceil up to a power
    of two; floor is the power of two of OCP. uniform: in [0, 1), one for each element, tile after tile.
    """
    down, along = v.shape
    whole = np.pad(v, ((0, -down % size), (0, -along % size)))
    tiles = tiles_of(whole, size, size)
    largest = np.abs(tiles).max(-1, keepdims=True)
    scale = largest / max(grid)
    if scale_of == "rceil":
        scale = np.where(largest == 0, 0.0, ceil_power(scale))
    elif scale_of == "floor":
        scale = np.where(largest == 0, 0.0, floor_power(largest) / floor_power(np.array(max(grid))))
    elif scale_of == "float16":
        scale = scale.astype(np.float16).astype(np.float64)
    else:
        assert scale_of == "float32"
    draws = None if uniform is None else uniform.reshape(tiles.shape)
    return untiled(scaled(tiles, scale, grid, draws), size, size)[:down, :along]


# -------------------------------------------------------------------------------------------------- Transformer Engine


def mxfp8_2d(x: Array, w: Array, dy: Array, draws: Draws, rule: str = "rceil") -> Result:
    """MXFP8BlockScaling(enable_2d_quantization=True): weights alone in 32x32, once for both their uses. Every scale is
    the least power of two under which amax is at most 448 (rule floor: OCP's, under which it may saturate)."""

    def q(v: Array) -> Array:
        return mx(v, E4M3, rule)

    wq = in_squares(w, E4M3, 32, rule)
    return q(x) @ wq.T, q(dy) @ wq, q(dy.T) @ q(x.T).T


def mxfp8_fwd_nvfp4_bwd(
    x: Array, w: Array, dy: Array, draws: Draws, weight_of: str = "forward", input_of: str = "master"
) -> Result:
    """mxfp8_fwd_nvfp4_bwd_factory: MXFP8 forward; dgrad takes the forward's MXFP8 weight to NVFP4 along N, without a
    rotation; wgrad takes the unquantised input, rotated with the run's signs; both copies of dY are rounded
    stochastically. weight_of, input_of: forward or master, what the backward quantises."""
    xq, wq = mx(x, E4M3, "rceil"), mx(w, E4M3, "rceil")
    weight, source = (wq if weight_of == "forward" else w), (xq if input_of == "forward" else x)
    dx = nvfp4(dy, uniform=draws.uniform("dgrad.dy", dy.shape)) @ nvfp4(weight.T).T
    h = rotation(16, draws.signs("wgrad.signs", 16))
    dyt, xt = (rotate(filled(v.T, 16), h) for v in (dy, source))
    return xq @ wq.T, dx, nvfp4(dyt, uniform=draws.uniform("wgrad.dy", dyt.shape)) @ nvfp4(xt).T


# --------------------------------------------------------------------------------------------------------------- BitNet


def bitnet_b158(
    x: Array, w: Array, dy: Array, draws: Draws, epsilon: float = 1e-5, per_token: bool = True, per_row: bool = False
) -> Result:
    """BitNet b1.58 (arXiv 2402.17764): x in INT8 with each token's amax at 127; w as -1, 0, 1 times the mean magnitude
    of the tensor plus epsilon (zero in the training code, where the mean is at least 1e-5 instead); a straight-through
    backward in high precision, of the quantised values. per_token False: one scale of all x; per_row: one per row of
    w."""
    xq = scaled(x, np.abs(x).max(-1 if per_token else None, keepdims=True) / 127, INT8)
    wq = scaled(w, np.abs(w).mean(-1 if per_row else None, keepdims=True) + epsilon, TERNARY)
    return straight_through(xq, wq, dy)


# -------------------------------------------------------------------------------------------------------------- Jetfire


def jetfire(
    x: Array,
    w: Array,
    dy: Array,
    draws: Draws,
    grid: Grid = INT8,
    size: int = 32,
    scale_of: str = "float32",
    stochastic: bool = True,
) -> Result:
    """Jetfire (arXiv 2403.12422), its linear layer: x, w and dY in 32x32 tiles, amax at the largest code. The backward
    takes the forward's x and w, which as square tiles are their own transposes. dY is rounded stochastically, for each
    GEMM anew (the released kernels transpose one draw). scale_of: float16 in the released kernels."""
    xq, wq = (in_squares(v, grid, size, scale_of) for v in (x, w))
    shape = [length + -length % size for length in dy.shape]
    dgrad, wgrad = (
        in_squares(dy, grid, size, scale_of, draws.uniform(use, (shape[0], shape[1])) if stochastic else None)
        for use in ("dgrad.dy", "wgrad.dy")
    )
    return xq @ wq.T, dgrad @ wq, wgrad.T @ xq


def jetfire_in_rows(x: Array, w: Array, dy: Array, draws: Draws) -> Result:
    """Its neighbour: 1x32 blocks along each contraction, so that nothing of the forward serves the backward."""

    def q(v: Array, use: str | None = None) -> Array:
        whole = filled(v, 32)
        blocks = tiles_of(whole, 1, 32)
        uniform = None if use is None else draws.uniform(use, blocks.shape)
        scale = np.abs(blocks).max(-1, keepdims=True) / 127
        return untiled(scaled(blocks, scale, INT8, uniform), 1, 32)[:, : v.shape[1]]

    return q(x) @ q(w).T, q(dy, "dgrad.dy") @ q(w.T).T, q(dy.T, "wgrad.dy") @ q(x.T).T


# ------------------------------------------------------------------------------------------------------------------ LUQ


def luq_fp4(
    x: Array, w: Array, dy: Array, draws: Draws, forward: Grid = E2M1_GRID, lowest: int = 6, geometric: bool = False
) -> Result:
    """LUQ (arXiv 2112.10769) with FP4 in the forward, one scale of amax per tensor and nothing clipped; dY in signed
    powers of two from amax down to amax / 2^lowest, and zero, each rounded stochastically to one of its neighbours.

    forward: E2M1 or E3M0, the two readings of Quartet's LUQ-FP4. geometric: powers of two part at sqrt(2), not at their
    mean 1.5.
    """

    def q(v: Array) -> Array:
        if not geometric:
            return per_tensor(v, forward)
        scale = np.abs(v).max() / 16
        u = np.abs(v) / scale
        power = floor_power(np.where(u == 0, 1.0, u))
        power = np.where(u >= power * np.sqrt(2), 2 * power, power)
        return np.sign(v) * np.where(u < 0.25 / np.sqrt(2), 0.0, np.clip(power, 0.25, 16.0)) * scale

    xq, wq = q(x), q(w)
    powers = sorted([0.0, *(sign * 2.0**k for k in range(lowest + 1) for sign in (-1, 1))])
    dgrad, wgrad = (
        per_tensor(v, powers, draws.uniform(use, v.shape)) for use, v in (("dgrad.dy", dy), ("wgrad.dy", dy.T))
    )
    return xq @ wq.T, dgrad @ wq, wgrad @ xq
