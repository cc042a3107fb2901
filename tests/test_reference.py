"""The reference operations against brute force: every code and tie, exponent edges, reductions, hash statistics."""

import math

import numpy as np
import pytest
import torch
from oracles import quantization as oracle
from torch import Tensor

from qtrain_kernels import reference
from qtrain_kernels.formats import get_format
from qtrain_kernels.plans import Mask, Plan

MX = get_format("mxfp4")
MINIFLOATS = ["fp4_e2m1", "fp6_e3m2", "fp6_e2m3", "fp8_e4m3", "fp8_e5m2", "fp5_e3m1", "mxint8"]
KEY = torch.tensor([20250101, -77], dtype=torch.int32)


def mx_plan(rule: str, rounding: str = "nearest", mask: Mask | None = None, name: str = "mxfp4") -> Plan:
    return Plan(get_format(name).element, "e8m0", 32, rule, rounding, mask)  # pyright: ignore[reportArgumentType]


def one_block(*values: float) -> Tensor:
    """(1, 32, 1) with these values first and zeros after."""
    x = torch.zeros(1, 32, 1)
    x[0, : len(values), 0] = torch.tensor(values)
    return x


@pytest.mark.parametrize("name", [*MINIFLOATS, "int1", "int4", "int8", "int1.585"])
def test_nearest_at_every_code_tie_and_neighbour(name: str) -> None:
    """Each code, each midpoint, the floats next to both, and values beyond the grid; ties take the even rank."""
    element = get_format(name).element
    levels = np.array(element.levels())
    points = np.concatenate([levels, (levels[1:] + levels[:-1]) / 2, [element.max * 3, -element.max * 3, 1e-30]])
    points = points.astype(np.float32)
    if not element.offset:  # around a centred grid's ties u + 1/2 rounds in float32
        points = np.concatenate([points, np.nextafter(points, np.inf), np.nextafter(points, -np.inf)])
    found = reference.round_nearest(torch.from_numpy(points), element).double().numpy()
    expected = oracle.nearest(points.astype(np.float64).clip(-element.max, element.max), list(element.levels()))
    if (
        element.offset
    ):  # QuEST's round(u + 1/2) - 1/2: a tie between codes k - 1/2 and k + 1/2 goes to the even k's lower
        ties = points == np.floor(points)
        upper = (np.round(points.astype(np.float64).clip(-element.max, element.max) + 0.5)) - 0.5
        expected = np.where(ties, upper, expected)
    np.testing.assert_array_equal(found, expected)


def test_e2m1_ties_go_to_even_codes_and_zero_keeps_its_sign() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    even = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    assert torch.equal(reference.round_nearest(ties, MX.element), even)
    assert torch.equal(reference.round_nearest(-ties, MX.element), -even)
    assert math.copysign(1, reference.round_nearest(torch.tensor([-0.1]), MX.element).item()) == -1


E8M0_RULES = {  # amax as a fraction, element's largest code 6 = 1.5 * 2^2
    "floor": lambda a: oracle.power_below(a) - 2,
    "floor_three_quarters": lambda a: oracle.power_below(a) - 2,
    "even": lambda a: oracle.power_below(a) - 2 + (a / 2.0 ** oracle.power_below(a) >= 1.75),
    "ceil": lambda a: math.ceil(math.log2(a)) - 2,
    "rceil": lambda a: math.ceil(math.log2(a / 6)),
    "round": lambda a: round(math.log2(a / 6)),
}


@pytest.mark.parametrize("rule", E8M0_RULES)
def test_e8m0_scales_at_exponent_edges(rule: str) -> None:
    """Powers of two, their float neighbours, the element's own maximum, and random mantissas, over 2^-100 to 2^100."""
    mantissas = [1.0, 1 + 2**-23, 1.25, 1.5, 1.5 + 2**-22, 1.75 - 2**-23, 1.75, 2 - 2**-23]
    mantissas += list(np.random.default_rng(0).uniform(1, 2, 20).astype(np.float32))
    for exponent in (-100, -1, 0, 1, 2, 100):
        for mantissa in mantissas:
            largest = float(np.float32(mantissa)) * 2.0**exponent
            scale = reference.block_scale(one_block(0.1 * largest, -largest), 1.0, mx_plan(rule))
            assert scale is not None
            assert scale.item() == 2.0 ** E8M0_RULES[rule](largest), (rule, exponent, mantissa)


def test_e8m0_scales_stop_at_both_ends() -> None:
    for smallest in (2.0**-126, 2.0**-149, 0.0):
        assert reference.block_scale(one_block(smallest), 1.0, mx_plan("floor")).item() == 2.0**-127
    assert reference.block_scale(one_block(3.4e38), 1.0, mx_plan("ceil")).item() == 2.0**126
    codes, scale, _ = reference.encode(one_block(2.0**-127, -(2.0**-126)), 1.0, None, mx_plan("floor"))
    assert scale is not None
    assert (codes * scale)[0, :2, 0].tolist() == [2.0**-127, -(2.0**-126)]


@pytest.mark.parametrize("rule", [*E8M0_RULES, "mse", "std", "gaussian"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_value_poisons_its_block_alone(rule: str, bad: float) -> None:
    x = torch.cat((one_block(1.0, bad), one_block(1.0, -6.0), torch.zeros(1, 32, 1)))
    codes, scale, mask = reference.encode(x, 1.0, None, mx_plan(rule, mask=Mask("inside", 6.0)))
    assert scale is not None and mask is not None
    values = codes * scale
    assert values[0].isnan().all()
    assert values[1].isfinite().all()
    assert (values[2] == 0).all() and (mask[2] == 1).all()  # a zero block: zeros, and its whole gradient


def test_least_error_scale_is_the_least_of_three() -> None:
    x = torch.randn(500, 32, 1, generator=torch.Generator().manual_seed(0))
    found = reference.block_scale(x, 1.0, mx_plan("mse"))
    assert found is not None
    blocks = x.squeeze(2).double().numpy()
    floor = np.vectorize(oracle.power_below)(np.abs(blocks).max(1)) - 2
    errors = []
    for shift in (0, -1, 1):
        scale = 2.0 ** (floor + shift)[:, None]
        values = oracle.nearest(np.clip(blocks / scale, -6, 6), oracle.E2M1_GRID) * scale
        errors.append(((values - blocks) ** 2).sum(1))
    expected = 2.0 ** (floor + np.array([0, -1, 1])[np.argmin(errors, 0)])
    np.testing.assert_array_equal(found.flatten().double().numpy(), expected)


def test_the_std_scale_of_a_tiny_constant_block_is_its_epsilon() -> None:
    """log2(1e-8) = -26.58."""
    x = torch.full((1, 32, 1), 1e-12)
    assert reference.block_scale(x, 1.0, mx_plan("std")).item() == 2.0**-27  # pyright: ignore


def test_tree_sum_adds_halves_and_carries_an_odd_last() -> None:
    """One float32 rounding per addition, in this order and no other: a value at which orders differ."""
    x = torch.tensor([1.0, 2.0**24, 1.0, -(2.0**24), 1.0]).view(1, 5, 1)
    a, b = np.float32(1 + 1), np.float32(2**24 - 2**24)  # halves: (x0 + x2, x1 + x3), x4 waits
    assert reference.tree_sum(x).item() == (a + b) + np.float32(1)
    y = torch.randn(7, 129, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(reference.tree_sum(y), y.double().sum(1, keepdim=True).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["fp4_e2m1", "fp8_e4m3", "int2", "int1.585", "mxint8"])
def test_stochastic_rounding_is_unbiased_and_takes_neighbours(name: str) -> None:
    element = get_format(name).element
    levels = torch.tensor(element.levels())
    generator = torch.Generator().manual_seed(1)
    points = (torch.rand(64, generator=generator) * 2 - 1) * min(element.max, 8.0)
    draws = 20000
    u = points.repeat(draws, 1)
    uniform = reference.uniform(torch.arange(u.numel(), dtype=torch.int32), KEY).view(u.shape)
    codes = reference.round_stochastic(u, element, uniform)
    upper = torch.searchsorted(levels, points).clamp(1, len(levels) - 1)
    low, high = levels[upper - 1], levels[upper]
    assert ((codes == low) | (codes == high)).all()
    p = ((points - low) / (high - low)).double()
    z = (codes.double().mean(0) - points) / ((high - low) * (p * (1 - p) / draws).sqrt().clamp_min(1e-9))
    assert z.abs().max() < 5
    assert torch.equal(reference.round_stochastic(levels, element, torch.rand(len(levels))), levels)


def test_bits_of_the_hash_look_random() -> None:
    """Each bit is fair, each pair of bits and of neighbouring elements is uncorrelated, and so are two keys' fields."""
    count = 1 << 16
    index = torch.arange(count, dtype=torch.int32)
    keys = [torch.tensor(key, dtype=torch.int32) for key in ([0, 0], [7, 0x5DEECE66], [-99, 12345], [20250101, -77])]
    fields = torch.stack([reference.mix(index, key) for key in keys])
    bits = ((fields[:, :, None] >> torch.arange(32)) & 1).double() * 2 - 1  # (keys, count, 32)
    flat = bits.transpose(1, 2).reshape(-1, count)
    correlation = flat @ flat.T / count - torch.eye(len(flat), dtype=torch.float64)
    assert correlation.abs().max() * count**0.5 < 5.5  # 8128 pairs
    assert (flat.mean(1).abs() * count**0.5).max() < 5
    neighbours = (bits[:, 1:] * bits[:, :-1]).mean(1)
    assert neighbours.abs().max() * count**0.5 < 5
    assert len(set(fields[0].tolist()) & set(fields[1].tolist())) < 20  # not one field in another order
    uniform = reference.uniform(index, keys[3])
    assert uniform.min() >= 0 and uniform.max() < 1
    histogram = torch.histc(uniform, 64, 0, 1).double()
    assert ((histogram - count / 64) ** 2 / (count / 64)).sum() < 63 + 5 * (2 * 63) ** 0.5


def test_hash_is_pinned() -> None:
    """Checkpoints and studies depend on these bits: computed here with Python integers."""

    def mix(i: int, low: int, high: int) -> int:
        mask = 0xFFFFFFFF
        h = (i ^ low) & mask
        h = ((h ^ (h >> 16)) * 0x7FEB352D) & mask
        h ^= high & mask
        h = ((h ^ (h >> 15)) * 0x846CA68B) & mask
        return h ^ (h >> 16)

    index = torch.tensor([0, 1, 31, 2**31 - 1, -1], dtype=torch.int32)
    found = [value & 0xFFFFFFFF for value in reference.mix(index, KEY).tolist()]
    assert found == [mix(i, 20250101, -77) for i in index.tolist()]


def test_element_index_counts_the_contraction_last() -> None:
    """An operand (M=64, N=3) quantised along M draws for element (m, n) as its transpose would at n * M + m."""
    index = reference.element_index(torch.empty(2, 32, 3)).view(64, 3)
    assert torch.equal(index.T.contiguous().view(-1), torch.arange(192, dtype=torch.int32))
    assert torch.equal(reference.element_index(torch.empty(6, 32, 1)).view(-1), torch.arange(192, dtype=torch.int32))


def test_quartets_backward_scale_never_clips() -> None:
    """amax is taken before the 3/4: codes stay within the grid even for the largest mantissa."""
    x = one_block(8 - 2.0**-20, 1.0)
    codes, scale, _ = reference.encode(x, 4 / 3, None, mx_plan("floor_three_quarters"))
    assert scale is not None and scale.item() == 1.0
    assert codes[0, 0, 0].item() == 6.0 and reference.tensor_scale(x, mx_plan("floor_three_quarters")) == 4 / 3
