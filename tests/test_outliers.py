"""Weights of which columns, elements or the low-rank part of the error stay in 16 bits, against float64 computations
from the papers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qtrain import convert
from qtrain.config.recipe import QuantSpec
from qtrain.post_training import Inputs, Way, pack_layer
from qtrain.quant import QuantLinear
from qtrain.quant.adapter import adapters, whole_bits, whole_weight
from qtrain.quant.outliers import Outliers
from qtrain.quant.ptq import Method, Split, compensated, eliminated, make_up, scales_of, sensitive
from qtrain.quant.quantizer import Quantizer

N, K, T = 24, 128, 512
BLOCKS = {"format": "int4_sym/32/float32", "scale": "absmax"}
COLUMNS = torch.tensor([3, 40, 41, 99])
RECIPES = {
    "weights in blocks": ("int4_sym/32/float32", "none", None),
    "weights in rows": ("int4_sym", "none", None),
    "weights rotated": ("int4_sym", "none", "hadamard32"),
    "inputs too": ("mxfp4", "mxfp4", None),
    "inputs too, in rows": ("int4_sym", "int8_sym", None),
}


def quantizer(spec: dict[str, Any]) -> Quantizer:
    return Quantizer.build(QuantSpec(**spec), "reference")


def planted(seed: int = 0) -> tuple[Tensor, Tensor]:
    """(weight (N, K) with single large elements, inputs (T, K) of which COLUMNS are large)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator) * 0.05
    weight[torch.arange(0, N, 2), torch.randint(K, (N // 2,), generator=generator)] = 1.0
    x = torch.randn(T, 16, generator=generator) @ torch.randn(16, K, generator=generator)
    x += 0.5 * torch.randn(T, K, generator=generator)
    x[:, COLUMNS] *= 20
    return weight, x


def hessian_of(x: Tensor) -> Tensor:
    return (2 * x.double().T @ x.double() / len(x)).float()


def levels_of(side: Quantizer) -> np.ndarray:
    assert side.plan is not None
    return np.array(side.plan.element.levels())


def textbook(
    weight: np.ndarray, hessian: np.ndarray, scale: np.ndarray, levels: np.ndarray, order: list[int], kept: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Optimal brain quantisation of all columns of `order`, float64; the others stay free and take up the errors, and
    kept elements make none. Returns (codes, the weight as it was when its turn came, or at the end)."""
    w, inverse, codes = weight.copy(), np.linalg.inv(hessian), np.zeros_like(weight)
    free = list(range(len(hessian)))
    for j in order:
        codes[:, j] = levels[np.abs(w[:, [j]] / scale[:, [j]] - levels).argmin(1)]
        error = np.where(kept[:, j], 0.0, w[:, j] - codes[:, j] * scale[:, j]) / inverse[j, j]
        free.remove(j)
        w[:, free] -= np.outer(error, inverse[j, free])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes, w


def test_columns_that_stay_come_last_and_make_up_for_the_rest() -> None:
    """QUIK: GPTQ over all columns, the outlier columns last and not rounded."""
    weight, x = planted()
    hessian, side = hessian_of(x), quantizer(BLOCKS)
    left = weight.index_fill(1, COLUMNS, 0.0)
    scales = scales_of(left, side)
    schur = eliminated(hessian, COLUMNS, 0.01)
    codes = compensated(left, schur, scales, "natural", 0.01)[0]
    scale = scales.of_columns(0, K)
    tail = make_up(weight, codes * scale, hessian, COLUMNS, 0.01).numpy()

    damped, within = hessian.double().numpy().copy(), COLUMNS.numpy()
    others = np.setdiff1d(np.arange(K), within)
    damped[within, within] += 0.01 * damped[within, within].mean()
    block = damped[np.ix_(others, within)] @ np.linalg.inv(damped[np.ix_(within, within)])
    rest = np.ones(K)
    rest[others] = np.diag(damped[np.ix_(others, others)] - block @ damped[np.ix_(within, others)])
    damped[others, others] += 0.01 * rest.mean()
    none = np.zeros((N, K), bool)
    wanted, w = textbook(
        weight.double().numpy(), damped, scale.double().numpy(), levels_of(side), others.tolist(), none
    )
    same = (codes.numpy() == wanted)[:, others].all(1)
    assert same.mean() > 0.9, "a value next to a tie rounds otherwise in float32, and moves its row"
    np.testing.assert_allclose(tail[same], w[same][:, within], rtol=1e-4, atol=1e-6)
    assert np.abs(tail - weight[:, COLUMNS].numpy()).max() > 1e-3


@pytest.mark.parametrize("order", ["natural", "activation"])
def test_elements_that_stay_keep_what_the_columns_before_made_of_them(order: Any) -> None:
    weight, x = planted()
    hessian, side = hessian_of(x), quantizer(BLOCKS)
    kept = weight.abs() > 0.13
    scales = scales_of(weight.masked_fill(kept, 0.0), side)
    codes, beside = compensated(weight, hessian, scales, order, 0.01, kept)
    damped = hessian.double().numpy().copy()
    damped[np.arange(K), np.arange(K)] += 0.01 * np.diag(damped).mean()
    columns = np.argsort(-np.diag(damped), kind="stable") if order == "activation" else np.arange(K)
    scale = scales.of_columns(0, K).double().numpy()
    wanted, w = textbook(weight.double().numpy(), damped, scale, levels_of(side), columns.tolist(), kept.numpy())
    same = (codes.numpy() == wanted).all(1)
    assert same.mean() > 0.6, "bfloat16 rounds what stays, and that moves some rows across a tie"
    assert not beside[~kept].any() and 20 < kept.sum() < 200
    found = (codes.double() * torch.from_numpy(scale) + beside).numpy()
    for row in np.flatnonzero(same):
        np.testing.assert_allclose(found[row][kept[row]], w[row][kept[row]], rtol=8e-3, atol=1e-3)


@pytest.mark.parametrize(("threshold", "least", "most"), [(0.2, 12, 20), (0.01, 50, 400)])
def test_sensitive_elements_are_those_of_the_definition(threshold: float, least: int, most: int) -> None:
    weight, x = planted()
    hessian, side = hessian_of(x), quantizer(BLOCKS)
    found = sensitive(weight, hessian, side, threshold, damping=0.01).numpy()
    w, damped, levels = weight.double().numpy(), hessian.double().numpy().copy(), levels_of(side)
    damped[np.arange(K), np.arange(K)] += 0.01 * np.diag(damped).mean()
    importance = 1 / np.diag(np.linalg.inv(damped))
    limit = threshold * (w.var(0, ddof=1) * importance).mean()
    wanted = np.zeros_like(found)
    for n in range(N):
        for begin in range(0, K, 32):
            part, of = w[n, begin : begin + 32], importance[begin : begin + 32]
            best = np.inf
            for tried in range(5):
                out = np.isin(np.arange(32), np.argsort(-np.abs(part))[:tried])
                scale = np.abs(part[~out]).max() / levels.max()
                value = levels[np.abs(part[:, None] / scale - levels).argmin(1)] * scale
                error = np.where(out, 0.0, (value - part) ** 2 * of)
                out |= error > limit
                if (cost := error[~out].sum() + limit * out.sum()) < best:
                    best, wanted[n, begin : begin + 32] = cost, out
    assert (found == wanted).all()
    assert found[weight.numpy() == 1.0].all() and least <= found.sum() <= most


def layer_of(name: str, weight: Tensor) -> QuantLinear:
    w, x, rotation = RECIPES[name]
    sides = {
        side: {"format": format, "rotation": rotation, "scale": "absmax" if format.startswith("int") else None}
        for side, format in (("x", x), ("w", w))
    }
    linear = nn.Linear(K, N, bias=False)
    linear.weight.data.copy_(weight)
    model = nn.Sequential(linear)
    none, again = {"format": "none"}, {"format": "none", "source": "forward"}
    plain = {"dgrad": {"dy": none, "w": again}, "wgrad": {"dy": none, "x": again}}
    convert(model, {"name": "test", "fprop": sides, **plain}, backend="reference")
    layer = model[0]
    assert isinstance(layer, QuantLinear)
    return layer


def inputs_of(x: Tensor) -> Inputs:
    return Inputs(hessian_of(x), x.abs().amax(0), x.abs().mean(0))


@pytest.mark.parametrize("compensation", ["none", "gptq"])
@pytest.mark.parametrize("name", RECIPES)
def test_outliers_lower_the_error_of_the_layers_output(name: str, compensation: Any) -> None:
    """Of the layer's own forward, in float64, on the inputs and on others of the same kind."""
    weight, both = planted()
    x, unseen = both[: T // 2], both[T // 2 :]
    method, errors = Method(compensation=compensation), {}
    layer = layer_of(name, weight)
    for split in (Split(), Split(columns=4), Split(above=30.0), Split(weights=0.2), Split(columns=4, weights=0.2)):
        packed = pack_layer(layer, inputs_of(x), Way(method, split=split))
        wrong = [(packed(each).double() - each.double() @ weight.double().T).square().sum() for each in (x, unseen)]
        errors[str(split)] = [each.item() for each in wrong]
        if split.columns or split.above:
            assert packed.outliers is not None and packed.outliers.columns.tolist() == COLUMNS.tolist()
    plain = errors.pop("")
    for name, found in errors.items():
        assert all(after < before for after, before in zip(found, plain, strict=True)), (name, found, plain)


@pytest.mark.parametrize("name", RECIPES)
def test_the_product_and_its_gradient_are_those_of_the_whole_weight(name: str) -> None:
    weight, x = planted()
    packed = pack_layer(layer_of(name, weight), inputs_of(x), Way(Method(), split=Split(columns=4, weights=0.2)))
    outliers, whole = packed.outliers, packed.dequantize().double()
    assert outliers is not None and torch.equal(outliers.column_weight, weight[:, COLUMNS].bfloat16())
    x = x[:16].clone().requires_grad_()
    y = packed(x)
    if RECIPES[name][1] == "none":
        torch.testing.assert_close(y.double(), x.double() @ whole.T, rtol=1e-4, atol=1e-3)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(dy)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), dy.double() @ whole, rtol=1e-4, atol=1e-4)
    codes, values = packed.codes.nbytes, 4 * outliers.values.numel() + 2 * N + 4 * 4 + 2 * 4 * N
    scales = sum(part.nbytes for part in packed.weight.tensors()) - codes
    assert packed.bits() == pytest.approx(8 * (codes + scales + values) / (N * K))
    packed.to(torch.float64)
    assert outliers.values.dtype == torch.bfloat16


def test_elements_are_found_again_in_rows_as_long_as_16_bits_count() -> None:
    generator = torch.Generator().manual_seed(0)
    beside = torch.randn(3, 0xFFFF, generator=generator).bfloat16().float()
    beside[1, ::2] = 0.0
    nothing = torch.zeros(0, dtype=torch.long)
    outliers = Outliers.of(nothing, beside[:, nothing], beside)
    assert outliers is not None and torch.equal(outliers.elements(0xFFFF), beside)
    with pytest.raises(ValueError, match="of at most 65,535 inputs, and it has 65,536"):
        Outliers.of(nothing, beside[:, nothing], torch.ones(3, 0x10000))


def test_nothing_kept_is_no_outliers_and_what_does_not_fit_is_refused() -> None:
    weight, x = planted()
    nothing = torch.zeros(0, dtype=torch.long)
    assert Outliers.of(nothing, weight[:, nothing], torch.zeros(N, K)) is None
    with pytest.raises(ValueError, match="not finite in bfloat16"):
        Outliers.of(nothing, weight[:, nothing], torch.full((N, K), torch.inf))
    with pytest.raises(ValueError, match="all of its 128 input columns would be outliers"):
        Split(above=1e-3).columns_of(x.abs().amax(0))
    with pytest.raises(ValueError, match=r"126 columns and 0 elements as outliers take 17\.2 bits a weight"):
        pack_layer(layer_of("weights in rows", weight), inputs_of(x), Way(split=Split(columns=126)))
    linear = nn.Linear(K, N, bias=False)
    linear.weight.data.copy_(weight * 1e6)
    large = nn.Sequential(linear)
    convert(large, "w4a16")
    with pytest.raises(ValueError, match=r"float16 does not hold its weights, whose largest magnitude is .*e\+0"):
        pack_layer(large[0], inputs_of(x), Way())  # pyright: ignore[reportArgumentType]
    for spec in ("e4m3/tensor/float32", "e2m1/16x16/e4m3"):
        with pytest.raises(ValueError, match="has a scale for several rows"):
            sensitive(weight, hessian_of(x), quantizer({"format": spec}), 0.2, 0.01)


@pytest.mark.parametrize("name", RECIPES)
def test_a_low_rank_part_is_the_singular_value_decomposition_of_the_error(name: str) -> None:
    """LoRC: the product of the factors is the best approximation of rank 8 of W - W' in float64, to the rounding of the
    two to bfloat16. The layer computes with it, and its bits count it."""
    weight, x = planted()
    plain, packed = (pack_layer(layer_of(name, weight), inputs_of(x), Way(low_rank=rank)) for rank in (0, 8))
    error = weight.double().numpy() - plain.dequantize().double().numpy()
    left, values, right = np.linalg.svd(error, full_matrices=False)
    wanted = left[:, :8] * values[:8] @ right[:8]
    (adapter,) = adapters(packed).values()
    found = adapter.product().double().numpy()
    assert np.linalg.norm(found - wanted) < 2**-8 * np.linalg.norm(wanted)
    for factor, side in ((adapter.A.T, right[:8].T), (adapter.B, left[:, :8])):
        assert factor.dtype == torch.bfloat16 and not factor.requires_grad
        lengths = np.linalg.norm(factor.double().numpy(), axis=0)
        np.testing.assert_allclose(lengths, np.sqrt(values[:8]) * np.linalg.norm(side, axis=0), rtol=2**-8)
    torch.testing.assert_close(whole_weight(packed), plain.dequantize() + adapter.product())
    x = x[:16].clone().requires_grad_()
    y = packed(x)
    torch.testing.assert_close((y - plain(x)).double(), x.double() @ torch.from_numpy(found).T, rtol=1e-4, atol=1e-3)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(dy)
    torch.testing.assert_close(x.grad, dy @ whole_weight(packed), rtol=1e-4, atol=1e-3)
    assert whole_bits(packed) == pytest.approx(plain.bits() + 16 * 8 * (N + K) / (N * K))


@pytest.mark.parametrize("split", [Split(), Split(columns=4, weights=0.2)], ids=["codes", "outliers"])
@pytest.mark.parametrize("compensation", ["none", "gptq"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_low_rank_part_lowers_the_error_of_the_weights_product(name: str, compensation: Any, split: Split) -> None:
    """On every input, for which it is a projection of the error from the left: these, and others of the same kind."""
    weight, both = planted()
    x, unseen = both[: T // 2], both[T // 2 :]
    errors = []
    for rank in (0, 2, 8):
        way = Way(Method(compensation=compensation), split=split, low_rank=rank)
        left = weight.double() - whole_weight(pack_layer(layer_of(name, weight), inputs_of(x), way)).double()
        errors.append([(each.double() @ left.T).square().sum().item() for each in (x, unseen)])
    for more, less in pairwise(errors):
        assert all(after < before for before, after in zip(more, less, strict=True)), errors
