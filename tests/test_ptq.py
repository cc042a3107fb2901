"""Post-training quantisation of one weight, against a textbook computation in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles.quantization import minifloat_grid, nearest
from torch import Tensor, nn

from qtrain import convert
from qtrain.config.recipe import QuantSpec
from qtrain.post_training import Inputs, Way, best_exponent_biases, pack_in_best_formats
from qtrain.quant import QuantLinear, set_high_precision
from qtrain.quant.ptq import Hessian, Method, compensated, quantize_weight, relative_error, scales_of
from qtrain.quant.ptq.formats import minifloats
from qtrain.quant.quantizer import QuantizedTensor, Quantizer
from qtrain_kernels.reference import round_nearest

N, K, T = 24, 128, 512
FORMATS = {
    "int4_sym": {"format": "int4_sym"},
    "int4_sym in groups": {"format": "int4_sym/32/float32"},
    "int4_sym under float16": {"format": "int4_sym/32/float16"},
    "int4 with zero points": {"format": "int4_asym/32/bfloat16"},
    "int4, no zero": {"format": "int4"},
    "mxfp4": {"format": "mxfp4", "scale": "floor_three_quarters"},
    "nvfp4": {"format": "nvfp4"},
    "fp4 in rows": {"format": "fp4_e2m1", "scale": "absmax"},
    "nvfp4 in tiles": {"format": "e2m1/16x16/e4m3"},
}


def quantizer(spec: dict[str, Any]) -> Quantizer:
    return Quantizer.build(QuantSpec(**spec), "reference")


def correlated(seed: int = 0) -> tuple[Tensor, Tensor]:
    """(weight (N, K), inputs (T, K)) whose features go together, with a dead one and some that are large."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator) * 0.05
    x = torch.randn(T, 16, generator=generator) @ torch.randn(16, K, generator=generator)
    x += 0.3 * torch.randn(T, K, generator=generator)
    x[:, ::29] *= 8
    x[:, 7] = 0.0
    return weight, x


def hessian_of(x: Tensor) -> Tensor:
    found = Hessian(x.shape[1])
    for part in x.split(100):
        found.add(part)
    return found.mean()


def zeros_of(weight: Tensor, scale: Tensor, size: int, shrunk: float = 1.0) -> Tensor:
    """The zero points, float64, of each element of a weight (N, K) whose blocks have 4 bits: the smallest value of a
    block, at most 0 and shrunk, lies on level 0 as nearly as whole numbers can. scale: (N, K)."""
    smallest = weight.double().view(len(weight), -1, size).amin(2).clamp_max(0) * shrunk
    return (-smallest.repeat_interleave(size, 1) / scale.double()).round().clamp(0, 15)


def textbook(weight: Tensor, hessian: Tensor, scale: Tensor, levels: Tensor, order: Tensor, zero: Tensor) -> Tensor:
    """Optimal brain quantisation of every row in one order, float64: after each column, the dense inverse loses its
    row and column by Gaussian elimination. Codes are levels less the zero (N, K). Ties go to either neighbour."""
    w, inverse = weight.double().clone(), torch.linalg.inv(hessian.double())
    codes = torch.zeros_like(w)
    for place, j in enumerate(order.tolist()):
        u = w[:, j] / scale[:, j].double() + zero[:, j]
        codes[:, j] = levels[(u[:, None] - levels).abs().argmin(1)] - zero[:, j]
        error = (w[:, j] - codes[:, j] * scale[:, j].double()) / inverse[j, j]
        rest = order[place + 1 :]
        w[:, rest] -= error[:, None] * inverse[j, rest]
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


def test_the_hessian_is_the_mean_of_all_tokens() -> None:
    x = torch.randn(300, 37, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(hessian_of(x).double(), 2 * x.double().T @ x.double() / 300, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="no token has been seen"):
        Hessian(4).mean()


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("spec", FORMATS.values(), ids=FORMATS)
def test_codes_are_those_of_the_textbook(spec: dict[str, Any], order: Any) -> None:
    weight, x = correlated()
    hessian = hessian_of(x)
    side = quantizer(spec)
    scales = scales_of(weight, side)
    found = compensated(weight, hessian, scales, order, damping=0.01)[0]
    damped = hessian.double().clone()
    damped[7, 7] = 1.0
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    alive = weight.clone()
    alive[:, 7] = 0.0
    columns = damped.diagonal().argsort(descending=True, stable=True) if order == "activation" else torch.arange(K)
    scale = scales.of_columns(0, K).expand(N, K)
    assert side.plan is not None
    levels = torch.tensor(side.plan.element.levels(), dtype=torch.float64)
    zero = zeros_of(weight, scale, 32) if side.plan.element.zero_point else torch.zeros(N, K)
    wanted = textbook(alive, damped, scale, levels, columns, zero)
    differing = (found.double() != wanted).float().mean().item()
    assert differing < 2e-3, f"{differing:.2%}: a value next to a tie rounds otherwise in float32, and moves its row"
    assert len(found.unique()) > 8


@pytest.mark.parametrize("spec", FORMATS.values(), ids=FORMATS)
def test_errors_of_the_layer_fall_from_method_to_method(spec: dict[str, Any]) -> None:
    """On inputs that it was not calibrated on too."""
    for seed in range(3):
        weight, x = correlated(seed)
        seen, unseen = hessian_of(x[: T // 2]), hessian_of(x[T // 2 :])
        errors = {}
        for name, method in {
            "rtn": Method(),
            "gptq": Method(compensation="gptq"),
            "activation": Method(compensation="gptq", order="activation"),
        }.items():
            value = quantize_weight(weight, seen, quantizer(spec), method)[0].dequantize("reference")
            errors[name] = relative_error(weight, value, seen), relative_error(weight, value, unseen)
        for name in ("gptq", "activation"):
            assert errors[name][0] < 0.5 * errors["rtn"][0] and errors[name][1] < errors["rtn"][1], errors


@pytest.mark.parametrize("spec", FORMATS.values(), ids=FORMATS)
def test_without_a_method_codes_are_the_quantisers_own(spec: dict[str, Any]) -> None:
    weight, x = correlated()
    weight[5] = 0.0
    side = quantizer(spec)
    found = QuantizedTensor.of(quantize_weight(weight, hessian_of(x), side, Method())[0], "reference")
    wanted = side.quantize(weight)
    assert torch.equal(found.dequantize(), wanted.dequantize())
    assert torch.equal(found.codes[:5], wanted.codes[:5])


@pytest.mark.parametrize(
    "name", ["int4_sym", "int4_sym in groups", "int4_sym under float16", "mxfp4", "nvfp4", "fp4 in rows"]
)
def test_a_search_finds_the_best_of_its_scales(name: str) -> None:
    """Against every candidate, block by block, in float64."""
    weight, _ = correlated()
    side = quantizer(FORMATS[name])
    first, best = scales_of(weight, side), scales_of(weight, side, steps=20)
    assert side.plan is not None
    size = first.layout.size or K
    levels = torch.tensor(side.plan.element.levels(), dtype=torch.float64)

    def error(scale: Tensor) -> Tensor:
        u = weight.double() / scale
        codes = levels[(u[..., None] - levels).abs().argmin(-1)]
        return ((codes * scale - weight).abs() ** 2.4).view(N, -1, size).sum(2)

    def of(scales: Any) -> Tensor:
        return scales.of_columns(0, K).expand(N, K).double()

    found = error(of(best))
    assert (found <= error(of(first)) * (1 + 1e-6)).all() and (found < error(of(first))).any()
    for part in range(20):
        factor = 1 - 0.8 * part / 20
        if first.layout.plan is not None and first.layout.plan.scale_kind == "e8m0":
            factor = 2.0 ** -(part % 3)
        tried = of(first) * factor
        if first.block is not None and side.plan.scale_element is not None:
            grid = torch.tensor(side.plan.scale_element.magnitudes())
            rounded = grid[(first.block[..., None] * factor - grid).abs().argmin(-1)]
            tried = (rounded * first.tensor).repeat_interleave(size, 1).double()
        if name.endswith("float16"):
            assert torch.equal(best.block, best.block.half().float()), "a scale that the format lacks"
            tried = (first.block * factor).half().double().repeat_interleave(size, 1)
        usable = (tried > 0).view(N, -1, size).all(2)
        assert (found[usable] <= error(tried)[usable] * (1 + 1e-5)).all(), part


def test_a_search_moves_both_ends_of_a_range() -> None:
    """The rule against float64, then the search against each of its candidates: the smallest and the largest value
    shrunk alike, scales in bfloat16, zero points of what is shrunk."""
    weight, _ = correlated()
    weight += 0.02
    weight[3, :32], weight[4] = 0.05, weight[4].abs()
    side = quantizer(FORMATS["int4 with zero points"])
    first, best = scales_of(weight, side), scales_of(weight, side, steps=20)
    blocks = weight.double().view(N, -1, 32)
    span = blocks.amax(2).clamp_min(0) - blocks.amin(2).clamp_max(0)
    assert torch.equal(first.block, (span / 15).bfloat16().float())

    def of(scales: Any) -> Tensor:
        return scales.of_columns(0, K).double()

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        values = ((weight.double() / scale + zero).round().clamp(0, 15) - zero) * scale
        return ((values - weight).abs() ** 2.4).view(N, -1, 32).sum(2)

    assert torch.equal(first.zero_points_of_columns().double(), zeros_of(weight, of(first), 32))
    found = error(of(best), best.zero_points_of_columns().double())
    assert (found < error(of(first), first.zero_points_of_columns().double())).float().mean() > 0.3
    for part in range(20):
        factor = 1 - 0.8 * part / 20
        scale = (first.block * factor).bfloat16().double().repeat_interleave(32, 1)
        assert (found <= error(scale, zeros_of(weight, scale, 32, factor)) * (1 + 1e-5)).all(), part
    codes = quantize_weight(weight, torch.eye(K), side, Method(search=20))[0]
    assert torch.equal(codes.zero_point.repeat_interleave(32, 1), best.zero_points_of_columns().to(torch.uint8))
    values = (
        (weight / of(best) + best.zero_points_of_columns()).round().clamp(0, 15)
        - codes.zero_point.repeat_interleave(32, 1)
    ) * of(best)
    torch.testing.assert_close(codes.dequantize().double(), values, rtol=1e-6, atol=1e-9)


def of_the_fixture() -> tuple[Tensor, Tensor]:
    """(weight (32, 256), inputs (1024, 256)) that tests/oracles/fp_quant_gptq.npz was made of."""
    draw = np.random.default_rng(0)
    weight = draw.standard_normal((32, 256)) * 0.05
    x = draw.standard_normal((1024, 32)) @ draw.standard_normal((32, 256)) + 0.3 * draw.standard_normal((1024, 256))
    x[:, ::29] *= 8
    x[:, 7] = 0
    return torch.from_numpy(weight).float(), torch.from_numpy(x).float()


@pytest.mark.parametrize("name", ["mxfp", "nvfp"])
def test_scales_and_codes_are_those_of_fp_quant(name: str) -> None:
    """What github.com/IST-DASLab/FP-Quant (src/quantization/gptq.py, blocks of 128, damping 0.01) made of this layer on
    a CPU. It rounds a column without inputs too, which is left out here. Its search takes the error of scales before
    they are rounded to their format; ours is never above its result."""
    with np.load(Path(__file__).parent / "oracles" / "fp_quant_gptq.npz") as file:
        theirs = {key: torch.from_numpy(value) for key, value in file.items()}
    weight, x = of_the_fixture()
    assert [x.double().sum().item(), weight.double().sum().item()] == pytest.approx(theirs["sums"].tolist(), rel=1e-9)
    side = quantizer(FORMATS[{"mxfp": "mxfp4", "nvfp": "nvfp4"}[name]])
    scales, hessian = scales_of(weight, side), hessian_of(x)
    size = scales.layout.size
    assert size is not None and side.plan is not None
    torch.testing.assert_close(
        scales.of_columns(0, 256)[:, ::size], theirs[f"{name}-minmax-scales"], rtol=1e-6, atol=0.0
    )
    alive = torch.arange(256) != 7
    for order, ours in (("default", "natural"), ("activation", "activation")):
        codes = compensated(weight, hessian, scales, ours, 0.01)[0]  # pyright: ignore[reportArgumentType]
        rows = (codes * 2 != theirs[f"{name}-{order}-codes"])[:, alive].any(1).sum().item()
        assert rows <= 2, f"{order}: {rows} of 32 rows; sums in another order move a value across a tie, and its row"

    def error(scale: Tensor) -> Tensor:
        scale = scale.repeat_interleave(size, 1)
        value = round_nearest(weight / scale, side.plan.element) * scale  # pyright: ignore[reportOptionalMemberAccess]
        return ((value - weight).abs() ** 2.4).view(32, -1, size).sum(2)

    found = error(scales_of(weight, side, steps=100).of_columns(0, 256)[:, ::size])
    assert (found <= error(theirs[f"{name}-mse-scales"]) * (1 + 1e-5)).all()


def test_the_search_counts_important_columns() -> None:
    weight, x = correlated()
    hessian = hessian_of(x)
    plain, weighted = (
        quantize_weight(weight, hessian, quantizer({"format": "int4_sym"}), Method(search=50, norm=2.0, weighted=each))
        for each in (False, True)
    )
    diagonal = hessian.diagonal()
    errors = [((q.dequantize("reference") - weight) ** 2 * diagonal).sum().item() for q, _ in (plain, weighted)]
    assert errors[1] < 0.99 * errors[0]


def test_second_moments_that_cannot_be_inverted_are_refused() -> None:
    weight, _ = correlated()
    scales = scales_of(weight, quantizer({"format": "int4_sym"}))
    with pytest.raises(ValueError, match="raise the damping, or calibrate on more text"):
        compensated(weight, torch.ones(K, K), scales, "natural", damping=0.0)
    with pytest.raises(ValueError, match="not finite"):
        compensated(weight, torch.full((K, K), torch.nan), scales, "natural", damping=0.01)


def layer_in(x: str, w: str, weight: Tensor) -> QuantLinear:
    linear = nn.Linear(weight.shape[1], len(weight))
    linear.weight.data.copy_(weight)
    model = nn.Sequential(linear)
    none, again = {"format": "none"}, {"format": "none", "source": "forward"}
    plain = {"dgrad": {"dy": none, "w": again}, "wgrad": {"dy": none, "x": again}}
    convert(model, {"name": "test", "fprop": {"x": {"format": x}, "w": {"format": w}}, **plain}, backend="reference")
    layer = model[0]
    assert isinstance(layer, QuantLinear)
    return layer


GRIDS = {f"e{e}m{3 - e}": minifloat_grid(e, 3 - e, np.inf) for e in (1, 2, 3)}


def to_nearest(x: np.ndarray, element: str, block: int) -> np.ndarray:
    """Blocks under the scale that brings their largest magnitude to the largest code."""
    blocks = x.reshape(len(x), -1, block)
    scale = np.abs(blocks).max(-1, keepdims=True) / max(GRIDS[element])
    return (nearest(blocks / scale, GRIDS[element]) * scale).reshape(x.shape)


@pytest.mark.parametrize(("largest", "block", "chosen"), [(1, "row", "e1m2"), (40, "row", "e3m0"), (40, "32", "e3m0")])
def test_formats_are_those_of_the_least_output_error(largest: float, block: str, chosen: str) -> None:
    """LLM-FP4, to nearest: all pairs in float64. One channel of large inputs asks for more exponent bits."""
    weight, x = correlated()
    x = (x / x.std(0).clamp_min(1e-3)).tanh()
    x[:, 50] *= largest
    x64, w64, size = x.double().numpy(), weight.double().numpy(), 32 if block == "32" else K
    x64[:, 7] = x64[:, 6]
    x = torch.from_numpy(x64).float()
    wanted = {
        (a, b): np.square(to_nearest(x64, a, size) @ to_nearest(w64, b, size).T - x64 @ w64.T).sum()
        for a in GRIDS
        for b in GRIDS
    }
    layer = layer_in(f"e2m1/{block}/float32", f"e2m1/{block}/float32", weight)
    seen = Inputs(hessian_of(x), x.abs().amax(0), x.abs().mean(0))
    packed = pack_in_best_formats(layer, seen, Way(), x)
    found = [
        str(side.spec.format).partition("/")[0] for side in (packed.numerics.fprop.left, packed.numerics.fprop.right)
    ]
    assert tuple(found) == min(wanted, key=lambda pair: wanted[pair]) and found[0] == chosen
    np.testing.assert_allclose(packed.dequantize().numpy(), to_nearest(w64, found[1], size), rtol=1e-5, atol=1e-7)
    error = (packed(x).double() - layer.bias.double() - torch.from_numpy(x64 @ w64.T)).square().sum().item()
    assert error == pytest.approx(wanted[found[0], found[1]], rel=2e-2), "a value next to a tie rounds otherwise"


@pytest.mark.parametrize(("wide", "taken"), [(1.0, 0), (6.0, 1), (100.0, 3)])
def test_as_many_exponent_biases_are_folded_as_lower_the_error(wide: float, taken: int) -> None:
    """LLM-FP4, whose biases help where some input channels are wide: in float64, for two layers of the same inputs."""
    weight, _ = correlated()
    x = torch.randn(T, K, generator=torch.Generator().manual_seed(3)).tanh()
    x[:, ::16] *= wide
    x64, largest = x.double().numpy(), x.abs().amax(0)
    weights, errors = (weight, 0.5 * weight.flip(0)), []
    for most in range(4):
        f = 2.0 ** -np.clip(np.round(np.log2(largest.max().item() / largest.double().numpy())), 0, most)
        pairs = [(to_nearest(x64 / f, "e2m1", K), w.double().numpy()) for w in weights]
        errors.append(sum(np.square(a @ to_nearest(w * f, "e2m1", K).T - x64 @ w.T).sum() for a, w in pairs))
    assert np.argmin(errors) == taken
    group = [layer_in("fp4_e2m1", "fp4_e2m1", each) for each in weights]
    for layer in group:
        set_high_precision(layer)
    found = best_exponent_biases(group, largest, x)
    assert found.min() == 2.0**-taken and all(layer.high_precision for layer in group)
    plain = layer_in("none", "fp4_e2m1", weight)
    assert torch.equal(best_exponent_biases([plain], largest, x), torch.ones(K))


def test_minifloats_are_all_splits_of_the_bits() -> None:
    assert minifloats(QuantSpec(format="none")) == ["none"]
    assert minifloats(QuantSpec(format="nvfp4")) == ["nvfp4", "e1m2/16/e4m3", "e3m0/16/e4m3"]
    assert minifloats(QuantSpec(format="e2m3/16x16/e4m3"))[1:] == [
        f"{element}/16x16/e4m3" for element in ("e1m4", "e3m2", "e4m1", "e5m0")
    ]
    eight = [f"{element}/row/float32" for element in ("e1m6", "e2m5", "e3m4", "e5m2")]
    assert minifloats(QuantSpec(format="fp8_e4m3")) == ["fp8_e4m3", *eight]
    for name in ("int4_sym", "nf4", "mxint8"):
        with pytest.raises(ValueError, match=f"of {name} its codes are no minifloats; take a format in FP4"):
            minifloats(QuantSpec(format=name))
