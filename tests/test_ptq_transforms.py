"""Changes of a model before quantisation: the same logits, and weights and inputs that quantise better."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qtrain.config.recipe import QuantSpec
from qtrain.models.decoder import Decoder
from qtrain.models.families.llama import Llama
from qtrain.quant.ptq import Hessian, Method, quantize_weight, relative_error
from qtrain.quant.ptq.transforms import (
    awq_smoothing,
    divide_inputs,
    exponent_biases,
    fold_norms,
    rotate_residual,
    smoothing,
)
from qtrain.quant.quantizer import Quantizer, rotate
from qtrain.quant.rotation import hadamard
from qtrain_kernels.plans import Rotation


def model(**settings: object) -> Decoder:
    sizes = {"name": "m", "dim": 96, "n_heads": 2, "n_layers": 2, "ffn_dim": 64, "seq_len": 16}
    torch.manual_seed(0)
    found = Decoder(Llama(**(sizes | settings)), 50).double()
    for name, parameter in found.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data.uniform_(0.3, 2.0)
        else:
            parameter.data.mul_(5)
    return found.float()


TOKENS = torch.arange(32).view(2, 16)
BIASES = {"qkv_bias": True, "o_bias": True, "mlp_bias": True}


@pytest.mark.parametrize("settings", [{}, {"tie_embeddings": True}, {"qk_norm": True}, BIASES], ids=str)
def test_the_logits_stay(settings: dict[str, object]) -> None:
    """dim 96 has a Hadamard matrix of Paley's."""
    plain, folded, rotated = (model(**settings) for _ in range(3))
    fold_norms(folded)
    rotate_residual(rotated, seed=3)
    wanted = plain(TOKENS)
    for changed in (folded, rotated):
        torch.testing.assert_close(changed(TOKENS), wanted, rtol=1e-3, atol=1e-3)
        assert all((norm == 1).all() for name, norm in changed.named_parameters() if name.endswith("mlp_norm.weight"))
    assert wanted.std() > 0.5
    assert not torch.allclose(rotated.embed.weight, plain.embed.weight, atol=0.1)
    again = model(**settings)
    rotate_residual(again, seed=4)
    assert not torch.allclose(again.embed.weight, rotated.embed.weight, atol=0.1), "the signs are the seed's"


def of_the_fixture() -> tuple[Decoder, Tensor, dict[str, Tensor]]:
    """(model, largest magnitudes (16,) of inputs, results) of tests/oracles/quarot_smoothquant.npz: what the code of
    github.com/spcl/QuaRot (fake_quant/rotation_utils.py, 5008669) and github.com/mit-han-lab/smoothquant
    (smoothquant/smooth.py, c61476d) made of the same weights in transformers' Llama. Rows of the embedding have mean 0,
    since QuaRot takes their mean away."""
    found = Decoder(Llama(name="m", dim=16, n_heads=2, n_layers=1, ffn_dim=32, seq_len=8), 8)
    draw, (block,) = np.random.default_rng(1), found.layers
    names = "attention.q attention.k attention.v attention.o mlp.gate mlp.up mlp.down"
    parts = [found.embed, found.lm_head, found.norm, block.attention_norm, block.mlp_norm]
    for part in [*parts, *map(block.get_submodule, names.split())]:
        shape = tuple(part.weight.shape)
        value = draw.standard_normal(shape) if len(shape) == 2 else draw.uniform(0.3, 2.0, shape)
        if part is found.embed:
            value -= value.mean(1, keepdims=True)
        part.weight.data = torch.from_numpy(value).float()
    largest = torch.from_numpy(draw.uniform(0.01, 30, 16)).float()
    with np.load(Path(__file__).parent / "oracles" / "quarot_smoothquant.npz") as file:
        return found, largest, {key: torch.from_numpy(value) for key, value in file.items()}


def test_rotated_weights_are_those_of_quarot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the signs that its code drew. Its Hadamard matrix before mlp.down is a recipe's rotation here."""
    rotated, _, theirs = of_the_fixture()
    monkeypatch.setattr("qtrain.quant.ptq.transforms.hadamard", lambda size, *_: Rotation(size, theirs["signs"]))
    rotate_residual(rotated, seed=0)
    (block,) = rotated.layers
    ours = {name: getattr(block.attention, name).weight for name in "qkvo"}
    ours |= {name: getattr(block.mlp, name).weight for name in ("gate", "up")}
    down = rotate(block.mlp.down.weight.detach(), hadamard(32, None, torch.device("cpu")), "reference")
    ours |= {"embed": rotated.embed.weight, "head": rotated.lm_head.weight, "down": down}
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[f"quarot-{name}"], rtol=1e-5, atol=2e-6)


def test_smoothed_weights_are_those_of_smoothquant() -> None:
    plain, largest, theirs = of_the_fixture()
    (block,) = plain.layers
    attention, mlp = block.attention, block.mlp
    groups = (("attention_norm", 0.5, {name: getattr(attention, name) for name in "qkv"}),
              ("mlp_norm", 0.8, {"gate": mlp.gate, "up": mlp.up}))  # fmt: skip
    for norm, alpha, layers in groups:
        factors = smoothing(largest, [layer.weight for layer in layers.values()], alpha)
        divide_inputs(getattr(block, norm), [*layers.values()], factors)
        for name, part in (layers | {norm: getattr(block, norm)}).items():
            torch.testing.assert_close(part.weight, theirs[f"smoothquant-{name}"], rtol=1e-6, atol=0.0)


def test_a_rotation_spreads_outliers_of_the_residual_stream() -> None:
    plain, rotated = model(), model()
    for each in (plain, rotated):
        each.embed.weight.data[:, 5] += 30
    rotate_residual(rotated, seed=0)
    spread = [(each.embed.weight.abs().amax(1) / each.embed.weight.std(1)).mean().item() for each in (plain, rotated)]
    assert spread[1] < 0.5 * spread[0]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """(x (T, K) with large features, its second moments, weight (N, K))."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 64, generator=generator)
    x[:, ::9] *= 20
    x[:, 3] = 0.0
    hessian = Hessian(64)
    hessian.add(x)
    return x, hessian.mean(), torch.randn(32, 64, generator=generator) * 0.1


def test_smoothing_is_the_papers_and_moves_outliers_from_inputs_to_weights() -> None:
    x, _, weight = inputs()
    largest = x.abs().amax(0)
    factors = smoothing(largest, [weight, 2 * weight], 0.5)
    wanted = (largest / (2 * weight).abs().amax(0)).sqrt()
    alive = largest > 0
    torch.testing.assert_close(factors[alive], wanted[alive])
    assert (factors[~alive] == 1).all()
    norm, layer = torch.nn.RMSNorm(64), torch.nn.Linear(64, 32)
    norm.weight.data.uniform_(0.5, 2)
    before = layer(norm(x))
    divide_inputs(norm, [layer], factors)
    torch.testing.assert_close(layer(norm(x)), before, rtol=1e-4, atol=1e-4)
    side = Quantizer.build(QuantSpec(format="int8_sym"), "reference")
    product = x @ weight.T

    def error(x: Tensor, weight: Tensor) -> float:
        found = [side.quantize(each).dequantize() for each in (x, weight)]
        return ((found[0] @ found[1].T - product).norm() / product.norm()).item()

    factors = smoothing(largest, [weight], 0.5)
    assert error(x / factors, weight * factors) < 0.7 * error(x, weight)


def test_awq_takes_the_power_of_least_error() -> None:
    x, hessian, weight = inputs()
    side = Quantizer.build(QuantSpec(format="int3_sym"), "reference")
    factors = awq_smoothing(x.abs().mean(0), [weight], hessian, [side])

    def error(factors: Tensor) -> float:
        value = quantize_weight(weight * factors, hessian, side, Method())[0].dequantize("reference") / factors
        return relative_error(weight, value, hessian)

    assert error(factors) < 0.8 * error(torch.ones(64))
    mean = x.abs().mean(0)
    mean = mean.clamp_min(mean[mean > 0].min())
    for step in range(20):
        tried = mean ** (step / 20)
        assert error(factors) <= error(tried / (tried.max() * tried.min()).sqrt()) * (1 + 1e-4)


@pytest.mark.parametrize("most", [0, 3, 7])
def test_exponent_biases_are_powers_of_two_that_change_no_bit(most: int) -> None:
    """LLM-FP4: each input channel comes as near to the widest as so many powers of two bring it."""
    x, _, _ = inputs()
    largest = x.abs().amax(0)
    factors = exponent_biases(largest, most)
    alive = np.flatnonzero(largest.numpy())
    wanted = np.ones(64)
    ratios = largest.max().item() / largest.double().numpy()[alive]
    wanted[alive] = np.minimum(2.0 ** np.round(np.log2(ratios)), 2.0**most)
    assert np.array_equal(1 / factors.numpy(), wanted) and wanted.max() == min(2**most, 32)
    norm, layer = torch.nn.RMSNorm(64), torch.nn.Linear(64, 32)
    norm.weight.data.uniform_(0.5, 2)
    before = layer(norm(x))
    divide_inputs(norm, [layer], factors)
    assert torch.equal(layer(norm(x)), before)
    if most == 7:
        after = (x / factors).abs().amax(0)[alive]
        assert after.max() / after.min() < 2.0 and ratios.max() > 20
