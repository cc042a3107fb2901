"""Killed at any moment and started again, a run ends as if it had never been stopped: weights, optimiser state,
losses and stochastic bits, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import be_a_command, write_corpus
from run_state import last_tensors

import qtrain.train
from qtrain.training import checkpoint
from qtrain.training.checkpoint import list_checkpoints

ROOT = Path(__file__).parents[1]
STEPS = 40
SMALL = [
    "recipe=quartet_v1",  # stochastic rounding in all of the backward
    "backend=reference",
    "model.dim=64",
    "model.ffn_dim=96",
    "model.n_layers=1",
    "model.seq_len=32",
    f"trainer.tokens={STEPS * 128}",
    "trainer.batch_tokens=128",
    "trainer.micro_batch_size=2",  # two micro-batches a step
    "callbacks.log_every_steps=1",
    "callbacks.val_every_steps=7",
    "callbacks.checkpoint_every_steps=3",
    "data.source=text",
    "data.val_tokens=256",
]
TIMINGS = {"tokens_per_second", "data_wait", "memory_bytes"}

# Each run is a process of its own, forked from a server that has imported everything: as train.py, seconds sooner.
forked = multiprocessing.get_context("forkserver")
forked.set_forkserver_preload(["qtrain.training.session", "qtrain.train"])


def run_train(arguments: list[str], shown: Path, dies_while_saving: bool) -> None:
    """What train.py does, in the process that calls this; its output goes to the file `shown`."""
    be_a_command(shown)
    sys.argv = ["train.py", *arguments]
    if dies_while_saving:
        checkpoint.write_synced = dying(checkpoint.write_synced)
    qtrain.train.main()


def dying(write: Callable[[Path, str], None]) -> Callable[[Path, str], None]:
    """What writes the values and the manifest of a checkpoint, but the second checkpoint's manifest ends the process by
    SIGKILL, half written."""
    calls = []

    def writing(path: Path, text: str) -> None:
        calls.append(path)
        if len(calls) < 4:
            return write(path, text)
        path.write_text(text[: len(text) // 2])
        return os.kill(os.getpid(), signal.SIGKILL)

    return writing


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    words = ["low", "precision", "training", "of", "language", "models", "needs", "care", "\n"]
    return write_corpus(tmp_path_factory.mktemp("corpus"), words, 40)


class Run:
    """A training process that has begun."""

    def __init__(self, corpus: Path, run_dir: Path, overrides: tuple[str, ...], dies_while_saving: bool):
        settings = [f"data.files={corpus}/*.txt", f"data.cache_dir={corpus}/cache", f"run_dir={run_dir}"]
        self.run_dir, self.shown = run_dir, run_dir.with_suffix(".out")
        self.shown.write_text("")
        arguments = [*SMALL, *settings, *overrides], self.shown, dies_while_saving
        self.process = forked.Process(target=run_train, args=arguments)
        self.process.start()

    def send_signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def ended(self) -> tuple[int | None, str]:
        """Exit status, negative for a signal, and output."""
        self.process.join()
        return self.process.exitcode, self.shown.read_text()

    def wait_for(self, step: int) -> None:
        while steps_done(self.run_dir) < step:
            assert self.process.is_alive(), self.shown.read_text()
            time.sleep(0.002)


def train(corpus: Path, run_dir: Path, *overrides: str, dies_while_saving: bool = False) -> tuple[int | None, str]:
    return Run(corpus, run_dir, overrides, dies_while_saving).ended()


def steps_done(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def kill_after(corpus: Path, run_dir: Path, step: int, delay: float, *overrides: str) -> None:
    """SIGKILL `delay` seconds after the line of `step` is there."""
    process = Run(corpus, run_dir, overrides, False)
    process.wait_for(step)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    assert process.ended()[0] == -signal.SIGKILL


def assert_same_run(run_dir: Path, undisturbed: Path) -> None:
    for directory in (run_dir, undisturbed):
        assert list_checkpoints(directory / "checkpoints")[-1][0] == STEPS
    ours, theirs = last_tensors(run_dir), last_tensors(undisturbed)
    assert ours.keys() == theirs.keys() and any(name.startswith("optimizer.") for name in ours)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert metrics(run_dir) == metrics(undisturbed)


def metrics(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    code, output = train(corpus, run_dir)
    assert code == 0, output
    assert steps_done(run_dir) == STEPS
    return run_dir


def test_five_kills_change_nothing(corpus, undisturbed, tmp_path):
    run_dir = tmp_path / "killed"
    draw = random.Random(1)
    kill_after(corpus, run_dir, 1, 0.0)  # before the first checkpoint
    kill_after(corpus, run_dir, 8, draw.uniform(0, 0.05))
    code, output = train(corpus, run_dir, dies_while_saving=True)
    assert code == -signal.SIGKILL, output
    assert list((run_dir / "checkpoints").glob(".step-*")), "the kill came while a checkpoint was written"
    kill_after(corpus, run_dir, 21, draw.uniform(0, 0.05))
    kill_after(corpus, run_dir, 32, draw.uniform(0, 0.05))
    code, output = train(corpus, run_dir)
    assert code == 0, output
    assert "resuming at step" in output
    assert_same_run(run_dir, undisturbed)
    assert (run_dir / "metrics.discarded.jsonl").exists()


def test_another_number_of_workers_after_the_restart_changes_nothing(corpus, undisturbed, tmp_path):
    run_dir = tmp_path / "workers"
    kill_after(corpus, run_dir, 17, 0.01, "data.num_workers=1")
    code, output = train(corpus, run_dir, "data.num_workers=2")
    assert code == 0, output
    assert_same_run(run_dir, undisturbed)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["quartet_v1", "quest"])
def test_a_kill_changes_nothing_on_a_gpu(corpus, tmp_path, recipe):
    """By Triton's quantisers, and the products that the device takes."""
    on_gpu = ("trainer.device=cuda", "backend=triton", f"recipe={recipe}", "model.dim=128", "model.ffn_dim=256")
    code, output = train(corpus, tmp_path / "undisturbed", *on_gpu)
    assert code == 0, output
    kill_after(corpus, tmp_path / "killed", 17, 0.01, *on_gpu)
    code, output = train(corpus, tmp_path / "killed", *on_gpu)
    assert code == 0 and "resuming at step" in output, output
    assert_same_run(tmp_path / "killed", tmp_path / "undisturbed")


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_a_run_saves_the_step(corpus, undisturbed, tmp_path, signal_number):
    run_dir = tmp_path / "interrupted"
    process = Run(corpus, run_dir, (), False)
    process.wait_for(10)
    process.send_signal(signal_number)
    code, output = process.ended()
    assert code == 130, output
    assert "same command continues" in output
    stopped = list_checkpoints(run_dir / "checkpoints")[-1][0]
    assert stopped == steps_done(run_dir), "the last line is the saved step: no work was lost"
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "interrupted"
    assert train(corpus, run_dir)[0] == 0
    assert_same_run(run_dir, undisturbed)
