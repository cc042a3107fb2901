"""Products on 8-bit units: INT8 exact, FP8 exact in its operands, and what a layer makes of them."""

from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import ScalingType, SwizzleType, scaled_mm
from torch.utils._pytree import tree_map_only

import qtrain
from qtrain.config.recipe import read_recipe
from qtrain.errors import UserError
from qtrain.quant import check_backend
from qtrain.quant.functional import Numerics, Observed, Observer
from qtrain.quant.linear import QuantLinear
from qtrain_kernels import cpu, gemm, reference
from qtrain_kernels.formats import E4M3 as FORMAT_E4M3
from qtrain_kernels.formats import MX_E2M1, get_format
from qtrain_kernels.gemm import TABLE, fp8_matmul, int8_matmul, multiply, resolve, reused
from qtrain_kernels.plans import Plan, Rotation, stored_integer
from qtrain_kernels.precision import matmul
from qtrain_kernels.qtensor import Layout, QTensor, Side, Storage, inexact, quantize, unswizzle

GEMMS = ("fprop", "dgrad", "wgrad")
FORMATS = ("int1", "int4", "int7", "int8", "int1.585", "int4_sym", "int8_sym")


def integers(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    x[0], x[:, 0] = 127, -128
    return x


@pytest.mark.parametrize("offsets", [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5)])
@pytest.mark.parametrize("vnni", [True, False])
def test_the_product_is_exact(offsets: tuple[float, float], vnni: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece and in several; in every layout, also with a size of 1, whose strides are any number."""
    if not vnni:
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    sizes = ((1, 1, 1), (17, 40, 9), (5, 131, 64), (5, 1, 3), (1, 40, 9), (9, 40, 1), (3, 2500, 4))
    for longest, (m, k, n) in product((2**15, 64), sizes):
        monkeypatch.setattr(gemm, "LONGEST", longest)
        lefts = integers(m, k), integers(k, m).T, integers(m, k + 3)[:, 3:]
        rights = integers(n, k).T, integers(k, n), integers(k + 3, n)[3:]
        for left, right in product(lefts, rights):
            expected = (left.double() + offsets[0]) @ (right.double() + offsets[1])
            assert torch.equal(int8_matmul(left, right, *offsets), expected.float()), (m, k, n)
    assert torch.equal(int8_matmul(integers(3, 1)[:, :0], integers(1, 4)[:0]), torch.zeros(3, 4))


def test_the_longest_contraction_does_not_overflow() -> None:
    left = torch.full((1, gemm.LONGEST), 127, dtype=torch.int8)
    found = int8_matmul(left, left.T, 0.5, 0.5)
    assert found.item() == torch.tensor(127.5**2 * gemm.LONGEST, dtype=torch.float32).item()
    lowest = torch.full((1, gemm.LONGEST), -128, dtype=torch.int8)
    assert int8_matmul(lowest, left.T, 0.5, 0.5).item() == -found.item()


def test_cudas_sizes_are_filled_with_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def cublas(left: Tensor, right: Tensor) -> Tensor:
        assert left.is_contiguous() and right.T.is_contiguous()
        asked.append((*left.shape, right.shape[1]))
        return (left.int() @ right.int()).int()

    monkeypatch.setattr(torch, "_int_mm", cublas)
    monkeypatch.setattr(gemm, "_int_mm", gemm._int_mm_cuda)
    for left, right in ((integers(3, 13), integers(13, 9)), (integers(16, 40).T, integers(16, 24))):
        found = int8_matmul(left, right, 0.5, 0.5)
        assert torch.equal(found, ((left.double() + 0.5) @ (right.double() + 0.5)).float())
    assert asked == [(32, 16, 16), (40, 16, 24)]


@pytest.mark.parametrize("name", FORMATS)
def test_stored_integers_are_the_codes(name: str) -> None:
    element = get_format(name).element
    unit, offset = stored_integer(element)
    x = torch.randn(7, 96, 1, generator=torch.Generator().manual_seed(0)) * 2
    x[0], x[1] = 0, x[1] * 1e-42
    for plan in (
        Plan(element, "float32", None, "absmax"),
        Plan(element, "float32", None, "absmax", "stochastic", per_tensor=True),
    ):
        scale, key = reference.tensor_scale(x, plan), torch.tensor([3, -4], dtype=torch.int32)
        codes, _, _ = reference.encode(x, scale, key, plan)
        stored, _, _ = reference.operand(x, scale, key, plan, torch.int8)
        assert stored.dtype == torch.int8
        assert torch.equal((stored.double() + offset) * unit, codes.double())
        for matrix, dim in ((x[:, :, 0], -1), (x[:, :, 0].T.contiguous(), -2)):
            layout = Layout(plan, (matrix.shape[0], matrix.shape[1]), dim, "int8")
            ours, theirs = (module.quantize(matrix, Side(layout, None, key))[0] for module in (cpu, reference))
            assert ours is not None and theirs is not None and torch.equal(ours, theirs)
            assert dim == -2 or torch.equal(ours, stored[:, :, 0])


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
    assert isinstance(linear, QuantLinear) and linear.numerics.product("fprop", "cpu").name == "int8"
    x = torch.randn(33, 128, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    fprop = linear.numerics.fprop
    rotation = None if fprop.left.rotation_block is None else Rotation(fprop.left.rotation_block or 128)
    left, right = (q.quantize(each, rotation) for q, each in ((fprop.left, x), (fprop.right, linear.weight.detach())))
    exact = (left.codes.double() @ right.codes.double().T).float()
    scales = [torch.as_tensor(each) for each in (left.tensor_scale, right.tensor_scale)]
    expected = exact * scales[0] * (scales[1].T if scales[1].ndim else scales[1])
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


# integers of 8 bits forward, quantised to such again from 40 tokens filled up to 64
AGAIN = read_recipe("halo_1").model_dump() | {
    "fprop": {name: {"format": "int8/tensor/float32", "scale": "absmax"} for name in "xw"},
    "wgrad": {
        name: {"format": "int8/tensor/float32", "scale": "absmax", "rotation": "hadamard32", "source": source}
        for name, source in (("dy", "master"), ("x", "forward"))
    },
}


@pytest.mark.parametrize("recipe", ["halo_0", "halo_1", "halo_2", "quest", "luq_int4", MIXED, AGAIN])
def test_gradients_are_those_of_float_products(recipe: object) -> None:
    """To bfloat16's rounding of a product before its scale, which an exact one does without."""
    x = torch.randn(40, 128, generator=torch.Generator().manual_seed(1))
    dy = torch.randn(40, 128, generator=torch.Generator().manual_seed(2))
    results = []
    for kind in ("auto", "float"):
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
    for format_, integer in (("int8/tensor/float32", "float"), ("int7/tensor/float32", "int8")):
        numerics = Numerics.build(read_recipe(recipe | {"format": format_}), "reference")
        assert [numerics.product(name, "cpu").name for name in GEMMS] == ["int8", "int8", integer]
        assert replace(numerics, gemm="float").runs_on("cpu").endswith("float float float")


# ----------------------------------------------------------------------------------------------------------------- FP8

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (5, 40, 23), (16, 48, 32)])
def test_the_fp8_product_is_exact_and_rounded_once(m: int, k: int, n: int) -> None:
    """Of small integers under powers of two, whose sums float32 holds."""
    left, right, *scales = fp8_factors(m, k, n)
    found = fp8_matmul(left, scales[0], right, scales[1], fast=False)
    exact = (left.double() * scales[0].double()) @ (right.double() * scales[1].double())
    assert torch.equal(found, exact.bfloat16())


def fp8_factors(m: int, k: int, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(M, K) and (K, N) of small integers, contraction contiguous; (M, 1) and (1, N) powers of two."""
    generator = torch.Generator().manual_seed(m + k + n)
    left, right = (torch.randint(-6, 7, shape, generator=generator).float().to(E4M3) for shape in ((m, k), (n, k)))
    return (
        left,
        right.T,
        *(torch.exp2(torch.arange(size) - size // 2.0).view(shape) for size, shape in ((m, (m, 1)), (n, (1, n)))),
    )


def torch_takes(*given: Any, **named: Any) -> None:
    """What torch itself checks before it multiplies on CUDA: sizes, strides, dtypes, scales. RuntimeError if not."""
    with FakeTensorMode():
        on_cuda = tree_map_only(
            Tensor, lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda"), (given, named)
        )
        scaled_mm(*on_cuda[0], **on_cuda[1])


def test_cudas_fp8_sizes_are_filled_with_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the layout, the sizes and with the scales that cuBLASLt takes; and how the sums are kept is asked for."""
    asked = []

    def cublas(
        left: Tensor, right: Tensor, left_scale: Tensor, left_kind: ScalingType,
        right_scale: Tensor, right_kind: ScalingType, use_fast_accum: bool,
    ) -> Tensor:  # fmt: skip
        torch_takes(left, right, left_scale, left_kind, right_scale, right_kind, use_fast_accum=use_fast_accum)
        assert left.is_contiguous() and right.T.is_contiguous() and left_kind == right_kind == ScalingType.RowWise
        assert left_scale.shape == (left.shape[0], 1) and right_scale.shape == (1, right.shape[1])
        assert left_scale.is_contiguous() and right_scale.is_contiguous()
        asked.append((*left.shape, right.shape[1], use_fast_accum))
        return ((left.double() * left_scale) @ (right.double() * right_scale)).bfloat16()

    monkeypatch.setattr(gemm, "scaled_mm", cublas)
    for (m, k, n), fast in (((5, 40, 23), False), ((16, 48, 32), True)):
        left, right, *scales = fp8_factors(m, k, n)
        factors = left, scales[0], right, scales[1], fast
        assert torch.equal(gemm._scaled_mm(*factors), fp8_matmul(*factors))
    assert asked == [(5, 48, 32, False), (16, 48, 32, True)]


@pytest.mark.parametrize("recipe", ["quartet", "mxfp8", "mxfp6", "fp8_rowwise", "fp8_tensorwise"])
def test_a_layer_multiplies_in_fp8_what_it_would_in_float(recipe: str) -> None:
    """FP8's sums are float32 on CPU and rounded once, so that they lie nearer to the exact product."""
    x, dy = (torch.randn(64, 128, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    results = []
    for kind, precision in (
        ("fp8", torch.bfloat16), ("fp8_fast", torch.bfloat16), ("float", torch.bfloat16), ("float", torch.float32),
    ):  # fmt: skip
        model = layer(recipe, kind, (128, 128))
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            y = model(given)
        y.backward(dy.to(y.dtype))
        results.append((y, given.grad, model[0].weight.grad))
    for found, fast, rounded, exact in zip(*results, strict=True):
        assert torch.equal(found, fast)  # a CPU has one way to sum
        error, other = ((each.float() - exact).norm() / exact.norm() for each in (found, rounded))
        assert error < max(1.05 * other, 2e-3)


def test_fp8_products_are_for_bfloat16() -> None:
    with pytest.raises(
        UserError, match=r"0: gemm 'fp8' gives products in bfloat16; the compute dtype is torch.float32"
    ):
        layer("quartet", "fp8", (128, 128))(torch.randn(4, 128))


def shares_rounded(model: nn.Module, x: Tensor, dy: Tensor | None = None) -> dict[str, float]:
    """The share of each operand that FP8 rounds, as an observer is told."""
    found: dict[str, float] = {}
    linear = model.get_submodule("0")
    assert isinstance(linear, QuantLinear)

    def note(seen: Observed) -> None:
        assert seen.fp8_rounded is not None
        found[seen.use] = seen.fp8_rounded.item()

    linear.observer = Observer(note, lambda _: None)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    if dy is not None:
        y.backward(dy.to(y.dtype))
    return found


@pytest.mark.parametrize("side", ["neither", "input", "weight"])
def test_what_fp8_rounds_is_counted_for_each_operand(side: str) -> None:
    model = layer("mxfp6", "fp8", (128, 128))
    x = torch.randn(32, 128)
    for name, values in (("input", x), ("weight", model.get_parameter("0.weight").data)):
        if side == name:
            values[:, 32:64] *= 2.0**-20
    shares = shares_rounded(model, x)
    assert set(shares) == {"fprop.x", "fprop.w"}
    for name, use in (("input", "fprop.x"), ("weight", "fprop.w")):  # a quarter; nearly all of what is in it
        assert 0.7 < 4 * shares[use] <= 1 if side == name else shares[use] == 0


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "fp8_tensorwise"])
def test_fp8_rounds_nothing_of_what_has_one_scale_a_line(recipe: str) -> None:
    x, dy = torch.randn(64, 128), torch.randn(64, 128)
    assert not any(shares_rounded(layer(recipe, "fp8", (128, 128)), x.requires_grad_(), dy).values())


def test_gradients_of_many_octaves_keep_to_e5m2() -> None:
    dy = torch.randn(32, 128) * torch.exp2(-torch.arange(128.0) / 5)
    shares = shares_rounded(layer("fp8_tensorwise", "fp8", (128, 128)), torch.randn(32, 128, requires_grad=True), dy)
    assert {"dgrad.dy", "wgrad.dy"} <= set(shares) and not any(shares.values())


def test_e5m2_on_the_right_multiplies_as_float() -> None:
    fprop = {"x": {"format": "e4m3/row/float32"}, "w": {"format": "e5m2/row/float32"}}
    recipe = read_recipe(read_recipe("fp8_rowwise").model_dump() | {"fprop": fprop})
    numerics = Numerics.build(recipe, "reference", "fp8")
    assert [numerics.product(name, "cpu").name for name in GEMMS] == ["float", "fp8", "fp8"]


def test_the_model_says_where_it_multiplies_in_fp8() -> None:
    kinds = {
        "quartet": "fp8_block fp8_block fp8_block",
        "quest": "int8 float float",
        "fp8_tensorwise": "fp8 fp8 fp8",
        "halo_1": "int8 int8 int8",
    }
    for recipe, expected in kinds.items():
        assert f"gemms {expected}" in str(layer(recipe, "fp8" if "fp8" in expected else "auto", (128, 128)))


def test_what_cannot_multiply_so_says_so() -> None:
    with pytest.raises(UserError, match="unknown gemm 'int4'; gemms: auto, float, fp8, fp8_fast, fp4"):
        layer("quest", "int4")
    for recipe in ("quartet_ii", "quest", "lsq"):
        with pytest.raises(
            UserError, match=rf"gemm 'fp8' needs MXFP4, .* recipe {recipe} has none such; ask for gemm 'auto'"
        ):
            layer(recipe, "fp8", (128, 128))
    with pytest.raises(
        UserError, match=r"gemm 'fp8' cannot run on mps: fp8 needs a CUDA device .*; ask for gemm 'auto'"
    ):
        check_backend("auto", "fp8", "mps")
    with pytest.raises(UserError, match=r"gemm 'fp4' cannot run on cpu: mxfp8 needs a CUDA device .* 10\.0 or later;"):
        check_backend("auto", "fp4", "cpu")
    with pytest.raises(UserError, match=r"gemm 'fp4' needs MXFP4, .* recipe quest has none such; ask for gemm 'auto'"):
        layer("quest", "fp4", (128, 128))
    assert "gemm 'fp4' cannot run on cpu: mxfp4 needs" in str(layer("quartet", "fp4", (128, 128)))
    assert "mxfp4 | on no device yet" in str(layer("quartet", "fp8", (128, 128)).to("meta"))


def test_fp8_needs_a_card_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, allowed in (((8, 6), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        with (
            nullcontext() if allowed else pytest.raises(UserError, match=r"gemm 'fp8' cannot run on cuda: .*found 8\.6")
        ):
            check_backend("reference", "fp8", "cuda")


def test_fast_accumulation_is_asked_for_by_name_alone() -> None:
    for kind in ("fp8", "fp8_fast"):
        assert f"gemms {kind} {kind} {kind}" in str(layer("fp8_rowwise", kind, (128, 128)))


# ----------------------------------------------------------------------------------------------------------- the table

MXFP4 = Plan(MX_E2M1, "e8m0", 32, "floor")
MXFP8 = replace(MXFP4, element=FORMAT_E4M3)
NVFP4 = Plan(MX_E2M1, "minifloat", 16, "absmax", scale_element=FORMAT_E4M3)
FP8 = Plan(FORMAT_E4M3, "float32", None, "absmax")
QUEST = Plan(get_format("int4").element, "float32", None, "gaussian")
OPERANDS = {
    "mxfp4": Layout(MXFP4),
    "mxfp4 three quarters": Layout(replace(MXFP4, rule="floor_three_quarters")),
    "mxfp4 phase": Layout(replace(MXFP4, rule="mse_phase")),
    "mxfp4 64": Layout(replace(MXFP4, block=64)),
    "mxfp4 tiles": Layout(replace(MXFP4, block=32 * 32), rows=32),
    "mxfp6": Layout(replace(MXFP4, element=get_format("mxfp6_e3m2").element)),
    "mxfp8": Layout(MXFP8),
    "mxfp8 e5m2": Layout(replace(MXFP4, element=get_format("mxfp8_e5m2").element)),
    "nvfp4": Layout(NVFP4),
    "nvfp4 tiles": Layout(replace(NVFP4, block=16 * 16), rows=16),
    "ue5m3": Layout(replace(NVFP4, scale_element=get_format("e2m1/16/ue5m3").scale_element)),
    "fp8": Layout(FP8),
    "fp8 tensor": Layout(replace(FP8, per_tensor=True)),
    "fp8 e5m2": Layout(replace(FP8, element=get_format("fp8_e5m2").element)),
    "fp8 128": Layout(replace(FP8, block=128)),
    "fp8 128 tiles": Layout(replace(FP8, block=128 * 128), rows=128),
    "fp4 row": Layout(replace(FP8, element=MX_E2M1)),
    "int4": Layout(QUEST),
    "int8 tensor": Layout(replace(QUEST, element=get_format("int8").element, per_tensor=True)),
    "int8 tiles": Layout(Plan(get_format("int8_sym").element, "float32", 32 * 32, "absmax"), rows=32),
    "learned": Layout(replace(QUEST, rule="learned", per_tensor=True)),
    "none": Layout(None),
}
NATIVE = {  # the rows of 4-bit and MX units that take an operand
    "mxfp4": "mxfp4 mxfp8", "mxfp4 three quarters": "mxfp4 mxfp8", "mxfp4 phase": "mxfp4 mxfp8",
    "mxfp4 64": "mxfp4 mxfp8", "mxfp4 tiles": "mxfp4 mxfp8", "mxfp6": "mxfp8", "mxfp8": "mxfp8",
    "nvfp4": "nvfp4", "nvfp4 tiles": "nvfp4",
}  # fmt: skip
IN_FP8 = ("mxfp4", "mxfp4 three quarters", "mxfp4 phase", "mxfp4 64", "mxfp4 tiles", "mxfp6", "mxfp8", "fp8")
IN_FP8 += ("mxfp8 e5m2", "fp8 tensor", "fp8 e5m2", "fp4 row")
IN_BLOCKS = ("mxfp4", "mxfp4 three quarters", "mxfp4 phase", "mxfp4 64", "mxfp4 tiles", "mxfp6", "mxfp8", "fp8 128")
IN_BLOCKS += ("fp8 128 tiles",)
BLACKWELL, HOPPER, ADA = (10, 0), (9, 0), (8, 9)


def quantised(name: str, dim: int, lines: int, length: int, storage: Storage = "float32") -> QTensor:
    """So many lines of a Gaussian matrix whose rows spread over some octaves, as one of OPERANDS along dim."""
    generator = torch.Generator().manual_seed(lines)
    x = torch.randn(lines, length, generator=generator)
    x = x * torch.exp2(torch.randint(-2, 3, (lines, 1), generator=generator).float())
    x = x if dim == -1 else x.T
    layout = replace(OPERANDS[name], shape=tuple(x.shape), dim=dim)
    learned = torch.tensor(0.2) if name == "learned" else None
    return quantize(x.contiguous(), layout.stored(storage, blocks=True), learned=learned, backend="reference")


def test_each_row_takes_what_it_names_and_refuses_the_rest_with_a_reason() -> None:
    for left, right in product(OPERANDS, OPERANDS):
        a, b = OPERANDS[left], OPERANDS[right]
        found = {name for name, row in TABLE.items() if row.accepts(a, b) is None}
        expected = {"float"}
        if {left, right} <= {"int4", "int8 tensor"}:
            expected.add("int8")
        if left in IN_FP8 and right in IN_FP8 and not right.endswith("e5m2"):
            expected |= {"fp8", "fp8_fast"}
        if left in IN_BLOCKS and right in IN_BLOCKS and not left == right == "fp8 128 tiles":
            expected.add("fp8_block")
        expected |= {*NATIVE.get(left, "").split()} & {*NATIVE.get(right, "").split()}
        assert found == expected, (left, right)


REFUSED = {
    ("int8", "mxfp4", "int4"): "left: .*int8 holds integer codes without block scales",
    ("int8", "int4", "learned"): "right: .*a NaN has no integer, and a learned scale stays finite",
    ("mxfp4", "none", "mxfp4"): "left: .*it is not quantised; use float32 or bfloat16",
    ("mxfp4", "mxfp4", "mxfp8"): "right: its codes and blocks are not among those that mxfp4 takes",
    ("mxfp4", "nvfp4", "mxfp4"): "left: .*FP4 and MX units take e2m1/32/e8m0.*; found e2m1/32/e4m3",
    ("nvfp4", "nvfp4", "ue5m3"): "right: .*FP4 and MX units take .*; found e2m1/16/minifloat",
    ("mxfp8", "mxfp8 e5m2", "mxfp8"): "left: its codes and blocks are not among those that mxfp8 takes",
    ("fp8", "nvfp4", "fp8"): "left: .*block scales in minifloat are no powers of two",
    ("fp8", "int4", "int4"): "left: .*float8 holds minifloat codes of at most 3 mantissa bits",
    ("fp8", "fp8", "fp8 e5m2"): "right: its codes need float8_e5m2, and FP8 units take float8_e4m3fn there",
    ("fp8_block", "fp8", "fp8 128"): "left: .*its block scales are not those of 128 elements or less",
    ("fp8_block", "fp8 128 tiles", "fp8 128 tiles"): "both sides are in tiles of 128x128; only one may be",
    ("fp8_block", "mxfp8 e5m2", "fp8 128"): "codes that need float8_e5m2; its units take float8_e4m3fn alone",
}


@pytest.mark.parametrize(("row", "left", "right"), REFUSED)
def test_what_a_row_does_not_take_it_refuses_by_name(row: str, left: str, right: str) -> None:
    sides = quantised(left, -1, 32, 128), quantised(right, -2, 32, 128)
    message = f"product '{row}' does not take these operands: {REFUSED[row, left, right]}"
    with pytest.raises(ValueError, match=message):
        multiply(TABLE[row], *sides, torch.bfloat16)


def test_operands_that_do_not_meet_are_refused_by_name() -> None:
    a, b = quantised("mxfp4", -1, 32, 64), quantised("mxfp4", -2, 32, 128)
    with pytest.raises(ValueError, match=r"left \(32, 64\) and right \(128, 32\) share no contraction"):
        multiply(TABLE["float"], a, b, torch.bfloat16)
    with pytest.raises(ValueError, match="left contracts dim -1, and is quantised along -2; quantise it again"):
        multiply(TABLE["float"], b, b.t, torch.bfloat16)
    with pytest.raises(ValueError, match="right contracts dim -2, and is quantised along -1; quantise it again"):
        multiply(TABLE["float"], a, quantised("mxfp4", -1, 64, 32), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", OPERANDS)
def test_the_float_product_is_of_the_values_and_its_scales_multiply_it(name: str, dtype: torch.dtype) -> None:
    """Each in one rounding: the product in the values' dtype, then float32 times the left scale, then the right one."""
    storage = "bfloat16" if name == "none" and dtype == torch.bfloat16 else "float32"
    a, b = quantised(name, -1, 5, 128, storage), quantised(name, -2, 7, 128, storage)
    found = multiply(TABLE["float"], a, b, dtype)
    held = torch.bfloat16 if dtype == torch.bfloat16 and not a.layout.lacks("bfloat16") else torch.float32
    expected = matmul(a.codes.to(held), b.codes.to(held))
    if a.tensor_scale is not None:
        expected = expected.float() * a.tensor_scale * b.tensor_scale
    elif name == "mxfp4 three quarters":
        expected = expected.float() * (16 / 9)
    assert torch.equal(found, expected) and found.dtype == expected.dtype
    exact = a.dequantize().double() @ b.dequantize().double()
    assert (found.double() - exact).norm() < (2**-8 if held == torch.bfloat16 else 2**-21) * exact.norm()


@pytest.mark.parametrize(("left", "right"), [("int4", "int4"), ("int4", "int8 tensor"), ("int8 tensor", "int8 tensor")])
def test_the_int8_product_is_exact_before_its_scales(left: str, right: str) -> None:
    a, b = quantised(left, -1, 9, 160), quantised(right, -2, 6, 160)
    exact = (a.codes.double() @ b.codes.double()).float()
    for storage in ("float32", "bfloat16", "int8"):
        found = multiply(TABLE["int8"], a.to(storage), b.to(storage), torch.bfloat16)
        assert torch.equal(found, exact * a.tensor_scale * b.tensor_scale)


def rounded(q: QTensor, storage: Storage) -> Tensor:
    """Its values in float8 times all scales, the line's or the group's first multiplied by the tensor's: float32."""
    codes, scales = q.to(storage), q.layout.constant if q.tensor_scale is None else q.tensor_scale
    values = codes.codes.float() if q.layout.dim == -1 else codes.codes.float().T
    if codes.block_scale is None:
        return values * scales
    each = codes.scale_of_each()
    return values * ((each if q.layout.dim == -1 else each.T) * scales)


@pytest.mark.parametrize("name", [name for name in IN_FP8 if not name.endswith("e5m2")])
def test_the_fp8_product_is_of_codes_and_line_scales(name: str) -> None:
    a, b = quantised(name, -1, 37, 192), quantised(name, -2, 20, 192)
    values, others = rounded(a, "float8").double(), rounded(b, "float8").double()
    constant = a.layout.constant * b.layout.constant if a.tensor_scale is None else 1.0
    if constant != 1.0:  # it multiplies the rounded product; bfloat16 holds codes times block scales
        values, others = ((x / a.layout.constant).bfloat16().double() for x in (values, others))
    expected, terms = (values @ others).bfloat16().float() * constant, values.abs() @ others.abs()
    for row in ("fp8", "fp8_fast"):
        found = multiply(TABLE[row], a, b, torch.bfloat16)
        assert found.dtype == (torch.bfloat16 if constant == 1.0 else torch.float32)
        assert (found.bfloat16() != expected.bfloat16()).float().mean() < 0.01
        difference = (found.double() - expected.double()).abs()  # where float32 sums round to the neighbour
        assert (difference <= 2**-7 * expected.double().abs() + 2**-20 * terms).all()
    assert a.layout.size is None or inexact(a) == 0 or name == "mxfp8"


@pytest.mark.parametrize(
    ("left", "right", "sizes"),
    [
        *product(("fp8 128",), ("fp8 128 tiles", "fp8 128"), ((37, 256, 20), (130, 384, 150))),
        *product(("mxfp4 phase",), ("mxfp4",), ((37, 256, 20), (130, 352, 150), (37, 32, 48))),
    ],
)
def test_the_fp8_product_by_blocks_is_in_cublas_layout(
    left: str, right: str, sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same on CPU and, with the sizes, strides and scales that torch's CUDA operator checks, on CUDA."""
    m, k, n = sizes
    asked = []

    def cublas(
        a: Tensor, b: Tensor, scale_a: Tensor, kind_a: ScalingType, scale_b: Tensor, kind_b: ScalingType
    ) -> Tensor:
        torch_takes(a, b, scale_a, kind_a, scale_b, kind_b)
        assert a.is_contiguous() and b.T.is_contiguous() and b.shape[1] % 16 == 0 and a.shape[1] % 128 == 0
        values = []
        for codes, scale, kind in ((a, scale_a, kind_a), (b.T, scale_b, kind_b)):
            lines, groups = codes.shape[0], -(-codes.shape[1] // 128)
            if kind == ScalingType.BlockWise1x128:
                assert scale.shape == (lines, groups) and scale.stride(0) == 1
                assert scale.stride(1) == lines or groups == 1
                each = scale.repeat_interleave(128, 1)
            else:
                assert kind == ScalingType.BlockWise128x128
                groups = -(-groups // 4) * 4
                assert scale.shape == (groups, -(-lines // 128)) and scale.stride(0) == 1
                assert scale.stride(1) == groups or scale.shape[1] == 1
                each = scale.T.repeat_interleave(128, 0).repeat_interleave(128, 1)
            values.append(codes.double() * each[:lines, : codes.shape[1]])
        asked.append(kind_b)
        return (values[0] @ values[1].T).bfloat16()

    monkeypatch.setattr(gemm, "scaled_mm", cublas)
    storages: dict[str, Storage] = dict.fromkeys(("fp8 128", "fp8 128 tiles"), "float8_128")
    a, b = (
        quantised(left, -1, m, k, storages.get(left, "float32")),
        quantised(right, -2, n, k, storages.get(right, "float32")),
    )
    found = multiply(TABLE["fp8_block"], a, b, torch.bfloat16)
    sides = [replace(q, block_scale=gemm._line_scale(q)) for q in (a.to("float8_128"), b.to("float8_128"))]
    on_cuda = gemm._block_scaled_mm(*sides)
    exact = a.dequantize().double() @ b.dequantize().double()
    for each in (found, on_cuda):
        assert each.shape == (m, n) and (each.double() - exact).norm() < 2**-8 * exact.norm()
    assert (found != on_cuda).float().mean() < 0.01
    assert asked == [ScalingType.BlockWise128x128 if "tiles" in right else ScalingType.BlockWise1x128]


def test_cublas_reads_block_scales_where_they_are() -> None:
    q = quantised("mxfp4", -1, 32, 256).to("float8_128")
    assert q.block_scale is not None
    assert gemm._in_groups(q, 16)[1].data_ptr() == q.block_scale.data_ptr()


def unit(
    a: Tensor, b: Tensor, scales_a: list[Tensor], kinds_a: list[ScalingType], scales_b: list[Tensor],
    kinds_b: list[ScalingType], orders_a: list[SwizzleType], orders_b: list[SwizzleType],
) -> Tensor:  # fmt: skip
    """torch's scaled_mm of FP4 and MX codes as its operator checks it and cuBLAS documents it, in float64."""
    if a.dtype != torch.float4_e2m1fn_x2 or kinds_a[1:]:  # of MXFP4, torch 2.13's check for FakeTensors counts bytes
        torch_takes(a, b, scales_a, kinds_a, scales_b, kinds_b, orders_a, orders_b)
    assert kinds_a == kinds_b and orders_a == orders_b and orders_a[0] == SwizzleType.SWIZZLE_32_4_4
    assert a.is_contiguous() and b.T.is_contiguous() and b.shape[1] % 16 == 0 and a.dtype == b.dtype
    levels = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    table = torch.tensor(levels + [-level for level in levels], dtype=torch.float64)
    size, scale_dtype = {
        ScalingType.BlockWise1x32: (32, torch.float8_e8m0fnu), ScalingType.BlockWise1x16: (16, torch.float8_e4m3fn),
    }[kinds_a[0]]  # fmt: skip
    values = []
    for codes, scales in ((a, scales_a), (b.T, scales_b)):
        if codes.dtype == torch.float4_e2m1fn_x2:
            pairs = codes.view(torch.uint8)
            read = torch.stack((table[(pairs & 15).long()], table[(pairs >> 4).long()]), -1).flatten(1)
        else:
            assert codes.dtype == torch.float8_e4m3fn and size == 32
            read = codes.double()
        lines, blocks = read.shape[0], read.shape[1] // size
        assert read.shape[1] % 16 == 0 and read.shape[1] % size == 0
        across = -(-blocks // 4)
        assert scales[0].dtype == scale_dtype and scales[0].is_contiguous()
        assert scales[0].numel() == -(-lines // 128) * 128 * across * 4
        line, block = torch.arange(lines)[:, None], torch.arange(blocks)
        at = ((line // 128) * across + block // 4) * 512 + (line % 32) * 16 + (line % 128 // 32) * 4 + block % 4
        values.append(read * scales[0].double()[at].repeat_interleave(size, 1))
    found = values[0] @ values[1].T
    if kinds_a[1:]:
        assert kinds_a[1:] == [ScalingType.TensorWise] and orders_a[1:] == [SwizzleType.NO_SWIZZLE]
        assert all(scales[1].numel() == 1 and scales[1].dtype == torch.float32 for scales in (scales_a, scales_b))
        found = found * (scales_a[1] * scales_b[1]).double()
    return found.bfloat16()


@pytest.mark.parametrize("row", ["mxfp4", "nvfp4", "mxfp8"])
def test_units_multiply_what_was_quantised(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits that the units are given, read as torch and cuBLAS document them, are the operands: their product is the
    exact one, rounded once before the scales that the units do not read."""
    monkeypatch.setattr(gemm, "scaled_mm", unit)
    taken = [name for name, rows in NATIVE.items() if row in rows.split()]
    for (left, right), (m, k, n) in product(product(taken, taken), ((37, 192, 20), (150, 320, 144))):
        a, b = quantised(left, -1, m, k), quantised(right, -2, n, k)
        exact = a.codes.double() @ b.codes.double()
        if row == "nvfp4":
            expected = (exact * (a.tensor_scale * b.tensor_scale).double()).bfloat16()
        else:
            scales = [q.layout.constant if q.tensor_scale is None else q.tensor_scale for q in (a, b)]
            expected = exact.bfloat16().float()
            both = [scales[0] * scales[1]] if all(isinstance(scale, float) for scale in scales) else scales
            for scale in both:
                expected = expected * scale
        found = multiply(TABLE[row], a, b, torch.bfloat16)
        assert found.shape == (m, n) and torch.equal(found.float(), expected.float()), (left, right)
        packed = [q.to("packed") if q.layout.rows == 1 else q for q in (a, b)]
        assert torch.equal(multiply(TABLE[row], *packed, torch.bfloat16), found)


def test_a_nan_reaches_the_units() -> None:
    """As E8M0's NaN, and as a tensor scale that is NaN."""
    x = torch.ones(4, 64)
    x[1, 40] = float("nan")
    mx = quantize(x, Layout(MXFP4, (4, 64), storage="swizzled"))
    assert unswizzle(mx.block_scale, 4, 2).tolist() == [[125, 125], [125, 255], [125, 125], [125, 125]]
    assert quantize(x, Layout(NVFP4, (4, 64), storage="swizzled")).tensor_scale.isnan()


# (setting, left, right, device, capability) -> the row, or what is said
RESOLVED = {
    ("auto", "int4", "int4", "cpu", None): "int8",
    ("auto", "int4", "int4", "mps", None): "float",
    ("auto", "mxfp4", "mxfp4", "cuda", BLACKWELL): "float",
    ("float", "int4", "int4", "cuda", BLACKWELL): "float",
    ("fp8", "int4", "int4", "cpu", None): "int8",
    ("fp8", "mxfp4", "mxfp4", "cpu", None): "fp8_block",
    ("fp8_fast", "mxfp4", "mxfp8", "cuda", ADA): "fp8_fast",
    ("fp8", "fp8 128", "fp8 128 tiles", "cpu", None): "fp8_block",
    ("fp8", "fp8 128", "fp8 128 tiles", "cuda", HOPPER): "fp8_block",
    ("fp8", "fp8 128", "mxfp8", "cuda", HOPPER): "fp8_block",
    ("fp8", "nvfp4", "nvfp4", "cuda", HOPPER): "float",
    ("fp8", "none", "mxfp4", "cuda", HOPPER): "float",
    ("fp4", "mxfp4", "mxfp4", "cuda", BLACKWELL): "mxfp4",
    ("fp4", "mxfp4", "mxfp4", "cuda", (12, 0)): "mxfp8",  # torch multiplies MXFP4 on compute capability 10 alone
    ("fp4", "nvfp4", "nvfp4 tiles", "cuda", (12, 0)): "nvfp4",
    ("fp4", "mxfp4", "mxfp8", "cuda", (10, 3)): "mxfp8",
    ("fp4", "int4", "int4", "cuda", BLACKWELL): "int8",
    ("fp4", "none", "none", "cpu", None): "float",
    ("fp4", "nvfp4", "nvfp4", "cpu", None): (
        "gemm 'fp4' cannot run on cpu: nvfp4 needs a CUDA device of compute capability 10.0 or later; found cpu; "
        "ask for gemm 'auto'"
    ),
    ("fp4", "mxfp4", "mxfp4", "cuda", HOPPER): (
        "gemm 'fp4' cannot run on cuda: mxfp4 needs a CUDA device of compute capability 10.0 to 10.9; found 9.0; mxfp8 "
        "needs a CUDA device of compute capability 10.0 or later; found 9.0; ask for gemm 'auto'"
    ),
    ("fp8", "fp8", "fp8", "cuda", (8, 6)): "fp8 needs a CUDA device of compute capability 8.9 or later; found 8.6",
    (
        "fp8",
        "fp8",
        "fp8",
        "mps",
        None,
    ): "gemm 'fp8' cannot run on mps: fp8 needs a CUDA device of .*; found mps; ask for",
    ("fp8", "fp8 128", "fp8 128", "cuda", BLACKWELL): "fp8_block needs .* compute capability 9.0 to 9.9; found 10.0",
    ("int4", "fp8", "fp8", "cpu", None): "unknown gemm 'int4'; gemms: auto, float, fp8, fp8_fast, fp4",
}


@pytest.mark.parametrize("asked", RESOLVED, ids=str)
def test_a_setting_names_its_row_or_says_what_it_lacks(asked: tuple) -> None:
    setting, left, right, device, capability = asked
    expected = RESOLVED[asked]
    if expected in TABLE:
        assert resolve(setting, OPERANDS[left], OPERANDS[right], device, capability) is TABLE[expected]
    else:
        with pytest.raises(ValueError, match=expected):
            resolve(setting, OPERANDS[left], OPERANDS[right], device, capability)


def test_a_backward_product_contracts_the_forwards_codes_where_one_scale_is_the_tensors() -> None:
    tensor = replace(OPERANDS["int8 tensor"], shape=(8, 4), storage="int8")
    floats = replace(OPERANDS["fp8 tensor"], shape=(8, 4))
    int8, plain = TABLE["int8"], Layout(None, (8, 4), -2)
    assert reused(tensor, int8, -2, pads=False) == replace(tensor, dim=-2)
    assert reused(tensor, int8, -2, pads=True) == plain  # 8 bits and a half: no zero to fill up with
    assert reused(tensor, TABLE["float"], -2, pads=False) == plain
    assert reused(floats, TABLE["fp8"], -2, pads=True) == replace(floats, dim=-2)
    for name in ("int4", "mxfp4", "fp8 128 tiles", "none"):
        assert reused(replace(OPERANDS[name], shape=(8, 4)), int8, -2, pads=False) == plain
