"""The pictures of a fitted law, from law.json alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator
from scipy import ndimage

from qtrain.report.loss import BLUE, GREEN, GREY, ORANGE, tidy
from qtrain.report.picture import plain_numbers
from qtrain.units import readable

Law = dict[str, Any]
Array = np.ndarray

# Okabe and Ito's palette, as in `qtrain.report.loss`, and a shape for each, so that print without colours tells too
COLOURS = (GREY, BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
PANELS = 6
WIDE = 3  # the factor of an interval beyond which it does not set the axis: what is not known would hide what is
BEYOND = 8  # how far, as a factor of N, the IsoFLOP curves leave the runs
FLOPS_PER_PARAMETER_AND_TOKEN = 6


@rc_context({"text.parse_math": False})  # names come from files: "4$x$" is a recipe's, and no formula
def law_figures(law: Law) -> dict[str, Figure]:
    """name -> figure: loss_by_tokens, loss_by_parameters, residuals; isoflop, efficiencies and precision_map where the
    law has them. law: what `qtrain fit` writes to law.json."""
    figures = {
        "loss_by_tokens": _small_multiples(law, "D", "training tokens", "N", "parameters"),
        "loss_by_parameters": _small_multiples(law, "N", "non-embedding parameters", "D/N", "tokens per parameter"),
        "residuals": _residuals(law),
    }
    if _has_curves(law):
        figures["isoflop"] = _isoflop(law)
    if law["efficiencies"]:
        figures["efficiencies"] = _efficiencies(law)
    if law.get("map"):
        figures["precision_map"] = _precision_map(law["map"])
    for figure in figures.values():
        plain_numbers(figure)
    return figures


def without_panel(law: Law) -> list[str]:
    """The recipes for which loss_by_tokens and loss_by_parameters have no room."""
    return _recipes(law)[PANELS:]


def predicted(law: Law, recipe: str, N: Array, D: Array) -> Array:
    """Loss in nats per token of a recipe by the law's constants; N and D of shapes that broadcast."""
    value = {name: constant["value"] for name, constant in law["constants"].items()}
    own = law["efficiencies"].get(recipe, {})
    efficiency_N, efficiency_D = (own.get(which, {}).get("value", 1.0) for which in ("eff_N", "eff_D"))
    of_N = value["A"] / (N * efficiency_N) ** value["alpha"]
    return value["E"] + (of_N + value["B"] / (D * efficiency_D) ** value["beta"]) ** value["gamma"]


def _has_curves(law: Law) -> bool:
    """The floating-point law's points do not say their precision; and A and B may be beyond any float."""
    constants = law["constants"]
    return "G" not in constants and None not in (constants["A"]["value"], constants["B"]["value"])


def _figure(width: float, height: float, **subplots: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(**subplots)


def _recipes(law: Law) -> list[str]:
    """Those that have points, the baseline first, then by the number of points."""
    counts: dict[str, int] = {}
    for point in law["points"]:
        counts[point["recipe"]] = counts.get(point["recipe"], 0) + 1
    return sorted(counts, key=lambda recipe: (recipe != law["baseline"], -counts[recipe]))


def _small_multiples(law: Law, x_name: str, x_label: str, by: str, by_label: str) -> Figure:
    """Loss over N or D, a panel for each recipe, a colour for each level of the other axis, curves of the law."""
    recipes = _recipes(law)[:PANELS]
    columns = 2 if len(recipes) == 4 else min(3, len(recipes))
    rows = -(-len(recipes) // columns)
    figure, grid = _figure(1.6 + 2.9 * columns, 0.9 + 2.6 * rows, nrows=rows, ncols=columns, sharex=True, sharey=True,
                           squeeze=False)  # fmt: skip
    levels = _levels(law["points"], by)
    shades = _viridis(len(levels))
    for axes, recipe in zip(grid.flat, recipes, strict=False):
        for level, shade in zip(levels, shades, strict=True):
            points = [p for p in law["points"] if p["recipe"] == recipe and _near(_value(p, by), level)]
            _draw_level(axes, law, recipe, points, x_name, shade)
        axes.set_title(recipe, fontsize=10, loc="left")
        _log_axis(axes, [point[x_name] for point in law["points"]])
        tidy(axes)
    for axes in list(grid.flat)[len(recipes) :]:
        axes.set_visible(False)
    for axes in list(grid.flat)[max(0, len(recipes) - columns) : len(recipes)]:  # the lowest of each column
        axes.set_xlabel(x_label)
        axes.tick_params(labelbottom=True)
    for axes in grid[:, 0]:
        axes.set_ylabel("loss (nats per token)")
    handles = [Patch(color=shade, label=_short(level)) for level, shade in zip(levels, shades, strict=True)]
    figure.legend(handles=handles, title=by_label, loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _draw_level(axes: Axes, law: Law, recipe: str, points: list[Law], x_name: str, shade: str) -> None:
    """The runs of one recipe at one N (over D) or at one D/N (over N), and the law's curve through them."""
    for held in (False, True):
        shown = [point for point in points if point["held_out"] is held]
        face = "none" if held else shade
        axes.plot([p[x_name] for p in shown], [p["loss"] for p in shown], "o", color=shade, markerfacecolor=face,
                  markersize=5)  # fmt: skip
    if not points or not _has_curves(law):
        return
    ends = [point[x_name] for point in points]
    x = np.geomspace(min(ends) / 1.2, max(ends) * 1.2, 60)
    N = np.full_like(x, points[0]["N"]) if x_name == "D" else x
    D = x if x_name == "D" else x * np.exp(np.mean([np.log(p["D"] / p["N"]) for p in points]))
    axes.plot(x, predicted(law, recipe, N, D), color=shade, linewidth=1.3)


def _short(level: float) -> str:
    return f"{level:.2g}" if level < 100 else readable(level)


def _value(point: Law, by: str) -> float:
    return point["D"] / point["N"] if by == "D/N" else point[by]


def _near(value: float, level: float) -> bool:
    return abs(np.log(value / level)) < 0.1


def _levels(points: list[Law], by: str) -> list[float]:
    """The values of N or D/N, those within a tenth of each other as one."""
    found: list[float] = []
    for value in sorted(_value(point, by) for point in points):
        if not any(_near(value, level) for level in found):
            found.append(value)
    return found


def _viridis(count: int) -> list[str]:
    """From dark to light but not yellow, which print loses."""
    stops = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [180, 200, 40]])
    at = np.linspace(0, len(stops) - 1, count) if count > 1 else np.array([1.0])
    mixed = [[np.interp(one, range(len(stops)), stops[:, channel]) for channel in range(3)] for one in at]
    return ["#" + "".join(f"{round(channel):02x}" for channel in colour) for colour in mixed]


def _log_axis(axes: Axes, values: list[float]) -> None:
    """A logarithmic x axis with few, readable ticks."""
    axes.set_xscale("log")
    low, high = min(values) / 1.4, max(values) * 1.4
    candidates = [base * 10.0**power for power in range(-3, 16) for base in (1, 3)]
    ticks = [tick for tick in candidates if low <= tick <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks[:: -(-len(ticks) // 6)] if ticks else [min(values)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: readable(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(low, high)


def _residuals(law: Law) -> Figure:
    figure, axes = _figure(7.6, 4.2)
    recipes = _recipes(law)
    shown = recipes[: len(COLOURS) - 1]
    styles = {recipe: (COLOURS[i], MARKERS[i]) for i, recipe in enumerate(shown)}
    for group in [*shown, *(["others"] if len(recipes) > len(shown) else [])]:
        colour, marker = styles.get(group, (COLOURS[-1], MARKERS[-1]))
        points = [p for p in law["points"] if (p["recipe"] if p["recipe"] in styles else "others") == group]
        for held in (False, True):
            chosen = [point for point in points if point["held_out"] is held]
            label = f"{group}{', held out' if held else ''}" if chosen else ""
            axes.plot([p["predicted"] for p in chosen], [p["residual"] for p in chosen], marker, color=colour,
                      markerfacecolor="none" if held else colour, markersize=5, label=label)  # fmt: skip
    axes.axhline(0, color=GREY, linewidth=1)
    rmse = law["fit"]["rmse_of_constants"]
    axes.axhspan(-rmse, rmse, color=GREY, alpha=0.12, linewidth=0, label=f"rms of {law['baseline']} {rmse:.4f}")
    largest = max(abs(point["residual"]) for point in law["points"])
    if largest > 8 * rmse > 0:  # a few bad recipes would press all others onto the line
        axes.set_yscale("symlog", linthresh=4 * rmse)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
    axes.set_xlabel("predicted loss (nats per token)")
    axes.set_ylabel("measured less predicted")
    tidy(axes)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _isoflop(law: Law) -> Figure:
    """The baseline's loss over N at equal C = 6 N D, its minimum marked where the curve has one: the least of one that
    falls to its end is the end's."""
    figure, axes = _figure(7.2, 4.2)
    points = [point for point in law["points"] if point["recipe"] == law["baseline"]] or law["points"]
    N, D = (np.array([point[name] for point in points]) for name in ("N", "D"))
    C = FLOPS_PER_PARAMETER_AND_TOKEN * N * D
    # to the two digits of the legend: budgets that differ by part of a batch are one
    budgets = np.unique([float(f"{budget:.2g}") for budget in np.geomspace(C.min(), C.max(), 6)])
    grid = np.geomspace(N.min() / BEYOND, N.max() * BEYOND, 400)
    best_N, best_L, lowest = [], [], []
    for budget, shade in zip(budgets, _viridis(len(budgets)), strict=True):
        tokens = budget / (FLOPS_PER_PARAMETER_AND_TOKEN * grid)
        losses = predicted(law, law["baseline"], grid, tokens)
        observed = (grid >= N.min()) & (grid <= N.max()) & (tokens >= D.min()) & (tokens <= D.max())
        axes.plot(grid, losses, ":", color=shade, linewidth=1.2)
        axes.plot(grid[observed], losses[observed], color=shade, linewidth=2.2, label=f"6 N D = {budget:.2g}")
        lowest.append(losses.min())
        if 0 < losses.argmin() < len(grid) - 1:
            best_N.append(grid[losses.argmin()])
            best_L.append(losses.min())
    if best_N:
        axes.plot(best_N, best_L, "o--", color=GREY, markersize=5, linewidth=1, label="least loss")
    axes.plot([], [], ":", color=GREY, label="beyond the runs")
    low, high = min(lowest), max(lowest)
    axes.set_ylim(low - 0.1 * (high - low) - 0.02, high + 0.9 * (high - low) + 0.1)
    _log_axis(axes, [grid[0], grid[-1]])
    axes.set_xlabel(f"non-embedding parameters ({law['baseline']})")
    axes.set_ylabel("loss (nats per token)")
    tidy(axes)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _efficiencies(law: Law) -> Figure:
    names = list(next(iter(law["efficiencies"].values())))
    sort: Callable[[str], float] = lambda recipe: _product(law["efficiencies"][recipe])  # noqa: E731
    recipes = sorted(law["efficiencies"], key=sort)
    figure, grid = _figure(
        2.4 + 3.0 * len(names), 1.1 + 0.3 * len(recipes), ncols=len(names), sharey=True, squeeze=False
    )
    for axes, name, colour in zip(grid[0], names, (BLUE, ORANGE), strict=False):
        estimates = [law["efficiencies"][recipe][name] for recipe in recipes]
        left, right, scale = _efficiency_axis(estimates)
        beyond = False
        for height, estimate in enumerate(estimates):
            low, high = estimate["low"], estimate["high"]
            face = "white" if _is_held(estimate) else colour
            axes.plot(estimate["value"], height, "o", color=colour, markerfacecolor=face, markersize=6)
            if _is_held(estimate) or not _has_interval(estimate):
                continue
            axes.plot([max(low, left), min(high, right)], [height, height], color=colour, linewidth=2)
            for edge, marker, out in ((left, "<", low < left), (right, ">", high > right)):
                if out:
                    axes.plot(edge, height, marker, color=colour, markersize=6, clip_on=False)
                    beyond = True
        axes.axvline(1, color=GREY, linewidth=1, zorder=0)
        told = {
            "hollow: held": any(map(_is_held, estimates)),
            "arrow: goes on": beyond,
            "no line: no interval": not all(map(_has_interval, estimates)),
        }
        notes = "; ".join(note for note, needed in told.items() if needed)
        axes.set_xlabel(f"{name} (1: as {law['baseline']}), 95% interval" + f"\n{notes}" * bool(notes))
        axes.set_yticks(range(len(recipes)), recipes)
        axes.set_ylim(-0.6, len(recipes) - 0.4)
        tidy(axes)
        axes.set_xscale(scale)
        axes.set_xlim(left, right)
        if scale == "log":
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return figure


def _has_interval(estimate: Law) -> bool:
    """Not without draws, nor where an end of it is beyond any float."""
    return estimate["low"] is not None and estimate["high"] is not None


def _is_held(estimate: Law) -> bool:
    return _has_interval(estimate) and estimate["low"] == estimate["high"]


def _efficiency_axis(estimates: list[Law]) -> tuple[float, float, str]:
    """(left, right, scale) of an axis that holds 1, every value, and every interval that is not `WIDE`."""
    narrow = [e for e in estimates if _has_interval(e) and e["high"] <= WIDE * e["low"]]
    shown = [1.0, *(e["value"] for e in estimates), *(e[end] for e in narrow for end in ("low", "high"))]
    lowest, highest = min(shown), max(shown)
    if lowest < 0.1 or highest > 10:
        return lowest / 1.3, highest * 1.3, "log"
    return 0.0, highest * 1.05, "linear"


def _product(estimates: Law) -> float:
    return float(np.prod([estimate["value"] for estimate in estimates.values()]))


def _precision_map(found: Law) -> Figure:
    """Which recipe has the least loss at equal compute, its number in each of its regions; pale where fewer than 95%
    of the draws agree."""
    figure, axes = _figure(7.4, 4.6)
    best, recipes = np.array(found["best"]), found["recipes"]
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(recipes))]
    x, y = found["D_per_N"], found["N"]
    axes.pcolormesh(x, y, best, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(recipes) - 0.5, shading="nearest",
                    alpha=0.75, linewidth=0, rasterized=True)  # fmt: skip
    if found["share"]:
        unsure = np.where(np.array(found["share"]) < 0.95, 1.0, np.nan)
        axes.pcolormesh(x, y, unsure, cmap=ListedColormap(["white"]), shading="nearest", alpha=0.6, rasterized=True)
    for index in np.unique(best):
        _number_regions(axes, x, y, best == index, str(index + 1))
    _draw_borders(axes, x, y, best)
    seen = found["observed"]
    corner, extent = (seen["D_per_N"][0], seen["N"][0]), (np.ptp(seen["D_per_N"]), np.ptp(seen["N"]))
    axes.add_patch(Rectangle(corner, *extent, fill=False, edgecolor="black", linewidth=1.3, linestyle="--"))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: readable(value)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: readable(value)))
    axes.set_xlabel("tokens per parameter of the baseline at this budget")
    axes.set_ylabel("parameters of the baseline at this budget")
    axes.set_title(f"speeds: {found['speed_model']}", fontsize=8, loc="left")
    there = set(np.unique(best).tolist())
    handles: list[Any] = [
        Patch(color=colour, alpha=0.75, label=f"{index + 1}  {name}{'' if index in there else ' (nowhere)'}")
        for index, (name, colour) in enumerate(zip(recipes, colours, strict=True))
    ]
    handles.append(Rectangle((0, 0), 1, 1, fill=False, edgecolor="black", linestyle="--", label="the fitted runs"))
    if found["share"]:
        handles.append(Patch(facecolor="#dddddd", label="pale: under 95% of draws agree"))
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _number_regions(axes: Axes, x: list[float], y: list[float], inside: Array, text: str) -> None:
    """The text in the midst of each region of a recipe's cells: the colours are few, and some are alike in grey."""
    regions = np.zeros(inside.shape, dtype=int)
    ndimage.label(inside, output=regions)
    for region in range(1, regions.max() + 1):
        cells = np.argwhere(regions == region)
        row, column = cells[np.abs(cells - np.median(cells, axis=0)).sum(axis=1).argmin()]
        axes.text(x[column], y[row], text, ha="center", va="center", fontsize=10, fontweight="bold",
                  path_effects=[withStroke(linewidth=3, foreground="white")])  # fmt: skip


def _draw_borders(axes: Axes, x: list[float], y: list[float], best: Array) -> None:
    """A line between cells of different recipes."""
    across, up = _cell_edges(x), _cell_edges(y)
    row, column = np.nonzero(best[:, 1:] != best[:, :-1])
    axes.vlines(across[column + 1], up[row], up[row + 1], color="black", linewidth=0.7)
    row, column = np.nonzero(best[1:] != best[:-1])
    axes.hlines(up[row + 1], across[column], across[column + 1], color="black", linewidth=0.7)


def _cell_edges(centres: list[float]) -> Array:
    """Where pcolormesh puts them: halfway, and as far beyond the ends."""
    between = np.convolve(centres, (0.5, 0.5), "valid")
    return np.concatenate(([2 * centres[0] - between[0]], between, [2 * centres[-1] - between[-1]]))
