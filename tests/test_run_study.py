"""scripts/run_study.py: what is missing is run, what is done is not, what fails is told, what was written stays."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from qtrain.report.summaries import COLUMNS, compare, markdown, read_csv, read_summaries

SCRIPT = Path(__file__).parents[1] / "scripts" / "run_study.py"
SETTINGS = """settings:
  - data=text
  - data.files={corpus}
  - data.val_tokens=512
  - data.cache_dir={root}/cache
  - model.seq_len=32
  - trainer.micro_batch_size=2
  - trainer.batch_tokens=64
  - trainer.tokens=192
  - callbacks.sample_tokens=0
  - backend=reference
"""


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_study", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def main(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    source = str(SCRIPT.parents[1])
    monkeypatch.setenv("PYTHONPATH", f"{source}:{source}/kernels")

    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["run_study.py", *map(str, arguments)])
        return script.main()

    return call


@pytest.fixture
def study(tmp_path: Path) -> Path:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"document {number} says the same thing again and again. " * 20)
    folder = tmp_path / "study"
    folder.mkdir()
    settings = SETTINGS.format(corpus=f"{tmp_path}/*.txt", root=tmp_path)
    points = "points:\n  low: {seeds: 1, settings: [recipe=stee]}\n  plain: {seeds: 1, settings: [recipe=bf16]}\n"
    (folder / "points.yaml").write_text(settings + points)
    return folder


def test_trains_what_is_missing_and_tells_what_fails(
    main: Callable[..., int], study: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the real train.py: one point fails, one is trained, neither is trained again once it has a row."""
    results = study / "results.csv"
    assert main(study, "--dry-run") == 0
    assert capfd.readouterr().out == f"{study}: 0 of 2 points done\nmissing: low, seed 0\nmissing: plain, seed 0\n"
    assert main(study, "--runs", tmp_path / "runs") == 1
    shown = capfd.readouterr().err
    assert "did you mean 'ste'" in shown and "error: low, seed 0: train.py ended with 2\n" in shown
    assert shown.endswith("failed: low, seed 0\n")
    (row,) = read_csv(results)
    assert (row["name"], row["recipe"], row["seed"], row["tokens"]) == ("plain", "bf16", 0, 192)
    assert "| plain |" in markdown(compare(read_summaries(results), "plain"))
    assert main(study, "--dry-run") == 0 and "1 of 2 points done\nmissing: low, seed 0\n" in capfd.readouterr().out


# -------------------------------------------------------------------------------------------- without training anything


class Trainer:
    """In place of subprocess.run: notes name and seed, and leaves a finished run of val_loss 2 where it was told to."""

    def __init__(self) -> None:
        self.trained: list[tuple[str, int]] = []
        self.settings: list[list[str]] = []
        self.status: dict[str, int] = {}
        self.silent: set[str] = set()  # ends with 0 and leaves nothing

    def __call__(self, command: list[str], check: bool) -> subprocess.CompletedProcess[bytes]:
        told = dict(word.split("=", 1) for word in command[2:])
        name, seed = told["name"], int(told["seed"])
        self.trained.append((name, seed))
        self.settings.append(command[2:])
        folder = Path(told["run_root"]) / f"{name}-{seed}"
        if name not in self.silent and not self.status.get(name):
            folder.mkdir(parents=True)
            row = dict.fromkeys(COLUMNS, 1) | {"name": name, "seed": seed, "val_loss": 2.0, "data_hash": "d"}
            (folder / "summary.json").write_text(json.dumps(row | {"status": "finished"}))
        return subprocess.CompletedProcess(command, self.status.get(name, 0))


@pytest.fixture
def trainer(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Trainer:
    trainer = Trainer()
    monkeypatch.setattr(script.subprocess, "run", trainer)
    monkeypatch.chdir(tmp_path)
    return trainer


THREE = "settings: [model=nano]\npoints:\n  a: {seeds: 3, settings: [recipe=ste]}\n  b: {seeds: 1}\n  c: {seeds: 2}\n"


def write(folder: str, points: str = THREE) -> Path:
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "points.yaml").write_text(points)
    return Path(folder)


def test_first_seeds_come_first(main: Callable[..., int], trainer: Trainer) -> None:
    assert main(write("s")) == 0
    assert trainer.trained == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("c", 1), ("a", 2)]
    assert [(row["name"], row["seed"]) for row in read_csv(Path("s/results.csv"))] == trainer.trained
    assert trainer.settings[0][:2] == ["model=nano", "recipe=ste"] and "recipe=ste" not in trainer.settings[1]


def test_only_some_points_and_then_the_others(main: Callable[..., int], trainer: Trainer) -> None:
    assert main(write("s"), "--only", "c", "a") == 0
    assert trainer.trained == [("a", 0), ("c", 0), ("a", 1), ("c", 1), ("a", 2)]
    before = Path("s/results.csv").read_text()
    assert main("s") == 0
    assert trainer.trained[5:] == [("b", 0)], "what the results file has is not run again"
    assert Path("s/results.csv").read_text().startswith(before)


def test_a_point_that_fails_does_not_stop_the_study(
    main: Callable[..., int], trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether train.py fails, or ends well and leaves no finished run, or two of one name and seed."""
    trainer.status, trainer.silent = {"b": 3}, {"c"}
    old = Path("runs/s/a-of-other-settings")
    old.mkdir(parents=True)
    (old / "summary.json").write_text(json.dumps({"status": "finished", "name": "a", "seed": 1, "val_loss": 2.0}))
    assert main(write("s")) == 1
    assert [(row["name"], row["seed"]) for row in read_csv(Path("s/results.csv"))] == [("a", 0), ("a", 2)]
    shown = capsys.readouterr().err
    assert "error: b, seed 0: train.py ended with 3\n" in shown
    assert "error: c, seed 0: runs/s holds 0 finished runs of this name and seed" in shown
    assert "error: a, seed 1: runs/s holds 2 finished runs of this name and seed" in shown
    failed = ["b, seed 0", "c, seed 0", "a, seed 1", "c, seed 1"]
    assert shown.endswith("".join(f"failed: {point}\n" for point in failed))


def test_studies_do_not_share_run_directories(
    main: Callable[..., int], trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by a common last component, and not where one lies in another."""
    for folder in ("x/s/inner", "x/s", "y/s"):
        assert main(write(folder)) == 0
        assert (tmp_path / "runs" / folder / "a-0" / "summary.json").is_file()
    assert main(write("x/s", THREE.replace("b: {seeds: 1}", "b: {seeds: 2}"))) == 0
    assert trainer.trained[18:] == [("b", 1)]
    elsewhere = write(str(tmp_path / "y/t"))
    monkeypatch.chdir("x")
    assert main(elsewhere) == 0
    assert Path("runs", *tmp_path.parts[1:], "y/t/a-0").is_dir()


@pytest.mark.parametrize(("points", "message"), [
    (None, "is no study: it has no points.yaml"),
    ("", "points.yaml is empty; give a mapping with settings and points"),
    ("- a\n", "points.yaml is ['a']; give a mapping with settings and points"),
    ("points: {a: {seeds: 1}}\n", "points.yaml has points; give settings and points"),
    ("settings: []\n", "points.yaml has settings; give settings and points"),
    ("settings: []\npoints: {a: {seeds: 1}}\nmore: 1\n", "has settings, points, more; give settings and points"),
    ("settings: []\npoints: [a]\n", "points is ['a']; give name: {seeds: 3"),
    ("settings: []\npoints:\n", "points is empty; give name: {seeds: 3"),
    ("settings: model=nano\npoints: {a: {seeds: 1}}\n", "settings is 'model=nano'; give a list of overrides"),
    ("settings: [model: nano]\npoints: {a: {seeds: 1}}\n", "settings is [{'model': 'nano'}]; give a list of overrides"),
    ("settings: []\npoints: {a: }\n", "point a is empty; give a mapping with seeds and perhaps settings"),
    ("settings: []\npoints: {a: 3}\n", "point a is 3; give a mapping with seeds"),
    ("settings: []\npoints: {a: {seed: 1}}\n", "point a has seed; give seeds and perhaps settings"),
    ("settings: []\npoints: {a: {seeds: 1, runs: 2}}\n", "point a has seeds, runs; give seeds"),
    ("settings: []\npoints: {a: {seeds: 1, settings: }}\n", "point a: settings is empty; give a list"),
    ("settings: []\npoints: {a: {seeds: 0}}\n", "point a: seeds is 0; give how many, a positive integer"),
    ("settings: []\npoints: {a: {seeds: true}}\n", "point a: seeds is True; give how many"),
    ("settings: []\npoints: {a: {seeds: 1.5}}\n", "point a: seeds is 1.5; give how many"),
    ("settings: []\npoints: {a: {seeds: '2'}}\n", "point a: seeds is '2'; give how many"),
    ("settings: []\npoints: {a: {seeds: [0]}}\n", "point a: seeds is [0]; give how many"),
    ("settings: []\npoints: {4: {seeds: 1}}\n", "the point's name 4 is no text; quote it"),
    ("settings: []\npoints: {a: {seeds: 1}\n", "points.yaml, line 3 is no YAML: "),
    ("settings: []\n\x07", "points.yaml is no YAML: "),
    (b"settings: \xff\xfe", "cannot read "),
])  # fmt: skip
def test_mistakes_in_the_points_are_explained(
    main: Callable[..., int],
    trainer: Trainer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    points: str | bytes | None,
    message: str,
) -> None:
    if points is not None:
        (tmp_path / "points.yaml").write_bytes(points if isinstance(points, bytes) else points.encode())
    assert main(tmp_path) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1 and message in shown
    assert not trainer.trained


def test_other_mistakes_are_explained(
    main: Callable[..., int], trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write("s")
    assert main(study, "--only", "high") == 2 and "has no point 'high'; it has a, b, c" in capsys.readouterr().err
    (study / "results.csv").touch()
    assert main(study) == 2 and "results.csv is empty" in capsys.readouterr().err
    assert not trainer.trained
