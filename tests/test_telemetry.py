"""The quantisers' health: against float64 computations of its own, of the operands that the step trains with."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_corpus
from oracles import quantization as oracle
from run_state import last_weights
from torch import Tensor, nn

import qtrain
from qtrain.config.recipe import QuantSpec
from qtrain.models.decoder import Decoder
from qtrain.plan import make_plan
from qtrain.quant import Observed, Observer, Quantizer, QuantLinear, operand_health
from qtrain.runs.directory import RunDirectory
from qtrain.train import compose
from qtrain.training.build import build_model
from qtrain.training.causal_lm import CausalLM
from qtrain.training.observers import observer
from qtrain.training.observers.telemetry import MAX_LINES, Telemetry
from qtrain.training.session import Session, run

T, K, N = 96, 128, 64
METRICS = {
    "sqnr_db",
    "clipped",
    "scale_underflow",
    "scale_overflow",
    "mask_density",
    "kurtosis",
    "max_to_mean",
    "fp8_rounded",
}

FORWARD = {"format": "mxfp4", "scale": "std", "rotation": "hadamard32", "estimator": "clip"}
GRADIENT = {"format": "mxfp4", "scale": "floor_three_quarters", "rotation": "hadamard32"}
AGAIN = GRADIENT | {"source": "forward"}
QUARTET = {  # as the recipe, but without random signs
    "name": "quartet_unsigned",
    "fprop": {"x": FORWARD, "w": FORWARD},
    "dgrad": {"dy": GRADIENT, "w": AGAIN},
    "wgrad": {"dy": GRADIENT, "x": AGAIN},
}

# ------------------------------------------------------------------------------------------------------- one operand


def observed(recipe: str | dict[str, Any], backend: str, x: Tensor, weight: Tensor, dy: Tensor) -> list[Observed]:
    """Every operand of one forward and backward in float32."""
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    qtrain.convert(model, recipe, backend=backend)  # pyright: ignore[reportArgumentType]
    layer = model[0]
    assert isinstance(layer, QuantLinear)
    layer.weight.data.copy_(weight)
    seen: list[Observed] = []
    layer.observer = Observer(seen.append, lambda _: None)
    qtrain.set_step(model, 0, 0)
    model(x.clone().requires_grad_()).backward(dy)
    return seen


def numbers(seen: Observed, max_lines: int) -> dict[str, float]:
    return {name: float(value) for name, value in operand_health(seen, max_lines).items()}


def batch(tokens: int = T) -> tuple[Tensor, Tensor, Tensor]:
    """x (tokens, K) with heavy tails, weight (N, K), dy (tokens, N) far smaller and of another shape of tail."""
    draw = np.random.default_rng(0)
    arrays = draw.standard_t(4, (tokens, K)), draw.normal(size=(N, K)) * 0.02, draw.laplace(size=(tokens, N)) * 1e-12
    x, weight, dy = (torch.tensor(array, dtype=torch.float32) for array in arrays)
    return x, weight, dy


def outliers(x: np.ndarray) -> dict[str, float]:
    return {"kurtosis": (x**4).mean() / (x**2).mean() ** 2, "max_to_mean": np.abs(x).max() / np.abs(x).mean()}


def decibels(x: np.ndarray, x_hat: np.ndarray) -> float:
    return 10 * np.log10((x**2).sum() / ((x_hat - x) ** 2).sum())


def mxfp8(x: np.ndarray) -> np.ndarray:
    """x quantised along its last dim, whose last block may be short."""
    blocks = np.split(x, range(32, x.shape[-1], 32), axis=-1)
    return np.concatenate([mxfp8_block(block) for block in blocks], axis=-1)


def mxfp8_block(x: np.ndarray) -> np.ndarray:
    largest = np.abs(x).max(-1, keepdims=True)
    scale = np.vectorize(lambda a: 2.0 ** math.ceil(math.log2(a / 448)) if a else 1.0)(largest)
    return oracle.nearest(x / scale, oracle.minifloat_grid(4, 3, 448)) * scale


def filled(x: np.ndarray, multiple: int) -> np.ndarray:
    """Zeros behind the last dim, to a multiple."""
    return np.pad(x, ((0, 0), (0, -x.shape[1] % multiple)))


def quartet_operands(tokens: int) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]]:
    """use -> what comes in, what enters the rounding, what leaves it, and which elements pass a gradient; each with
    the contraction dim last."""
    x, w, dy = (tensor.double().numpy() for tensor in batch(tokens))
    turn = oracle.rotation(32)
    rotated_x, rotated_w = oracle.rotate(x, turn), oracle.rotate(w, turn)
    (held_x, mask_x), (held_w, mask_w) = oracle.quartet_forward(rotated_x), oracle.quartet_forward(rotated_w)
    found: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]] = {
        "fprop.x": (x, rotated_x, held_x, mask_x),
        "fprop.w": (w, rotated_w, held_w, mask_w),
    }
    for use, values in (("dgrad.dy", dy), ("dgrad.w", held_w.T), ("wgrad.dy", dy.T), ("wgrad.x", held_x.T)):
        rotated = oracle.rotate(filled(values, 32), turn)
        found[use] = values, rotated, oracle.quartet_backward(rotated), None
    return found


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("tokens", [T, 33])
@pytest.mark.parametrize(("max_lines", "stride"), [(T + K, 1), (48, 3)])
def test_every_operand_has_the_health_of_a_float64_computation(
    backend: str, tokens: int, max_lines: int, stride: int
) -> None:
    """Of all lines, and of every third: 48 of 64, 96 or 128 lines are one in two or three, and two is even. Of 33
    tokens, the zeros that make them 64 are in the blocks that wgrad quantises, and no outliers' background."""
    found = {seen.use: numbers(seen, max_lines) for seen in observed(QUARTET, backend, *batch(tokens))}
    expected = quartet_operands(tokens)
    assert found.keys() == expected.keys()
    for use, (values, rotated, held, mask) in expected.items():
        every = stride if len(rotated) > max_lines else 1
        x, x_hat = rotated[::every], held[::every]
        wanted = {
            "sqnr_db": decibels(x, x_hat),
            "clipped": 0.0 if mask is None else 1 - mask[::every].mean(),
            "scale_underflow": 0.0,
            "scale_overflow": 0.0,
        }
        wanted |= outliers(values)
        wanted |= {} if mask is None else {"mask_density": mask[::every].mean()}
        assert found[use] == pytest.approx(wanted, rel=2e-5, abs=1e-7), use


def test_zeros_that_fill_up_tokens_change_neither_outliers_nor_errors() -> None:
    """MXFP8, unrotated, of 33 tokens: block by block of what came in, the last one of a single token."""
    x, weight, dy = batch(33)
    found = {seen.use: numbers(seen, T + K) for seen in observed("mxfp8", "reference", x, weight, dy)}
    for use, tensor in (("dgrad.dy", dy), ("wgrad.dy", dy.T), ("fprop.x", x), ("wgrad.x", x.T)):
        values = tensor.double().numpy()
        wanted = outliers(values) | {"sqnr_db": decibels(values, mxfp8(values))}
        assert {name: found[use][name] for name in wanted} == pytest.approx(wanted, rel=2e-5), use


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("recipe", ["quartet_ii", "nvidia_nvfp4", "fp8_blockwise", "tetrajet_v2_baseline"])
def test_a_gaussian_gradient_of_few_tokens_has_no_outliers(recipe: str, backend: str) -> None:
    """Filled up to 128 tokens, 33 would have a kurtosis of 12."""
    draw = torch.Generator().manual_seed(0)
    x, weight, dy = (torch.randn(rows, 128, generator=draw) for rows in (33, 128, 33))
    found = {seen.use: numbers(seen, 48) for seen in observed(recipe, backend, x, weight, dy)}
    wanted = outliers(dy.double().numpy())
    assert 2.5 < wanted["kurtosis"] < 3.5
    for use in ("dgrad.dy", "wgrad.dy"):
        assert {name: found[use][name] for name in wanted} == pytest.approx(wanted, rel=2e-5), use


@pytest.mark.parametrize("tokens", [33, 256])
def test_outliers_are_those_before_the_rotation_of_rows(tokens: int) -> None:
    """HALO-2 spreads the outliers of dgrad.dy over its tokens: they are counted before, the error is taken after."""
    x, weight, _ = batch(tokens)
    draw = np.random.default_rng(1)
    gradient = draw.normal(size=(tokens, N)) * np.where(draw.random((tokens, N)) < 0.01, 100.0, 1.0)
    dy = torch.tensor(gradient, dtype=torch.float32)
    found = {seen.use: numbers(seen, 1000) for seen in observed("halo_2", "reference", x, weight, dy)}
    values = dy.double().numpy()
    wanted = outliers(values)
    assert wanted["kurtosis"] > 100
    turned = oracle.rotate(filled(values.T, 256), oracle.rotation(256))
    for use, entering in (("dgrad.dy", turned), ("wgrad.dy", values)):
        scale = np.abs(entering).max() / 127
        wanted["sqnr_db"] = decibels(entering, np.round(entering / scale) * scale)
        assert {name: found[use][name] for name in wanted} == pytest.approx(wanted, rel=2e-5), use


def made(spec: QuantSpec, x: Tensor, dim: int = -1, key: Tensor | None = None) -> Observed:
    quantizer = Quantizer.build(spec, "reference")
    operand = quantizer.operand(x, quantizer.layout((x.shape[0], x.shape[1]), dim, blocks=True), key=key)
    return Observed("fprop.x", quantizer, x, None, dim, operand)


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("max_lines", [1000, 2])
def test_blocks_beyond_the_range_of_their_scales_are_counted(dim: int, max_lines: int) -> None:
    """NVFP4: the tensor's largest magnitude, 6, is 6 at an E4M3 scale of 448, so a block asks for less than the least
    one, 2^-9, where its own is below 6 * 2^-9 / 448. Just above, the scale is rounded down and clips."""
    x = torch.ones(4, 64)
    x[:, :16] = 6.0  # the largest magnitude, in every line
    edge = 6 * 2.0**-9 / 448
    x[:, 16:32] = edge * 0.99
    x[:, 32:48] = edge * 1.01
    x[:, 48:] = 0.0
    seen = made(QuantSpec(format="nvfp4"), x if dim == -1 else x.T.contiguous(), dim)
    health = numbers(seen, max_lines)
    assert (health["scale_underflow"], health["scale_overflow"], health["clipped"]) == (1 / 4, 0.0, 1 / 4)

    x[0, 20] = float("inf")  # one of 16 blocks of MXFP4 over 32
    health = numbers(made(QuantSpec(format="mxfp4"), x), 1000)
    assert (health["scale_underflow"], health["scale_overflow"]) == (0.0, 1 / 8)


def test_float16_scales_end_at_its_subnormals() -> None:
    x = torch.zeros(4, 32)
    x[:, 0] = 7 * torch.tensor([2.0**-24 * 0.99, 2.0**-24, 65504.0, 65504.0 * 1.01])
    health = numbers(made(QuantSpec(format="int4_sym/32/float16"), x), 1000)
    assert (health["scale_underflow"], health["scale_overflow"]) == (1 / 4, 1 / 4)


@pytest.mark.parametrize("dim", [-1, -2])
def test_beside_a_zero_point_both_ends_of_the_range_count(dim: int) -> None:
    """The range is 15 steps of 1. Its lower end, -4.4, lies below level 0 where the zero point is 4, and 10.6 below
    level 15. The scale is of the range, however far zero lies from its ends."""
    x = torch.zeros(6, 64)
    x[:, 0], x[:, 1], x[:, 32] = -4.4, 10.6, 15 / 16
    spec = QuantSpec(format="int4_asym/32/float16")
    for lines in (1000, 2):
        health = numbers(made(spec, x if dim == -1 else x.T.contiguous(), dim), lines)
        assert (health["clipped"], health["scale_underflow"], health["scale_overflow"]) == (1 / 64, 0.0, 0.0)
    x[0, 0], x[0, 1], x[1, :2], x[1, 2] = -8 * 65504.0, 8 * 65504.0, 0.0, 15 * 2.0**-24 * 0.99
    health = numbers(made(spec, x if dim == -1 else x.T.contiguous(), dim), 1000)
    assert (health["scale_underflow"], health["scale_overflow"]) == pytest.approx((1 / 12, 1 / 12))


def test_tiles_that_rows_fill_in_part_are_counted_once() -> None:
    """16x16 tiles of a (24, 40) matrix: 2 x 3, of which one holds nothing but magnitudes without a scale. A largest
    magnitude of 11 is beyond the grid where the tile's rule leaves it there."""
    x = torch.full((24, 40), 6.0)
    x[16:, 32:] = 1e-6
    health = numbers(made(QuantSpec(format="e2m1/16x16/e4m3"), x), 2)
    assert (health["scale_underflow"], health["clipped"]) == (pytest.approx(1 / 6), 0.0)
    x = torch.full((24, 40), 4.0)
    x[0, 0] = 7.9  # floor: 2^2 / 2^2, so the largest code is 6
    health = numbers(made(QuantSpec(format="e2m1/16x16/e8m0", scale="floor"), x), 2)
    assert health["clipped"] == pytest.approx(1 / (24 * 40))


def test_rows_with_scales_of_their_own() -> None:
    """INT4, centred, under the Gaussian fit: each row's own largest code, and no scales that could run out."""
    rows = torch.randn(50, 512, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 9, 50)[:, None]
    health = numbers(made(QuantSpec(format="int4", estimator="trust"), rows), 1000)
    x = rows.double().numpy()
    scale = np.sqrt((x**2).mean(1, keepdims=True)) * 2.513930578568423 / 7.5
    x_hat = oracle.nearest(np.clip(x / scale, -7.5, 7.5), oracle.centred_grid(4)) * scale
    assert health == pytest.approx(
        {
            "sqnr_db": decibels(x, x_hat),
            "clipped": (np.abs(x) > 7.5 * scale).mean(),
            "mask_density": (np.abs(x_hat - x) <= 0.5 * scale).mean(),
            **outliers(x),
        },
        rel=2e-5,
    )


def test_integers_are_measured_as_they_are_multiplied() -> None:
    quantizer = Quantizer.build(QuantSpec(format="int8"), "reference")
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    operands = [quantizer.operand(x, quantizer.layout((8, 256), storage=each)) for each in ("int8", "float32")]
    held, floats = (numbers(Observed("fprop.x", quantizer, x, None, -1, operand), 3) for operand in operands)
    assert held == floats


# ---------------------------------------------------------------------------------------------------------- in a run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), ["red", "green", "blue"], 30)


@pytest.fixture
def small(corpus: Path, tmp_path: Path) -> list[str]:
    """Four steps of two micro-batches of 2 x 64 tokens."""
    return [
        "backend=reference", "model.dim=128", "model.ffn_dim=128", "model.n_layers=1", "model.seq_len=64",
        "trainer.tokens=1024", "trainer.batch_tokens=256", "trainer.micro_batch_size=2", "callbacks.log_every_steps=1",
        "data.source=text", f"data.files={corpus}/*.txt",
        f"data.cache_dir={corpus}/cache", "data.val_tokens=128", f"run_root={tmp_path}/runs",
    ]  # fmt: skip


def trained(tmp_path: Path, name: str) -> tuple[list[dict[str, Any]], dict[str, Tensor], list[dict[str, Any]]]:
    """Training and validation lines without what a clock or the memory says, final weights, telemetry lines."""
    (path,) = (tmp_path / "runs").glob(f"{name}-????????")
    directory = RunDirectory(path)
    lines = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    health = [line for line in lines if any(key.startswith(("quant/", "grad/")) for key in line)]
    unclocked = ("step", "tokens", "flops", "loss", "lr", "grad_norm", "val_loss", "val_bits_per_byte")
    results = [{key: line[key] for key in unclocked if key in line} for line in lines if line not in health]
    return results, last_weights(directory.path), health


WATCHED = ["callbacks.telemetry_every_steps=2", "callbacks.telemetry_gradients=true", "name=watched"]


@pytest.mark.parametrize(
    ("recipe", "uses"),
    [
        (["recipe=quartet_ii"], {"fprop.x", "fprop.w", "dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x"}),
        (["recipe=quartet_v1", "trainer.precision=32-true"],
         {"fprop.x", "fprop.w", "dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x"}),
        (["recipe=lsq"], {"fprop.x", "fprop.w"}),
        (["recipe=quest_weight_only"], {"fprop.w"}),
        (["recipe=quest_sparse"], {"fprop.x", "fprop.w"}),
        (["recipe=halo_2"], {"fprop.x", "fprop.w", "dgrad.dy", "wgrad.dy"}),
        (["recipe=mxfp8", "gemm=fp8"], {"fprop.x", "fprop.w", "dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x"}),
    ],
)  # fmt: skip
def test_watching_changes_no_bit(small: list[str], tmp_path: Path, recipe: list[str], uses: set[str]) -> None:
    run(compose([*small, *recipe, "callbacks.telemetry_every_steps=0", "name=unwatched"]))
    run(compose([*small, *recipe, *WATCHED]))
    (plain, weights, none), (watched, same, health) = (trained(tmp_path, name) for name in ("unwatched", "watched"))
    assert plain == watched and none == []
    assert weights.keys() == same.keys()
    assert all(torch.equal(weight, same[name]) for name, weight in weights.items())
    assert [(line["step"], line["tokens"]) for line in health] == [(2, 512), (4, 1024)]
    layers = [f"layers.0.{name}" for name in ("attention.q", "attention.k", "attention.v", "attention.o")]
    layers += [f"layers.0.mlp.{name}" for name in ("gate", "up", "down")]
    for line in health:
        keys = [key.split("/") for key in line if key.startswith("quant/")]
        assert {(layer, use) for _, layer, use, _ in keys} == {(layer, use) for layer in layers for use in uses}
        assert {metric for *_, metric in keys} <= METRICS
        gradients = {key for key in line if key.startswith("grad/")}
        assert gradients == {f"grad/{layer}/{what}" for layer in layers for what in ("cosine", "projection")}


def test_layers_in_high_precision_have_no_health(small: list[str], tmp_path: Path) -> None:
    run(compose([*small, "recipe=bf16", *WATCHED, "name=bf16"]))
    assert trained(tmp_path, "bf16")[2] == []
    run(compose([*small, "recipe=quest", "recipe.high_precision_after=0.5", *WATCHED]))
    assert [line["step"] for line in trained(tmp_path, "watched")[2]] == [2]


class Probe(observer.Observer):
    """By torch's own hooks on one layer: its input, the gradient of its output, and its weight's gradient, in the first
    micro-batch of step 4; beside the gradient that a model never converted has there."""

    def __init__(self, name: str):
        self.name = name
        self.module: Any = None
        self.input = self.grad_output = self.grad_weight = self.exact = torch.zeros(())
        self.remove: list[Callable[[], None]] = []
        self.batch = torch.zeros(())

    def on_micro_batch_start(self, step: int, micro_batch: int, batch: Tensor) -> None:
        if (step, micro_batch) != (3, 0):
            return
        layer = self.module.model.get_submodule(self.name)
        self.batch = batch

        def forward(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.input = inputs[0].detach().clone()

        def backward(_: nn.Module, grads: tuple[Tensor, ...]) -> None:
            self.grad_output = grads[0].detach().clone()

        handles = layer.register_forward_pre_hook(forward), layer.register_full_backward_pre_hook(backward)
        self.remove = [handle.remove for handle in handles]

    def on_backward_end(self) -> None:
        if not self.remove:
            return
        for remove in self.remove:
            remove()
        self.remove = []
        self.grad_weight = (
            2 * self.module.model.get_parameter(f"{self.name}.weight").grad.clone()
        )  # of two micro-batches
        plain = Decoder(self.module.config.model, self.module.plan.vocab_size)
        plain.load_state_dict(self.module.model.state_dict())
        tokens = self.batch
        nn.functional.cross_entropy(plain(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        exact = plain.get_parameter(f"{self.name}.weight").grad
        assert exact is not None
        self.exact = exact


def test_what_is_written_is_of_the_step_that_trained(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MXFP8 of unrotated operands in float32: what the quantisers saw is what torch's hooks see."""
    probe, build = Probe("layers.0.mlp.up"), Session.observers

    def with_probe(self: Session) -> list[observer.Observer]:
        probe.module = self.module
        measure, *others = build(self)
        return [measure, probe, *others]

    monkeypatch.setattr(Session, "observers", with_probe)
    run(compose([*small, "recipe=mxfp8", "trainer.precision=32-true", *WATCHED]))
    (line,) = [line for line in trained(tmp_path, "watched")[2] if line["step"] == 4]
    x, dy = (tensor.double().flatten(0, 1).numpy() for tensor in (probe.input, probe.grad_output))
    assert x.shape == (128, 128)
    every = 3  # 128 lines over MAX_LINES, made odd
    assert MAX_LINES == 64
    for use, values in (("fprop.x", x), ("wgrad.x", x.T), ("dgrad.dy", dy), ("wgrad.dy", dy.T)):
        found = {name: line[f"quant/layers.0.mlp.up/{use}/{name}"] for name in ("kurtosis", "max_to_mean", "sqnr_db")}
        assert found == pytest.approx(
            outliers(values) | {"sqnr_db": decibels(values[::every], mxfp8(values[::every]))}, rel=2e-5
        ), use
    found, exact = (tensor.double().flatten().numpy() for tensor in (probe.grad_weight, probe.exact))
    cosine = found @ exact / np.sqrt((found @ found) * (exact @ exact))
    assert 0.9 < cosine < 0.9999
    assert line["grad/layers.0.mlp.up/cosine"] == pytest.approx(cosine, rel=1e-5)
    assert line["grad/layers.0.mlp.up/projection"] == pytest.approx(found @ exact / (exact @ exact), rel=1e-5)


@pytest.mark.parametrize(
    "more",
    [
        ["recipe=quest_weight_only", "+tune.rows={fraction: 0.3}", "optimizer.weight_decay=0"],
        ["recipe=ste", "+tune.teacher={weight: 0.7, temperature: 2.0}"],
        ["recipe=ste", "+tune.teacher={}", "+tune.rows={}", "optimizer.weight_decay=0"],
    ],
    ids=["rows", "teacher", "both"],
)
def test_gradients_are_compared_with_those_of_what_trains(more: list[str]) -> None:
    """The textbook in float64: of the rows that train alone, and of the loss that a teacher gives."""
    config = compose(
        ["model.dim=128", "model.ffn_dim=128", "model.n_layers=1", "model.seq_len=16", "trainer.batch_tokens=64",
         "trainer.micro_batch_size=2", "trainer.precision=32-true", "backend=reference", *more]
    )  # fmt: skip
    plan, model = make_plan(config, 61), build_model(config, 61)
    student, teacher = (Decoder(config.model, 61).double() for _ in range(2))
    student.load_state_dict(model.state_dict(), strict=False)
    settings = config.tune and config.tune.teacher
    module = CausalLM(config, plan, model, teacher=copy.deepcopy(teacher).float() if settings else None)
    written: list[dict[str, float]] = []
    recorder: Any = SimpleNamespace(module=module, write=lambda step, values: written.append(values))
    telemetry, batch = Telemetry(recorder, 1, True), torch.randint(61, (2, 17))
    telemetry.on_micro_batch_start(0, 0, batch)
    (module.micro_batch_loss(model, batch, 0, 0, 0, 1) / plan.micro_batches).backward()
    telemetry.on_backward_end()
    telemetry.on_step_end(1)

    logits, targets = student(batch[:, :-1]), batch[:, 1:]
    share, degrees = (settings.weight, settings.temperature) if settings else (0.0, 1.0)
    wanted = (teacher(batch[:, :-1]).detach() / degrees).softmax(-1)
    found = (logits / degrees).log_softmax(-1)
    divergence = (wanted * (wanted.log() - found)).sum(-1).mean() * degrees**2
    plain = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    (share * divergence + (1 - share) * plain).backward()
    for name in ("layers.0.attention.q", "layers.0.mlp.up"):
        layer: Any = model.get_submodule(name)
        rows = slice(None) if layer.rows is None else layer.rows
        assert config.tune is not None and (layer.rows is not None) == (config.tune.rows is not None)
        exact = student.get_parameter(f"{name}.weight").grad
        assert exact is not None
        mine, exact = (2 * layer.weight.grad[rows].double()).flatten(), exact[rows].flatten()
        cosine = mine @ exact / (mine.norm() * exact.norm())
        assert written[0][f"grad/{name}/cosine"] == pytest.approx(float(cosine), rel=1e-5)
        projection = mine @ exact / exact.square().sum()
        assert written[0][f"grad/{name}/projection"] == pytest.approx(float(projection), rel=1e-5)


def test_a_value_that_no_json_holds_is_left_out(tmp_path: Path) -> None:
    """Of a gradient of zeros there is no error in decibels."""
    written: list[dict[str, float]] = []
    recorder: Any = SimpleNamespace(module=None, write=lambda step, values: written.append(values))
    telemetry = Telemetry(recorder, 1, False)
    telemetry.values = {
        "quant/a/dgrad.dy/sqnr_db": torch.tensor(torch.nan),
        "quant/a/dgrad.dy/clipped": torch.zeros(()),
    }
    telemetry.on_step_end(1)
    assert written == [{"quant/a/dgrad.dy/clipped": 0.0}]
