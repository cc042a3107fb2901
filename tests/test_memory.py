"""What training keeps in memory: the loss by chunks, activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from qtrain.errors import UserError
from qtrain.models.chunked_loss import chunked_cross_entropy
from qtrain.optim.groups import build_optimizer
from qtrain.plan import make_plan
from qtrain.quant import calibrate, set_step
from qtrain.train import compose
from qtrain.training.activations import checkpoint_activations
from qtrain.training.build import build_model, check_model
from qtrain.training.causal_lm import CausalLM
from qtrain.training.communication import Communication, plan_communication
from qtrain.training.losses import next_token_loss
from qtrain.training.memory import measure_memory
from qtrain.training.parallel import blocks_of
from qtrain.training.session import run
from qtrain.training.speed import planned_time
from qtrain.units import describe_time
from qtrain_kernels.precision import Linear

CPU = torch.device("cpu")


def head_and_inputs(n_tokens: int, dim: int, vocabulary: int) -> tuple[Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head = Linear(dim, vocabulary, bias=False)
    nn.init.normal_(head.weight, std=0.3)
    return head, torch.randn(n_tokens, dim), torch.randint(vocabulary, (n_tokens,))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("mixed", "tolerance"), [(False, 1e-6), (True, 2**-8)])
def test_loss_by_chunks_equals_a_computation_in_float64(reduction: str, mixed: bool, tolerance: float) -> None:
    head, x, targets = head_and_inputs(n_tokens=1100, dim=48, vocabulary=301)  # nine chunks, the last one short
    operands = (x.bfloat16(), head.weight.bfloat16()) if mixed else (x, head.weight)
    exact = [operand.detach().double().requires_grad_() for operand in operands]
    expected = F.cross_entropy(exact[0] @ exact[1].T, targets, reduction=reduction)
    (3 * expected).backward()

    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        loss = chunked_cross_entropy(x.unflatten(0, (2, -1)), head, targets.unflatten(0, (2, -1)), reduction)
    (3 * loss).backward()
    assert loss.dtype == x.grad.dtype == head.weight.grad.dtype == torch.float32  # pyright: ignore[reportOptionalMemberAccess]
    assert relative(loss.detach(), expected.detach()) < (1e-3 if mixed else 1e-6)
    assert relative(x.grad, exact[0].grad) < tolerance
    assert relative(head.weight.grad, exact[1].grad) < tolerance


def relative(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None and expected is not None
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_loss_by_chunks_makes_the_gradients_that_are_asked_for(frozen: str) -> None:
    head, x, targets = head_and_inputs(n_tokens=130, dim=16, vocabulary=32)
    x.requires_grad_(frozen != "x")
    head.weight.requires_grad_(frozen != "weight")
    chunked_cross_entropy(x, head, targets).backward()
    assert (x.grad is None) == (frozen == "x")
    assert (head.weight.grad is None) == (frozen == "weight")
    with torch.no_grad():
        assert not chunked_cross_entropy(x, head, targets).requires_grad


def test_loss_by_chunks_holds_a_part_of_the_logits() -> None:
    head, x, targets = head_and_inputs(n_tokens=2048, dim=32, vocabulary=4096)
    x.requires_grad_()
    plain = peak_bytes(head, lambda: F.cross_entropy(head(x).float(), targets).backward())
    chunked = peak_bytes(head, lambda: chunked_cross_entropy(x, head, targets).backward())
    gradients = x.nbytes + head.weight.nbytes
    logits = len(x) * head.out_features
    assert plain / logits >= 12
    assert (chunked - gradients) / logits <= 2.5


def peak_bytes(module: nn.Module, compute: Callable[[], object]) -> int:
    """Of what `compute` holds at once, the module's parameters included."""
    tracker = MemTracker()
    tracker.track_external(module)
    with tracker:
        compute()
    module.zero_grad()
    return tracker.get_tracker_snapshot("peak")[CPU]["Total"]


TINY = (
    "trainer.precision=32-true",
    "trainer.micro_batch_size=2",
    "trainer.batch_tokens=128",
    "model.dim=128",
    "model.ffn_dim=256",
    "model.n_layers=2",
    "model.n_heads=2",
    "model.seq_len=64",
    "model.vocab_size=97",
)


def one_step(*more: str) -> tuple[dict[str, Tensor], int]:
    """(gradients by name, peak bytes) of a forward and backward."""
    config = compose([*TINY, *more])
    model = build_model(config, 97)
    checkpoint_activations(blocks_of(model), config.trainer.checkpoint_activations)
    tokens = torch.randint(97, (2, 65), generator=torch.Generator().manual_seed(1))
    calibrate(model, tokens[:, :-1])
    set_step(model, 3, 0)
    peak = peak_bytes(model, lambda: next_token_loss(model, tokens).backward())
    assert all(parameter.grad is None for parameter in model.parameters())
    next_token_loss(model, tokens).backward()
    return {name: cast("Tensor", parameter.grad) for name, parameter in model.named_parameters()}, peak


@pytest.mark.parametrize("recipe", ["bf16", "quest", "quartet_v1", "lsq"])
def test_gradients_with_activation_checkpointing_are_the_same_bits(recipe: str) -> None:
    expected, most = one_step(f"recipe={recipe}")
    found, peaks = {}, [most]
    for kept in ("selective", "full"):
        found, peak = one_step(f"recipe={recipe}", f"trainer.checkpoint_activations={kept}")
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items()), kept
        peaks.append(peak)
    assert peaks[0] > peaks[1] > peaks[2]


def test_full_checkpointing_computes_products_again_and_selective_does_not() -> None:
    calls = {}
    for kept in ("none", "selective", "full"):
        config = compose([*TINY, "recipe=bf16", f"trainer.checkpoint_activations={kept}"])
        model = build_model(config, 97)
        checkpoint_activations(blocks_of(model), config.trainer.checkpoint_activations)
        with FlopCounterMode(display=False) as counter:
            next_token_loss(model, torch.zeros(2, 65, dtype=torch.int64)).backward()
        calls[kept] = counter.get_total_flops()
    assert calls["none"] == calls["selective"] < calls["full"]


# ------------------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize(
    "settings",
    [
        "recipe=bf16",
        "recipe=quartet_v1 trainer.batch_tokens=256 model.n_layers=1",
        "recipe=quest trainer.batch_tokens=256 model.n_layers=1 trainer.checkpoint_activations=selective",
        "recipe=quartet_v1 model.n_layers=11 trainer.checkpoint_activations=full",
        "recipe=lsq model.n_layers=1 trainer.precision=bf16-mixed",
        "recipe=bf16 model.tie_embeddings=true trainer.checkpoint_activations=full trainer.chunked_loss=true",
    ],
)
def test_the_memory_of_a_step_is_known_before_it_is_taken(settings: str) -> None:
    config = compose([*TINY, *settings.split()])
    plan = make_plan(config)
    module = CausalLM(config, plan, build_model(config, 97))
    model = module.model
    optimizer = build_optimizer(model, config.optimizer)
    checkpoint_activations(blocks_of(model), config.trainer.checkpoint_activations)
    tokens = torch.randint(97, (2, 65))
    mixed = config.trainer.precision == "bf16-mixed"
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        for step in range(2):  # the optimiser has its state from the second on
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed, cache_enabled=False):
                module.begin_step(step, tokens)
            with module.weights_kept():
                for micro_batch in range(plan.micro_batches):
                    tracker.reset_mod_stats()
                    with torch.autocast("cpu", torch.bfloat16, enabled=mixed, cache_enabled=False):
                        loss = module.micro_batch_loss(model, tokens, step, micro_batch, 0, 1)
                    loss.backward()
                    del loss
            optimizer.step()
            optimizer.zero_grad()
    measured = tracker.get_tracker_snapshot("peak")[CPU]["Total"]
    planned = measure_memory(config, plan, CPU)
    assert planned.peak == pytest.approx(measured, rel=0.05)
    weights = sum(parameter.nbytes for parameter in model.parameters())  # with LSQ's scales, which are not planned
    assert planned.parameters == planned.gradients == pytest.approx(weights, rel=1e-3)
    assert planned.optimizer == pytest.approx(sum(x.nbytes for s in optimizer.state.values() for x in s.values()), 1e-3)


def test_what_several_devices_share_is_divided() -> None:
    alone = [*TINY, "recipe=bf16", "trainer.batch_tokens=512"]
    several = [*alone, "trainer.devices=4", "trainer.micro_batch_size=2", "trainer.strategy=fsdp2"]
    one, of_four = (measure_memory(config, make_plan(config), CPU) for config in map(compose, (alone, several)))
    assert of_four.parameters == one.parameters // 4 and of_four.optimizer == one.optimizer // 4
    assert of_four.peak < one.peak


def test_what_a_device_cannot_hold_is_said_by_the_plan_and_refused_by_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("qtrain.training.memory.memory_of", lambda *_: 2**20)
    (tmp_path / "text.txt").write_text("all is well that ends well\n" * 200)
    data = ["data=text", f"data.files={tmp_path}/text.txt", f"data.cache_dir={tmp_path}", "data.val_tokens=64"]
    settings = [*TINY, *data, "recipe=bf16", "trainer.tokens=128", f"run_root={tmp_path}/runs", "model.vocab_size=257"]
    monkeypatch.setattr("qtrain.training.session.speak_through", lambda _: None)
    run(compose([*settings, "dry_run=true"]))
    assert "a step takes about" in caplog.text and "cpu has 1 MiB: shard the model over more devices" in caplog.text
    with pytest.raises(UserError, match=r"take 6.01 MiB on each device, and cpu has 1 MiB; shard them over more"):
        run(compose(settings))


def test_a_quantised_head_is_not_taken_by_chunks() -> None:
    with pytest.raises(UserError, match=r"recipe quest quantises lm_head.*add lm_head to recipe.skip"):
        check_model(compose([*TINY, "recipe=quest", "recipe.skip=[]", "trainer.chunked_loss=true"]))


# ----------------------------------------------------------------------------------------------------- sent and waited


def dry(*more: str) -> tuple[Communication, str]:
    config = compose([*TINY, "trainer.strategy=fsdp2", "trainer.batch_tokens=1024", "trainer.tokens=10240", *more])
    plan = make_plan(config)
    found = plan_communication(config, plan)
    return found, planned_time(config, plan, found)


def test_what_ranks_send_by_hand() -> None:
    """dim 128, ffn 256, two layers, a vocabulary of 97, which 4 shards fill up to 100."""
    block, root = 4 * (4 * 128 * 128 + 3 * 128 * 256 + 2 * 128), 4 * (2 * 100 * 128 + 128)
    found, _ = dry("recipe=bf16", "trainer.devices=4", "trainer.num_nodes=2", "trainer.sharding_groups=2")
    kinds = [(each.times, each.payload, each.ranks, each.rounds) for each in found.collectives]
    whole = 2 * block + root
    assert kinds == [(1, whole, 4, 1), (1, 2 * block, 4, 1), (1, whole, 4, 1), (1, whole // 4, 2, 2)]
    assert found.sent == (2 * whole + 2 * block) * 3 // 4 + whole // 4
    four, _ = dry("recipe=bf16", "trainer.devices=2")  # four micro-batches: gradients are reduced after the last alone
    assert [each.times for each in four.collectives] == [4, 4, 1]
    ddp, _ = dry("recipe=bf16", "trainer.devices=2", "trainer.strategy=ddp")
    assert ddp.sent == 2 * 4 * make_plan(compose([*TINY, "recipe=bf16"])).parameters // 2
    assert dry("recipe=bf16", "trainer.strategy=auto")[0].sent == 0


def test_times_follow_from_stated_speeds_alone() -> None:
    eight = ["recipe=bf16", "trainer.devices=8"]
    assert "unknown: state trainer.device_tflops" in dry(*eight)[1]
    sent, told = dry(*eight, "trainer.device_tflops=1e-6", "trainer.device_gigabytes_per_second=1e-6")
    flops = make_plan(compose([*TINY, "recipe=bf16"])).flops_per_token * 10240
    computing, traffic = flops / 8 / 1e6, 10 * sent.sent / 1e3
    assert f"{describe_time(computing)} of computing" in told and f"{describe_time(traffic)} of traffic" in told
    assert told.startswith(f"{describe_time(max(computing, traffic))} if one hides")


def test_a_dry_run_plans_for_devices_that_are_not_here(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole gradients stay between the micro-batches of FSDP2; codes take less memory than weights."""
    monkeypatch.setattr("qtrain.training.session.speak_through", lambda _: None)
    many = [
        "trainer.strategy=fsdp2",
        "trainer.devices=8",
        "trainer.num_nodes=8",
        "recipe=quartet_v1",
        "model.n_layers=1",
    ]
    one_each, two_each = [*TINY, *many, "trainer.batch_tokens=8192"], [*TINY, *many, "trainer.batch_tokens=16384"]
    assert run(compose([*two_each, "dry_run=true"])) is None
    told = " ".join(capsys.readouterr().out.split())
    assert "64 on 8 nodes" in told and "x 63/64 =" in told and "whole gradients" in told
    one, two = (measure_memory(config, make_plan(config), CPU) for config in map(compose, (one_each, two_each)))
    weights = 4 * make_plan(compose(one_each)).parameters
    assert 0.5 * weights < two.peak - one.peak < 1.001 * weights
    codes = compose([*one_each, "trainer.all_gather=quantized"])
    assert measure_memory(codes, make_plan(codes), CPU).peak < one.peak
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    "settings",
    ["+tune=lora recipe=bf16", "+tune=qlora recipe=nf4", "+tune=peqa recipe=bf16", "+tune=pv recipe=bf16",
     "+tune=efqat recipe=quest optimizer.weight_decay=0"],
)  # fmt: skip
def test_a_dry_run_plans_what_tunes(settings: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where most parameters are frozen, and where an adapter draws what it drops."""
    sizes = ["model.dim=128", "model.ffn_dim=128", "model.n_layers=1", "model.seq_len=64", "trainer.batch_tokens=512"]
    run(compose([*settings.split(), *sizes, "dry_run=true", f"run_root={tmp_path}"]))
    assert "at the peak of a step" in " ".join(capsys.readouterr().out.split())
