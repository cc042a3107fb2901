"""scripts/run_study.py: what is missing is run, what is done is not, what fails is told, what was written stays."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from qtrain.report.summaries import compare, markdown, read_csv, read_summaries

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
def main(monkeypatch: pytest.MonkeyPatch):
    spec = importlib.util.spec_from_file_location("run_study", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    source = str(SCRIPT.parents[1])
    monkeypatch.setenv("PYTHONPATH", f"{source}:{source}/kernels")

    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["run_study.py", *map(str, arguments)])
        return module.main()

    return call


@pytest.fixture
def study(tmp_path: Path) -> Path:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"document {number} says the same thing again and again. " * 20)
    folder = tmp_path / "study"
    folder.mkdir()
    settings = SETTINGS.format(corpus=f"{tmp_path}/*.txt", root=tmp_path)
    points = "points:\n  low: {seeds: 1, settings: [recipe=ste]}\n  plain: {seeds: 1, settings: [recipe=bf16]}\n"
    (folder / "points.yaml").write_text(settings + points)
    return folder


def test_runs_what_is_missing_tells_what_fails_and_keeps_what_is_written(
    main, study: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    points, results = study / "points.yaml", study / "results.csv"
    right = points.read_text()
    points.write_text(right.replace("recipe=ste", "recipe=stee"))
    assert main(study, "--dry-run") == 0
    assert capfd.readouterr().out == f"{study}: 0 of 2 points done\nmissing: low, seed 0\nmissing: plain, seed 0\n"
    assert main(study, "--runs", tmp_path / "runs") == 1
    shown = capfd.readouterr().err
    assert "did you mean 'ste'" in shown and shown.endswith("failed: low, seed 0\n")
    before = results.read_text()
    assert [(row["name"], row["seed"], row["tokens"]) for row in read_csv(results)] == [("plain", 0, 192)]
    points.write_text(right)
    assert main(study, "--runs", tmp_path / "elsewhere") == 0
    assert results.read_text().startswith(before)
    assert [row["name"] for row in read_csv(results)] == ["plain", "low"]
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1, "what the results file has is not run again"
    assert "| low |" in markdown(compare(read_summaries(results), "plain"))
    assert main(study, "--dry-run") == 0 and "2 of 2 points done" in capfd.readouterr().out


@pytest.mark.parametrize(("arguments", "points", "message"), [
    ((), None, "is no study: it has no points.yaml"),
    (("--only", "high"), "points:\n  low: {seeds: 1}\n", "has no point 'high'; it has low"),
    ((), "points:\n  low: {seed: 1}\n", "point low has seed; give seeds (how many) and settings"),
])  # fmt: skip
def test_mistakes_are_explained(
    main,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    points: str | None,
    message: str,
) -> None:
    if points is not None:
        (tmp_path / "points.yaml").write_text("settings: []\n" + points)
    assert main(tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err
