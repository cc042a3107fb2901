"""Products on 8-bit units: INT8 exact, FP8 exact in its operands, and what a layer makes of them."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import ScalingType

import qtrain
from qtrain.errors import UserError
from qtrain.quant import quantizer
from qtrain.quant.linear import Numerics, QuantLinear
from qtrain.recipe import read_recipe
from qtrain_kernels import cpu, dispatch, gemm, reference
from qtrain_kernels.formats import get_format
from qtrain_kernels.gemm import fold, fp8_matmul, int8_matmul
from qtrain_kernels.plans import Plan, stored_integer

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
    assert isinstance(linear, QuantLinear) and linear.numerics.fprop.held == "int8"
    x = torch.randn(33, 128, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    fprop = linear.numerics.fprop
    rotation = fprop.rotation(torch.zeros(2, dtype=torch.int32), 128)
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
        assert [each.held for each in numerics.gemms] == ["int8", "int8", integer]
        assert replace(numerics, gemm="float").runs_on("cpu").endswith("float float float")


# ----------------------------------------------------------------------------------------------------------------- FP8

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def mxfp4(rows: int, columns: int, octaves: int) -> Tensor:
    """Codes of two significant bits under block scales that spread over so many octaves, the least in each row."""
    generator = torch.Generator().manual_seed(rows)
    codes = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])[torch.randint(0, 8, (rows, columns), generator=generator)]
    blocks = torch.exp2(-torch.randint(0, octaves + 1, (rows, columns // 32), generator=generator).float())
    blocks[:, 0], blocks[:, 1] = 1.0, 2.0**-octaves
    codes[:, 0], codes[:, 32] = 6.0, 0.5
    signs = torch.randint(0, 2, (rows, columns), generator=generator) * 2 - 1
    return codes * signs * blocks.repeat_interleave(32, 1) * torch.exp2(torch.arange(rows) - 40.0)[:, None]


@pytest.mark.parametrize("dim", [-1, -2])
def test_folding_is_exact_as_far_as_e4m3_reaches(dim: int) -> None:
    for octaves, exact in ((13, True), (16, False)):
        values = mxfp4(6, 256, octaves)
        folded = fold(values.bfloat16() if dim == -1 else values.T, dim, E4M3)
        back = (folded.codes.double() * folded.scale).float()
        lost = int((back != (values if dim == -1 else values.T)).sum())
        assert (lost == 0) == exact and folded.inexact.item() == lost
        assert folded.codes.float().abs().amax(dim).tolist() == [384.0] * 6
        assert folded.scale.shape == ((6, 1) if dim == -1 else (1, 6))
        assert (folded.codes if dim == -1 else folded.codes.T).is_contiguous()  # as FP8 products take it


@pytest.mark.parametrize(("dtype", "largest"), [(E4M3, 448.0), (E5M2, 57344.0)])
def test_the_largest_of_a_line_takes_the_top_of_the_range(dtype: torch.dtype, largest: float) -> None:
    top = torch.tensor([1.0, 1.5, 1.75, 1.875, 0.0, 2.0**-126, 1e-40, 2.0**127 * 1.75])[:, None]
    folded = fold(torch.cat((top, -top / 2), 1), -1, dtype)
    found = folded.codes.float().abs().amax(1)
    assert ((found <= largest) & (found > largest / 2))[[0, 1, 2, 3, 7]].all()
    assert found[4] == 0 and folded.inexact.item() == (2 if dtype == E5M2 else 0) + 2  # 1.875 in E5M2; 1e-40 in both
    bad = fold(torch.tensor([[1.0, float("nan")], [float("inf"), 1.0], [1.0, 1.0]]), -1, dtype)
    assert bad.scale.isnan().flatten().tolist() == [True, True, False] and bad.inexact == 0


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (5, 40, 23), (16, 48, 32)])
def test_the_fp8_product_is_exact_and_rounded_once(m: int, k: int, n: int) -> None:
    """Of small integers under powers of two, whose sums float32 holds."""
    left, right, scale = fp8_factors(m, k, n)
    found = fp8_matmul(fold(left * scale, -1, E4M3), fold(right, -2, E4M3))
    assert torch.equal(found, ((left * scale).double() @ right.double()).bfloat16())


def fp8_factors(m: int, k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """(M, K) and (K, N) of small integers; (M, 1) powers of two."""
    generator = torch.Generator().manual_seed(m + k + n)
    left, right = (torch.randint(-6, 7, shape, generator=generator).float() for shape in ((m, k), (k, n)))
    return left, right, torch.exp2(torch.arange(m) - m // 2.0)[:, None]


def test_cudas_fp8_sizes_are_filled_with_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the layout, the sizes and with the scales that cuBLASLt takes; and how the sums are kept is asked for."""
    asked = []

    def cublas(
        left: Tensor, right: Tensor, left_scale: Tensor, left_kind: ScalingType,
        right_scale: Tensor, right_kind: ScalingType, use_fast_accum: bool,
    ) -> Tensor:  # fmt: skip
        assert left.is_contiguous() and right.T.is_contiguous() and left_kind == right_kind == ScalingType.RowWise
        assert left_scale.shape == (left.shape[0], 1) and right_scale.shape == (1, right.shape[1])
        assert left_scale.is_contiguous() and right_scale.is_contiguous()
        asked.append((*left.shape, right.shape[1], use_fast_accum))
        return ((left.double() * left_scale) @ (right.double() * right_scale)).bfloat16()

    monkeypatch.setattr(gemm, "scaled_mm", cublas)
    for (m, k, n), fast in (((5, 40, 23), False), ((16, 48, 32), True)):
        left, right, scale = fp8_factors(m, k, n)
        folded = fold(left * scale, -1, E4M3), fold(right, -2, E4M3)
        assert torch.equal(gemm._scaled_mm(*folded, fast), fp8_matmul(*folded))
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
        rounded = qtrain.fp8_rounded(model)
        assert rounded == 0 or (kind in ("fp8", "fp8_fast") and recipe.startswith("mx"))
    for found, fast, rounded, exact in zip(*results, strict=True):
        assert torch.equal(found, fast)  # a CPU has one way to sum
        error, other = ((each.float() - exact).norm() / exact.norm() for each in (found, rounded))
        assert error < max(1.05 * other, 2e-3)


def test_fp8_products_are_for_bfloat16() -> None:
    with pytest.raises(
        UserError, match=r"0: gemm 'fp8' gives products in bfloat16; the compute dtype is torch.float32"
    ):
        layer("quartet", "fp8", (128, 128))(torch.randn(4, 128))


def test_what_fp8_rounds_is_counted_on_both_sides_once() -> None:
    """As a share of all that was multiplied since it was last asked."""
    shares = {}
    for side in ("neither", "input", "weight"):
        model = layer("mxfp6", "fp8", (128, 128))
        x = torch.randn(32, 128)
        for name, values in (("input", x), ("weight", model[0].weight.data)):
            if side == name:
                values[:, 32:64] *= 2.0**-20
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            model(x)
        shares[side] = qtrain.fp8_rounded(model)
        assert qtrain.fp8_rounded(model) == 0
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            model(x), model(x)
        assert qtrain.fp8_rounded(model) == shares[side]
    assert shares["neither"] == 0
    # of 32 and 128 rows of 128, a quarter each; nearly all of what is in it
    assert 0.7 < shares["input"] / (32 / 4 / 160) <= 1 and 0.7 < shares["weight"] / (128 / 4 / 160) <= 1


def test_a_weight_is_folded_once_per_optimiser_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all micro-batches; and they compute what they would with one folded for each."""
    folds: list[tuple[int, ...]] = []
    fold_of = quantizer.fold

    def counted(values: Tensor, dim: int, dtype: torch.dtype) -> gemm.Folded:
        folds.append(tuple(values.shape))
        return fold_of(values, dim, dtype)

    monkeypatch.setattr(quantizer, "fold", counted)
    xs = torch.randn(2, 64, 128, generator=torch.Generator().manual_seed(3))

    def gradient(forget: bool) -> Tensor:
        folds.clear()
        model = layer({"name": "quartet", "redraw": "step"}, "fp8", (128, 256))
        for micro_batch, x in enumerate(xs):
            qtrain.set_step(model, 1, micro_batch)
            if forget:
                model[0]._quantized = None
            with torch.autocast("cpu", torch.bfloat16):
                model(x.requires_grad_()).float().square().sum().backward()
        assert isinstance(model[0].weight.grad, Tensor)
        return model[0].weight.grad

    once = gradient(forget=False)
    weights = [shape for shape in folds if set(shape) == {128, 256}]
    assert weights == [(128, 256), (256, 128)] and len(folds) == 2 + 4 * 2  # x; dy, of dgrad and of wgrad; x'
    assert torch.equal(gradient(forget=True), once) and len(folds) == 2 * 2 + 4 * 2


def test_gradients_of_many_octaves_keep_to_e5m2() -> None:
    model = layer("fp8_tensorwise", "fp8", (128, 128))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(32, 128))
    y.backward((torch.randn(32, 128) * torch.exp2(-torch.arange(128.0) / 5)).bfloat16())
    assert qtrain.fp8_rounded(model) == 0


def test_e5m2_on_the_right_multiplies_as_float() -> None:
    fprop = {"x": {"format": "e4m3/row/float32"}, "w": {"format": "e5m2/row/float32"}}
    numerics = Numerics.build(read_recipe(read_recipe("fp8_rowwise").model_dump() | {"fprop": fprop}), "reference")
    assert [each.held for each in numerics.gemms] == ["float", "fp8", "fp8"]


def test_the_model_says_where_it_multiplies_in_fp8() -> None:
    kinds = {
        "quartet": "fp8 fp8 fp8",
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
    with pytest.raises(ValueError, match="gemm 'fp8' cannot run on mps: it has no FP8 product; ask for gemm 'auto'"):
        dispatch.resolve_gemm("fp8", "fp8", "mps")
    with pytest.raises(UserError, match=r"gemm 'fp4' needs FP4 units \(sm_100\), for which there is no kernel yet"):
        layer("quartet", "fp4", (128, 128))
    assert dispatch.resolve_gemm("auto", "int8", "mps") == "float"
    assert "forward | on no device yet" in str(layer("quartet", "fp8", (128, 128)).to("meta"))


def test_fp8_needs_a_card_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, allowed in (((8, 6), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        if allowed:
            assert dispatch.resolve_gemm("fp8", "fp8", "cuda") == "fp8"
        else:
            with pytest.raises(ValueError, match="gemm 'fp8' cannot run on cuda"):
                dispatch.resolve_gemm("fp8", "fp8", "cuda")


def test_fast_accumulation_is_asked_for_by_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def noted(left: gemm.Folded, right: gemm.Folded, fast: bool) -> Tensor:
        asked.append(fast)
        return fp8_matmul(left, right, fast)

    monkeypatch.setattr("qtrain.quant.linear.fp8_matmul", noted)
    for kind in ("fp8", "fp8_fast"):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            layer("quartet", kind, (128, 128))(torch.randn(32, 128))
    assert asked == [False, True]
