"""The policy of kernels/README.md for zeros, tiny and huge values, NaN and infinity: all formats, rules, roundings."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import qtrain
from qtrain.config.recipe import QuantSpec
from qtrain.errors import UserError
from qtrain.quant.quantizer import Quantizer
from qtrain_kernels.formats import FORMATS, get_format
from qtrain_kernels.plans import SCALE_RULES

OPEN = ("e2m1/16x16/e4m3", "e2m1/16/ue5m3", "e4m3/128/float32", "e4m3/128x128/float32", "int8_sym/tensor/float32",
        "e3m0/tensor/float32", "int1.585/tensor/float32", "e4m3/16/e8m0", "e3m0/32/e8m0", "int4_sym/16/e8m0",
        "e2m1/16/e3m3", "int4_sym/32/float16", "int4_sym/32/bfloat16", "int4_asym/32/bfloat16")  # fmt: skip
ROUNDINGS = ("nearest", "stochastic", "eden")
SQUARES = ("gaussian", "std", "std_round", "mse_phase", "sawb")  # rules that sum them


def specs() -> list[QuantSpec]:
    """Every rule and rounding that every format takes."""
    found = []
    for name, rule, rounding in product([*FORMATS, *OPEN], [r for r in SCALE_RULES if r != "learned"], ROUNDINGS):
        spec = QuantSpec(format=name, scale=rule, rounding=rounding)  # pyright: ignore[reportArgumentType]
        try:
            Quantizer.build(spec)
        except UserError:
            continue
        found.append(spec)
    return found


SPECS = specs()
KEY = torch.tensor([3, -4], dtype=torch.int32)


def gaussians(rows: int = 16, columns: int = 128) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def name(spec: QuantSpec) -> str:
    return f"{spec.format}-{spec.scale}-{spec.rounding}"


def relative_error(spec: QuantSpec, x: Tensor) -> float:
    found = Quantizer.build(spec, "reference").quantize(x, key=KEY).dequantize().double()
    return ((found - x.double()).square().sum() / x.double().square().sum()).item()


def test_there_is_a_spec_of_every_format_rule_and_rounding() -> None:
    assert {spec.format for spec in SPECS} == {*FORMATS, *OPEN}
    assert {spec.scale for spec in SPECS} == set(SCALE_RULES) - {"learned"}
    assert {spec.rounding for spec in SPECS} == set(ROUNDINGS)


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_zeros_give_zeros_and_keep_their_gradient(spec: QuantSpec) -> None:
    masked = spec.model_copy(update={"estimator": "trust"})
    fmt = get_format(spec.format or "")
    for estimator in (spec, masked)[: 1 if fmt.element.zero_point else 2]:  # beside zero points there is no mask
        quantized = Quantizer.build(estimator, "reference").quantize(torch.zeros(16, 128), key=KEY)
        assert (quantized.dequantize() == 0).all()
        assert quantized.mask is None or quantized.mask.all()
    x = gaussians()
    x[:, 32:64] = 0  # whole blocks of 16 and 32
    values = Quantizer.build(spec, "reference").quantize(x, key=KEY).dequantize()
    if not fmt.element.offset:  # a centred grid has no zero: only a row of zeros, of scale 0, stays so
        assert (values[:, 32:64] == 0).all()


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_tiny_values_are_never_worse_than_zeros(spec: QuantSpec) -> None:
    """Down to the subnormals of float32. Rounding to nearest always; stochastic rounding keeps the mean instead, and
    below E8M0's smallest scale, 2^-127, is as coarse as that."""
    x = gaussians()
    usual = relative_error(spec, x)
    e8m0 = get_format(spec.format or "").scale == "e8m0"
    for exponent in (-30, -36, -38, -40, -42, -44):
        if spec.rounding == "stochastic" and e8m0 and exponent < -38:
            continue
        assert relative_error(spec, x * 10.0**exponent) <= max(1.0, 1.05 * usual), exponent


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_huge_values_are_quantised_or_visibly_lost(spec: QuantSpec) -> None:
    """Up to 1e18 as any other: times a power of two, the error is the same. Above, a sum of squares or a step upwards
    may leave float32: then NaN or infinity. A finite result is as good as any; without squares, 1e20 gives one."""
    x = gaussians()
    usual = relative_error(spec, x)
    if spec.format == "int4_sym/32/float16":
        assert relative_error(spec, x * 2.0**12) == pytest.approx(usual, rel=1e-3)
        assert math.isnan(relative_error(spec, x * 2.0**20)), "beyond its largest scale"
        return
    assert relative_error(spec, x * 2.0**58) == pytest.approx(usual, rel=1e-3)  # absmean adds 1e-5 to the scale
    for factor in (1e20, 7e37):
        error = relative_error(spec, x * factor)
        assert not error < math.inf or error <= 1.2 * usual
        if factor == 1e20 and spec.scale not in SQUARES:
            assert error < math.inf


@pytest.mark.parametrize(("format", "rule"), [
    ("nvfp4", "absmax"), ("nvfp4", "four_over_six"), ("e2m1/16x16/e4m3", "absmax"), ("e2m1/16/ue5m3", "absmax"),
    ("e2m1/16/e3m3", "four_over_six"),
])  # fmt: skip
def test_a_scale_that_rounds_down_clips_by_at_most_a_seventeenth(format: str, rule: str) -> None:
    """Three mantissa bits: a scale loses up to 1/17, at 1 + 1/16 times a power of two, and amax lies at 6 * 17/16. A
    subnormal scale has fewer: it loses up to 1/3, at 1.5 of its least steps, and amax lies at 9."""
    fmt = get_format(format)
    assert fmt.scale_element is not None
    least, cap = 2.0**fmt.scale_element.min_exponent, fmt.scale_element.max
    sizes = torch.exp2(torch.linspace(math.log2(cap), math.log2(least / 16), 4096))  # amax / 6, in the scales' units
    x = torch.randn(4096, fmt.rows, 16, generator=torch.Generator().manual_seed(0))
    x = x / x.abs().amax((1, 2), keepdim=True) * 6 * sizes[:, None, None]
    found = Quantizer.build(QuantSpec(format=format, scale=rule), "reference").quantize(x.reshape(-1, 16))
    assert found.block_scale is not None
    scale = found.block_scale.double() * found.tensor_scale
    u = (x.reshape(-1, 16).double() / scale).abs().view(4096, -1).amax(1)
    normal = found.block_scale.view(4096, -1)[:, 0] >= least
    assert 6.3 < u[normal].max() <= 6 * 17 / 16 * (1 + 1e-6)
    assert 7 < u[~normal].max() <= 9 * (1 + 1e-6)
    if rule == "absmax":  # four_over_six takes amax at 4 instead where that has the smaller error
        assert u.max() > 8.9


@pytest.mark.parametrize("format", ["int2_sym/32/e8m0", "int1.585/32/e8m0", "e3m0/32/e8m0"])
def test_three_quarters_of_the_next_power_of_two_must_be_a_code(format: str) -> None:
    """Else block maxima saturate under the rule that is to keep the mean of every element."""
    with pytest.raises(UserError, match=r"'floor_three_quarters' .*for .* use floor, even, rceil"):
        Quantizer.build(QuantSpec(format=format, scale="floor_three_quarters"))


@pytest.mark.parametrize("rule", [rule for rule, kinds in SCALE_RULES.items() if "e8m0" in kinds])
def test_no_block_has_a_smaller_scale_than_zeros(rule: str) -> None:
    """So zeros beside a matrix change no scale of 128 elements, which is the largest of its blocks'."""
    x = gaussians(200, 32) * torch.exp2(torch.arange(-160, 40).float())[:, None]
    quantizer = Quantizer.build(QuantSpec(format="mxfp4", scale=rule), "reference")
    scales, of_zeros = (quantizer.quantize(each).block_scale for each in (x, torch.zeros(1, 32)))
    assert scales is not None and of_zeros is not None and (scales >= of_zeros).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_absmean_needs_a_zero_among_the_codes(bits: int) -> None:
    with pytest.raises(UserError, match="'absmean' needs codes with a zero"):
        Quantizer.build(QuantSpec(format=f"int{bits}", scale="absmean"))


@pytest.mark.parametrize("backend", ["reference", "compiled"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("format", "lost"), [
    ("mxfp4", (1, 32)), ("mxint8", (1, 32)), ("int4", (1, 128)), ("fp8_e4m3", (1, 128)), ("e4m3/32/float32", (1, 32)),
    ("int4_sym/32/float16", (1, 32)), ("int4_sym/32/bfloat16", (1, 32)),
    ("e4m3/16x16/float32", (16, 16)), ("nvfp4", (16, 128)), ("int8_sym/tensor/float32", (16, 128)),
])  # fmt: skip
def test_a_bad_value_makes_what_shares_its_scale_nan(
    format: str, lost: tuple[int, int], bad: float, backend: str
) -> None:
    x = gaussians()
    x[0, 5] = bad
    quantizer = Quantizer.build(QuantSpec(format=format), backend)  # pyright: ignore[reportArgumentType]
    values = quantizer.quantize(x, key=KEY).dequantize()
    expected = torch.zeros(16, 128, dtype=torch.bool)
    expected[: lost[0], : lost[1]] = True
    assert torch.equal(values.isnan(), expected) and not values.isinf().any()


def saturated(quantizer: Quantizer, x: Tensor) -> Tensor:
    """Which elements of x lie beyond the largest code, by more than the last bits of a float32."""
    assert quantizer.plan is not None
    found = quantizer.quantize(x)
    largest = replace(found, codes=torch.full_like(found.codes, quantizer.plan.element.max)).dequantize()
    return x.abs() > largest * (1 + 2.0**-22)


def test_what_saturates_or_vanishes() -> None:
    x = torch.zeros(1, 32)
    x[0, :6] = torch.tensor([7.0, -6.5, 6.0, 0.2, -0.1, 0.3])  # floor: scale 1; 7 and 6.5 lie beyond 6
    floor, rceil = (Quantizer.build(QuantSpec(format="mxfp4", scale=rule), "reference") for rule in ("floor", "rceil"))
    flushed = (floor.quantize(x).dequantize() == 0) & (x != 0)
    assert (saturated(floor, x).sum(), flushed.sum()) == (2, 2)
    assert not saturated(rceil, gaussians()).any()
    assert 0 < saturated(floor, gaussians()).float().mean() < 0.05


@pytest.mark.parametrize(("format", "rule", "saturates"), [
    ("mxfp4", "floor", True), ("mxfp4", "even", True), ("mxfp4", "round", True), ("mxfp4", "std", True),
    ("mxfp4", "std_round", True), ("mxfp4", "mse", True), ("mxfp4", "mse_phase", True), ("mxfp4", "gaussian", True),
    ("mxfp4", "rceil", False), ("mxfp4", "ceil", False), ("mxfp4", "floor_three_quarters", False),
    ("nvfp4", "absmax", True), ("nvfp4", "four_over_six", True), ("nvfp4", "absmax_fitted", True),
    ("nvfp4", "absmax_headroom", False), ("e2m1/16x16/e4m3", "absmax_headroom", False),
    ("int4", "gaussian", True), ("int1.585", "absmean", True), ("int4_sym", "sawb", True),
    ("int4_sym", "absmax", False), ("int4_sym/32/float16", "absmax", True), ("int4_sym/32/bfloat16", "absmax", True),
    ("fp8_e4m3", "absmax", False), ("e4m3/128/float32", "absmax", False), ("int8_sym/tensor/float32", "absmax", False),
])  # fmt: skip
def test_the_rules_that_saturate_are_those_that_say_so(format: str, rule: str, saturates: bool) -> None:
    """By more than the last bit of a float32, which the product of codes and scale may lie off."""
    x = gaussians(256, 128) * torch.exp2(torch.arange(256) / 256)[:, None]
    assert saturated(Quantizer.build(QuantSpec(format=format, scale=rule), "reference"), x).any() == saturates


@pytest.mark.parametrize("recipe", qtrain.recipes())
def test_zero_inputs_and_gradients_stay_finite_through_every_recipe(recipe: str) -> None:
    model = nn.Sequential(nn.Linear(128, 128, bias=False))
    qtrain.convert(model, recipe, backend="reference")
    for x, dy in (
        (torch.zeros(40, 128), gaussians(40)),
        (gaussians(40), torch.zeros(40, 128)),
        (gaussians(40) * 1e-38, gaussians(40) * 1e-38),
    ):
        qtrain.set_step(model, 0)
        qtrain.calibrate(model, torch.zeros(40, 128))
        x = x.requires_grad_()
        y = model(x)
        y.backward(dy)
        for found in (y, x.grad, model[0].weight.grad):
            assert found is not None and found.isfinite().all()
        if (x == 0).all():
            assert (y == 0).all()
        if (dy == 0).all():
            assert x.grad is not None and (x.grad == 0).all()


@pytest.mark.parametrize("format", [f"int{b}{kind}" for b in range(1, 9) for kind in ("", "_sym") if b > 1 or not kind])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_b_bits_give_at_most_two_to_the_b_levels(format: str, rounding: str) -> None:
    bits = int(format[3])
    spec = QuantSpec(format=format, scale="absmax", rounding=rounding)  # pyright: ignore[reportArgumentType]
    levels = Quantizer.build(spec, "reference").quantize(gaussians(64, 4096) * 3, key=KEY).codes.unique()
    assert len(levels) == (2**bits - 1 if format.endswith("_sym") else 2**bits)
