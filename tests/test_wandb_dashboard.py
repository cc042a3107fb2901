"""The W&B dashboard's specification: every metric that a run writes has its panel, and no panel stays empty."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qtrain.errors import UserError
from qtrain.train import compose
from qtrain.training.observers.loggers import mirrored
from qtrain.training.session import run


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "wandb_dashboard.py"
    spec = importlib.util.spec_from_file_location("wandb_dashboard", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["wandb_dashboard"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """What two short runs, which between them write all there is, mirror with and without the layers' own."""
    folder, draw = tmp_path_factory.mktemp("runs"), random.Random(0)
    for number in range(30):
        (folder / f"{number}.txt").write_text(" ".join(draw.choice(["red", "green", "blue"]) for _ in range(200)))
    small = [
        "backend=reference", "model.dim=64", "model.ffn_dim=64", "model.n_layers=1", "model.seq_len=32",
        "trainer.tokens=256", "trainer.batch_tokens=128", "trainer.micro_batch_size=4", "callbacks.log_every_steps=1",
        "callbacks.telemetry_every_steps=1", "callbacks.telemetry_gradients=true",
        "data.source=text", f"data.files={folder}/*.txt", "data.val_tokens=128", f"data.cache_dir={folder}/cache",
        f"run_root={folder}/runs", "+data@validation.one=text", f"validation.one.files={folder}/1.txt",
    ]  # fmt: skip
    for recipe in (["recipe=quartet"], ["recipe=mxfp8", "gemm=fp8"]):
        run(compose([*small, *recipe]))
    lines = [line for path in (folder / "runs").glob("*/metrics.jsonl") for line in path.read_text().splitlines()]
    return {key for line in lines for layers in (True, False) for key in mirrored(json.loads(line), layers)}


def shown(script: ModuleType, key: str) -> list[str]:
    """The titles of the panels that show a metric."""
    panels = [panel for section in script.dashboard() for panel in section.panels]
    return [panel.title for panel in panels if key in panel.metrics or re.fullmatch(panel.pattern or "(?!)", key)]


def test_every_metric_has_one_panel(script: ModuleType, written: set[str]) -> None:
    assert {key: shown(script, key) for key in written - {"step", script.X_AXIS} if len(shown(script, key)) != 1} == {}
    for kind in ("quant/layers.0.mlp.down", "quant_mean", "quant_worst"):
        assert shown(script, f"{kind}/wgrad.dy/sqnr_db") == ["sqnr_db of wgrad.dy"]
    assert script.X_AXIS in written


def test_every_panel_has_metrics(script: ModuleType, written: set[str]) -> None:
    for section in script.dashboard():
        for panel in section.panels:
            assert set(panel.metrics) <= written, panel.title
            assert panel.pattern is None or any(re.fullmatch(panel.pattern, key) for key in written), panel.title
            assert bool(panel.metrics) != bool(panel.pattern), panel.title


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # wandb_workspaces uses pydantic as of its version 1
def test_workspace_and_report_hold_the_specification(script: ModuleType) -> None:
    pytest.importorskip("wandb_workspaces", reason="the extra dashboard is not installed")
    sections = script.dashboard()
    workspace = script.build_workspace("team", "qtrain", sections)
    assert (workspace.entity, workspace.project) == ("team", "qtrain")
    bank = workspace._to_model().spec.section.panel_bank_config.sections
    built = {section.name: [panel.config for panel in section.panels] for section in bank}
    for section in sections:
        assert [
            (config.chart_title, config.x_axis, tuple(config.metrics), config.metric_regex, bool(config.y_log_scale))
            for config in built[section.name]
        ] == [(panel.title, "tokens", panel.metrics, panel.pattern, panel.log_y) for panel in section.panels]
    report = script.build_report("team", "qtrain", sections)
    grids = [block for block in report.blocks if hasattr(block, "panels")]
    assert [len(grid.panels) for grid in grids] == [1, *(len(section.panels) for section in sections)]
    assert all(grid.runsets[0].project == "qtrain" for grid in grids)


def call(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["wandb_dashboard.py", *arguments])
    script.main()


def test_dry_run_needs_nothing(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    call(script, monkeypatch, "team/qtrain", "--dry-run")
    printed = capsys.readouterr().out
    assert "Loss (open)\n  validation loss (nats per token): val_loss over tokens\n" in printed
    assert "gradient norm before clipping: grad_norm over tokens, logarithmic" in printed
    assert "sqnr_db of wgrad.dy: quant(_mean|_worst|/[^/]+)/wgrad[.]dy/sqnr_db over tokens" in printed


def test_what_is_missing_is_said(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for project in ("qtrain", "a/b/c", "/qtrain"):
        with pytest.raises(SystemExit, match=f"error: '{project}' names no W&B project; give entity/project"):
            call(script, monkeypatch, project)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(UserError, match=r"no API key of W&B to write to team/qtrain with; run `wandb login` or set"):
        script.publish("team", "qtrain", script.dashboard())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"the package wandb_workspaces: .*\[dashboard\]'?, or --dry-run"):
        script.publish("team", "qtrain", script.dashboard())
