"""fake_quantize and QuantizedTensor: errors of every scale rule and format against published and computed values."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from oracles import quantization as oracle
from torch import Tensor

import qtrain
from qtrain.config.recipe import QuantSpec, read_recipe
from qtrain.config.settings import Backend
from qtrain.errors import UserError
from qtrain.quant.estimator import gradient_mask
from qtrain.quant.quantizer import Quantizer, rotate, unrotate
from qtrain.quant.rotation import hadamard
from qtrain_kernels import dispatch, gpu
from qtrain_kernels.formats import FORMATS, get_format
from qtrain_kernels.gemm import TABLE, multiply
from qtrain_kernels.plans import Mask
from qtrain_kernels.qtensor import float_storage
from qtrain_kernels.reference import signs_of

RULES = {  # octave-averaged relative error on N(0, 1) in blocks of 32, E2M1
    "floor": 1.334e-2, "even": 1.260e-2, "rceil": 1.367e-2, "ceil": 1.99e-2, "round": 1.464e-2, "std": 2.23e-2,
    "mse": 1.251e-2, "floor_three_quarters": 1.366e-2,
}  # fmt: skip
QUEST = {1: 0.3633802, 2: 0.1188461, 3: 0.0374397, 4: 0.0115429, 8: 8.78212e-5}


def gaussians(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def relative_error(x: Tensor, found: Tensor) -> float:
    return ((found.double() - x.double()).square().sum() / x.double().square().sum()).item()


@pytest.mark.parametrize("rule", RULES)
def test_error_of_every_mxfp4_scale_rule(rule: str) -> None:
    """A power of two aliases with sigma: rows run over one octave of it, evenly in its logarithm."""
    x = gaussians(4096, 1024) * torch.exp2(torch.arange(4096) / 4096)[:, None]
    found = qtrain.fake_quantize(x, "mxfp4", scale=rule, backend="reference")
    per_row = (found - x).double().square().sum(1) / torch.exp2(torch.arange(4096) / 2048).double() / 1024
    assert per_row.mean().item() == pytest.approx(RULES[rule], rel=5e-3)


@pytest.mark.parametrize("bits", QUEST)
def test_quest_error_is_the_published_one(bits: int) -> None:
    x = gaussians(4096, 1024)
    found = qtrain.fake_quantize(x, f"int{bits}", backend="reference")
    sampling = 3e-3 if bits < 8 else 1e-2  # int8's error is in its clipped tail
    assert relative_error(x, found) == pytest.approx(QUEST[bits], rel=sampling)


@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_have_two_to_the_b_levels(bits: int) -> None:
    quantizer = Quantizer.build(QuantSpec(format=f"int{bits}"), "reference")
    codes = quantizer.quantize(gaussians(64, 4096) * 3).codes
    assert len(codes.unique()) == 2**bits
    assert codes.max() == -codes.min() == (2**bits - 1) / 2


def test_nvfp4_has_two_levels() -> None:
    """s_tensor = amax / (6 * 448), s_block = e4m3(amax_block / 6 / s_tensor); codes of x / (both)."""
    x = gaussians(8, 64) * torch.tensor([1, 3, 1e-3, 0, 40, 1e-6, 5, 1.0])[:, None]
    found = qtrain.fake_quantize(x, "nvfp4", backend="reference").double().numpy()
    blocks = oracle.blocks_of(x.double().numpy(), 16)
    tensor = float(np.float32(np.abs(blocks).max()) / np.float32(2688))
    grid = oracle.minifloat_grid(4, 3, 448.0)
    scale = oracle.nearest(np.abs(blocks).max(-1, keepdims=True) / 6 / tensor, grid)
    scale = np.where(scale == 0, 1, scale)
    expected = oracle.nearest(np.clip(blocks / (scale * tensor), -6, 6), oracle.E2M1_GRID) * scale * tensor
    np.testing.assert_allclose(found, expected.reshape(8, 64), rtol=3e-7)
    assert (found[3] == 0).all()


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].default_scale == "absmax"])
def test_absmax_reaches_the_largest_code(name: str) -> None:
    x = gaussians(4, 64)
    found = qtrain.fake_quantize(x, name, backend="reference")
    rows = torch.arange(4) if name != "nvfp4" else x.abs().amax(1).argmax()[None]
    at = x.abs().argmax(1)
    torch.testing.assert_close(found[rows, at[rows]], x[rows, at[rows]], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros_and_dtype_and_shape_are_kept(name: str) -> None:
    zeros = torch.zeros(2, 3, 64, dtype=torch.bfloat16)
    found = qtrain.fake_quantize(zeros, name, backend="reference")
    assert found.dtype == torch.bfloat16 and torch.equal(found, zeros)
    if FORMATS[name].element.table is not None:  # rounded to nearest alone
        return
    x = gaussians(6, 64).view(2, 3, 64)
    stochastic = qtrain.fake_quantize(x, name, rounding="stochastic", backend="reference")
    assert relative_error(x, stochastic) < 3  # two bits: 1.7


def test_stochastic_draws_depend_on_the_seed_alone() -> None:
    x = gaussians(64, 64)
    state = torch.get_rng_state()
    first, again, other = (qtrain.fake_quantize(x, "mxfp4", rounding="stochastic", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), state)
    up = (first > x).double().flatten(), (other > x).double().flatten()
    assert abs(torch.corrcoef(torch.stack(up))[0, 1].item()) * 64 < 5 + 20  # rounding errors share x, not the draws
    assert (first != other).double().mean() > 0.2


@pytest.mark.parametrize("backend", ["reference", "compiled"])
@pytest.mark.parametrize("n", [16, 128, 12, 96])
def test_rotation_is_undone_and_preserves_products(n: int, backend: Backend) -> None:
    x, y = gaussians(8, 384), gaussians(8, 384, 1)
    key = torch.tensor([3, 4], dtype=torch.int32)
    for rotation in (hadamard(n, None, x.device), hadamard(n, key, x.device)):
        xr, yr = rotate(x, rotation, backend), rotate(y, rotation, backend)
        torch.testing.assert_close(unrotate(xr, rotation, backend), x, rtol=0, atol=2e-6)
        torch.testing.assert_close(xr @ yr.T, x @ y.T, rtol=0, atol=1e-4)
        torch.testing.assert_close(rotate(x.T, rotation, backend, -2), xr.T, rtol=0, atol=2e-6)
    signs = signs_of(rotation)
    assert signs is not None
    if n in (12, 96):  # orthogonal, as the products show, and of one magnitude: a Hadamard matrix
        assert rotate(torch.eye(n), rotation, backend).abs().sub(n**-0.5).abs().max() < 1e-7
        return
    expected = oracle.rotate(x.double().numpy(), oracle.rotation(n, signs.double().numpy()))
    np.testing.assert_allclose(xr.double().numpy(), expected, atol=2e-6)


def test_rotated_fake_quantize_spreads_an_outlier() -> None:
    x = gaussians(32, 128)
    x[:, 5] *= 100
    plain = qtrain.fake_quantize(x, "int4", backend="reference")
    rotated = qtrain.fake_quantize(x, "int4", rotation="hadamard128", backend="reference")
    assert relative_error(x, rotated) < 0.02 and relative_error(x, plain) > 0.3


@pytest.mark.parametrize(
    ("format", "rotation"), [("mxfp4", "hadamard32"), ("int8", "hadamard128"), ("int4", "hadamard")]
)
def test_autocast_changes_nothing(format: str, rotation: str) -> None:
    x = gaussians(16, 384)  # 32 * 12: the last one is a product with Paley's matrix
    expected = qtrain.fake_quantize(x, "int4", rotation=rotation)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(qtrain.fake_quantize(x, "int4", rotation=rotation), expected)


def test_any_integer_type_seeds_alike() -> None:
    x = gaussians(16, 64)
    first, *rest = (
        qtrain.fake_quantize(x, "mxfp4", rounding="stochastic", seed=seed)  # pyright: ignore[reportArgumentType]
        for seed in (3, np.int64(3), torch.tensor(3))
    )
    assert all(torch.equal(first, other) for other in rest)


def test_trust_thresholds_are_the_released_ones() -> None:
    fp4 = gradient_mask("trust", get_format("fp4_e2m1"), True)
    assert fp4 is not None and fp4.kind == "error"
    assert fp4.limit * 2.922477 / 6 == pytest.approx(0.31857661, rel=1e-6)  # in RMS: the largest code is at 2.922477
    one_bit = [gradient_mask("trust", get_format("int1"), rotated) for rotated in (True, False)]
    assert one_bit == [Mask("within", 1.30 / 2), Mask("within", 1.25 / 2)]  # codes are -1/2 and 1/2


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize(("name", "scale"), [("mxfp4", "floor_three_quarters"), ("nvfp4", None), ("int8", None)])
def test_operands_are_exact_in_bfloat16(name: str, scale: str | None, dim: int) -> None:
    """A bfloat16 operand and its post-scale hold the same numbers as codes and scales; so does a GEMM of two."""
    quantizer = Quantizer.build(QuantSpec(format=name, scale=scale), "reference")
    x = gaussians(64, 96) * torch.exp2(gaussians(64, 1) * 3)
    exact = quantizer.quantize(x, dim=dim)
    operand = quantizer.operand(x, quantizer.layout((64, 96), dim, float_storage(quantizer.plan, torch.bfloat16)))
    torch.testing.assert_close(operand.dequantize().float(), exact.dequantize(), rtol=2e-7, atol=0)
    left = quantizer.operand(x.T, quantizer.layout((96, 64)))
    right = quantizer.operand(x, quantizer.layout((64, 96), -2))
    expected = left.dequantize().double() @ right.dequantize().double()
    found = multiply(TABLE["float"], left, right, torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(("arguments", "message"), [
    ({"format": "mxfp5"}, "unknown format 'mxfp5'; formats: "),
    ({"format": "mxfp4", "scale": "absmax"}, "does not give mxfp4's e8m0 scales"),
    ({"format": "mxfp4", "rounding": "eden"}, "rounding eden corrects minifloat block scales"),
    ({"format": "mxfp4", "rotation": "hadamard48"}, "power of two; use hadamard32"),
    ({"format": "mxfp4", "rotation": "had32"}, r"rotation='had32': give hadamard<n>, .* or hadamard for the whole dim"),
    ({"format": "MXFP4"}, "did you mean 'mxfp4'"),
    ({"format": "mxfp4", "rounding": "stochastic", "seed": 1.5}, "seed is 1.5; give an integer"),
    ({"format": "mxfp4", "rotation": "hadamard128"}, r"last dim % 128 == 0; x has shape \(4, 96\)"),
])  # fmt: skip
def test_what_does_not_fit_raises(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        qtrain.fake_quantize(torch.ones(4, 96), **arguments)


def test_integer_tensors_and_scalars_raise() -> None:
    with pytest.raises(UserError, match=r"float tensor; got torch.int64"):
        qtrain.fake_quantize(torch.ones(32, dtype=torch.int64), "mxfp4")
    with pytest.raises(UserError, match="last dim"):
        qtrain.fake_quantize(torch.tensor(1.0), "mxfp4")
    assert qtrain.fake_quantize(torch.ones(0, 32), "mxfp4").shape == (0, 32)
    assert math.isnan(qtrain.fake_quantize(torch.full((32,), float("nan")), "mxfp4", backend="reference")[0])


def test_sawb_of_nearly_equal_magnitudes_takes_the_largest() -> None:
    """Its fit to bell-shaped data, 12.68 RMS - 12.80 E|x|, is negative there."""
    x = torch.where(gaussians(8, 64) > 0, 1.0, -1.0)
    for format in ("int4_sym", "int4_sym/tensor/float32"):
        torch.testing.assert_close(qtrain.fake_quantize(x, format, scale="sawb", backend="reference"), x)


@pytest.mark.parametrize("backend", ["reference", "compiled"])
def test_zero_points_by_hand(backend: Backend) -> None:
    """Of blocks whose values are whole multiples of a step, above zero, below zero, around it, and none; the backends
    alike. A NaN is kept to its block."""
    steps = torch.tensor(
        [[0.0, 1, 15, 7], [0, -1, -15, -7], [-4, 11, 0, 1], [0, 0, 0, 0], [2, 15, 3, 8], [0, 1, 2, 15]]
    )
    x = (steps * 0.25).repeat(1, 8).view(2, -1)
    x[1, -1] = torch.nan
    side = Quantizer.build(QuantSpec(format="int4_asym/32/float16"), backend)
    q = side.operand(x, side.layout((2, 96), blocks=True))
    assert q.zero_point is not None and q.zero_point.tolist() == [[0, 15, 4], [0, 0, 0]]
    assert torch.equal(q.dequantize()[:, :64], x[:, :64]) and torch.equal(q.dequantize()[0], x[0])
    assert q.dequantize()[1, 64:].isnan().all()
    packed = side.operand(x, side.layout((2, 96), storage="packed"))
    assert packed.zero_point.tolist() == [[0xF0, 4], [0, 0]]  # two in a byte, the first low
    assert torch.equal(packed.dequantize().nan_to_num(5.0), q.dequantize().nan_to_num(5.0))


@pytest.mark.parametrize(("place", "settings", "message"), [
    ("x", {}, r"fprop\.x: int4_asym/32/float16 has zero points, which weights alone have; name a symmetric format"),
    ("w", {"rounding": "stochastic"}, "take rounding nearest, estimator ste and no sparsity; got stochastic, ste and"),
    ("w", {"estimator": "clip"}, "got nearest, clip and none"),
    ("w", {"sparsity": "2:4"}, "got nearest, ste and 2:4"),
    ("w", {"scale": "absmax"}, "scale 'absmax' needs codes without a zero point; for .* use minmax"),
])  # fmt: skip
def test_what_zero_points_do_not_go_with_is_named(place: str, settings: dict[str, Any], message: str) -> None:
    none: dict[str, Any] = {"format": "none"}
    fprop = {"x": none, "w": none} | {place: {"format": "int4_asym/32/float16", **settings}}
    tree = {"name": "own", "fprop": fprop, "dgrad": {"dy": none, "w": none}, "wgrad": {"dy": none, "x": none}}
    with pytest.raises(UserError, match=message):
        read_recipe(tree)


def test_triton_has_no_zero_points_and_says_so() -> None:
    plan = Quantizer.build(QuantSpec(format="int4_asym/32/float16")).plan
    assert gpu.missing_kernel(plan, None) == "backend 'triton' knows no codes with a zero point"
    assert dispatch._lacks_kernel("triton", plan, None, 1) and not dispatch._lacks_kernel("compiled", plan, None, 1)
