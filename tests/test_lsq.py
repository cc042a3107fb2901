"""Learned scales of a tensor, of rows and of groups: LSQ (arXiv 1902.08153), by float64 autograd of its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qtrain
from qtrain.errors import UserError
from qtrain.quant import Observed, PackedLinear, QuantLinear, functional, operand_health
from qtrain.train import compose
from qtrain.training.build import check_model

N, K, Q_MAX = 24, 64, 7  # of int4
LEVEL = 7.5  # the largest code of the centred grid, whose codes are -7.5, -6.5, ..., 7.5


def recipe(block: str) -> dict[str, Any]:
    learned, none = {"scale": "learned", "estimator": "clip"}, {"format": "none"}
    again = {"format": "none", "source": "forward"}
    return {
        "name": "learned",
        "fprop": {"x": {"format": "int4", **learned}, "w": {"format": f"int4/{block}/float32", **learned}},
        "dgrad": {"dy": none, "w": again},
        "wgrad": {"dy": none, "x": again},
    }


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(block: str, backend: Any) -> tuple[QuantLinear, Tensor, Tensor]:
    """A layer whose scales clip some of the weights and inputs, x and dY."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N))
    model[0].weight.data = drawn(N, K, seed=4) * (1 + torch.arange(N)[:, None] / N)
    qtrain.convert(model, recipe(block), backend=backend)
    x = drawn(40, K, seed=1)
    qtrain.calibrate(model, x)
    layer = model[0]
    assert isinstance(layer, QuantLinear) and layer.weight_scale is not None and layer.input_scale is not None
    return layer, x, drawn(40, N, seed=2)


def lsq(values: Tensor, scale: Tensor) -> Tensor:
    """The paper's quantiser (equations 1, 2 and its gradient scale), on the centred grid, for autograd. scale: one for
    each of the equal runs of values."""
    runs = values.view(scale.numel(), -1)
    factor = (runs.shape[1] * Q_MAX) ** -0.5
    step = (scale * factor + (scale - scale * factor).detach()).view(-1, 1)
    u = (runs / step).clamp(-LEVEL, LEVEL)
    codes = u + ((u - 0.5).round() + 0.5 - u).detach()
    return (codes * step).view_as(values)


@pytest.mark.parametrize("backend", ["reference", "compiled"])
@pytest.mark.parametrize(("block", "shape"), [("tensor", (1,)), ("row", (N, 1)), ("16", (N, K // 16))])
def test_a_learned_scale_of_each_block_has_lsqs_start_and_gradient(
    block: str, shape: tuple[int, ...], backend: str
) -> None:
    layer, x, dy = made(block, backend)
    w = layer.weight.detach().double()
    start = 2 * w.view(layer.weight_scale.numel(), -1).abs().mean(1) / Q_MAX**0.5
    torch.testing.assert_close(layer.weight_scale.detach().double().flatten(), start, rtol=1e-6, atol=0)
    assert layer.weight_scale.shape == shape
    layer.weight_scale.data *= 0.3 + drawn(*shape, seed=3).abs() / 4
    layer.input_scale.data *= 0.6

    x = x.requires_grad_()
    y = layer(x)
    y.backward(dy)
    x64, w64 = x.detach().double().requires_grad_(), w.requires_grad_()
    scales = [each.detach().double().requires_grad_() for each in (layer.input_scale, layer.weight_scale)]
    expected = lsq(x64, scales[0]) @ lsq(w64, scales[1]).T + layer.bias.detach().double()
    expected.backward(dy.double())
    assert (w64.grad == 0).any(), "some weights are clipped"
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    for found, wanted in ((layer.weight_scale, scales[1]), (layer.input_scale, scales[0]), (x, x64)):
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer.weight.grad.double(), w64.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", ["row", "16"])
def test_learned_blocks_are_packed_and_their_chosen_rows_learn_alone(block: str) -> None:
    layer, x, dy = made(block, "auto")
    layer(x).backward(dy)
    whole, layer.weight_scale.grad = layer.weight_scale.grad, None
    layer.rows = torch.tensor([0, 3, 4, 20])
    layer(x).backward(dy)
    found = layer.weight_scale.grad
    others = torch.ones(N, dtype=torch.bool).index_fill(0, layer.rows, False)
    torch.testing.assert_close(found[layer.rows], whole[layer.rows])
    assert (found[others] == 0).all() and (found[layer.rows] != 0).all()
    layer.rows = None
    expected = layer(x).detach()
    model = nn.Sequential(layer)
    qtrain.pack(model)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(("block", "bits"), [("tensor", 4 + 32 / (N * K)), ("row", 4 + 32 / K), ("16", 4 + 32 / 16)])
def test_packed_weights_are_the_papers_under_steps_of_either_sign(block: str, bits: float) -> None:
    layer, x, _ = made(block, "auto")
    scale = layer.weight_scale.detach()
    scale *= torch.where(torch.arange(scale.numel()) % 2 == 0, -0.4, 0.4).view(scale.shape)
    step = scale.double().view(-1, 1)
    codes = ((layer.weight.detach().double().view(len(step), -1) / step).clamp(-LEVEL, LEVEL) - 0.5).round() + 0.5
    assert len(codes.unique()) == 16
    model = nn.Sequential(layer)
    expected = model(x).detach()
    qtrain.pack(model)
    packed = model[0]
    assert isinstance(packed, PackedLinear) and packed.bits() == bits and torch.equal(model(x), expected)
    assert torch.equal(packed.dequantize(), (codes * step).float().view(N, K))


def test_weights_under_a_learned_scale_below_zero_count_as_clipped_where_they_are() -> None:
    """Nothing keeps a step above zero, and the grid is the same on both sides."""
    layer, _, _ = made("16", "auto")
    scale = layer.weight_scale.detach() * torch.where(torch.arange(N) % 2 == 0, 0.4, -0.4)[:, None]
    weight, quantizer = layer.weight.detach(), layer.numerics.fprop.right
    operand = quantizer.operand(weight, quantizer.layout((N, K), blocks=True), learned=scale)
    beyond = (weight.double().view(N, -1, 16) / scale.double()[..., None]).abs() > LEVEL
    found = operand_health(Observed("fprop.w", quantizer, weight, None, -1, operand), 1024)["clipped"]
    assert 0 < found.item() == pytest.approx(beyond.double().mean().item(), rel=1e-6)


@pytest.mark.parametrize("block", ["row", "16"])
def test_graphs_know_the_shapes_of_learned_blocks(block: str) -> None:
    layer, x, dy = made(block, "auto")
    shared = layer.keys, layer.text, torch.float32, 0
    weight, scale = layer.weight.detach(), layer.weight_scale.detach()
    tests = ("test_schema", "test_faketensor")
    passed = dict.fromkeys(tests, "SUCCESS")
    given = weight, scale, False, *shared
    assert torch.library.opcheck(functional.quantize_weight, given, test_utils=tests) == passed
    *_, slope = functional.quantize_weight(*given)
    assert slope.shape == weight.shape
    _, *saved = functional.fprop(x, weight, layer.input_scale.detach(), scale, [], True, False, None, *shared)
    given = [dy], saved, None, slope, len(x), N, K, torch.float32
    assert torch.library.opcheck(functional.wgrad, (*given, *shared), test_utils=tests) == passed
    assert functional.wgrad(*given, *shared)[1].shape == scale.shape


def test_scales_that_no_step_would_train_are_refused() -> None:
    """The optimiser would have no state for them, and a checkpoint of it could not be gone on from."""
    check_model(compose(["recipe=lsq", "recipe.high_precision_after=0.5"]))
    check_model(compose(["recipe=quest", "recipe.high_precision_after=0"]))
    with pytest.raises(UserError, match=r"learns scales in quantised steps, .*_after=0 leaves none"):
        check_model(compose(["recipe=lsq", "recipe.high_precision_after=0"]))
