"""Killed at any moment and started again, a run ends as if it had never been stopped: weights, optimiser state,
losses and stochastic bits, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qtrain.checkpoint import list_checkpoints, load_checkpoint

ROOT = Path(__file__).parents[1]
STEPS = 40
SMALL = [
    "recipe=quartet_v1",  # stochastic rounding in all of the backward
    "backend=reference",
    "model.dim=64",
    "model.ffn_dim=96",
    "model.seq_len=32",
    f"trainer.tokens={STEPS * 128}",
    "trainer.batch_tokens=128",
    "trainer.micro_batch_size=2",  # two micro-batches a step
    "callbacks.log_every_steps=1",
    "callbacks.val_every_steps=7",
    "callbacks.checkpoint_every_steps=3",
    "callbacks.sample_tokens=0",
    "data.source=text",
    "data.val_tokens=256",
]
TIMINGS = {"tokens_per_second", "data_wait", "memory_bytes"}

# Dies by SIGKILL inside the writing of the second checkpoint of the process, half of its bytes written.
DIE_WHILE_SAVING = """
import io, os, signal, torch
from qtrain.train import main
save, count = torch.save, []
def dying(obj, file, *a, **k):
    count.append(1)
    if len(count) < 2:
        return save(obj, file, *a, **k)
    whole = io.BytesIO(); save(obj, whole); file.write(whole.getvalue()[: whole.tell() // 2]); file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = dying
main()
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    words = ["low", "precision", "training", "of", "language", "models", "needs", "care", "\n"]
    draw = random.Random(0)
    for number in range(40):
        (folder / f"{number}.txt").write_text(" ".join(draw.choice(words) for _ in range(200)))
    return folder


def command(corpus: Path, run_dir: Path, *overrides: str, code: str | None = None) -> subprocess.Popen[str]:
    start = [sys.executable, "-c", code] if code else [sys.executable, "train.py"]
    settings = [f"data.files={corpus}/*.txt", f"data.cache_dir={corpus}/cache", f"run_dir={run_dir}"]
    return subprocess.Popen(
        [*start, *SMALL, *settings, *overrides],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def train(corpus: Path, run_dir: Path, *overrides: str, code: str | None = None) -> tuple[int, str]:
    process = command(corpus, run_dir, *overrides, code=code)
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def steps_done(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def wait_for(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while steps_done(run_dir) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.002)


def kill_after(corpus: Path, run_dir: Path, step: int, delay: float, *overrides: str) -> None:
    """SIGKILL `delay` seconds after the line of `step` is there."""
    process = command(corpus, run_dir, *overrides)
    wait_for(process, run_dir, step)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def assert_same_run(run_dir: Path, undisturbed: Path) -> None:
    (step, path), (other_step, other_path) = (
        list_checkpoints(run_dir / "checkpoints")[-1],
        list_checkpoints(undisturbed / "checkpoints")[-1],
    )
    assert step == other_step == STEPS
    ours, theirs = load_checkpoint(path), load_checkpoint(other_path)
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for name, weight in ours["state_dict"].items():
        assert torch.equal(weight, theirs["state_dict"][name]), name
    torch.testing.assert_close(ours["optimizer_states"], theirs["optimizer_states"], rtol=0, atol=0)
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
    code, output = train(corpus, run_dir, code=DIE_WHILE_SAVING)
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
    process = command(corpus, run_dir)
    wait_for(process, run_dir, 10)
    process.send_signal(signal_number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "same command continues" in output
    stopped = list_checkpoints(run_dir / "checkpoints")[-1][0]
    assert stopped == steps_done(run_dir), "the last line is the saved step: no work was lost"
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "interrupted"
    assert train(corpus, run_dir)[0] == 0
    assert_same_run(run_dir, undisturbed)
