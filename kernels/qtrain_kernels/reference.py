"""The torch twin of every operation: runs anywhere, and is the definition of correct.

Layout of every operand here: (outer, span, inner), quantised along dim 1, computed in float32. An operand (M, K)
quantised along K is (M * K / span, span, 1); along M it is (M / span, span, K): no transpose is ever made. The span is
the block that shares a scale, the blocks that share an EDEN correction, or, for a format with one scale per row or
tensor, the whole contraction dim. Tiles of several rows come as blocks, one after the other.

x ≈ codes * block_scale * tensor_scale. `tensor_scale` sees whole rows or tensors, `encode` one span at a time.
Exponents are read from the bits of a float32, never from log2, and every sum that decides a scale is `tree_sum`, so
that compiled code can agree bit for bit.

NaN and infinity stay visible: either one in a block (or row, or, with a tensor scale, tensor) makes all of it NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from qtrain_kernels.formats import Element, ScaleKind
from qtrain_kernels.precision import matmul

HEADROOM = 0.75  # Quartet's backward: amax < 8 * 2^e, so 3/4 of it stays within 6 * 2^e
STD_EPS = 1e-8
ABSMEAN_EPS = 1e-5  # TriLM's
FITTED_LIMIT = 6.0 * (16 / 17) / 0.93  # Quartet II: where amax lies on the grid, for the least error on N(0, 1)
REDUCED_CAP = 256.0  # Quartet II: the largest block scale, with room for EDEN's correction or for 6 / 4 of it
BEST_PHASE = 1.1637  # RMS of a row, in powers of two, at which `mse` has its least error on N(0, 1)
CARRY = 0x7FFFFF  # added to a float32's bits, makes any mantissa but 1.0 carry into the exponent
CARRY_ABOVE_SQRT2 = 0x800000 - 0x3504F4  # makes mantissas above sqrt(2), the float32 1.41421354 = 0x3FB504F3, carry
SAWB = (12.68, 12.80)  # of the four-bit grid: clip at 12.68 RMS - 12.80 E|x|


@dataclass(frozen=True)
class Mask:
    """Which elements pass a gradient. inside: |u| < limit; within: |u| <= limit; error: |codes - u| <= limit, where
    u = x / (block_scale * tensor_scale). A zero row passes all of its gradient in each of them."""

    kind: Literal["inside", "within", "error"]
    limit: float


@dataclass(frozen=True)
class Plan:
    """What an operand's quantiser does after rotation.

    scale_kind: e8m0 | minifloat (scale_element is its grid) | float32. block: elements that share a block scale, None
    for one float32 scale per row, or per tensor where per_tensor. rule: one of formats.SCALE_RULES.
    rounding: nearest (ties to even) | stochastic | eden. mask: None where no gradient asks. correction: elements that
    share an EDEN correction, a multiple of block. sparsity: 2:4 or 4:8 by magnitude before rounding.
    """

    element: Element
    scale_kind: ScaleKind
    block: int | None
    rule: str
    rounding: Literal["nearest", "stochastic", "eden"] = "nearest"
    mask: Mask | None = None
    scale_element: Element | None = None
    per_tensor: bool = False
    correction: int | None = None
    sparsity: Literal["2:4", "4:8"] | None = None

    @property
    def span(self) -> int | None:
        """The size of dim 1; None: the whole contraction dim."""
        return self.correction or self.block

    @property
    def exact_in_bfloat16(self) -> bool:
        """Whether codes * block_scale have at most bfloat16's 8 significant bits."""
        if self.block is not None and self.scale_kind == "float32":
            return False
        scale_bits = self.scale_element.significant_bits if self.scale_element else 0
        return self.element.significant_bits + scale_bits <= 8


@dataclass(frozen=True)
class Knows:
    """What a backend computes. rules: its scale rules by the kind of a block's scale, and for the one scale of a whole
    line or tensor (`line`); of a kind that is not there it computes no scales, so it takes all rules."""

    backend: str
    rules: Mapping[str, tuple[str, ...]]
    roundings: tuple[str, ...]
    masks: tuple[str, ...]
    sparsities: tuple[str, ...]

    def check(self, plan: Plan) -> None:
        """ValueError for a plan that asks for anything else."""
        kind = plan.scale_kind if plan.block is not None else "line"
        asked = (
            (f"scale rule ({kind})", plan.rule, self.rules.get(kind)),
            ("rounding", plan.rounding, self.roundings),
            ("mask", plan.mask and plan.mask.kind, self.masks),
            ("sparsity", plan.sparsity, self.sparsities),
        )
        for what, name, known in asked:
            if name is not None and known is not None and name not in known:
                raise ValueError(
                    f"backend {self.backend!r} knows no {what} {name!r}; it knows {', '.join(known)}; use one of them, "
                    "or a backend that knows it"
                )


KNOWS = Knows(
    "reference",
    rules={
        "e8m0": (
            "floor", "floor_three_quarters", "even", "rceil", "ceil", "round", "std", "std_round", "mse", "mse_phase",
            "gaussian",
        ),
        "minifloat": ("absmax", "absmax_headroom", "absmax_fitted", "four_over_six"),
        "float32": ("absmax", "gaussian", "absmean", "sawb"),
        "line": ("absmax", "gaussian", "absmean", "sawb", "learned"),
    },
    roundings=("nearest", "stochastic", "eden"),
    masks=("inside", "within", "error"),
    sparsities=("2:4", "4:8"),
)  # fmt: skip


def stored_integer(element: Element) -> tuple[float, float]:
    """(unit, offset): an int8 q stands for the code (q + offset) * unit of an integer grid. Centred codes of up to 7
    bits are stored twice, as odd integers; those of 8 bits do not fit, and lose their half."""
    if not element.offset:
        return element.step, 0.0
    return (0.5, 0.0) if 2 * element.max <= 127 else (1.0, element.offset)


# ----------------------------------------------------------------------------------------------------------- reductions


def tree_sum(x: Tensor) -> Tensor:
    """Sum over dim 1, kept: halves are added until one element is left, an odd last one waiting for the next round."""
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        folded = x[:, :half] + x[:, half : 2 * half]
        x = torch.cat((folded, x[:, 2 * half :]), dim=1) if x.shape[1] % 2 else folded
    return x


def divide(x: Tensor, divisor: float) -> Tensor:
    """x / divisor rounded once, on every device: by a Python number, torch multiplies with its reciprocal on CUDA."""
    return x / torch.full((), divisor, dtype=x.dtype, device=x.device)


def mean(x: Tensor) -> Tensor:
    """(outer, 1, inner) over dim 1."""
    return divide(tree_sum(x), x.shape[1])


def root(x: Tensor) -> Tensor:
    """The square root rounded once: torch's own of float32 is off by one unit on a sixth of all values on CPU (MKL)."""
    return torch.sqrt(x.double()).to(x.dtype)


def rms(x: Tensor) -> Tensor:
    """(outer, 1, inner) root mean square over dim 1."""
    return root(mean(x * x))


def std(x: Tensor) -> Tensor:
    """(outer, 1, inner) standard deviation over dim 1 about the block's own mean, population variance."""
    centred = x - mean(x)
    return root(mean(centred * centred))


def amax(x: Tensor) -> Tensor:
    return x.abs().amax(dim=1, keepdim=True)


# -------------------------------------------------------------------------------------------------------- powers of two


def biased_exponent(bits: Tensor) -> Tensor:
    """The exponent field of float32 bits: floor(log2 |x|) + 127; 0 for zero and subnormals, 255 for inf and NaN."""
    return (bits >> 23) & 0xFF


def power_of_two(biased: Tensor) -> Tensor:
    """2^(biased - 127), biased in 0..255: the E8M0 scale. 0 is 2^-127, a float32 subnormal; 255 is NaN."""
    normal = (biased << 23).view(torch.float32)
    return torch.where(biased == 0, 2.0**-127, torch.where(biased == 255, float("nan"), normal))


def _reciprocal(scale: Tensor) -> Tensor:
    """1 / scale for a power of two, exact (2^127 gives the subnormal 2^-127)."""
    return 1.0 / scale


def _scale_exponent(magnitude: Tensor, increment: int, shift: int, divisor: float = 1.0) -> Tensor:
    """The biased exponent of magnitude / divisor, after `increment` is added to its bits and `shift` taken off; from
    2^-127 upwards, inf and NaN stay 255. Subnormals are lifted first: their bits have no exponent."""
    tiny = magnitude < 2.0**-60
    lifted = torch.where(tiny, magnitude * 2.0**64, magnitude)
    bits = (lifted if divisor == 1.0 else divide(lifted, divisor)).view(torch.int32)
    biased = biased_exponent(bits)
    moved = biased_exponent(bits + increment) - shift - 64 * tiny.to(torch.int32)
    return torch.where(biased == 255, 255, moved.clamp(0, 254))


@dataclass(frozen=True)
class Exponent:
    """How a block's E8M0 scale follows from one magnitude, rms and std times the element's Gaussian fit: the exponent
    of it / divisor after `increment` is added to its bits, less `shift`; search: the least error of that and its
    neighbours."""

    magnitude: Literal["amax", "rms", "std"]
    increment: int = 0
    shift: int = 0
    divisor: float = 1.0
    search: bool = False


def exponent_rule(plan: Plan) -> Exponent:
    """Of a plan with E8M0 scales. ValueError for a rule that is not there."""
    element, emax = plan.element, plan.element.max_exponent
    half_a_unit = 1 << (22 - element.precision_bits)  # of the element's last mantissa bit
    rules = {
        "floor": Exponent("amax", shift=emax),
        "floor_three_quarters": Exponent("amax", shift=emax),
        "mse": Exponent("amax", shift=emax, search=True),
        "mse_phase": Exponent("amax", shift=emax, search=True),
        "even": Exponent("amax", half_a_unit, emax),
        "ceil": Exponent("amax", CARRY, emax),
        "rceil": Exponent("amax", CARRY, divisor=element.max),
        "round": Exponent("amax", CARRY_ABOVE_SQRT2, divisor=element.max),
        "gaussian": Exponent("rms"),
        "std": Exponent("std"),
        "std_round": Exponent("std", CARRY_ABOVE_SQRT2),
    }
    if plan.rule not in rules:
        raise ValueError(f"there is no scale rule {plan.rule!r} for e8m0 scales; use {', '.join(rules)}")
    return rules[plan.rule]


def _e8m0_exponent(x: Tensor, plan: Plan) -> Tensor:
    """The biased exponent of a block's scale."""
    rule = exponent_rule(plan)
    if rule.magnitude == "amax":
        magnitude = amax(x)
    else:
        assert plan.element.gaussian is not None
        rms_ = rule.magnitude == "rms"
        magnitude = plan.element.gaussian * (rms(x) if rms_ else std(x)) + (0.0 if rms_ else STD_EPS)
    exponent = _scale_exponent(magnitude, rule.increment, rule.shift, rule.divisor)
    if not rule.search:
        return exponent
    return torch.where(exponent == 255, 255, _least_error_exponent(x, exponent, plan.element))


def _least_error_exponent(x: Tensor, floor: Tensor, element: Element) -> Tensor:
    """floor - 1, floor or floor + 1: the one with the least squared error of rounding to nearest; a tie takes the
    earlier of (floor, floor - 1, floor + 1). Errors are taken in units of the floor scale, so that none overflows."""
    u = x * _reciprocal(power_of_two(floor))
    best, least = floor, _squared_error(u, 1.0, element)
    for shift in (-1, 1):
        error = _squared_error(u, 2.0**shift, element)
        better = (error < least) & (floor + shift >= 0) & (floor + shift <= 254)
        best, least = torch.where(better, floor + shift, best), torch.where(better, error, least)
    return best


def _squared_error(u: Tensor, scale: float, element: Element) -> Tensor:
    difference = round_nearest(u * (1.0 / scale), element) * scale - u
    return tree_sum(difference * difference)


# ------------------------------------------------------------------------------------------------------------- rotation


@dataclass(frozen=True, eq=False)
class Rotation:
    """x -> x D H in blocks of `size` along dim 1: random signs D, then H / sqrt(size), H a Hadamard matrix.

    signs: (size,) float32 of ±1, or None. H is Sylvester's of order 2^k; base, (m, m) float32 of ±1 with size = 2^k m,
    makes it Sylvester's times base.
    """

    size: int
    signs: Tensor | None = None
    base: Tensor | None = None


def rotate(x: Tensor, rotation: Rotation | None) -> Tensor:
    """x (outer, span, inner) -> x D H, float32. outer * span: whole rows one after the other, or one of columns; a
    multiple of rotation.size. Sums are taken in pairs, elements half a block apart first; those of base by a matmul,
    whose order is its own."""
    if rotation is None:
        return x.float()
    blocks = x.float().reshape(-1, rotation.size, x.shape[2])
    if rotation.signs is not None:
        blocks = blocks * rotation.signs[:, None]
    return _hadamard(blocks, None if rotation.base is None else rotation.base.T).reshape(x.shape)


def unrotate(x: Tensor, rotation: Rotation | None, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(x * mask) (D H)^-1 in dtype, computed in float32; x as in `rotate`, mask of its shape, uint8 or None: a gradient
    that leaves a rotation."""
    x = x if mask is None else x * mask  # exact in any dtype
    if rotation is None:
        return x.to(dtype)
    blocks = _hadamard(x.float().reshape(-1, rotation.size, x.shape[2]), rotation.base)
    if rotation.signs is not None:
        blocks = blocks * rotation.signs[:, None]
    return blocks.reshape(x.shape).to(dtype)


def _hadamard(x: Tensor, base: Tensor | None) -> Tensor:
    """(blocks, size, inner) times the symmetric Sylvester part and base from the left, over sqrt(size)."""
    blocks, size, inner = x.shape
    half = size // 2
    while half >= (1 if base is None else base.shape[0]):
        pairs = x.reshape(-1, 2, half, inner)
        first, second = pairs[:, 0], pairs[:, 1]
        x = torch.stack((first + second, first - second), dim=1)
        half //= 2
    if base is not None:
        x = matmul(base, x.reshape(-1, base.shape[0], inner))
    return x.reshape(blocks, size, inner) * size**-0.5


# --------------------------------------------------------------------------------------------------------------- scales


def tensor_scale(x: Tensor, plan: Plan, rotation: Rotation | None = None) -> Tensor | float:
    """The scale above the blocks: (outer, 1, inner) float32 per row, () float32 per tensor, or a constant.

    x: whole rows, (outer, contraction, inner), before the rotation. A row or tensor of zeros gets scale 0, which
    `encode` takes as codes of zero inputs: the product is 0.
    """
    KNOWS.check(plan)
    constant = constant_scale(plan)
    if constant is not None:
        return constant
    if not x.numel():
        one = plan.per_tensor or plan.scale_kind == "minifloat"
        return x.new_zeros(() if one else (x.shape[0], 1, x.shape[2]), dtype=torch.float32)
    x = rotate(x, rotation)
    if plan.scale_kind == "minifloat":
        limit, cap = minifloat_range(plan)
        low, high = torch.aminmax(x)  # one pass and no copy: a third of x.abs().amax()
        return finite_or_nan(divide(torch.maximum(low.abs(), high.abs()), limit * cap))
    if plan.rule == "mse_phase":
        return finite_or_nan(rms(x) * (1.0 / BEST_PHASE))
    scale = _float32_scale(x.reshape(1, -1, 1) if plan.per_tensor else x, plan)
    return scale.reshape(()) if plan.per_tensor else scale


def constant_scale(plan: Plan) -> float | None:
    """The scale above the blocks where it does not depend on x. ValueError for a learned one, which is given."""
    if plan.rule == "learned":
        raise ValueError("scale rule 'learned' has no scale of x: it is a parameter, which is given")
    if plan.scale_kind == "minifloat" or plan.rule == "mse_phase" or plan.block is None:
        return None
    return 1.0 / HEADROOM if plan.rule == "floor_three_quarters" else 1.0


def _float32_scale(x: Tensor, plan: Plan) -> Tensor:
    """(outer, 1, inner): one scale for each dim 1."""
    if plan.rule == "gaussian":
        assert plan.element.gaussian is not None
        return finite_or_nan(plan.element.gaussian * rms(x))
    if plan.rule == "absmean":
        return finite_or_nan(mean(x.abs()) + ABSMEAN_EPS)
    if plan.rule == "sawb":
        clip = SAWB[0] * rms(x) - SAWB[1] * mean(x.abs())
        clip = torch.where(clip <= 0, amax(x), clip)  # below zero where magnitudes are nearly equal: the fit is no fit
        return finite_or_nan(divide(clip, plan.element.max))
    assert plan.rule == "absmax", plan.rule
    return finite_or_nan(divide(amax(x), plan.element.max))


def minifloat_range(plan: Plan) -> tuple[float, float]:
    """(what amax becomes in code units, the largest block scale)."""
    assert plan.scale_element is not None
    if plan.rule == "absmax_headroom":  # a scale rounded down by its last half bit still clips nothing
        return plan.element.max / (1.0 + 2.0 ** -(plan.scale_element.precision_bits + 1)), plan.scale_element.max
    reduced = min(REDUCED_CAP, plan.scale_element.max * REDUCED_CAP / 448)  # of E4M3, and as much of a shorter range
    if plan.rule == "absmax_fitted":
        return FITTED_LIMIT, reduced
    if plan.rule == "four_over_six":
        return plan.element.max, reduced
    return plan.element.max, plan.scale_element.max


def block_scale(x: Tensor, scale: Tensor | float, plan: Plan) -> Tensor | None:
    """(outer, 1, inner) float32 values of the format's block scale; None for formats without blocks."""
    if plan.block is None:
        return None
    if plan.scale_kind == "float32":
        return _float32_scale(x, plan)
    if plan.scale_kind == "minifloat":
        limit, _ = minifloat_range(plan)
        whole = _minifloat_block_scale(x, limit, scale, plan)
        return _four_over_six(x, whole, scale, plan) if plan.rule == "four_over_six" else whole
    return power_of_two(_e8m0_exponent(x, plan))


def _minifloat_block_scale(x: Tensor, limit: float, scale: Tensor | float, plan: Plan) -> Tensor:
    """amax at `limit` code units. A block scale that rounds to zero becomes 1: in an E4M3 scale |u| is under 6 * 2^-10
    there, which rounds to zero to nearest, and keeps its mean under stochastic rounding."""
    assert plan.scale_element is not None
    rounded = round_nearest(divide(amax(x), limit) / _nonzero(torch.as_tensor(scale)), plan.scale_element)
    return torch.where(rounded == 0, 1.0, rounded)


def _four_over_six(x: Tensor, six: Tensor, scale: Tensor | float, plan: Plan) -> Tensor:
    """amax at 6 or at 4 code units: the smaller squared error of rounding to nearest; a tie takes 6."""
    four = _minifloat_block_scale(x, 4.0, scale, plan)
    errors = []
    for blocks in (six, four):
        u = _in_code_units(x, scale, blocks, plan)
        difference = (round_nearest(u, plan.element) - u) * blocks
        errors.append(tree_sum(difference * difference))
    return torch.where(errors[1] < errors[0], four, six)


def finite_or_nan(scale: Tensor) -> Tensor:
    return torch.where(scale < float("inf"), scale, float("nan"))


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)


# ------------------------------------------------------------------------------------------------------------- rounding


def _minifloat_step(u: Tensor, element: Element) -> tuple[Tensor, Tensor]:
    """The distance of neighbouring codes around u, a power of two, and its reciprocal."""
    assert element.mantissa_bits is not None
    biased = biased_exponent(u.view(torch.int32)).clamp_min(element.min_exponent + 127) - element.mantissa_bits
    return (biased << 23).view(torch.float32), ((254 - biased) << 23).view(torch.float32)


def _on_grid(u: Tensor, element: Element) -> tuple[Tensor, Tensor | float, float]:
    """(v, step, offset): codes are (an integer next to v, + offset) * step. u beyond the grid saturates; NaN stays."""
    u = u.clamp(-element.max, element.max)
    if element.mantissa_bits is None:
        return u * (1.0 / element.step) - element.offset, element.step, element.offset
    step, inv_step = _minifloat_step(u, element)
    return u * inv_step, step, 0.0


def round_nearest(u: Tensor, element: Element) -> Tensor:
    """The nearest code; ties go to the even integer of the grid. Centred: round(u + 1/2) - 1/2, as QuEST writes it."""
    if element.offset:
        return torch.round(u.clamp(-element.max, element.max) + 0.5) - 0.5
    v, step, _ = _on_grid(u, element)
    return torch.round(v) * step


def round_stochastic(u: Tensor, element: Element, uniform: Tensor) -> Tensor:
    """One of the two neighbouring codes, the upper one with a probability equal to the distance from the lower
    (to 2^-24, the resolution of uniform, float32 in [0, 1)). Codes stay; u beyond the grid saturates."""
    v, step, offset = _on_grid(u, element)
    lower = torch.floor(v)
    code = lower + torch.ceil((v - lower) - uniform)  # up where uniform < v - lower; no bool, see `_mask`
    return (code + offset if offset else code) * step


# ----------------------------------------------------------------------------------------------------------- randomness


def mix(index: Tensor, key: Tensor) -> Tensor:
    """32 random bits (int32) per element: a multiply-xorshift finaliser of the index, keyed twice.

    index: int32; key: (2,) int32. One word enters before the first multiplication, one between the two: with the first
    alone, two keys would give one noise field in two orders. Wrapping int32 arithmetic; shifts are logical by masking.
    """
    h = index ^ key[0]
    h = (h ^ ((h >> 16) & 0xFFFF)) * 0x7FEB352D
    h = h ^ key[1]
    h = (h ^ ((h >> 15) & 0x1FFFF)) * -0x7B935975  # 0x846CA68B
    return h ^ ((h >> 16) & 0xFFFF)


def uniform(index: Tensor, key: Tensor) -> Tensor:
    """float32 multiples of 2^-24 in [0, 1)."""
    return ((mix(index, key) >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def element_index(x: Tensor) -> Tensor:
    """int32 position of each element in the operand as quantised, row-major with the contraction dim last (wraps)."""
    outer, block, inner = x.shape
    along = torch.arange(outer * block, dtype=torch.int32, device=x.device).view(outer, block, 1)
    across = torch.arange(inner, dtype=torch.int32, device=x.device) * (outer * block)
    return along + across


# --------------------------------------------------------------------------------------------------------------- encode


def encode(
    x: Tensor, scale: Tensor | float, key: Tensor | None, plan: Plan, rotation: Rotation | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Codes, block scales and the gradient's mask of one operand.

    x: (outer, span, inner), before the rotation; scale: its tensor_scale, () or (outer, 1, inner); key: (2,) int32 for
    stochastic rounding and EDEN.
    Returns codes float32 on the element's grid, (outer, span, inner); block_scale (outer * span / block, 1, inner) or
    None; mask uint8 (1 passes the gradient) or None. ValueError for a rule, rounding, mask or sparsity that is unknown.
    """
    KNOWS.check(plan)
    x = rotate(x, rotation)
    shape = x.shape
    if plan.rule == "mse_phase":
        x, scale = x / _nonzero(torch.as_tensor(scale)), 1.0
    if plan.block is not None:
        x = x.reshape(-1, plan.block, shape[2])
    blocks = block_scale(x, scale, plan)
    u = _in_code_units(x, scale, blocks, plan)
    if plan.rounding == "stochastic":
        assert key is not None
        codes = round_stochastic(u, plan.element, uniform(element_index(x), key))
    else:
        codes = round_nearest(u, plan.element)
    if plan.sparsity is not None:
        codes = codes * _largest(x, plan.sparsity)
    if plan.rounding == "eden":
        assert key is not None and blocks is not None
        blocks = _corrected(u, codes, blocks, key, plan)
    mask = None if plan.mask is None else _mask(u, codes, plan.mask).reshape(shape)
    return codes.reshape(shape), blocks, mask


def _corrected(u: Tensor, codes: Tensor, blocks: Tensor, key: Tensor, plan: Plan) -> Tensor:
    """EDEN: block scales times S = <x, x> / <x, q(x)>, rounded stochastically to the scale's grid. S is taken over
    `correction` elements, in code units as Quartet II's training code does; one whose codes are all zero is left."""
    assert plan.scale_element is not None and plan.block is not None and plan.correction is not None
    group = plan.correction // plan.block
    square, product = (tree_sum(tree_sum(u * other).reshape(-1, group, u.shape[2])) for other in (u, codes))
    correction = torch.where(product == 0, 1.0, square / _nonzero(product))
    correction = correction[:, None].expand(-1, group, -1, -1).reshape(blocks.shape)
    scales = blocks * correction
    return round_stochastic(scales, plan.scale_element, uniform(element_index(scales), key))


def _largest(x: Tensor, sparsity: str) -> Tensor:
    """float32 1 at what stays of every 4 (2:4) or of every 4 pairs (4:8) along dim 1: the two of largest magnitude, or
    of largest L2 norm; of equal ones the earlier."""
    pair = 2 if sparsity == "4:8" else 1
    outer, block, inner = x.shape
    groups = x.reshape(outer, block // (4 * pair), 4, pair, inner)
    size = groups.square().sum(3) if pair == 2 else groups[:, :, :, 0].abs()
    rank = torch.zeros_like(size)
    for other in range(4):
        rival = size[:, :, other : other + 1]
        earlier = (torch.arange(4, device=x.device) > other).view(1, 1, 4, 1)
        rank = rank + ((rival > size) | ((rival == size) & earlier)).to(size.dtype)
    keep = (rank < 2).to(x.dtype)[:, :, :, None].expand(groups.shape)
    return keep.reshape(x.shape)


def operand(
    x: Tensor,
    scale: Tensor | float,
    key: Tensor | None,
    plan: Plan,
    dtype: torch.dtype,
    rotation: Rotation | None = None,
    with_blocks: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What a GEMM takes, codes * block_scale; and block_scale and mask as of `encode`, whose arguments it has;
    with_blocks False: None for the block scales, which are then not written. The tensor scale is left to the GEMM's
    result. dtype must hold the product exactly: bfloat16 where
    plan.exact_in_bfloat16, else float32. int8, of integer codes without blocks: the codes as `stored_integer` says; a
    NaN, whose scale is NaN too, is any of them."""
    codes, blocks, mask = encode(x, scale, key, plan, rotation)
    if dtype == torch.int8:
        unit, offset = stored_integer(plan.element)
        return (codes * (1.0 / unit) - offset).to(torch.int8), blocks, mask
    if blocks is not None:
        codes = (codes.reshape(blocks.shape[0], plan.block or 1, x.shape[2]) * blocks).reshape(x.shape)
    return codes.to(dtype), blocks if with_blocks else None, mask


def fake_quantize_by(operand: Callable[..., tuple], unrotate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operation fake_quantize of a backend, out of two of its others."""

    def fake_quantize(
        x: Tensor,
        scale: Tensor | float,
        key: Tensor | None,
        plan: Plan,
        dtype: torch.dtype,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """x quantised, dequantised and rotated back, in dtype. Same arguments as `encode`."""
        values, _, _ = operand(x, scale, key, plan, torch.float32, rotation, with_blocks=False)
        return unrotate(values * scale, rotation, None, dtype)

    return fake_quantize


fake_quantize = fake_quantize_by(operand, unrotate)


def _in_code_units(x: Tensor, scale: Tensor | float, blocks: Tensor | None, plan: Plan) -> Tensor:
    if plan.scale_kind == "e8m0":
        assert blocks is not None
        numerator = x * HEADROOM if plan.rule == "floor_three_quarters" else x
        return numerator * _reciprocal(blocks)
    if plan.scale_kind == "float32" and blocks is not None:
        return x / _nonzero(blocks)
    divisor = _nonzero(torch.as_tensor(scale))
    return x / (divisor if blocks is None else divisor * blocks)


def _mask(u: Tensor, codes: Tensor, mask: Mask) -> Tensor:
    """uint8 0 or 1: a product with bool takes four times as long on CPU."""
    if mask.kind == "inside":
        passed = u.abs() < mask.limit
    elif mask.kind == "within":
        passed = u.abs() <= mask.limit
    else:
        passed = (codes - u).abs() <= mask.limit
    return passed.to(torch.uint8)


# -------------------------------------------------------------------------------------------------------------- packing


class Packed(NamedTuple):
    """An operand in the bits of its format, as it waits for the backward.

    codes: uint8, the elements in row-major order, `field_width` bits each, the first in a byte's low bits: sign,
    exponent and mantissa of a minifloat, the place among the levels of a uniform grid. scales: uint8, a block's E8M0 or
    minifloat scale each; None without blocks.
    """

    codes: Tensor
    scales: Tensor | None


def field_width(element: Element) -> int:
    """1, 2, 4 or 8 bits in which a code fits."""
    return 1 << (element.bits - 1).bit_length()


def can_pack(plan: Plan) -> bool:
    """Whether `unpack` gives back what `pack` takes, NaN included: not where codes of a finite scale may be NaN, where
    sparsity puts zeros into a grid that has none, nor under block scales of more than a byte, or without a one, which
    stands for a zero."""
    if plan.rule == "learned" or (plan.sparsity is not None and plan.element.offset):
        return False
    if plan.block is None or plan.scale_kind == "e8m0":
        return True
    return (
        plan.scale_element is not None
        and len(plan.scale_element.magnitudes()) < 256
        and 1.0 in plan.scale_element.magnitudes()
    )


def grids(plan: Plan) -> Plan:
    """The plan without what plays no part in packing."""
    rule = "floor" if plan.scale_kind == "e8m0" else "absmax"
    return replace(plan, rule=rule, rounding="nearest", mask=None, correction=None, sparsity=None)


def pack(values: Tensor, blocks: Tensor | None, plan: Plan) -> Packed:
    """values (rows, span, 1) and block scales as of `operand`, in any of its dtypes, of a plan that `can_pack`. A NaN
    without a scale of its own, whose tensor scale is NaN too, becomes any code; a zero of a uniform grid loses its
    sign."""
    element = plan.element
    if values.dtype == torch.int8:
        unit, offset = stored_integer(element)
        codes = (values.float() + offset) * unit
    elif blocks is None:
        codes = values.float()
    else:
        codes = values.float().reshape(blocks.shape[0], -1, 1) / blocks
    codes = torch.where(codes.isnan(), element.max, codes.clamp(-element.max, element.max)).reshape(-1)
    if element.mantissa_bits is None:
        fields = ((codes + element.max) * (1.0 / element.step)).to(torch.uint8)
    else:
        fields = _place(codes.abs(), element) | (codes.signbit().to(torch.uint8) << (element.bits - 1))
    return Packed(join(fields, field_width(element)), None if blocks is None else _scale_bytes(blocks.view(-1), plan))


def unpack(packed: Packed, shape: torch.Size, plan: Plan, dtype: torch.dtype) -> Tensor:
    """values in dtype, which is that of what was packed, or another that holds them."""
    element, device = plan.element, packed.codes.device
    fields = split(packed.codes, field_width(element), shape.numel())
    if element.mantissa_bits is None:
        codes = fields.float() * element.step - element.max
    else:
        sign = 1.0 - 2.0 * (fields >> (element.bits - 1)).float()
        codes = sign * _table(element, device)[(fields & (2 ** (element.bits - 1) - 1)).long()]
    if dtype == torch.int8:
        unit, offset = stored_integer(element)
        return (codes * (1.0 / unit) - offset).to(torch.int8).view(shape)
    if packed.scales is not None:
        codes = codes.view(packed.scales.numel(), -1) * _scales_of(packed.scales, plan)[:, None]
    return codes.to(dtype).view(shape)


def _scale_bytes(blocks: Tensor, plan: Plan) -> Tensor:
    """E8M0's biased exponent; of a minifloat the place among its magnitudes, NaN the one after the last."""
    if plan.scale_kind == "e8m0":
        return biased_exponent(blocks.view(torch.int32)).to(torch.uint8)
    assert plan.scale_element is not None
    nan = len(plan.scale_element.magnitudes())
    return torch.where(blocks.isnan(), nan, _place(blocks, plan.scale_element))


def _scales_of(scale_bytes: Tensor, plan: Plan) -> Tensor:
    if plan.scale_kind == "e8m0":
        return power_of_two(scale_bytes.to(torch.int32))
    assert plan.scale_element is not None
    return _table(plan.scale_element, scale_bytes.device)[scale_bytes.long()]


def _place(magnitudes: Tensor, element: Element) -> Tensor:
    """uint8, of each among a minifloat's magnitudes."""
    known = torch.tensor(element.magnitudes(), dtype=torch.float32, device=magnitudes.device)
    return torch.searchsorted(known, magnitudes).to(torch.uint8)


def _table(element: Element, device: torch.device) -> Tensor:
    """A minifloat's magnitudes by their place, NaN beyond."""
    known = element.magnitudes()
    return torch.tensor([*known, *[float("nan")] * (256 - len(known))], dtype=torch.float32, device=device)


def join(fields: Tensor, width: int) -> Tensor:
    """fields uint8 of `width` bits -> as many as fit in each byte, the first lowest, the last filled with zeros."""
    flat, count = fields.reshape(-1), 8 // width
    flat = torch.cat((flat, flat.new_zeros(-flat.numel() % count))).view(-1, count)
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=fields.device)
    return (flat << shifts).sum(1, dtype=torch.uint8)


def split(joined: Tensor, width: int, count: int) -> Tensor:
    """`join` undone: the first `count` fields."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=joined.device)
    return ((joined[:, None] >> shifts) & (2**width - 1)).view(-1)[:count]
