"""Triton's kernels equal the reference bit for bit: on a GPU, and without one in Triton's interpreter.

The interpreter must be chosen before triton is imported, and other tests import it: `test_in_the_interpreter` runs this
file once more in a process of its own. There the kernels take CPU tensors; here they need a CUDA device.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
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

from qtrain_kernels import gpu, gpu_few_rows, qtensor, reference, triton_quantize
from qtrain_kernels.formats import Format, get_format
from qtrain_kernels.plans import (
    SCALE_RULES,
    Mask,
    Packed,
    Plan,
    Rotation,
    _misfit,
    can_pack,
    field_width,
    stored_integer,
)
from qtrain_kernels.qtensor import STORAGES, Layout, QTensor, Side
from qtrain_kernels.triton_quantize import divisor, quotient

ROOT = Path(__file__).parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter computes by numpy, which warns of what IEEE arithmetic defines: inf - inf, overflow, NaN to integer.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

KEY = torch.tensor([1374496523, -987654321], dtype=torch.int32)  # high bits: the index alone has few
MASKS = (Mask("inside", 6.0), Mask("within", 2.5), Mask("error", 0.5))
FORMATS = (
    *("mxfp4", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8", "e3m0/16/e8m0"),
    *("nvfp4", "e2m1/16/ue5m3", "e4m3/32/e4m3", "int4_sym/32/e4m3", "e2m1/256/e4m3", "e2m1/32/e3m2"),
    *("int1", "int4", "int8", "int1.585", "int4_sym", "fp8_e4m3", "fp4_e2m1", "e1m2/row/float32"),
    *("e3m0/tensor/float32", "int4_sym/tensor/float32", "e4m3/128/float32", "int4/32/float32"),
    *("int4_sym/32/float16", "int4/32/bfloat16"),
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


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal bits, the sign of zero included; a NaN is any NaN."""
    if a is None or b is None:
        return a is b
    if a.is_floating_point() and b.is_floating_point() and a.dtype == b.dtype:
        a, b = (torch.where(x.isnan(), torch.nan, x).view(torch.int32) for x in (a.float(), b.float()))
    return a.dtype == b.dtype and torch.equal(a, b)


def moved(x: Tensor | None, device: str) -> Tensor | None:
    return None if x is None else x.to(device)


def cpu_of(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [moved(each, "cpu") for each in tensors]


def on_device(rotation: Rotation | None, device: str) -> Rotation | None:
    return rotation and Rotation(rotation.size, moved(rotation.signs, device))


def side_on(side: Side, device: str) -> Side:
    key, learned = moved(side.key, device), moved(side.learned, device)
    return replace(side, rotation=on_device(side.rotation, device), key=key, learned=learned)


def layout(plan: Plan, x: Tensor, dim: int = -1, storage: str = "float32", blocks: bool = True) -> Layout:
    """Of x, with its block scales if any."""
    return Layout(plan, (x.shape[0], x.shape[1]), dim).stored(storage, blocks)  # pyright: ignore[reportArgumentType]


def of_reference(x: Tensor, side: Side) -> list[Tensor | None]:
    """What gpu.quantize should give, by the reference. Packed and float8 codes are made of float32 values: the
    bfloat16 ones that qtensor.quantize makes them of lose products below 2^-133."""

    def tensors(layout: Layout) -> list[Tensor | None]:
        given = (side.rotation, side.key, side.learned, "reference")
        held = layout.stored("float32", True)
        if layout.flat or qtensor.obstacle(held, layout):
            found = qtensor.quantize(x, layout, *given)
        else:
            found = qtensor.quantize(x, held, *given).to(layout, "reference")
        return [found.codes, found.block_scale, found.tensor_scale, found.mask]

    return tensors(side.layout) + (tensors(side.layout.unmasked.stored("packed"))[:2] if side.packed else [])


def found_by_triton(x: Tensor, side: Side, device: str) -> list[Tensor | None]:
    return cpu_of(gpu.quantize(x.to(device), side_on(side, device)))


def differing(x: Tensor, side: Side, device: str) -> list[int]:
    """Places of the tensors that are not the reference's."""
    pairs = zip(found_by_triton(x, side, device), of_reference(x, side), strict=True)
    return [place for place, pair in enumerate(pairs) if not same(*pair)]


# --------------------------------------------------------------------------------------------- equal to the reference


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("name", FORMATS)
def test_every_plan_gives_the_references_tensors(name: str, dim: int, device: str) -> None:
    """Values, block scales, tensor scale and mask, and in the same launch what is packed."""
    fmt = get_format(name)
    alone = fmt.scale_kind != "minifloat" and fmt.block != "tensor"  # a NaN makes its block or row NaN, and no other
    for plan in plans(fmt):
        x = hard_lines(plan.span or 88, not alone)
        x = x if dim == -1 else x.T.contiguous()
        side = Side(layout(plan, x, dim), None, KEY, packed=can_pack(plan) and not layout(plan, x, dim).lacks("packed"))
        found, wanted = found_by_triton(x, side, device), of_reference(x, side)
        assert list(map(same, found[:4], wanted[:4])) == [True] * 4, plan
        # codes that overflow in float32 cannot be told from their values
        held = (wanted[0] if dim == -1 else wanted[0].T).isinf().any(1)  # type: ignore[union-attr]
        for ours, theirs in zip(found[4:], wanted[4:], strict=True):
            assert same(ours, theirs) or same(ours[~held], theirs[~held]), plan  # type: ignore[index]


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("name", FORMATS)
def test_every_storage_holds_the_references_tensors(name: str, dim: int, device: str) -> None:
    """Of matrices that fill no tile and no group of 128; masks that fill no byte; with the packed codes beside."""
    fmt = get_format(name)
    plan = Plan(
        fmt.element, fmt.scale_kind, fmt.block_size, fmt.default_scale, scale_element=fmt.scale_element,
        per_tensor=fmt.block == "tensor", mask=MASKS[2],
    )  # fmt: skip
    for number, storage in enumerate(STORAGES):
        length = (37, 48)[number % 2] if plan.span is None else plan.span * (1 if plan.span > 128 else 5)
        lines = (21, 16)[number % 2]
        x = matrix(lines, length) if dim == -1 else matrix(length, lines)
        if storage in ("swizzled", "float8") or Layout(plan, (1, 1), dim).lacks(storage):
            continue
        held = layout(plan, x, dim, storage, blocks=number % 2 == 1)
        assert differing(x, Side(held, packed=not held.lacks("packed")), device) == [], storage
        if storage != "float32":
            assert differing(x.bfloat16(), Side(held.unmasked), device) == [], storage


@pytest.mark.parametrize("dim", [-1, -2])
def test_stochastic_rounding_goes_up_where_the_draw_is_below_the_distance(dim: int, device: str) -> None:
    """Not where it equals the distance, as here everywhere, nor in any later float."""
    plan = Plan(E2M1, "e8m0", 32, "floor", "stochastic")
    x = torch.zeros(6, 32) if dim == -1 else torch.zeros(64, 3)
    draws = reference.uniform(reference.element_index(x[:, :, None] if dim == -1 else x[None]), KEY).view(x.shape)
    for distance, up in ((draws, 0.0), (torch.nextafter(draws, torch.tensor(2.0)), 0.5)):
        x = distance * 0.5
        first = (slice(None), slice(0, None, 32)) if dim == -1 else (slice(0, None, 32), slice(None))
        x[first] = 4.0  # a scale of 1
        codes, blocks, *_ = found_by_triton(x, Side(layout(plan, x, dim), None, KEY), device)
        assert codes is not None and blocks is not None and (blocks == 1).all() and (codes[first] == 4).all()
        codes[first] = up
        assert (codes == up).all()


def test_a_tie_of_four_and_six_takes_six(device: str) -> None:
    x = torch.zeros(2, 16)
    x[0, 0], x[1, 3] = 6.0, -3.0
    side = Side(layout(replace(NVFP4, rule="four_over_six"), x))
    values, blocks, scale, _ = found_by_triton(x, side, device)
    assert values is not None and blocks is not None and scale is not None
    assert blocks.flatten().tolist() == [256, 128] and same(scale, torch.tensor(6.0 / (6 * 256)))
    assert (values / blocks).abs().amax(1).tolist() == [6, 6]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_under_a_tensor_scale_makes_all_nan(bad: float, device: str) -> None:
    x = hard_lines(16, True)[:8].clone()
    x[3, 3] = bad
    for plan in plans(get_format("nvfp4")):
        plan = replace(plan, correction=plan.correction and 16)
        values, *_ = found_by_triton(x, Side(layout(plan, x, -1, "bfloat16"), None, KEY), device)
        assert values is not None and values.isnan().all()


def test_a_learned_scale(device: str) -> None:
    x = hard_lines(40, False)
    plan = Plan(get_format("int4").element, "float32", None, "learned", mask=MASKS[1], per_tensor=True)
    for storage in ("float32", "bfloat16"):
        assert differing(x, Side(layout(plan, x, -1, storage), learned=torch.tensor(0.37)), device) == []


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
        divide_kernel[(1,)](*given, out, size, **gpu.UNFUSED)
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
    plan = MATRIX_PLANS[name]
    lengths = {1: (70, 33), 16: (48, 16), 32: (96, 32), 64: (64, 128)}[plan.span or 1]
    for (length, lines), dtype in product(zip(lengths, (37, 65), strict=True), (torch.float32, torch.bfloat16)):
        x = matrix(lines, length, dtype) if dim == -1 else matrix(length, lines, dtype)
        held = layout(plan, x, dim, "float32" if dtype == torch.float32 else "bfloat16", blocks=lines == 37)
        assert differing(x, Side(held, None, KEY), device) == [], (x.shape, dtype)


def test_an_empty_matrix_gives_an_empty_result(device: str) -> None:
    assert gpu.rotate(torch.empty(0, 32, 1, device=device), Rotation(32)).shape == (0, 32, 1)
    for plan, storage, dim in product((replace(MXFP4, mask=MASKS[2]), NVFP4), ("float32", "packed"), (-1, -2)):
        x = torch.empty(0, 64) if dim == -1 else torch.empty(64, 0)
        held = layout(plan, x, dim, storage)
        found = found_by_triton(x, Side(held, Rotation(32)), device)
        assert QTensor.of(held, [each for each in found if each is not None]).shape == x.shape
    x = torch.empty(0, 64)
    sides = Side(layout(MXFP4, x)), Side(layout(NVFP4, x, -2, "packed"))
    for side, found in zip(sides, gpu.quantize_both(x.to(device), *sides), strict=True):
        assert all(map(same, cpu_of(found), of_reference(x, side)))


# ------------------------------------------------------------------------------------------------------------- packed


PACKED = (
    *("mxfp4", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8", "e3m0/16/e8m0", "nvfp4"),
    *("e2m1/16/ue5m3", "int1", "int4", "int7", "int8", "int1.585", "int4_sym", "fp8_e4m3", "fp4_e2m1"),
    *("int4_sym/32/float16", "int8_sym/64/bfloat16", "int4/16/float32", "e2m1/16/float32"),
)


def every_product(fmt: Format, plan: Plan) -> tuple[Tensor, Tensor | None]:
    """Every code under every block scale, NaN among them: (blocks, span, 1), and the scales. Without blocks every code,
    of a number that fills no program."""
    codes = torch.tensor([*fmt.element.levels(), *([] if plan.element.mantissa_bits is None else [-0.0])])
    if plan.block is None:
        return codes.repeat(101).view(101, -1, 1), None
    scales = reference.power_of_two(torch.arange(256, dtype=torch.int32))
    if fmt.scale_element:
        scales = torch.tensor([*fmt.scale_element.magnitudes()[1:], float("nan")])  # none is zero
    if fmt.scale_kind in reference.SCALE_DTYPES:  # every 29th, NaN among them
        dtype = reference.SCALE_DTYPES[fmt.scale_kind]
        scales = torch.arange(1, 2**15, 29, dtype=torch.int32).to(torch.int16).view(dtype).float()
        scales = torch.where(scales < 1e37, scales, float("nan"))  # products are finite
    codes = torch.cat((codes, codes.new_zeros(-len(codes) % plan.block)))
    repeated = scales[:, None].expand(-1, len(codes) // plan.block).reshape(-1, 1, 1).contiguous()
    return (scales[:, None] * codes).reshape(-1, plan.block, 1), repeated


@pytest.mark.parametrize("name", PACKED)
def test_what_is_packed_comes_back(name: str, device: str) -> None:
    """Every code under every scale, in each dtype that holds it."""
    fmt = get_format(name)
    plan = Plan(
        fmt.element, fmt.scale_kind, fmt.block_size, fmt.default_scale, scale_element=fmt.scale_element,
        per_tensor=fmt.block == "tensor",
    )  # fmt: skip
    products, blocks = every_product(fmt, plan)

    def back(values: Tensor, dtype: torch.dtype) -> Tensor:
        packed = reference.pack(values, blocks, plan)
        given = Packed(packed.codes.to(device), moved(packed.scales, device))
        return gpu.unpack(given, values.shape, plan, dtype).cpu()

    for dtype in (torch.float32, *([torch.bfloat16] if plan.exact_in_bfloat16 else [])):
        values = products.to(dtype)
        found = back(values, dtype)
        if fmt.element.mantissa_bits is not None:
            assert same(found, values), dtype
        assert torch.equal(found.isnan(), values.isnan()) and torch.equal(found.nan_to_num(0), values.nan_to_num(0))
    if plan.block is None and fmt.element.mantissa_bits is None:
        unit, offset = stored_integer(fmt.element)
        stored = (products / unit - offset).to(torch.int8)
        assert same(back(stored, torch.int8), stored)


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
        _, scales, *_ = found_by_triton(x, Side(layout(plan, x, -1, "packed")), device)
        wanted = torch.zeros(4, 64 // (plan.block or 1), dtype=torch.bool)
        wanted[poisoned] = True
        assert scales is not None
        assert torch.equal(scales == (0x7F if name == "nvfp4" else 0xFF), wanted), name


# ------------------------------------------------------------------------------------- few rows times a packed weight


FEW_ROWS = (
    *("int4_sym/32/float16", "int4/128/bfloat16", "int2_sym/16/float16", "mxfp4", "nvfp4", "e2m1/256/e4m3", "mxint8"),
    *("mxfp8_e4m3", "mxfp8_e5m2", "int1", "int1.585", "int4", "int8", "e2m1/tensor/float32", "int4/32/float32"),
)
EXACT = ("int4_sym/32/float16", "int8_sym/64/bfloat16", "mxfp4", "nvfp4", "mxfp8_e4m3", "int4_sym")


def weight_of(values: Tensor, name: str, device: str) -> QTensor:
    """values (N, K), packed as a format's default scale rule rounds them; under float32 scales of blocks that are
    given, every other one below zero."""
    fmt = get_format(name)
    given = fmt.block_size is not None and fmt.scale_kind == "float32"
    plan = Plan(
        fmt.element, fmt.scale_kind, fmt.block_size, "learned" if given else fmt.default_scale,
        scale_element=fmt.scale_element, per_tensor=fmt.block == "tensor",
    )  # fmt: skip
    scales = None
    if given:
        scales = values.view(len(values), -1, fmt.block_size).abs().amax(-1) / fmt.element.max
        scales[:, ::2] *= -1
    q = qtensor.quantize(values, layout(plan, values, storage="packed"), learned=scales, backend="reference")
    return QTensor.of(q.layout, [each.to(device) for each in q.tensors()])


@pytest.mark.parametrize("name", FEW_ROWS)
def test_few_rows_are_the_products_of_the_values(name: str, device: str) -> None:
    """Within the bound that the module states, of sizes that fill no tile, turn or part; the same for any rows."""
    fmt, draws = get_format(name), torch.Generator().manual_seed(1)
    block = fmt.block_size or 8
    sizes = (70, 80), (9, max(2048 // field_width(fmt.element), 4 * block))
    other = (torch.float16, torch.float32)[FEW_ROWS.index(name) % 2]
    for (n, k), dtype in zip(sizes, (other, torch.bfloat16), strict=True):
        k = (k // block + 1) * block
        weight = torch.randn(n, k, generator=draws) * torch.logspace(-3, 1, k)[torch.randperm(k, generator=draws)]
        q = weight_of(weight, name, device)
        ready, values = gpu_few_rows.FewRows(q), q.dequantize("reference").cpu().double()
        assert n == 70 or gpu_few_rows._parts(q.layout)[1] > 1
        x = torch.randn(40, k, generator=draws).to(dtype)
        found = ready(x.to(device)).cpu()
        exact, size = x.double() @ values.T, x.double().abs() @ values.abs().T
        bound = (k + 64) * 2.0**-23 * size
        assert found.dtype == torch.float32 and ((found.double() - exact).abs() <= bound).all(), (k, dtype)
        assert (exact.abs() > 4 * bound).float().mean() > 0.9, "the bound leaves no room for another product"
        assert all(same(ready(x[:rows].to(device)).cpu(), found[:rows]) for rows in (1, 17)), (k, dtype)


@pytest.mark.parametrize("name", EXACT)
def test_few_rows_are_exact_where_their_sums_are(name: str, device: str) -> None:
    """Codes times powers of two, by hand, and small integers: every order of the sums gives the same float32."""
    fmt, n, k = get_format(name), 67, 704
    draws = torch.Generator().manual_seed(2)
    codes = torch.tensor([code for code in fmt.element.levels() if code == 0 or abs(code) >= fmt.element.max / 64])
    block = fmt.block_size or k
    weight = codes[torch.randint(len(codes), (n, k // block, block), generator=draws)]
    weight[:, :, 0] = fmt.element.max  # so that the scale is the power of two
    weight *= torch.exp2(torch.randint(-2, 3, (n, k // block, 1), generator=draws).float())
    if name == "nvfp4":
        weight[0, 0] = torch.eye(block)[0] * 6 * 448  # so that the scale of the tensor is 1
    weight = weight.view(n, k)
    ready = gpu_few_rows.FewRows(weight_of(weight, name, device))
    for dtype, rows in ((torch.bfloat16, 3), (torch.float16, 64), (torch.float32, 1)):
        x = torch.randint(-3, 4, (rows, k), generator=draws).to(dtype)
        assert same(ready(x.to(device)).cpu(), (x.double() @ weight.double().T).float()), dtype


def test_few_rows_are_told_without_the_scale_of_the_lines(device: str) -> None:
    for name, k in (("int4", 256), ("nvfp4", 640), ("int4_sym/tensor/float32", 640)):
        q = weight_of(matrix(20, k), name, device)
        assert q.tensor_scale is not None
        ready, x = gpu_few_rows.FewRows(q), torch.randn(2, k, generator=torch.Generator().manual_seed(3)).to(device)
        assert same((ready(x, scaled=False) * q.tensor_scale.view(-1)).cpu(), ready(x).cpu()), name


def test_rows_are_rotated_and_rounded_before_their_product(device: str) -> None:
    """12: an order for which Triton has no kernel, which auto takes from the reference."""
    q, x = weight_of(matrix(20, 384), "int4", device), matrix(3, 384).to(device)
    signs = torch.tensor([1, 2], dtype=torch.int32, device=device)
    for size, base, dtype in ((128, None, torch.bfloat16), (12, torch.eye(12, device=device), torch.float32)):
        rotation = Rotation(size, signs, base)
        turned = reference.rotate(x.unsqueeze(-1), rotation).squeeze(-1)
        wanted = gpu_few_rows.FewRows(q)(turned.to(dtype)).to(dtype)
        assert torch.equal(gpu_few_rows.FewRows(q, rotation).linear(x, dtype), wanted)


def test_few_rows_show_what_is_no_number(device: str) -> None:
    """A scale in its line alone, also where that is the last; a row of x in its row."""
    for name, nan in (("mxfp4", 255), ("nvfp4", 0x7F), ("int4_sym/32/float16", torch.nan)):
        q = weight_of(torch.ones(65, 160), name, device)
        assert q.block_scale is not None
        q.block_scale[64, 3] = nan
        x = torch.ones(3, 160)
        x[1, 5] = torch.inf
        found = gpu_few_rows.FewRows(q)(x.to(device)).cpu()
        assert found[:, 64].isnan().all() and found[1, :64].isinf().all() and found[::2, :64].isfinite().all()


def test_what_is_no_product_of_few_rows_is_refused_by_name(device: str) -> None:
    def reason(name: str, k: int = 256) -> str | None:
        return gpu_few_rows.lacks(weight_of(torch.ones(2, k), name, "cpu").layout)

    assert reason("nf4") == "codes of a table are not decoded"
    assert reason("int4", 33) == "its lines of 33 codes are no whole bytes"
    assert reason("e2m1/8/e8m0") == "its blocks of 8 are shorter than 16"
    assert (
        reason("int4_sym/48/float16", 96) == "backend 'triton' needs a block that is a power of two up to 256; got 48"
    )
    assert reason("mxfp4") is None
    with pytest.raises(ValueError, match="is not multiplied in its bits: its lines of 33 codes are no whole bytes"):
        gpu_few_rows.FewRows(weight_of(torch.ones(2, 33), "int4", device))
    ready = gpu_few_rows.FewRows(weight_of(torch.ones(2, 32), "e5m1/32/e8m0", device))
    for shape in ((65, 32), (0, 32), (1, 64), (32,)):
        with pytest.raises(ValueError, match=r"x must be \(1 to 64, 32\) on .*; give fewer rows, or dequantise"):
            ready(torch.ones(shape, device=device))
    for dtype in (torch.float16, torch.float64):  # 98304 is a code
        with pytest.raises(ValueError, match=rf"x must be a float .* that holds the codes; got {dtype}"):
            ready(torch.ones(1, 32, dtype=dtype, device=device))


# --------------------------------------------------------------------------------------------------------------- float8


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
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "e4m3/128/float32"])
def test_float8_equals_what_a_qtensor_becomes(name: str, dim: int, device: str) -> None:
    """Of matrices that fill groups and tiles, and that do not; scales up to 40 octaves apart, and a NaN."""
    fmt = get_format(name)
    for (length, lines), rule in product(((256, 128), (160, 37)), ("std", fmt.default_scale)):
        if _misfit(fmt, rule) or length % (fmt.block_size or 1):
            continue
        plan = Plan(fmt.element, fmt.scale_kind, fmt.block_size, rule, mask=MASKS[0])
        x = spread_lines(lines, length, torch.bfloat16)
        x = x if dim == -1 else x.T.contiguous()
        held = layout(plan, x, dim, "float8_128")
        side = Side(held, rotation_of(32, True), packed=not held.lacks("packed"))
        assert differing(x, side, device) == [], (rule, length)


@pytest.mark.parametrize("dim", [-1, -2])
def test_float8_codes_by_hand(dim: int, device: str) -> None:
    """MXFP4 by the floor rule in float64: E2M1 codes to nearest even, times their power of two over the largest of four
    such powers / 64, in torch's float8; one scale each 128, groups first."""
    for lines, length in ((37, 160), (128, 256)):
        x = spread_lines(lines, length, torch.bfloat16)
        x[7, 9] = 1.0
        blocks = x.double().reshape(lines, -1, 32)
        powers = (torch.frexp(blocks.abs().amax(2)).exponent - 3.0).clamp_min(-127).exp2()
        u = blocks / powers[..., None]
        step = torch.where(u.abs() < 2, 0.5, torch.where(u.abs() < 4, 1.0, 2.0))
        values = ((u / step).round() * step).clamp(-6, 6) * powers[..., None]
        powers[blocks.abs().amax(2) == 0] = 0.0
        missing = -powers.shape[1] % 4
        groups = torch.nn.functional.pad(powers, (0, missing)).reshape(lines, -1, 4).amax(2) / 64
        scales = groups.clamp_min(2.0**-126)
        codes = values.reshape(lines, length) / scales.repeat_interleave(128, 1)[:, :length]
        given = x if dim == -1 else x.T.contiguous()
        side = Side(layout(Plan(E2M1, "e8m0", 32, "floor"), given, dim, "float8_128"))
        found, found_scales, *_ = found_by_triton(given, side, device)
        assert found is not None and found_scales is not None
        assert torch.equal(found_scales.double(), scales.T)
        assert torch.equal(found.float(), codes.float().to(torch.float8_e4m3fn).float())


def test_float8_is_exact_down_to_14_octaves_below_the_largest_scale(device: str) -> None:
    """Every code of E2M1 under every such scale; one octave further it is not."""
    plan = Plan(E2M1, "e8m0", 32, "floor")
    levels = torch.tensor([*E2M1.levels(), *([6.0] * 17)])
    for octaves, exact in ((14, True), (15, False)):
        x = torch.stack((levels, levels * 2.0**-octaves, levels * 2.0**-3, levels * 2.0 ** (1 - octaves))).view(1, 128)
        codes, scales, *_ = found_by_triton(x, Side(layout(plan, x, -1, "float8_128")), device)
        assert codes is not None and scales is not None
        assert torch.equal(codes.float() * scales, x) == exact


def test_a_packed_matrix_quantised_again_is_the_one_it_holds(device: str) -> None:
    """Along either dim, without writing it between; under a tensor scale after it."""
    x = spread_lines(128, 192, torch.bfloat16)
    x[7, 9] = 0.0
    plan = replace(MXFP4, mask=None)
    held = qtensor.quantize(x, layout(plan, x, -1, "packed"), backend="reference")
    there = replace(held, codes=held.codes.to(device), block_scale=moved(held.block_scale, device))
    values, again = held.dequantize("reference"), replace(plan, rule="floor_three_quarters")
    assert gpu.requantizes(held.layout) and not gpu.requantizes(layout(again, x, -1, "packed"))
    for dim, storage in product((-1, -2), ("float8_128", "float32", "packed")):
        for next_plan in (again, *([] if storage == "float8_128" else [NVFP4])):
            side = Side(layout(next_plan, x, dim, storage), rotation_of(32, True))
            found = cpu_of(gpu.quantize(there, side_on(side, device)))
            assert all(map(same, found, of_reference(values, side))), (dim, storage)
    for other in (held.to("bfloat16", "reference"), qtensor.quantize(x, layout(plan, x, -2, "packed"))):
        with pytest.raises(ValueError, match=r"quantises again what is MXFP4 packed along rows; got Layout"):
            gpu.quantize(other, Side(layout(again, x)))


# Tiles by their lines and elements along the contraction, as the recipes have them: NVIDIA's, Jetfire's, DeepSeek's.
TILES = {
    "nvfp4 16x16": (16, Plan(E2M1, "minifloat", 256, "absmax", scale_element=NVFP4.scale_element, mask=MASKS[0])),
    "mxfp4 32x32": (32, Plan(E2M1, "e8m0", 1024, "rceil", rounding="stochastic", mask=MASKS[1])),
    "int8 32x32": (32, Plan(get_format("int8_sym").element, "float32", 1024, "absmax")),
    "fp8 128x128": (128, Plan(get_format("fp8_e4m3").element, "float32", 16384, "absmax")),
    "mxfp4 8x64": (8, Plan(E2M1, "e8m0", 512, "floor", mask=MASKS[2])),
}


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("name", TILES)
def test_tiles_equal_the_reference(name: str, dim: int, device: str) -> None:
    """Of matrices that tiles fill, and that they do not, in each storage; rotated, and under a NaN."""
    lines, plan = TILES[name]
    for shape, dtype in (((128, 256), torch.bfloat16), ((37, 200), torch.float32)):
        x = spread_lines(*shape, dtype)
        x = x if dim == -1 else x.T.contiguous()
        whole = Layout(plan, (x.shape[0], x.shape[1]), dim, rows=lines)
        storages = [storage for storage in ("float32", "bfloat16", "float8_128") if not whole.lacks(storage)]
        rotations = [None, *([] if x.shape[dim] % 64 else [rotation_of(64, True)])]
        for storage, rotation in product(storages, rotations):
            side = Side(whole.stored(storage, True), rotation, KEY)  # pyright: ignore[reportArgumentType]
            assert differing(x, side, device) == [], (shape, storage, rotation)


def test_both_dims_of_a_matrix_in_tiles_equal_the_reference(device: str) -> None:
    x, (lines, plan) = spread_lines(160, 200, torch.bfloat16), TILES["mxfp4 32x32"]
    plan = replace(plan, mask=None)
    rows, columns = (Side(Layout(plan, (160, 200), dim, "bfloat16", lines), None, KEY) for dim in (-1, -2))
    found = gpu.quantize_both(x.to(device), side_on(rows, device), side_on(columns, device))
    for given, side in zip(found, (rows, columns), strict=True):
        assert all(map(same, cpu_of(given), of_reference(x, side)))


def test_tiles_in_float8_are_saved_in_floats(device: str) -> None:
    """Where float8 may round codes, and no bits hold tiles, what is saved is made of the floats that float8 is made
    of."""
    x, (lines, plan) = spread_lines(64, 256, torch.bfloat16), TILES["mxfp4 32x32"]
    side = Side(Layout(replace(plan, mask=None), (64, 256), -1, "float8_128", lines), None, KEY, packed=True)
    found = qtensor.quantize_side(x.to(device), side_on(side, device), "triton")
    expected = qtensor.quantize_side(x, side, "reference")
    for ours, reference_s in zip(found, expected, strict=True):
        assert ours is not None and reference_s is not None and ours.layout == reference_s.layout
        assert all(map(same, cpu_of([*ours.tensors()]), reference_s.tensors()))
    assert found[1] is not None and found[1].layout.storage == "bfloat16"


def test_tiles_of_rules_that_see_more_than_the_largest_are_refused(device: str) -> None:
    plan = replace(TILES["mxfp4 32x32"][1], rule="mse")
    x = torch.ones(32, 32, device=device)
    with pytest.raises(ValueError, match=r"finds scales of tiles by their largest magnitude alone; rule 'mse'"):
        gpu.quantize(x, Side(Layout(plan, (32, 32), rows=32), None, KEY.to(device)))


def test_a_packed_matrix_is_quantised_again_into_tiles(device: str) -> None:
    x = spread_lines(128, 192, torch.bfloat16)
    x[7, 9] = 0.0
    held = qtensor.quantize(x, layout(replace(MXFP4, mask=None), x, -1, "packed"), backend="reference")
    there = replace(held, codes=held.codes.to(device), block_scale=moved(held.block_scale, device))
    lines, plan = TILES["fp8 128x128"]
    tiles = Layout(plan, (128, 192), storage="float8_128", rows=lines)
    found, expected = (
        qtensor.quantize_side(q, Side(tiles), backend)[0] for q, backend in ((there, "triton"), (held, "reference"))
    )
    assert all(map(same, cpu_of(found.tensors()), expected.tensors()))  # pyright: ignore[reportArgumentType]


# ------------------------------------------------------------------------------------------------------------ rotation


def rotation_of(n: int, signed: bool) -> Rotation:
    draws = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(n))
    return Rotation(n, draws * 2.0 - 1.0 if signed else None)


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("n", [16, 32, 64, 128])
def test_a_rotation_inside_changes_no_bit(n: int, dim: int, device: str) -> None:
    """Blocks shorter and longer than the rotation, and whole lines; tensor scales of what is rotated."""
    eden = replace(NVFP4, rule="absmax_fitted", rounding="eden", correction=64)
    for plan, dtype, signed in (
        (MXFP4, torch.bfloat16, True),
        (eden, torch.float32, True),
        (QUEST, torch.bfloat16, False),
        (replace(MXFP4, rule="mse_phase"), torch.float32, True),
        (replace(QUEST, rule="absmax", element=E2M1), torch.float32, True),
    ):
        x = matrix(7, 128, dtype) if dim == -1 else matrix(128, 7, dtype)
        assert differing(x, Side(layout(plan, x, dim), rotation_of(n, signed), KEY), device) == [], plan


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
        there = on_device(rotation, device)
        assert same(gpu.rotate(x.to(device), there).cpu(), reference.rotate(x, rotation))
        for passed, dtype in ((mask, torch.bfloat16), (None, torch.float32)):
            found = gpu.unrotate(x.to(device), there, moved(passed, device), dtype)
            assert same(found.cpu(), reference.unrotate(x, rotation, passed, dtype)), (source, dtype)
    back = reference.rotate(x, rotation)
    assert (reference.unrotate(back, rotation, None, torch.float32) - x).abs().max() < 1e-4 * x.abs().max()


@pytest.mark.parametrize("dim", [-1, -2])
def test_a_key_draws_the_signs_inside(dim: int, device: str) -> None:
    """As random_signs draws them, in each operation that rotates."""
    key = torch.tensor([77, -5], dtype=torch.int32)
    for n in (2, 32, 128):
        given, drawn = Rotation(n, reference.random_signs(n, key)), Rotation(n, key.to(device))
        shape = (5, 128, 1) if dim == -1 else (1, 128, 37)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(n))
        assert same(reference.rotate(x, Rotation(n, key)), reference.rotate(x, given))
        assert same(gpu.rotate(x.to(device), drawn).cpu(), reference.rotate(x, given))
        back = gpu.unrotate(x.to(device), drawn, None, torch.float32)
        assert same(back.cpu(), reference.unrotate(x, given, None, torch.float32))
        whole = x.view(5, 128) if dim == -1 else x.view(128, 37)
        side = Side(layout(NVFP4, whole, dim), given)
        found = gpu.quantize(whole.to(device), replace(side, rotation=drawn))
        assert all(map(same, cpu_of(found), of_reference(whole, side)))


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
        there = tuple(each.to(device) if isinstance(each, Tensor) else each for each in scales)
        found = gpu.unrotate(x.bfloat16().to(device), on_device(rotation, device), moved(passed, device), dtype, there)
        assert same(found.cpu(), wanted), (scales, dtype, rotation)


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "int4", "int4_sym", "fp8_e4m3", "int4_sym/tensor/float32"])
def test_tensor_scales_of_what_is_rotated_equal_the_reference(name: str, dim: int, device: str) -> None:
    for finite, plan in product((True, False), plans(get_format(name))):
        if plan.rounding == "nearest":
            x = hard_lines(64, finite)
            x = x if dim == -1 else x.T.contiguous()
            side = Side(layout(plan, x, dim), rotation_of(32, True))
            found = gpu._tensor_scale(x.to(device), side_on(side, device))
            spans = side.layout.whole_lines(x)
            wanted = reference.tensor_scale(spans, plan, side.rotation) if found is not None else None
            assert (found is None) == (reference.constant_scale(plan) is not None)
            assert found is None or same(found.cpu(), wanted.view(found.shape)), plan  # type: ignore[union-attr]


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
    codes, _, scale, _ = found_by_triton(x, Side(layout(plan, x), rotation), device)
    assert codes is not None and scale is not None
    assert (codes - wanted / scale).abs().max() < 0.5 + 1e-4


# ---------------------------------------------------------------------------------------------------- both dims at once


def test_a_strided_matrix_is_read_as_it_is(device: str) -> None:
    x = torch.randn(96, 64, generator=torch.Generator().manual_seed(3)).T
    for dim in (-1, -2):
        held = Layout(replace(MXFP4, mask=None), (64, 96), dim, "bfloat16")
        found = gpu.quantize(x.to(device), Side(held))[0]
        expected = reference.quantize(x, Side(held))[0]
        assert found is not None and expected is not None and torch.equal(found.cpu(), expected)


def test_both_dims_in_one_reading_equal_the_reference(device: str) -> None:
    eden = replace(NVFP4, rule="absmax_fitted", rounding="eden", correction=16)
    again = replace(MXFP4, rule="floor_three_quarters", mask=None)
    x = matrix(256, 128, torch.bfloat16)
    pairs = (
        ((MXFP4, "packed", 32), (again, "packed", 128)),
        ((eden, "bfloat16", 128), (replace(MXFP4, rule="mse_phase"), "float32", 16)),
        ((QUEST, "bfloat16", None), (replace(MXFP4, rounding="stochastic"), "float32", 32)),
        ((again, "float8_128", 32), (again, "float8_128", 32)),
        ((QUEST, "int8", None), (replace(QUEST, mask=None), "packed", 64)),
    )
    for number, pair in enumerate(pairs):
        rows, columns = (
            Side(
                layout(plan, x, dim, storage), None if n is None else rotation_of(n, True), KEY, packed=number % 2 == 0
            )
            for dim, (plan, storage, n) in zip((-1, -2), pair, strict=True)
        )
        found = gpu.quantize_both(x.to(device), side_on(rows, device), side_on(columns, device))
        for side, tensors in zip((rows, columns), found, strict=True):
            assert all(map(same, cpu_of(tensors), of_reference(x, side))), pair
    with pytest.raises(ValueError, match=r"needs dims \(-1, -2\); got \(-2, -1\)"):
        gpu.quantize_both(x.to(device), columns, rows)


def test_lines_that_fill_no_byte_are_packed_without_a_gap(device: str) -> None:
    x = matrix(5, 33)
    for storage in ("packed", "int8", "bfloat16"):
        assert differing(x, Side(layout(QUEST, x, -1, storage), packed=True), device) == []
    rows, columns = Side(layout(QUEST, x, -1, "packed")), Side(layout(QUEST, x, -2, "packed"))
    for side, found in zip((rows, columns), gpu.quantize_both(x.to(device), rows, columns), strict=True):
        assert all(map(same, cpu_of(found), of_reference(x, side)))


# -------------------------------------------------------------------------------------------------------------- errors


LEARNED = replace(QUEST, rule="learned")


@pytest.mark.parametrize(
    ("change", "message"),  # of x, Side and Layout
    [
        ({"x": torch.zeros(4, 64, dtype=torch.float16)}, "takes float32 or bfloat16; got torch.float16; convert it"),
        ({"x": torch.zeros(4, 48)}, r"dim -1 must be a multiple of 32; x has \(4, 48\); pad it"),
        (
            {"plan": replace(MXFP4, block=96, rule="floor"), "rows": 3},
            "tile of a height that is a power of two up to .*; got 3",
        ),
        ({"plan": replace(MXFP4, block=24)}, "block that is a power of two up to 256; got 24"),
        ({"rotation": Rotation(20)}, "rotation that is a power of two up to 256; got 20"),
        ({"rotation": Rotation(64, torch.ones(32))}, r"a rotation of 64 takes as many signs; got \(32,\)"),
        ({"rotation": Rotation(12, base=torch.ones(12, 12))}, "needs a rotation that is a power of two.*; got 12"),
        (
            {"plan": replace(MXFP4, rounding="stochastic")},
            r"'stochastic' draws random bits; got no key; give \(2,\) int32",
        ),
        ({"plan": LEARNED}, "a learned scale goes with rule 'learned' alone; got none"),
        ({"learned": torch.tensor(1.0)}, "rule 'std': a learned scale goes with rule 'learned' alone; got one"),
        ({"plan": LEARNED, "learned": torch.ones(4)}, r"is \(4, 1\) torch.float32 here; got \(4,\) torch"),
        ({"storage": "swizzled"}, "quantises into float32, .*float8_128; asked for swizzled"),
        ({"storage": "float8"}, "float8_128; asked for float8"),
        ({"rows": 2}, "tiles by their largest magnitude alone; rule 'std' asks more"),
        ({"plan": None}, "asked for an unquantised matrix"),
        ({"shape": (4, 32)}, r"the layout is of \(4, 32\); got \(4, 64\)"),
    ],
)
def test_what_has_no_kernel_is_refused_by_name(change: dict, message: str, device: str) -> None:
    change = dict(change)
    x = change.pop("x", torch.zeros(4, 64)).to(device)
    given = {name: change.pop(name, None) for name in ("rotation", "learned")}
    side = Side(Layout(**{"plan": MXFP4, "shape": tuple(x.shape)} | change), **given)
    with pytest.raises(ValueError, match=message):
        gpu.quantize(x, side_on(side, device))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_a_cpu_tensor_is_refused_outside_the_interpreter() -> None:
    x = torch.zeros(1, 32)
    for run in (lambda: gpu.quantize(x, Side(layout(MXFP4, x))), lambda: gpu.rotate(x[None], Rotation(32))):
        with pytest.raises(ValueError, match=r"'triton' cannot run on cpu: .*move the tensor to cuda"):
            run()


def registers(ptx: str, **given: Tensor) -> dict[str, Tensor]:
    """What PTX of shifts, "and", "or" and permuted bytes leaves in its registers. given: int64 below 2^32."""
    operations = {"shl": Tensor.__lshift__, "shr": Tensor.__rshift__, "and": Tensor.__and__, "or": Tensor.__or__}
    found = dict(given)
    for name, to, *operands, last in re.findall(r"(\w+)\.b32 (\S+), (\S+), (?:(\S+), )?(\w+|\$\d);", ptx):
        values = [found[each] if each in found else torch.tensor(int(each, 0)) for each in (*operands, last) if each]
        if name == "prmt":
            both, selected = values[0] | (values[1] << 32), [int(last, 16) >> (4 * place) & 15 for place in range(4)]
            found[to] = sum(((both >> (8 * byte)) & 255) << (8 * place) for place, byte in enumerate(selected))
        else:
            found[to] = operations[name](*values) & 0xFFFFFFFF
    return found


@pytest.mark.parametrize("place", range(4))
def test_codes_are_joined_and_split_as_float16_has_them(place: int) -> None:
    """What a GPU runs in the place of the interpreter's code: all pairs, beside 1.5 in the words' other places."""
    codes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    halves = (torch.cat([codes, -codes]) * 2.0**-14).half().view(torch.int16).long() & 0xFFFF
    halves = torch.cat([halves, torch.tensor([0x7FFF])])  # a GPU's NaN, which becomes 6
    nibbles = torch.cat([torch.arange(16), torch.tensor([7])])
    pairs = torch.cartesian_prod(torch.arange(17), torch.arange(17)).T
    others = torch.full((2, 17 * 17), 3)
    low, high = torch.stack([pairs if each == place else others for each in range(4)], dim=1)
    words = [halves[each[i]] + 65536 * halves[each[i + 1]] for each in (low, high) for i in (0, 2)]
    joined = sum((nibbles[low[i]] + 16 * nibbles[high[i]]) * 256**i for i in range(4))
    names = ("$1", "$2", "$3", "$4")
    found = registers(triton_quantize.JOIN_CODES.value, **dict(zip(names, words, strict=True)))
    assert torch.equal(found["$0"], joined)
    numbers = (pairs < 16).all(dim=0)
    found = registers(triton_quantize.SPLIT_CODES.value, **{"$4": joined[numbers]})
    assert all(torch.equal(found[f"${i}"], words[i][numbers]) for i in range(4))


@pytest.mark.parametrize("rule", ["floor", "floor_three_quarters"])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e3m2", "mxfp8_e4m3", "mxint8"])
def test_code_units_are_clipped_where_they_may_be_beyond_the_largest_code(name: str, rule: str) -> None:
    fmt = get_format(name)
    plan = Plan(fmt.element, fmt.scale_kind, fmt.block_size, rule)
    below_two = 2 - 2.0**-23
    largest = torch.tensor([2.0**-149, 2.0**-126 * below_two, 1.0, 1.5, below_two, 2.0**127 * below_two])
    x = torch.zeros(len(largest), 32, 1).index_fill(1, torch.tensor([0]), 1.0) * largest[:, None, None]
    units = largest.double() * plan.scale_rule.headroom / reference.block_scale(x, 1.0, plan).double().flatten()
    assert (units.max() > fmt.element.max) == gpu._clips(plan) == (rule != "floor_three_quarters")


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
@pytest.mark.parametrize(("rule", "dim"), [("std", -1), ("eden", -2)])
def test_code_for_a_gpu_rounds_as_written(rule: str, dim: int) -> None:
    """Compiled for an H100 without one: nothing fused, nothing flushed to zero, no approximate division or root, NaN
    not clamped away (the interpreter keeps it in any case), wide loads and stores, no arrays in local memory."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    command = [sys.executable, __file__, rule, str(dim)]
    ptx = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    for wrong in (".ftz", ".approx", "div.full", ".local"):
        assert wrong not in ptx, wrong
    # Written as fused: two for each rounding to nearest, of 32 or 64 elements a thread and of 4 block scales; two for
    # each quotient, of 64 elements and of these scales, whose divisors are 4 blocks and the tensor scale; one for each
    # of their draws.
    fused, inverses = (2 * (64 + 4) + 2 * (64 + 4) + 4, 4 + 1) if rule == "eden" else (2 * 32, 0)
    assert ptx.count("fma.") == ptx.count("fma.rn.f32") == fused and ptx.count("rcp.rn.f32") == inverses
    assert "shfl.sync.bfly" not in ptx  # a thread has whole blocks and rotations
    own = ("ld.global.b32", "div.rn.f32") if rule == "eden" else ("ld.global.v4", "sqrt.rn.f32")
    for right in (*own, "st.global.v4", "cvt.rn.f16x2.f32", "min.NaN"):
        assert right in ptx, right


def print_ptx(rule: str, dim: int) -> None:
    """Of the kernel that packs a large bfloat16 matrix on compute capability 9.0; it compiles for 8.0 too."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from qtrain_kernels.triton_quantize import quantize_kernel

    plan = replace(NVFP4, rule="absmax_fitted", rounding="eden", correction=16) if rule == "eden" else MXFP4
    tile, job = gpu._alone(Layout(plan, (4096, 4096), dim, "packed"), 32, False, "single" if rule == "eden" else "none")
    types = dict.fromkeys(("rows", "columns"), "i32") | {"x": "*bf16", "signs": "*fp32", "key": "*i32"}
    types |= {"packed": "*u8", "packed_scales": "*u8"}
    types |= {"scale": "*fp32"} if rule == "eden" else {"mask": "*u8"}
    names = quantize_kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    constants = {(i,): job if name == "JOB" else None for i, name in enumerate(names) if name not in types}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in types}
    options = {"num_warps": tile.warps, **gpu.UNFUSED}
    source = ASTSource(quantize_kernel, signature, constants, aligned)
    code = [triton.compile(source, target=GPUTarget("cuda", each, 32), options=options).asm["ptx"] for each in (80, 90)]
    print(code[1])


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    passed, shown = passed_in_the_interpreter(__file__)
    assert passed > 150, shown


if __name__ == "__main__":
    print_ptx(sys.argv[1], int(sys.argv[2]))
