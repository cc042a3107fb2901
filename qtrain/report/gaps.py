"""The picture of a comparison: each name's gap to the baseline, its seeds, and what others published."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from qtrain.report.loss import BLUE, GREY, ORANGE, tidy
from qtrain.report.picture import part_labels
from qtrain.report.summaries import Comparison


def plot_gaps(comparisons: list[Comparison], path: Path, published: Mapping[str, float] | None = None) -> None:
    """`gaps_figure`, written into path (png, pdf, svg)."""
    figure = gaps_figure(comparisons, published)
    part_labels(figure)
    figure.savefig(path, dpi=150)


def gaps_figure(
    comparisons: list[Comparison], published: Mapping[str, float] | None = None, width: float = 7.2
) -> Figure:
    """Gaps in nats per token, the least at the top; width in inches.

    comparisons: as `compare` gives them, the baseline first. Every seed a small dot, their mean a large one with its
    95% interval where it has several seeds; published: name -> the gap that others found, a diamond. Names without a
    seed in common with the baseline are left out; where all are, the picture says so. The axis is logarithmic where all
    that is drawn lies above zero, over a decade or more.
    """
    baseline, *others = comparisons
    shown = sorted((other for other in others if np.isfinite(other.gap)), key=lambda other: -other.gap)
    published = {name: gap for name, gap in (published or {}).items() if name in {other.name for other in shown}}
    figure = Figure(figsize=(width, 1.3 + 0.32 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    labels = {False: "one seed, no interval", True: "mean, 95% interval"}  # each in the legend once
    lowest, highest = [], []
    for height, other in enumerate(shown):
        gaps = [loss - baseline.losses[seed] for seed, loss in other.losses.items() if seed in baseline.losses]
        half_width = float(np.nan_to_num(other.half_width))
        lowest += [*gaps, other.gap - half_width]
        highest += [*gaps, other.gap + half_width]
        axes.plot(gaps, [height] * len(gaps), ".", color=BLUE, alpha=0.45, label="" if height else "a seed")
        interval = half_width if np.isfinite(other.half_width) else None
        label = labels.pop(interval is not None, "")
        axes.errorbar(other.gap, height, xerr=interval, fmt="o", color=BLUE, capsize=3, label=label)
    if published:
        heights = [height for height, other in enumerate(shown) if other.name in published]
        gaps = [published[shown[height].name] for height in heights]
        axes.plot(gaps, heights, "D", markerfacecolor="none", color=ORANGE, label="published")
    least, most = min([*lowest, *published.values()], default=0), max([*highest, *published.values()], default=0)
    if least > 0 and most > 10 * least:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="x", which="minor", labelsize=7)
    elif shown:
        axes.axvline(0, color=GREY, linewidth=1)
    axes.set_ylim(-0.6, max(1, len(shown)) - 0.4)
    axes.set_yticks(range(len(shown)), [other.name for other in shown])
    axes.set_xlabel(f"gap to {baseline.name} (nats per token)")
    if shown:
        axes.legend(frameon=False, loc="best")
    else:
        axes.set_xticks([])  # of an axis without a value
        axes.text(0.5, 0.5, "no seed in common", ha="center", va="center", transform=axes.transAxes)
    tidy(axes)
    return figure
