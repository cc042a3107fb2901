import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import Optimizer

import qtrain
from qtrain.models.decoder import Decoder
from qtrain.models.families.llama import Llama
from qtrain.optim.base import OptimizerSettings, Schedule
from qtrain.optim.groups import build_optimizer, parameter_groups
from qtrain.optim.optimizers.adamw import AdamW
from qtrain.optim.optimizers.adamw8bit import AdamW8bit
from qtrain.optim.schedules.cosine import Cosine
from qtrain.optim.schedules.wsd import WSD
from qtrain.training import checkpoint


def llama(**changes: Any) -> Decoder:
    base = {"name": "tiny", "dim": 16, "n_layers": 2, "n_heads": 2, "ffn_dim": 24, "seq_len": 8}
    torch.manual_seed(0)
    return Decoder(Llama.model_validate(base | changes), 11)


def schedule(name: str = "cosine", **changes: Any) -> Schedule:
    return {"cosine": Cosine, "wsd": WSD}[name].model_validate({"name": name} | changes)


# --------------------------------------------------------------------------------------------------------------- groups

LINEARS = [
    f"layers.{i}.{x}.weight"
    for i in range(2)
    for x in ("attention.k", "attention.o", "attention.q", "attention.v", "mlp.down", "mlp.gate", "mlp.up")
]
NORMS = [f"layers.{i}.{x}.weight" for i in range(2) for x in ("attention_norm", "mlp_norm")] + ["norm.weight"]


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_block_linears_decay(tied: bool) -> None:
    decay, no_decay = parameter_groups(llama(tie_embeddings=tied))
    assert list(decay) == LINEARS
    assert list(no_decay) == ["embed.weight", *NORMS[:4], *([] if tied else ["lm_head.weight"]), "norm.weight"]


def test_a_frozen_parameter_is_in_no_group() -> None:
    model = llama()
    model.layers[0].requires_grad_(False)
    decay, no_decay = parameter_groups(model)
    assert [name for name in [*decay, *no_decay] if name.startswith("layers.0.")] == []
    assert list(decay) == LINEARS[7:]


def test_learned_steps_decay_as_the_weights_do() -> None:
    model = llama()
    qtrain.convert(model, "lsq", backend="reference")
    decay, no_decay = parameter_groups(model)
    steps = {f"{name.removesuffix('weight')}{side}_scale" for name in LINEARS for side in ("input", "weight")}
    assert set(decay) == {*LINEARS, *steps} and not any(name.endswith("_scale") for name in no_decay)


def test_weight_decay_reaches_the_decay_group_alone() -> None:
    model = llama()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, AdamW(name="adamw", lr=0.5, weight_decay=0.2))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.5 * 0.2 if name in LINEARS else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, rtol=1e-6, atol=0)


def test_two_steps_follow_adamw_by_hand() -> None:
    settings = AdamW(name="adamw", lr=0.01, beta1=0.8, beta2=0.9, eps=0.05, weight_decay=0.3)
    model = llama()
    weight = model.layers[0].mlp.up.weight  # pyright: ignore[reportAttributeAccessIssue]
    optimizer = build_optimizer(model, settings)
    x = weight.detach().double()
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    for step in (1, 2):
        grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
        weight.grad = grad.clone()
        optimizer.step()
        first, second = 0.8 * first + 0.2 * grad.double(), 0.9 * second + 0.1 * grad.double() ** 2
        direction = (first / (1 - 0.8**step)) / ((second / (1 - 0.9**step)).sqrt() + 0.05)
        x = x * (1 - 0.01 * 0.3) - 0.01 * direction
    torch.testing.assert_close(weight.detach().double(), x, rtol=1e-5, atol=1e-7)


# --------------------------------------------------------------------------------------------------------------- 8 bits


def trained_in_8_bits(steps: int, settings: OptimizerSettings, saved: Path | None = None) -> tuple[Decoder, Optimizer]:
    """A model after so many steps on gradients that are a function of the step. saved: the checkpoint to begin from,
    of step 2."""
    model = llama(dim=64)  # rows of 64, and of 24 in mlp.down, which are no whole blocks
    optimizer = build_optimizer(model, settings)
    first = 0
    if saved is not None:
        first = checkpoint.restore(saved, model, optimizer)["step"]
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator) * parameter.detach().std().add(0.01)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + step)  # a float, as the loop sets it
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_8_bit_states_resume_to_the_same_bits(tmp_path: Path) -> None:
    settings = AdamW8bit(name="adamw8bit", lr=0.01, block_size=32)
    undisturbed, _ = trained_in_8_bits(4, settings)
    model, optimizer = trained_in_8_bits(2, settings)
    tensors = checkpoint.tensors_of(model, optimizer)
    name = "optimizer.layers.0.mlp.up.weight.exp_avg"
    codes, scale, table = (tensors[f"{name}.{part}"] for part in ("codes", "scale", "qmap"))
    assert (codes.dtype, codes.shape, scale.shape, table.shape) == (torch.uint8, (24, 64), (24, 2), (256,))
    assert tensors["optimizer.layers.0.mlp.down.weight.exp_avg"].dtype == torch.float32
    held = sum(x.nbytes for name, x in tensors.items() if name.startswith("optimizer.") and not name.endswith("step"))
    assert held == sum(settings.state_bytes(parameter.shape) for parameter in model.parameters())
    folder = checkpoint.save(tmp_path, 2, tensors, {})
    resumed, _ = trained_in_8_bits(4, settings, saved=folder)
    for name, weight in resumed.named_parameters():
        assert torch.equal(weight, undisturbed.get_parameter(name)), name


def test_8_bit_states_are_near_those_of_32_and_independent_of_how_many_rows_are_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A code is within 6% of what it stands for, give or take the smallest of a block; the update follows."""
    start, in_8 = llama(dim=64), trained_in_8_bits(4, AdamW8bit(name="adamw8bit", lr=0.01, block_size=32))[0]
    in_32, _ = trained_in_8_bits(4, AdamW(name="adamw", lr=0.01))
    monkeypatch.setattr("qtrain.optim.blockwise.ELEMENTS", 64)
    by_row, _ = trained_in_8_bits(4, AdamW8bit(name="adamw8bit", lr=0.01, block_size=32))
    for name, weight in in_8.named_parameters():
        exact, before = in_32.get_parameter(name), start.get_parameter(name)
        off = ((weight - exact).norm() / (exact - before).norm()).item()
        assert off < (0.05 if weight.ndim == 2 and weight.shape[1] == 64 else 1e-5), (name, off)
        assert torch.equal(weight, by_row.get_parameter(name)), name


# ------------------------------------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize("total", [20, 256, 2861])
@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_cosine_is_the_papers_one_cycle(total: int, fraction: float) -> None:
    """The released code runs torch's OneCycleLR with these factors and a whole number of warm-up steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup = int(total * fraction)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=3.0,
        total_steps=total,
        pct_start=warmup / total,
        anneal_strategy="cos",
        cycle_momentum=False,
        div_factor=100,
        final_div_factor=0.1,
    )
    settings = schedule(warmup_fraction=fraction, start_factor=0.01, final_factor=0.1)
    for step in range(total):
        assert 3.0 * settings.factor(step, total) == pytest.approx(reference.get_last_lr()[0], rel=1e-12), step
        optimizer.step()
        if step < total - 1:
            reference.step()


def test_wsd_by_hand() -> None:
    settings = schedule("wsd", warmup_fraction=0.3, decay_fraction=0.4, start_factor=0.2, final_factor=0.0)
    expected = [0.2, 0.6, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    assert [settings.factor(step, 10) for step in range(10)] == pytest.approx(expected, abs=1e-15)


@given(
    name=st.sampled_from(["cosine", "wsd"]),
    total=st.integers(1, 400),
    warmup=st.floats(0, 0.99),
    decay=st.floats(0.001, 1),
    start=st.floats(0, 1),
    final=st.floats(0, 1),
)
def test_every_schedule_rises_then_falls_and_ends_exactly(
    name: str, total: int, warmup: float, decay: float, start: float, final: float
) -> None:
    own = {"decay_fraction": decay} if name == "wsd" else {}
    settings = schedule(name, warmup_fraction=warmup, start_factor=start, final_factor=final, **own)
    factors = [settings.factor(step, total) for step in range(total)]
    peak = max(settings.warmup(total) - 1, 0)
    assert factors[-1] == final
    assert settings.factor(total + 5, total) == final
    if total > 1:
        assert factors[0] == pytest.approx(start if peak > 0 else 1.0, abs=1e-15)
        assert factors[peak] == (1.0 if peak < total - 1 else final)
    slack = 1e-12
    assert all(b >= a - slack for a, b in pairwise(factors[:peak]))
    assert all(b <= a + slack for a, b in pairwise(factors[peak:]))


@pytest.mark.parametrize(("total", "fraction", "steps"), [(2861, 0.1, 286), (100, 0.29, 29), (9, 0.1, 0), (10, 0.1, 1)])
def test_fractions_become_whole_steps(total: int, fraction: float, steps: int) -> None:
    assert math.floor(0.29 * 100) == 28  # why rounding down needs care
    assert schedule(warmup_fraction=fraction).warmup(total) == steps
    assert WSD(name="wsd", decay_fraction=fraction).decay(total) == max(1, steps)
