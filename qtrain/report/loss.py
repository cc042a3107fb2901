"""The picture of one run, made from its directory alone: loss.png from metrics.jsonl, config.yaml and summary.json."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from qtrain.config.naming import model_title
from qtrain.errors import UserError
from qtrain.runs.files import read_json
from qtrain.runs.metrics_log import read_metrics
from qtrain.runs.table import read_settings
from qtrain.units import readable

# Okabe and Ito's palette, told apart with any colour vision
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
SMOOTHING = 50  # the smoothed curve averages over a fiftieth of the run to either side, at least one point


@dataclass(frozen=True)
class Curve:
    """One metric over the run: tokens seen and values, float64 of equal length."""

    tokens: np.ndarray
    values: np.ndarray


def plot_loss(run_dir: str | Path) -> Path:
    """Draws training and validation loss (nats per token) and learning rate over tokens into run_dir/loss.png.

    The bigram line is drawn where summary.json tells it. UserError when metrics.jsonl is missing, holds no loss, or is
    damaged before its last line; a half-written last line is left out, with a warning in the log.
    """
    run_dir = Path(run_dir)
    lines = read_metrics(run_dir / "metrics.jsonl")
    train, validation, lr = (curve(lines, key) for key in ("loss", "val_loss", "lr"))
    keys = dict.fromkeys(key for line in lines for key in line if key.startswith("val_loss/"))
    if not len(train.values) and not len(validation.values):
        raise UserError(f"{run_dir / 'metrics.jsonl'} holds no loss yet; let the run log at least one step")
    config, summary = read_settings(run_dir), read_json(run_dir / "summary.json")

    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
    for key, style in zip(keys, cycle((":", "-.", (0, (5, 1)), (0, (1, 1, 5, 1)))), strict=False):
        one = curve(lines, key)
        label = key.replace("val_loss/", "validation on ")
        panels[0].plot(one.tokens, one.values, color=ORANGE, linestyle=style, linewidth=1, label=label)
    _draw_losses(panels[0], train, validation, summary.get("bigram_cross_entropy"))
    _draw_learning_rate(panels[1], lr)
    figure.align_ylabels()
    figure.suptitle(_title(config, summary), parse_math=False, fontsize=12, fontweight="bold", x=0.02, ha="left")
    path = run_dir / "loss.png"
    figure.savefig(path, dpi=150)
    return path


def curve(lines: list[dict[str, Any]], key: str) -> Curve:
    """The finite values of a metric over tokens."""
    pairs = [(line["tokens"], line[key]) for line in lines if line.get(key) is not None]
    array = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    array = array[np.isfinite(array[:, 1])]
    return Curve(array[:, 0], array[:, 1])


def smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Moving average over `reach` points to either side. At the start the window shrinks on both sides, so that the
    steep fall is not blurred; at the end only on the right, so that the last value is an average too."""
    sums = np.concatenate(([0.0], np.cumsum(values)))
    index = np.arange(len(values))
    first = np.maximum(index - reach, 0)
    last = np.minimum(np.minimum(index + reach, 2 * index), len(values) - 1)
    return (sums[last + 1] - sums[first]) / (last + 1 - first)


def _title(config: dict[str, Any], summary: dict[str, Any]) -> str:
    recipe, model = config["recipe"]["name"], model_title(config["model"])
    name = "" if config["name"] == recipe else f"{config['name']}: "
    size = f" ({readable(summary['parameters'])} parameters)" if summary.get("parameters") else ""
    return f"{name}{recipe} on {model}{size}"


def _draw_losses(axes: Axes, train: Curve, validation: Curve, bigram: float | None) -> None:
    if len(train.values):
        axes.plot(train.tokens, train.values, color=BLUE, alpha=0.25, linewidth=1)
        reach = max(1, len(train.values) // SMOOTHING)
        axes.plot(train.tokens, smooth(train.values, reach), color=BLUE, linewidth=1.8, label="training")
    if len(validation.values):
        axes.plot(validation.tokens, validation.values, "o-", color=ORANGE, markersize=5, label="validation")
        axes.annotate(
            f"{validation.values[-1]:.3f}",
            (validation.tokens[-1], validation.values[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=ORANGE,
            fontweight="bold",
            annotation_clip=False,
        )
    if bigram is not None:
        axes.axhline(bigram, color=GREEN, linestyle="--", linewidth=1.4, label=f"bigram model {bigram:.3f}")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False)
    tidy(axes)


def _draw_learning_rate(axes: Axes, lr: Curve) -> None:
    axes.plot(lr.tokens, lr.values, color=GREY, linewidth=1.4)
    axes.set_ylabel("lr")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: readable(count)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
    axes.locator_params(axis="y", nbins=2)
    tidy(axes)


def tidy(axes: Axes) -> None:
    """The frame and the grid that all pictures have."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
