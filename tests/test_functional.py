"""The layer's operators under what torch does to a model: compiled, exported, recomputed, offloaded, sharded.

test_linear.py and test_recipes.py hold what they compute.
"""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import qtrain
from qtrain.errors import UserError
from qtrain.quant import Observer, QuantLinear, functional, quant_linears

RECIPES = [name for name in qtrain.recipes() if name != "bf16"]


class Block(nn.Module):
    """A normed SwiGLU."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.gate, self.up = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def model_of(recipe: Any, blocks: int = 1, dim: int = 128, hidden: int = 128, backend: Any = "auto") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(dim, hidden) for _ in range(blocks)))
    qtrain.convert(model, recipe, backend=backend)
    qtrain.set_step(model, 0)
    with torch.autocast("cpu", torch.bfloat16):
        qtrain.calibrate(model, inputs(9, dim))
    return model


def inputs(seed: int, dim: int = 128, samples: int = 2) -> Tensor:
    return torch.randn(samples, 24, dim, generator=torch.Generator().manual_seed(seed))


def gradients(
    model: nn.Module, x: Tensor, through: Callable[[Tensor], Tensor] | None = None, before: Callable[[], Any] = int
) -> list[Tensor]:
    """Y, dX and the gradients of all parameters, in bfloat16; before: is called between forward and backward."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = (model if through is None else through)(x)
    before()
    y.float().square().mean().backward()
    return [y.detach(), x.grad, *(each.grad for each in model.parameters())]  # pyright: ignore[reportReturnType]


def equal(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# ----------------------------------------------------------------------------------------------- compiled and exported


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_one_graph_with_the_bits_of_eager(recipe: str) -> None:
    differing, graphs, breaks = train_compiled(recipe, blocks=1, steps=2, micro_batches=2)
    assert (differing, graphs, breaks) == ([], 1, 0)


@pytest.mark.parametrize("recipe", ["quartet", "quest", "nvidia_nvfp4"])
def test_a_compiled_model_takes_any_number_of_tokens(recipe: str) -> None:
    torch._dynamo.reset()
    model = model_of(recipe)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for samples in (2, 3, 5):
        x = inputs(samples, samples=samples)
        assert equal(gradients(model, x, compiled), gradients(model, x))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_fifty_steps_of_four_micro_batches_compile_nothing(recipe: str) -> None:
    differing, graphs, breaks = train_compiled(recipe, blocks=2, steps=50, micro_batches=4)
    assert (differing, graphs, breaks) == ([], 1, 0)


def train_compiled(recipe: str, blocks: int, steps: int, micro_batches: int) -> tuple[list[tuple[int, int]], int, int]:
    """The (step, micro-batch) pairs whose output or gradients are not those of eager; graphs; graph breaks."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = model_of(recipe, blocks)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    differing = []
    for step in range(steps):
        with qtrain.keep_weights(model):
            for micro_batch in range(micro_batches):
                qtrain.set_step(model, step, micro_batch)
                x = inputs(step * micro_batches + micro_batch)
                if not equal(gradients(model, x, compiled), gradients(model, x)):
                    differing.append((step, micro_batch))
        optimizer.step()
    counters = torch._dynamo.utils.counters
    return differing, counters["stats"]["unique_graphs"], len(counters["graph_break"])


def test_inductor_keeps_to_its_own_rounding() -> None:
    """It computes norms, activations and biases in its own way. The quantised products are the same."""
    torch._dynamo.reset()
    model = model_of("quartet")
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    for step in range(2):
        qtrain.set_step(model, step)
        for found, wanted in zip(gradients(model, inputs(step), compiled), gradients(model, inputs(step)), strict=True):
            assert (found - wanted).float().norm() < 0.1 * wanted.float().norm()
    alone = model.get_submodule("0.gate")
    assert equal(
        gradients(alone, inputs(3), torch.compile(alone, fullgraph=True, dynamic=False)), gradients(alone, inputs(3))
    )


@pytest.mark.parametrize("recipe", ["quartet", "quest", "nvidia_nvfp4"])
def test_a_model_is_exported_strictly_and_its_keys_are_no_constant_of_the_graph(recipe: str) -> None:
    model = model_of(recipe).eval()
    x = inputs(1)
    program = torch.export.export(model, (x,), strict=True)
    assert torch.equal(program.module()(x), model(x))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called.count("qtrain.fprop.default") == 3 and not any("qtrain_cpu" in name for name in called)


@pytest.mark.parametrize("recipe", ["quartet", "quest", "lsq", "mxfp8", "halo_2", "fp8_blockwise"])
@pytest.mark.parametrize("rows", [64, 50])
def test_operators_are_what_torch_takes_them_for(recipe: str, rows: int) -> None:
    """Schema, fake implementation and autograd, by torch's own check."""
    layer = model_of(recipe)[0].down
    x, dy = torch.randn(rows, 128, requires_grad=True), torch.randn(rows, 128)
    shared = layer.keys, layer.text, torch.float32, 0
    scales = layer.input_scale, layer.weight_scale
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(functional.fprop, (x, layer.weight, *scales, [], True, True, None, *shared), test_utils=tests)
    weight, fixed = layer.weight.detach(), [None if each is None else each.detach() for each in scales]
    w = functional.quantize_weight(weight, fixed[1], False, *shared)
    y, *saved = functional.fprop(x.detach(), weight, *fixed, [], True, False, None, *shared)
    assert y.shape == (rows, 128)
    for packed in (True, False):
        torch.library.opcheck(functional.quantize_weight, (weight, fixed[1], packed, *shared), test_utils=tests[::2])
    torch.library.opcheck(functional.quantize_grad, (dy, True, True, *shared), test_utils=tests[::2])
    numerics, held = layer.numerics, saved or [x.detach()]
    for_x, for_w = (functional.quantize_grad(dy, *each, *shared) or [dy] for each in ((True, False), (False, True)))
    assert numerics.dgrad.quantizes or for_x == [dy]
    given = for_x, weight, w, None, None, rows, torch.float32
    torch.library.opcheck(functional.dgrad, (*given, *shared), test_utils=tests[::2])
    given = for_w, held, None, None, rows, 128, 128, torch.float32
    torch.library.opcheck(functional.wgrad, (*given, *shared), test_utils=tests[::2])


# ------------------------------------------------------------------------------------------------- recomputed and moved


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recipe", ["quartet_v1", "quartet_ii", "quest"])
def test_a_step_that_is_set_before_the_backward_changes_nothing_of_the_forward(recipe: str, reentrant: bool) -> None:
    """Pipelines run the forwards of several micro-batches before the first backward, which then recomputes its own."""
    model = model_of(recipe, blocks=2)
    x = inputs(1)
    qtrain.set_step(model, 7, 1)
    wanted = gradients(model, x)

    def recomputing(x: Tensor) -> Tensor:
        for block in model.children():
            x = checkpoint(block, x, use_reentrant=reentrant)  # pyright: ignore[reportAssignmentType]
        return x

    def later() -> None:
        qtrain.set_step(model, 7, 2)
        model(inputs(2))
        qtrain.set_step(model, 8)

    for through in (None, recomputing):
        qtrain.set_step(model, 7, 1)
        assert equal(gradients(model, x, through, before=later), wanted)


def test_a_forward_of_too_many_steps_ago_is_not_recomputed_with_other_noise() -> None:
    model = model_of("quartet_v1")
    qtrain.set_step(model, 1)
    y = checkpoint(model, inputs(1).requires_grad_(), use_reentrant=False)
    assert isinstance(y, Tensor)
    for step in range(2, 80):
        qtrain.set_step(model, step)
    with pytest.raises(UserError, match=r"gate: a forward of more than 64 calls of qtrain\.set_step ago is recomputed"):
        y.sum().backward()


def test_saved_tensors_can_be_moved_and_are_all_that_is_saved() -> None:
    model = model_of("quartet")
    qtrain.set_step(model, 3)
    wanted = gradients(model, inputs(1))
    with save_on_cpu():
        assert equal(gradients(model, inputs(1)), wanted)


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Of activations, parameters apart."""
    own = {each.untyped_storage().data_ptr() for each in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model(x)
    return sum(seen.values())


@pytest.mark.parametrize(("recipe", "share"), [("quartet", 0.66), ("mxfp8", 4.0), ("quest", 0.66)])
def test_a_layer_saves_what_its_gradients_need_and_nothing_of_the_weight(recipe: str, share: float) -> None:
    """Codes of x for the weight's gradient, bits of its mask for the input's."""
    model = nn.Sequential(nn.Linear(256, 256, bias=False))
    qtrain.convert(model, recipe)
    qtrain.set_step(model, 0)
    x = torch.randn(512, 256, requires_grad=True)
    keys = 72  # bytes
    assert kept_bytes(model, x) <= share * x.numel() + keys
    model.requires_grad_(False)
    assert kept_bytes(model, x) <= x.numel() / 8 + keys
    assert kept_bytes(model, x.detach()) == 0


@pytest.mark.parametrize(("recipe", "limit"), [("quartet", 1.1), ("mxfp8", 1.1), ("quartet_ii", 1.1), ("quest", 0.7)])
def test_kept_weights_are_packed(recipe: str, limit: float) -> None:
    model = model_of(recipe, dim=256, hidden=512)
    with qtrain.keep_weights(model):
        qtrain.set_step(model, 1)
        layers = quant_linears(model)
        held = sum(each.nbytes for layer in layers for each in layer.kept)
        assert 0 < held <= limit * sum(layer.weight.numel() for layer in layers)
    assert not any(layer.kept for layer in layers)


def test_weights_in_tiles_are_not_kept() -> None:
    """They are not packed, and would take as much as the weight's values."""
    model = model_of("nvidia_nvfp4")
    with qtrain.keep_weights(model):
        qtrain.set_step(model, 1)
        assert not any(layer.kept for layer in quant_linears(model))


# ------------------------------------------------------------------------------------------------------------ observers


def test_an_observer_sees_the_forward_that_it_was_attached_to_and_its_backward() -> None:
    model = model_of("quartet")
    layer = model[0].down
    assert isinstance(layer, QuantLinear)
    seen: list[str] = []
    observer = Observer(lambda each: seen.append(each.use), lambda _: seen.append("gradient"))
    forward, backward = ["fprop.w", "fprop.x"], ["dgrad.dy", "dgrad.w", "gradient", "wgrad.dy", "wgrad.x"]
    unobserved = model(inputs(1))
    layer.observer = observer
    observed = model(inputs(2))
    layer.observer = Observer(lambda _: seen.append("another"), lambda _: seen.append("another"))
    assert sorted(seen) == forward
    unobserved.sum().backward()
    assert sorted(seen) == forward
    seen.clear()
    observed.sum().backward()
    assert sorted(seen) == backward


# ----------------------------------------------------------------------------------------------------------- many ranks


def trained(wrap: Callable[[nn.Module], nn.Module], rank: int, ranks: int, recipe: Any) -> list[Tensor]:
    """All parameters, whole, after three steps of SGD; of a model that was made on no device."""
    torch.manual_seed(0)
    state = nn.Sequential(Block(64, 64), Block(64, 64)).state_dict()
    with torch.device("meta"):
        model = nn.Sequential(Block(64, 64), Block(64, 64))
    qtrain.convert(model, recipe, backend="reference")
    model = model.to_empty(device="cpu")
    model.load_state_dict(state, strict=False)
    whole = wrap(model)
    for step in range(3):
        x = inputs(step, 64, 4)[rank::ranks]
        qtrain.set_step(model, step, rank)
        if step == 0:
            qtrain.calibrate(whole, x)
        whole.zero_grad()
        whole(x).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter -= 0.05 * parameter.grad
    return [each.full_tensor() if isinstance(each, DTensor) else each.detach() for each in model.parameters()]


def shard(model: nn.Module) -> nn.Module:
    for block in model.children():
        fully_shard(block)
    return fully_shard(model)


def on_a_rank(rank: int, port: int, recipes: list[str], folder: Path) -> None:
    """Writes the parameters that this rank ends with, of each way to wrap a model and each recipe."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    found = {
        (name, recipe): trained(wrap, rank, 2, recipe)  # pyright: ignore[reportArgumentType]
        for name, wrap in (("DDP", DistributedDataParallel), ("FSDP2", shard))
        for recipe in recipes
    }
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_ranks_train_what_one_process_does(tmp_path: Path) -> None:
    """DDP and FSDP2, also with learned scales, whose start is that of all ranks' inputs."""
    recipes = ["lsq", "mxfp8"]
    expected = {recipe: trained(lambda model: model, 0, 1, recipe) for recipe in recipes}
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    multiprocessing.spawn(on_a_rank, (port, recipes, tmp_path), nprocs=2)
    for rank in range(2):
        ended = torch.load(tmp_path / f"{rank}.pt")
        assert len(ended) == 2 * len(recipes)
        for (name, recipe), parameters in ended.items():
            for a, b in zip(parameters, expected[recipe], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=f"{recipe} under {name}, rank {rank}")


def test_learned_scales_learn_whatever_else_is_frozen() -> None:
    """The first layer of a model, whose input has no gradient; a frozen weight."""
    model = nn.Sequential(nn.Linear(64, 64))
    qtrain.convert(model, "lsq", backend="reference")
    (layer,) = quant_linears(model)
    qtrain.calibrate(model, inputs(0, 64))

    def gradients_of_scales(needs_x: bool, needs_w: bool) -> list[Tensor | None]:
        model.zero_grad()
        layer.weight.requires_grad_(needs_w)
        model(inputs(1, 64).requires_grad_(needs_x)).square().mean().backward()
        assert layer.input_scale is not None and layer.weight_scale is not None
        return [layer.input_scale.grad, layer.weight_scale.grad]

    expected = gradients_of_scales(True, True)
    assert all(each is not None and each.abs() > 0 for each in expected)
    for needs in ((False, True), (True, False), (False, False)):
        assert gradients_of_scales(*needs) == expected


def test_a_learned_scale_without_a_value_is_said() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    qtrain.convert(model, "lsq", backend="reference")
    with pytest.raises(
        UserError, match=r"0: its recipe learns a scale, which has no value yet; call qtrain\.calibrate"
    ):
        model(torch.randn(2, 64))
    qtrain.calibrate(model, torch.randn(8, 64))
    model(torch.randn(2, 64))
    (layer,) = quant_linears(model)
    layer.reset_parameters()
    with pytest.raises(UserError, match="has no value yet"):
        model(torch.randn(2, 64))


def test_recipes_that_draw_nothing_are_given_no_keys() -> None:
    model, drawing = model_of("quest"), model_of("quartet")
    keys = {name: [layer.keys for layer in quant_linears(each)] for name, each in (("no", model), ("yes", drawing))}
    for each in (model, drawing):
        qtrain.set_step(each, 5)
    assert all(layer.keys is before for layer, before in zip(quant_linears(model), keys["no"], strict=True))
    tables = {layer.keys.untyped_storage().data_ptr() for layer in quant_linears(drawing)}
    assert len(tables) == 1 and keys["yes"][0].untyped_storage().data_ptr() not in tables
