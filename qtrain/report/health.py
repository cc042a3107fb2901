"""The health of quantisation by layer: heat maps of a run's telemetry, whose keys are
quant/<layer>/<gemm>.<operand>/<metric> and grad/<layer>/<metric> in lines of metrics.jsonl of their own."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from qtrain.report.curves import by_largest
from qtrain.report.picture import Picture, new_figure, span
from qtrain.report.runs import Corpus, Run
from qtrain.runs.metrics_log import scan_metrics
from qtrain.units import readable

OPERANDS = ("fprop.x", "fprop.w", "dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x")
METRICS = {
    "sqnr_db": "SQNR (dB)",
    "clipped": "clipped elements",
    "scale_underflow": "blocks of scale too small",
    "scale_overflow": "blocks of scale too large",
    "mask_density": "passed by gradient mask",
    "kurtosis": "kurtosis",
    "max_to_mean": "largest to mean magnitude",
}
GRADIENTS = {"cosine": "cosine", "projection": "projection"}
SHARES = ("clipped", "scale_underflow", "scale_overflow")  # drawn from zero: most of them are zero
SKEWED = ("kurtosis", "max_to_mean")  # drawn on a logarithmic scale: one layer may be a hundred times the others
COLOURS = (
    "viridis"  # told apart with any colour vision and in grey; it has no grey itself, which is for what is missing
)
_WORD = re.compile(r"[a-z0-9]+")
MOST_RUNS = 4  # the largest run of as many recipes
MOST_TIMES = 40  # columns of a heat map
MOST_TICKS = 28  # layer names beside one


@dataclass(frozen=True)
class Telemetry:
    """values: (kind of value, column) -> (layers, times) float64, NaN where there is none. A column is an operand of
    a GEMM, or "" for a gradient's."""

    layers: list[str]
    tokens: list[int]
    values: dict[tuple[str, str], np.ndarray]

    @classmethod
    def read(cls, path: Path) -> Telemetry:
        """Of a metrics.jsonl; damaged lines are left out, and where all are, nothing remains: no layer, no value."""
        lines = [line for line in scan_metrics(path)[0] if any(key.startswith(("quant/", "grad/")) for key in line)]
        found: dict[tuple[str, str], dict[tuple[str, int], float]] = defaultdict(dict)
        for line in lines:
            for key, value in line.items():
                match key.split("/"):
                    case ["quant", layer, operand, metric] if value is not None:
                        found[(metric, operand)][(layer, line["tokens"])] = value
                    case ["grad", layer, metric] if value is not None:
                        found[(metric, "")][(layer, line["tokens"])] = value
        if not found:
            return cls([], [], {})
        layers = sorted({layer for cells in found.values() for layer, _ in cells}, key=_natural)
        tokens = sorted({at for cells in found.values() for _, at in cells})
        tokens = [tokens[n] for n in np.unique(np.linspace(0, len(tokens) - 1, MOST_TIMES).round().astype(int))]
        values = {
            key: np.array([[cells.get((layer, at), np.nan) for at in tokens] for layer in layers], dtype=np.float64)
            for key, cells in found.items()
        }
        return cls(layers, tokens, values)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """layers.2 before layers.10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]


def health_pictures(corpus: Corpus) -> list[Picture]:
    """For the largest run with telemetry of each of a few recipes, of equal ones a finished: SQNR of every operand over
    time, all other measures at the end, and the gradients where they were measured. The first caption names the
    recipes that are not shown."""
    groups = by_largest((run for run in corpus.runs if run.telemetry), key=lambda run: run.recipe)
    pictures = []
    for number, members in enumerate(list(groups.values())[:MOST_RUNS], 1):
        run = min(members, key=_largest_finished)
        pictures += _pictures_of(run, number, Telemetry.read(Path(run.row["directory"]) / "metrics.jsonl"))
    if pictures:
        pictures[0] = pictures[0].without(list(groups)[MOST_RUNS:])
    return pictures


def _largest_finished(run: Run) -> tuple[int, bool, int]:
    """A sort key: by FLOPs, and of equal ones the finished first."""
    return -(run.row["flops"] or 0), run.row["status"] != "finished", run.row["seed"]


def _whose(run: Run) -> str:
    """In a caption; what an unfinished run measured is said to be its own."""
    status = "" if run.row["status"] == "finished" else f", {run.row['status']}"
    return f"{run.label} ({run.row['directory']}{status})"


def _pictures_of(run: Run, number: int, found: Telemetry) -> list[Picture]:
    """number: of the recipe, for names of its own: letters and digits alone may be those of another, or none."""
    name, whose = "-".join([str(number), *_WORD.findall(run.recipe.lower())]), _whose(run)
    pictures = []
    columns = [operand for operand in OPERANDS if ("sqnr_db", operand) in found.values]
    if columns:
        maps = {operand: found.values[("sqnr_db", operand)] for operand in columns}
        figure = _maps_over_time(found, maps, METRICS["sqnr_db"], shared=True)
        caption = f"Signal to quantisation noise of every layer and operand over tokens: {whose}. Lower is worse."
        pictures.append(Picture(f"health-{name}-sqnr", figure, caption, f"{caption} {_worst(found, maps)}"))
    others = [metric for metric in METRICS if any((metric, operand) in found.values for operand in OPERANDS)]
    if others:
        caption = f"Every measure of every layer and operand at the last measurement, shares from 0 to 1: {whose}."
        caption += " Grey: not measured."
        pictures.append(Picture(f"health-{name}-last", _maps_at_end(found, others), caption, caption))
    maps = {title: found.values[(metric, "")] for metric, title in GRADIENTS.items() if (metric, "") in found.values}
    if maps:
        caption = (
            f"The quantised gradient of each layer's weight against the exact one over tokens: {whose}. 1 is best."
        )
        alt = f"{caption} {_worst(found, maps)}"
        pictures.append(
            Picture(f"health-{name}-gradient", _maps_over_time(found, maps, "", shared=False), caption, alt)
        )
    return pictures


def _worst(found: Telemetry, maps: dict[str, np.ndarray]) -> str:
    told = []
    for title, values in maps.items():
        last = values[:, -1]
        if np.isfinite(last).any():
            told.append(f"{title} {span(last[np.isfinite(last)])}, least in {found.layers[int(np.nanargmin(last))]}")
    return f"At the end: {'; '.join(told)}."


def _height(layers: list[str]) -> float:
    return max(0.9, min(3.6, 0.13 * len(layers)))


def _maps_over_time(found: Telemetry, maps: dict[str, np.ndarray], label: str, shared: bool) -> Figure:
    """A panel each, two in a row; shared: one colour bar for all of them."""
    rows = -(-len(maps) // 2)
    figure, panels = new_figure(0.6 + (_height(found.layers) + 0.45) * rows, rows, 2, sharex=True, sharey=True)
    finite = np.concatenate([values[np.isfinite(values)] for values in maps.values()])
    limits = {"vmin": finite.min(), "vmax": finite.max()} if shared and len(finite) else {}
    image = None
    for axes, (title, values) in zip(panels, maps.items(), strict=False):
        image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap=COLOURS, **limits)
        axes.set_title(title, loc="left")
        _layer_ticks(axes, found.layers)
        ticks = np.unique(np.linspace(0, len(found.tokens) - 1, 3).round().astype(int))
        axes.set_xticks(ticks, [readable(found.tokens[tick]) for tick in ticks])
        axes.tick_params(labelbottom=True)
        if not shared:
            figure.colorbar(image, ax=axes, location="bottom", fraction=0.05)
    for axes in panels[len(maps) :]:
        axes.set_visible(False)
    if shared and image is not None:
        figure.colorbar(image, ax=panels, location="bottom", label=label, fraction=0.03, aspect=40)
    return figure


def _maps_at_end(found: Telemetry, metrics: list[str]) -> Figure:
    """A panel a metric: layers down, operands across, with a colour bar each."""
    rows = -(-len(metrics) // 2)
    figure, panels = new_figure(0.4 + (_height(found.layers) + 1.25) * rows, rows, 2, sharey=True)
    for axes, metric in zip(panels, metrics, strict=False):
        missing = np.full(len(found.layers), np.nan)
        columns = [found.values[(metric, operand)][:, -1] if (metric, operand) in found.values else missing
                   for operand in OPERANDS]  # fmt: skip
        axes.set_facecolor("#cccccc")
        values = np.stack(columns, axis=1)
        norm = _scale(metric, values[np.isfinite(values)])
        image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap=COLOURS, norm=norm)
        axes.set_title(METRICS[metric], loc="left", fontsize=8)
        axes.set_xticks(range(len(OPERANDS)), OPERANDS, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
        _layer_ticks(axes, found.layers)
        figure.colorbar(image, ax=axes, location="right", fraction=0.06).ax.tick_params(which="both", labelsize=7)
    for axes in panels[len(metrics) :]:
        axes.set_visible(False)
    return figure


def _scale(metric: str, values: np.ndarray) -> Normalize | None:
    if metric in SHARES:
        return Normalize(0, values.max(initial=0) or 1)
    return LogNorm() if metric in SKEWED and len(values) and values.min() > 0 else None


def _layer_ticks(axes: Axes, layers: list[str]) -> None:
    ticks = range(0, len(layers), -(-len(layers) // MOST_TICKS))
    axes.set_yticks(ticks, [layers[tick].removeprefix("layers.") for tick in ticks], fontsize=6)
