"""PackedLinear: the same outputs as the layer that it was made of, from the codes alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_few_rows import weight_only
from torch import nn

import qtrain
from qtrain.errors import UserError
from qtrain.quant import PackedLinear, QuantLinear
from qtrain.quant.adapter import attach
from qtrain.quant.doubled import DoubledLinear
from qtrain.quant.functional import Call, given_scale
from qtrain.quant.outliers import Outliers
from qtrain.quant.quantizer import unrotate

K, N = 256, 48
WEIGHT_ONLY = {"name": "quest_weight_only"}


def learned(format: str, **w: Any) -> dict[str, Any]:
    """Weights alone, under a learned scale of each block of their format."""
    recipe = weight_only(format)
    recipe["fprop"]["w"] |= {"scale": "learned", **w}
    recipe["fprop"]["x"] |= w
    return recipe


# Recipe -> bits that a weight takes: codes, scales of blocks, of rows (32 / K) and of the matrix (32 / (N K)).
BITS: dict[str, tuple[Any, float]] = {
    "quest": ("quest", 4 + 32 / K),
    "quest 2 bits": ({"name": "quest", "bits": 2}, 2 + 32 / K),
    "quest_weight_only": (WEIGHT_ONLY, 4 + 32 / K),
    "quartet": ("quartet", 4 + 8 / 32),
    "quartet_phase": ("quartet_phase", 4 + 8 / 32 + 32 / K),
    "quartet_ii": ("quartet_ii", 4 + 8 / 16 + 32 / (N * K)),
    "mxfp8": ("mxfp8", 8 + 8 / 32),
    "float16 scales": (weight_only("int4_sym/32/float16"), 4 + 16 / 32),
    "bfloat16 scales": (weight_only("int8/64/bfloat16"), 8 + 16 / 64),
    "zero points": ("w4a16_asym", 4 + (16 + 4) / 128),
    "trilm": ("trilm", 2 + 32 / (N * K)),
    "nvidia_nvfp4": (
        "nvidia_nvfp4",
        16 + 32 / 256 + 32 / (N * K),
    ),  # 16x16 tiles have no packed form: bfloat16 beside them
    "ufp4": ("ufp4", 32 + 32 / 16),  # signs that are drawn once; float32 scales of blocks are not packed
    "lsq": ("lsq", 4 + 32 / (N * K)),
    "learned rows": (learned("int4/row/float32", rotation="hadamard32"), 4 + 32 / K),
    "learned groups": (learned("int4/128/float32"), 4 + 32 / 128),
    "learned groups of minifloats": (learned("e2m1/16/float32"), 4 + 32 / 16),
    "learned groups of a table": (learned("nf4/64/float32"), 4 + 32 / 64),
}
LEARNED = [name for name in BITS if name.startswith("learned")]


def layer_of(recipe: Any, bias: bool = True, seed: int = 0) -> tuple[nn.Sequential, QuantLinear]:
    """Learned scales are of both signs, as LSQ's steps may become in training."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(K, N, bias=bias))
    model[0].weight.data[3] = 0.0
    qtrain.convert(model, recipe, seed=3)
    layer = model[0]
    assert isinstance(layer, QuantLinear)
    if layer.weight_scale is not None:
        qtrain.calibrate(model, torch.randn(64, K))
        layer.weight_scale.data[::2] *= -1
    return model.eval(), layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("recipe", "bits"), BITS.values(), ids=BITS)
def test_outputs_are_those_of_the_layer(recipe: Any, bits: float, dtype: torch.dtype) -> None:
    model, _ = layer_of(recipe)
    x = torch.randn(43, 3, K, dtype=dtype)  # more rows than are multiplied in bits
    wanted = model(x).detach()
    qtrain.pack(model)
    packed = model[0]
    assert isinstance(packed, PackedLinear) and torch.equal(model(x).detach(), wanted)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    held = sum(buffer.nbytes for name, buffer in packed.named_buffers() if name != "input_scale")
    assert 8 * held / (N * K) == pytest.approx(bits, rel=1e-9)
    assert [name for name, _ in packed.named_parameters()] == ["bias"]
    assert f"{bits:.3g} bits a weight" in repr(packed)


@pytest.mark.parametrize("recipe", ["quartet_ii", "lsq"])
def test_a_state_dict_fills_a_model_that_was_packed_without_weights(recipe: str) -> None:
    model, _ = layer_of(recipe)
    x = torch.randn(4, K)
    qtrain.pack(model)
    with torch.device("meta"):
        other = nn.Sequential(nn.Linear(K, N))
        qtrain.convert(other, recipe, seed=3)
        qtrain.pack(other)
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(other(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert model.bfloat16()[0].codes.dtype == torch.uint8 and model[0].tensor_scale.dtype == torch.float32


@pytest.mark.parametrize("name", ["lsq", *LEARNED])
def test_a_state_dict_brings_the_codes_under_learned_scales(name: str) -> None:
    recipe, _ = BITS[name]
    model, _ = layer_of(recipe)
    other, _ = layer_of(recipe, seed=1)
    qtrain.pack(model)
    qtrain.pack(other)
    x = torch.randn(3, K)
    for assign in (False, True):
        assert not torch.equal(other(x), model(x))
        other.load_state_dict(model.state_dict(), assign=assign)
        assert torch.equal(other(x), model(x))
        other, _ = layer_of(recipe, seed=1)
        qtrain.pack(other)


@pytest.mark.parametrize("name", ["lsq", *LEARNED])
def test_exports_read_the_codes_under_learned_scales(name: str) -> None:
    """In floats beside their block scales, as the layer itself quantises its weight."""
    model, layer = layer_of(BITS[name][0])
    quantizer, call = layer.numerics.fprop.right, Call(layer.numerics, layer.keys, torch.float32, None)
    layout = quantizer.layout((N, K), blocks=True).unmasked
    scale = given_scale(layer.weight_scale)
    wanted, _ = call.operand("fprop.w", layer.weight.detach(), call.rotation("fprop", K), learned=scale, layout=layout)
    qtrain.pack(model)
    found = model[0].weight.to(layout)
    assert all(map(torch.equal, found.tensors(), wanted.tensors()))
    assert (found.codes != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", ["tensor", "row"])
def test_few_rows_of_integers_under_learned_scales_are_those_of_many(columns: str, dtype: torch.dtype) -> None:
    recipe = learned(f"int4/{columns}/float32")
    recipe["fprop"]["x"] = {"format": "int4", "scale": "learned"}
    model, layer = layer_of(recipe)
    layer.weight.data.abs_()  # sums of one sign, which bfloat16 does not hold
    x = torch.randn(16, K).abs().to(dtype)
    wanted = model(x).detach()
    qtrain.pack(model)
    assert torch.equal(model(x[:3]).detach(), wanted[:3]) and model[0]._ready is not None


def test_a_nan_under_a_learned_scale_is_refused_and_the_model_left_alone() -> None:
    """It has no bits, and the scale stays finite."""
    for name in ("lsq", *LEARNED):
        recipe, _ = BITS[name]
        model = nn.Sequential(layer_of(recipe)[1], bad := layer_of(recipe)[1])
        bad.weight.data[7, 30] = torch.nan
        with pytest.raises(UserError, match=r"0 cannot be packed: its weight or its learned scale holds a NaN"):
            qtrain.pack(model)
        assert all(isinstance(layer, QuantLinear) for layer in model)


@pytest.mark.parametrize("recipe", ["quest", "quartet", "quest_weight_only", "nvidia_nvfp4"])
def test_inputs_get_the_gradient_of_the_dequantised_weight(recipe: str) -> None:
    model, layer = layer_of(recipe)
    rotation = Call(layer.numerics, layer.keys, torch.float32, None).rotation("fprop", K)
    weight = layer.numerics.fprop.right.quantize(layer.weight.detach(), rotation).dequantize()
    weight = unrotate(weight, rotation, "reference")
    x, dy = torch.randn(4, K, requires_grad=True), torch.randn(4, N)
    qtrain.pack(model)
    model(x).backward(dy)
    assert x.grad is not None and model[0].bias.grad is None
    torch.testing.assert_close(x.grad, dy @ weight, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo, of autograd functions
@pytest.mark.parametrize("kind", [PackedLinear, DoubledLinear])
def test_a_graph_holds_the_products_of_a_layer(kind: type[PackedLinear]) -> None:
    """One operator each, with the bits of eager, also for few rows; outliers are its tensors too."""
    model, _ = layer_of("nf4" if kind is DoubledLinear else "quest")
    qtrain.pack(model, kind)
    layer, x = model[0], torch.randn(2, K, requires_grad=True)
    assert isinstance(layer, kind)
    if kind is PackedLinear:
        layer.outliers = Outliers.of(torch.tensor([3]), torch.randn(N, 1), torch.eye(N, K))
    program = torch.export.export(model, (x.detach(),), strict=True)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called.count("qtrain.packed_product.default") == 1
    wanted = model(x)
    assert torch.equal(program.module()(x.detach()), wanted)
    torch._dynamo.reset()
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(found, wanted)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (found, wanted)))


def test_gradients_of_gradients_are_refused() -> None:
    """Kernels record no graph: those of rotated weights would be zero."""
    quantised, _ = layer_of("quest")
    packed, _ = layer_of("quest")
    qtrain.pack(packed)
    x = torch.randn(4, K, requires_grad=True)
    for model in (quantised, packed):
        with pytest.raises(UserError, match=r"have no gradients of their own, .* \(create_graph=True\); ask for none"):
            torch.autograd.grad(model(x).square().sum(), x, create_graph=True)


def test_a_layer_is_copied_also_after_it_multiplied_few_rows() -> None:
    model, _ = layer_of("w4a16")
    qtrain.pack(model)
    layer, x = model[0], torch.randn(2, K)
    wanted = layer(x).detach()
    assert isinstance(layer, PackedLinear) and layer._ready is not None
    other = copy.deepcopy(layer)
    layer.codes.zero_()
    assert torch.equal(other(x).detach(), wanted) and not torch.equal(layer(x).detach(), wanted)
    other.block_scale = other.block_scale * 2  # another tensor, beside the codes that stay
    torch.testing.assert_close(other(x) - other.bias, 2 * (wanted - other.bias), rtol=1e-5, atol=1e-5)
    assert torch.equal(other(torch._neg_view(-x)), other(x)), "values whose sign is a flag"


def test_what_has_no_codes_that_stay_is_refused_and_left_alone() -> None:
    for recipe, reason in (("mxfp4_backward", "multiplies the weights without quantising them"),):
        model, _ = layer_of(recipe)
        with pytest.raises(UserError, match=f"0 cannot be packed: its forward {reason}"):
            qtrain.pack(model)
        assert isinstance(model[0], QuantLinear)
    model = nn.Sequential(nn.Linear(K, N), nn.Linear(N, N))
    qtrain.convert(model, "lsq")
    qtrain.calibrate(model[0], torch.randn(64, K))
    with pytest.raises(UserError, match="1 cannot be packed: its recipe learns a scale, which has no value yet; call"):
        qtrain.pack(model)
    assert all(isinstance(layer, QuantLinear) for layer in model)
    with pytest.raises(UserError, match="1 cannot be packed: its recipe learns a scale"):
        PackedLinear.of(model[1])
    with pytest.raises(UserError, match="has no quantised layer"):
        qtrain.pack(nn.Sequential(nn.Linear(4, 4)))
    model, layer = layer_of("quest")
    embedding = nn.Embedding(N, K)
    embedding.weight = layer.weight
    with pytest.raises(UserError, match="it shares its weight with another module"):
        qtrain.pack(nn.Sequential(embedding, layer))
    model, layer = layer_of("quest")
    attach(model, ("0",), rank=2, alpha=2)
    with pytest.raises(UserError, match="0 cannot be packed: it carries hooks, as an adapter's, which would be lost"):
        qtrain.pack(model)
    assert isinstance(model[0], QuantLinear)
    model, layer = layer_of("quest")
    with pytest.raises(UserError, match=r"expected an input of last dim 256, found shape \(2, 8\)"):
        qtrain.pack(model)
        model(torch.zeros(2, 8))


def test_scales_that_are_learned_are_not_quantised_again() -> None:
    model, _ = layer_of(learned("int4/128/float32"))
    with pytest.raises(
        UserError, match="0: double quantisation is of scales that are found, and its recipe learns them"
    ):
        qtrain.pack(model, DoubledLinear)
    assert isinstance(model[0], QuantLinear)
