"""What else of a pretrained model trains: scales of integer codes (PEQA); and by which loss: a teacher's (QAD)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import qtrain
from qtrain.errors import UserError
from qtrain.models import hf
from qtrain.models.decoder import Decoder
from qtrain.optim.groups import build_optimizer, parameter_groups
from qtrain.quant.scaled import ScaledLinear, round_to_nearest, train_scales
from qtrain.train import compose, from_checkpoint
from qtrain.training import tune
from qtrain.training.build import build_model, build_teacher, check_model
from qtrain.training.checkpoint import Saver, list_checkpoints, tensors_of
from qtrain.training.losses import distillation_loss, next_token_loss
from qtrain.training.moves import move_codes

SMALL = [
    "model.dim=32", "model.ffn_dim=64", "model.n_layers=1", "model.n_heads=2", "model.seq_len=16", "recipe=bf16",
    "trainer.precision=32-true",
]  # fmt: skip


def tokens() -> torch.Tensor:
    found = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(0))
    return torch.where(torch.arange(17) < 9, ~found, found)


@pytest.mark.parametrize("bits, group", [(4, None), (3, 16), (8, 32)])
def test_rounding_has_less_error_than_the_whole_range(bits, group):
    w = torch.randn(24, 64, generator=torch.Generator().manual_seed(0)) ** 3
    group = group or 64
    codes, zero, scale = round_to_nearest(w, bits, group)
    assert codes.int().max() < 2**bits and zero.int().max() < 2**bits
    rows = w.double().view(-1, group)
    found = (codes.view(-1, group).double() - zero.view(-1, 1)) * scale.view(-1, 1).double()
    low, high = rows.amin(1, True).clamp(max=0), rows.amax(1, True).clamp(min=0)
    step = (high - low) / (2**bits - 1)
    plain = ((rows / step + (-low / step).round()).round().clamp(0, 2**bits - 1) - (-low / step).round()) * step
    errors = [(each - rows).square().sum(1) for each in (found, plain)]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()
    if bits < 8:
        assert errors[0].sum() < errors[1].sum()


class Counting(TorchDispatchMode):
    """Counts operators."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_shapes_alone_take_no_search():
    """A thousand operators a layer take minutes on the meta device, by which a run of a large model is checked."""
    found = round_to_nearest(torch.randn(24, 64), 4, 16)
    with Counting() as counting:
        shapes = round_to_nearest(torch.empty(24, 64, device="meta"), 4, 16)
    assert [(each.shape, each.dtype) for each in shapes] == [(each.shape, each.dtype) for each in found]
    assert counting.count < 50


@pytest.mark.parametrize("bits, group", [(4, None), (3, 16)])
def test_the_gradient_of_scales_is_that_of_the_product(bits, group):
    generator = torch.Generator().manual_seed(0)
    layer = ScaledLinear(nn.Linear(64, 24), "up", bits, group)
    x = torch.randn(7, 64, generator=generator, requires_grad=True)
    dy = torch.randn(7, 24, generator=generator)
    layer(x).backward(dy)
    scale = layer.scale.detach().double().requires_grad_()
    x64 = x.detach().double().requires_grad_()
    weight = (layer.integers().double() * scale[..., None]).flatten(1)
    y = F.linear(x64, weight, layer.bias.double())
    y.backward(dy.double())
    torch.testing.assert_close(layer(x).double(), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.scale.grad.double(), scale.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-5)
    assert layer.codes.numel() == 64 * 24 // 2


def test_scales_alone_train_and_the_whole_merges_and_loads():
    config = compose([*SMALL, "+tune=peqa", "tune.scales.group=16"])
    model = build_model(config, 61)
    names = [name for name, each in model.named_parameters() if each.requires_grad]
    assert len(names) == 7 and all(name.endswith(".scale") for name in names)
    next_token_loss(model, tokens()).backward()
    with torch.no_grad():
        for _, scale in [pair for pair in model.named_parameters() if pair[0] in names]:
            assert (scale.grad != 0).any()
            scale -= 0.1 * scale.grad.sign() * scale
    plain = Decoder(config.model, 61)
    plain.load_state_dict(tune.merged(model))
    assert torch.allclose(next_token_loss(plain, tokens()), next_token_loss(model, tokens()), rtol=1e-5)
    again = build_model(compose([*SMALL, "+tune=peqa", "tune.scales.group=16", "seed=3"]), 61)
    again.load_state_dict(model.state_dict())
    assert torch.equal(next_token_loss(again, tokens()), next_token_loss(model, tokens()))


@pytest.mark.parametrize("more, message", [
    (("recipe=mxfp8", "+tune=peqa"), "recipe mxfp8 would quantise them again"),
    (("+tune=peqa", "tune.scales.group=24"), "group=24 must divide the 32 inputs"),
    (("+tune=peqa", "trainer.strategy=fsdp2"), "does not shard"),
    (("+tune=pv", "optimizer=adamw8bit"), "set optimizer=adamw"),
    (("recipe=lsq", "+tune=qlora"), r"recipe lsq learns a scale of layers\.0\.attention\.q in training"),
    (("+tune=qad",), "distils from a pretrained model"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(more, message):
    with pytest.raises(UserError, match=message):
        check_model(compose([*SMALL, *more]))


def test_tuning_what_is_not_pretrained_is_said(caplog: pytest.LogCaptureFixture) -> None:
    check_model(compose([*SMALL, "+tune=lora"]))
    assert "tune changes a model whose weights are at random; model=hf:FOLDER" in caplog.text


def test_moves_without_settings_are_those_of_pv_tuning():
    assert compose([*SMALL, "+tune=peqa", "tune.scales.moves={}"]).tune == compose([*SMALL, "+tune=pv"]).tune
    assert compose([*SMALL, "+tune=peqa"]).tune.scales.moves is None


def test_one_thing_trains():
    with pytest.raises(UserError, match="each say what trains"):
        compose([*SMALL, "+tune=peqa", "+tune.adapter.rank=4"])


@pytest.mark.parametrize("temperature, weight", [(1.0, 1.0), (2.5, 0.7)])
def test_the_loss_of_a_student(temperature, weight):
    """Written out token by token in float64."""
    config = compose(SMALL)
    student, teacher = build_model(config, 61), build_model(compose([*SMALL, "seed=1"]), 61)
    for model in (student, teacher):
        model.lm_head.weight.data *= 20  # so that the two differ
    stored = tokens()
    ids = torch.where(stored < 0, ~stored, stored)
    with torch.no_grad():
        s, t = (model(ids[:, :-1]).double() for model in (student, teacher))
    expected = 0.0
    for row in range(2):
        for at in range(8, 16):
            p, q = (logits[row, at] / temperature for logits in (t, s))
            p, q = p.exp() / p.exp().sum(), q.exp() / q.exp().sum()
            likely = s[row, at].exp()[ids[row, at + 1]] / s[row, at].exp().sum()
            expected += weight * temperature**2 * (p * (p / q).log()).sum() - (1 - weight) * likely.log()
    found = distillation_loss(student, teacher, stored, temperature=temperature, weight=weight)
    assert found.item() == pytest.approx(expected.item() / 32, rel=1e-5)
    found.backward()
    assert all(each.grad is None for each in teacher.parameters())


def test_the_teacher_is_the_checkpoint_unquantised(tmp_path: Path):
    base = build_model(compose(SMALL), 61)
    parameters = dict(base.named_parameters())
    hf.save(tmp_path, hf.config_of(compose(SMALL).model, 61, 0), {n: p.shape for n, p in parameters.items()},
            lambda name: parameters[name].detach())  # fmt: skip
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 61
    config = compose(from_checkpoint([f"model=hf:{tmp_path}", "recipe=quartet", "+tune=qad", *SMALL[-1:]]))
    teacher = build_teacher(config, 61, torch.device("cpu"))
    assert teacher is not None and not any(each.requires_grad for each in teacher.parameters())
    for name, value in teacher.named_parameters():
        assert torch.equal(value, parameters[name].bfloat16().float()), name
    student = build_model(config, 61, pretrained=True)
    assert torch.equal(student.embed.weight, teacher.embed.weight)


# ------------------------------------------------------------------------------------------------------------ PV-Tuning

PV = [*SMALL, "+tune=pv", "optimizer.lr=3e-4", "tune.scales.group=16", "trainer.batch_tokens=32"]


def textbook_move(codes, zero, scale, virtual, bits, largest):
    """One V step in float64, code by code. codes, virtual (N, G, K / G): of the virtual weight what Adam added."""
    wanted = torch.clamp(((codes - zero) * scale + virtual).div(scale).add(zero).round(), 0, 2**bits - 1)
    change = (wanted - codes) * scale
    budget = (largest * ((codes - zero) * scale).norm()) ** 2
    found, spent = codes.clone(), 0.0
    for _, at in sorted((-abs(v), at) for at, v in enumerate(virtual.flatten().tolist())):
        if change.view(-1)[at] == 0:
            continue
        spent += float(change.view(-1)[at] ** 2)
        if spent > budget:
            break
        found.view(-1)[at] = wanted.view(-1)[at]
    return found


@pytest.mark.parametrize("bits, group, largest", [(4, 64, 0.05), (3, 16, 0.1), (2, 16, 10.0)])
def test_codes_move_as_the_textbook_says(bits, group, largest):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24))
    model[0].weight.data = torch.randn(24, 64, generator=generator) / 40
    train_scales(model, bits, group, moves=True)
    layer = model[0]
    decay, no_decay = parameter_groups(model)
    optimizer = compose(PV).optimizer.build(decay, no_decay)
    move_codes(model, optimizer, rate=1e-2 / 3e-4, beta2=0.95, largest_change=largest)
    square = torch.zeros(24, 64 // group, group, dtype=torch.float64)
    total = 0
    for step in range(1, 4):
        x, dy = (torch.randn(9, size, generator=generator) for size in (64, 24))
        layer(x).backward(dy)
        gradient = (dy.double().T @ x.double()).view_as(square)
        torch.testing.assert_close(layer.moves.grad.double().view_as(square), gradient, rtol=1e-4, atol=1e-4)
        square = 0.95 * square + 0.05 * gradient**2
        virtual = -1e-2 * gradient / ((square / (1 - 0.95**step)).sqrt() + 1e-8)
        before, weight = layer.unpacked().double(), layer.dequantize()
        optimizer.step()
        optimizer.zero_grad()
        zero, scale = layer.zero.double()[..., None], layer.scale.detach().double()[..., None]
        expected = textbook_move(before, zero, scale, virtual, bits, largest)
        found = layer.unpacked().double()
        assert torch.equal(found, expected) or step == 1  # whose moves are all as large
        moved = ((found - before) * scale).norm() / ((before - zero) * scale).norm()
        assert moved <= largest and (layer.moves == 0).all()
        assert not torch.equal(layer.dequantize(), weight)
        total += int((found != before).sum())
    assert total > 10


def test_moved_codes_are_kept_exactly_by_a_checkpoint(tmp_path: Path):
    """Four steps are two, a checkpoint, and two of another process's model."""
    config = compose([*PV, "tune.scales.moves.largest_change=0.1"])
    check_model(config)

    def begun():
        model = build_model(config, 61)
        optimizer = build_optimizer(model, config.optimizer)
        tune.prepare_optimizer(model, optimizer, config)
        return model, optimizer

    def stepped(model, optimizer):
        next_token_loss(model, tokens()).backward()
        optimizer.step()
        optimizer.zero_grad()

    (whole, its), (first, ours), saver = begun(), begun(), Saver()
    start = whole.layers[0].mlp.up.codes.clone()
    for _ in range(4):
        stepped(whole, its)
    for _ in range(2):
        stepped(first, ours)
    saver.save(tmp_path, 2, tensors_of(first, ours), {"samples": 0, "vocab_size": 61})
    saver.wait()
    again, resumed = begun()
    saver.restore(list_checkpoints(tmp_path)[-1][1], again, resumed)
    assert torch.equal(again.layers[0].mlp.up.codes, first.layers[0].mlp.up.codes)
    for _ in range(2):
        stepped(again, resumed)
    expected, found = tensors_of(whole, its), tensors_of(again, resumed)
    assert expected.keys() == found.keys() and all(torch.equal(found[name], each) for name, each in expected.items())
    assert not torch.equal(start, whole.layers[0].mlp.up.codes)
    assert all(each.requires_grad for each in whole.parameters())
    up = whole.layers[0].mlp.up
    assert torch.equal(tune.merged(whole)["layers.0.mlp.up.weight"], (up.integers() * up.scale[..., None]).flatten(1))


# ---------------------------------------------------------------------------------------------------------------- EfQAT


@pytest.mark.parametrize("recipe", ["quest", "lsq", "quartet", "jetfire", "quest_sparse"])
def test_the_gradient_of_chosen_rows_is_that_of_all_where_rounding_sees_rows_apart(recipe):
    """wgrad of quest, lsq and quest_sparse is not quantised, that of quartet along tokens, a row of dY^T at a time."""

    def gradients(rows):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(128, 96))
        qtrain.convert(model, recipe)
        x = torch.randn(64, 128)
        qtrain.set_step(model, 0)
        qtrain.calibrate(model, x)
        model[0].rows = rows
        y = model(x)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
        return model[0].weight.grad, model[0].weight_scale

    rows = torch.tensor([0, 3, 4, 5, 40, 77, 95])
    (whole, _), (found, scale) = gradients(None), gradients(rows)
    others = torch.ones(96, dtype=torch.bool)
    others[rows] = False
    assert (found[others] == 0).all() and (found[rows] != 0).any(1).all()
    if recipe == "jetfire":  # tiles of 32 output channels and stochastic rounding
        cosine = F.cosine_similarity(found[rows].flatten(), whole[rows].flatten(), dim=0)
        assert cosine > 0.99
    else:
        torch.testing.assert_close(found[rows], whole[rows], rtol=1e-5, atol=1e-6)
    assert scale is None or scale.grad.isfinite().all()


def test_chosen_rows_alone_move_and_are_chosen_anew():
    settings = ["tune.rows.fraction=0.3", "tune.rows.refresh_samples=4", "trainer.batch_tokens=32"]
    config = compose([*SMALL, "recipe=mxfp8", "+tune=efqat", "optimizer.weight_decay=0", *settings])
    check_model(config)
    model = build_model(config, 61)
    optimizer = build_optimizer(model, config.optimizer)
    choice = tune.row_choice(model, optimizer, config)
    assert choice is not None and choice.every == 2
    layer = model.layers[0].mlp.up
    assert len(layer.rows) == 20  # of 64
    before = layer.weight.detach().clone()
    for step in range(4):
        if step == 2:
            layer.weight.data[:5] *= 30  # which are then among those that matter most
            before = layer.weight.detach().clone()
        choice.refresh(step)
        chosen = before.abs().mean(1).topk(20).indices
        assert set(layer.rows.tolist()) == set(chosen.tolist()) or step % 2
        qtrain.set_step(model, step)
        next_token_loss(model, tokens()).backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = (layer.weight != before).any(1)
        assert moved[layer.rows].all() and moved.sum() == 20
    assert {0, 1, 2, 3, 4} <= set(layer.rows.tolist())
    again = build_model(config, 61)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.layers[0].mlp.up.rows, layer.rows)


@pytest.mark.parametrize("more, message", [
    ((), "recipe bf16 quantises nothing"),
    (("recipe=mxfp8",), "AdamW without weight decay"),
])  # fmt: skip
def test_rows_need_a_recipe_and_an_optimiser_that_leaves_them(more, message):
    with pytest.raises(UserError, match=message):
        check_model(compose([*SMALL, "+tune=efqat", *more]))
