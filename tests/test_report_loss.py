import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from qtrain.errors import UserError
from qtrain.report.loss import BLUE, GREEN, ORANGE, curve, plot_loss, smooth
from qtrain.runs.metrics_log import read_metrics, scan_metrics


def write_run(directory: Path, summary: dict[str, Any] | None = None, tail: str = "", validate: bool = True) -> Path:
    lines: list[dict[str, Any]] = []
    for step in range(1, 51):
        lines.append({"step": step, "tokens": step * 1000, "flops": 1, "loss": 3 - step / 50, "lr": 0.001})
        if validate and step % 10 == 0:
            lines.append({"step": step, "tokens": step * 1000, "flops": 1, "val_loss": 3.1 - step / 50})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(text + tail)
    (directory / "config.yaml").write_text("name: mine\nrecipe: {name: bf16}\nmodel: {name: nano}\n")
    if summary is not None:
        (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def pixels(path: Path, colour: str) -> int:
    image = imread(path)[..., :3]
    return int((np.abs(image - np.array(to_rgb(colour))).max(-1) < 0.02).sum())


def test_the_picture_shows_what_the_run_directory_holds(tmp_path: Path) -> None:
    path = plot_loss(write_run(tmp_path))
    assert path == tmp_path / "loss.png"
    assert pixels(path, BLUE) > 500
    assert pixels(path, ORANGE) > 500
    assert pixels(path, GREEN) == 0, "no bigram line without a summary"
    plot_loss(write_run(tmp_path, summary={"parameters": 492416, "bigram_cross_entropy": 2.5}))
    assert pixels(path, GREEN) > 500
    plot_loss(write_run(tmp_path, validate=False))
    assert pixels(path, ORANGE) == 0


def test_a_half_written_last_line_is_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_run(tmp_path, tail='{"step": 51, "tokens": 510')
    with caplog.at_level(logging.WARNING):
        lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines][-1] == 50
    assert "half-written" in caplog.text
    plot_loss(tmp_path)


def test_damage_before_the_last_line_is_an_error(tmp_path: Path) -> None:
    write_run(tmp_path, tail='{"step": 51\n{"step": 52, "tokens": 52000, "loss": 1.0}\n')
    with pytest.raises(UserError, match=r"line 56 of .*metrics\.jsonl is no line of metrics"):
        plot_loss(tmp_path)


def test_a_metric_that_is_no_number_is_damage(tmp_path: Path) -> None:
    write_run(
        tmp_path, tail='{"step": 51, "tokens": 51000, "loss": "abc"}\n{"step": 52, "tokens": 52000, "loss": null}\n'
    )
    lines, damaged, _ = scan_metrics(tmp_path / "metrics.jsonl")
    assert [fault.number for fault in damaged] == [56] and lines[-1]["step"] == 52


def test_names_are_text_and_no_formulas(tmp_path: Path) -> None:
    """matplotlib reads what stands between two dollars as mathematics, and fails where it is none."""
    write_run(tmp_path)
    (tmp_path / "config.yaml").write_text("name: mine\nrecipe: {name: bf16}\nmodel: {name: 'my_$1_and_$2'}\n")
    assert pixels(plot_loss(tmp_path), BLUE) > 500


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist; is .* a run directory"):
        plot_loss(tmp_path)
    write_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 10, "flops": 5}\n')
    with pytest.raises(UserError, match="holds no loss yet"):
        plot_loss(tmp_path)


def test_a_curve_takes_the_lines_that_have_the_metric_and_are_finite() -> None:
    lines = [
        {"tokens": 1, "loss": 3.0},
        {"tokens": 2, "val_loss": 9.0},
        {"tokens": 3, "loss": float("nan")},
        {"tokens": 4, "loss": 2.0},
    ]
    found = curve(lines, "loss")
    assert (found.tokens.tolist(), found.values.tolist()) == ([1, 4], [3, 2])
    assert len(curve(lines, "lr").values) == 0


def test_smoothing_keeps_the_start_and_averages_to_the_end() -> None:
    values = np.array([8.0, 4.0, 3.0, 2.0, 1.0, 5.0])
    expected = [8, 15 / 3, (8 + 4 + 3 + 2 + 1) / 5, (4 + 3 + 2 + 1 + 5) / 5, (3 + 2 + 1 + 5) / 4, (2 + 1 + 5) / 3]
    np.testing.assert_allclose(smooth(values, 2), expected, rtol=1e-12)
