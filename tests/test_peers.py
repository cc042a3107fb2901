"""Agreement, bit for bit, with casts written by others: torchao's MX formats, torch's float8, the NVFP4 rule retold.

Finite inputs, tolerance 0, the sign of zeros included. Every MX result is also held to its rule, computed from frexp
in float64, so that it is known who is right where torchao leaves its own rule: `torchao_departs` says where that is.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from oracles import nvfp4 as retold
from torch import Tensor
from torchao.prototype.mx_formats import kernels as torchao_casts
from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, get_fp_scale, to_dtype, to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

import qtrain
from qtrain.config.recipe import QuantSpec
from qtrain.quant.quantizer import Quantizer
from qtrain_kernels import reference
from qtrain_kernels.formats import get_format

Single = NDArray[np.float32]
Double = NDArray[np.float64]

FLOAT32_MAX = float(np.finfo(np.float32).max)
DTYPES = [torch.float32, torch.bfloat16]
RULES = ("floor", "even", "ceil", "rceil")


class Peer(NamedTuple):
    """An element as others name it: its bits, its largest code = 1.f * 2^emax, and the dtype that torchao takes."""

    exponent_bits: int
    mantissa_bits: int
    largest: float
    emax: int
    dtype: torch.dtype | str

    @property
    def levels(self) -> Double:
        """The non-negative codes, by bit pattern."""
        levels = retold.minifloat(self.exponent_bits, self.mantissa_bits)
        return levels[levels <= self.largest]

    def decode(self, bits: Tensor) -> Tensor:
        """float32 of bit patterns, the sign above the exponent; NaN for patterns that are no finite code."""
        table = np.full(2 ** (self.exponent_bits + self.mantissa_bits), np.nan)
        table[: len(self.levels)] = self.levels
        return torch.from_numpy(np.concatenate((table, -table)).astype(np.float32))[bits.long()]


PEERS = {
    "mxfp4": Peer(2, 1, 6.0, 2, torch.float4_e2m1fn_x2),
    "mxfp6_e2m3": Peer(2, 3, 7.5, 2, "fp6_e2m3"),
    "mxfp6_e3m2": Peer(3, 2, 28.0, 4, "fp6_e3m2"),
    "mxfp8_e4m3": Peer(4, 3, 448.0, 8, torch.float8_e4m3fn),
    "mxfp8_e5m2": Peer(5, 2, 57344.0, 15, torch.float8_e5m2),
}


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    integer = {4: torch.int32, 2: torch.int16}[found.element_size()]
    wrong = found.contiguous().view(integer) != expected.contiguous().view(integer)
    assert not wrong.any(), f"{int(wrong.sum())} differ; the first: {found[wrong][:8]} for {expected[wrong][:8]}"


# ------------------------------------------------------------------------------------------------------------- elements


def edges(levels: Double) -> Single:
    """Every code and tie, the float32 and the bfloat16 next to each on both sides; both signs."""
    exact = np.concatenate((levels, (levels[1:] + levels[:-1]) / 2)).astype(np.float32)
    around = [np.nextafter(exact, np.float32(sign * np.inf)) for sign in (-1, 1)]
    around += [exact * np.float32(1 + sign * 2.0**-8) for sign in (-1, 1)]
    positive = np.abs(np.concatenate((exact, *around)))
    return np.concatenate((positive, -positive))


@cache
def every_bfloat16() -> Single:
    """All finite ones: zeros, subnormals, and the largest among them."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    return values[values.isfinite()].numpy()


CASTS = {
    "mxfp4": torchao_casts.f32_to_f4_unpacked,
    "mxfp6_e2m3": torchao_casts.f32_to_f6_e2m3_unpacked,
    "mxfp6_e3m2": torchao_casts.f32_to_f6_e3m2_unpacked,
    "mxfp8_e4m3": lambda u: u.to(torch.float8_e4m3fn).view(torch.uint8),
    "mxfp8_e5m2": lambda u: u.to(torch.float8_e5m2).view(torch.uint8),
}


@pytest.mark.parametrize("name", PEERS)
def test_elements_are_those_of_torch_and_torchao(name: str) -> None:
    """The peers' input is clamped to the largest code: torch 2.11 casts what lies beyond it to NaN or infinity."""
    peer = PEERS[name]
    special = np.array([1.0001 * peer.largest, 1.5 * peer.largest, FLOAT32_MAX, 2.0**-149, 2.0**-126], np.float32)
    u = torch.from_numpy(np.concatenate((edges(peer.levels), every_bfloat16(), special, -special)))
    expected = peer.decode(CASTS[name](u.clamp(-peer.largest, peer.largest)))
    assert set(expected.tolist()) == {*peer.levels, *-peer.levels}
    assert_same_bits(reference.round_nearest(u, get_format(name).element), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "cast"), [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)])
def test_rows_of_float8_are_those_of_torch(name: str, cast: torch.dtype, dtype: torch.dtype) -> None:
    """scale = amax of the row / largest code; codes = x / scale, cast; values = codes * scale: all in float32."""
    x = finite(amax_sweep(0), dtype)
    largest = torch.finfo(cast).max
    scale = x.float().abs().amax(1, keepdim=True) / torch.tensor(largest)
    codes = (x.float() / torch.where(scale == 0, 1, scale)).clamp(-largest, largest).to(cast).float()
    assert_same_bits(qtrain.fake_quantize(x, name, backend="reference"), (codes * scale).to(dtype))


# ------------------------------------------------------------------------------------------------------------------- MX


class Encoded(NamedTuple):
    """codes (n, 32) float32, scale bytes (n,) int32, values (n, 32) in the dtype of the input."""

    codes: Tensor
    scale_bytes: Tensor
    values: Tensor

    def where(self, blocks: Tensor) -> Encoded:
        return Encoded(*(part[blocks] for part in self))


def encode(x: Tensor, name: str, rule: str | None = None) -> tuple[Tensor, Tensor, Tensor | float]:
    """x (M, K): codes (M, K), block scales (M, K / block), tensor scale."""
    plan = Quantizer.build(QuantSpec(format=name, scale=rule), "reference").plan
    assert plan is not None and plan.block is not None
    blocks = x.float().reshape(-1, plan.block, 1)
    tensor_scale = reference.tensor_scale(blocks, plan)
    codes, block_scale, _ = reference.encode(blocks, tensor_scale, None, plan)
    assert block_scale is not None
    return codes.view(x.shape), block_scale.view(len(x), -1), tensor_scale


def by_qtrain(x: Tensor, name: str, rule: str) -> Encoded:
    codes, scale, tensor_scale = encode(x, name, rule)
    mantissa, exponent = torch.frexp(scale.flatten())
    assert tensor_scale == 1.0 and (mantissa == 0.5).all()
    return Encoded(codes, exponent + 126, qtrain.fake_quantize(x, name, scale=rule, backend="reference"))


def by_torchao(x: Tensor, name: str, rule: str) -> Encoded:
    peer = PEERS[name]
    scale, data = to_mx(x, peer.dtype, 32, ScaleCalculationMode(rule))
    values = to_dtype(data, scale, peer.dtype, 32, x.dtype)
    bits = torchao_casts.unpack_uint4(data) if name == "mxfp4" else data.view(torch.uint8)
    return Encoded(peer.decode(bits), scale.view(torch.uint8).flatten().int(), values)


def in_largest_codes(x: Tensor, name: str) -> Double:
    """(n,): amax / largest code: on normal numbers the float32 that rceil looks at crosses a power of two exactly where
    this does."""
    return x.double().abs().amax(1).numpy() / PEERS[name].largest


def by_rule(x: Tensor, name: str, rule: str) -> Encoded:
    """The scale of each rule, exactly, from amax = m * 2^e with m in [1/2, 1); then the nearest code of each x / scale.

    floor: 2^(floor(log2 amax) - emax), OCP MX v1.0. even: the same of amax rounded to the element's mantissa bits, half
    up. ceil: 2^(ceil(log2 amax) - emax). rceil: 2^ceil(log2(amax / largest code)). None is below 2^-127, byte 0.
    A value above float32's maximum is infinity.
    """
    peer, blocks = PEERS[name], x.double().numpy()
    m, e = np.frexp(np.abs(blocks).max(1))
    m_rceil, e_rceil = np.frexp(in_largest_codes(x, name))
    exponent = {
        "floor": e - 1 - peer.emax,
        "even": e - 1 - peer.emax + (m >= 1 - 2.0 ** -(peer.mantissa_bits + 2)),
        "ceil": e - 1 - peer.emax + (m > 0.5),
        "rceil": np.where(m_rceil == 0, -127, e_rceil - 1 + (m_rceil > 0.5)),
    }[rule]
    exponent = np.where(m == 0, -127, exponent).clip(-127)
    scale = 2.0 ** exponent[:, None].astype(np.float64)
    codes = retold.nearest(blocks / scale, peer.levels)
    values = torch.from_numpy(codes * scale).float().to(x.dtype)
    return Encoded(torch.from_numpy(codes), torch.from_numpy(exponent + 127).int(), values)


def torchao_departs(x: Tensor, scale_bytes: Tensor, name: str, rule: str) -> Tensor:
    """(n,) bool: blocks of which torchao 0.18 makes something else than its rule and OCP's x ≈ codes * scale say.

    - Byte 0, the scale 2^-127, over a block that is not zero: torchao divides by 2^-126 (by 1 for rceil), so that its
      codes times the scale are half of x (or zero). A workaround for compiled subnormals, says its source.
    - rceil with amax / largest code just above a power of two: torchao on CPU takes its float32 log2, which at
      2^k (1 + 2^-23) is k itself for most k, so that the scale is half of the rule's. 2^-16 covers every k.
    """
    smallest = (scale_bytes == 0) & (x != 0).any(1)
    mantissa, _ = np.frexp(in_largest_codes(x, name))
    above = torch.from_numpy((mantissa > 0.5) & (mantissa < 0.5 + 2.0**-17))
    return smallest | above if rule == "rceil" else smallest


def below_rceil(x: Tensor, name: str) -> Tensor:
    """(n,) bool: amax / largest code at or below 2^-127 but not zero, which test_smallest_rceil_scale is about."""
    ratio = in_largest_codes(x, name)
    return torch.from_numpy((ratio > 0) & (ratio <= 2.0**-127))


def assert_same(found: Encoded, expected: Encoded) -> None:
    wrong = found.scale_bytes != expected.scale_bytes
    assert not wrong.any(), (found.where(wrong), expected.where(wrong))
    assert_same_bits(found.codes, expected.codes)
    assert_same_bits(found.values, expected.values)


def assert_agree(x: Tensor, name: str, rule: str) -> None:
    """Codes, scale bytes and values: the rule's everywhere, and torchao's wherever it keeps to the rule."""
    found, exact = by_qtrain(x, name, rule), by_rule(x, name, rule)
    assert_same(found, exact)
    keeps = ~torchao_departs(x, exact.scale_bytes, name, rule)
    assert keeps.double().mean() > 0.7
    assert_same(found.where(keeps), by_torchao(x, name, rule).where(keeps))


def in_blocks(points: Single, first: float, block: int) -> Single:
    """(n, block): every block starts with the value that fixes its scale."""
    points = np.append(points, np.zeros(-len(points) % (block - 1), np.float32)).reshape(-1, block - 1)
    return np.concatenate((np.full((len(points), 1), first, np.float32), points), axis=1)


@cache
def amax_sweep(seed: int) -> Single:
    """(n, 32): amax of every exponent, with mantissas at which rules turn, their neighbours and random ones; the other
    elements spread evenly in value, or in exponent, below it, with zeros of either sign; and two blocks of zeros."""
    generator = np.random.default_rng(seed)
    turns = [1.0, 1.25, 1.5, 1.75, 1.875, 1.9375, 2 - 2.0**-7, 2 - 2.0**-23]
    mantissas = np.concatenate((turns, generator.uniform(1, 2, 8))).astype(np.float32)
    up, down = np.nextafter(mantissas, np.float32(3)), np.nextafter(mantissas, np.float32(0))
    mantissas = np.concatenate((mantissas, up[up < 2], down, mantissas - np.float32(2.0**-8)))
    amax = np.ldexp(mantissas, np.arange(-149, 128)[:, None]).astype(np.float32).flatten()
    shape = (len(amax), 32)
    fraction = np.where(generator.random(shape) < 0.5, generator.random(shape), 2.0 ** generator.uniform(-24, 0, shape))
    fraction *= generator.random(shape) > 0.02
    fraction[np.arange(len(amax)), generator.integers(0, 32, len(amax))] = 1
    signed = (fraction * generator.choice([-1.0, 1.0], shape) * amax[:, None]).astype(np.float32)
    return np.concatenate((signed, np.zeros((1, 32), np.float32), -np.zeros((1, 32), np.float32)))


def finite(x: Single, dtype: torch.dtype) -> Tensor:
    """Rows that stay finite in dtype."""
    rows = torch.from_numpy(x).to(dtype)
    return rows[rows.isfinite().all(1)]


def test_every_e8m0_byte_is_torchs_scale() -> None:
    every = torch.arange(256, dtype=torch.int32)
    found = reference.power_of_two(every)
    for peer in (every.to(torch.uint8).view(torch.float8_e8m0fnu).float(), get_fp_scale(every.to(torch.uint8))):
        assert_same_bits(found[:255], peer[:255])
        assert found[255].isnan() and peer[255].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", PEERS)
def test_every_scale_byte_with_every_code_and_tie(name: str, rule: str, dtype: torch.dtype) -> None:
    """amax is the largest code (for ceil: its power of two) times each power of two at which it is finite."""
    peer = PEERS[name]
    first = 2.0**peer.emax if rule == "ceil" else peer.largest
    points = edges(peer.levels)
    blocks = in_blocks(points[np.abs(points) <= first], first, 32)
    scale_bytes = np.arange(1 if rule == "rceil" else 0, 255 - peer.emax)  # byte 0 of rceil: test_smallest_rceil_scale
    x = finite(np.ldexp(blocks, scale_bytes[:, None, None] - 127).reshape(-1, 32), dtype)
    assert_agree(x, name, rule)
    assert by_qtrain(x, name, rule).scale_bytes.tolist() == scale_bytes.repeat(len(blocks)).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", PEERS)
def test_amax_of_every_exponent_and_mantissa(name: str, rule: str, dtype: torch.dtype) -> None:
    """From zero and the smallest subnormal to float32's maximum, where even, ceil and rceil may reach infinity."""
    x = finite(amax_sweep(1), dtype)
    assert_agree(x[~below_rceil(x, name)] if rule == "rceil" else x, name, rule)


@pytest.mark.parametrize("name", PEERS)
def test_smallest_rceil_scale(name: str) -> None:
    """2^ceil(log2(amax / largest code)) is 2^-127 or less, so the scale is 2^-127: byte 0, torchao's byte too, whose
    codes are then those of another scale."""
    x = finite(amax_sweep(1), torch.float32)
    x = x[below_rceil(x, name)]
    assert_same(by_qtrain(x, name, "rceil"), by_rule(x, name, "rceil"))


def test_torchao_still_departs_where_it_is_excused() -> None:
    """One block of each kind; when torchao mends one, `torchao_departs` can lose it."""
    tiny, above = torch.zeros(2, 1, 32)
    tiny[0, :3] = torch.tensor([2.0**-126, -(2.0**-127), 1.5 * 2.0**-126])
    above[0, 0] = float(np.nextafter(np.float32(6 * 2.0**10), np.float32(np.inf)))
    for rule in ("floor", "even", "ceil"):
        assert torch.equal(by_qtrain(tiny, "mxfp4", rule).values, tiny)
        assert torch.equal(by_torchao(tiny, "mxfp4", rule).values, tiny / 2)
    assert (by_torchao(tiny, "mxfp4", "rceil").values == 0).all()
    assert by_qtrain(above, "mxfp4", "rceil").scale_bytes.item() == 127 + 11
    assert by_torchao(above, "mxfp4", "rceil").scale_bytes.item() == 127 + 10


# ---------------------------------------------------------------------------------------------------------------- NVFP4

TENSOR_SCALES = [1.0, 2.0**-20, 0.0123, 3.3e4, 2.0**-110, 3.38e38 / 2688]


def assert_nvfp4(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (M, K): both scales, codes and values are the rule's. Returns codes, block scales and the tensor scale."""
    codes, block_scale, tensor_scale = encode(x, "nvfp4")
    expected = retold.quantise(x.float().numpy())
    assert isinstance(tensor_scale, Tensor)
    assert_same_bits(tensor_scale, torch.tensor(expected.tensor_scale))
    assert_same_bits(block_scale, torch.from_numpy(expected.block_scale))
    assert_same_bits(codes, torch.from_numpy(expected.codes))
    values = qtrain.fake_quantize(x, "nvfp4", backend="reference")
    assert_same_bits(values, torch.from_numpy(expected.values).to(x.dtype))
    return codes, block_scale, tensor_scale


def with_largest(blocks: Single, tensor_scale: float, dtype: torch.dtype) -> Tensor:
    """(n + 1, 16): before the blocks, one that fixes the tensor scale."""
    first = np.zeros((1, 16), np.float32)
    first[0, 3] = -2688 * tensor_scale
    return torch.from_numpy(np.concatenate((first, blocks))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tensor_scale", TENSOR_SCALES)
def test_every_e4m3_scale_byte(tensor_scale: float, dtype: torch.dtype) -> None:
    """amax_block / 6 / s_tensor at every code and tie of E4M3, and next to them. torchao's bytes are the same from
    2^-6 on, where it clamps; its codes are not compared: it multiplies by the reciprocal of the scales."""
    ratios = np.abs(edges(retold.E4M3)).clip(0, 448)
    fractions = np.random.default_rng(3).uniform(-1, 1, (len(ratios), 16))
    fractions[:, 7] = 1
    x = with_largest((fractions * (ratios * 6 * tensor_scale)[:, None]).astype(np.float32), tensor_scale, dtype)
    _, block_scale, whole = assert_nvfp4(x)
    assert set(block_scale.flatten().tolist()) == set(retold.E4M3[1:])

    assert_same_bits(whole, per_tensor_amax_to_scale(x.abs().max()))
    theirs = nvfp4_quantize(x, 16, whole)[0].float()
    normal = theirs > 2.0**-6
    assert normal.double().mean() > 0.8
    assert_same_bits(block_scale[normal], theirs[normal])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tensor_scale", TENSOR_SCALES)
def test_every_e2m1_code_and_tie_under_every_scale_byte(tensor_scale: float, dtype: torch.dtype) -> None:
    one_scale = in_blocks(edges(retold.E2M1).clip(-6, 6), 6.0, 16)
    both = retold.E4M3[1:].astype(np.float32) * np.float32(tensor_scale)
    blocks = (one_scale * both[:, None, None]).reshape(-1, 16).astype(np.float32)
    codes, _, _ = assert_nvfp4(with_largest(blocks, tensor_scale, dtype))
    assert set(codes.flatten().tolist()) == {*retold.E2M1, *-retold.E2M1}


NVFP4_EXTREMES = {
    "wide": 2.0 ** np.random.default_rng(4).uniform(-40, 40, (128, 1)),
    "one octave": 2.0 ** np.random.default_rng(5).uniform(0, 1, (64, 1)),
    "to float32's maximum": FLOAT32_MAX * 2.0 ** -np.arange(32.0)[:, None],
    "zeros": np.zeros((4, 1)),
    "zero rows": np.arange(8.0)[:, None] % 2,
    **{f"{amax} * 2^-149": np.array([[amax * 2.0**-149]]) for amax in (1, 1344, 1345, 4031, 4033, 2688 * 8.5, 2.0**23)},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", NVFP4_EXTREMES)
def test_nvfp4_of_extremes(rows: str, dtype: torch.dtype) -> None:
    """Block scales that round to zero; tensor scales that are subnormal (and coarse) or zero though x is not."""
    largest = NVFP4_EXTREMES[rows]
    fractions = np.random.default_rng(6).normal(0, 0.3, (len(largest), 64)).clip(-1, 1)
    fractions[:, 5] = -1
    x = torch.from_numpy((fractions * largest).astype(np.float32)).to(dtype)
    assert_nvfp4(x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max))
