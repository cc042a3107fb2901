"""compiled equals reference bit for bit: codes, scales, masks, operands; one graph serves all shapes of a plan."""

import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qtrain_kernels import compiled, dispatch, reference
from qtrain_kernels.formats import SCALE_RULES, get_format
from qtrain_kernels.reference import Mask, Plan

KEY = torch.tensor([5, -6], dtype=torch.int32)
E2M1 = get_format("mxfp4").element
E4M3, UE5M3 = (get_format(name).scale_element for name in ("nvfp4", "e2m1/16/ue5m3"))
NVFP4 = Plan(E2M1, "minifloat", 16, "absmax", scale_element=E4M3)
PLANS = {
    "quartet forward": Plan(E2M1, "e8m0", 32, "std", "nearest", Mask("inside", 6.0)),
    "quartet backward": Plan(E2M1, "e8m0", 32, "floor_three_quarters", "stochastic"),
    "least error": Plan(E2M1, "e8m0", 32, "mse", "nearest"),
    "best phase": Plan(E2M1, "e8m0", 32, "mse_phase", "nearest", Mask("inside", 6.0)),
    "mxfp8": Plan(get_format("mxfp8_e4m3").element, "e8m0", 32, "rceil"),
    "nvfp4": replace(NVFP4, mask=Mask("error", 1.0)),
    "nvfp4 tile": replace(NVFP4, block=256),
    "nvfp4 ue5m3": replace(NVFP4, scale_element=UE5M3, rounding="stochastic", rule="absmax_headroom"),
    "four over six": replace(NVFP4, rule="four_over_six"),
    "ms-eden": replace(NVFP4, rule="absmax_fitted", rounding="eden", correction=16),
    "ms-eden 128": replace(NVFP4, rule="absmax_fitted", rounding="eden", correction=128),
    "quest": Plan(get_format("int4").element, "float32", None, "gaussian", "nearest", Mask("error", 0.5)),
    "quest sparse": Plan(
        get_format("int4").element, "float32", None, "gaussian", mask=Mask("error", 0.5), sparsity="4:8"
    ),
    "2:4": Plan(get_format("mxfp4").element, "e8m0", 32, "floor", sparsity="2:4"),
    "fp8 block": Plan(get_format("fp8_e4m3").element, "float32", 128, "absmax"),
    "luq": Plan(get_format("e3m0/tensor/float32").element, "float32", None, "absmax", "stochastic", per_tensor=True),
    "sawb": Plan(get_format("int4_sym").element, "float32", None, "sawb", per_tensor=True),
    "even": Plan(E2M1, "e8m0", 32, "even", "stochastic"),
    "ceil": Plan(get_format("mxint8").element, "e8m0", 32, "ceil"),
    "round": Plan(get_format("mxfp6_e3m2").element, "e8m0", 32, "round"),
    "std and round": Plan(E2M1, "e8m0", 32, "std_round", mask=Mask("within", 3.0)),
    "gaussian": Plan(E2M1, "e8m0", 32, "gaussian", mask=Mask("error", 0.5)),
    "quest one bit": Plan(get_format("int1").element, "float32", None, "gaussian", mask=Mask("within", 0.65)),
}
ONE_SHAPE = {"even", "ceil", "round", "std and round", "gaussian", "quest one bit"}  # what differs has no shape
BOTH_DIMS = {"quartet backward", "ms-eden", "ms-eden 128", "four over six", "best phase"}  # in recipes' backward


def hard_input(shape: tuple[int, int, int]) -> Tensor:
    """Gaussians over many octaves, with whole zero, subnormal and huge blocks, and ties."""
    generator = torch.Generator().manual_seed(sum(shape))
    outer = shape[0]
    octaves = torch.exp2(torch.randint(-20, 20, (outer, 1, 1), generator=generator).float())
    x = torch.randn(shape, generator=generator) * octaves
    x[0] = 0
    if outer > 4:
        x[1] *= 1e-42
        x[2] = x[2].clamp(-1, 1) * 3e38
        x[3] = torch.round(x[3] * 4) / 4
    return x


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal bits, NaN included."""
    if a is None or b is None:
        return a is b
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.uint8: torch.uint8}[a.dtype]
    return a.dtype == b.dtype and torch.equal(a.view(bits), b.view(bits))


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", PLANS)
def test_equal_bits_at_every_shape_without_recompiling(name: str) -> None:
    plan = PLANS[name]
    block = plan.span or 96
    shapes = [(6, block, 1), (129, block, 1), (1, block, 1)]
    if name in ONE_SHAPE:
        shapes = shapes[1:2]
    if name in BOTH_DIMS:
        shapes += [(5, block, 33), (2, block, 128), (1, block, 64)]
    if name == "quest":
        shapes += [(7, 40, 1), (1, block, 33), (1, 128, 65)]
    compiled._graph.cache_clear()
    seen = set()
    for shape in shapes:
        x = hard_input(shape)
        layout, block_alone = shape[2] == 1, shape[0] == 1 and (plan.span or shape[2] == 1)  # the latter runs eagerly
        before = graphs()
        for key, grad, given in (
            (KEY, True, x),
            (KEY + 1, False, x),
            (KEY, True, x.transpose(0, 1).contiguous().transpose(0, 1)),
        ):
            with torch.set_grad_enabled(grad):
                scale = reference.tensor_scale(x, plan)
                expected = reference.operand(x, scale, key, plan, torch.bfloat16)
                found = compiled.operand(given, scale, key, plan, torch.bfloat16)
            assert all(map(same, expected, found)), (name, shape)
        assert graphs() == before + (not block_alone and layout not in seen), (name, shape)
        seen |= set() if block_alone else {layout}


def test_every_e8m0_rule_and_every_mask_has_a_plan() -> None:
    rules = {rule for rule, kinds in SCALE_RULES.items() if "e8m0" in kinds}
    assert rules <= {plan.rule for plan in PLANS.values() if plan.scale_kind == "e8m0"}
    assert {plan.mask.kind for plan in PLANS.values() if plan.mask} == {"inside", "within", "error"}


def one_nan(x: Tensor) -> Tensor:
    """In float32, compiled code makes a NaN of another sign and payload (0xffffffff, not 0x7fc00000): no promise."""
    return torch.where(x.isnan(), float("nan"), x) if x.is_floating_point() else x


def test_encode_gives_equal_codes_and_scales() -> None:
    """Bit for bit, the sign of zero included."""
    plan = PLANS["quartet forward"]
    x = hard_input((77, 32, 1))
    x[5, 3], x[6, 4] = float("nan"), float("inf")
    expected, found = reference.encode(x, 1.0, None, plan), compiled.encode(x, 1.0, None, plan)
    for a, b in zip(expected, found, strict=True):
        assert a is not None and b is not None and same(one_nan(a), one_nan(b))


def test_auto_chooses_once_and_says_so(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch.resolve.cache_clear()
    monkeypatch.setattr(dispatch, "_cpp_obstacle", lambda: "no C++ compiler was found; install g++ or set CXX")
    with caplog.at_level(logging.INFO, "qtrain"):
        assert dispatch.get("operand", "auto", "cpu") is reference.operand
        assert dispatch.get("operand", "auto", "cpu") is reference.operand
    assert [record.message for record in caplog.records] == [
        "quantisers on cpu run on backend reference: no C++ compiler was found; install g++ or set CXX"
    ]
    with pytest.raises(
        ValueError, match=r"'compiled' cannot run on cpu: no C\+\+ compiler .* ask for backend 'reference'"
    ):
        dispatch.get("operand", "compiled", "cpu")
    with pytest.raises(ValueError, match="unknown backend 'triton'; backends: auto, reference, compiled"):
        dispatch.get("operand", "triton", "cpu")  # pyright: ignore[reportArgumentType]
    dispatch.resolve.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("name", PLANS)
def test_cuda_equals_the_reference_on_cpu(name: str) -> None:
    plan = PLANS[name]
    x = hard_input((65, plan.span or 96, 1))
    scale = reference.tensor_scale(x, plan)
    expected = reference.operand(x, scale, KEY, plan, torch.bfloat16)
    moved = scale.cuda() if isinstance(scale, Tensor) else scale
    for function in (reference.operand, compiled.operand):
        found = function(x.cuda(), moved, KEY.cuda(), plan, torch.bfloat16)
        assert all(same(a, None if b is None else b.cpu()) for a, b in zip(expected, found, strict=True)), function
