"""A run directory and a row of the version before: read as they are; what cannot go on is refused by name.

`run_of_the_version_before/` was written by commit b0e7927, in the working directory of its corpus. Its checkpoints,
which were single files of 740 KB, are left out: the present version does not open them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import write_corpus

import qtrain
from qtrain.config import Config, parse_saved
from qtrain.errors import UserError
from qtrain.report.runs import read_runs
from qtrain.runs.table import read_run, read_table
from qtrain.scaling.runs import runs_of
from qtrain.train import compose
from qtrain.training.session import run

KEPT = Path(__file__).parent / "run_of_the_version_before"
LOSS = 4.375657081604004
GONE = ("results", "callbacks.sample_tokens")  # not given again, and no setting any more


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run directory, in the present working directory, beside its text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    write_corpus(tmp_path / "corpus", ["red", "green", "blue"], 40)
    directory = tmp_path / "runs" / "before-108ae815"
    shutil.copytree(KEPT, directory, ignore=shutil.ignore_patterns("*.csv"))
    (directory / "checkpoints").mkdir()
    (directory / "checkpoints" / "step-00000008.ckpt").touch()
    return directory


def the_same_command(*more: str) -> Config:
    """The settings that the run was started with."""
    start = json.loads((KEPT / "environment.json").read_text())["starts"][0]
    (files,) = (part for part in start["command"].split() if "corpus" in part)
    own = [part for part in start["command"].split()[3:] if part != files and not part.startswith(GONE)]
    return compose([*own, files.strip("'"), *more])


def test_a_finished_run_is_finished(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(the_same_command()) == LOSS
    assert f"{directory.relative_to(Path.cwd())} is finished" in capsys.readouterr().out


@pytest.mark.parametrize(("was", "now"), [(False, "none"), (True, "full")])
def test_activation_checkpointing_was_on_or_off_for_a_while(directory: Path, was: bool, now: str) -> None:
    tree = yaml.safe_load((directory / "config.yaml").read_text())
    tree["trainer"]["checkpoint_activations"] = was
    assert parse_saved(tree).trainer.checkpoint_activations == now


@pytest.mark.parametrize("loss", [None, "x", float("nan")])
def test_a_finished_run_without_a_loss_is_damaged(directory: Path, loss: object) -> None:
    """Of every version."""
    summary = json.loads((directory / "summary.json").read_text())
    (directory / "summary.json").write_text(json.dumps(summary | {"val_loss": loss}))
    with pytest.raises(UserError, match=r"summary\.json says finished, and val_loss is .*; train it again"):
        run(the_same_command())


def test_its_row_counts_elsewhere(directory: Path, tmp_path: Path) -> None:
    shutil.copy(KEPT / "results.csv", tmp_path / "results.csv")
    assert run(the_same_command("results=results.csv", "run_root=elsewhere")) == LOSS
    assert not (tmp_path / "elsewhere").exists()


def test_a_run_that_was_stopped_is_refused_and_begins_anew_on_request(directory: Path) -> None:
    summary = json.loads((directory / "summary.json").read_text())
    (directory / "summary.json").write_text(json.dumps(summary | {"status": "running", "val_loss": None}))
    with pytest.raises(UserError, match=r"step-00000008\.ckpt was written by an earlier version .* set force=true"):
        run(the_same_command())
    assert json.loads((directory / "summary.json").read_text())["status"] == "running", "nothing was touched"
    assert run(the_same_command("force=true")) == pytest.approx(LOSS, abs=1e-5), "the same run"
    assert read_run(directory.with_name(f"{directory.name}.old1"))["status"] == "running"


def test_its_weights_are_refused_by_name(directory: Path) -> None:
    with pytest.raises(UserError, match=r"step-00000008\.ckpt was written by an earlier version"):
        qtrain.load_run(directory)


def test_reports_and_laws_read_it(directory: Path) -> None:
    """By its folder, by its row, and both as one run."""
    row = read_run(directory)
    (kept,) = read_table(KEPT / "results.csv")
    # A model that settings have changed is called so now: nano (n_layers=1).
    assert {key for key in row if row[key] != kept[key]} == {"directory", "model"}
    runs, problems = read_runs([directory, KEPT / "results.csv"])
    assert [found.row["val_loss"] for found in runs] == [LOSS]
    assert len(problems) == 1 and "stands here once: 1" in problems[0]
    assert [line["step"] for line in runs[0].lines if "loss" in line] == list(range(1, 9))
    (point,), left_out = runs_of([row], "row")
    assert (point.recipe, point.N, point.D, point.loss) == ("quartet_v1", 28864, 512, LOSS) and left_out == []
