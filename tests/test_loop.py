"""The training loop: against a bare one, under a stock Trainer, and when steps go wrong."""

from __future__ import annotations

import gzip
import json
import math
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import lightning
import pytest
import torch
from conftest import write_corpus
from run_state import last_values, last_weights
from torch import Tensor, nn
from torch.nn import functional as F

from qtrain.config import Config
from qtrain.data.batches import TokenBatches
from qtrain.data.prepare import prepare
from qtrain.errors import DivergedError, StoppedError
from qtrain.optim.groups import build_optimizer
from qtrain.plan import make_plan
from qtrain.quant import calibrate, set_step
from qtrain.runs.directory import RunDirectory
from qtrain.train import compose
from qtrain.training import causal_lm, divergence, parallel
from qtrain.training.build import build_model
from qtrain.training.causal_lm import CausalLM
from qtrain.training.checkpoint import Saver, list_checkpoints
from qtrain.training.divergence import Guard, RewindError, Spikes
from qtrain.training.observers import Observer
from qtrain.training.parallel import Ranks
from qtrain.training.saves import Saves
from qtrain.training.session import Session, open_session, run
from qtrain.training.stop import StopRequest
from qtrain.training.world import World

STEPS = 6
SMALL = [
    "backend=auto",
    "model.dim=128",
    "model.ffn_dim=128",
    "model.n_layers=1",
    "model.seq_len=16",
    f"trainer.tokens={STEPS * 64}",
    "trainer.batch_tokens=64",
    "trainer.micro_batch_size=2",  # two micro-batches a step
    "trainer.precision=32-true",
    "trainer.device=cpu",
    "callbacks.log_every_steps=1",
    "callbacks.val_every_steps=100",
    "callbacks.progress_bar=false",
    "data.source=text",
    "data.val_tokens=64",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), ["red", "green", "blue"], 40)


def settings(corpus: Path, run_dir: Path, *more: str) -> Config:
    paths = [f"data.files={corpus}/*.txt", f"data.cache_dir={corpus}/cache", f"run_dir={run_dir}"]
    return compose([*SMALL, *paths, *more])


def batches(config: Config) -> list[Tensor]:
    """The micro-batches of the whole run."""
    corpus = prepare(config.data, config.tokenizer, progress=False)
    data = TokenBatches(corpus, seq_len=16, seed=config.seed, micro_batch_size=2, num_workers=0)
    return list(data.train(0, STEPS * 4))


@pytest.mark.parametrize("recipe", ["quartet_v1", "lsq"])
def test_the_loop_trains_as_twenty_lines_of_pytorch(corpus: Path, tmp_path: Path, recipe: str) -> None:
    config = settings(corpus, tmp_path / "run", f"recipe={recipe}")
    run(config)
    model = build_model(config, 257)
    optimizer = build_optimizer(model, config.optimizer)
    for number, tokens in enumerate(batches(config)):
        step, micro_batch = divmod(number, 2)
        if number == 0:
            calibrate(model, tokens[:, :-1])
        set_step(model, step, micro_batch)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        (loss / 2).backward()
        if micro_batch == 1:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = config.optimizer.lr * config.scheduler.factor(step, STEPS)
            optimizer.step()
            optimizer.zero_grad()
    ours = last_weights(tmp_path / "run")
    for name, weight in model.state_dict().items():
        assert torch.equal(ours[name], weight), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recipe", ["quartet_v1", "lsq"])
def test_a_stock_trainer_trains_the_same(corpus: Path, tmp_path: Path, recipe: str) -> None:
    config = settings(corpus, tmp_path / "run", f"recipe={recipe}")
    run(config)
    plan = make_plan(config, vocab_size=257)
    module = CausalLM(config, plan, build_model(config, 257))
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=STEPS, accumulate_grad_batches=plan.micro_batches, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(batches(config), batch_size=None))  # pyright: ignore
    ours = last_weights(tmp_path / "run")
    for name, weight in module.model.state_dict().items():
        assert torch.equal(ours[name], weight), name


def test_a_line_has_the_speed_and_memory_of_the_worst_rank(corpus: Path, tmp_path: Path) -> None:
    """Another rank is a thousand times slower, waits for all its data and holds a terabyte."""
    with open_session(settings(corpus, tmp_path / "run", "recipe=bf16")) as session:
        alone = session.ranks.maximum

        def with_a_slow_one(*values: float) -> list[float]:
            if len(values) != 3:
                return alone(*values)
            return [max(pair) for pair in zip(values, (1000.0, 1.0, 2.0**40), strict=True)]

        session.ranks.maximum = with_a_slow_one
        session.train()
    line = RunDirectory(tmp_path / "run").lines("loss")[-1]
    assert (line["tokens_per_second"], line["data_wait"], line["memory_bytes"]) == (0.1, 1.0, 2**40)


def test_a_trace_of_the_steps_asked_for(corpus: Path, tmp_path: Path) -> None:
    run(settings(corpus, tmp_path / "run", "recipe=quartet_v1", "callbacks.profile_steps=1"))
    with gzip.open(tmp_path / "run" / "profile" / "trace-rank0.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("qtrain::quantize_grad") == 2 * 7  # one step of two micro-batches, seven linear layers


# ------------------------------------------------------------------------------------------------------ steps go wrong


def poison(monkeypatch: pytest.MonkeyPatch, *forwards: int, factor: float = math.nan) -> None:
    """The training losses of these forwards (from 1) are multiplied by factor."""
    exact, calls = causal_lm.next_token_loss, []

    def poisoned(model: nn.Module, tokens: Tensor, **more: bool) -> Tensor:
        calls.append(0)
        return exact(model, tokens, **more) * (factor if len(calls) in forwards else 1.0)

    monkeypatch.setattr(causal_lm, "next_token_loss", poisoned)


class Watch(Observer):
    """The steps and first batches that were trained on."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Tensor]] = []

    def on_micro_batch_start(self, step: int, micro_batch: int, batch: Tensor) -> None:
        if micro_batch == 0:
            self.seen.append((step, batch.clone()))


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch, build = Watch(), Session.observers
    monkeypatch.setattr(Session, "observers", lambda self: [*build(self), watch])
    return watch


def test_a_step_that_is_skipped_leaves_the_weights(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 3 makes no update: the run goes on, with finite weights, which differ from an undisturbed run's."""
    run(settings(corpus, tmp_path / "calm", "recipe=bf16"))
    poison(monkeypatch, 5)
    config = settings(corpus, tmp_path / "run", "recipe=bf16", "trainer.on_divergence=skip")
    loss = run(config)
    assert loss is not None and math.isfinite(loss)
    assert "step 3: not finite" in " ".join(capsys.readouterr().out.split())
    assert [line["step"] for line in RunDirectory.of(config).lines("lr")] == [1, 2, 3, 4, 5, 6]
    ours, calm = last_weights(tmp_path / "run"), last_weights(tmp_path / "calm")
    assert any(not torch.equal(ours[name], weight) for name, weight in calm.items())


def test_no_state_is_saved_of_a_loss_that_was_not_finite(corpus: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Step 3 goes wrong, the checkpoint of step 4 is due, and no line of metrics comes before it."""
    poison(monkeypatch, 5)
    more = ["recipe=bf16", "callbacks.log_every_steps=100", "callbacks.checkpoint_every_steps=2"]
    with pytest.raises(DivergedError, match=r"step 3 is not finite.*step-00000002 \(step 2\)"):
        run(settings(corpus, tmp_path / "run", *more))
    assert [step for step, _ in list_checkpoints(tmp_path / "run" / "checkpoints")] == [2]


def test_losses_that_are_never_finite_end_the_run(corpus: Path, tmp_path: Path, monkeypatch: Any) -> None:
    poison(monkeypatch, *range(1, 100))
    more = ["recipe=bf16", "trainer.on_divergence=skip", "trainer.tokens=1280"]
    with pytest.raises(DivergedError, match=r"step 11 is not finite"):
        run(settings(corpus, tmp_path / "run", *more))


def test_a_run_goes_back_and_takes_the_data_that_comes_next(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: Watch
) -> None:
    """Step 4 goes wrong; the checkpoint is of step 2. Steps 3 to 6 are done again on what follows."""
    poison(monkeypatch, 8)
    more = ["recipe=quartet_v1", "trainer.on_divergence=rewind", "callbacks.checkpoint_every_steps=2"]
    config = settings(corpus, tmp_path / "run", *more)
    run(config)
    assert [step for step, _ in watch.seen] == [0, 1, 2, 3, 2, 3, 4, 5]
    order = [batch for _, batch in watch.seen]
    expected = batches(config)[::2]
    assert all(torch.equal(found, batch) for found, batch in zip(order, expected, strict=False))
    assert len({batch.numpy().tobytes() for batch in order}) == 8
    assert last_values(tmp_path / "run")["samples"] == 8 * 4
    assert [line["step"] for line in RunDirectory.of(config).lines("lr")] == [1, 2, 3, 4, 5, 6]


def test_a_spike_is_six_standard_deviations_above_the_last_128() -> None:
    draw = random.Random(0)
    spikes = Spikes()
    assert not any(spikes.sees(1e9 if number == 5 else draw.gauss(3, 0.1)) for number in range(64))
    spikes = Spikes()
    assert not any(spikes.sees(draw.gauss(3, 0.1)) for _ in range(500))
    recent = list(spikes.values)
    mean = sum(recent) / 128
    deviation = math.sqrt(sum((value - mean) ** 2 for value in recent) / 127)
    assert len(recent) == 128
    assert not spikes.sees(mean + 5.99 * deviation)
    spikes.values.pop()
    spikes.values.appendleft(recent[0])
    assert spikes.sees(mean + 6.01 * deviation)


class Others(Ranks):
    """Of two ranks, the other has a loss of its own."""

    loss = 0.0

    def __init__(self) -> None:
        self.rank, self.size = 0, 2

    def total(self, *values: float) -> list[float]:
        return [values[0] + self.loss / 2, 2 * values[1]]


def guard_of(**trainer: str) -> tuple[Guard, Others]:
    """A guard whose own rank finds nothing wrong."""
    ranks, settings = Others(), SimpleNamespace(**{"on_divergence": "stop", "on_spike": "ignore"} | trainer)
    module: Any = SimpleNamespace(
        config=SimpleNamespace(trainer=settings), step_loss=torch.tensor(1.0), grad_norm=torch.tensor(1.0)
    )
    return Guard(module, ranks), ranks


def test_ranks_judge_the_loss_of_all() -> None:
    """And steps in a row are counted from the last good one."""
    guard, ranks = guard_of(on_divergence="skip")
    for _ in range(3):
        ranks.loss = math.nan
        assert not any(guard.accepts(step) for step in range(9))
        ranks.loss = 1.0
        assert guard.accepts(9)


@pytest.mark.parametrize("action", ["skip", "rewind", "log", "ignore"])
def test_what_follows_a_spike(action: str, caplog: pytest.LogCaptureFixture) -> None:
    guard, ranks = guard_of(on_spike=action)
    for step in range(100):
        ranks.loss = 1.0 + step % 7 / 100
        assert guard.accepts(step)
    ranks.loss = 9.0
    if action == "rewind":
        with pytest.raises(RewindError, match="a spike of loss") as wrong:
            guard.accepts(100)
        assert wrong.value.step == 100
    else:
        assert guard.accepts(100) == (action != "skip")
    assert ("a spike of loss: loss 5, norm 1" in caplog.text) == (action in ("skip", "log"))


class Ending(Observer):
    """Ends the run before a step (from 0)."""

    def on_step_start(self, step: int) -> None:
        if step == 3:
            raise StoppedError(130)


def test_a_run_that_goes_on_sees_the_spike_that_it_would_have_seen(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 5 has a spike. The run that was stopped after step 3 has seen one loss before it."""
    monkeypatch.setattr(divergence, "Spikes", partial(Spikes, window=4))
    more = ["recipe=bf16", "trainer.on_spike=skip", "callbacks.checkpoint_every_steps=3"]
    with monkeypatch.context() as patch:
        poison(patch, 9, factor=100.0)
        run(settings(corpus, tmp_path / "whole", *more))
    parts, build = settings(corpus, tmp_path / "parts", *more), Session.observers
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(Session, "observers", lambda self: [*build(self), Ending()])
        run(parts)
    with monkeypatch.context() as patch:
        poison(patch, 3, factor=100.0)
        run(parts)
    assert last_values(tmp_path / "whole")["guard"] == last_values(tmp_path / "parts")["guard"]
    whole, resumed = (last_weights(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


# -------------------------------------------------------------------------------------------------------- when to save


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def saves_of(config: Config, clock: Clock) -> tuple[Saves, list[int]]:
    """The saving of a run without its files, and the steps that it has saved."""
    plan = make_plan(config, vocab_size=config.model.vocab_size or 32_000)
    saved: list[int] = []
    saver = MagicMock()
    saver.save = lambda directory, step, *_, **__: saved.append(step)
    module: Any = SimpleNamespace(config=config, plan=plan, model=None)
    return Saves(MagicMock(), saver, module, MagicMock(), MagicMock(), MagicMock(), Ranks(), None, clock), saved


def test_the_shipped_slurm_setting_finishes_a_run_of_days(monkeypatch: pytest.MonkeyPatch) -> None:
    """paper/quartet_800m at 400 TFLOP/s on one GPU, 24 hours a job, by a simulated clock. Each job is killed at its end
    without a warning; the next goes on from the last checkpoint."""
    monkeypatch.setattr("qtrain.training.saves.tensors_of", lambda *_: {})
    config = compose(["+experiment=paper/quartet_800m", "data=text", "data.files=x", "trainer.precision=bf16-mixed"])
    plan = make_plan(config, vocab_size=32_000)
    seconds = plan.flops / plan.steps / 4e14
    assert plan.steps * seconds > 3 * 24 * 3600, "it takes several jobs"
    step, jobs = 0, 0
    while step < plan.steps:
        clock = Clock()
        saves, saved = saves_of(config, clock)
        while step < plan.steps and clock.now + seconds < 24 * 3600:
            clock.now += seconds
            step += 1
            if saves.due(step):
                saves.save(step, step)
        step, jobs = saved[-1], jobs + 1
        assert jobs < 20
    assert jobs == math.ceil(plan.steps * seconds / (24 * 3600 - 15 * 60 - 2 * seconds))


def test_a_checkpoint_comes_after_so_many_minutes(corpus: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("qtrain.training.saves.tensors_of", lambda *_: {})
    config = settings(corpus, tmp_path, "recipe=bf16", "callbacks.checkpoint_every_steps=5", "trainer.tokens=6400")
    clock = Clock()
    saves, saved = saves_of(config, clock)
    for step in range(1, 21):
        clock.now += 240.0
        if saves.due(step):
            saves.save(step, step)
    assert saved == [4, 5, 9, 10, 14, 15, 19, 20]


def test_metrics_are_on_disk_before_the_checkpoint_that_counts_on_them(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    directory = RunDirectory(tmp_path / "run")
    exact = type(directory.log).sync

    def noting(log: Any) -> None:
        exact(log)
        synced.append(json.loads(log.path.read_text().splitlines()[-1])["step"])

    save = Saver.save
    monkeypatch.setattr(type(directory.log), "sync", noting)
    monkeypatch.setattr(Saver, "save", lambda saver, *rest, **more: (synced.append(0), save(saver, *rest, **more))[1])
    run(settings(corpus, tmp_path / "run", "recipe=bf16", "callbacks.checkpoint_every_steps=2"))
    assert synced == [2, 0, 4, 0, 6, 0]
    assert [step for step, _ in list_checkpoints(directory.checkpoints)] == [4, 6], "the newest two"


def test_a_last_validation_that_was_lost_with_the_power_is_made_again(corpus: Path, tmp_path: Path) -> None:
    """Its line was not on disk yet, an earlier one was, and the checkpoint of the last step: a wrong loss was reported
    as that of the run."""
    more = ["callbacks.val_every_steps=3", "callbacks.checkpoint_every_steps=4"]
    config = settings(corpus, tmp_path / "run", "recipe=bf16", *more)
    loss = run(config)
    directory = RunDirectory.of(config)
    assert [step for step, _ in list_checkpoints(directory.checkpoints)] == [4, STEPS]
    lines = [line for line in directory.metrics.read_text().splitlines(keepends=True) if '"val_loss"' in line]
    assert [json.loads(line)["step"] for line in lines] == [3, 6]
    directory.metrics.write_text(directory.metrics.read_text().replace(lines[1], ""))
    directory.write_summary(directory.summary | {"status": "running", "val_loss": None})
    assert run(config) == loss == directory.summary["val_loss"]


def test_a_signal_in_the_last_step_is_no_reason_to_stop(corpus: Path, tmp_path: Path, monkeypatch: Any) -> None:
    class Signals(Observer):
        def on_step_end(self, step: int) -> None:
            if step == STEPS:
                signal.raise_signal(signal.SIGTERM)

    build = Session.observers
    monkeypatch.setattr(Session, "observers", lambda self: [*build(self), Signals()])
    config = settings(corpus, tmp_path / "run", "recipe=bf16")
    assert run(config) is not None and RunDirectory.of(config).finished


# ---------------------------------------------------------------------------------------------------------------- stop


def test_a_schedulers_signal_is_handed_on_once_the_run_is_saved() -> None:
    """submitit's own handler queues the job again."""
    told: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: told.append(number))
    try:
        with pytest.raises(StoppedError) as stopped, StopRequest() as stop:
            with stop.noting():
                signal.raise_signal(signal.SIGUSR2)
                assert stop.asked == 75 and told == []
            raise StoppedError(stop.asked)
        assert told == [signal.SIGUSR2] and stopped.value.exit_code == 75
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_signal_while_ranks_part_is_too_late_to_change_the_ending(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All have saved and wait for each other. A rank that left now would look lost to the others."""

    class Signals(Observer):
        def on_step_end(self, step: int) -> None:
            if step == 3:
                signal.raise_signal(signal.SIGUSR1)
                monkeypatch.setattr(Ranks, "meet", lambda self: signal.raise_signal(signal.SIGTERM))

    build = Session.observers
    monkeypatch.setattr(Session, "observers", lambda self: [*build(self), Signals()])
    config = settings(corpus, tmp_path / "run", "recipe=bf16")
    with pytest.raises(StoppedError) as stopped:
        run(config)
    assert stopped.value.exit_code == 75
    assert RunDirectory.of(config).summary["status"] == "interrupted"


def test_outside_of_training_a_signal_ends_the_run_at_once() -> None:
    with pytest.raises(StoppedError) as stopped, StopRequest():
        signal.raise_signal(signal.SIGTERM)
        time.sleep(1)
    assert stopped.value.exit_code == 130


def test_a_second_interrupt_stops_at_once() -> None:
    with pytest.raises(StoppedError), StopRequest() as stop, stop.noting():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        assert stop.asked == 130, "who was asked to stop is not queued again"
        signal.raise_signal(signal.SIGINT)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The codes with which this process would have ended at once."""
    codes: list[int] = []
    monkeypatch.setattr("qtrain.training.stop.end_now", codes.append)
    return codes


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_second_interrupt_ends_a_process_that_waits_for_another(ended: list[int]) -> None:
    """In C++ it sees no exception: a thread ends it."""
    with StopRequest() as stop, stop.noting(), stop.ending_at_once():
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.1)
        assert ended == []
        with pytest.raises(StoppedError):
            signal.raise_signal(signal.SIGINT)
        wait_for(lambda: ended == [130])


def test_a_process_follows_its_launcher(ended: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """It saves while it trains, and ends at once elsewhere."""
    assert World(2, 1, "fabric").has_parent and World(2, 0, "torchrun").has_parent
    assert not World(2, 0, "fabric", starts_others=True).has_parent and not World(1, 0, "nobody").has_parent
    monkeypatch.setattr(parallel, "PARENT_SECONDS", 0.01)
    for trains in (True, False):
        parents = iter([7, 7])  # then another
        monkeypatch.setattr(parallel.os, "getppid", lambda parents=parents: next(parents, 1))
        with StopRequest() as stop:
            if trains:
                with stop.noting():
                    parallel._follow_parent(stop)
                    wait_for(lambda stop=stop: stop.asked == 75)
                assert ended == []
            else:
                parallel._follow_parent(stop)
                wait_for(lambda: ended == [75])
