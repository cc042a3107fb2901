"""A quantised layer: randomness, replay, compile, edges. test_recipes.py holds what each recipe computes.

# T tokens, K in features, N out features
"""

import copy
import io
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from oracles import quantization as oracle
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import qtrain
from qtrain.config.recipe import LinearRecipe, QuantSpec, read_recipe
from qtrain.errors import UserError
from qtrain.quant import QuantLinear, rotation, sees_tokens_apart, set_high_precision
from qtrain.quant.functional import Call
from qtrain.quant.packed import PackedLinear, layout_of
from qtrain.quant.quantizer import Quantizer
from qtrain.quant.random import USES, key_words
from qtrain_kernels import qtensor
from qtrain_kernels.plans import Rotation
from qtrain_kernels.qtensor import QTensor, Side

T, K, N = 96, 256, 128


def layer(recipe: object, backend: str = "reference", bias: bool = False, step: int | None = 1) -> QuantLinear:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N, bias=bias))
    qtrain.convert(model, recipe, backend=backend)  # pyright: ignore[reportArgumentType]
    if step is not None:
        qtrain.set_step(model, step)
    assert isinstance(model[0], QuantLinear)
    return model[0]


def layer_of(recipe: object, weight: Tensor) -> QuantLinear:
    module = layer(recipe)
    module.weight = nn.Parameter(weight.detach().clone())
    return module


def batch(tokens: int = T) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, K, generator=generator) * torch.exp2(torch.randn(tokens, 1, generator=generator))
    return x, torch.randn(tokens, N, generator=generator) * 1e-3


def run(module: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Y, dX, dW."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(dy.to(y.dtype))
    weight = module.get_parameter("weight")
    assert x.grad is not None and weight.grad is not None
    return y.detach(), x.grad, weight.grad


def sqnr(found: Tensor, expected: np.ndarray) -> float:
    error = found.double().numpy() - expected
    return float(10 * np.log10((expected**2).sum() / max((error**2).sum(), 1e-300)))


def numpy(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.detach().double().numpy() for tensor in tensors]


def test_quartet_v1_is_unbiased_about_the_forward_operands() -> None:
    """Stochastic rounding: the mean gradient over steps is that of exact GEMMs of the quantised forward operands."""
    module = layer("quartet_v1")
    x, dy = batch()
    x64, w64, dy64 = numpy(x, module.weight, dy)
    fixed = oracle.rotation(32)
    (xq, x_mask), (wq, w_mask) = (oracle.quartet_forward(oracle.rotate(value, fixed)) for value in (x64, w64))
    expected = (
        oracle.rotate((dy64 @ wq) * x_mask, fixed.T),
        oracle.rotate((dy64.T @ xq) * w_mask, fixed.T),
    )
    steps = 128
    totals: list[Tensor] = [torch.zeros(T, K), torch.zeros(N, K)]
    for step in range(steps):
        module.set_step(step, 0)
        grads = run(module, x, dy)[1:]
        for total, grad, want in zip(totals, grads, expected, strict=True):
            total += grad / steps
            assert 8 < sqnr(grad, want) < 16  # one draw is noisy
    for total, want in zip(totals, expected, strict=True):
        assert sqnr(total, want) > 8 + 10 * np.log10(steps) - 1  # the noise, and only noise, averages out


def test_a_masked_master_operand_leaves_and_enters_the_rotation() -> None:
    """dgrad from the master weight: dX = ((dY W) H * mask) H^-1."""
    spec = {"format": "mxfp4", "scale": "std", "rotation": "hadamard32", "estimator": "clip"}
    none = {"format": "none"}
    recipe = {
        "name": "own",
        "fprop": {"x": spec, "w": spec},
        "dgrad": {"dy": none, "w": none},
        "wgrad": {"dy": none, "x": none},
    }
    module = layer(recipe)
    x, dy = batch()
    x64, w64, dy64 = numpy(x, module.weight, dy)
    fixed = oracle.rotation(32)
    mask = oracle.quartet_forward(oracle.rotate(x64, fixed))[1]
    assert sqnr(run(module, x, dy)[1], oracle.rotate(oracle.rotate(dy64 @ w64, fixed) * mask, fixed.T)) > 60


@pytest.mark.parametrize("recipe", ["quartet", "quartet_v1", {"name": "quest", "format": "int1.585"}])
def test_backends_agree_bit_for_bit_in_bfloat16(recipe: object) -> None:
    x, dy = batch(50)  # wgrad pads its tokens
    results = []
    for backend in ("reference", "compiled"):
        module = layer(recipe, backend)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(run(module, x.view(5, 10, K), dy.view(5, 10, N)))
    for found, want in zip(*results, strict=True):
        assert torch.equal(found, want)
    y, dx, dw = results[0]
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert y.shape == (5, 10, N) and y.isfinite().all() and dw.isfinite().all()


def test_steps_key_the_draws() -> None:
    x, dy = batch()
    module = layer("quartet_v1", step=3)
    first = run(module, x, dy)
    module.set_step(4, 0)
    later = run(module, x, dy)
    module.set_step(3, 1)
    other = run(module, x, dy)
    module.set_step(3, 0)
    again = run(module, x, dy)
    assert torch.equal(first[0], later[0])  # this recipe's forward draws nothing
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], later[1]) and not torch.equal(first[1], other[1])


@pytest.mark.parametrize("redraw", ["step", "micro_batch"])
def test_every_draw_takes_the_key_of_its_own_use(redraw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = read_recipe("quartet").model_dump() | {"redraw": redraw}
    for gemm in ("fprop", "dgrad", "wgrad"):
        tree[gemm] = {side: spec | {"rounding": "stochastic", "signs": "step"} for side, spec in tree[gemm].items()}
    module = layer(tree)
    module.set_step(5, 2)
    found: list[tuple[str, tuple[int, ...]]] = []
    asked: list[str] = []
    operand, rotation, one = Call.operand, Call.rotation, qtensor.quantize_side

    def note(use: str, key: Tensor | None) -> None:
        found.extend([] if key is None else [(use, tuple(key.tolist()))])

    def operand_seen(self: Call, use: str, *more: Any, **rest: Any) -> tuple[QTensor, QTensor | None]:
        asked.append(use)
        return operand(self, use, *more, **rest)

    def one_seen(x: Tensor, side: Side, backend: str) -> tuple[QTensor, QTensor | None]:
        note(asked[-1], side.key)
        return one(x, side, backend)

    def both_seen(x: Tensor, rows: Side, columns: Side, backend: str) -> list[QTensor]:
        note("dgrad.dy", rows.key)
        note("wgrad.dy", columns.key)
        return [one(x, side, backend)[0] for side in (rows, columns)]

    def rotation_seen(self: Call, name: str, size: int) -> Rotation | None:
        turn = rotation(self, name, size)
        note(f"{name}.signs", turn and turn.signs)
        return turn

    monkeypatch.setattr(Call, "operand", operand_seen)
    monkeypatch.setattr(Call, "rotation", rotation_seen)
    monkeypatch.setattr(qtensor, "quantize_side", one_seen)
    monkeypatch.setattr(qtensor, "quantize_both", both_seen)
    run(module, *batch())
    per_step = {"fprop.w", "dgrad.w", "fprop.signs", "dgrad.signs"} if redraw == "step" else ()
    expected = [(use, tuple(key_words(0, "0", use, "step", 5, 0 if use in per_step else 2))) for use in USES]
    assert sorted(set(found)) == sorted(expected)


def test_any_integer_type_keys_alike() -> None:
    module = layer("quartet_v1")
    for step, micro_batch in ((3, 1), (np.int64(3), np.int32(1)), (torch.tensor(3), torch.tensor(1))):
        module.set_step(step, micro_batch)  # pyright: ignore[reportArgumentType]
        assert module.keys[0].tolist() == key_words(0, "0", "fprop.x", "step", 3, 1)
    with pytest.raises(TypeError, match="float"):
        module.set_step(3.0, 1)  # pyright: ignore[reportArgumentType]


def test_layers_and_seeds_draw_apart() -> None:
    keys = {}
    for seed in (0, 1):
        model = nn.ModuleDict({name: nn.Linear(32, 32) for name in ("a", "b")})
        qtrain.convert(model, "quartet_v1", seed=seed, backend="reference")
        qtrain.set_step(model, 7, 2)
        keys |= {
            (seed, name, use): tuple(row.tolist())
            for name in model
            for use, row in zip(USES, model[name].keys, strict=True)
        }
    assert len(set(keys.values())) == 2 * 2 * len(USES)
    assert keys[0, "a", "dgrad.dy"] == (1076942302, 1157733408)  # pinned: resumed runs depend on it


def test_fixed_signs_do_not_see_the_step() -> None:
    tree = read_recipe("quartet").model_dump()
    for operand in (*tree["dgrad"].values(), *tree["wgrad"].values()):
        operand["signs"] = "fixed"
    module = layer(tree, step=None)
    assert not module.numerics.stochastic
    x, dy = batch()
    first = run(module, x, dy)
    module.set_step(9, 9)
    assert all(torch.equal(a, b) for a, b in zip(first, run(module, x, dy), strict=True))


def test_training_without_a_step_raises_and_evaluation_does_not() -> None:
    module = layer("quartet", step=None)
    with pytest.raises(UserError, match=r"0: its recipe draws random bits.*qtrain\.set_step\(model, step"):
        module(batch()[0])
    assert module.eval()(batch()[0]).isfinite().all()
    assert layer("quest", step=None)(batch()[0]).isfinite().all()


def test_a_recomputed_forward_draws_the_same_bits() -> None:
    tree = read_recipe("quartet_v1").model_dump()
    for operand in tree["fprop"].values():
        operand |= {"rounding": "stochastic", "signs": "step"}
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    qtrain.convert(model, tree, backend="reference")
    qtrain.set_step(model, 5)
    grads = []
    for recompute in (False, True):
        x = torch.randn(40, 64, generator=torch.Generator().manual_seed(2)).requires_grad_()
        model.zero_grad()
        y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        assert isinstance(y, Tensor)
        y.square().sum().backward()
        grads.append([x.grad, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_backward_uses_the_keys_of_its_own_forward() -> None:
    x, dy = batch()
    module = layer("quartet_v1", step=3)
    expected = run(module, x, dy)[1]
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    module.set_step(4, 0)
    y.backward(dy)
    assert leaf.grad is not None and torch.equal(leaf.grad, expected)


def test_zero_and_empty_and_bad_inputs() -> None:
    for recipe in ("quartet", "quest"):
        module = layer(recipe)
        y, dx, dw = run(module, torch.zeros(T, K), batch()[1])
        assert (y == 0).all() and (dw == 0).all() and dx.isfinite().all() and (dx != 0).any()
        y, dx, dw = run(module, torch.zeros(0, K), torch.zeros(0, N))
        assert y.shape == (0, N) and dx.shape == (0, K) and (dw == 0).all()
        x, dy = batch()
        x[3, 7] = float("nan")
        y = run(module, x, dy)[0]
        assert y[3].isnan().all() and y[[0, 1, 2, 4]].isfinite().all()
        with pytest.raises(UserError, match=r"compute dtype is torch\.float16"), torch.autocast("cpu", torch.float16):
            module(x)
        for wrong in (x.T, torch.zeros(0, K + 1), torch.tensor(1.0)):  # the first has a multiple of K elements
            with pytest.raises(UserError, match=rf"0: expected .* last dim {K}, found shape \("):
                module(wrong)


@pytest.mark.parametrize("backend", ["reference", "compiled"])
def test_training_works_after_a_first_forward_in_inference_mode(backend: str) -> None:
    x, dy = batch()
    expected = run(layer("quartet", backend), x, dy)
    rotation.base.cache_clear()
    with torch.inference_mode():
        module = layer("quartet", backend)
        module.eval()(x)
        qtrain.fake_quantize(x[:, :48], "int4", rotation="hadamard", backend="reference")
    plain = nn.Linear(K, N, bias=False)  # whose weight was not made in inference mode
    module.weight = plain.weight
    with torch.no_grad():
        plain.weight.copy_(layer("quartet").weight)
    module.train()
    for found, want in zip(run(module, x, dy), expected, strict=True):
        assert torch.equal(found, want)
    base = rotation.base(12, x.device)
    assert base is not None and not base.is_inference()


def test_what_is_cached_is_a_real_tensor_whoever_asks_first() -> None:
    for mode in (FakeTensorMode(), torch.device("meta"), torch.inference_mode()):
        rotation.base.cache_clear()
        with mode:
            rotation.base(12, torch.device("cpu"))
        matrix = rotation.base(12, torch.device("cpu"))
        assert matrix is not None and (matrix @ matrix.T).tolist() == (12 * torch.eye(12)).tolist()
        assert not matrix.is_inference()


def test_bias_keeps_the_autocast_dtype() -> None:
    module = layer("quartet", bias=True)
    assert module.bias is not None and module.bias.dtype == torch.float32
    x, _ = batch()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        bare = layer("quartet")(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, bare + module.bias.bfloat16())


def test_a_compiled_model_keeps_the_quantisers_bits() -> None:
    model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.ReLU(), nn.Linear(96, 64, bias=False))
    qtrain.convert(model, "quartet", backend="reference")
    whole = torch.compile(model, dynamic=False)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    for step in (1, 2, 3):
        qtrain.set_step(model, step)
        results = []
        for callable_ in (model, whole):
            model.zero_grad()
            y = callable_(x)
            y.square().sum().backward()
            results.append([y, *(parameter.grad for parameter in model.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        if step == 1:
            first = graphs
    assert graphs == first  # a step compiles nothing


def test_state_dict_copies_and_print() -> None:
    module = layer("quartet", bias=True)
    assert list(module.state_dict()) == ["weight", "bias"] and list(module.buffers()) == []
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    emptied = copy.deepcopy(module).to("meta").to_empty(device="cpu")
    emptied.load_state_dict(module.state_dict())
    x, dy = batch()
    for twin in (copy.deepcopy(module), torch.load(saved, weights_only=False), emptied):
        for found, want in zip(run(twin, x, dy), run(module, x, dy), strict=True):
            assert torch.equal(found, want)
    assert repr(module) == (
        "QuantLinear(in_features=256, out_features=128, bias=True, "
        "fprop mxfp4 x mxfp4, dgrad mxfp4 x mxfp4, wgrad mxfp4 x mxfp4 | reference on cpu, gemms float float float)"
    )
    gradient = "mxfp4/floor_three_quarters/nearest/had32±step"
    assert str(module.numerics) == (
        "fwd x:mxfp4/std/nearest/had32/clip w:mxfp4/std/nearest/had32/clip "
        f"dgrad dy:{gradient} w:{gradient}/forward wgrad dy:{gradient} x:{gradient}/forward"
    )
    assert isinstance(read_recipe("quest"), LinearRecipe)


# ------------------------------------------------------------------------------------------- once per optimiser step


STOCHASTIC = {side: {"format": "mxfp4", "rounding": "stochastic"} for side in ("x", "w")}


def weight_quantisations(monkeypatch: pytest.MonkeyPatch, module: QuantLinear) -> list[str]:
    """Filled with the name of each weight operand that is quantised from here on."""
    seen: list[str] = []
    operand = Call.operand

    def counted(self: Call, use: str, *args: Any, **more: Any) -> tuple[QTensor, QTensor | None]:
        seen.extend([use] if use in ("fprop.w", "dgrad.w") else [])
        return operand(self, use, *args, **more)

    monkeypatch.setattr(Call, "operand", counted)
    return seen


def accumulate(module: QuantLinear, x: Tensor, dy: Tensor) -> Tensor:
    """Y; gradients add to those that are there."""
    y = module(x)
    y.backward(dy)
    return y.detach()


def test_a_layer_without_memory_says_shapes_and_dtypes() -> None:
    """As nn.Linear does, of forward and backward."""
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(64, 96)), torch.empty(2, 32, 64, requires_grad=True)
    qtrain.convert(model, "quartet")
    qtrain.set_step(model, 0)
    y = model(x)
    y.sum().backward()
    assert (y.shape, y.dtype, y.device.type) == ((2, 32, 96), torch.float32, "meta")
    assert x.grad is not None and x.grad.shape == x.shape and model[0].weight.grad.shape == (96, 64)


def test_a_kept_weight_is_quantised_once_a_step_and_again_when_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = layer("tetrajet_v2_baseline", step=0)
    x, dy = batch()
    x.requires_grad_()
    seen = weight_quantisations(monkeypatch, module)

    def times() -> int:
        return seen.count("fprop.w")

    with qtrain.keep_weights(module):
        for micro_batch in range(3):
            module.set_step(0, micro_batch)
            first = accumulate(module, x, dy)
        assert times() == 1
        with torch.no_grad():
            module.weight.mul_(1.5)  # within the step, seen by its version
        assert not torch.equal(accumulate(module, x, dy), first) and times() > 1
        module.weight.data.mul_(2.0)  # moves no version: the next step sees it
        module.set_step(1, 0)
        before = times()
        second = accumulate(module, x, dy)
        assert not torch.equal(second, first) and times() == before
        module.weight = nn.Parameter(2 * module.weight.detach())
        assert not torch.equal(accumulate(module, x, dy), second)
        module.set_step(1, 1)
        before = times()
        module.eval()(x)
        assert times() == before + 1  # evaluation takes nothing that is kept
    assert module.kept == []
    assert times() == before + 1 and module.train()(x) is not None and times() == before + 2


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("keys", ["never set again", "always of rank 1", "counted as micro-batches"])
@pytest.mark.parametrize("keep", [False, True])
def test_a_step_that_does_not_advance_does_not_freeze_the_weight(
    fused: bool, set_to_none: bool, keys: str, keep: bool
) -> None:
    """A fused optimiser moves no version of the weight, and gradients of zeros look like accumulated ones."""
    module = layer("quest", step=0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, fused=fused)
    x, _ = batch()
    losses = []
    with qtrain.keep_weights(module) if keep else nullcontext():
        module.set_step(0, 0)
        for count in range(5):
            if keys != "never set again":
                module.set_step(0, 1 if keys == "always of rank 1" else count)
            optimizer.zero_grad(set_to_none)
            loss = module(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]


def test_what_changes_a_weight_between_two_forwards_of_one_micro_batch_is_seen() -> None:
    """Writes to weight.data, averaged weights swapped in and out, a replaced storage: none of them moves a version."""
    module = layer("quest", step=0)
    x, dy = batch()
    first = accumulate(module, x, dy)
    average = module.weight.detach() * 2

    def swap() -> None:
        module.weight.data = average

    for change in (lambda: module.weight.data.mul_(2), lambda: module.weight.data.div_(2), swap):
        change()
        y = accumulate(module, x, dy)
        assert torch.equal(y, first) or torch.equal(y, 2 * first)
        assert torch.equal(y, layer_of("quest", module.weight)(x))


def test_a_compiled_optimiser_is_noticed() -> None:
    module = layer("quest", step=0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, fused=True)
    step = torch.compile(optimizer.step, backend="eager")
    x, dy = batch()
    outputs = []
    with qtrain.keep_weights(module):
        module.set_step(0, 0)
        for _ in range(3):
            outputs.append(accumulate(module, x, dy))
            step()
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize("recipe", ["quest", "tetrajet_v2_baseline"])
def test_recomputed_forwards_and_shared_layers_accumulate_what_plain_ones_do(recipe: str) -> None:
    """Over micro-batches and steps of a fused optimiser, with gradients set to zero or to None."""

    def trained(recompute: bool, set_to_none: bool, keep: bool = True) -> Tensor:
        torch.manual_seed(0)
        shared = nn.Linear(128, 128, bias=False)
        model = nn.Sequential(shared, nn.ReLU(), shared)
        qtrain.convert(model, recipe, backend="reference")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        for step in range(3):
            with qtrain.keep_weights(model) if keep else nullcontext():
                for micro_batch in range(2):
                    qtrain.set_step(model, step, micro_batch)
                    x = torch.randn(32, 128, generator=torch.Generator().manual_seed(2 * step + micro_batch))
                    y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
                    assert isinstance(y, Tensor)
                    y.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none)
        return shared.weight.detach()

    expected = trained(False, True, keep=False)
    for how in ((False, True), (False, False), (True, False), (True, True), (True, True, False)):
        assert torch.equal(trained(*how), expected)


def test_without_a_step_the_weight_is_quantised_in_every_forward() -> None:
    """An optimiser may write to weight.data, which moves no version."""
    module = layer("quest", step=None)
    x, dy = batch()
    first = run(module, x, dy)[0]
    module.weight.data.mul_(2.0)
    torch.testing.assert_close(run(module, x, dy)[0], 2 * first)


@pytest.mark.parametrize(("redraw", "expected"), [
    ("micro_batch", set()), ("step", {"fprop.w", "dgrad.w", "fprop.signs", "dgrad.signs"}),
])  # fmt: skip
def test_micro_batches_share_what_belongs_to_the_weight_by_setting_and_nothing_else(
    redraw: str, expected: set[str]
) -> None:
    """With redraw=step, signs and noise of a GEMM with the weight are the step's; the gradient's noise and the signs of
    wgrad are drawn in each micro-batch."""
    module = layer({"name": "tetrajet_v2_baseline", "redraw": redraw})
    rows = []
    for micro_batch in (0, 1):
        module.set_step(4, micro_batch)
        rows.append(dict(zip(USES, module.keys.tolist(), strict=True)))
    shared = {use for use in USES if rows[0][use] == rows[1][use]}
    assert shared == expected


@pytest.mark.parametrize(("recipe", "expected"), [
    ("tetrajet_v2_baseline", 1),  # its forward draws nothing
    ({"name": "tetrajet_v2_baseline", "fprop": STOCHASTIC}, 3),
    ({"name": "tetrajet_v2_baseline", "fprop": STOCHASTIC, "redraw": "step"}, 1),
    ("mxfp8", 1),
])  # fmt: skip
def test_a_kept_weight_is_quantised_in_every_micro_batch_only_if_it_is_drawn(
    recipe: Any, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(recipe, dict):
        recipe = read_recipe(recipe["name"]).model_dump() | recipe
    module = layer(recipe, step=0)
    seen = weight_quantisations(monkeypatch, module)
    with qtrain.keep_weights(module):
        for micro_batch in range(3):
            module.set_step(0, micro_batch)
            module(batch()[0])
    assert seen == ["fprop.w"] * expected


@pytest.mark.parametrize("recipe", ["quartet", "quartet_v1", "quartet_ii", "tetrajet_v2_baseline"])
def test_noise_averages_out_over_the_micro_batches_of_a_step(recipe: str) -> None:
    """Eight equal micro-batches: their mean input gradient has an eighth of the squared error of one, about the mean of
    many draws. With redraw=step the weight's noise stays."""
    draws, count = 128, 8
    x, dy = batch(32)

    def gradients(redraw: str, step: int, micro_batches: int) -> Tensor:
        module = layer({"name": recipe, "redraw": redraw}, backend="compiled")
        found = []
        for micro_batch in range(micro_batches):
            module.set_step(step, micro_batch)
            found.append(run(module, x, dy)[1])
        return torch.stack(found)

    many = gradients("micro_batch", 0, draws)
    exact = many.mean(0)
    one = (many - exact).square().sum((1, 2)).mean()

    def left(redraw: str) -> float:
        means = [gradients(redraw, step, count).mean(0) for step in range(1, 13)]
        return torch.stack([(mean - exact).square().sum() for mean in means]).mean().item() / one.item()

    floor = 1 / count + 1 / draws
    assert 0.8 * floor < left("micro_batch") < 1.3 * floor
    assert left("step") > 2.5 / count


@pytest.mark.parametrize("recipe", ["tetrajet_v2_baseline", {"name": "tetrajet_v2_baseline", "redraw": "step"}])
def test_accumulated_micro_batches_equal_a_recomputed_forward(recipe: object) -> None:
    """A kept weight is the one that a fresh layer quantises for the same step."""
    x, dy = batch()
    kept, fresh = layer(recipe), layer(recipe)
    with qtrain.keep_weights(kept):
        for micro_batch in (0, 1):
            kept.set_step(2, micro_batch)
            found = run(kept, x, dy)
    fresh.set_step(2, 1)
    assert all(torch.equal(a, b) for a, b in zip(found, run(fresh, x, dy), strict=True))


def test_fixed_signs_are_one_vector_for_all_layers() -> None:
    model = nn.ModuleDict({name: nn.Linear(32, 32) for name in ("a", "b")})
    qtrain.convert(model, {"name": "nvidia_nvfp4", "last_blocks": 0}, backend="reference")
    qtrain.set_step(model, 7, 2)
    rows = [dict(zip(USES, model[name].keys.tolist(), strict=True)) for name in model]
    assert rows[0]["wgrad.signs"] == rows[1]["wgrad.signs"] == key_words(0, "signs")
    assert rows[0]["wgrad.dy"] != rows[1]["wgrad.dy"]


def test_tiles_that_a_matrix_does_not_fill_are_padded() -> None:
    """16x16 scales over 40 rows: equal to the same matrix with zero rows below it."""
    spec = QuantSpec(format="e2m1/16x16/e4m3")
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    for dim in (-1, -2):
        matrix = x if dim == -1 else x.T.contiguous()
        filled = torch.zeros(48, 64) if dim == -1 else torch.zeros(64, 48)
        filled[: matrix.shape[0], : matrix.shape[1]] = matrix
        quantizer = Quantizer.build(spec, "reference")
        found = quantizer.quantize(matrix, dim=dim).dequantize()
        expected = quantizer.quantize(filled, dim=dim).dequantize()
        assert torch.equal(found, expected[: matrix.shape[0], : matrix.shape[1]])


def test_high_precision_is_an_ordinary_linear_and_back() -> None:
    module = layer("quartet_ii", bias=True)
    plain = nn.Linear(K, N)
    plain.load_state_dict(module.state_dict())
    x, dy = batch()
    before = run(module, x, dy)
    set_high_precision(module)
    assert "high precision, after fprop nvfp4" in repr(module)
    for found, want in zip(run(module, x, dy), run(plain, x, dy), strict=True):
        assert torch.equal(found, want)
    set_high_precision(module, False)
    assert all(torch.equal(a, b) for a, b in zip(run(module, x, dy), before, strict=True))


@pytest.mark.parametrize(("size", "order"), [(12, 12), (384, 12), (640, 20), (1792, 224)])
def test_a_rotation_is_made_of_the_smallest_matrix_that_will_do(size: int, order: int) -> None:
    """384 is 32 * 12 and also of Paley's own kind, whose matrix takes a product of 384 terms an element."""
    matrix = rotation.base(size, torch.device("cpu"))
    assert matrix is not None and matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order))


def test_rows_that_fill_a_rotation_up_are_gone_before_the_mask() -> None:
    """HALO-2 rotates the rows of dY: 40 tokens are 64 there, and the mask is that of 40."""
    tree = read_recipe("halo_2").model_dump()
    tree["fprop"]["x"] |= {"estimator": "clip", "clip_scale": 0.5}
    module = layer(tree)
    block = module.numerics.dgrad.rows_block
    assert block is not None and module.numerics.fprop.left.masks
    x, dy = batch(block + 8)
    short, long = ([F.pad(each, (0, 0, 0, more)) for each in (x, dy)] for more in (0, block - 8))
    found, wanted = (run(module, *each)[1] for each in (short, long))
    assert torch.equal(found, wanted[: block + 8])
    assert not torch.equal(found, run(layer("halo_2"), *short)[1]), "the mask stops some of it"


@pytest.mark.parametrize("name", qtrain.recipes())
def test_what_sees_tokens_apart_gives_a_token_alone_what_it_gives_it_among_others(name: str) -> None:
    """Among others is one that is a hundred times larger, which moves every scale that it shares."""
    model = nn.Sequential(nn.Linear(256, 256, bias=False))
    qtrain.convert(model, name, skip=(), backend="reference")
    qtrain.set_step(model, 0)
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    x[7] *= 100
    qtrain.calibrate(model, x)
    with torch.no_grad():
        among, alone = model.eval()(x)[:1], model(x[:1])
    is_equal = torch.allclose(among, alone, rtol=1e-5, atol=1e-5)
    assert is_equal or not sees_tokens_apart(model)
    if name in ("quartet", "quest", "mxfp8", "bf16"):
        assert sees_tokens_apart(model)
    if name == "nvidia_nvfp4":
        assert not is_equal


def test_keys_lie_where_the_weight_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of recipes that draw nothing, which no set_step moves; and of what is packed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with FakeTensorMode(allow_non_fake_inputs=True):
        for recipe in ("quest", "ufp4"):
            model = nn.Sequential(nn.Linear(128, 128, bias=False, device="meta"))
            model[0].weight = nn.Parameter(torch.empty(128, 128, device="cuda"))
            qtrain.convert(model, recipe, backend="reference")  # pyright: ignore[reportArgumentType]
            made = model[0]
            assert isinstance(made, QuantLinear)
            assert made.keys.device == made.history[0][1].device == made.weight.device
        numerics, keys = made.numerics, made.keys.cpu()
        held = layout_of(numerics, (128, 128))
        tensors = [torch.empty(shape, dtype=dtype, device="cuda") for shape, dtype in held.shapes()]
        assert PackedLinear(QTensor.of(held, tensors), None, numerics, "0", keys).keys.device.type == "cuda"
