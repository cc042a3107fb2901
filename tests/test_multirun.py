"""How a multirun ends: its losses, its gaps, its failures, and the command that shows the rest."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qtrain.errors import UserError
from qtrain.multirun import closing_lines, labelled, labels, outcome_table, outcomes, typed_job
from qtrain.runs.directory import RunDirectory
from qtrain.train import _show_outcomes, compose_all, next_commands

SHARED = ["++model.dim=64", "++trainer.precision=32-true"]


def finish(config: Any, loss: float | None, **more: Any) -> None:
    path = RunDirectory.of(config).path
    path.mkdir(parents=True)
    summary = {"name": config.name, "seed": config.seed, "tokens": 10, "non_embedding_parameters": 10, "val_loss": loss}
    (path / "summary.json").write_text(json.dumps({"status": "finished", **summary, **more}))


def test_a_multirun_ends_with_its_losses_gaps_and_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    root = f"++run_root={tmp_path}"
    jobs = [
        [*SHARED, root, f"recipe={recipe}", f"++seed={seed}"] for recipe in ("bf16", "quartet") for seed in (0, 1)
    ] + [[*SHARED, root, "recipe=halo_0", "++seed=0"], [*SHARED, root, "recipe=quest", "++seed=0"]]
    configs: list[Any] = compose_all(jobs[:5])
    for config, loss in zip(configs, (2.0, 3.0, 2.5, 3.25), strict=False):
        finish(config, loss)
    finish(configs[4], None, status="diverged", reason="step 2 is not finite")
    configs.append(UserError("what is wrong\nand more"))
    assert labels(jobs)[3] == "recipe=quartet seed=1", "not what all have"
    found = outcomes(jobs, configs, {})
    out = io.StringIO()
    Console(file=out, width=200).print(outcome_table(found))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert lines[0] == ["run", "loss", "gap", "to", "bf16", "directory"]
    assert [line[2:4] for line in lines[3:5]] == [["2.5000", "+0.5000"], ["3.2500", "+0.2500"]], "of the same seed"
    assert lines[3][-1] == str(RunDirectory.of(configs[2]).path) and lines[5][2] == lines[6][2] == "failed"
    closing = closing_lines(found)
    assert closing[:3] == [
        "2 of 6 failed:", "  recipe=halo_0 seed=0: step 2 is not finite", "  recipe=quest seed=0: what is wrong",
    ]  # fmt: skip
    assert closing[3] == "next:" and closing[4].startswith(f"  python scripts/report.py {tmp_path}/bf16-")
    monkeypatch.chdir(tmp_path)
    assert closing_lines(found)[4].startswith(f"  qtrain report {tmp_path}/bf16-"), "here are no scripts"
    assert next_commands(configs[0]).split("next:\n")[1].startswith("  qtrain train -m "), "and no Makefile of ours"
    seen = outcomes(jobs, configs, {typed_job(jobs[0]): "it failed here"})
    assert (seen[0].loss, seen[0].reason) == (None, "it failed here"), "though an earlier run of it had ended"


def test_brackets_in_settings_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = f"++run_root='{tmp_path}/[red]'"
    jobs = [[*SHARED, root, "recipe=quest", f"++recipe.skip={skip}"] for skip in ("[lm_head]", "[]")]
    finish(compose_all(jobs)[0], 2.0)
    _show_outcomes(jobs)
    told = "".join(capsys.readouterr().out.split())
    assert "recipe.skip=[lm_head]2.0000" in told and "/[red]/quest-" in told


def test_lines_of_processes_side_by_side_say_whose_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with labelled("job 3"):
        print("one\ntwo")
        print("three", end="")
        sys.stderr.write("wrong\n")
    print("after")
    told = capsys.readouterr()
    assert told.out == "[job 3] one\n[job 3] two\n[job 3] three\nafter\n" and told.err == "[job 3] wrong\n"
