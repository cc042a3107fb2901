"""Mirrors of metrics.jsonl."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qtrain.errors import UserError
from qtrain.runs.directory import RunDirectory
from qtrain.train import compose
from qtrain.training.observers.loggers import build_loggers, check_logger, has_wandb_key, mirrored
from qtrain.training.session import run

ROOT = Path(__file__).parents[1]


def small(tmp_path: Path) -> list[str]:
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"document {number} says the same again and again " * 10)
    return [
        "recipe=bf16", "model.dim=64", "model.ffn_dim=64", "model.n_layers=1", "model.seq_len=32", "trainer.tokens=640",
        "trainer.batch_tokens=128", "trainer.micro_batch_size=4", "callbacks.log_every_steps=1",
        "data.source=text", f"data.files={tmp_path}/*.txt", "data.val_tokens=128",
        f"data.cache_dir={tmp_path}/cache", f"run_root={tmp_path}/runs",
    ]  # fmt: skip


def test_every_run_of_a_multirun_is_a_wandb_run_of_its_own(tmp_path):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    subprocess.run(
        [sys.executable, "train.py", "-m", *small(tmp_path), "seed=0,1", "logger=wandb"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "WANDB_SILENT": "true"},
        check=True,
        timeout=600,
    )
    runs = sorted((tmp_path / "runs").glob("bf16-*"))
    assert len(runs) == 2
    for path in runs:
        identity = json.loads((path / "environment.json").read_text())["wandb_id"]
        (folder,) = (path / "wandb").glob("offline-run-*")
        assert folder.name.endswith(identity), "the id was fixed before training, and holds the run's name"
        (content,) = folder.glob("run-*.wandb")
        assert b"val_bits_per_byte" in content.read_bytes()


def test_tensorboard_mirrors_every_line(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="the extra tensorboard is not installed"
    )
    run(compose([*small(tmp_path), "logger=tensorboard"]))
    (path,) = (tmp_path / "runs").iterdir()
    events = accumulator.EventAccumulator(str(path / "tensorboard")).Reload()
    lines = RunDirectory(path).lines("loss")
    assert [(event.step, pytest.approx(event.value)) for event in events.Scalars("loss")] == [
        (line["step"], line["loss"]) for line in lines
    ]
    assert {"lr", "grad_norm", "tokens", "flops", "tokens_per_second", "memory_bytes", "val_loss"} <= set(
        events.Tags()["scalars"]
    )


def test_mirrors_get_mean_and_worst_over_the_layers() -> None:
    """However deep a model is, the number of series is the same."""
    line = {"step": 3, "val_loss/web": 2.5, "quant/a/fprop.x/sqnr_db": 10.0, "quant/b/fprop.x/sqnr_db": 20.0}
    line |= {"quant/a/fprop.x/clipped": 0.25, "quant/b/fprop.x/clipped": 0.75, "grad/b/cosine": 0.5}
    assert mirrored(line, per_layer=True) == line
    assert mirrored(line, per_layer=False) == {
        "step": 3, "val_loss/web": 2.5,
        "quant_mean/fprop.x/sqnr_db": 15.0, "quant_worst/fprop.x/sqnr_db": 10.0,
        "quant_mean/fprop.x/clipped": 0.5, "quant_worst/fprop.x/clipped": 0.75,
        "grad_mean/cosine": 0.5, "grad_worst/cosine": 0.5,
    }  # fmt: skip


def test_a_logger_that_is_not_installed_is_an_error_only_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_logger(compose())
    assert build_loggers(compose(), RunDirectory(tmp_path)) == []
    with pytest.raises(UserError, match=r"logger=wandb needs the package wandb: .*\[wandb\]'?, or logger=none"):
        check_logger(compose(["logger=wandb"]))


def test_wandb_is_offline_without_a_key(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not has_wandb_key()
    check_logger(compose(["logger=wandb"]))
    with pytest.raises(UserError, match=r"logger.offline=false needs a W&B key, and none was found; run `wandb login`"):
        check_logger(compose(["logger=wandb", "logger.offline=false"]))
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert has_wandb_key()
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert has_wandb_key()
