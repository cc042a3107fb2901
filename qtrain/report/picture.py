"""What the pictures of a report share: size, colours, and the words that stand for a picture where it is not seen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogFormatter,
    LogFormatterMathtext,
    LogLocator,
    MaxNLocator,
    NullFormatter,
)

from qtrain.units import readable

WIDTH = 4.4  # inches: letters of 9 points are still 9 pixels high on a telephone, 330 pixels wide
FONTS: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8,
    "text.parse_math": False,  # names come from files: "4$x$" is a recipe's, and no formula
}  # matplotlib settings, while a page is made
MOST_POINTS = 200  # of a line: more cannot be told apart at this width

# Okabe and Ito's palette without its yellow, too pale on white; black is the baseline's
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", (0, (4, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

Style = dict[str, Any]


@dataclass(frozen=True)
class Picture:
    """A figure, its name as file and anchor, its caption, and what it shows in words."""

    name: str
    figure: Figure
    caption: str
    alt: str

    def without(self, left_out: Sequence[str]) -> Picture:
        """The same; its caption names what there was no room for."""
        return replace(self, caption=f"{self.caption} Not shown: {', '.join(left_out)}.") if left_out else self

    def said_of(self, corpus: str) -> Picture:
        """The same with the name of the corpus in its words."""
        return replace(self, caption=f"{self.caption} On {corpus}.", alt=f"{self.alt}; on {corpus}")


def new_figure(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of the page's width, height in inches, and its panels in reading order."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(panels.flat)


def styles(labels: Iterable[str], baseline: str) -> dict[str, Style]:
    """A line style for each label, the same in every picture of a page: told apart by colour, then by dashes, and by
    marker."""
    others = sorted({*labels} - {baseline})
    found: dict[str, Style] = {baseline: {"color": "black", "linestyle": "-", "marker": MARKERS[0]}}
    for number, label in enumerate(others):
        found[label] = {
            "color": COLOURS[number % len(COLOURS)],
            "linestyle": DASHES[number // len(COLOURS) % len(DASHES)],
            "marker": MARKERS[(number + 1) % len(MARKERS)],
        }
    return found


def variant(number: int) -> Style:
    """What tells lines of one colour apart, from number 1 on."""
    return {"linestyle": DASHES[number % len(DASHES)], "marker": MARKERS[-number % len(MARKERS)]}


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS of the points, evenly, the first and the last among them."""
    if len(x) <= MOST_POINTS:
        return x, y
    index = np.linspace(0, len(x) - 1, MOST_POINTS).round().astype(int)
    return x[index], y[index]


def legend_below(figure: Figure, styles: dict[str, Style], shown: Iterable[str]) -> None:
    """One legend for all panels, under them, of those labels alone that are drawn."""
    labels = [label for label in styles if label in {*shown}]
    axes = figure.axes[0]
    handles = [axes.plot([], [], markersize=4, **styles[label])[0] for label in labels]
    widest = max(map(len, labels), default=1)
    columns = max(1, min(4, len(labels), 64 // (widest + 6)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def legend_height(labels: Iterable[str]) -> float:
    """Inches that `legend_below` takes."""
    labels = [*labels]
    columns = max(1, min(4, len(labels), 64 // (max(map(len, labels), default=1) + 6)))
    return 0.17 * -(-len(labels) // columns) + 0.1


def part_labels(figure: Figure) -> None:
    """Lays the figure out. Where labels of a horizontal axis would touch, there are fewer ticks, or, where the ticks
    are the values themselves, their labels are turned."""
    figure.draw_without_rendering()
    for most in (5, 4, 3):
        crowded = [axes for axes in figure.axes if _touch(axes)]
        if not crowded:
            return
        for axes in crowded:
            axes.xaxis.set_minor_formatter(NullFormatter())
            if isinstance(axes.xaxis.get_major_locator(), FixedLocator):
                axes.tick_params(axis="x", rotation=60)
            elif axes.get_xscale() == "log":
                axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if most == 5 else (1.0,), numticks=most))
            else:
                axes.xaxis.set_major_locator(MaxNLocator(nbins=most - 1))
        figure.draw_without_rendering()


def _touch(axes: Axes) -> bool:
    """Whether two labels of the horizontal axis are less than half a letter's height apart."""
    axis = axes.xaxis
    labels = [label for label in (*axis.get_ticklabels(), *axis.get_ticklabels(minor=True)) if label.get_text()]
    low, high = sorted(axis.get_view_interval())
    boxes = [label.get_window_extent() for label in labels if low <= label.get_position()[0] <= high]
    boxes = sorted((box for box in boxes if box.width > 0), key=lambda box: box.x0)
    return any(left.x1 + 0.5 * left.height > right.x0 for left, right in pairwise(boxes))


def flops(value: float) -> str:
    """1.25e+09 -> 1.25e9, with three digits."""
    return re.sub(r"e\+0*", "e", f"{value:.3g}")


def count_axis(axis: Any) -> None:
    """Tick labels as 1.5k, 20M."""
    axis.set_major_formatter(FuncFormatter(lambda count, _: readable(count)))


class PlainLog(LogFormatter):
    """Labels those ticks of a logarithmic axis that matplotlib's own formatter labels, as 0.1, 10, 1000."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def plain_numbers(figure: Figure) -> None:
    """Takes formulas off the axes: matplotlib's numbers of a logarithmic axis are some, which FONTS turns off."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            major, minor = axis.get_major_formatter(), axis.get_minor_formatter()
            if isinstance(major, LogFormatterMathtext):
                axis.set_major_formatter(PlainLog(labelOnlyBase=major.labelOnlyBase))
            if isinstance(minor, LogFormatterMathtext):
                axis.set_minor_formatter(PlainLog(labelOnlyBase=minor.labelOnlyBase))


def span(values: Iterable[float], digits: int = 3) -> str:
    """ "1.813 to 2.04", for alternative texts."""
    values = [*values]
    low, high = f"{min(values):.{digits + 1}g}", f"{max(values):.{digits + 1}g}"
    return low if low == high else f"{low} to {high}"
