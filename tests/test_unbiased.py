"""Stochastic rounding as an assertion: the mean is the value, the support its two neighbours, the draws independent."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from qtrain.config.recipe import QuantSpec
from qtrain.quant.quantizer import QuantizedTensor, Quantizer
from qtrain.quant.random import USES, key_words
from qtrain_kernels import reference
from qtrain_kernels.formats import get_format

ROWS = 8192  # draws of every element: a row each
MODES = [  # every format and rule that claims to keep the mean: nothing lies beyond the grid
    ("mxfp4", "floor_three_quarters"), ("mxfp4", "rceil"), ("mxfp4", "ceil"), ("mxfp6_e3m2", "rceil"),
    ("mxfp6_e2m3", "floor_three_quarters"), ("mxfp8_e4m3", "rceil"), ("mxfp8_e5m2", "rceil"), ("mxint8", "rceil"),
    ("nvfp4", "absmax_headroom"), ("e2m1/16/ue5m3", "absmax_headroom"), ("e3m2/32/e5m2", "absmax_headroom"),
    ("fp8_e4m3", "absmax"), ("fp4_e2m1", "absmax"), ("e2m1/32/float32", "absmax"), ("e3m0/tensor/float32", "absmax"),
    ("e2m1/tensor/float32", "absmax"), ("int4_sym/tensor/float32", "absmax"), ("int8_sym", "absmax"),
    *((f"int{bits}", "absmax") for bits in (1, 2, 4, 8)), ("int2_sym", "absmax"),
]  # fmt: skip
CLIPS = [
    ("nvfp4", "absmax"),
    ("mxfp4", "floor"),
    ("int4", "gaussian"),
]  # published with these, and biased at the maxima


def hard_row() -> Tensor:
    """(256,): Gaussians over eight octaves, one to a block of 32, with zeros, ties, codes, tiny values and outliers."""
    x = torch.randn(256, generator=torch.Generator().manual_seed(0))
    x = x * torch.exp2(torch.arange(8).repeat_interleave(32).float())
    x[:8] = torch.tensor([0.0, 6.0, 5.0, 2.5, -2.5, 0.25, -1.75, 1e-6])  # ties and codes of E2M1 at the scale 1
    x[40], x[70] = 100.0, -1000.0
    x[96:104] = 7.9999 * torch.tensor([1, -1, 1, 0.5, 0.25, 0.9, 0.1, -0.3])  # amax just below a power of two
    return x


def draws(format: str, rule: str, seed: int = 0) -> tuple[Tensor, QuantizedTensor, Quantizer]:
    spec = QuantSpec(format=format, scale=rule, rounding="stochastic")
    quantizer = Quantizer.build(spec, "reference")
    x = hard_row()
    key = torch.tensor(key_words("test", seed), dtype=torch.int32)
    return x, quantizer.quantize(x.expand(ROWS, -1).contiguous(), key=key), quantizer


def scores(format: str, rule: str) -> tuple[Tensor, Tensor]:
    """z of every element, and the elements' values in code units; NaN where nothing is random, or so rarely that one
    draw more is many deviations: those are taken together."""
    x, quantized, quantizer = draws(format, rule)
    assert quantizer.plan is not None
    scale = torch.ones_like(quantized.codes) if quantized.block_scale is None else quantized.block_scale
    u = (x.double() / (scale * quantized.tensor_scale)[0].double()).expand(ROWS, -1)
    levels = torch.tensor(quantizer.plan.element.levels(), dtype=torch.float64)
    upper = torch.searchsorted(levels, u[0].contiguous()).clamp(1, len(levels) - 1)
    low, high = levels[upper - 1], levels[upper]
    codes = quantized.codes.double()
    inside = u[0].abs() <= levels[-1]
    assert ((codes == low) | (codes == high))[:, inside].all()
    deviation = ((u[0] - low).clamp_min(0) * (high - u[0]).clamp_min(0) / ROWS).sqrt()
    off = codes.mean(0) - u[0]
    # float32: u is rounded once on its way, and a probability has 24 bits
    exact = deviation <= 1e-6 * u[0].abs() + 1e-9
    assert (off[exact & inside].abs() <= 1e-4 * (high - low)[exact & inside]).all()
    rare = ~exact & inside & (deviation / (high - low) < 20**0.5 / ROWS)
    together = (deviation / (high - low))[rare].square().sum().sqrt()
    assert (off / (high - low))[rare].sum().abs() <= 5 * together + 2 / ROWS
    return (off / deviation).masked_fill(exact | rare, float("nan")), u[0]


@pytest.mark.parametrize(("format", "rule"), MODES)
def test_the_mean_of_every_element_is_its_value(format: str, rule: str) -> None:
    """Over all elements, block maxima and ties among them: |z| < 5, and the z are a standard normal's."""
    z, u = scores(format, rule)
    random = ~z.isnan()
    assert random.sum() > 100
    assert z[random].abs().max() < 5
    assert abs(z[random].mean().item()) * random.sum().item() ** 0.5 < 5
    assert 0.7 < z[random].std().item() < 1.3
    assert u.abs().max() <= get_format(format).element.max * (1 + 1e-6)


@pytest.mark.parametrize(("format", "rule"), CLIPS)
def test_a_scale_that_clips_is_biased(format: str, rule: str) -> None:
    """Published recipes round stochastically beneath such scales: what lies beyond the grid becomes its end in every
    draw, and so has a mean that is too small, whereas all the rest keeps its own."""
    z, u = scores(format, rule)
    _, quantized, quantizer = draws(format, rule)
    assert quantizer.plan is not None
    largest = quantizer.plan.element.max
    beyond = u.abs() > largest
    assert (u.abs() > 1.01 * largest).any()
    end = (u[beyond].sign() * largest).float()
    assert torch.equal(quantized.codes[:, beyond], end.expand(ROWS, -1))
    assert (quantized.codes[:, beyond].double().mean(0).abs() < u[beyond].abs()).all()
    assert (z[~z.isnan() & ~beyond].abs() < 5).all()


@pytest.mark.parametrize("correction", [16, 128])
def test_the_scale_of_eden_keeps_its_mean(correction: int) -> None:
    """Given x, codes are fixed, and each block scale is one of two neighbours whose mean is S times it: S = <u, u> /
    <u, codes> over `correction` elements in code units, u = x / (block_scale * tensor_scale), as Quartet II's training
    code takes it. Where that is one block, it is <x, x> / <x, q(x)> as well."""
    spec = QuantSpec(format="nvfp4", scale="absmax_fitted", rounding="eden", correction=correction)
    x = hard_row()
    quantizer = Quantizer.build(spec, "reference")
    plain = Quantizer.build(QuantSpec(format="nvfp4", scale="absmax_fitted"), "reference")
    rows = x.expand(ROWS, -1).contiguous()
    found, nearest = quantizer.quantize(rows, key=torch.tensor([5, 6], dtype=torch.int32)), plain.quantize(rows)
    assert torch.equal(found.codes, nearest.codes)
    assert found.block_scale is not None and nearest.block_scale is not None
    assert isinstance(nearest.tensor_scale, Tensor)
    u = x.double() / (nearest.block_scale[0].double() * nearest.tensor_scale.double())
    codes = nearest.codes[0].double()
    factor = u.square().view(-1, correction).sum(1) / (u * codes).view(-1, correction).sum(1)
    if correction == 16:
        values = nearest.dequantize()[0].double().view(-1, 16)
        unscaled = x.double().view(-1, 16).square().sum(1) / (x.double().view(-1, 16) * values).sum(1)
        torch.testing.assert_close(factor, unscaled, rtol=1e-6, atol=0)
    wanted = nearest.block_scale[0].double().view(-1, 16)[:, 0] * factor.repeat_interleave(correction // 16)
    scales = found.block_scale.double().view(ROWS, -1, 16)[:, :, 0]
    levels = torch.tensor(
        [level for level in get_format("fp8_e4m3").element.levels() if level > 0], dtype=torch.float64
    )
    upper = torch.searchsorted(levels, wanted.contiguous()).clamp(1, len(levels) - 1)
    low, high = levels[upper - 1], levels[upper]
    assert ((scales == low) | (scales == high)).all()
    z = (scales.mean(0) - wanted) / ((wanted - low) * (high - wanted) / ROWS).sqrt().clamp_min(1e-9)
    assert z.abs().max() < 5


def ups(key: list[int], count: int = 1 << 14) -> Tensor:
    """±1: whether each of `count` elements halfway between two codes goes up."""
    uniform = reference.uniform(torch.arange(count, dtype=torch.int32), torch.tensor(key, dtype=torch.int32))
    return torch.where(uniform < 0.5, 1.0, -1.0).double()


def test_seeds_steps_micro_batches_layers_and_operands_draw_independently() -> None:
    """No pair of keys gives correlated draws, nor one field in another order: shifted, reversed, index ^ constant."""
    keys = [key_words(seed, layer, use, "step", step, micro_batch)
            for seed in (0, 1) for layer in ("layers.0.mlp.up", "layers.1.mlp.up") for use in USES[:3]
            for step, micro_batch in ((0, 0), (1, 0), (0, 1))]  # fmt: skip
    fields = torch.stack([ups(key) for key in keys])
    count = fields.shape[1]
    index = torch.arange(count)
    orders = {"same": index, "reversed": index.flip(0), **{f"shift {k}": index.roll(k) for k in (1, 16, 256)},
              **{f"xor {k}": index ^ k for k in (1, 3, 255, 4096)}}  # fmt: skip
    for name, order in orders.items():
        correlation = fields @ fields[:, order].T / count**0.5  # z of each pair
        pairs = torch.stack([correlation[a, b] for a, b in combinations(range(len(keys)), 2)])
        assert pairs.abs().max() < 5.5, name
        assert 0.8 < pairs.std() < 1.2, name


def test_rounding_errors_of_different_seeds_are_independent() -> None:
    """Of whole quantisers: given x, the codes under two seeds are uncorrelated; under one seed they are equal."""
    _, first, _ = draws("mxfp4", "floor_three_quarters", seed=1)
    _, again, _ = draws("mxfp4", "floor_three_quarters", seed=1)
    _, other, _ = draws("mxfp4", "floor_three_quarters", seed=2)
    assert torch.equal(first.codes, again.codes)
    a, b = (field.codes.double() - field.codes.double().mean(0) for field in (first, other))
    deviation = (a.square().mean(0) * b.square().mean(0)).sqrt()
    random = deviation > 0.05
    z = ((a * b).mean(0) / deviation.clamp_min(1e-9) * ROWS**0.5)[random]
    assert random.sum() > 100 and z.abs().max() < 5 and 0.8 < z.std() < 1.2
