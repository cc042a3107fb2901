"""Float32 products stay float32 where torch may take fewer bits, and bfloat16 products are float32 ones, rounded once,
where the processor has no units for them. What a product saw is read while it runs; on the processors that have no
short float32 product its value would not tell."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import qtrain
from qtrain.models.decoder import Decoder
from qtrain.models.families.llama import Llama
from qtrain.quant import set_high_precision
from qtrain.training.losses import next_token_loss
from qtrain_kernels import precision
from qtrain_kernels.precision import Linear, causal_attention, matmul

SETTINGS = torch.backends.mkldnn.matmul


@pytest.fixture(autouse=True)
def medium() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@contextmanager
def watched(note: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Shows the left side of each `left @ right`; within qtrain's operators too, where a dispatch mode sees nothing."""
    product = torch.Tensor.__matmul__

    def noting(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        note(left)
        return product(left, right)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "__matmul__", noting)
        yield


@contextmanager
def watched_settings() -> Iterator[set[tuple[torch.dtype, str]]]:
    """What each matrix product was allowed to do, by dtype."""
    found: set[tuple[torch.dtype, str]] = set()
    with watched(lambda left: found.add((left.dtype, SETTINGS.fp32_precision))):
        yield found


def test_the_setting_is_there_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "BFLOAT16_UNITS_ON_CPU", True)
    x = torch.randn(8, 8)
    assert SETTINGS.fp32_precision == "bf16"
    with watched_settings() as plain:
        _ = x @ x
    with watched_settings() as ours:
        matmul(x, x)
        matmul(x.bfloat16(), x.bfloat16())
    assert plain == {(torch.float32, "bf16")}
    assert ours == {(torch.float32, "ieee"), (torch.bfloat16, "bf16")}
    assert SETTINGS.fp32_precision == "bf16"
    with pytest.raises(RuntimeError):
        matmul(x, torch.ones(3, 3))
    assert SETTINGS.fp32_precision == "bf16"


def test_a_product_that_ends_leaves_another_threads_in_float32() -> None:
    """The second of two products begins while the first runs, and ends after it."""
    x, first_runs, first_may_end = torch.randn(8, 8), threading.Event(), threading.Event()

    def first() -> None:
        with precision._ieee(x):
            first_runs.set()
            first_may_end.wait(60)

    thread = threading.Thread(target=first)
    thread.start()
    assert first_runs.wait(60)
    with precision._ieee(x):
        first_may_end.set()
        thread.join(60)
        assert SETTINGS.fp32_precision == "ieee"
    assert SETTINGS.fp32_precision == "bf16"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_changes_no_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(8, 8).to(dtype)
    with torch.autocast("cpu", torch.float16):
        assert (x @ x).dtype == torch.float16
        assert matmul(x, x).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rotations_and_float32_operands_are_exact(dtype: torch.dtype) -> None:
    """Forward and backward of a layer that is rotated over all of 48 = 4 * 12 features, in bfloat16 and in float32."""
    layer = torch.nn.Sequential(torch.nn.Linear(48, 64))
    qtrain.convert(layer, "halo_1", backend="reference")
    qtrain.set_step(layer, 0)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16), watched_settings() as allowed:
        layer(torch.randn(64, 48)).sum().backward()
    assert (torch.float32, "ieee") in allowed
    assert (torch.float32, "bf16") not in allowed


# ----------------------------------------------------------------------------------- bfloat16 without units for it


@pytest.fixture
def no_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "BFLOAT16_UNITS_ON_CPU", False)


def refuse_bfloat16(left: torch.Tensor) -> None:
    """For `watched`: as RefuseBfloat16, of what qtrain's operators do inside."""
    assert left.dtype != torch.bfloat16, "matmul multiplies in bfloat16"


class RefuseBfloat16(TorchDispatchMode):
    """Raises where torch would multiply matrices of bfloat16 by itself: slowly, on a processor without the units."""

    PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "mv", "linear", "scaled_dot_product", "_scaled_mm", "convolution")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        in_bfloat16 = any(isinstance(arg, torch.Tensor) and arg.dtype == torch.bfloat16 for arg in args)
        if in_bfloat16 and (name.startswith(self.PRODUCTS) or "_dot_product_" in name):
            raise AssertionError(f"{name} multiplies in bfloat16")
        return func(*args, **(kwargs or {}))


def integers(*shape: int, seed: int) -> torch.Tensor:
    """Whose products and sums are exact in float32, and mostly are none of bfloat16's numbers."""
    return torch.randint(-99, 100, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.usefixtures("no_units")
def test_a_bfloat16_product_is_the_exact_one_rounded_once() -> None:
    left, right = integers(33, 65, seed=0), integers(65, 17, seed=1)
    exact = left.double() @ right.double()
    with RefuseBfloat16(), watched(refuse_bfloat16):
        found = matmul(left.bfloat16(), right.bfloat16())
    assert torch.equal(found, exact.bfloat16())
    assert not torch.equal(found.double(), exact)


@pytest.mark.usefixtures("no_units")
@pytest.mark.parametrize("autocast", [True, False])
def test_a_layer_rounds_its_operands_its_output_and_its_gradients_once_each(autocast: bool) -> None:
    """Under autocast, x and the weight are in float32 and rounded first; without, all is in bfloat16."""
    dtype = torch.float32 if autocast else torch.bfloat16
    x = (integers(3, 11, 24, seed=0) + 0.3).to(dtype).requires_grad_()
    layer = Linear(24, 40, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(integers(40, 24, seed=1) + 0.3)
        layer.bias.copy_(integers(40, seed=2) + 0.3)
    grad = integers(3, 11, 40, seed=3).bfloat16()
    with RefuseBfloat16(), watched(refuse_bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x)
        y.backward(grad)
    rounded = [each.detach().bfloat16().double() for each in (x, layer.weight, layer.bias)]
    expected = rounded[0] @ rounded[1].T + rounded[2]
    rows, lines = grad.double().flatten(0, 1), rounded[0].flatten(0, 1)
    wanted = {
        "y": (y, expected),
        "x": (x.grad, grad.double() @ rounded[1]),
        "weight": (layer.weight.grad, rows.T @ lines),
        "bias": (layer.bias.grad, rows.sum(0)),
    }
    assert y.dtype == torch.bfloat16
    for name, (found, exact) in wanted.items():
        assert found is not None and found.dtype == (torch.bfloat16 if name == "y" else dtype), name
        assert torch.equal(found.double(), exact.bfloat16().double()), name


@pytest.mark.usefixtures("no_units")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_rounds_its_operands_its_output_and_its_gradients(kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 19, 8), (2, kv_heads, 19, 8), (2, kv_heads, 19, 8)
    q, k, v = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    grad = torch.randn(2, 4, 19, 8, generator=generator).bfloat16()
    with RefuseBfloat16(), watched(refuse_bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            y = causal_attention(q, k, v)
        y.backward(grad)
    exact = [each.detach().bfloat16().double().requires_grad_() for each in (q, k, v)]
    scores = exact[0] @ exact[1].repeat_interleave(4 // kv_heads, 1).transpose(-1, -2) / 8**0.5
    masked = scores.masked_fill(torch.ones(19, 19).triu(1).bool(), -torch.inf)
    expected = masked.softmax(-1) @ exact[2].repeat_interleave(4 // kv_heads, 1)
    expected.backward(grad.double())
    assert y.dtype == torch.bfloat16
    for found, wanted in [(y, expected), *((a.grad, b.grad) for a, b in zip((q, k, v), exact, strict=True))]:
        # within half a unit of bfloat16's last place, and float32's own error before the rounding
        assert found is not None and wanted is not None
        assert torch.equal(found.bfloat16().float(), found.float())
        assert ((found.double() - wanted).abs() <= wanted.abs() * 2**-8 + 1e-5).all()


def small_llama() -> Decoder:
    torch.manual_seed(0)
    sizes = {"name": "tiny", "dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 128, "seq_len": 32}
    return Decoder(Llama.model_validate(sizes), 61)


@pytest.mark.usefixtures("no_units")
@pytest.mark.parametrize("recipe", ["bf16", "quartet", "quest", "nvidia_nvfp4", "halo_2", "late"])
def test_a_training_step_multiplies_no_bfloat16(recipe: str) -> None:
    model = small_llama()
    qtrain.convert(model, "quartet" if recipe == "late" else recipe)
    qtrain.set_step(model, 0)
    set_high_precision(model, recipe == "late")
    with RefuseBfloat16(), watched(refuse_bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            loss = next_token_loss(model, torch.randint(61, (2, 33)))
        loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_where_there_are_units_torch_multiplies_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "BFLOAT16_UNITS_ON_CPU", True)
    model, tokens = small_llama(), torch.randint(61, (1, 9))
    refused = pytest.raises(AssertionError, match="mm multiplies in bfloat16")
    with torch.autocast("cpu", torch.bfloat16), refused, RefuseBfloat16(), watched(refuse_bfloat16):
        model(tokens)


@pytest.mark.usefixtures("no_units")
def test_a_compiled_model_keeps_to_it() -> None:
    """Its products are the same ones; the graph's norms add up in another order in the backward, which may move what is
    rounded to bfloat16 afterwards to its neighbour."""
    model, compiled, tokens = small_llama(), small_llama(), torch.randint(61, (2, 33))
    compiled.compile(fullgraph=True, backend="aot_eager")
    logits, gradients = [], []
    for each in (model, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            logits.append(each(tokens[:, :-1]))
            loss = next_token_loss(each, tokens)
        gradients.append(torch.autograd.grad(loss, list(each.parameters())))
    assert torch.equal(*logits)
    for eager, other in zip(*gradients, strict=True):
        assert (eager - other).abs().max() < 2**-7 * eager.abs().max()
        assert (eager - other).norm() < 3e-3 * eager.norm()


def test_few_rows_of_a_bfloat16_weight_are_traced_and_mapped_as_any_other() -> None:
    """Their own kernel reads memory, which a graph that is recorded and a mapped tensor do not have."""
    layer, x = precision.Linear(64, 48, dtype=torch.bfloat16).requires_grad_(False), torch.randn(3, 64).bfloat16()
    wanted = (x.double() @ layer.weight.double().T + layer.bias.double()).bfloat16()
    exported = torch.export.export(layer, (x,)).module()
    for found in (exported(x), torch.func.vmap(layer)(x), layer(x)):
        torch.testing.assert_close(found, wanted, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
    ("setting", "onednn", "expected"),
    [(None, True, True), (None, False, False), ("avx2", True, False), ("default", True, False), ("avx512", True, True)],
)
def test_the_units_are_what_onednn_finds_and_the_environment_allows(
    monkeypatch: pytest.MonkeyPatch, setting: str | None, onednn: bool, expected: bool
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    if setting:
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", setting)
    assert precision._cpu_has_bfloat16_units() is expected


def test_a_large_machine_can_be_told_to_be_a_laptop() -> None:
    words = "from qtrain_kernels.precision import BFLOAT16_UNITS_ON_CPU as units; print(units)"
    for setting in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        environment = os.environ | {setting: "AVX2" if setting.startswith("ONEDNN") else "avx2"}
        done = subprocess.run(
            [sys.executable, "-c", words], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout == "False\n", setting
