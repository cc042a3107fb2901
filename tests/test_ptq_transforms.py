"""Changes of a model before quantisation: the same logits, and weights and inputs that quantise better."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtrain.config.recipe import QuantSpec
from qtrain.models.decoder import Decoder
from qtrain.models.families.llama import Llama
from qtrain.quant.ptq import Hessian, Method, quantize_weight, relative_error
from qtrain.quant.ptq.transforms import awq_smoothing, divide_inputs, fold_norms, rotate_residual, smoothing
from qtrain.quant.quantizer import Quantizer


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
        value = quantize_weight(weight * factors, hessian, side, Method()).dequantize("reference") / factors
        return relative_error(weight, value, hessian)

    assert error(factors) < 0.8 * error(torch.ones(64))
    mean = x.abs().mean(0)
    mean = mean.clamp_min(mean[mean > 0].min())
    for step in range(20):
        tried = mean ** (step / 20)
        assert error(factors) <= error(tried / (tried.max() * tried.min()).sqrt()) * (1 + 1e-4)
