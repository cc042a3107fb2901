"""The three GEMMs of every published recipe in plain float64, written from the papers: numpy, nothing of qtrain.

# T tokens, K in features, N out features; x (T, K), w (N, K), dy (T, N) -> y (T, N), dx (T, K), dw (N, K)
An operand lies with its contraction dim last (dgrad takes w.T, wgrad dy.T and x.T) and is what its GEMM takes: codes
times all scales. Random bits are an input: `Draws` computes them from a layer's key table with Python integers. Keyword
arguments say where a paper, its released code and its neighbours differ; the defaults are the recipe's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from oracles.quantization import (
    E2M1_GRID,
    Array,
    blocks_of,
    centred_grid,
    minifloat_grid,
    nearest,
    phase_forward,
    quartet_backward,
    quartet_forward,
    rotate,
    rotation,
    stochastic,
)

Grid = list[float]
Result = tuple[Array, ...]
Quantise = Callable[[Array], Array]
Forward = Callable[[Array], tuple[Array, Array]]

E4M3, E5M2 = minifloat_grid(4, 3, 448.0), minifloat_grid(5, 2, 57344.0)
E3M2, E2M3 = minifloat_grid(3, 2, 28.0), minifloat_grid(2, 3, 7.5)
UE5M3 = minifloat_grid(5, 3, 114688.0)
E3M0 = minifloat_grid(3, 0, 16.0)  # the seven powers of two of a four-bit logarithmic code, and zero
INT4, INT8 = ([float(k) for k in range(-largest, largest + 1)] for largest in (7, 127))

# ----------------------------------------------------------------------------------------------------------- randomness

USES = ("fprop.x", "fprop.w", "dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x", "fprop.signs", "dgrad.signs", "wgrad.signs")


class Draws:
    """A layer's random bits: a hash of an element's position, row-major with the contraction dim last, and the two
    words of its use's key."""

    def __init__(self, keys: Sequence[Sequence[int]]) -> None:
        self.keys = {use: [word % 2**32 for word in key] for use, key in zip(USES, keys, strict=True)}

    def bits(self, use: str, count: int) -> NDArray[np.int64]:
        low, high = self.keys[use]
        mixed = []
        for position in range(count):
            h = position ^ low
            h = (h ^ (h >> 16)) * 0x7FEB352D % 2**32 ^ high
            h = (h ^ (h >> 15)) * 0x846CA68B % 2**32
            mixed.append(h ^ (h >> 16))
        return np.array(mixed)

    def uniform(self, use: str, shape: tuple[int, ...]) -> Array:
        """In [0, 1), from the upper 24 bits."""
        return (self.bits(use, int(np.prod(shape))) >> 8).reshape(shape) / 2.0**24

    def signs(self, use: str, n: int) -> Array:
        return (self.bits(use, n) & 1) * 2.0 - 1.0


# -------------------------------------------------------------------------------------------------------------- scaling


def rounded(u: Array, grid: Grid, uniform: Array | None) -> Array:
    return nearest(u, grid) if uniform is None else stochastic(u, grid, uniform)


def scaled(x: Array, scale: Array | float, grid: Grid, uniform: Array | None = None) -> Array:
    """x on the grid times scale, which x's shape broadcasts; zero where scale is zero."""
    return rounded(x / np.where(scale == 0, 1.0, scale), grid, uniform) * scale


def amax(x: Array) -> Array:
    """Of each block or row, kept."""
    return np.abs(x).max(-1, keepdims=True)


def rms(x: Array) -> Array:
    return np.sqrt((x * x).mean(-1, keepdims=True))


def per_tensor(x: Array, grid: Grid, uniform: Array | None = None) -> Array:
    return scaled(x, np.abs(x).max() / max(grid), grid, uniform)


def ceil_power(x: Array) -> Array:
    """The least power of two that is at least x."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(1.0, np.where(mantissa == 0.5, exponent - 1, exponent))


def floor_power(x: Array) -> Array:
    return np.ldexp(1.0, np.frexp(x)[1] - 1)


def tiles_of(x: Array, rows: int, block: int) -> Array:
    """(M, K) -> (M / rows, K / block, rows * block)."""
    return x.reshape(-1, rows, x.shape[1] // block, block).swapaxes(1, 2).reshape(-1, x.shape[1] // block, rows * block)


def untiled(tiles: Array, rows: int, block: int) -> Array:
    down, along, _ = tiles.shape
    return tiles.reshape(down, along, rows, block).swapaxes(1, 2).reshape(down * rows, along * block)


def filled(x: Array, multiple: int) -> Array:
    """Zeros behind the last dim, to a multiple."""
    return np.pad(x, ((0, 0), (0, -x.shape[1] % multiple)))


# ----------------------------------------------------------------------------------------------------------- QuEST, QAT
# QuEST (arXiv 2502.05003) and its baselines: a forward of quantised x, w; their values, and a dY in high precision, in
# the backward GEMMs; then the mask of each operand; then the inverse of the forward's rotation.

QUEST = {  # codes, the largest of them in RMS (a*), the trust threshold in RMS
    "int1": (centred_grid(1), 0.7978845587, 0.0),
    "int2": (centred_grid(2), 1.4935346200, 1.4935346200 / 3),
    "int4": (centred_grid(4), 2.5139305786, 2.5139305786 / 15),
    "int8": (centred_grid(8), 3.8849386788, 3.8849386788 / 255),
    "int1.585": ([-1.0, 0.0, 1.0], 1.2240089519, 1.2240089519 / 2),
    "fp4_e2m1": (E2M1_GRID, 6 * 0.48707976, 0.31857661),  # the threshold of the released code; 0.48708 in the paper
}


def straight_through(
    xq: Array,
    wq: Array,
    dy: Array,
    h: Array | None = None,
    masks: tuple[np.ndarray | float, np.ndarray | float] = (1.0, 1.0),
) -> Result:
    dx, dw = (dy @ wq) * masks[0], (dy.T @ xq) * masks[1]
    return (xq @ wq.T, dx, dw) if h is None else (xq @ wq.T, rotate(dx, h.T), rotate(dw, h.T))


def quest_rows(x: Array, codes: str, sparsity: str | None = None) -> Array:
    """Rows on a grid whose largest code is at a* RMS of the row, taken before anything is pruned."""
    grid, clip, _ = QUEST[codes]
    return scaled(x, (clip * rms(x) + 1e-8) / max(grid), grid) * kept(x, sparsity)


def kept(x: Array, sparsity: str | None) -> Array:
    """2:4: the two largest of four neighbours; 4:8: the two of four neighbouring pairs with the largest norm."""
    if sparsity is None:
        return np.ones_like(x)
    groups = x.reshape(*x.shape[:-1], -1, 4, 2 if sparsity == "4:8" else 1)
    rank = np.argsort(np.argsort(-(groups**2).sum(-1), -1, kind="stable"), -1)
    return np.broadcast_to((rank < 2)[..., None], groups.shape).reshape(x.shape).astype(float)


def trust_mask(x: Array, xq: Array, codes: str, one_bit: float, threshold: float | None) -> np.ndarray:
    """At one bit a clip mask, at one_bit times the largest code."""
    _, clip, trust = QUEST[codes]
    if codes == "int1":
        return np.abs(x) <= one_bit * clip * rms(x)
    return np.abs(xq - x) <= (trust if threshold is None else threshold) * rms(x)


def quest(
    x: Array,
    w: Array,
    dy: Array,
    draws: Draws,
    codes: str = "int4",
    sparsity: str | None = None,
    rotated: bool = True,
    one_bit: float = 1.30,
    threshold: float | None = None,
) -> Result:
    h = rotation(128 if rotated else 1)
    xh, wh = rotate(x, h), rotate(w, h)
    xq, wq = quest_rows(xh, codes), quest_rows(wh, codes, sparsity)
    masks = (trust_mask(xh, xq, codes, one_bit, threshold), trust_mask(wh, wq, codes, one_bit, threshold))
    return straight_through(xq, wq, dy, h, masks)


quest_no_hadamard = partial(quest, rotated=False, one_bit=1.25)


def quest_weight_only(x: Array, w: Array, dy: Array, draws: Draws, codes: str = "int4") -> Result:
    """Rotated, quantised, rotated back. (The released runs leave out the way back, and learn a rotated weight.)"""
    h = rotation(128)
    wh = rotate(w, h)
    wq = quest_rows(wh, codes)
    return straight_through(rotate(x, h), wq, dy, h, (1.0, trust_mask(wh, wq, codes, 1.30, None)))


def nf4(x: Array, w: Array, dy: Array, draws: Draws, block: int = 64) -> Result:
    """QLoRA's frozen weight: the 16 values of its table, under the largest magnitude of each 64."""
    table = (
        -1.0, -0.6961928, -0.5250730, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
    )  # fmt: skip
    blocks = w.reshape(-1, block)
    u = blocks / amax(blocks)
    nearest = np.abs(u[..., None] - np.array(table)).argmin(-1)
    return straight_through(x, (np.array(table)[nearest] * amax(blocks)).reshape(w.shape), dy)


def w4a16(x: Array, w: Array, dy: Array, draws: Draws, block: int = 32, scale_of: type = np.float16) -> Result:
    """Codes from -7 to 7 under the largest magnitude of each 32 over 7, as float16 has that scale."""
    blocks = w.reshape(-1, block)
    scale = (amax(blocks) / 7).astype(scale_of).astype(np.float64)
    return straight_through(x, scaled(blocks, scale, INT4).reshape(w.shape), dy)


def w4a16_asym(x: Array, w: Array, dy: Array, draws: Draws, block: int = 128, rounded: bool = True) -> Result:
    """Levels 0 to 15 over the range of each 128, zero within it; the scale in 8 significant bits, and the level of zero
    a whole number."""
    blocks = w.reshape(-1, block)
    low, high = (np.minimum(blocks.min(-1, keepdims=True), 0), np.maximum(blocks.max(-1, keepdims=True), 0))
    mantissa, exponent = np.frexp((high - low) / 15)
    scale = np.ldexp(np.rint(mantissa * 256), exponent - 8)
    scale = np.where(scale == 0, 1, scale)
    zero = np.clip(np.rint(-low / scale) if rounded else -low / scale, 0, 15)
    values = (np.clip(np.rint(blocks / scale + zero), 0, 15) - zero) * scale
    return straight_through(x, values.reshape(w.shape), dy)


def zeroquant_fp(
    x: Array, w: Array, dy: Array, draws: Draws, block: int = 128, m1: bool = False, per_token: bool = True
) -> Result:
    """w in E2M1 under the largest magnitude of each 128 over 6, in float16; x in E4M3 with each token's largest at 448.
    m1: the scales of w are rounded up to powers of two, in no other format."""
    xq = scaled(x, np.abs(x).max(-1 if per_token else None, keepdims=True) / 448, E4M3)
    blocks = w.reshape(-1, block)
    scale = amax(blocks) / 6
    scale = ceil_power(scale) if m1 else scale.astype(np.float16).astype(np.float64)
    return straight_through(xq, scaled(blocks, scale, E2M1_GRID).reshape(w.shape), dy)


def ste(x: Array, w: Array, dy: Array, draws: Draws, codes: str = "int4") -> Result:
    return straight_through(quest_rows(x, codes), quest_rows(w, codes), dy)


def clip(x: Array, w: Array, dy: Array, draws: Draws, codes: str = "int4") -> Result:
    """No gradient where |x| is above the scale a* RMS."""
    inside = [np.abs(v) <= QUEST[codes][1] * rms(v) for v in (x, w)]
    return straight_through(quest_rows(x, codes), quest_rows(w, codes), dy, None, (inside[0], inside[1]))


def quarot(x: Array, w: Array, dy: Array, draws: Draws, codes: str = "int4") -> Result:
    """The largest magnitude of a row at the largest code; nothing clips, nothing is masked."""
    h, grid = rotation(128), QUEST[codes][0]
    xh, wh = rotate(x, h), rotate(w, h)
    return straight_through(scaled(xh, amax(xh) / max(grid), grid), scaled(wh, amax(wh) / max(grid), grid), dy, h)


def lsq(
    x: Array,
    w: Array,
    dy: Array,
    draws: Draws,
    bits: int = 4,
    steps: tuple[float, float] | None = None,
    zeros_above: bool = False,
) -> Result:
    """LSQ (arXiv 1902.08153): one learned step per tensor. Also returns the gradients of the two steps.

    steps: of x and w; None is LSQ's first, 2 E|x| / sqrt(q_max). zeros_above: an exact zero, midway between two codes,
    takes the upper one, as in the released code.
    """
    q_max = 2.0 ** (bits - 1) - 1
    first = [2 * np.abs(v).mean() / np.sqrt(q_max) for v in (x, w)]
    values, masks, slopes = [], [], []
    for v, step in zip((x, w), steps or first, strict=True):
        u = np.clip(v / step, -q_max - 0.5, q_max + 0.5)
        code = np.rint(u - 0.5) + 0.5 if zeros_above else np.rint(u + 0.5) - 0.5
        mask = np.abs(v / step) <= q_max + 0.5
        values.append(code * step)
        masks.append(mask)
        slopes.append((code - mask * v / step) / np.sqrt(v.size * q_max))
    gradients = [(grad * slope).sum() for grad, slope in zip((dy @ values[1], dy.T @ values[0]), slopes, strict=True)]
    return *straight_through(values[0], values[1], dy, None, (masks[0], masks[1])), *map(np.asarray, gradients)


def trilm(x: Array, w: Array, dy: Array, draws: Draws, epsilon: float = 1e-5, per_row: bool = False) -> Result:
    """TriLM (arXiv 2407.12327): weights alone, -1, 0, 1 times their mean magnitude plus epsilon."""
    gamma = np.abs(w).mean(-1 if per_row else None, keepdims=True) + epsilon
    return straight_through(x, scaled(w, gamma, [-1.0, 0.0, 1.0]), dy)


# ----------------------------------------------------------------------------------------------------------------- HALO


def halo_0(x: Array, w: Array, dy: Array, draws: Draws, grid: Grid = INT8, saturate: float = 1.0) -> Result:
    """HALO (arXiv 2501.02625): one scale per tensor, the same codes in forward and backward. saturate: which part of
    amax the largest code stands for (0.75 in the released FP4 and FP6 simulation)."""
    xq, wq, dyq = (scaled(v, saturate * np.abs(v).max() / max(grid), grid) for v in (x, w, dy))
    return straight_through(xq, wq, dyq)


def halo_1(x: Array, w: Array, dy: Array, draws: Draws, grid: Grid = INT8, reuse: bool = True) -> Result:
    """x and w rotated over all of K. reuse: the backward takes the forward's codes and rotates back, as the released
    trainer does; else it quantises the unrotated x and w."""
    h = rotation(x.shape[1])
    xq, wq, dyq = per_tensor(rotate(x, h), grid), per_tensor(rotate(w, h), grid), per_tensor(dy, grid)
    y, dx, dw = straight_through(xq, wq, dyq, h)
    return (y, dx, dw) if reuse else (y, dyq @ per_tensor(w, grid), dyq.T @ per_tensor(x, grid))


def halo_2(x: Array, w: Array, dy: Array, draws: Draws, grid: Grid = INT8, tokens: int = 256) -> Result:
    """halo_1, and for dX alone dY rotated over its tokens (here in blocks), which is undone on dX."""
    h, left = rotation(x.shape[1]), rotation(tokens)
    xq, wq = per_tensor(rotate(x, h), grid), per_tensor(rotate(w, h), grid)
    y, _, dw = straight_through(xq, wq, per_tensor(dy, grid), h)
    dyq = per_tensor(rotate(filled(dy.T, tokens), left).T, grid)
    dx = rotate((dyq @ wq).T, left.T).T[: len(x)]
    return y, rotate(dx, h.T), dw


# ------------------------------------------------------------------------------------------------------------------ LUQ


def luq_int4(
    x: Array,
    w: Array,
    dy: Array,
    draws: Draws,
    sawb: tuple[float, float] = (12.68, 12.80),
    lowest: int = 6,
) -> Result:
    """LUQ (arXiv 2112.10769): x, w in INT4 clipped by SAWB; dY in signed powers of two, alpha = amax / 2^lowest and up.

    Below alpha: alpha with probability |x| / alpha, else zero; above: the two powers next to it, unbiased. sawb: the
    coefficients of the four-bit grid; 12.1, 12.2 in LUQ's own code. lowest: 6 makes seven magnitudes, as four bits
    have; the paper's formula (7) makes eight. Each GEMM draws for itself; the authors' code draws once for both.
    """
    xq, wq = (scaled(v, (sawb[0] * np.sqrt((v * v).mean()) - sawb[1] * np.abs(v).mean()) / 7, INT4) for v in (x, w))
    grid = sorted([0.0, *(sign * 2.0**k for k in range(lowest + 1) for sign in (-1, 1))])
    dgrad, wgrad = (
        per_tensor(v, grid, draws.uniform(use, v.shape)) for use, v in (("dgrad.dy", dy), ("wgrad.dy", dy.T))
    )
    return xq @ wq.T, dgrad @ wq, wgrad @ xq


# -------------------------------------------------------------------------------------------------------------- FP8, MX


def from_masters(x: Array, w: Array, dy: Array, q_x: Quantise, q_w: Quantise, q_dy: Quantise) -> Result:
    """Each of the six operands quantised from high precision, along its own contraction."""
    return q_x(x) @ q_w(w).T, q_dy(dy) @ q_w(w.T).T, q_dy(dy.T) @ q_x(x.T).T


def fp8_tensorwise(x: Array, w: Array, dy: Array, draws: Draws, gradient: Grid = E5M2) -> Result:
    forward = partial(per_tensor, grid=E4M3)
    return from_masters(x, w, dy, forward, forward, partial(per_tensor, grid=gradient))


def fp8_rowwise(x: Array, w: Array, dy: Array, draws: Draws, powers: bool = False) -> Result:
    """powers: scales rounded up to powers of two, as torchao does by default."""

    def q(v: Array) -> Array:
        scale = amax(v) / 448
        return scaled(v, ceil_power(scale) if powers else scale, E4M3)

    return from_masters(x, w, dy, q, q, q)


def fp8_blockwise(x: Array, w: Array, dy: Array, draws: Draws, powers: bool = False, saved: bool = False) -> Result:
    """x and dY in 1x128, w in 128x128, as DeepSeek-V3 (arXiv 2412.19437). powers: scales rounded up to powers of two
    (Transformer Engine's default). saved: wgrad quantises the forward's x again, as the paper; else x itself."""

    def q(v: Array, rows: int = 1) -> Array:
        blocks = tiles_of(filled(filled(v, 128).T, rows).T, rows, 128)
        scale = amax(blocks) / 448
        values = untiled(scaled(blocks, ceil_power(scale) if powers else scale, E4M3), rows, 128)
        return values[: len(v), : v.shape[1]]

    y, dx, dw = from_masters(x, w, dy, q, partial(q, rows=128), q)
    return (y, dx, q(dy.T) @ q(q(x).T).T) if saved else (y, dx, dw)


def mx(v: Array, grid: Grid, rule: str) -> Array:
    """OCP Microscaling: blocks of 32. floor: 2^(floor(log2 amax) - emax); rceil: 2^ceil(log2(amax / max))."""
    blocks = blocks_of(filled(v, 32), 32)
    largest = amax(blocks)
    scale = (
        floor_power(largest) / floor_power(np.array(max(grid))) if rule == "floor" else ceil_power(largest / max(grid))
    )
    return scaled(blocks, np.where(largest == 0, 0.0, scale), grid).reshape(len(v), -1)[:, : v.shape[1]]


def mxfp(x: Array, w: Array, dy: Array, draws: Draws, grid: Grid, rule: str) -> Result:
    q = partial(mx, grid=grid, rule=rule)
    return from_masters(x, w, dy, q, q, q)


mxfp8 = partial(mxfp, grid=E4M3, rule="rceil")
mxfp6 = partial(mxfp, grid=E3M2, rule="floor")


# -------------------------------------------------------------------------------------------------------------- Quartet
# The backward of Quartet, Quartet II and its TetraJet-v2 baseline: dY and the forward's quantised values, rotated along
# N or T with the same signs, each quantised (again); then, in Quartet, the forward's masks and inverse rotation.


def requantised(
    xq: Array, wq: Array, dy: Array, draws: Draws, block: int, q: Callable[[Array, str], Array], signs: bool = True
) -> Result:
    """dX and dW. q(v, use) quantises a rotated operand."""
    n, t = (rotation(block, draws.signs(f"{gemm}.signs", block) if signs else None) for gemm in ("dgrad", "wgrad"))
    dx = q(rotate(filled(dy, block), n), "dgrad.dy") @ q(rotate(filled(wq.T, block), n), "dgrad.w").T
    dw = q(rotate(filled(dy.T, block), t), "wgrad.dy") @ q(rotate(filled(xq.T, block), t), "wgrad.x").T
    return dx, dw


def quartet(
    x: Array, w: Array, dy: Array, draws: Draws, version: int = 2, forward: Forward = quartet_forward
) -> Result:
    """Quartet (arXiv 2505.14669), Algorithm 1; version 1: stochastic rounding, and no signs in effect. forward: values
    and mask of a rotated operand."""
    h = rotation(32)
    (xq, x_mask), (wq, w_mask) = (forward(rotate(v, h)) for v in (x, w))

    def q(v: Array, use: str) -> Array:
        return quartet_backward(v, draws.uniform(use, v.shape) if version == 1 else None)

    dx, dw = requantised(xq, wq, dy, draws, 32, q, signs=version == 2)
    return xq @ wq.T, rotate(dx * x_mask, h.T), rotate(dw * w_mask, h.T)


quartet_phase = partial(quartet, forward=phase_forward)


# ---------------------------------------------------------------------------------------------------------------- NVFP4


def block_scales(blocks: Array, limit: float, s_t: Array, grid: Grid) -> Array:
    """amax of a block at `limit` code units; 1 where that rounds to zero."""
    scale = nearest(amax(blocks) / limit / np.where(s_t == 0, 1.0, s_t), grid)
    return np.where(scale == 0, 1.0, scale)


def nvfp4(
    v: Array,
    limit: float = 6.0,
    rows: int = 1,
    scales: Grid = E4M3,
    cap: float | None = None,
    uniform: Array | None = None,
) -> Array:
    """E2M1 in blocks of rows x 16, their scales on a minifloat grid under one of the tensor: amax at limit * cap."""
    blocks = tiles_of(filled(v.T, rows).T, rows, 16)
    s_t = np.abs(v).max() / limit / (cap or max(scales))
    draws = None if uniform is None else tiles_of(filled(uniform.T, rows).T, rows, 16)
    return untiled(scaled(blocks, block_scales(blocks, limit, s_t, scales) * s_t, E2M1_GRID, draws), rows, 16)[: len(v)]


def four_over_six(v: Array) -> Array:
    """Per block amax at 6 or at 4, whichever leaves the smaller squared error; a tie takes 6. Scales up to 256."""
    blocks = blocks_of(v, 16)
    s_t = np.abs(v).max() / 6 / 256
    six, four = (scaled(blocks, block_scales(blocks, limit, s_t, E4M3) * s_t, E2M1_GRID) for limit in (6.0, 4.0))
    error_six, error_four = (((q - blocks) ** 2).sum(-1, keepdims=True) for q in (six, four))
    return np.where(error_six <= error_four, six, four).reshape(v.shape)


def ms_eden(v: Array, uniform: Array, correction: int, cap: float) -> Array:
    """Quartet II's MS-EDEN: nearest codes, amax at 6 * 16/17 / 0.93 of the grid; block scales times S = <u, u> / <u,
    codes> of `correction` elements u in code units, then stochastically rounded to E4M3. cap: of the block scales; the
    training code's 255.99 keeps the largest from rounding up, and leaves 45 dB between the two."""
    limit = 6 * (16 / 17) / 0.93
    blocks = blocks_of(v, 16)
    s_t = np.abs(v).max() / limit / cap
    s_b = block_scales(blocks, limit, s_t, E4M3)
    u = blocks / (s_b * np.where(s_t == 0, 1.0, s_t))
    codes = nearest(u, E2M1_GRID)
    square, product = (blocks_of((u * other).reshape(v.shape), correction).sum(-1) for other in (u, codes))
    s = np.where(product == 0, 1.0, square / np.where(product == 0, 1.0, product))
    s = np.repeat(s, correction // 16, axis=1)
    return (codes * stochastic(s_b[..., 0] * s, E4M3, uniform)[..., None] * s_t).reshape(v.shape)


def quartet_ii(
    x: Array,
    w: Array,
    dy: Array,
    draws: Draws,
    forward: Quantise = four_over_six,
    correction: int = 16,
    cap: float = 256.0,
) -> Result:
    """Quartet II (arXiv 2601.22813)."""
    xq, wq = forward(x), forward(w)

    def q(v: Array, use: str) -> Array:
        return ms_eden(v, draws.uniform(use, (len(v), v.shape[1] // 16)), correction, cap)

    return xq @ wq.T, *requantised(xq, wq, dy, draws, 128, q)


quartet_ii_no46 = partial(quartet_ii, forward=nvfp4)
quartet_ii_128 = partial(quartet_ii, correction=128)


def tetrajet_v2_baseline(x: Array, w: Array, dy: Array, draws: Draws, limit: float = 6 * 16 / 17) -> Result:
    """The TetraJet-v2 baseline of Quartet II (arXiv 2601.22813), which is not the whole of TetraJet-v2 (2510.27527).

    limit: what amax of a block becomes under stochastic rounding, low enough that a scale rounded down clips nothing.
    """
    xq, wq = nvfp4(x), nvfp4(w)

    def q(v: Array, use: str) -> Array:
        return nvfp4(v, limit, uniform=draws.uniform(use, v.shape))

    return xq @ wq.T, *requantised(xq, wq, dy, draws, 32, q)


def nvidia_nvfp4(
    x: Array, w: Array, dy: Array, draws: Draws, rows: int = 16, limit: float = 6.0, saved: bool = False
) -> Result:
    """NVIDIA (arXiv 2509.25149): 16x16 weights, the same in forward and dgrad; wgrad alone rotated, with the run's
    signs, from high precision. rows, limit: 1 and 6 * 16/17 elsewhere. saved: wgrad takes the forward's x."""
    xq, wq = nvfp4(x), nvfp4(w, rows=rows)
    wide = filled(dy, 16)
    dyq = nvfp4(wide, limit, uniform=draws.uniform("dgrad.dy", wide.shape))[:, : dy.shape[1]]
    h = rotation(16, draws.signs("wgrad.signs", 16))
    dyt, xt = (rotate(filled(v.T, 16), h) for v in (dy, xq if saved else x))
    dw = nvfp4(dyt, limit, uniform=draws.uniform("wgrad.dy", dyt.shape)) @ nvfp4(xt).T
    return xq @ wq.T, dyq @ wq, dw


def nvfp4_masters(x: Array, w: Array, dy: Array, draws: Draws, scales: Grid = UE5M3) -> Result:
    """Blocks of 16 under scales of another minifloat: rounded to nearest, all six operands, no rotation."""

    def q(v: Array) -> Array:
        return nvfp4(filled(v, 16), scales=scales)[:, : v.shape[1]]

    return from_masters(x, w, dy, q, q, q)
