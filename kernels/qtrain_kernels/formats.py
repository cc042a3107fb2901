"""Number formats as data: the grid of the codes, the block that shares a scale, and the format of that scale.

A tensor in any of them is x ≈ codes * block_scale * tensor_scale. Blocks run along the contraction dim; a format
without a block has one float32 scale per row, which is then the tensor scale.

| names | codes | block | block scale | tensor scale |
|---|---|---|---|---|
| int1 ... int8 | k + 1/2: 2^b codes, none of them zero (QuEST, arXiv 2502.05003) | row | - | float32 per row |
| int1.585 | -1, 0, 1 | row | - | float32 per row |
| mxfp4, mxfp6_*, mxfp8_*, mxint8 | OCP Microscaling (MX) v1.0 | 32 | E8M0 | - |
| nvfp4 | E2M1 | 16 | E4M3 | float32 |
| fp<bits>_e<e>m<m> | any minifloat up to 8 bits | row | - | float32 per row |
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Literal

ScaleFormat = Literal["e8m0", "e4m3", "float32"]


@dataclass(frozen=True)
class Element:
    """The grid that codes lie on.

    A minifloat (mantissa_bits given): steps of 2^-mantissa_bits within each power of two from min_exponent up, and the
    step of min_exponent below it (subnormals). A uniform grid (mantissa_bits None): (k + offset) * step.
    max: the largest code; the smallest is -max.
    gaussian: the scale that minimises E|x - q(x)|^2 over N(0, 1), in RMS of the data (QuEST's a* per code unit).
    trust: QuEST's threshold of |codes - x / scale| above which no gradient passes, in code units.
    """

    max: float
    mantissa_bits: int | None = None
    min_exponent: int = 0
    step: float = 1.0
    offset: float = 0.0
    gaussian: float | None = None
    trust: float | None = None

    @property
    def max_exponent(self) -> int:
        """floor(log2(max)): emax of the E8M0 scale rules."""
        return math.frexp(self.max)[1] - 1

    @property
    def precision_bits(self) -> int:
        """Mantissa bits of codes near the largest one (mxint8: 6)."""
        if self.mantissa_bits is not None:
            return self.mantissa_bits
        return self.max_exponent - math.frexp(self.step)[1] + 1

    @cache  # noqa: B019  (frozen and few)
    def levels(self) -> tuple[float, ...]:
        """All codes, ascending."""
        if self.mantissa_bits is None:
            count = round((self.max - self.offset * self.step) / self.step)
            positive = [(k + self.offset) * self.step for k in range(count + 1)]
        else:
            fine = 2.0 ** (self.min_exponent - self.mantissa_bits)
            positive = [k * fine for k in range(2**self.mantissa_bits)]
            for exponent in range(self.min_exponent, self.max_exponent + 1):
                positive += [math.ldexp(1 + k / 2**self.mantissa_bits, exponent) for k in range(2**self.mantissa_bits)]
        return tuple(sorted({sign * code for code in positive if code <= self.max for sign in (-1.0, 1.0)}))

    @property
    def half_interval(self) -> float:
        """Half the largest distance between neighbouring codes."""
        levels = self.levels()
        return max(upper - lower for lower, upper in pairwise(levels)) / 2


@dataclass(frozen=True)
class Format:
    """An element grid, the block that shares a scale (None: a row), and the block scale's own format.

    tensor_scale: whether a float32 scale of the whole tensor stands beside the block scales.
    default_scale: the scale rule taken when none is named.
    """

    name: str
    element: Element
    block: int | None
    scale_format: ScaleFormat
    tensor_scale: bool
    default_scale: str


# Rule -> the scale formats that it can produce; reference.py computes them (e8m0: `_e8m0_exponent`; float32 scales of
# rows and tensors: `tensor_scale`; e4m3: `block_scale`).
SCALE_RULES: dict[str, tuple[ScaleFormat, ...]] = {
    "floor": ("e8m0",),
    "floor_three_quarters": ("e8m0",),
    "even": ("e8m0",),
    "rceil": ("e8m0",),
    "ceil": ("e8m0",),
    "round": ("e8m0",),
    "mse": ("e8m0",),
    "std": ("e8m0",),
    "gaussian": ("e8m0", "float32"),
    "absmax": ("e4m3", "float32"),
}


def _minifloat(exponent_bits: int, mantissa_bits: int, **fitted: float) -> Element:
    """All codes finite, as in OCP FP4 and FP6, but E4M3 (one code per sign is NaN) and E5M2 (IEEE infinities)."""
    bias = 2 ** (exponent_bits - 1) - 1
    top = 2**exponent_bits - 1 - bias
    largest = math.ldexp(2 - 2.0**-mantissa_bits, top)
    if (exponent_bits, mantissa_bits) == (4, 3):
        largest = 448.0
    if (exponent_bits, mantissa_bits) == (5, 2):
        largest = 57344.0
    return Element(largest, mantissa_bits=mantissa_bits, min_exponent=1 - bias, **fitted)


# Released Quartet/QuEST constants: the fit of E2M1 (largest code at 2.92248 RMS), and the trust threshold of the
# released FP4 code, 0.3186 RMS, which the published losses used; the paper's rule would be half_interval = 1 code unit.
E2M1_GAUSSIAN = 0.4870795
E2M1 = _minifloat(2, 1, gaussian=E2M1_GAUSSIAN, trust=0.3186 / E2M1_GAUSSIAN)
E2M3, E3M2, E4M3, E5M2 = _minifloat(2, 3), _minifloat(3, 2), _minifloat(4, 3), _minifloat(5, 2)
MX_E2M1 = _minifloat(2, 1, gaussian=E2M1_GAUSSIAN)  # no released trust threshold: the paper's

# a*(b): the released QuEST constants, clip range in RMS. tests/test_formats.py recomputes every optimum.
GAUSSIAN_CLIP = {
    1: 0.7978845587140913,
    2: 1.4935346200015913,
    3: 2.051068354131873,
    4: 2.513930578568423,
    5: 2.9160938834961225,
    6: 3.276597282593217,
    7: 3.6010497188221655,
    8: 3.884938678807525,
}


def _centred(bits: int) -> Element:
    largest = (2**bits - 1) / 2
    return Element(largest, offset=0.5, gaussian=GAUSSIAN_CLIP[bits] / largest)


def _mx(name: str, element: Element) -> Format:
    return Format(name, element, block=32, scale_format="e8m0", tensor_scale=False, default_scale="floor")


def _row(name: str, element: Element, default_scale: str) -> Format:
    return Format(name, element, block=None, scale_format="float32", tensor_scale=True, default_scale=default_scale)


FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        *(_row(f"int{bits}", _centred(bits), "gaussian") for bits in range(1, 9)),
        _row("int1.585", Element(1.0, gaussian=1.2240), "gaussian"),
        _mx("mxfp4", MX_E2M1),
        _mx("mxfp6_e3m2", E3M2),
        _mx("mxfp6_e2m3", E2M3),
        _mx("mxfp8_e4m3", E4M3),
        _mx("mxfp8_e5m2", E5M2),
        _mx("mxint8", Element(127 / 64, step=1 / 64)),
        Format("nvfp4", MX_E2M1, block=16, scale_format="e4m3", tensor_scale=True, default_scale="absmax"),
        _row("fp8_e4m3", E4M3, "absmax"),
        _row("fp8_e5m2", E5M2, "absmax"),
        _row("fp4_e2m1", E2M1, "absmax"),
    )
}


def get_format(name: str) -> Format:
    """A format by name; open minifloats as fp<bits>_e<e>m<m>, bits = 1 + e + m. ValueError names the nearest one."""
    if name in FORMATS:
        return FORMATS[name]
    match = re.fullmatch(r"fp(\d)_e(\d)m(\d)", name)
    if match:
        bits, exponent_bits, mantissa_bits = map(int, match.groups())
        if bits == 1 + exponent_bits + mantissa_bits <= 8 and exponent_bits >= 1 and mantissa_bits >= 1:
            return _row(name, _minifloat(exponent_bits, mantissa_bits), "absmax")
        raise ValueError(f"format {name!r}: bits must be 1 + e + m, at most 8, with e >= 1 and m >= 1 (fp6_e3m2)")
    near = difflib.get_close_matches(name, FORMATS, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown format {name!r}{hint}; formats: {', '.join(FORMATS)}, fp<bits>_e<e>m<m>")


def check_scale(fmt: Format, rule: str | None) -> str:
    """The scale rule in force (rule, or the format's default). ValueError where the format has no such scale."""
    if rule is None:
        return fmt.default_scale
    if rule not in SCALE_RULES:
        near = difflib.get_close_matches(rule, SCALE_RULES, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown scale rule {rule!r}{hint}; rules: {', '.join(SCALE_RULES)}")
    fits = [name for name, formats in SCALE_RULES.items() if fmt.scale_format in formats]
    if rule not in fits:
        raise ValueError(f"scale {rule!r} does not give {fmt.name}'s {fmt.scale_format} scales; use {', '.join(fits)}")
    if rule == "gaussian" and fmt.element.gaussian is None:
        others = [name for name in fits if name != "gaussian"]
        raise ValueError(f"scale 'gaussian': no Gaussian fit is known for {fmt.name}; use {', '.join(others)}")
    if rule == "std" and fmt.element.gaussian is None:
        raise ValueError(f"scale 'std' is defined for E2M1 codes (mxfp4), not for {fmt.name}; use {fmt.default_scale}")
    return rule
