"""Formats against bit patterns enumerated by hand, and the Gaussian constants against their own optimum."""

import pytest
from oracles import quantization as oracle
from scipy.optimize import minimize_scalar

from qtrain_kernels.formats import FORMATS, get_format
from qtrain_kernels.plans import SCALE_RULES, ScaleRule, check_scale

# As bitsandbytes 0.50.2 prints its table.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
GRIDS = {
    "mxfp4": oracle.E2M1_GRID,
    "nvfp4": oracle.E2M1_GRID,
    "fp4_e2m1": oracle.minifloat_grid(2, 1, 6.0),
    "mxfp6_e3m2": oracle.minifloat_grid(3, 2, 28.0),
    "mxfp6_e2m3": oracle.minifloat_grid(2, 3, 7.5),
    "mxfp8_e4m3": oracle.minifloat_grid(4, 3, 448.0),
    "mxfp8_e5m2": oracle.minifloat_grid(5, 2, 57344.0),
    "fp8_e4m3": oracle.minifloat_grid(4, 3, 448.0),
    "fp8_e5m2": oracle.minifloat_grid(5, 2, 57344.0),
    "fp7_e3m3": oracle.minifloat_grid(3, 3, 30.0),
    "mxint8": [k / 64 for k in range(-127, 128)],
    "int1.585": [-1.0, 0.0, 1.0],
    "nf4": list(NF4),
    "fp4_e3m0": [-16.0, -8.0, -4.0, -2.0, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0],
    **{f"int{bits}_sym": [float(k) for k in range(1 - 2 ** (bits - 1), 2 ** (bits - 1))] for bits in range(2, 9)},
    **{f"int{bits}": oracle.centred_grid(bits) for bits in range(1, 9)},
}


@pytest.mark.parametrize("name", GRIDS)
def test_levels_are_the_formats_bit_patterns(name: str) -> None:
    assert list(get_format(name).element.levels()) == GRIDS[name]


@pytest.mark.parametrize("bits", range(2, 9))
def test_levels_beside_a_zero_point_are_b_bits(bits: int) -> None:
    fmt = get_format(f"int{bits}_asym/128/bfloat16")
    assert fmt.element.levels() == tuple(range(2**bits)) and fmt.element.bits == bits
    assert fmt.default_scale == "minmax"
    with pytest.raises(ValueError, match=rf"did you mean 'int{bits}_asym/128/bfloat16'\?"):
        get_format(f"int{bits}_asym")


@pytest.mark.parametrize("form", ["row/float32", "128/float32", "32/e8m0", "16/e4m3", "16x16/float16"])
def test_a_zero_point_lies_beside_a_scale_of_16_bits(form: str) -> None:
    with pytest.raises(ValueError, match=r"a zero point lies beside .*; write int4_asym/128/bfloat16"):
        get_format(f"int4_asym/{form}")


def test_every_named_format_is_checked_here() -> None:
    assert set(FORMATS) <= set(GRIDS)


@pytest.mark.parametrize(("name", "published"), [
    ("int1", 0.3633802), ("int2", 0.1188461), ("int3", 0.0374397), ("int4", 0.0115429), ("int5", None),
    ("int6", None), ("int7", None), ("int8", 8.78212e-5), ("int1.585", None), ("fp4_e2m1", 0.0126849),
])  # fmt: skip
def test_gaussian_constant_gives_the_least_error(name: str, published: float | None) -> None:
    """The minimum is flat: errors are compared, to 0.2%, and not constants."""
    element = get_format(name).element
    assert element.gaussian is not None
    error = oracle.gaussian_error(element.gaussian * element.max, GRIDS[name])
    if published is not None:
        assert error == pytest.approx(published, rel=2e-3)
    bounds = (0.5 * element.gaussian * element.max, 2 * element.gaussian * element.max)
    best = minimize_scalar(oracle.gaussian_error, args=(GRIDS[name],), bounds=bounds, method="bounded").fun
    assert error <= best * 1.002


MEANT = {
    "ternary": r"; did you mean 'int1\.585'\?",
    "binary": r"; did you mean 'int1'\?",
    "mxfp8": r"; did you mean 'mxfp8_e4m3' or 'mxfp8_e5m2'\?",
    "MXFP6": r"; did you mean 'mxfp6_e3m2' or 'mxfp6_e2m3'\?",
    "fp8": r"; did you mean 'mxfp8_e4m3' or 'mxfp8_e5m2' or 'fp8_e4m3' or 'fp8_e5m2'\?",
    "fp4": r"; did you mean 'mxfp4' or 'nvfp4' or 'fp4_e2m1'\?",
    "INT4": r"; did you mean 'int4'\?",
    "int1.58": r"; did you mean 'int1\.585'\?",
    "float8_e4m3fn": r"; did you mean 'fp8_e4m3'\?",
    **dict.fromkeys(("fp16", "bf16", "mxfp5", "nvfp8", "int9"), ""),  # no format of this precision is like it
}


def test_unknown_names_raise_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'mxfp4'"):
        get_format("mxpf4")
    with pytest.raises(ValueError, match=r"bits must be 1 \+ e \+ m"):
        get_format("fp6_e3m3")
    for name, told in MEANT.items():
        with pytest.raises(ValueError, match=rf"unknown format '{name}'{told}; formats: int1, "):
            get_format(name)
    with pytest.raises(ValueError, match="unknown scale format 'fp16'; use e8m0, float32, float16, bfloat16, e4m3"):
        get_format("int4_sym/32/fp16")
    with pytest.raises(ValueError, match="one scale per row is a float32; got 'float16'"):
        get_format("int4_sym/row/float16")
    with pytest.raises(ValueError, match="did you mean 'floor'"):
        check_scale(get_format("mxfp4"), "flor")


@pytest.mark.parametrize(("name", "rule"), [
    ("mxfp4", "absmax"), ("int4", "floor"), ("fp6_e3m2", "gaussian"), ("nvfp4", "std"), ("mxfp8_e4m3", "std"),
    ("int4_sym/32/float16", "minmax"), ("int4_asym/32/float16", "absmax"), ("int4_asym/32/float16", "gaussian"),
])  # fmt: skip
def test_a_rule_that_the_format_lacks_raises(name: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        check_scale(get_format(name), rule)


def test_no_row_has_numbers_that_its_kind_of_scale_does_not_read() -> None:
    of_e8m0 = ("increment", "shift", "headroom")
    of_blocks = (*of_e8m0, "given", "of_lines")
    unread = {"e8m0": of_blocks[3:], "minifloat": of_blocks, "float32": of_e8m0}
    unread |= {"float16": of_blocks, "bfloat16": of_blocks}
    fmt, nothing = get_format("int4"), ScaleRule()
    for name, kinds in SCALE_RULES.items():
        for kind, row in kinds.items():
            rule = row(fmt.element, get_format("nvfp4").scale_element)
            assert {field: getattr(rule, field) for field in unread[kind] if getattr(rule, field)} == {
                field: getattr(nothing, field) for field in unread[kind] if getattr(nothing, field)
            }, name
            assert (rule.outer is not None) >= (kind == "minifloat"), f"{name}: minifloat scales have one above them"
            assert rule.headroom == 1.0 or rule.outer is None, f"{name}: the headroom is the tensor scale's"
            assert bool(rule.less) == (rule.statistic == "rms_absmean"), name
