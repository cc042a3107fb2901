"""Triton's kernels equal the reference bit for bit: on a GPU, and without one in Triton's interpreter.

The interpreter must be chosen before triton is imported, and other tests import it: `test_in_the_interpreter` runs this
file once more in a process of its own. There the kernels take CPU tensors; here they need a CUDA device.
"""

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import product
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from conftest import passed_in_the_interpreter
from torch import Tensor

from qtrain_kernels import gpu, hadamard, packing, quantize, reference
from qtrain_kernels.formats import Format, get_format
from qtrain_kernels.plans import SCALE_RULES, Mask, Plan, Rotation, _misfit, can_pack, stored_integer
from qtrain_kernels.quantize import Side, Spec
from qtrain_kernels.triton_quantize import divisor, quotient

ROOT = Path(__file__).parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter computes by numpy, which warns of what IEEE arithmetic defines: inf - inf, overflow, NaN to integer.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

KEY = torch.tensor([1374496523, -987654321], dtype=torch.int32)  # high bits: the index alone has few
MASKS = (Mask("inside", 6.0), Mask("within", 2.5), Mask("error", 0.5))
FORMATS = (
    *("mxfp4", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8", "e3m0/16/e8m0"),
    *("nvfp4", "e2m1/16/ue5m3", "e4m3/32/e4m3", "int4_sym/32/e4m3", "e2m1/16x16/e4m3", "e2m1/32/e3m2"),
    *("int1", "int4", "int8", "int1.585", "int4_sym", "fp8_e4m3", "fp4_e2m1", "e1m2/row/float32"),
    *("e3m0/tensor/float32", "int4_sym/tensor/float32", "e4m3/128/float32", "int4/32/float32"),
)
E2M1 = get_format("mxfp4").element
MXFP4 = Plan(E2M1, "e8m0", 32, "std", mask=MASKS[0])
NVFP4 = Plan(E2M1, "minifloat", 16, "absmax", scale_element=get_format("nvfp4").scale_element)
QUEST = Plan(get_format("int4").element, "float32", None, "gaussian", mask=MASKS[2])


def plans(fmt: Format) -> Iterator[Plan]:
    """Every scale rule and rounding of a format, with each kind of mask in turn and the sparsities."""
    count = 0
    for rule in SCALE_RULES:
        if rule == "learned" or _misfit(fmt, rule):  # learned: gaussian's arithmetic under a scale that is given
            continue
        plan = Plan(
            fmt.element,
            fmt.scale_kind,
            fmt.block_size,
            rule,
            scale_element=fmt.scale_element,
            per_tensor=fmt.block == "tensor",
        )
        for rounding in ("nearest", "stochastic", "eden"):
            if rounding == "eden" and fmt.scale_kind != "minifloat":
                continue
            count += 1
            correction = None if rounding != "eden" else (fmt.block_size or 0) * (1, 4)[count % 2]
            sparsity = (None, None, "2:4", None, "4:8")[count % 5]
            if correction and correction > 256:
                correction = fmt.block_size
            yield replace(plan, rounding=rounding, mask=MASKS[count % 3], correction=correction, sparsity=sparsity)  # pyright: ignore[reportArgumentType]


def hard_lines(length: int, finite: bool) -> Tensor:
    """(lines, length), an even number: Gaussians over many octaves, ties, powers of two, zeros, subnormals, the largest
    floats; with NaN and infinities unless finite."""
    generator = torch.Generator().manual_seed(length)
    normal = torch.randn(12, length, generator=generator)
    octaves = torch.exp2(torch.arange(-12.0, 12.0, 2.0))[:, None]
    grid = torch.randint(-32, 33, (4, length), generator=generator) / 8  # every tie of the coarse grids
    powers = torch.exp2(torch.randint(-6, 7, (2, length), generator=generator).float())
    flat = torch.exp2(torch.arange(-149.0, 128.0, 28.0))[:, None].expand(-1, length)
    # a float to each side of where an exponent carries: 1, 1.5, 1.75 and, in 6ths, the square root of 2
    edges = torch.tensor([1.0, 1.5, 1.75, 6 * 1.41421354])
    edges = torch.cat((edges, edges.nextafter(edges * 0), edges.nextafter(edges * 2)))[:, None] * normal[0].clamp(-1, 1)
    largest = torch.tensor([3.4028235e38, 3e38, 1.0001e19, 1e-38, 1e-42, 1e-45])[:, None] * normal[:6].clamp(-1, 1)
    ends = torch.tensor([0.0, -0.0, 3.4028235e38, 1e-45])[:, None].expand(-1, length)
    lines = [ends, normal * octaves, grid, -powers, flat, edges, largest]
    if not finite:
        bad = normal[:4].clone()
        bad[torch.arange(4), torch.arange(4) * 5] = torch.tensor(
            [float("nan"), float("inf"), -float("inf"), -float("nan")]
        )
        bad[3, 1] = float("inf")
        lines.append(bad)
    return torch.cat(lines)


def spans(length: int, along_last: bool, finite: bool) -> Tensor:
    """The hard lines as (lines, length, 1), or side by side as (2, length, lines / 2)."""
    lines = hard_lines(length, finite)
    return lines[:, :, None] if along_last else lines.view(2, -1, length).mT.contiguous()


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal bits, the sign of zero included; a NaN is any NaN."""
    if a is None or b is None:
        return a is b
    bits = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[a.element_size()]
    if a.is_floating_point() and b.is_floating_point():
        a, b = (torch.where(x.isnan(), torch.tensor(float("nan"), dtype=x.dtype), x) for x in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(bits), b.view(bits))


def moved(x: Tensor | float | None, device: str) -> Tensor | float | None:
    return x.to(device) if isinstance(x, Tensor) else x


def results(function: object, device: str, *arguments: object) -> list[Tensor | None]:
    found = function(*(moved(each, device) for each in arguments))  # pyright: ignore
    return [None if each is None else each.cpu() for each in found]


def scale_of(x: Tensor, plan: Plan) -> Tensor | float:
    """A tensor scale as Quantizer hands it on: of whole rows or columns, one for each of their spans."""
    if plan.span is None or plan.rule != "mse_phase":
        return reference.tensor_scale(x, plan)
    outer, span, inner = x.shape
    rows = x.reshape(1, outer * span, inner) if inner > 1 else x
    return reference.tensor_scale(rows, plan).expand(outer, 1, inner).contiguous()  # type: ignore[union-attr]


# --------------------------------------------------------------------------------------------- equal to the reference


@pytest.mark.parametrize("along_last", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize("name", FORMATS)
def test_encode_and_operand_equal_the_reference(name: str, along_last: bool, device: str) -> None:
    fmt = get_format(name)
    alone = fmt.scale_kind != "minifloat" and fmt.block != "tensor"  # a NaN makes its block or row NaN, and no other
    for plan in plans(fmt):
        x = spans(plan.span or 88, along_last, not alone)
        if plan.span is None and not along_last:
            x = x[:1].contiguous()
        arguments = (x, scale_of(x, plan), KEY, plan)
        expected, found = reference.encode(*arguments), results(quantize.encode, device, *arguments)
        assert list(map(same, found, expected)) == [True] * 3, plan
        if plan.rounding == "stochastic":  # the product that follows is the same
            continue
        dtype = torch.bfloat16 if plan.exact_in_bfloat16 or plan.mask == MASKS[0] else torch.float32
        expected, found = reference.operand(*arguments, dtype), results(quantize.operand, device, *arguments, dtype)
        assert list(map(same, found, expected)) == [True] * 3, (plan, dtype)
        if plan.element.mantissa_bits is None and plan.block is None:  # a NaN is any integer
            number = reference.encode(*arguments)[0].isfinite()
            expected, _, _ = reference.operand(*arguments, torch.int8)
            found, _, _ = results(quantize.operand, device, *arguments, torch.int8)
            assert found is not None and torch.equal(found[number], expected[number]), plan


@pytest.mark.parametrize("along_last", [True, False], ids=["rows", "columns"])
def test_stochastic_rounding_goes_up_where_the_draw_is_below_the_distance(along_last: bool, device: str) -> None:
    """Not where it equals the distance, as here everywhere, nor in any later float."""
    plan = Plan(E2M1, "e8m0", 32, "floor", "stochastic")
    x = torch.zeros(6, 32, 1) if along_last else torch.zeros(2, 32, 3)
    draws = reference.uniform(reference.element_index(x), KEY)
    for distance, up in ((draws, 0.0), (torch.nextafter(draws, torch.tensor(2.0)), 0.5)):
        x = distance * 0.5
        x[:, 0] = 4.0  # a scale of 1
        codes, _, _ = results(quantize.encode, device, x, 1.0, KEY, plan)
        assert codes is not None and (codes[:, 1:] == up).all()


def test_a_tie_of_four_and_six_takes_six(device: str) -> None:
    x = torch.zeros(2, 16, 1)
    x[0, 0], x[1, 3] = 6.0, -3.0
    codes, blocks, _ = results(quantize.encode, device, x, torch.ones(()), None, replace(NVFP4, rule="four_over_six"))
    assert codes is not None and blocks is not None
    assert codes.abs().amax(1).flatten().tolist() == [6, 6] and blocks.flatten().tolist() == [1, 0.5]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_under_a_tensor_scale_makes_all_nan(bad: float, device: str) -> None:
    x = hard_lines(16, True)[:8].clone()[:, :, None]
    x[3, 3] = bad
    for plan in plans(get_format("nvfp4")):
        plan = replace(plan, correction=plan.correction and 16)
        scale = reference.tensor_scale(x, plan)
        values, _, _ = results(quantize.operand, device, x, scale, KEY, plan, torch.bfloat16)
        assert values is not None and values.isnan().all()


@pytest.mark.parametrize(
    "rotation", [None, Rotation(16, torch.tensor([1.0, -1.0, -1.0, 1.0] * 4))], ids=["plain", "rotated"]
)
def test_fake_quantize_equals_the_reference(rotation: Rotation | None, device: str) -> None:
    turned = rotation and Rotation(rotation.size, moved(rotation.signs, device))  # pyright: ignore[reportArgumentType]
    x = matrix(6, 64)[:, :, None]
    for plan, dtype in product((QUEST, replace(NVFP4, rounding="stochastic")), (torch.float32, torch.bfloat16)):
        x = x.reshape(-1, plan.span or 64, 1)
        scale = reference.tensor_scale(x, plan, rotation)
        expected = reference.fake_quantize(x, scale, KEY, plan, dtype, rotation)
        arguments = (moved(scale, device), KEY.to(device), plan, dtype, turned)
        found = gpu.fake_quantize(x.to(device), *arguments)  # pyright: ignore[reportArgumentType]
        assert same(found.cpu(), expected), (plan, dtype)


@pytest.mark.parametrize("along_last", [True, False], ids=["rows", "columns"])
def test_block_scales_that_nobody_asks_for_are_not_written(along_last: bool, device: str) -> None:
    for plan in (MXFP4, replace(NVFP4, rule="absmax_fitted", rounding="eden", correction=32)):
        x = spans(32, along_last, True)
        arguments = x, scale_of(x, plan), KEY, plan, torch.bfloat16
        values, _, mask = reference.operand(*arguments)
        found = results(quantize.operand, device, *arguments, None, False)
        assert same(found[0], values) and found[1] is None and same(found[2], mask), plan


def test_a_learned_scale(device: str) -> None:
    x = hard_lines(40, False)[:, :, None]
    plan = Plan(get_format("int4").element, "float32", None, "learned", mask=MASKS[1], per_tensor=True)
    scale = torch.tensor(0.37)
    expected = reference.encode(x, scale, None, plan)
    assert all(map(same, results(quantize.encode, device, x, scale, None, plan), expected))


# ----------------------------------------------------------------------------------------------------------- division


@triton.jit
def divide_kernel(x, d, found, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(found + at, quotient(tl.load(x + at), divisor(tl.load(d + at))))


def divided(x: Tensor, d: Tensor, device: str) -> Tensor:
    """x / d as the kernels divide, float32 of any equal sizes."""
    found, size = [], 1 << 15
    for numerator, denominator in zip(x.split(size), d.split(size), strict=True):
        count = len(numerator)
        given = [torch.cat((each, torch.ones(size - count))).to(device) for each in (numerator, denominator)]
        out = torch.empty(size, device=device)
        divide_kernel[(1,)](*given, out, size, **quantize.UNFUSED)
        found.append(out[:count].cpu())
    return torch.cat(found)


def hardest(divisors: Tensor) -> tuple[Tensor, Tensor]:
    """(x, d): integers of 24 bits whose quotients lie next to a midpoint of two floats, by up to 7 of the 2^25 parts of
    one and nearest of all. Of odd divisors d: 2^n x - m d = k for odd m of 25 bits has one solution a k."""
    numerators, denominators = [], []
    inverse = divisors.clone()
    for _ in range(5):  # Newton's, modulo 2^64
        inverse = inverse * (2 - divisors * inverse)
    for n, k, above in product((24, 25), (-7, -5, -3, -1, 1, 3, 5, 7), (0, 1)):
        m = (-k * inverse) % 2**n + above * 2**n
        x = (m * divisors + k) >> n
        fits = (m >= 2**24) & (m < 2**25) & (x >= 2**23) & (x < 2**24)
        numerators.append(x[fits].float())
        denominators.append(divisors[fits].float())
    return torch.cat(numerators), torch.cat(denominators)


def test_division_is_ieees_at_the_hardest_quotients(device: str) -> None:
    """Of divisors from all of an octave. (All of its odd ones, with those of their multiples by 2, 4 and 8 that have
    such quotients, 46 million, were tried once.)"""
    x, d = hardest(torch.arange(2**23 + 1, 2**24, 2 * 401))
    assert len(x) > 50_000
    assert same(divided(x, d, device), x / d)


def test_division_is_ieees_at_the_ends(device: str) -> None:
    """Zeros, subnormals, infinities, NaN, of both signs, and everything between. Quotients below 2^-126 may be off by
    one subnormal unit, those above 2^102 may be infinite: no grid has codes there."""
    ends = torch.tensor(
        [0.0, 1e-45, 1e-42, 1.1754942e-38, 1.1754944e-38, 1e-30, 0.1, 1.0, 6.0, 3e4, 1e30, 3.4028235e38]
    )
    ends = torch.cat((ends, torch.tensor([float("inf"), float("nan")])))
    ends = torch.cat((ends, -ends))
    draws = torch.Generator().manual_seed(0)
    anywhere = torch.randint(-(2**31), 2**31, (2, 200_000), generator=draws).to(torch.int32).view(torch.float32)
    x = torch.cat((ends.repeat_interleave(len(ends)), anywhere[0]))
    d = torch.cat((ends.repeat(len(ends)), anywhere[1]))
    found, wanted = divided(x, d, device), x / d
    tiny, huge = wanted.abs() < 2.0**-126, (wanted.abs() >= 2.0**102) & wanted.isfinite()
    assert same(found[~tiny & ~huge], wanted[~tiny & ~huge])
    assert (found[huge].abs() >= 2.0**102).all() and torch.equal(found[huge].sign(), wanted[huge].sign())
    assert torch.equal(found[tiny].signbit(), wanted[tiny].signbit())
    assert ((found[tiny].double() - wanted[tiny].double()).abs() <= 2.0**-149).all()


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has a fused multiply-add of its own")
def test_the_interpreters_multiply_add_rounds_once() -> None:
    """Against exact fractions: of any exponents, and where the sum lies within a hair of a midpoint."""
    from qtrain_kernels.triton_interpreter import fma

    draws = torch.Generator().manual_seed(0)
    x, y, z = torch.randint(-(2**31), 2**31, (3, 3000), generator=draws).to(torch.int32).view(torch.float32)
    near = 1 + torch.randint(0, 2**23, (3000,), generator=draws) * 2.0**-22  # odd multiples of 2^-24 round it
    x = torch.cat((x, torch.full((3000,), 2.0**-24), torch.full((3000,), 2.0**-24)))
    y = torch.cat((y, 1 + near * 2.0**-23, torch.tensor([1.0, -1.0]).repeat(1500) * (1 - near * 2.0**-24)))
    z = torch.cat((z, near, near))
    exact = x.isfinite() & y.isfinite() & z.isfinite()
    x, y, z = (each[exact] for each in (x, y, z))
    for factor, other, term, found in zip(*(each.tolist() for each in (x, y, z, fma(x, y, z))), strict=True):
        total = Fraction(factor) * Fraction(other) + Fraction(term)
        if abs(total) >= 2**127:
            continue
        below = torch.tensor(found).nextafter(torch.tensor(-torch.inf)).item()
        above = torch.tensor(found).nextafter(torch.tensor(torch.inf)).item()
        distances = [abs(total - Fraction(each)) for each in (below, found, above)]
        assert distances[1] == min(distances)
        if distances.count(distances[1]) > 1:  # a tie, to even
            assert torch.tensor(found).view(torch.int32).item() % 2 == 0


# ----------------------------------------------------------------------------------------------------- whole matrices


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussians whose size changes by octaves from line to line, with a zero line and a subnormal one each way."""
    generator = torch.Generator().manual_seed(rows * columns)
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.exp2(torch.randint(-9, 9, (rows, 1), generator=generator).float())
    x *= torch.exp2(torch.randint(-9, 9, (1, columns), generator=generator).float())
    if rows > 2 and columns > 2:
        x[0], x[:, 0], x[1], x[:, 1] = 0, 0, x[1] * 1e-40, x[:, 1] * 1e-40
    return x.to(dtype)


def expected_of(x: Tensor, spec: Spec, rotated: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(codes, block scales, mask) by the reference, (M, K) or with blocks in place of elements; and so scale_for."""
    x = x.float() if rotated is None else rotated
    plan, size = spec.plan, spec.plan.span
    if spec.dim == -1:
        view = x.reshape(-1, size or x.shape[1], 1)
        lines = x[:, :, None]
    else:
        view = x.reshape(-1, size or x.shape[0], x.shape[1])
        lines = x[None]
    scale = reference.tensor_scale(lines, plan)
    if isinstance(scale, Tensor) and scale.ndim:
        scale = scale.repeat_interleave(view.shape[0] // scale.shape[0], 0)
    codes, blocks, mask = reference.encode(view, scale, KEY, plan)
    if blocks is not None:
        blocks = blocks.reshape(x.shape[0], -1) if spec.dim == -1 else blocks.reshape(-1, x.shape[1])
    return codes.reshape(x.shape), blocks, None if mask is None else mask.reshape(x.shape)


def scale_for(x: Tensor, spec: Spec) -> Tensor | float:
    return reference.tensor_scale(x.float()[:, :, None] if spec.dim == -1 else x.float()[None], spec.plan)


def run(x: Tensor, spec: Spec, device: str, rotated: Tensor | None = None, signs: Tensor | None = None) -> list:
    scale = scale_for(x if rotated is None else rotated, spec)
    return results(quantize.quantize, device, x, spec, scale, KEY, signs)


def spread(blocks: Tensor, spec: Spec) -> Tensor:
    """A block's scale at each of its elements."""
    return blocks.repeat_interleave(spec.plan.block or 1, 1 if spec.dim == -1 else 0)


MATRIX_PLANS = {
    "mxfp4": MXFP4,
    "mse_phase": replace(MXFP4, rule="mse_phase"),
    "four_over_six": replace(NVFP4, rule="four_over_six", mask=MASKS[2]),
    "stochastic": replace(NVFP4, rule="absmax_headroom", rounding="stochastic"),
    "eden": replace(NVFP4, rule="absmax_fitted", rounding="eden", correction=64),
    "quest": QUEST,
}


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("name", MATRIX_PLANS)
def test_a_matrix_of_any_size_along_either_dim(name: str, dim: int, device: str) -> None:
    """Rows and columns that fill no tile, and bfloat16."""
    span = MATRIX_PLANS[name].span or 1
    lengths = {1: (70, 33), 16: (48, 16), 32: (96, 32), 64: (64, 128)}[span]
    settings = product(zip(lengths, (37, 65), strict=True), (torch.float32, torch.bfloat16))
    for ((length, lines), dtype), output in zip(settings, ("codes", "bfloat16", "float32", "codes"), strict=True):
        x = matrix(lines, length, dtype) if dim == -1 else matrix(length, lines, dtype)
        spec = Spec(MATRIX_PLANS[name], dim, None, output)
        codes, blocks, mask = expected_of(x, spec)
        found = run(x, spec, device)
        if output == "codes":
            wanted = [codes, blocks, mask]
        else:
            values = codes if blocks is None else codes * spread(blocks, spec)
            wanted = [values.to(torch.bfloat16 if output == "bfloat16" else torch.float32), blocks, mask]
        assert list(map(same, found[:3], wanted)) == [True] * 3, (spec, x.shape, dtype)


def test_an_empty_matrix_gives_an_empty_result(device: str) -> None:
    assert hadamard.rotate(torch.empty(0, 32, 1, device=device), Rotation(32)).shape == (0, 32, 1)
    for output, dim in product(("codes", "packed"), (-1, -2)):
        spec = Spec(replace(NVFP4, mask=MASKS[2]), dim, 32, output)
        x = torch.empty(0, 64, device=device) if dim == -1 else torch.empty(64, 0, device=device)
        values, scales, mask, *_ = quantize.quantize(x, spec, 1.0)
        assert [values.numel(), scales.numel(), mask.numel()] == [0, 0, 0]  # pyright: ignore
    values, scales, mask = quantize.encode(torch.empty(0, 16, 1, device=device), 1.0, None, NVFP4)
    assert values.shape == (0, 16, 1) and scales is not None and scales.shape == (0, 1, 1)


# ------------------------------------------------------------------------------------------------------------- packed


def unpacked_codes(values: Tensor, plan: Plan, length: int) -> Tensor:
    """(L, length) float32, by tables and torch's own dtypes."""
    element = plan.element
    if values.dtype.is_floating_point:
        return values.float()
    if values.dtype == torch.int8:
        unit, offset = stored_integer(element)
        return (values.double() + offset).mul(unit).float()
    assert values.dtype == torch.uint8
    positive = torch.tensor([level for level in element.levels() if level > 0])
    table = torch.cat((torch.zeros(1), positive))
    table = torch.cat((table, -table))
    if len(table) == 16:
        values = torch.stack((values & 15, values >> 4), 2).flatten(1)[:, :length]
    return table[values.long()]


def unpacked_scales(scales: Tensor, plan: Plan) -> Tensor:
    if plan.scale_kind == "float32":
        return scales
    if plan.scale_kind == "e8m0":
        return scales.view(torch.float8_e8m0fnu).float()
    assert plan.scale_element is not None
    if plan.scale_element.max == 448:
        return scales.view(torch.float8_e4m3fn).float()
    levels = [level for level in plan.scale_element.levels() if level >= 0]
    return torch.tensor([*levels, float("nan")])[scales.long()]


PACKED = (
    *("mxfp4", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8", "e3m0/16/e8m0", "nvfp4"),
    *("e2m1/16/ue5m3", "int1", "int4", "int7", "int8", "int1.585", "int4_sym", "fp8_e4m3", "fp4_e2m1"),
    *("e4m3/128/float32",),
)


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("name", PACKED)
def test_packed_results_hold_the_reference(name: str, dim: int, device: str) -> None:
    for plan in list(plans(get_format(name)))[:3]:
        length = (plan.span or 33) * (1 if plan.span is None or plan.span > 64 else 3)
        x = matrix(21, length) if dim == -1 else matrix(length, 21)
        spec = Spec(replace(plan, sparsity=None), dim, None, "packed")
        codes, blocks, mask = (each if dim == -1 or each is None else each.T for each in expected_of(x, spec))
        values, scales, passed, *_ = run(x, spec, device)
        assert torch.equal(unpacked_codes(values, plan, length), codes), plan  # a packed zero of integers has no sign
        if blocks is not None:
            assert same(unpacked_scales(scales, plan), blocks.contiguous()), plan
        assert mask is not None
        if dim == -1 and plan.block is not None and can_pack(spec.plan) and plan.element.mantissa_bits:
            operand = codes * blocks.repeat_interleave(plan.block, 1)
            packed = reference.pack(operand.view(-1, plan.span or 1, 1), blocks.reshape(-1, 1, 1), spec.plan)
            assert torch.equal(packed.codes, values.view(torch.uint8).view(-1)), plan
            assert torch.equal(packed.scales, scales.view(-1)), plan
        bits = (passed[:, :, None] >> torch.arange(8)) & 1
        assert torch.equal(bits.flatten(1)[:, :length], mask.to(torch.uint8)), plan


def every_product(fmt: Format, plan: Plan) -> tuple[Tensor, Tensor | None]:
    """Every code under every block scale, NaN among them: (blocks, span, 1), and the scales. Without blocks every code,
    of a number that fills no program."""
    codes = torch.tensor([*fmt.element.levels(), *([] if plan.element.mantissa_bits is None else [-0.0])])
    if plan.block is None:
        return codes.repeat(101).view(101, -1, 1), None
    scales = reference.power_of_two(torch.arange(256, dtype=torch.int32))
    if fmt.scale_element:
        scales = torch.tensor([*fmt.scale_element.magnitudes()[1:], float("nan")])  # none is zero
    codes = torch.cat((codes, codes.new_zeros(-len(codes) % plan.block)))
    repeated = scales[:, None].expand(-1, len(codes) // plan.block).reshape(-1, 1, 1).contiguous()
    return (scales[:, None] * codes).reshape(-1, plan.block, 1), repeated


WAITING = [name for name in PACKED if get_format(name).scale != "float32" or get_format(name).block_size is None]


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_for_the_backward_is_the_references(name: str, device: str) -> None:
    fmt = get_format(name)
    plan = Plan(
        fmt.element, fmt.scale_kind, fmt.block_size, fmt.default_scale, scale_element=fmt.scale_element,
        per_tensor=fmt.block == "tensor",
    )  # fmt: skip
    products, blocks = every_product(fmt, plan)
    for dtype in (torch.float32, *([torch.bfloat16] if plan.exact_in_bfloat16 else [])):
        values = products.to(dtype)
        expected = reference.pack(values, blocks, plan)
        found = packing.pack(values.to(device), None if blocks is None else blocks.to(device), plan)
        assert all(same(each, wanted) for each, wanted in zip(cpu_of(found), expected, strict=True)), dtype
        back = packing.unpack(found, values.shape, plan, dtype).cpu()
        if fmt.element.mantissa_bits is not None:
            assert same(back, values), dtype
        assert torch.equal(back.isnan(), values.isnan()) and torch.equal(back.nan_to_num(0), values.nan_to_num(0))
    if plan.block is None and fmt.element.mantissa_bits is None:
        unit, offset = stored_integer(fmt.element)
        stored = (products / unit - offset).to(torch.int8)
        packed = packing.pack(stored.to(device), None, plan)
        assert same(packed.codes.cpu(), reference.pack(stored, None, plan).codes)
        assert same(packing.unpack(packed, stored.shape, plan, torch.int8).cpu(), stored)


def cpu_of(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    return [None if each is None else each.cpu() for each in tensors]


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_fields_join_and_split(width: int, device: str) -> None:
    for count in (0, 1, 9, 9001):
        fields = torch.randint(2**width, (count,), generator=torch.Generator().manual_seed(count)).to(torch.uint8)
        joined = packing.join(fields.to(device), width)
        assert torch.equal(joined.cpu(), reference.join(fields, width))
        assert torch.equal(packing.split(joined, width, count).cpu(), fields)


def test_packed_nan_stays_visible(device: str) -> None:
    """In E2M1, which has no NaN, by the scale."""
    x = matrix(4, 64)
    x[2, 40] = float("nan")
    for name, poisoned in (
        ("mxfp4", (2, slice(1, 2))),
        ("nvfp4", (slice(4), slice(4))),
        ("e2m1/16/ue5m3", (slice(4), slice(4))),
    ):
        plan = next(plans(get_format(name)))
        _, scales, *_ = run(x, Spec(plan, output="packed"), device)
        wanted = torch.zeros(scales.shape, dtype=torch.bool)
        wanted[poisoned] = True
        assert torch.equal(unpacked_scales(scales, plan).isnan(), wanted), name
        assert (scales[wanted] == (0x7F if name == "nvfp4" else 0xFF)).all(), name


# --------------------------------------------------------------------------------------------------------------- float8


def in_float8(codes: Tensor, scale_bytes: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """float8 codes (L, n) and their scales (L, ceil(n / 128)), of codes (L, n) and bytes of E8M0 (L, n / block): by
    exponents, as quantize.Quantized defines them."""
    largest_code, wide = max(plan.element.levels()), max(plan.element.levels()) > 448
    top = next(k for k in range(20, -1, -1) if largest_code * 2**k <= (57344 if wide else 448))
    groups = scale_bytes.split(128 // (plan.block or 1), 1)
    exponents = torch.stack([group.max(1).values.long() for group in groups], 1)
    scale_exponents = (exponents - 127 - top).clamp_min(-126)
    scales = torch.where(exponents == 255, torch.nan, torch.exp2(scale_exponents.double()))
    of_blocks = scale_exponents.repeat_interleave(128 // (plan.block or 1), 1)[:, : scale_bytes.shape[1]]
    shifts = scale_bytes.long() - 127 - of_blocks
    values = codes.double() * torch.exp2(shifts.double()).repeat_interleave(plan.block or 1, 1)
    values = torch.where(scales.isnan().repeat_interleave(128, 1)[:, : codes.shape[1]], torch.nan, values)
    return values.float().to(torch.float8_e5m2 if wide else torch.float8_e4m3fn), scales.float()


def spread_lines(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Blocks of 32 along either dim whose sizes differ by up to 40 octaves, with zeros, subnormals and one NaN."""
    draws = torch.Generator().manual_seed(rows + columns)
    tiles = torch.randint(-20, 20, (-(-rows // 32), -(-columns // 32)), generator=draws).float().exp2()
    x = torch.randn(rows, columns, generator=draws)
    x *= tiles.repeat_interleave(32, 0)[:rows].repeat_interleave(32, 1)[:, :columns]
    x[:, 3], x[5] = x[:, 3] * 0, x[5] * 1e-30
    x[7, 9] = torch.nan
    return x.to(dtype)


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3"])
def test_float8_codes_and_scales_are_those_of_the_packed(name: str, dim: int, device: str) -> None:
    """Of matrices that fill groups and tiles, and that do not; beside what is packed, which stays as it is."""
    fmt = get_format(name)
    for (length, lines), rule in product(((256, 128), (160, 37)), ("std", fmt.default_scale)):
        if _misfit(fmt, rule):
            continue
        plan = Plan(fmt.element, "e8m0", 32, rule, mask=MASKS[0])
        x = spread_lines(lines, length, torch.bfloat16)
        x = x if dim == -1 else x.T.contiguous()
        alone, beside, packed = (
            results(quantize.quantize, device, x, Spec(plan, dim, 32, output), None, None, rotation_of(32, True).signs)
            for output in ("float8", "packed_float8", "packed")
        )
        assert all(map(same_bytes, beside[:3], packed[:3])) and alone[0] is None and alone[1] is None
        assert all(map(same_bytes, alone[2:], beside[2:]))
        assert packed[0] is not None and packed[1] is not None
        codes, scales = in_float8(unpacked_codes(packed[0], plan, length), packed[1], plan)
        assert alone[3] is not None and alone[3].dtype == codes.dtype
        assert same(alone[3].float(), codes.float()) and same(alone[4], scales), (rule, length)


def same_bytes(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_float8_is_exact_down_to_14_octaves_below_the_largest_scale(device: str) -> None:
    """Every code of E2M1 under every such scale; one octave further it is not."""
    plan = Plan(E2M1, "e8m0", 32, "floor")
    levels = torch.tensor([*E2M1.levels(), *([6.0] * 17)])
    for octaves, exact in ((14, True), (15, False)):
        x = torch.stack((levels, levels * 2.0**-octaves, levels * 2.0**-3, levels * 2.0 ** (1 - octaves))).view(1, 128)
        _, _, _, codes, scales = results(quantize.quantize, device, x, Spec(plan, -1, None, "float8"))
        assert codes is not None and scales is not None
        assert torch.equal(codes.float() * scales, x) == exact


def test_a_packed_matrix_quantised_again_is_the_one_it_holds(device: str) -> None:
    """Along either dim, without writing it between."""
    x = spread_lines(128, 192, torch.bfloat16)
    x[7, 9] = 0.0
    values, scales, *_ = results(quantize.quantize, device, x, Spec(replace(MXFP4, mask=None), -1, None, "packed"))
    assert values is not None and scales is not None
    held = unpacked_codes(values, MXFP4, 192) * unpacked_scales(scales, MXFP4).repeat_interleave(32, 1)
    again = replace(MXFP4, rule="floor_three_quarters", mask=None)
    for dim, output in product((-1, -2), ("float8", "codes", "packed")):
        spec, signs = Spec(again, dim, 32, output), rotation_of(32, True).signs
        wanted = results(quantize.quantize, device, held, spec, None, None, signs)
        found = results(quantize.requantize, device, values, scales, spec, None, None, signs)
        assert all(map(same_bytes, found, wanted)), (dim, output)
    with pytest.raises(ValueError, match=r"packed along rows is uint8 \(M, K / 2\) and \(M, K / 32\); got"):
        quantize.requantize(values.to(device), scales[:, 1:].to(device), Spec(again, -1))


def test_dy_in_float8_both_ways_in_one_reading(device: str) -> None:
    x = spread_lines(256, 384, torch.bfloat16).to(device)
    plan = replace(MXFP4, rule="floor_three_quarters", mask=None)
    key = KEY.to(device)
    sides = [Side(Spec(plan, dim, 32, "float8"), None, None, key) for dim in (-1, -2)]
    for side, found in zip(sides, quantize.quantize_both(x, *sides), strict=True):
        alone = quantize.quantize(x, side.spec, None, None, key)
        assert all(map(same_bytes, cpu_of(found), cpu_of(alone)))


def test_what_float8_cannot_hold_is_refused_by_name() -> None:
    for plan, message in (
        (NVFP4, "this plan has minifloat scales of 16; ask for output 'packed'"),
        (QUEST, "this plan has float32 scales of line; ask for"),
        (replace(MXFP4, block=256), "float8 has a scale for 128 elements; blocks have 256; use smaller ones"),
    ):
        with pytest.raises(ValueError, match=message):
            Spec(plan, output="float8")


# ------------------------------------------------------------------------------------------------------------ rotation


def rotation_of(n: int, signed: bool) -> Rotation:
    draws = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(n))
    return Rotation(n, draws * 2.0 - 1.0 if signed else None)


def rotated(x: Tensor, rotation: Rotation, dim: int) -> Tensor:
    """(M, K) by the reference."""
    view = x.reshape(-1, x.shape[1], 1) if dim == -1 else x[None]
    return reference.rotate(view, rotation).view(x.shape)


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("n", [16, 32, 64, 128])
def test_a_rotation_inside_changes_no_bit(n: int, dim: int, device: str) -> None:
    """Blocks shorter and longer than the rotation; operands of whole matrices and of spans."""
    eden = replace(NVFP4, rule="absmax_fitted", rounding="eden", correction=64)
    for plan, dtype, signed in (
        (MXFP4, torch.bfloat16, True),
        (eden, torch.float32, True),
        (QUEST, torch.bfloat16, False),
        (replace(MXFP4, rule="mse_phase"), torch.float32, True),
    ):
        x = matrix(7, 128, dtype) if dim == -1 else matrix(128, 7, dtype)
        rotation = rotation_of(n, signed)
        turned = rotated(x, rotation, dim)
        spec = Spec(plan, dim, n, "codes")
        wanted = expected_of(x, spec, turned)
        assert list(map(same, run(x, spec, device, turned, rotation.signs)[:3], wanted)) == [True] * 3, plan
        view = x.reshape(-1, plan.span or 128, 1) if dim == -1 else x.reshape(-1, plan.span or 128, 7)
        scale = scale_for(turned, spec)
        if isinstance(scale, Tensor) and scale.ndim:
            scale = scale.repeat_interleave(view.shape[0] // scale.shape[0], 0)
        on_device = Rotation(n, moved(rotation.signs, device))  # pyright: ignore[reportArgumentType]
        found = results(quantize.encode, device, view, scale, KEY, plan, on_device)
        blocks = None if found[1] is None else found[1].reshape(wanted[1].shape)  # pyright: ignore
        assert same(found[0].reshape(x.shape), wanted[0]) and same(blocks, wanted[1]), plan  # pyright: ignore


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("n", [1, 2, 128])
def test_rotations_equal_the_reference(n: int, dim: int, device: str) -> None:
    """There and back, with a mask and without, into both dtypes."""
    shape = (5, 128, 1) if dim == -1 else (2, 64, 37)
    draws = torch.Generator().manual_seed(n)
    for source, signed in ((torch.float32, True), (torch.bfloat16, False)):
        x = torch.randn(shape, generator=draws) * torch.exp2(torch.randint(-140, 9, shape, generator=draws).float())
        x = x.to(source)
        mask = torch.randint(0, 2, shape, generator=draws, dtype=torch.uint8)
        rotation = rotation_of(n, signed)
        on_device = Rotation(n, moved(rotation.signs, device))  # pyright: ignore[reportArgumentType]
        (found,) = results(lambda *a: [hadamard.rotate(*a)], device, x, on_device)
        assert same(found, reference.rotate(x, rotation))
        for passed, dtype in ((mask, torch.bfloat16), (None, torch.float32)):
            (found,) = results(lambda *a: [hadamard.unrotate(*a)], device, x, on_device, passed, dtype)
            assert same(found, reference.unrotate(x, rotation, passed, dtype)), (source, dtype)
    back = reference.rotate(x, rotation)
    assert (reference.unrotate(back, rotation, None, torch.float32) - x).abs().max() < 1e-4 * x.abs().max()


@pytest.mark.parametrize("dim", [-1, -2])
def test_a_key_draws_the_signs_inside(dim: int, device: str) -> None:
    """As random_signs draws them, in each operation that rotates."""
    key = torch.tensor([77, -5], dtype=torch.int32)
    for n in (2, 32, 128):
        given, drawn = Rotation(n, reference.random_signs(n, key)), Rotation(n, key)
        shape = (5, 128, 1) if dim == -1 else (1, 128, 37)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(n))
        assert same(reference.rotate(x, drawn), reference.rotate(x, given))
        on_device = Rotation(n, key.to(device))
        assert same(hadamard.rotate(x.to(device), on_device).cpu(), reference.rotate(x, given))
        back = hadamard.unrotate(x.to(device), on_device, None, torch.float32)
        assert same(back.cpu(), reference.unrotate(x, given, None, torch.float32))
        largest = hadamard.tensor_scale(x.to(device), NVFP4, on_device)
        assert isinstance(largest, Tensor)
        assert same(largest.cpu(), reference.tensor_scale(x, NVFP4, given))  # pyright: ignore[reportArgumentType]
        matrix_ = x.view(5, 128) if dim == -1 else x.view(128, 37)
        spec = Spec(replace(MXFP4, mask=None), dim, n, "codes")
        wanted = results(quantize.quantize, device, matrix_, spec, None, None, given.signs)
        found = results(quantize.quantize, device, matrix_, spec, None, None, key)
        assert all(map(same, found, wanted))


@pytest.mark.parametrize("dim", [-1, -2])
def test_scales_and_mask_bits_inside_an_unrotation_equal_the_chain(dim: int, device: str) -> None:
    """A product in bfloat16, times each scale in float32 in turn, masked, rotated back."""
    draws = torch.Generator().manual_seed(3)
    shape = (70, 96, 1) if dim == -1 else (1, 96, 40)
    x = torch.randn(shape, generator=draws) * torch.exp2(torch.randint(-40, 9, shape, generator=draws).float())
    mask = torch.randint(0, 2, shape, generator=draws, dtype=torch.uint8)
    one = torch.tensor(0.3)
    lines = (torch.rand(70, 1, 1, generator=draws), torch.rand(1, 96, 1, generator=draws))
    if dim == -2:
        lines = (torch.rand(1, 96, 1, generator=draws), torch.rand(1, 1, 40, generator=draws))
    cases = ((16 / 9,), (one,), lines, (lines[1], 1.1), (4 / 3, one))
    passes = (None, mask, reference.join(mask, 1))
    rotations = (None, rotation_of(32, True))
    settings = zip(product(cases, passes), [*product((torch.bfloat16, torch.float32), rotations)] * 4, strict=False)
    for (scales, passed), (dtype, rotation) in settings:
        wanted = x.bfloat16()
        for scale in scales:
            wanted = wanted.float().mul_(scale)
        wanted = reference.unrotate(wanted, rotation, None if passed is None else mask, dtype)
        arguments = (x.bfloat16(), rotation, passed, dtype, scales)
        assert same(reference.unrotate(*arguments), wanted)
        on_device = rotation and Rotation(32, moved(rotation.signs, device))  # pyright: ignore[reportArgumentType]
        scales_there = tuple(moved(scale, device) for scale in scales)
        found = hadamard.unrotate(
            x.bfloat16().to(device),
            on_device,
            moved(passed, device),
            dtype,
            scales_there,  # pyright: ignore
        )
        assert same(found.cpu(), wanted), (scales, dtype, rotation)


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("n", [None, 32])
def test_tensor_scales_equal_the_reference(n: int | None, dim: int, device: str) -> None:
    names = ("nvfp4", "mxfp4", "int4", "int4_sym", "fp8_e4m3", "int4_sym/tensor/float32", "e4m3/128/float32")
    rotation = None if n is None else rotation_of(n, True)
    on_device = None if rotation is None else Rotation(rotation.size, moved(rotation.signs, device))  # pyright: ignore
    for finite, name in product((True, False), names):
        x = hard_lines(64, finite)
        x = x[:, :, None] if dim == -1 else x.mT[None].contiguous()
        for plan in plans(get_format(name)):
            wanted = reference.tensor_scale(x, plan, rotation)
            found = hadamard.tensor_scale(x.to(device), plan, on_device)
            if isinstance(wanted, Tensor):
                assert isinstance(found, Tensor) and same(found.cpu(), wanted), plan
            else:
                assert found == wanted


def test_the_rotation_is_sylvesters(device: str) -> None:
    """Values of a fine grid against the matrix (-1)^popcount(i & j) in float64."""
    n = 64
    index = torch.arange(n)
    parity = sum((index[:, None] & index[None, :]) >> bit & 1 for bit in range(6)) % 2
    h = (1 - 2 * parity).double() / 8
    x, rotation = torch.randn(8, n, generator=torch.Generator().manual_seed(0)), rotation_of(n, True)
    assert rotation.signs is not None
    plan = Plan(get_format("int8_sym").element, "float32", None, "absmax")
    wanted = (x.double() * rotation.signs) @ h
    scale = reference.tensor_scale(wanted.float()[:, :, None], plan)
    codes, *_ = results(quantize.quantize, device, x, Spec(plan, -1, n, "codes"), scale, None, rotation.signs)
    assert codes is not None and isinstance(scale, Tensor)
    assert (codes - wanted / scale.flatten()[:, None]).abs().max() < 0.5 + 1e-4


# ---------------------------------------------------------------------------------------------------- both dims at once


def test_both_dims_in_one_reading_equal_two_readings(device: str) -> None:
    eden = replace(NVFP4, rule="absmax_fitted", rounding="eden", correction=16)
    pairs = (
        (
            Spec(MXFP4, -1, 32, "packed"),
            Spec(replace(MXFP4, rule="floor_three_quarters", mask=None), -2, 128, "packed"),
        ),
        (Spec(eden, -1, 128, "bfloat16"), Spec(replace(MXFP4, rule="mse_phase"), -2, 16, "codes")),
        (Spec(QUEST, -1, None, "packed"), Spec(replace(MXFP4, rounding="stochastic"), -2, 32, "float32")),
    )
    x = matrix(256, 128, torch.bfloat16).to(device)
    for row_spec, column_spec in pairs:
        sides = []
        for spec, key in ((row_spec, KEY), (column_spec, KEY + 1)):
            signs = None if spec.rotation is None else rotation_of(spec.rotation, True).signs
            scale = moved(scale_for(x.cpu(), spec), device)
            sides.append(Side(spec, scale, key.to(device), moved(signs, device)))  # pyright: ignore[reportArgumentType]
        for side, found in zip(sides, quantize.quantize_both(x, *sides), strict=True):
            alone = quantize.quantize(x, side.spec, side.scale, side.key, side.signs)
            assert all(
                same(*(None if each is None else each.cpu() for each in pair))
                for pair in zip(found, alone, strict=True)
            )


# ------------------------------------------------------------------------------------------------ operators and errors


def test_the_operators_keep_torchs_rules(device: str) -> None:
    x = matrix(64, 128).to(device)
    key, scale, signs = KEY.to(device), torch.ones((), device=device), torch.ones(32, device=device)
    passed = torch.ones(64, 128, dtype=torch.uint8, device=device)
    rows = {out: str(Spec(replace(MXFP4, rounding="stochastic"), -1, 32, out)) for out in ("codes", "packed")}
    columns = str(Spec(replace(NVFP4, mask=MASKS[2]), -2, None, "packed"))
    calls = [
        *((quantize._quantize, (x, None, None, key, signs, spec, 128)) for spec in rows.values()),
        (quantize._quantize_both, (x, None, key, None, rows["codes"], scale, None, None, columns)),
        (hadamard._turn, (x, passed, signs, None, scale, [2.0, 1.0], 32, -2, True, torch.bfloat16)),
        (hadamard._largest, (x, signs, 32, -1, False)),
        (packing._pack, (x, torch.ones(256, 1, 1, device=device), rows["codes"])),
        (packing._unpack, (passed.view(-1), passed.view(-1)[:512], rows["codes"], [128, 128, 1], torch.bfloat16)),
        (packing._join, (passed, 1)),
        (packing._split, (passed, 1, 5)),
    ]
    for operator, arguments in calls:
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


def test_a_compiled_model_sees_the_operators(device: str) -> None:
    """In one graph, and with equal bits."""
    plan = replace(MXFP4, rounding="stochastic")

    def work(x: Tensor, key: Tensor, signs: Tensor) -> tuple:
        rotation = Rotation(32, signs)
        values, _, mask = quantize.operand(x * 2, hadamard.tensor_scale(x, plan), key, plan, torch.bfloat16, rotation)
        return values, hadamard.unrotate(values, rotation, mask, torch.float32) + 1

    arguments = [each.to(device) for each in (matrix(4, 32)[:, :, None], KEY, torch.ones(32))]
    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    assert all(map(same, (each.cpu() for each in compiled(*arguments)), (each.cpu() for each in work(*arguments))))


def test_a_spec_is_read_as_it_is_spelled() -> None:
    specs = [Spec(plan, -2, 32, "packed") for name in FORMATS for plan in plans(get_format(name))]
    assert [quantize.read_spec(str(spec)) for spec in specs] == specs
    assert len({str(spec) for spec in specs}) == len(set(specs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 64, dtype=torch.float16)}, "takes float32 or bfloat16; got torch.float16; convert it"),
        ({"x": torch.zeros(4, 48)}, r"dim -1 must be a multiple of 32; x has \(4, 48\); pad it"),
        ({"plan": replace(MXFP4, block=24)}, "block that is a power of two up to 256; got 24"),
        ({"rotation": 20}, "rotation that is a power of two up to 256; got 20"),
        ({"rotation": 64, "signs": torch.ones(32)}, r"a rotation of 64 takes as many signs; got \(32,\)"),
        (
            {"plan": replace(MXFP4, rounding="stochastic")},
            r"'stochastic' draws random bits; got no key; give \(2,\) int32",
        ),
        ({"plan": NVFP4}, "rule 'absmax' needs a tensor scale; got None"),
        ({"plan": QUEST, "scale": torch.ones(3, 1)}, r"is \(\) or one of 4 lines; got \(3, 1\)"),
        ({"plan": QUEST, "scale": torch.ones(4).double()}, "a tensor scale is float32; got torch.float64"),
        (
            {"plan": replace(QUEST, rule="learned"), "output": "packed"},
            "'learned' cannot be packed: a NaN would be lost",
        ),
        (
            {"plan": replace(NVFP4, scale_element=get_format("e2m1/16/e3m2").scale_element), "output": "packed"},
            "block scales up to 28.0 cannot be packed: their format has no NaN; use e4m3 or ue5m3",
        ),
    ],
)
def test_what_has_no_kernel_is_refused_by_name(change: dict, message: str, device: str) -> None:
    settings = {
        "x": torch.zeros(4, 64),
        "plan": MXFP4,
        "rotation": None,
        "output": "codes",
        "scale": None,
        "signs": None,
    }
    settings |= change
    spec = Spec(settings["plan"], -1, settings["rotation"], settings["output"])
    with pytest.raises(ValueError, match=message):
        scale, signs = (moved(settings[name], device) for name in ("scale", "signs"))
        quantize.quantize(settings["x"].to(device), spec, scale, None, signs)  # pyright: ignore[reportArgumentType]


def test_a_rotation_that_is_no_power_of_two_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match="needs a rotation that is a power of two; got 12"):
        quantize.encode(torch.zeros(3, 32, 1, device=device), 1.0, None, MXFP4, Rotation(12, base=torch.ones(12, 12)))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_a_cpu_tensor_is_refused_outside_the_interpreter() -> None:
    with pytest.raises(ValueError, match=r"'triton' cannot run on cpu: .*move the tensor to cuda"):
        quantize.encode(torch.zeros(1, 32, 1), 1.0, None, MXFP4)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
@pytest.mark.parametrize(("rule", "dim"), [("std", -1), ("eden", -2)])
def test_code_for_a_gpu_rounds_as_written(rule: str, dim: int) -> None:
    """Compiled for an H100 without one: nothing fused, nothing flushed to zero, no approximate division or root, NaN
    not clamped away (the interpreter keeps it in any case), wide loads and stores, no arrays in local memory."""
    spec = Spec(replace(NVFP4, rule="absmax_fitted", rounding="eden", correction=16) if rule == "eden" else MXFP4, dim)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    command = [sys.executable, __file__, str(replace(spec, rotation=32, output="packed"))]
    ptx = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    for wrong in (".ftz", ".approx", "div.full", ".local"):
        assert wrong not in ptx, wrong
    # Written as fused: one for each element, 32 or 64 a thread, in the two of the rotation's five stages that need
    # another thread's element; two for each quotient, of 64 elements and of 8 block scales, whose divisors are 8 blocks
    # and the tensor scale; one for the draw of each of those 8.
    fused, inverses = (2 * 64 + 2 * (64 + 8) + 8, 8 + 1) if rule == "eden" else (2 * 32, 0)
    assert ptx.count("fma.") == ptx.count("fma.rn.f32") == fused and ptx.count("rcp.rn.f32") == inverses
    for right in ("ld.global.v4", "st.global.v4", "min.NaN", "div.rn.f32" if rule == "eden" else "sqrt.rn.f32"):
        assert right in ptx, right


def print_ptx(spec: Spec) -> None:
    """Of the kernel for a large bfloat16 matrix on compute capability 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from qtrain_kernels.triton_quantize import quantize_kernel

    tile = quantize.tile_of(spec.dim, spec.span, 4096)
    job = quantize._job(spec, tile, "single" if quantize._reads_scale(spec.plan) else "none", True)
    types = dict.fromkeys(("rows", "columns", "per"), "i32") | {"x": "*bf16", "signs": "*fp32", "scale": "*fp32"}
    types |= {"key": "*i32", "values": "*u8", "block_scales": "*u8", "masks": "*u8"}
    absent = {"JOB", "x_scales", "float8", "float8_scales"} | ({"masks"} if spec.plan.mask is None else set())
    absent |= {"scale"} if job.scales == "none" else set()
    names = quantize_kernel.arg_names
    signature = {name: "constexpr" if name in absent else types[name] for name in names}
    constants = {(i,): job if name == "JOB" else None for i, name in enumerate(names) if name in absent}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in absent}
    options = {"num_warps": tile.warps, **quantize.UNFUSED}
    source = ASTSource(quantize_kernel, signature, constants, aligned)
    print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    passed, shown = passed_in_the_interpreter(__file__)
    assert passed > 150, shown


if __name__ == "__main__":
    print_ptx(quantize.read_spec(sys.argv[1]))
