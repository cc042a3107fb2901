"""Changes of a trained model that leave what it computes as it is, and make it easier to quantise.

They know the parts of a pre-norm decoder by name: blocks with attention_norm before attention.q, k, v and mlp_norm
before mlp.gate and mlp.up, whose attention.o and mlp.down write to the residual stream.
"""

# D model dim, N out features, K in features

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.quant.ptq.codes import relative_error
from qtrain.quant.ptq.scales import scales_of
from qtrain.quant.quantizer import Quantizer, rotate
from qtrain.quant.random import key_words
from qtrain.quant.rotation import hadamard
from qtrain_kernels.plans import Rotation

AFTER_NORM = {"attention_norm": ("attention.q", "attention.k", "attention.v"), "mlp_norm": ("mlp.gate", "mlp.up")}
TO_RESIDUAL = ("attention.o", "mlp.down")
STEPS = 20  # of AWQ's exponents, 0 to 1


@torch.no_grad()
def fold_norms(model: Any) -> None:
    """Multiply the weights of norms into the layers after them, and set them to 1. A head that shares its weight with
    the embedding gets its own."""
    if model.lm_head.weight is model.embed.weight:
        model.lm_head.weight = nn.Parameter(model.embed.weight.detach().clone())
    pairs = [(model.norm, [model.lm_head])]
    for block in model.layers:
        pairs += [(getattr(block, norm), _layers(block, names)) for norm, names in AFTER_NORM.items()]
    for norm, layers in pairs:
        for layer in layers:
            layer.weight.mul_(norm.weight)
        norm.weight.fill_(1.0)


@torch.no_grad()
def rotate_residual(model: Any, seed: int) -> None:
    """Turn the residual stream by a Hadamard matrix with random signs: what reads and what writes it is multiplied by
    the matrix and its transpose. The weights of norms are folded first, since only a norm without them commutes with a
    rotation. Source: QuaRot, arXiv 2404.00456. ValueError where no Hadamard matrix of order D is known."""
    fold_norms(model)
    key = torch.tensor(key_words(seed, "residual"), dtype=torch.int32)
    turn = hadamard(model.embed.weight.shape[1], key, model.embed.weight.device)
    _rotate_inputs(model.embed.weight, turn)
    _rotate_inputs(model.lm_head.weight, turn)
    for block in model.layers:
        for names in AFTER_NORM.values():
            for layer in _layers(block, names):
                _rotate_inputs(layer.weight, turn)
        for layer in _layers(block, TO_RESIDUAL):
            layer.weight.copy_(rotate(layer.weight.T.contiguous(), turn, "auto").T)
            if layer.bias is not None:
                layer.bias.copy_(rotate(layer.bias[None].contiguous(), turn, "auto")[0])


def _rotate_inputs(weight: Tensor, turn: Rotation) -> None:
    weight.copy_(rotate(weight.contiguous(), turn, "auto"))


def _layers(block: nn.Module, names: Sequence[str]) -> list[Any]:
    return [block.get_submodule(name) for name in names]


@torch.no_grad()
def smoothing(largest: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """(K,) by which inputs are to be divided and weights (N, K) multiplied: largest^alpha / weight^(1 - alpha), of the
    largest magnitudes of inputs (K,) and weights in each column. Source: SmoothQuant, arXiv 2211.10438."""
    of_weights = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).clamp_min(1e-5)
    factors = largest.clamp_min(1e-5) ** alpha / of_weights ** (1 - alpha)
    return torch.where(largest > 0, factors, 1.0)


@torch.no_grad()
def awq_smoothing(mean: Tensor, weights: Sequence[Tensor], hessian: Tensor, quantizers: Sequence[Quantizer]) -> Tensor:
    """(K,) as `smoothing`: of powers 0 to 1 of the mean magnitudes of inputs (K,), scaled about 1, the one with the
    least output error of the weights to nearest. Source: AWQ, arXiv 2306.00978."""
    best, least = torch.ones_like(mean), torch.inf
    mean = mean.clamp_min(mean[mean > 0].min() if (mean > 0).any() else 1.0)
    for step in range(STEPS):
        factors = mean ** (step / STEPS)
        factors = factors / (factors.max() * factors.min()).sqrt()
        error = sum(
            relative_error(weight, _to_nearest(weight * factors, quantizer) / factors, hessian)
            for weight, quantizer in zip(weights, quantizers, strict=True)
        )
        if error < least:
            best, least = factors, error
    return best


def _to_nearest(weight: Tensor, quantizer: Quantizer) -> Tensor:
    layout = scales_of(weight, quantizer).layout
    return quantizer.operand(weight, layout).dequantize("auto").float()


@torch.no_grad()
def exponent_biases(largest: Tensor, most: int) -> Tensor:
    """(K,) powers of two as `smoothing`, of the largest magnitudes of inputs (K,): what brings each of these to that of
    the widest input, in at most so many powers of two. Dividing by them and multiplying the weights is exact. Source:
    the exponent biases of LLM-FP4, arXiv 2310.16836, whose code rounds the two logarithms apart."""
    shift = (largest.amax() / largest).log2().round().clamp(0, most)
    return torch.where(largest > 0, 2.0**-shift, 1.0)


@torch.no_grad()
def divide_inputs(norm: Any, layers: Sequence[Any], factors: Tensor) -> None:
    """Divide a norm's weight by factors (K,), and multiply the columns of the layers that read it."""
    norm.weight.div_(factors)
    for layer in layers:
        layer.weight.mul_(factors)
