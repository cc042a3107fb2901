"""What a quantiser is asked to do, as data: plans, scale rules, roundings, masks, rotations; and what a backend can do.

`SCALE_RULES` and `ROUNDINGS` are tables of records. A backend reads the records and never the names, so a rule that is
made of known statistics and kinds of scale is one row here. What a backend lacks, it refuses by name (`Knows`).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from qtrain_kernels.formats import ELEMENTS, FLOAT_SCALES, Element, Format, ScaleKind

if TYPE_CHECKING:
    from torch import Tensor

Statistic = Literal["amax", "rms", "std", "absmean", "rms_absmean", "range"]
RoundingName = Literal["nearest", "stochastic", "eden"]

# --------------------------------------------------------------------------------------------------------------- scales


@dataclass(frozen=True)
class ScaleRule:
    """How a scale follows from the elements that share it, with all numbers resolved for their format.

    The magnitude of a block, row or tensor is gain * statistic + bias. Its scale is magnitude / divisor, and each kind
    of scale rounds it in its own way:
    - float32: not at all. Infinity becomes NaN.
    - float16, bfloat16: to nearest, ties to even; codes are relative to the rounded scale. What is beyond the largest
      becomes NaN, as infinity does. What rounds to zero stays zero, and so do all values of the block.
    - minifloat: divided by the tensor scale, to nearest on the scale's grid. Zero becomes 1.
    - e8m0: `increment` is added to the bits of magnitude / divisor as float32; of the result, the power of two at or
      below it is taken, times 2^-shift.

    statistic: amax, rms, std (about the block's own mean, of the population), absmean (the mean magnitude),
        rms_absmean, which is gain * rms - less * absmean, and amax where that is not positive, or range, the largest
        value less the smallest, zero counted in. With a range the smallest value has level 0 but for rounding: the zero
        point is -smallest / scale, rounded to nearest and kept on the grid.
    candidates: factors. The scale times each of them is tried too. The scale of least squared error of rounding to
        nearest is taken, of equal ones the earlier. Factors of an e8m0 scale are powers of two.
    headroom: x * headroom is rounded, and the tensor scale is 1 / headroom.
    outer: the rule of a float32 scale above the blocks: of the tensor above minifloat scales; above all others of each
        row, by which x is divided before anything else.
    given: the scale is a parameter and no function of x (LSQ).
    of_lines: only for one scale per row or tensor. fitted_to: the element whose codes the numbers are fitted to.
    """

    statistic: Statistic = "amax"
    gain: float = 1.0
    bias: float = 0.0
    less: float = 0.0
    divisor: float = 1.0
    increment: int = 0
    shift: int = 0
    candidates: tuple[float, ...] = ()
    headroom: float = 1.0
    outer: ScaleRule | None = None
    given: bool = False
    of_lines: bool = False
    fitted_to: str | None = None

    @property
    def divisors(self) -> tuple[float, ...]:
        """What the magnitude is divided by for the scale itself and for each candidate."""
        return tuple(self.divisor / factor for factor in (1.0, *self.candidates))

    @property
    def steps(self) -> tuple[int, ...]:
        """What is added to the exponent of an e8m0 scale for itself and for each candidate. ValueError for a factor
        that is no power of two."""
        parts = [math.frexp(factor) for factor in (1.0, *self.candidates)]
        if any(mantissa != 0.5 for mantissa, _ in parts):
            raise ValueError(f"candidates of an e8m0 scale are powers of two; got {self.candidates}")
        return tuple(exponent - 1 for _, exponent in parts)


Row = Callable[[Element, Any], ScaleRule]  # of the grids of codes and of minifloat scales

STD_EPS = 1e-8
ABSMEAN_EPS = 1e-5  # TriLM's
FITTED_LIMIT = 6.0 * (16 / 17) / 0.93  # Quartet II: where amax lies on the grid, for the least error on N(0, 1)
REDUCED_CAP = 256.0  # Quartet II: the largest block scale, with room for EDEN's correction or for 6 / 4 of it
BEST_PHASE = 1.1637  # RMS of a row, in powers of two, at which `mse` has its least error on N(0, 1)
CARRY = 0x7FFFFF  # added to a float32's bits, makes any mantissa but 1.0 carry into the exponent
CARRY_ABOVE_SQRT2 = 0x800000 - 0x3504F4  # makes mantissas above sqrt(2), the float32 1.41421354 = 0x3FB504F3, carry
NEIGHBOURS = (0.5, 2.0)  # of a power of two


def _fit(element: Element) -> float:
    """The element's Gaussian scale in RMS of the data. ValueError where none is known."""
    if element.gaussian is None:
        raise ValueError("needs a Gaussian fit, which is not known for the codes")
    return element.gaussian


def _half_a_unit(element: Element) -> int:
    """Of the element's last mantissa bit, in the bits of a float32."""
    return 1 << (22 - element.precision_bits)


def _two_levels(limit: float, largest: float, **rest: Any) -> ScaleRule:
    """amax of a block becomes `limit` in code units; the largest block scale of the tensor becomes `largest`."""
    return ScaleRule(divisor=limit, outer=ScaleRule(divisor=limit * largest), **rest)


def _reduced(scale: Element) -> float:
    """REDUCED_CAP of E4M3, whose largest is 448, and as much of a shorter range."""
    return min(REDUCED_CAP, scale.max * REDUCED_CAP / 448)


def _of_floats(row: Row) -> dict[ScaleKind, Row]:
    """The same rule for each of FLOAT_SCALES."""
    return dict.fromkeys(FLOAT_SCALES, row)


# Name -> kind of scale -> rule. kernels/README.md says what each is for, and its error.
SCALE_RULES: dict[str, dict[ScaleKind, Row]] = {
    "floor": {"e8m0": lambda e, _: ScaleRule(shift=e.max_exponent)},
    # Quartet's backward: amax < 8 * 2^e, so 3/4 of it stays within 6 * 2^e
    "floor_three_quarters": {"e8m0": lambda e, _: ScaleRule(shift=e.max_exponent, headroom=0.75)},
    "even": {"e8m0": lambda e, _: ScaleRule(increment=_half_a_unit(e), shift=e.max_exponent)},
    "rceil": {"e8m0": lambda e, _: ScaleRule(increment=CARRY, divisor=e.max)},
    "ceil": {"e8m0": lambda e, _: ScaleRule(increment=CARRY, shift=e.max_exponent)},
    "round": {"e8m0": lambda e, _: ScaleRule(increment=CARRY_ABOVE_SQRT2, divisor=e.max)},
    "std": {"e8m0": lambda e, _: ScaleRule("std", _fit(e), STD_EPS)},
    "std_round": {"e8m0": lambda e, _: ScaleRule("std", _fit(e), STD_EPS, increment=CARRY_ABOVE_SQRT2)},
    "mse": {"e8m0": lambda e, _: ScaleRule(shift=e.max_exponent, candidates=NEIGHBOURS)},
    "mse_phase": {
        "e8m0": lambda e, _: ScaleRule(
            shift=e.max_exponent, candidates=NEIGHBOURS, outer=ScaleRule("rms", 1.0 / BEST_PHASE), fitted_to="e2m1"
        )
    },
    "gaussian": {
        "e8m0": lambda e, _: ScaleRule("rms", _fit(e)),
        **_of_floats(lambda e, _: ScaleRule("rms", _fit(e))),
    },
    "absmax": {
        "minifloat": lambda e, scale: _two_levels(e.max, scale.max),
        **_of_floats(lambda e, _: ScaleRule(divisor=e.max)),
    },
    # a scale rounded down by its last half bit still clips nothing
    "absmax_headroom": {
        "minifloat": lambda e, scale: _two_levels(e.max / (1.0 + 2.0 ** -(scale.precision_bits + 1)), scale.max)
    },
    "absmax_fitted": {"minifloat": lambda _, scale: _two_levels(FITTED_LIMIT, _reduced(scale), fitted_to="e2m1")},
    "four_over_six": {
        "minifloat": lambda e, scale: _two_levels(e.max, _reduced(scale), candidates=(6 / 4,), fitted_to="e2m1")
    },
    # the range of a block over all levels but one: the scales that lie beside a zero point
    "minmax": dict.fromkeys(("float16", "bfloat16"), lambda e, _: ScaleRule("range", divisor=e.max)),
    "absmean": {"float32": lambda *_: ScaleRule("absmean", bias=ABSMEAN_EPS, of_lines=True)},
    "sawb": {
        "float32": lambda e, _: ScaleRule(
            "rms_absmean", 12.68, less=12.80, divisor=e.max, of_lines=True, fitted_to="int4_sym"
        )
    },
    "learned": {"float32": lambda *_: ScaleRule(given=True)},
}


def check_scale(fmt: Format, rule: str | None) -> str:
    """The scale rule in force (rule, or the format's default). ValueError where the format has no such scale."""
    if rule is None:
        return fmt.default_scale
    if rule not in SCALE_RULES:
        near = difflib.get_close_matches(rule, SCALE_RULES, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown scale rule {rule!r}{hint}; rules: {', '.join(SCALE_RULES)}")
    fits = [name for name in SCALE_RULES if not _misfit(fmt, name)]
    reason = _misfit(fmt, rule)
    if reason:
        raise ValueError(f"scale {rule!r} {reason}; for {fmt.name} use {', '.join(fits)}")
    return rule


def _misfit(fmt: Format, name: str) -> str | None:
    """Why a format cannot have its scale by this rule; None if it can."""
    row = SCALE_RULES[name].get(fmt.scale_kind)
    if row is None:
        return f"does not give {fmt.name}'s {fmt.scale} scales"
    try:
        rule = row(fmt.element, fmt.scale_element)
    except ValueError as error:
        return str(error)
    if (rule.statistic == "range") != fmt.element.zero_point:
        return "needs codes without a zero point" if fmt.element.zero_point else "needs codes with a zero point"
    if rule.fitted_to and fmt.element.levels() != ELEMENTS[rule.fitted_to].levels():
        return f"is fitted to {rule.fitted_to} codes"
    if not _has_place(rule, fmt.block_size):
        return "is one scale per row or tensor" if rule.of_lines else "compares scales of a block"
    if fmt.rows > 1 and rule.given:
        return "is a parameter for each tensor, row or group of a row, not for tiles of rows"
    spread = rule.statistic != "amax" or (rule.outer is not None and fmt.scale_kind != "minifloat")
    if fmt.rows > 1 and spread:
        return "looks at whole rows or at a block's spread, which zeros at a tile's edge would change"
    if rule.bias and fmt.element.offset:
        return "needs codes with a zero"
    if rule.headroom < 1.0 and fmt.element.max < rule.headroom * 2.0 ** (fmt.element.max_exponent + 1):
        return f"leaves {rule.headroom} of the next power of two, which is beyond these codes"
    return None


def _has_place(rule: ScaleRule, block: int | None) -> bool:
    """Whether blocks (of this size) or whole lines (None) can have their scale by the rule."""
    return not rule.candidates if block is None else not rule.of_lines


# ------------------------------------------------------------------------------------------------------------- rounding


@dataclass(frozen=True)
class Rounding:
    """codes: how codes are rounded, by the name of the function that backends have for it. noisy: that it takes random
    numbers, one for each code. corrects: whether block scales are corrected afterwards, with random numbers of their
    own (EDEN)."""

    codes: str
    noisy: bool = False
    corrects: bool = False

    @property
    def draws(self) -> bool:
        """Whether random bits are drawn, for which there must be a key."""
        return self.noisy or self.corrects


ROUNDINGS: dict[str, Rounding] = {
    "nearest": Rounding("nearest"),  # ties to even
    "stochastic": Rounding("stochastic", noisy=True),
    "eden": Rounding("nearest", corrects=True),
}

# ---------------------------------------------------------------------------------------------------------------- plans


@dataclass(frozen=True)
class Mask:
    """Which elements pass a gradient. inside: |u| < limit; within: |u| <= limit; error: |codes - u| <= limit, where
    u = x / (block_scale * tensor_scale). A zero row passes all of its gradient in each of them."""

    kind: Literal["inside", "within", "error"]
    limit: float


@dataclass(frozen=True)
class Plan:
    """What an operand's quantiser does after rotation.

    scale_kind: e8m0 | minifloat (scale_element is its grid) | float32 | float16 | bfloat16.
    block: elements that share a block scale, None for one float32 scale per row, or per tensor where per_tensor.
    rule: a name of SCALE_RULES. rounding: a name of ROUNDINGS. mask: None where no gradient asks. correction: elements
    that share an EDEN correction, a multiple of block. sparsity: 2:4 or 4:8 by magnitude before rounding.
    """

    element: Element
    scale_kind: ScaleKind
    block: int | None
    rule: str
    rounding: RoundingName = "nearest"
    mask: Mask | None = None
    scale_element: Element | None = None
    per_tensor: bool = False
    correction: int | None = None
    sparsity: Literal["2:4", "4:8"] | None = None

    def __post_init__(self) -> None:
        row = SCALE_RULES.get(self.rule, {}).get(self.scale_kind)
        rule = row and row(self.element, self.scale_element)
        # kept, since every call of an operation asks for it; no cached_property, which torch.compile cannot trace
        object.__setattr__(self, "_scale_rule", rule if rule and _has_place(rule, self.block) else None)
        fields = (self.element, self.scale_kind, self.block, self.rule, self.rounding, self.mask, self.scale_element)
        object.__setattr__(self, "_hash", hash((*fields, self.per_tensor, self.correction, self.sparsity)))

    def __hash__(self) -> int:
        return self._hash  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def scale_rule(self) -> ScaleRule:
        """The record of `rule`. ValueError where there is none for this kind of scale."""
        rule: ScaleRule | None = self._scale_rule  # pyright: ignore[reportAttributeAccessIssue]
        if rule is None:
            place = "line" if self.block is None else self.scale_kind
            names = ", ".join(name for name, kinds in SCALE_RULES.items() if self.scale_kind in kinds)
            raise ValueError(f"there is no scale rule ({place}) {self.rule!r}; {self.scale_kind} scales have {names}")
        return rule

    @property
    def rounding_mode(self) -> Rounding:
        """The record of `rounding`. ValueError where there is none."""
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"there is no rounding {self.rounding!r}; use {', '.join(ROUNDINGS)}")
        return ROUNDINGS[self.rounding]

    @property
    def has_float_scales(self) -> bool:
        """Whether scales are floats, with none above those of the blocks."""
        return self.scale_kind in FLOAT_SCALES

    @property
    def span(self) -> int | None:
        """The size of dim 1; None: the whole contraction dim."""
        return self.correction or self.block

    @property
    def whole(self) -> bool:
        """Whether the tensor scale is one number; else there is one for each row."""
        return self.per_tensor or self.scale_kind == "minifloat"

    @property
    def divides_first(self) -> bool:
        """Whether x is divided by its tensor scale before all else; minifloat scales are multiplied with it instead."""
        return self.scale_rule.outer is not None and self.scale_kind != "minifloat"

    @property
    def line_rule(self) -> ScaleRule | None:
        """The rule of the tensor scale; None where that is a constant."""
        return self.scale_rule if self.block is None else self.scale_rule.outer

    @property
    def exact_in_bfloat16(self) -> bool:
        """Whether codes * block_scale have at most bfloat16's 8 significant bits."""
        if self.block is not None and self.has_float_scales:
            return False
        scale_bits = self.scale_element.significant_bits if self.scale_element else 0
        return self.element.significant_bits + scale_bits <= 8


@dataclass(frozen=True)
class Knows:
    """What a backend computes. statistics: of scale rules, where `range` brings zero points; scales: kinds of them;
    roundings: of codes; tables: whether codes may be those of a table (nf4)."""

    backend: str
    statistics: tuple[str, ...]
    scales: tuple[str, ...]
    roundings: tuple[str, ...]
    masks: tuple[str, ...]
    sparsities: tuple[str, ...]
    tables: bool = False

    def lacks(self, plan: Plan) -> str | None:
        """What a plan asks for beyond that, with the remedy; None if nothing."""
        rule = plan.scale_rule
        asked = (
            ("statistic", None if rule.given else rule.statistic, self.statistics),
            ("statistic", rule.outer and rule.outer.statistic, self.statistics),
            ("kind of scale", plan.scale_kind, self.scales),
            ("rounding", plan.rounding_mode.codes, self.roundings),
            ("mask", plan.mask and plan.mask.kind, self.masks),
            ("sparsity", plan.sparsity, self.sparsities),
        )
        if plan.element.table is not None and not self.tables:
            return f"backend {self.backend!r} knows no codes of a table (nf4); use backend 'reference' or 'auto'"
        for what, name, known in asked:
            if name is not None and name not in known:
                return (
                    f"backend {self.backend!r} knows no {what} {name!r}; it knows {', '.join(known)}; use one of them, "
                    "or a backend that knows it"
                )
        return None

    def check(self, plan: Plan) -> None:
        """ValueError for a plan of which it lacks something, and for one that no backend has."""
        reason = self.lacks(plan)
        if reason:
            raise ValueError(reason)
        if plan.scale_rule.given and plan.block is not None:
            raise ValueError(
                f"scale rule ({plan.scale_kind}) {plan.rule!r} gives each block its scale: quantise each block as a "
                "row of a matrix of its own, as qtensor.quantize does"
            )
        if plan.element.table is not None and plan.rounding != "nearest":
            raise ValueError(f"codes of a table (nf4) are rounded to nearest; got {plan.rounding}")
        if plan.element.zero_point and (plan.rounding != "nearest" or plan.mask or plan.sparsity):
            raise ValueError(
                f"codes with a zero point are rounded to nearest, without mask and sparsity; got {plan.rounding}, "
                f"{plan.mask}, {plan.sparsity}"
            )


@dataclass(frozen=True, eq=False)
class Rotation:
    """x -> x D H in blocks of `size` along dim 1: random signs D, then H / sqrt(size), H a Hadamard matrix.

    signs: (size,) float32 of ±1; or a key, (2,) int32, that draws them as `reference.random_signs` does; or None. H is
    Sylvester's of order 2^k; base, (m, m) float32 of ±1 with size = 2^k m, makes it Sylvester's times base.
    """

    size: int
    signs: Tensor | None = None
    base: Tensor | None = None


# -------------------------------------------------------------------------------------------------------------- packing


class Packed(NamedTuple):
    """An operand in the bits of its format, as it waits for the backward.

    codes: uint8, the elements in row-major order, `field_width` bits each, the first in a byte's low bits: sign,
    exponent and mantissa of a minifloat, else the place among the levels. scales: a block's scale each, uint8 of E8M0
    and of minifloats, else floats as they are; None without blocks. zero_points: a block's each, uint8; None where
    the element has none.
    """

    codes: Tensor
    scales: Tensor | None
    zero_points: Tensor | None = None


def stored_integer(element: Element) -> tuple[float, float]:
    """(unit, offset): an int8 q stands for the code (q + offset) * unit of an integer grid. Half-integer codes of up to
    7 bits are stored doubled, as odd integers (unit 1/2). Those of 8 bits would overflow, and are stored less 1/2
    (offset 1/2)."""
    if not element.offset:
        return element.step, 0.0
    return (0.5, 0.0) if 2 * element.max <= 127 else (1.0, element.offset)


def field_width(element: Element) -> int:
    """1, 2, 4 or 8 bits in which a code fits."""
    return 1 << (element.bits - 1).bit_length()


def scale_nan(plan: Plan) -> int:
    """The bits of a packed block scale that is NaN: E8M0's last, of a minifloat those after its largest, and the quiet
    NaN of float16."""
    if plan.scale_kind == "float16":
        return 0x7E00
    return len(plan.scale_element.magnitudes()) if plan.scale_element else 0xFF


def can_pack(plan: Plan) -> bool:
    """Whether `unpack` gives back what `pack` takes, NaN included, but where the scale is given: that stays finite
    beside a NaN code, which has no bits. It does not where
    - sparsity puts zeros into a grid that has none;
    - block scales are float32, but given, or of codes of a table: no kernel that finds such scales packs them;
    - a minifloat of block scales needs more than 8 bits, or lacks 1.0, which stands for scales that round to zero."""
    if plan.sparsity is not None and plan.element.offset:
        return False
    if plan.block is None or plan.scale_kind in ("e8m0", "float16", "bfloat16"):
        return True
    if plan.scale_kind == "float32":
        return plan.scale_rule.given or plan.element.table is not None
    return (
        plan.scale_element is not None
        and len(plan.scale_element.magnitudes()) < 256
        and 1.0 in plan.scale_element.magnitudes()
    )


@cache
def grids(plan: Plan) -> Plan:
    """The plan without what plays no part in packing, so that plans that differ in it share one compiled kernel."""
    rule = "floor" if plan.scale_kind == "e8m0" else "absmax"
    return replace(plan, rule=rule, rounding="nearest", mask=None, correction=None, sparsity=None)
