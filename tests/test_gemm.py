"""INT8 products of integer codes: exact, and what a layer makes of them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import qtrain
from qtrain.errors import UserError
from qtrain.quant.linear import Numerics, QuantLinear
from qtrain.recipe import read_recipe
from qtrain_kernels import cpu, gemm, reference
from qtrain_kernels.formats import get_format
from qtrain_kernels.gemm import int8_matmul
from qtrain_kernels.reference import Plan

FORMATS = ("int1", "int4", "int7", "int8", "int1.585", "int4_sym", "int8_sym")


def integers(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    x[0], x[:, 0] = 127, -128
    return x


@pytest.mark.parametrize("offsets", [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5)])
def test_the_product_is_exact(offsets: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    for longest in (2**15, 64):  # in one piece, and in several
        monkeypatch.setattr(gemm, "LONGEST", longest)
        for m, k, n in ((1, 1, 1), (17, 40, 9), (5, 131, 64)):
            left, right = integers(m, k), integers(n, k).T
            expected = (left.double() + offsets[0]) @ (right.double() + offsets[1])
            assert torch.equal(int8_matmul(left, right, *offsets), expected.float())
    assert torch.equal(int8_matmul(integers(3, 1)[:, :0], integers(1, 4)[:0]), torch.zeros(3, 4))


def test_the_longest_contraction_does_not_overflow() -> None:
    left = torch.full((1, gemm.LONGEST), 127, dtype=torch.int8)
    found = int8_matmul(left, left.T, 0.5, 0.5)
    assert found.item() == torch.tensor(127.5**2 * gemm.LONGEST, dtype=torch.float32).item()
    lowest = torch.full((1, gemm.LONGEST), -128, dtype=torch.int8)
    assert int8_matmul(lowest, left.T, 0.5, 0.5).item() == -found.item()


def test_cudas_sizes_are_filled_with_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def product(left: Tensor, right: Tensor) -> Tensor:
        asked.append((*left.shape, right.shape[1]))
        return (left.int() @ right.int()).int()

    monkeypatch.setattr(torch, "_int_mm", product)
    left, right = integers(3, 13), integers(13, 9)
    with monkeypatch.context() as patch:
        patch.setattr(gemm, "_device_type", lambda x: "cuda")
        found = int8_matmul(left, right, 0.5, 0.5)
    assert asked == [(32, 16, 16)]
    assert torch.equal(found, ((left.double() + 0.5) @ (right.double() + 0.5)).float())


@pytest.mark.parametrize("name", FORMATS)
def test_stored_integers_are_the_codes(name: str) -> None:
    element = get_format(name).element
    unit, offset = reference.stored_integer(element)
    x = torch.randn(7, 96, 1, generator=torch.Generator().manual_seed(0)) * 2
    x[0], x[1] = 0, x[1] * 1e-42
    for plan in (
        Plan(element, "float32", None, "absmax"),
        Plan(element, "float32", None, "absmax", "stochastic", per_tensor=True),
    ):
        scale, key = reference.tensor_scale(x, plan), torch.tensor([3, -4], dtype=torch.int32)
        codes, _, _ = reference.encode(x, scale, key, plan)
        stored, _ = reference.operand(x, scale, key, plan, torch.int8)
        assert stored.dtype == torch.int8
        assert torch.equal((stored.double() + offset) * unit, codes.double())
        assert torch.equal(cpu.operand(x, scale, key, plan, torch.int8)[0], stored)
        across = x.permute(2, 1, 0).contiguous()
        if plan.per_tensor:
            ours, theirs = (module.operand(across, scale, key, plan, torch.int8)[0] for module in (cpu, reference))
            assert torch.equal(ours, theirs)


def layer(recipe: object, gemm: str = "auto", features: tuple[int, int] = (128, 48)) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*features, bias=False))
    qtrain.convert(model, recipe, gemm=gemm, backend="reference")  # pyright: ignore[reportArgumentType]
    qtrain.set_step(model, 0)
    return model


@pytest.mark.parametrize("recipe", ["quest", {"name": "quest", "bits": 8}, "ste", "luq_int4", "quest_sparse"])
def test_a_forward_is_the_exact_product_of_codes_and_scales(recipe: object) -> None:
    """Rounded to float32, times one scale, times the other, then to bfloat16."""
    model = layer(recipe)
    linear = model[0]
    assert isinstance(linear, QuantLinear) and linear.numerics.fprop.integer
    x = torch.randn(33, 128, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    fprop = linear.numerics.fprop
    rotation = fprop.rotation(torch.zeros(2, dtype=torch.int32), 128)
    left, right = (q.quantize(each, rotation) for q, each in ((fprop.left, x), (fprop.right, linear.weight.detach())))
    product = (left.codes.double() @ right.codes.double().T).float()
    scales = [torch.as_tensor(each) for each in (left.tensor_scale, right.tensor_scale)]
    expected = product * scales[0] * (scales[1].T if scales[1].ndim else scales[1])
    assert torch.equal(y, expected.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("recipe", "kinds"),
    [
        ("quest", "int8 float float"),
        ("quest_weight_only", "float float float"),
        ("lsq", "float float float"),
        ("halo_1", "int8 int8 int8"),
        ("luq_int4", "int8 float float"),
        ("quartet", "float float float"),
        ({"name": "quest_sparse", "bits": 8}, "float float float"),
    ],
)
def test_the_model_says_how_it_multiplies(recipe: object, kinds: str) -> None:
    assert f"| reference on cpu, gemms {kinds}" in str(layer(recipe, features=(128, 128)))
    assert "| reference on cpu, gemms float float float" in str(layer(recipe, "float", (128, 128)))


CENTRED = {"format": "int4/tensor/float32", "scale": "gaussian"}
# integers forward, which its float gradients meet again
MIXED = read_recipe("luq_int4").model_dump() | {"fprop": {"x": CENTRED, "w": CENTRED}}


@pytest.mark.parametrize("recipe", ["halo_0", "halo_1", "halo_2", "quest", "luq_int4", MIXED])
def test_gradients_are_those_of_float_products(recipe: object) -> None:
    """To bfloat16's rounding of a product before its scale, which an exact one does without."""
    x = torch.randn(40, 128, generator=torch.Generator().manual_seed(1))
    dy = torch.randn(40, 128, generator=torch.Generator().manual_seed(2))
    results = []
    for kind in ("int8", "float"):
        model = layer(recipe, kind, (128, 128))
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(given)
        y.backward(dy.to(y.dtype))
        results.append((y, given.grad, model[0].weight.grad))
    for exact, rounded in zip(*results, strict=True):
        assert (exact.float() - rounded.float()).norm() < 2**-8 * rounded.float().norm()


def test_tokens_are_filled_up_with_what_multiplies_to_zero() -> None:
    """A centred grid of 8 bits has no zero for them: its wgrad multiplies values."""
    recipe = read_recipe("halo_1").model_dump()
    for format_, integer in (("int8/tensor/float32", False), ("int7/tensor/float32", True)):
        numerics = Numerics.build(read_recipe(recipe | {"format": format_}), "reference")
        assert (numerics.fprop.integer, numerics.wgrad.integer) == (True, integer)
        assert replace(numerics, gemm="float").runs_on("cpu").endswith("float float float")


def test_what_cannot_multiply_integers_says_so() -> None:
    with pytest.raises(UserError, match="unknown gemm 'fp8'; gemms: auto, float, int8"):
        layer("quest", "fp8")
    with pytest.raises(UserError, match=r"gemm 'int8' .* recipe quartet .* ask for gemm 'auto'"):
        layer("quartet", "int8", (128, 128))
