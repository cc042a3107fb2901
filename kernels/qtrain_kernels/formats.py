"""Number formats as data: the grid of the codes, the elements that share a scale, and the format of that scale.

A tensor in any of them is x ≈ codes * block_scale * tensor_scale, with blocks along the contraction dim. A format is
written element/block/scale, and the usual ones have names:

| names | written | codes | tensor scale |
|---|---|---|---|
| int1 ... int8 | int4/row/float32 | k + 1/2: 2^b codes, none of them zero (QuEST, arXiv 2502.05003) | float32 per row |
| int2_sym ... int8_sym | int4_sym/row/float32 | integers up to ±(2^(b-1) - 1) (HALO, LUQ) | float32 per row |
| - | int4_asym/128/bfloat16 | integers from -z to 2^b - 1 - z, a zero point z for each block | - |
| int1.585 | int1.585/row/float32 | -1, 0, 1 | float32 per row |
| mxfp4, mxfp6_*, mxfp8_* | e2m1/32/e8m0 | OCP Microscaling (MX) v1.0 | - |
| mxint8 | mxint8/32/e8m0 | k / 64, OCP MX v1.0 | - |
| nvfp4 | e2m1/16/e4m3 | E2M1 | float32 |
| nf4 | nf4/64/float32 | 16 quantiles of N(0, 1) between -1 and 1 (QLoRA, arXiv 2305.14314) | - |
| fp<bits>_e<e>m<m> | e4m3/row/float32 | any minifloat up to 8 bits | float32 per row |

element: e<e>m<m>, int<b>, int<b>_sym, int<b>_asym, int1.585, mxint8 or nf4. block: tensor or row (one float32 scale
each), a number of elements (32), or a tile of rows x elements (16x16). scale: e8m0 (powers of two), an unsigned
minifloat under a float32 scale of the whole tensor (e4m3, ue5m3), or float32, float16 or bfloat16, with no scale above
them.

int<b>_asym, of b = 2 to 8 bits, has levels 0 to 2^b - 1. Each block has a zero point z, an integer of b bits, beside
its float16 or bfloat16 scale: x ≈ (level - z) * scale, so codes are level - z. Sources: GPTQ, arXiv 2210.17323; AWQ,
arXiv 2306.00978; compressed-tensors' symmetric: false.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Literal

ScaleKind = Literal["e8m0", "minifloat", "float32", "float16", "bfloat16"]
FLOAT_SCALES: tuple[ScaleKind, ...] = ("float32", "float16", "bfloat16")  # which have no scale above them


@dataclass(frozen=True)
class Element:
    """The grid that codes lie on.

    A minifloat (mantissa_bits given): steps of 2^-mantissa_bits within each power of two from min_exponent up, and the
    step of min_exponent below it (subnormals). A table: the codes themselves, ascending. A uniform grid (neither of the
    two): (k + offset) * step.
    max: the largest level. min: the smallest, -max, or 0 where blocks have a zero point. A code is a level, less the
    zero point of its block where there is one.
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
    table: tuple[float, ...] | None = None
    zero_point: bool = False

    @property
    def min(self) -> float:
        """The smallest level."""
        return 0.0 if self.zero_point else -self.max

    @property
    def uniform(self) -> bool:
        """Whether the codes are equally far apart."""
        return self.mantissa_bits is None and self.table is None

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

    @property
    def significant_bits(self) -> int:
        """Of the code that needs most: bfloat16 holds 8. Centred codes are odd multiples of half a step."""
        if self.table is not None:
            return 24
        return self.precision_bits + (2 if self.offset else 1)

    @cache  # noqa: B019  (frozen and few)
    def levels(self) -> tuple[float, ...]:
        """All levels, ascending."""
        if self.table is not None:
            return self.table
        if self.zero_point:
            return tuple(float(level) for level in range(int(self.max) + 1))
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
    def bits(self) -> int:
        """Of a code: sign, exponent and mantissa of a minifloat; else the place among the levels."""
        if self.mantissa_bits is None:
            return (len(self.levels()) - 1).bit_length()
        return (self.max_exponent - self.min_exponent + 1).bit_length() + self.mantissa_bits + 1

    @cache  # noqa: B019
    def magnitudes(self) -> tuple[float, ...]:
        """The codes of a minifloat from zero up: each in the place that its bits without the sign spell."""
        return tuple(abs(code) for code in self.levels() if code >= 0)

    @property
    def half_interval(self) -> float:
        """Half the largest distance between neighbouring codes."""
        levels = self.levels()
        return max(upper - lower for lower, upper in pairwise(levels)) / 2


@dataclass(frozen=True)
class Format:
    """An element grid, what shares a scale, and that scale's own format.

    block: "tensor" or "row", or the elements along the contraction dim; rows: how many neighbouring rows share it too.
    scale: "e8m0", one of FLOAT_SCALES or the name of an unsigned minifloat. default_scale: the rule of
    plans.SCALE_RULES that is taken when none is named.
    """

    name: str
    element: Element
    block: int | str
    rows: int
    scale: str
    default_scale: str

    @property
    def scale_kind(self) -> ScaleKind:
        """e8m0 | float32 | float16 | bfloat16 | minifloat."""
        return _scale_kind(self.scale)

    @property
    def scale_element(self) -> Element | None:
        """The grid of a minifloat scale."""
        return _scale_element(self.scale) if self.scale_kind == "minifloat" else None

    @property
    def block_size(self) -> int | None:
        """Elements under one block scale; None for one scale per row or tensor."""
        return None if isinstance(self.block, str) else self.block * self.rows


def _minifloat(exponent_bits: int, mantissa_bits: int, **fitted: Any) -> Element:
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
# released FP4 code, 0.31857661 RMS, which the published losses used; the paper's rule would be half_interval, 1.
E2M1_GAUSSIAN = 0.4870795
E2M1 = _minifloat(2, 1, gaussian=E2M1_GAUSSIAN, trust=0.31857661 / E2M1_GAUSSIAN)
E4M3, E5M2 = _minifloat(4, 3), _minifloat(5, 2)
MX_E2M1 = _minifloat(2, 1, gaussian=E2M1_GAUSSIAN)  # no released trust threshold: the paper's
MXINT8 = Element(127 / 64, step=1 / 64)

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
TERNARY = Element(1.0, gaussian=1.2240089519030855)
# QLoRA's released table, float32: quantiles of N(0, 1), of which 0.9677083 lies below the largest, over that largest.
NF4 = Element(
    1.0,
    table=(
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
)  # fmt: skip


def _centred(bits: int) -> Element:
    largest = (2**bits - 1) / 2
    return Element(largest, offset=0.5, gaussian=GAUSSIAN_CLIP[bits] / largest)


def _symmetric(bits: int) -> Element:
    return Element(2.0 ** (bits - 1) - 1)


def _asymmetric(bits: int) -> Element:
    return Element(2.0**bits - 1, zero_point=True)


ELEMENTS: dict[str, Element] = {
    **{f"int{bits}": _centred(bits) for bits in range(1, 9)},
    **{f"int{bits}_sym": _symmetric(bits) for bits in range(2, 9)},
    **{f"int{bits}_asym": _asymmetric(bits) for bits in range(2, 9)},
    "int1.585": TERNARY,
    "mxint8": MXINT8,
    "e2m1": MX_E2M1,
    "nf4": NF4,
}


def _element(name: str) -> Element:
    if name in ELEMENTS:
        return ELEMENTS[name]
    match = re.fullmatch(r"e(\d)m(\d)", name)
    if match is None:
        raise ValueError(f"unknown element {name!r}; elements: e<e>m<m> (e4m3), {', '.join(ELEMENTS)}")
    exponent_bits, mantissa_bits = map(int, match.groups())
    if not 1 <= exponent_bits <= 5 or exponent_bits + mantissa_bits > 7:
        raise ValueError(f"element {name!r}: e must be 1 to 5, and 1 + e + m at most 8")
    return _minifloat(exponent_bits, mantissa_bits)


@cache
def _scale_element(name: str) -> Element:
    """Unsigned minifloats: e4m3 (448), ue5m3 (one code is NaN: 114688), others with all codes finite."""
    match = re.fullmatch(r"u?e(\d)m(\d)", name)
    if match is None or not 1 <= int(match[1]) <= 5 or int(match[1]) + int(match[2]) > 8:
        raise ValueError(
            f"unknown scale format {name!r}; use e8m0, {', '.join(FLOAT_SCALES)}, e4m3, ue5m3 or another e<e>m<m>"
        )
    if (int(match[1]), int(match[2])) == (5, 3):
        return Element(114688.0, mantissa_bits=3, min_exponent=-14)
    return _minifloat(int(match[1]), int(match[2]))


def _scale_kind(scale: str) -> ScaleKind:
    """Of the name of a scale's format."""
    kinds: dict[str, ScaleKind] = {"e8m0": "e8m0", **{kind: kind for kind in FLOAT_SCALES}}
    return kinds.get(scale, "minifloat")


def _open_format(name: str) -> Format:
    """element/block/scale, taken apart. ValueError says which part is wrong."""
    parts = name.split("/")
    if len(parts) != 3:
        raise ValueError(f"format {name!r}: an open format has three parts, element/block/scale (e2m1/16x16/e4m3)")
    element, block, scale = parts
    tile = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", block)
    if block not in ("row", "tensor") and tile is None:
        raise ValueError(f"format {name!r}: block {block!r} is none of tensor, row, <n> (32), <rows>x<n> (16x16)")
    kind = _scale_kind(scale)
    if kind == "minifloat":
        _scale_element(scale)
    if tile is None and kind != "float32":
        raise ValueError(f"format {name!r}: one scale per {block} is a float32; got {scale!r}")
    rows, size = (int(tile[1] or 1), int(tile[2])) if tile else (1, block)
    grid = _element(element)
    if grid.offset and kind not in FLOAT_SCALES:
        raise ValueError(f"format {name!r}: {element} has no zero and {scale} neither, so zeros would not stay zeros")
    if grid.zero_point and (kind not in ("float16", "bfloat16") or rows > 1):
        raise ValueError(
            f"format {name!r}: a zero point lies beside a float16 or bfloat16 scale of one row's block; write "
            f"{element}/128/bfloat16"
        )
    of_floats = "minmax" if grid.zero_point else "gaussian" if grid.offset else "absmax"
    default = {"e8m0": "floor", "minifloat": "absmax"}.get(kind, of_floats)
    return Format(name, grid, size, rows, scale, default)


def _named(name: str, written: str, element: Element | None = None, default_scale: str | None = None) -> Format:
    fmt = _open_format(written)
    return Format(name, element or fmt.element, fmt.block, fmt.rows, fmt.scale, default_scale or fmt.default_scale)


FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        *(_named(f"int{bits}", f"int{bits}/row/float32") for bits in range(1, 9)),
        *(_named(f"int{bits}_sym", f"int{bits}_sym/row/float32") for bits in range(2, 9)),
        _named("int1.585", "int1.585/row/float32", default_scale="gaussian"),
        _named("mxfp4", "e2m1/32/e8m0"),
        _named("mxfp6_e3m2", "e3m2/32/e8m0"),
        _named("mxfp6_e2m3", "e2m3/32/e8m0"),
        _named("mxfp8_e4m3", "e4m3/32/e8m0"),
        _named("mxfp8_e5m2", "e5m2/32/e8m0"),
        _named("mxint8", "mxint8/32/e8m0"),
        _named("nvfp4", "e2m1/16/e4m3"),
        _named("nf4", "nf4/64/float32"),
        _named("fp8_e4m3", "e4m3/row/float32"),
        _named("fp8_e5m2", "e5m2/row/float32"),
        _named("fp4_e2m1", "e2m1/row/float32", element=E2M1),
    )
}


@cache
def get_format(name: str) -> Format:
    """A format by name, as element/block/scale, or fp<bits>_e<e>m<m> (bits = 1 + e + m, one float32 scale per row).
    ValueError names the nearest ones of the same precision, or the part that is wrong."""
    if name in FORMATS:
        return FORMATS[name]
    if "/" in name:
        return _open_format(name)
    match = re.fullmatch(r"fp(\d)_(e(\d)m(\d))", name)
    if match:
        if int(match[1]) != 1 + int(match[3]) + int(match[4]):
            raise ValueError(f"format {name!r}: bits must be 1 + e + m, at most 8, with e >= 1 (fp6_e3m2)")
        return _named(name, f"{match[2]}/row/float32")
    near = " or ".join(map(repr, _nearest(name.lower())))
    hint = f"; did you mean {near}?" if near else ""
    names = ", ".join(FORMATS)
    raise ValueError(f"unknown format {name!r}{hint}; formats: {names}, fp<bits>_e<e>m<m>, element/block/scale")


CALLED_OTHERWISE = {
    "ternary": "int1.585",
    "binary": "int1",
    **{name: f"{name}/128/bfloat16" for name, element in ELEMENTS.items() if element.zero_point},
}


def _nearest(name: str) -> list[str]:
    """The formats that an unknown name may mean: never one of another precision."""
    if name in FORMATS or name in CALLED_OTHERWISE:
        return [CALLED_OTHERWISE.get(name, name)]
    if longer := [known for known in FORMATS if name in known]:
        return longer[:6]
    return difflib.get_close_matches(name, [known for known in FORMATS if _bits(known) == _bits(name)], n=1, cutoff=0.5)


def _bits(name: str) -> str | None:
    """The first number in a name."""
    found = re.search(r"[0-9]+(\.[0-9]+)?", name)
    return found and found[0]
