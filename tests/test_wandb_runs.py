"""Runs that W&B holds, as run directories again: offline files and a stand-in for the server."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from qtrain.errors import UserError
from qtrain.report.wandb_runs import (
    BLOCK,
    FILE_HEADER,
    MirroredRun,
    _values,
    fetch_runs,
    project_runs,
    read_records,
    write_run,
)
from qtrain.runs.table import finished_runs

ROOT = Path(__file__).parents[1]
pytest.importorskip("wandb", reason="the extra wandb is not installed")

STOPPED = """
import sys
from qtrain.train import compose
from qtrain.training.observers import Progress
from qtrain.training.session import run

def stop_after_two(self, step):
    if step == 2:
        raise KeyboardInterrupt

def train(overrides):
    try:
        run(compose(overrides))
    except KeyboardInterrupt:
        pass

before, Progress.on_step_end = Progress.on_step_end, stop_after_two
train(sys.argv[1:])
Progress.on_step_end = before
train(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with offline runs of its two starts: stopped after two steps, whose second had no checkpoint, and
    taken up again."""
    folder = tmp_path_factory.mktemp("wandb")
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"document {number} says the same again and again " * 10)
    small = [
        "recipe=mxfp8", "backend=reference", "model.dim=64", "model.ffn_dim=64", "model.n_layers=1", "model.seq_len=32",
        "trainer.tokens=640", "trainer.batch_tokens=128", "trainer.micro_batch_size=4", "callbacks.log_every_steps=1",
        "callbacks.telemetry_every_steps=2", "callbacks.checkpoint_every_steps=3",
        "data.source=text", f"data.files={folder}/*.txt", "data.val_tokens=128", f"data.cache_dir={folder}/cache",
        f"run_root={folder}/runs", "logger=wandb", "logger.per_layer=true",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "WANDB_SILENT": "true"}
    subprocess.run([sys.executable, "-c", STOPPED, *small], cwd=folder, env=environment, check=True, timeout=600)
    (path,) = (folder / "runs").iterdir()
    assert len(list(path.glob("wandb/offline-run-*"))) == 2
    return path


def lines_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_an_offline_run_comes_back_as_it_was(trained: Path, tmp_path: Path) -> None:
    (fetched,) = fetch_runs(str(trained.parent), tmp_path)
    assert fetched.name == json.loads((trained / "environment.json").read_text())["wandb_id"]
    for name in ("summary.json", "config.yaml"):
        assert yaml.safe_load((fetched / name).read_text()) == yaml.safe_load((trained / name).read_text())
    assert lines_of(fetched) == lines_of(trained)
    assert [line["step"] for line in lines_of(fetched) if "loss" in line] == [1, 2, 3, 4, 5]
    (row,), (same,) = finished_runs(tmp_path), finished_runs(trained.parent)
    assert row | {"directory": None} == same | {"directory": None}
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file.*Not a directory; give another --out"):
        fetch_runs(str(trained.parent), tmp_path / "file")
    assert fetch_runs(str(trained.parent), tmp_path) == [fetched] and lines_of(fetched) == lines_of(trained)


def test_a_run_without_our_summary_is_named(trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of the first start's file alone nothing says how the run ended but its own summary: interrupted."""
    first, last = sorted((trained / "wandb").glob("offline-run-*"))
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / first.name).symlink_to(first)
    (fetched,) = fetch_runs(str(tmp_path / "first"), tmp_path / "out")
    assert json.loads((fetched / "summary.json").read_text())["status"] == "interrupted"
    assert finished_runs(tmp_path / "out") == []

    (half,) = last.glob("run-*.wandb")
    copy = tmp_path / "half" / last.name / half.name
    copy.parent.mkdir(parents=True)
    copy.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    assert fetch_runs(str(tmp_path / "half"), tmp_path / "out") == []
    assert "the last record is half-written" in caplog.text and f"{fetched.name} is left out" in caplog.text


# --------------------------------------------------------------------------------------------------------- file format


def log_file(records: list[bytes]) -> bytes:
    """LevelDB's log format, written out by its own document, after the seven bytes that W&B puts first."""
    data = bytearray(FILE_HEADER)
    for record in records:
        begun = False
        while True:
            left = BLOCK - len(data) % BLOCK
            if left < 7:
                data += bytes(left)
                continue
            piece, record = record[: left - 7], record[left - 7 :]
            kind = {(False, True): 1, (False, False): 2, (True, False): 3, (True, True): 4}[begun, not record]
            data += struct.pack("<IHB", zlib.crc32(bytes([kind]) + piece), len(piece), kind) + piece
            begun = True
            if not record:
                break
    return bytes(data)


@pytest.mark.parametrize("end", range(-16, 2))
def test_records_cross_blocks(tmp_path: Path, end: int) -> None:
    """A first record that ends near a block's end, on every byte there; then short ones and one over three blocks."""
    records = [b"a" * (BLOCK - len(FILE_HEADER) - 7 + end), b"b", b"c" * (2 * BLOCK + 5), b"d" * 100]
    path = tmp_path / "run-x.wandb"
    path.write_bytes(log_file(records))
    assert list(read_records(path)) == records


def test_a_damaged_file_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run-x.wandb"
    whole = log_file([b"a" * 10, b"b" * 10])
    path.write_bytes(whole[:-1])
    assert list(read_records(path)) == [b"a" * 10]
    assert "run-x.wandb: the last record is half-written and left out" in caplog.text
    path.write_bytes(whole[:13] + b"\x09" + whole[14:])
    with pytest.raises(UserError, match=r"run-x\.wandb is damaged at byte 7"):
        list(read_records(path))
    path.write_bytes(whole[:15] + b"c" + whole[16:])
    with pytest.raises(UserError, match=r"run-x\.wandb is damaged at byte 7"):  # the checksum alone tells
        list(read_records(path))
    path.write_bytes(b"{}")
    with pytest.raises(UserError, match=r"run-x\.wandb is no offline file of W&B"):
        list(read_records(path))


# -------------------------------------------------------------------------------------------------------------- server


def served(
    run_id: str, config: dict[str, Any], summary: dict[str, Any], history: list[dict[str, Any]]
) -> SimpleNamespace:
    config = config | {"_wandb": {"t": 1}}
    return SimpleNamespace(id=run_id, config=config, summary_metrics=summary, scan_history=lambda: iter(history))


class Server:
    """As much of wandb.Api as is asked for."""

    def __init__(self, runs: list[SimpleNamespace]):
        self.found = runs

    def runs(self, project: str) -> list[SimpleNamespace]:
        assert project == "team/qtrain"
        return self.found


def test_runs_of_a_project_on_the_server(trained: Path, tmp_path: Path) -> None:
    """The server keeps what a run logs; rows may hold every metric, absent ones None, and W&B's own."""
    lines, summary = lines_of(trained), json.loads((trained / "summary.json").read_text())
    names = {key for line in lines for key in line} - {"step"}
    history = [
        {"_step": number, "_timestamp": 1.5, "trainer/global_step": line["step"]}
        | {key: line.get(key) for key in names}
        for number, line in enumerate(lines)
    ]
    config = yaml.safe_load((trained / "config.yaml").read_text())
    api = Server([served("quartet-1", config, {"loss": 9.9, "lr": 0.5, "run": summary}, history)])
    (run,) = project_runs("team/qtrain", api)
    assert run.config == config and run.summary == summary
    directory = write_run(run, tmp_path)
    assert lines_of(directory) == lines
    (row,), (own,) = finished_runs(tmp_path), finished_runs(trained.parent, trained.name)
    assert row | {"directory": None} == own | {"directory": None}


def test_what_cannot_be_fetched_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no W&B run"):
        fetch_runs(str(tmp_path / "empty"), tmp_path / "out")
    with pytest.raises(UserError, match="no_such_folder is no folder, and no W&B project; give entity/project"):
        fetch_runs("no_such_folder", tmp_path / "out")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match=r"cannot read team/qtrain from W&B: .*API key"):
        fetch_runs("team/qtrain", tmp_path / "out")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"reading W&B runs needs the package wandb: .* pip install .*\[wandb\]"):
        fetch_runs("team/qtrain", tmp_path / "out")


@pytest.mark.parametrize("name", ["..", ".", "", "../x", "a/b", "a b", "-x", ".hidden", "x\n"])
def test_an_id_that_would_lead_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    """It comes from the name of a file: offline-run-x/run-...wandb."""
    out = tmp_path / "out"
    with pytest.raises(UserError, match="is no id of a W&B run"):
        write_run(MirroredRun(name, summary={"status": "finished"}), out)
    assert list(tmp_path.iterdir()) == []


def test_links_do_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run").symlink_to(outside)
    with pytest.raises(UserError, match="is a link"):
        write_run(MirroredRun("run", summary={"status": "finished"}), tmp_path / "out")
    assert list(outside.iterdir()) == []


def test_records_of_another_kind_are_told(tmp_path: Path) -> None:
    path = tmp_path / "offline-run-1" / "run-x.wandb"
    path.parent.mkdir()
    path.write_bytes(log_file([b"\xff\xff\xff\xff"]))
    with pytest.raises(UserError, match=r"run-x.wandb holds a record that is none of W&B's"):
        fetch_runs(str(tmp_path), tmp_path / "out")
    with pytest.raises(UserError, match=r"run-x\.wandb holds a value that is no JSON"):
        _values([SimpleNamespace(key="a", nested_key=[], value_json="[" * 100_000)], path)
    run = MirroredRun("x", summary={"status": "finished"}, history=[{"trainer/global_step": [1], "loss": 1.0}])
    assert (write_run(run, tmp_path / "out") / "metrics.jsonl").read_text() == ""
