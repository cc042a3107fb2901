"""What trains on a GPU equals what the reference defines: products on 8-bit units, layers, a model's training steps.

On CUDA; and without a GPU on CPU tensors in Triton's interpreter, in a process of its own (as tests/test_triton.py).
tests/test_resume.py stops and resumes a run on a GPU.
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import conftest
import pytest
import torch
from conftest import INTERPRETED
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import qtrain
from qtrain.models.decoder import Decoder
from qtrain.models.families.llama import Llama
from qtrain.quant import PackedLinear
from qtrain.quant.functional import OPERANDS
from qtrain.quant.linear import QuantLinear, quant_linears
from qtrain_kernels.formats import get_format
from qtrain_kernels.gemm import TABLE, check_setting, fp8_matmul, int8_matmul, multiply
from qtrain_kernels.gpu import missing_kernel
from qtrain_kernels.qtensor import Layout, quantize
from qtrain_kernels.reference import Plan

# The interpreter computes by numpy, which warns of what IEEE arithmetic defines.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# T tokens, K in features, N out features. Sizes of products are no multiples of what the units take.
SIZES = ((1, 1, 1), (5, 131, 63), (17, 39, 9), (33, 7, 130), (67, 2501, 41))
T, K, N = 45, 128, 128
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# One of each kind of scale, rounding, mask, rotation and sparsity; in the interpreter all recipes would take minutes.
IN_THE_INTERPRETER = (
    *("quartet", "quartet_v1", "quartet_ii", "nvidia_nvfp4", "quest", "quest_sparse", "lsq", "luq_int4", "trilm"),
    *("halo_2", "mxfp8", "mxfp4_2d", "fp8_rowwise", "fp8_blockwise", "nf4", "w4a16_asym"),
)


def recipes(*interpreted: str, names: Iterable[str] = qtrain.recipes()) -> list[Any]:
    """Parameters: quantising recipes, of which the interpreter takes these."""
    return [
        name if name in interpreted else pytest.param(name, marks=pytest.mark.gpu) for name in names if name != "bf16"
    ]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------------------ products


def test_int8_products_are_exact(device: str) -> None:
    for (m, k, n), offsets in product(SIZES, product((0.0, 0.5), repeat=2)):
        left, right = (
            torch.randint(-128, 128, shape, generator=generator(m + k + n), dtype=torch.int8)
            for shape in ((m, k), (k, n))
        )
        exact = (left.double() + offsets[0]) @ (right.double() + offsets[1])
        for given in (right, right.T.contiguous().T):
            found = int8_matmul(left.to(device), given.to(device), *offsets)
            assert torch.equal(found.cpu(), exact.float()), (m, k, n, offsets)


def needs_fp8(device: str) -> None:
    try:
        check_setting("fp8", device)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("left_dtype", "fast"), [(E4M3, False), (E5M2, False), (E4M3, True)])
def test_fp8_products_are_those_of_float64(left_dtype: torch.dtype, fast: bool, device: str) -> None:
    """Each element to bfloat16's rounding and what is lost in its sum; integers of few bits, unless summed fast, to
    bfloat16's rounding alone. A line's scale that went elsewhere would be off by octaves."""
    needs_fp8(device)
    for m, k, n in SIZES:
        octaves = torch.exp2(torch.randint(-12, 12, (m, 1), generator=generator(k)).float())
        for whole in (True, False):
            left, right = (torch.randn(shape, generator=generator(sum(shape))) for shape in ((m, k), (k, n)))
            if whole:
                left, right = (each.mul_(2).round_().clamp_(-4, 4) for each in (left, right))
            codes = left.to(left_dtype).to(device), right.T.contiguous().to(E4M3).T.to(device)
            scales = octaves.to(device), torch.full((1, n), 0.5, device=device)
            found = fp8_matmul(codes[0], scales[0], codes[1], scales[1], fast)
            assert found.shape == (m, n) and found.dtype == torch.bfloat16
            a, b = (each.cpu().double() * scale.cpu().double() for each, scale in zip(codes, scales, strict=True))
            exact, terms = a @ b, a.abs() @ b.abs()
            if whole and not fast:
                assert torch.equal(found.cpu(), exact.bfloat16()), (m, k, n)
            lost = 2.0**-8 * exact.abs() + (2.0**-10 if fast else 2.0**-20) * terms
            assert ((found.cpu().double() - exact).abs() <= lost).all(), (m, k, n)


@pytest.mark.gpu
@pytest.mark.parametrize("row", [name for name in TABLE if name not in ("int8", "float")])
@pytest.mark.parametrize(
    ("left", "right"),
    [
        *((name, name) for name in ("mxfp4", "nvfp4", "mxfp8_e4m3", "fp8_e4m3")),
        ("mxfp8_e4m3", "mxfp4"),
        ("e4m3/128/float32", "e4m3/128x128/float32"),
    ],
)
def test_products_of_the_table_are_those_of_float64(left: str, right: str, row: str) -> None:
    """To bfloat16's rounding and what is lost in a sum; a scale in another place would be off by octaves."""
    product, sides, sizes = TABLE[row], [], ((33, 256, 16), (130, 384, 72))
    for name, dim in ((left, -1), (right, -2)):
        fmt = get_format(name)
        scale = fmt.scale_element
        plan = Plan(fmt.element, fmt.scale_kind, fmt.block_size, fmt.default_scale, scale_element=scale)
        sides.append(Layout(plan, dim=dim, rows=fmt.rows))
    reason = product.accepts(*sides) or product.needs("cuda", torch.cuda.get_device_capability())
    if reason:
        pytest.skip(reason)
    for m, k, n in sizes:
        operands = []
        for layout, shape in zip(sides, ((m, k), (k, n)), strict=True):
            x = torch.randn(shape, generator=generator(sum(shape))).cuda()
            storage = "float8_128" if layout.size == 128 else "float32"
            operands.append(quantize(x, replace(layout, shape=shape).stored(storage, blocks=True), backend="reference"))
        found = multiply(product, *operands, torch.bfloat16, "reference")
        a, b = (operand.dequantize("reference").cpu().double() for operand in operands)
        lost = 2.0**-8 * (a @ b).abs() + (2.0**-10 if row == "fp8_fast" else 2.0**-18) * (a.abs() @ b.abs())
        assert found.shape == (m, n) and ((found.cpu().double() - a @ b).abs() <= 2 * lost).all(), (m, k, n)


# -------------------------------------------------------------------------------------------------------------- layers


def layer(recipe: str, backend: str, gemm: str, device: str) -> QuantLinear:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N, bias=False))
    qtrain.convert(model, recipe, backend=backend, gemm=gemm)  # pyright: ignore[reportArgumentType]
    qtrain.set_step(model, 3)
    model.to(device)
    assert isinstance(model[0], QuantLinear)
    return model[0]


def pass_through(recipe: str, backend: str, gemm: str, device: str) -> list[Tensor]:
    """Y, dX and the gradient of each parameter, of tokens that fill no block and no tile."""
    module = layer(recipe, backend, gemm, device)
    x = torch.randn(T, K, generator=generator(1)) * torch.exp2(torch.randn(T, 1, generator=generator(2)))
    x = x.to(device).requires_grad_()
    dy = torch.randn(T, N, generator=generator(3)).to(device) * 1e-3
    with torch.autocast(device, torch.bfloat16):
        qtrain.calibrate(module, x)
        y = module(x)
    y.backward(dy.to(y.dtype))
    found = [y.detach(), x.grad, *(parameter.grad for parameter in module.parameters())]
    assert all(isinstance(each, Tensor) and each.isfinite().all() and each.any() for each in found)
    return found  # pyright: ignore[reportReturnType]


def all_have_kernels(module: QuantLinear) -> bool:
    """Whether Triton quantises every operand of the layer."""
    quantisers = [each for each in module.numerics.operands.values() if each.plan is not None]
    return all(missing_kernel(each.plan, None, each.tile[0]) is None for each in quantisers)


@pytest.mark.parametrize("recipe", recipes(*IN_THE_INTERPRETER))
def test_a_layer_by_triton_equals_the_references(recipe: str, device: str) -> None:
    """Output and gradients, bit for bit, by the products that the device takes."""
    module = layer(recipe, "triton", "auto", device)
    if not all_have_kernels(module):
        with pytest.raises(ValueError, match="backend 'triton' knows no codes"):
            pass_through(recipe, "triton", "auto", device)
        return
    kinds = ["auto"]
    if device == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        fp8 = replace(module.numerics, gemm="fp8")
        kinds += ["fp8"] if any(fp8.product(name, device).name.startswith("fp8") for name in OPERANDS) else []
    for gemm in kinds:
        expected, found = (pass_through(recipe, backend, gemm, device) for backend in ("reference", "triton"))
        names = ("output", "grad_input", "grad_weight", "input_scale", "weight_scale")
        differing = [name for name, a, b in zip(names, expected, found, strict=False) if not torch.equal(a, b)]
        assert not differing, (gemm, differing)


@pytest.mark.parametrize("recipe", recipes())
def test_auto_on_cuda_takes_every_recipe(recipe: str) -> None:
    """Also one that has no Triton kernel for all of its operands; with the reference's bits."""
    expected, found = (pass_through(recipe, backend, "auto", "cuda") for backend in ("reference", "auto"))
    assert all(map(torch.equal, expected, found))


@pytest.mark.parametrize("recipe", ["w4a16", "quest_weight_only", "quest", "quartet"])
def test_a_packed_layer_multiplies_few_rows_in_bits(recipe: str, device: str) -> None:
    """Up to 64: exactly where both sides are integers, to the rounding of sums where the inputs stay as they are. More
    rows, and inputs in minifloats, have the layer's own product, bit for bit."""
    ours, references = (layer(recipe, backend, "auto", device) for backend in ("triton", "reference"))
    packed, dense = PackedLinear.of(ours), PackedLinear.of(references)
    x = torch.randn(65, K, generator=generator(4)).to(device)
    for dtype, rtol in ((torch.float32, 1e-5), (torch.bfloat16, 2.0**-6)):
        for rows in (1, 64, 65):
            found, expected = (each(x[:rows].to(dtype)) for each in (packed, dense))
            if rows < 65 and recipe in ("w4a16", "quest_weight_only"):
                torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)
                assert torch.equal(found[:1], packed(x[:1].to(dtype)))
            else:
                assert torch.equal(found, expected), (dtype, rows)
    assert (packed._ready is None) == (recipe == "quartet") and dense._ready is None


# ------------------------------------------------------------------------------------------------------------ training


def trained(recipe: str, backend: str, device: str) -> tuple[list[float], list[Tensor]]:
    """Losses of two steps of a small Llama, and its weights after them."""
    torch.manual_seed(0)
    width = 128 if device == "cuda" else 32  # in the interpreter a step of 128 takes a minute
    config = Llama(name="small", dim=width, n_layers=1, n_heads=2, ffn_dim=2 * width, seq_len=17)
    model = Decoder(config, vocab_size=97)
    qtrain.convert(model, recipe, backend=backend)  # pyright: ignore[reportArgumentType]
    model.to(device)
    assert all(layer.keys.device == layer.weight.device for layer in quant_linears(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(2):
        qtrain.set_step(model, step)
        tokens = torch.randint(0, 97, (3, 18), generator=generator(step)).to(device)
        # torch's other attention kernels may sum a gradient in any order
        with torch.autocast(device, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            logits = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize(
    "recipe", recipes("quartet_v1", names=("quartet_v1", "quest", "nvidia_nvfp4", "quartet_ii", "halo_1"))
)
def test_training_by_triton_equals_the_references(recipe: str, device: str) -> None:
    """Losses and weights, bit for bit."""
    (expected, weights), (found, ours) = (trained(recipe, backend, device) for backend in ("reference", "triton"))
    assert found == expected and len(set(found)) == 2
    assert all(map(torch.equal, weights, ours))


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    """Every test that needs no GPU passes there; none is skipped."""
    selected = ("-m", "not gpu and not slow", "-k", "not in_the_interpreter")
    passed, shown = conftest.passed_in_the_interpreter(__file__, *selected)
    assert passed > len(IN_THE_INTERPRETER) and "skipped" not in shown, shown


# ---------------------------------------------------------------------------------------------------------- collection


def test_a_missing_package_skips_its_module_where_gpu_tests_are_asked_for(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """And is an error elsewhere, as one of our own modules is in any case."""

    def collect(code: str, markers: str = "gpu") -> None:
        path = tmp_path / f"test_{len(list(tmp_path.iterdir()))}.py"
        path.write_text(code)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(request.config.option, "markexpr", markers)
            module = conftest.pytest_pycollect_makemodule(path, request.session)
        (module or pytest.Module.from_parent(request.session, path=path)).collect()

    with pytest.raises(pytest.skip.Exception, match=r"needs no_such_package, which is not installed"):
        collect("import no_such_package.part\n")
    for code, markers in (
        ("import no_such_package\n", "not slow"),
        ("import qtrain_kernels.graphs\n", "gpu"),
    ):
        with pytest.raises(pytest.Collector.CollectError):
            collect(code, markers)
