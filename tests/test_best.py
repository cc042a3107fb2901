"""The best state by validation loss: kept, and a run that gets no better ends, wherever it was stopped before."""

from __future__ import annotations

import json
import logging
import shutil
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from conftest import write_corpus
from safetensors import safe_open
from safetensors.torch import load_file

from qtrain.config import Config, config_hash
from qtrain.runs.directory import RunDirectory
from qtrain.train import compose
from qtrain.training.checkpoint import folder_of, list_checkpoints, weights
from qtrain.training.session import run

BATCH, STEPS, PATIENCE = 64, 24, 3
SMALL = [
    "backend=auto", "trainer.precision=32-true", "model.dim=64", "model.ffn_dim=96", "model.n_layers=1",
    "model.seq_len=32", f"trainer.batch_tokens={BATCH}", "trainer.micro_batch_size=2", "optimizer.lr=0.3",
    "callbacks.log_every_steps=1", "callbacks.val_every_steps=1", "callbacks.checkpoint_every_steps=1",
    "callbacks.keep_checkpoints=99", "callbacks.progress_bar=false", "callbacks.keep_best=true", "recipe=bf16",
    "data=text", "data.val_tokens=128",
]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), ["low", "precision", "training", "needs", "care", "\n"], 40)


def settings(corpus: Path, root: Path, *more: str) -> Config:
    paths = [f"data.files={corpus}/*.txt", f"data.cache_dir={corpus}/cache", f"run_root={root}"]
    return compose([*SMALL, *paths, f"trainer.tokens={STEPS * BATCH}", *more])


def losses(directory: RunDirectory) -> list[float]:
    return [line["val_loss"] for line in map(json.loads, directory.metrics.read_text().splitlines())
            if "val_loss" in line]  # fmt: skip


def test_a_run_that_gets_no_better_ends_with_its_best_weights_beside_the_last(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = settings(corpus, tmp_path)
    early = settings(corpus, tmp_path, f"trainer.early_stop={PATIENCE}")
    run(whole)
    assert config_hash(whole) != config_hash(early)
    every = losses(RunDirectory.of(whole))
    lowest = list(accumulate(every, min))
    last = next(step for step in range(PATIENCE, STEPS) if lowest[step] == lowest[step - PATIENCE]) + 1
    assert len(every) == STEPS and last < STEPS, "a rate at which the loss soon bounces"
    best = every.index(min(every[:last])) + 1

    loss = run(early)
    directory = RunDirectory.of(early)
    summary = directory.summary
    assert losses(directory) == every[:last] and loss == every[last - 1] == summary["val_loss"]
    told = {key: summary[key] for key in ("status", "steps", "tokens", "best_step", "best_val_loss")}
    assert told == {"status": "finished", "steps": last, "tokens": last * BATCH, "best_step": best,
                    "best_val_loss": every[best - 1]}  # fmt: skip
    kept, expected = load_file(directory.best), weights(folder_of(directory.checkpoints, best))
    assert kept.keys() == expected.keys() and all(torch.equal(kept[name], expected[name]) for name in kept)
    with safe_open(directory.best, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "step": str(best), "val_loss": repr(every[best - 1])}

    for step, folder in list_checkpoints(directory.checkpoints):  # as if killed after one validation that was no better
        if step > best + 1:
            shutil.rmtree(folder)
    (directory.path / "summary.json").unlink()
    directory.best.unlink()  # as if callbacks.keep_best had not been set before
    assert run(early) == loss and losses(directory) == every[:last], "what it waited before counts"
    assert not directory.best.exists(), "no later state is the best"
    (directory.path / "summary.json").unlink()
    assert run(early) == loss and losses(directory) == every[:last], "killed at its very end"

    with caplog.at_level(logging.INFO, logger="qtrain"):
        run(settings(corpus, tmp_path, f"trainer.tokens={STEPS * BATCH + BATCH}", "debug.max_steps=1"))
        assert "another budget" not in caplog.text, "it differs in more"
        run(settings(corpus, tmp_path, f"trainer.tokens={2 * BATCH}"))
    assert f"{RunDirectory.of(whole).path} is this run on another budget" in caplog.text
    assert "scheduler=cosine" in caplog.text or "learning rate was another at each step" in caplog.text
