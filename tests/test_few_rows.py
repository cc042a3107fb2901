"""Products of few rows with a weight in its bits: within float32 rounding of the exact ones, for any rows alike."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qtrain
from qtrain.quant import PackedLinear
from qtrain.quant.rotation import hadamard
from qtrain_kernels import dispatch, few_rows, reference
from qtrain_kernels.few_rows import FewRows, bfloat16_rows, lacks
from qtrain_kernels.precision import linear

N, K = 33, 384


def weight_only(format: str, scale: str | None = None) -> dict[str, Any]:
    none = {"format": "none"}
    backward = {"dgrad": {"dy": none, "w": none}, "wgrad": {"dy": none, "x": none}}
    return {"name": "own", "fprop": {"x": none, "w": {"format": format, "scale": scale}}, **backward}


RECIPES: dict[str, Any] = {
    "int4 rows": "quest_weight_only",
    "int2 rows": {"name": "quest", "bits": 2},
    "int1 rows": {"name": "quest", "bits": 1},
    "mxfp4": "quartet",
    "nvfp4": "quartet_ii",
    "ternary": "trilm",
    "float16 scales": weight_only("int4_sym/32/float16"),
    "bfloat16 scales": weight_only("int2_sym/128/bfloat16"),
    "float16 scales of half a chunk": weight_only("int4_sym/16/float16"),
    "float32 scales": weight_only("int4/128/float32", "learned"),
    "float32 scales of half a chunk": weight_only("e2m1/16/float32", "learned"),
    "zero points": "w4a16_asym",
    "zero points of half a chunk": weight_only("int2_asym/32/float16"),
}


def packed(recipe: Any, k: int = K) -> tuple[nn.Sequential, PackedLinear]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(k, N))
    model[0].weight.data *= torch.logspace(-3, 1, k)[torch.randperm(k)]  # scales of blocks differ
    model[0].weight.data[5, :128] = 0.0
    qtrain.convert(model, recipe, seed=3)
    if model[0].weight_scale is not None:
        qtrain.calibrate(model, torch.randn(2, k))
        model[0].weight_scale.data[::2] *= -1  # as LSQ's steps may become
    qtrain.pack(model.eval())
    layer = model[0]
    assert isinstance(layer, PackedLinear)
    return model, layer


def check(found: Tensor, x: Tensor, values: Tensor) -> None:
    """Within the bound that the module states."""
    exact, size = x.double() @ values.double().T, x.double().abs() @ values.double().abs().T
    bound = (values.shape[1] / 8 + 8) * 2.0**-24 * size
    assert ((found.double() - exact).abs() <= bound).all()
    assert (exact.abs() > 4 * bound).float().mean() > 0.9, "the bound leaves no room for another product"


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_products_in_bits_are_those_of_the_values(recipe: Any) -> None:
    _, layer = packed(recipe)
    ready, values = FewRows(layer.weight), layer.weight.dequantize()
    scale = layer.weight.layout.constant if layer.weight.tensor_scale is None else layer.weight.tensor_scale
    x = torch.randn(20, K)
    every = ready(x)
    check(every, x, values)
    assert torch.equal(ready(x, scaled=False) * torch.as_tensor(scale).reshape(-1), every)
    for rows in (1, 2, 3, 5, 8, 16):
        assert torch.equal(ready(x[:rows]), every[:rows])
    assert torch.equal(ready(x.bfloat16()), ready(x.bfloat16().float()))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(ready(x), every)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [0, 1, 2, 4, 8, 16, 128, 12, 384])
def test_rows_are_rotated_and_rounded_as_the_reference_does(size: int) -> None:
    """12 and 384 are of orders that are no powers of two; 0: no rotation."""
    _, layer = packed("w4a16")
    signs = torch.tensor([1, 2], dtype=torch.int32)  # a key
    x = torch.randn(3, K)
    x[0, 0], x[1, 5], x[1, 200] = torch.inf, torch.nan, -1e-41
    for drawn, values, dtype in product((None, signs), (x, x.bfloat16()), (torch.float32, torch.bfloat16)):
        rotation = hadamard(size, drawn, x.device) if size else None
        turned = reference.rotate(values.unsqueeze(-1), rotation).squeeze(-1)
        wanted = FewRows(layer.weight)(turned.to(dtype)).to(dtype)
        found = FewRows(layer.weight, rotation).linear(values, dtype)
        assert found.dtype == dtype and found[2].isfinite().all()
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_a_scale_that_is_no_number_shows() -> None:
    _, layer = packed("quartet")
    _, other = packed(weight_only("int4_sym/32/float16"))
    for each, nan in ((layer, 255), (other, torch.nan)):  # 255: of E8M0
        each.block_scale[2, 1] = nan
        found = FewRows(each.weight)(torch.ones(1, K))
        assert found[0, 2].isnan() and found.isnan().sum() == 1


def test_a_packed_layer_multiplies_few_rows_in_bits() -> None:
    """Integers exactly, so as the layer does with more rows; inputs without a quantiser to the rounding of sums."""
    x = torch.randn(40, K)
    model, layer = packed({"name": "quest", "bits": 4})
    every = model(x)
    assert torch.equal(model(x[:3]), every[:3]) and layer._ready is not None
    model, layer = packed("quest_weight_only")
    every, few = model(x), model(x[:3])
    assert layer._ready is not None and not torch.equal(few, every[:3])
    torch.testing.assert_close(few, every[:3], rtol=1e-5, atol=1e-5)
    model, layer = packed("quartet")
    model(x[:3])
    assert layer._ready is None, "its inputs are minifloats"
    table = weight_only("int4")
    table["fprop"]["x"] = {"format": "nf4/row/float32"}
    model, layer = packed(table)
    model(x[:3])
    assert layer._ready is None, "its inputs are no multiples of one number"
    qtrain.pack(other := nn.Sequential(_converted("quest_weight_only", "reference")).eval())
    other(x[:3])
    assert other[0]._ready is None


def _converted(recipe: Any, backend: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(K, N))
    qtrain.convert(model, recipe, backend=backend)
    return model[0]


def test_bfloat16_rows_are_the_products_of_their_values() -> None:
    x, weight = torch.randn(5, K), torch.randn(N, K).bfloat16()
    check(bfloat16_rows(x, weight, torch.float32), x, weight)
    rounded = bfloat16_rows(x.bfloat16(), weight, torch.float32).bfloat16()
    assert torch.equal(bfloat16_rows(x, weight, torch.bfloat16), rounded)
    found = linear(x.bfloat16(), weight)
    wanted = (x.bfloat16().double() @ weight.double().T).float().bfloat16()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=0)


def test_what_is_not_multiplied_in_bits_is_told() -> None:
    _, layer = packed("mxfp8")
    assert lacks(layer.layout) == "its codes take 8 bits; 1, 2 and 4 are decoded"
    with pytest.raises(ValueError, match="is not multiplied in its bits: its codes take 8 bits"):
        FewRows(layer.weight)
    _, layer = packed("trilm", 96)
    assert lacks(layer.layout) == "its contraction of 96 is no multiple of 64"
    _, layer = packed("quartet")
    with pytest.raises(ValueError, match=r"x must be \(1 to 128, 384\) on CPU; got \(129, 384\)"):
        FewRows(layer.weight)(torch.zeros(129, K))
    with pytest.raises(ValueError, match=r"a product is in float32 or bfloat16; got torch\.float16"):
        FewRows(layer.weight).linear(torch.zeros(1, K), torch.float16)
    with pytest.raises(ValueError, match=r"has no whole blocks of a rotation of 256"):
        FewRows(layer.weight, hadamard(256, None, layer.codes.device))
    with pytest.raises(ValueError, match=r"weight must be \(N, K\) bfloat16"):
        bfloat16_rows(torch.zeros(1, 8), torch.zeros(4, 8), torch.float32)


def test_the_backend_says_what_multiplies_few_rows() -> None:
    """None where products are of the dequantised weight."""
    _, layer = packed("w4a16")
    _, wide = packed("mxfp8")
    for backend in ("auto", "compiled"):
        assert dispatch.few_rows(backend, "cpu", layer.layout) is few_rows
        assert dispatch.few_rows(backend, "cpu", wide.layout) is None
    assert dispatch.few_rows("reference", "cpu", layer.layout) is None
    with pytest.raises(ValueError, match="backend 'triton' cannot run on cpu"):
        dispatch.few_rows("triton", "cpu", layer.layout)
