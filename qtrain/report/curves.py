"""The pictures of runs side by side: loss, gap to the baseline, learning rate, speed and memory."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from qtrain.errors import UserError
from qtrain.report.gaps import gaps_figure, plot_gaps
from qtrain.report.loss import GREY, SMOOTHING, smooth, tidy
from qtrain.report.picture import (
    MARKERS,
    WIDTH,
    Picture,
    Style,
    count_axis,
    flops,
    legend_below,
    legend_height,
    new_figure,
    span,
    styles,
    thin,
    variant,
)
from qtrain.report.runs import Corpus, Point, Run, point_title, told_apart
from qtrain.report.summaries import Comparison, compare
from qtrain.units import readable

MOST_PANELS = 6  # sizes or budgets with a panel of their own, the largest by FLOPs; the tables have all of them
FEW = 12  # a panel of so few runs, of so few points, has the points marked

LADDER = 3  # so many sizes and budgets are seen in one picture, over both

Series = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Axis:
    """A way in which the points of a ladder differ. line: what a line of one value is called."""

    name: str
    value: Callable[[Point], float]
    shown: Callable[[float], str]
    line: str


SIZE = Axis("non-embedding parameters", lambda point: point[0], readable, "{} parameters")
# To two digits: budgets are whole steps, so that ratios of one rung differ by a little
RATIO = Axis("tokens per parameter", lambda point: float(f"{point[2] / point[0]:.2g}"), "{:g}".format, "{} a parameter")


def series(run: Run, key: str, over: str = "tokens") -> Series:
    """The finite values of a metric over another that stands in the same lines, float64."""
    pairs = [(line[over], line[key]) for line in run.lines if line.get(key) is not None and line.get(over) is not None]
    array = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    array = array[np.isfinite(array).all(axis=1)]
    return array[:, 0], array[:, 1]


def training_loss(run: Run) -> Series:
    tokens, loss = series(run, "loss")
    return thin(tokens, smooth(loss, max(1, len(loss) // SMOOTHING)))


def validation_loss(run: Run, over: str = "tokens") -> Series:
    return thin(*series(run, "val_loss", over))


def sources(runs: Iterable[Run]) -> list[str]:
    """The names of the further sources that runs validated on."""
    keys = {key for run in runs for line in run.lines for key in line if key.startswith("val_loss/")}
    names = (key.removeprefix("val_loss/") for key in keys)
    return sorted(name for name in names if re.fullmatch(r"[A-Za-z0-9_-]+", name))  # it names a file


def loss_over_seconds(run: Run) -> Series:
    """Seconds of training alone, without validation and checkpoints: tokens over the speed of each interval, summed."""
    tokens, speed = series(run, "tokens_per_second")
    at, loss = series(run, "val_loss")
    if not len(tokens):
        return np.empty(0), np.empty(0)
    seconds = np.cumsum(np.diff(tokens, prepend=0) / np.maximum(speed, 1e-9))
    return thin(np.interp(at, [0, *tokens], [0, *seconds]), loss)


def loss_on(source: str, run: Run) -> Series:
    return thin(*series(run, f"val_loss/{source}"))


def by_largest(runs: Iterable[Run], key: Callable[[Run], Any]) -> dict[Any, list[Run]]:
    """Groups of runs, the one with the most FLOPs first."""
    groups: dict[Any, list[Run]] = defaultdict(list)
    for run in runs:
        groups[key(run)].append(run)
    return dict(sorted(groups.items(), key=lambda item: -max(run.row["flops"] or 0 for run in item[1])))


# --------------------------------------------------------------------------------------------------------- loss


def loss_pictures(corpus: Corpus, baseline: str) -> list[Picture]:
    """Training and validation loss over tokens, validation loss over FLOPs and over time, and over tokens the loss on
    each further source."""
    look = styles((run.recipe for run in corpus.runs), baseline)
    time = "Training time alone, from the speed that each run logged; it compares between runs of one machine."
    kinds: list[tuple[str, str, str, Callable[[Run], Series], str]] = [
        ("loss-training", "Training loss", "tokens", training_loss, "Averaged over a fiftieth of the run either way."),
        ("loss-tokens", "Validation loss", "tokens", validation_loss, ""),
        ("loss-flops", "Validation loss", "FLOPs", lambda run: validation_loss(run, "flops"), ""),
        ("loss-time", "Validation loss", "seconds", loss_over_seconds, time),
        *(
            (f"loss-on-{name}", f"Validation loss on {name}", "tokens", partial(loss_on, name), "")
            for name in sources(corpus.runs)
        ),
    ]
    pictures = []
    for name, what, over, curve, note in kinds:
        curves = [(run, *curve(run)) for run in corpus.runs]
        drawn = [(run, x, y) for run, x, y in curves if len(x)]
        if over == "seconds" and drawn:
            over, unit = time_unit(max(x[-1] for _, x, _ in drawn))
            drawn = [(run, x / unit, y) for run, x, y in drawn]
        if drawn:
            pictures.append(_loss_picture(name, what, over, drawn, look, note))
    return pictures


def time_unit(most: float) -> tuple[str, float]:
    """Its name and seconds: the largest of which `most` seconds are at least two."""
    units = {"days": 86400.0, "hours": 3600.0, "minutes": 60.0}
    return next(((name, unit) for name, unit in units.items() if most >= 2 * unit), ("seconds", 1.0))


def _loss_picture(
    name: str, what: str, over: str, drawn: list[tuple[Run, np.ndarray, np.ndarray]], look: dict[str, Style], note: str
) -> Picture:
    sizes = by_largest((run for run, *_ in drawn), key=lambda run: run.row["non_embedding_parameters"])
    panelled = 1 < len(sizes) <= MOST_PANELS and over != "FLOPs"
    recipes = {run.recipe for run, *_ in drawn}
    rows = len(sizes) if panelled else 1
    figure, panels = new_figure(0.5 + (2.0 if panelled else 2.9) * rows + legend_height(recipes), rows)
    for axes, size in zip(panels, sorted(sizes, key=lambda size: size or 0) if panelled else [None], strict=True):
        members = [one for one in drawn if not panelled or one[0].row["non_embedding_parameters"] == size]
        for run, x, y in members:
            few = len(members) <= FEW and len(x) <= FEW
            _draw_curve(axes, x, y, look[run.recipe], marked=few or len(x) == 1)
        if panelled:
            axes.set_title(f"{readable(size or 0)} non-embedding parameters", loc="left")
        finished = [one for one in members if one[0].row["status"] == "finished"] or members
        _loss_axes(axes, over, [x for _, x, _ in finished], [y for *_, y in finished])
        for run, x, y in members:
            if run.row["status"] != "finished":
                _draw_cross(axes, x[-1], y[-1], look[run.recipe])
    legend_below(figure, look, recipes)
    unfinished = any(run.row["status"] != "finished" for run, *_ in drawn)
    cross = _ABOUT_CROSSES if unfinished else ""
    last = span(y[-1] for *_, y in drawn)
    kind = "a line each" if all(len(x) > 1 for _, x, _ in drawn) else "a line each, or a dot of one value"
    alt = f"{what} of {len(drawn)} runs over {over}, {kind}; they end at {last} nats per token"
    return Picture(name, figure, " ".join(filter(None, [f"{what} over {over}.", note, cross])), alt)


_ABOUT_CROSSES = (
    "A cross ends a run that did not finish, at the top edge where its loss lies above and at the bottom edge where it "
    "lies below; the axes are those of the finished ones."
)


def _draw_curve(axes: Axes, x: np.ndarray, y: np.ndarray, style: Style, marked: bool) -> None:
    marks = {"marker": style["marker"] if marked else "", "markersize": 3}
    axes.plot(x, y, **style | marks, linewidth=1.2 if marked else 0.8, alpha=0.8)


def _draw_cross(axes: Axes, x: float, y: float, style: Style) -> None:
    """Held at the frame, whose limits are set: a loss beyond them would have no cross."""
    held = np.clip(y, *axes.get_ylim())
    axes.plot(x, held, "x", color=style["color"], markersize=7, markeredgewidth=2, clip_on=False)


def _loss_axes(axes: Axes, over: str, xs: list[np.ndarray], ys: list[np.ndarray]) -> None:
    """To the measure of these curves: logarithmic in x where they are of very different length, and in y without the
    first steep fall."""
    ends = [x[-1] for x in xs]
    if min(ends) * 8 < max(ends):
        axes.set_xscale("log")
        decades = max(ends) > 100 * min(ends)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if decades else (1.0, 2.0, 5.0), numticks=7))
        axes.xaxis.set_minor_formatter(NullFormatter())
    if over == "FLOPs":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: flops(value)))
    else:
        count_axis(axes.xaxis)
    later = np.concatenate([y[len(y) // 10 :] for y in ys])
    low, high = float(later.min()), float(np.quantile(later, 0.99))
    pad = 0.05 * (high - low) or 0.1
    axes.set_ylim(low - pad, high + pad)
    axes.set_xlabel(over)
    axes.set_ylabel("nats per token")
    tidy(axes)


# --------------------------------------------------------------------------------------------------------- gaps


def comparisons(corpus: Corpus, baseline: str) -> dict[Point, list[Comparison]]:
    """For each size and budget that has the baseline and another: every label's gap to it, the baseline first, that of
    `best_baseline` where there are several."""
    found = {}
    for point, members in by_largest(corpus.compared, key=lambda run: run.point).items():
        chosen = best_baseline(members, baseline)
        if chosen is not None and len({run.label for run in members}) > 1:
            found[point] = compare([run.row | {"name": run.label} for run in members], chosen)
    return found


def best_baseline(members: list[Run], baseline: str) -> str | None:
    """The label of the baseline, None without one. Of several, which differ in the learning rate, say, the one that the
    most runs of others share a seed with, then the most runs of any label, then of the least mean loss: a rate that was
    tried at seeds of its own leaves the others without a pair."""
    losses: dict[str, dict[int, float]] = defaultdict(dict)
    for run in members:
        if baseline in (run.row["recipe"], run.row["name"]):
            losses[run.label][run.row["seed"]] = run.row["val_loss"]

    def rank(label: str) -> tuple[int, int, float]:
        pairs = [run.label for run in members if run.label != label and run.row["seed"] in losses[label]]
        return -sum(other not in losses for other in pairs), -len(pairs), mean(losses[label].values())

    return min(losses, key=rank, default=None)


def label_styles(corpus: Corpus, baseline: str) -> dict[str, Style]:
    """A style for each label: its recipe's colour, and dashes and marker of its own where the recipe has several."""
    look = styles((run.recipe for run in corpus.runs), baseline)
    return _variants(look, ((run.recipe, run.label) for run in corpus.runs))


def _variants(look: Mapping[str, Style], named: Iterable[tuple[str, str]]) -> dict[str, Style]:
    """name -> style, of pairs of recipe and name."""
    names: dict[str, set[str]] = defaultdict(set)
    for recipe, name in named:
        names[recipe].add(name)
    return {
        name: style | variant(number) if number else style
        for recipe, style in look.items()
        for number, name in enumerate(sorted(names[recipe]))
    }


def gap_pictures(corpus: Corpus, baseline: str) -> list[Picture]:
    """Of a ladder (`is_ladder`) the gaps at the end over size and over tokens per parameter; else for each size and
    budget those at the end and over the tokens seen. Those without any gap come last, with a picture that says so."""
    at = by_largest(corpus.compared, key=lambda run: run.point)
    found = comparisons(corpus, baseline)
    look = label_styles(corpus, baseline)
    if is_ladder(found):
        return ladder_pictures(found, baseline)
    pictures = []
    for number, (point, compared) in enumerate(sorted(found.items(), key=lambda item: not _paired(item[1])), 1):
        pictures.append(_gaps_picture(f"gaps-{number}", point, compared))
        curves = gap_curves(at[point], compared[0].name)
        if any(len(tokens) > 1 for tokens, _ in curves.values()):
            figure = _gap_curves_figure(curves, look)
            pictures.append(_gap_tokens_picture(f"gap-tokens-{number}", figure, point, compared, at[point]))
    return pictures


def is_ladder(found: Mapping[Point, list[Comparison]]) -> bool:
    """Whether there are so many sizes and budgets with a gap that one is to be seen over them."""
    return sum(bool(_paired(compared)) for compared in found.values()) >= LADDER


def plot_comparisons(found: Mapping[Point, list[Comparison]], path: Path, published: Mapping[str, float]) -> None:
    """Gaps of one size and budget as `gaps_figure`, of several over size, or over tokens per parameter where all have
    one size; written into path (png, pdf, svg). UserError where no two of them lie on a line."""
    if len(found) == 1:
        plot_gaps(next(iter(found.values())), path, published)
        return
    pictures = ladder_pictures(found, next(iter(found.values()))[0].name)
    if not pictures:
        raise UserError(f"no recipe has gaps at two of these {len(found)} sizes and budgets: there is no line to plot")
    pictures[0].figure.savefig(path, dpi=150)


def ladder_pictures(found: Mapping[Point, list[Comparison]], baseline: str) -> list[Picture]:
    """Gap over size, a line for each ratio of tokens to parameters, and the other way round; a panel for each of the
    labels with the most gaps. The captions name the labels for which there is no room."""
    pictures = []
    for name, over, by in (("gaps-size", SIZE, RATIO), ("gaps-ratio", RATIO, SIZE)):
        lines = ladder_lines(found, over, by)
        if any(len(line) > 1 for of_label in lines.values() for line in of_label.values()):
            pictures.append(_ladder_picture(name, lines, over, by, baseline))
    return pictures


Lines = dict[str, dict[float, list[tuple[float, Comparison]]]]


def ladder_lines(found: Mapping[Point, list[Comparison]], over: Axis, by: Axis) -> Lines:
    """label -> value of a line -> (place, gap), those labels first that have the most."""
    lines: Lines = defaultdict(lambda: defaultdict(list))
    for point, compared in sorted(found.items(), key=lambda item: over.value(item[0])):
        for one in _paired(compared):
            lines[one.name][by.value(point)].append((over.value(point), one))
    return dict(sorted(lines.items(), key=lambda item: (-sum(map(len, item[1].values())), item[0])))


def _ladder_picture(name: str, lines: Lines, over: Axis, by: Axis, baseline: str) -> Picture:
    shown = dict(list(lines.items())[:MOST_PANELS])
    values = sorted({value for of_label in shown.values() for value in of_label})
    names = {value: by.line.format(by.shown(value)) for value in values}
    shades = colormaps["viridis"](np.linspace(0, 0.85, len(values)))
    look: dict[str, Style] = {
        names[value]: {"color": shade, "marker": MARKERS[number % len(MARKERS)]}
        for number, (value, shade) in enumerate(zip(values, shades, strict=True))
    }
    figure, panels = new_figure(0.6 + 1.8 * len(shown) + legend_height(look), len(shown))
    told = []
    for axes, (label, of_label) in zip(panels, shown.items(), strict=True):
        for value, line in sorted(of_label.items()):
            places, gaps = zip(*((place, found.gap) for place, found in line), strict=True)
            half_widths = [float(np.nan_to_num(found.half_width)) for _, found in line]
            axes.errorbar(places, gaps, yerr=half_widths, **look[names[value]], markersize=4, linewidth=1.2, capsize=2)
        axes.axhline(0, color=GREY, linewidth=1)
        axes.set_title(label, loc="left")
        axes.set_ylabel("nats per token")
        axes.set_xscale("log")
        places = sorted({place for line in of_label.values() for place, _ in line})
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(places, [over.shown(place) for place in places])
        tidy(axes)
        gaps = [found.gap for line in of_label.values() for _, found in line]
        told.append(f"{label} {min(gaps):+.4f} to {max(gaps):+.4f}")
    panels[-1].set_xlabel(over.name)
    legend_below(figure, look, look)
    caption = (
        f"Gap to {baseline} in validation loss at the end over {over.name}, paired by seed; a line for each value of "
        f"{by.name}. Bars are 95% intervals, where there are several seeds."
    )
    alt = f"Gaps to {baseline} over {over.name}, in nats per token: {'; '.join(told)}. The table has all of them"
    return Picture(name, figure, caption, alt).without([*lines][MOST_PANELS:])


def _paired(found: list[Comparison]) -> list[Comparison]:
    """Those that share a seed with the baseline, which is the first."""
    return [other for other in found[1:] if np.isfinite(other.gap)]


def _gaps_picture(name: str, point: Point, found: list[Comparison]) -> Picture:
    first, *others = found
    caption = f"Gap to {first.name} in validation loss, paired by seed: {point_title(point)}."
    told = ", ".join(f"{one.name} {_gap_in_words(one)}" for one in _paired(found))
    alt = f"Gaps to {first.name} in nats per token, ± their 95% interval: {told or 'none'}"
    unpaired = [one.name for one in others if not np.isfinite(one.gap)]
    if unpaired:
        missing = f"No seed in common with {first.name}: {', '.join(unpaired)}."
        caption, alt = f"{caption} {missing}", f"{alt}. {missing}"
    return Picture(name, gaps_figure(found, width=WIDTH), caption, alt)


def _gap_tokens_picture(
    name: str, figure: Figure, point: Point, found: list[Comparison], members: list[Run]
) -> Picture:
    first = found[0].name
    missing = _missing_curves(found, paired_gaps(members, first))
    caption = f"Gap to {first} in validation loss while training, the mean over paired seeds: {point_title(point)}."
    last = ", ".join(f"{label} {gap[-1]:+.4f}" for label, (_, gap) in gap_curves(members, first).items())
    alt = f"Gaps to {first} over tokens; at the end: {last}"
    if missing:
        caption, alt = f"{caption} {missing}", f"{alt}. {missing}"
    return Picture(name, figure, caption, alt)


def _missing_curves(found: list[Comparison], gaps: dict[str, dict[int, dict[float, float]]]) -> str:
    """A sentence on the seeds that have a gap at the end and none over tokens, "" without such: a results file has no
    curves."""
    told = []
    for one in _paired(found):
        drawn, paired = len(gaps.get(one.name, {})), len({*one.losses} & {*found[0].losses})
        if drawn < paired:
            told.append(f"{one.name}: {drawn} of {paired} paired seeds {'has' if drawn == 1 else 'have'} a curve")
        if drawn and not len(_mean_gap(gaps[one.name])[0]):
            told.append(f"{one.name}: no curve, as its seeds were validated at different tokens")
    return f"{'; '.join(told)}." if told else ""


def _gap_in_words(one: Comparison) -> str:
    interval = f" ± {one.half_width:.2g}" if np.isfinite(one.half_width) else " (one seed, no interval)"
    return f"{one.gap:+.4f}{interval}"


def _gap_curves_figure(curves: dict[str, Series], look: dict[str, Style]) -> Figure:
    figure, (axes,) = new_figure(2.4 + legend_height(curves))
    for label, (tokens, gap) in curves.items():
        axes.plot(tokens, gap, **look[label], markersize=3, linewidth=1.2)
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set_xlabel("tokens")
    axes.set_ylabel("gap (nats per token)")
    count_axis(axes.xaxis)
    tidy(axes)
    legend_below(figure, look, curves)
    return figure


def gap_curves(members: list[Run], baseline: str) -> dict[str, Series]:
    """label -> (tokens, mean gap over the seeds of `paired_gaps`), where all of them have a value; without the labels
    that have no such place."""
    curves = {label: _mean_gap(gaps) for label, gaps in sorted(paired_gaps(members, baseline).items())}
    return {label: curve for label, curve in curves.items() if len(curve[0])}


def paired_gaps(members: list[Run], baseline: str) -> dict[str, dict[int, dict[float, float]]]:
    """label -> seed -> tokens -> gap to the run of the label `baseline` and this seed, where both validated. Seeds
    without such a place are left out, as those whose run is a row of a results file."""
    base = {run.row["seed"]: dict(zip(*series(run, "val_loss"), strict=True)) for run in members
            if run.label == baseline}  # fmt: skip
    gaps: dict[str, dict[int, dict[float, float]]] = defaultdict(dict)
    for run in members:
        other = base.get(run.row["seed"], {})
        own = {tokens: loss - other[tokens] for tokens, loss in zip(*series(run, "val_loss"), strict=True)
               if tokens in other}  # fmt: skip
        if own and run.label != baseline:
            gaps[run.label][run.row["seed"]] = own
    return dict(gaps)


def _mean_gap(gaps: dict[int, dict[float, float]]) -> Series:
    """Only where every seed has a value: a mean over fewer would jump."""
    tokens = sorted(set.intersection(*({*found} for found in gaps.values())))
    return thin(np.array(tokens), np.array([mean(found[at] for found in gaps.values()) for at in tokens]))


# ------------------------------------------------------------------------------------------------ learning rate


@dataclass(frozen=True)
class Sweep:
    """Runs of one recipe, size, budget, batch and schedule at several learning rates. name: what it is called beside
    the others of its recipe; losses: rate -> seed -> loss of the compared runs; unfinished: rates at which a run
    diverged or did not end."""

    recipe: str
    name: str
    losses: dict[float, dict[int, float]]
    unfinished: list[float]

    @property
    def rates(self) -> list[float]:
        return sorted({*self.losses, *self.unfinished})

    @property
    def shared(self) -> set[int]:
        """The seeds that every rate has which has a loss."""
        return set.intersection(*({*found} for found in self.losses.values()))

    def means(self) -> dict[float, float]:
        """rate -> mean loss over the shared seeds, or over all where none is shared."""
        seeds = self.shared or {seed for found in self.losses.values() for seed in found}
        return {rate: mean(found[seed] for seed in found if seed in seeds) for rate, found in self.losses.items()}


def rate_pictures(corpus: Corpus, baseline: str) -> list[Picture]:
    """Loss over learning rate, a line for each recipe, size and budget that was run at two rates or more. The caption
    names the sizes and budgets for which there is no room."""
    every = _sweeps(corpus)
    by_point = dict(list(every.items())[:MOST_PANELS])
    sweeps = [sweep for found in by_point.values() for sweep in found]
    if not sweeps:
        return []
    look = _variants(styles((one.recipe for one in sweeps), baseline), ((one.recipe, one.name) for one in sweeps))
    names = {one.name for one in sweeps}
    figure, panels = new_figure(0.3 + 2.2 * len(by_point) + legend_height(names), len(by_point))
    best = []
    for axes, (point, found) in zip(panels, by_point.items(), strict=True):
        for number, sweep in enumerate(found):
            best.append(_draw_sweep(axes, sweep, look[sweep.name], height=0.97 - 0.06 * number))
        rates = sorted({rate for sweep in found for rate in sweep.rates})
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=60 if len(rates) > 6 else 0)
        axes.set_title(point_title(point), loc="left", fontsize=8)
        axes.set_xlabel("learning rate")
        axes.set_ylabel("validation loss")
        tidy(axes)
    legend_below(figure, look, names)
    alt = f"Loss over learning rate; best: {', '.join(best)}"
    picture = Picture("learning-rate", figure, _rates_caption(sweeps), alt)
    return [picture.without([point_title(point) for point in list(every)[MOST_PANELS:]])]


def _rates_caption(sweeps: list[Sweep]) -> str:
    caption = (
        "Validation loss (nats per token) over the peak learning rate: a dot a run, the line their mean over the seeds "
        "that all rates share, a ring the best mean."
    )
    unshared = sorted({sweep.name for sweep in sweeps if not sweep.shared})
    if unshared:
        caption += f" Of {', '.join(unshared)} no seed was run at every rate: there the mean is over all seeds."
    if any(sweep.unfinished for sweep in sweeps):
        caption += " A cross at the top: a run at this rate diverged or did not end."
    return caption


def _sweeps(corpus: Corpus) -> dict[Point, list[Sweep]]:
    """The sweeps of each size and budget that has one, the one with the most FLOPs first."""
    tried = [run for run in corpus.runs if run.row["lr"] and (run.compared or run.row["status"] != "finished")]
    found: dict[Point, list[Sweep]] = defaultdict(list)
    for (point, _), members in by_largest(tried, key=lambda run: (run.point, run.recipe)).items():
        groups: dict[str, list[Run]] = defaultdict(list)
        for run, name in told_apart(members, ("batch_tokens", "schedule")):
            groups[name].append(run)
        sweeps = [_sweep(name, runs) for name, runs in groups.items()]
        found[point] += [sweep for sweep in sweeps if sweep.losses and len(sweep.rates) > 1]
    return {point: sweeps for point, sweeps in found.items() if sweeps}


def _sweep(name: str, runs: list[Run]) -> Sweep:
    losses: dict[float, dict[int, float]] = defaultdict(dict)
    for run in runs:
        if run.compared:
            losses[run.row["lr"]][run.row["seed"]] = run.row["val_loss"]
    unfinished = sorted({run.row["lr"] for run in runs if not run.compared})
    return Sweep(runs[0].recipe, name, dict(losses), unfinished)


def _draw_sweep(axes: Axes, sweep: Sweep, style: Style, height: float) -> str:
    """Returns the best rate in words. height: of the crosses, as a share of the axis."""
    means = sweep.means()
    rates = sorted(means)
    axes.plot(rates, [means[rate] for rate in rates], color=style["color"], linestyle=style["linestyle"], linewidth=1.2)
    dots = [(rate, loss) for rate in rates for loss in sweep.losses[rate].values()]
    at, values = zip(*dots, strict=True)
    axes.plot(at, values, style["marker"], color=style["color"], markersize=3.5)
    best = min(rates, key=lambda rate: means[rate])
    axes.plot(best, means[best], "o", color=style["color"], markerfacecolor="none", markersize=10)
    crosses = [height] * len(sweep.unfinished)
    axes.plot(sweep.unfinished, crosses, "x", color=style["color"], transform=axes.get_xaxis_transform())
    edge = ", at the edge of the rates tried" if best in (sweep.rates[0], sweep.rates[-1]) else ""
    return f"{sweep.name} {best:g}{edge}"


# --------------------------------------------------------------------------------------------- speed and memory


def speed_pictures(corpus: Corpus) -> list[Picture]:
    """Tokens per second and peak memory of each recipe and size: a dot a run."""
    pictures = []
    kinds = (
        ("speed", "tokens_per_second", "tokens per second", 1.0, "It compares between runs of one machine."),
        ("memory", "memory_bytes", "peak memory (GiB)", 2.0**30, "On a CPU that of the whole process."),
    )
    for name, column, what, unit, note in kinds:
        runs = [run for run in corpus.runs if run.row["status"] == "finished" and run.row[column]]
        if runs:
            pictures.append(_dots_picture(name, runs, column, what, unit, note))
    return pictures


def _dots_picture(name: str, runs: list[Run], column: str, what: str, unit: float, note: str) -> Picture:
    recipes = sorted({run.recipe for run in runs}, reverse=True)
    sizes = sorted({run.row["non_embedding_parameters"] for run in runs})
    figure, (axes,) = new_figure(0.9 + 0.22 * len(recipes) + 0.17 * -(-len(sizes) // 5))
    shades = colormaps["viridis"](np.linspace(0, 0.85, len(sizes)))
    for shade, size in zip(shades, sizes, strict=True):
        dots = [(run.row[column] / unit, recipes.index(run.recipe)) for run in runs
                if run.row["non_embedding_parameters"] == size]  # fmt: skip
        axes.plot(*zip(*dots, strict=True), "o", color=shade, markersize=5, alpha=0.8, label=readable(size))
    values = [run.row[column] / unit for run in runs]
    if min(values) * 8 < max(values):
        axes.set_xscale("log")
    else:
        axes.set_xlim(0, 1.06 * max(values))
    if unit == 1:
        count_axis(axes.xaxis)
    axes.set_yticks(range(len(recipes)), recipes)
    axes.set_ylim(-0.6, len(recipes) - 0.4)
    axes.set_xlabel(what)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, title="non-embedding parameters", fontsize=8)
    tidy(axes)
    groups: dict[Hashable, list[float]] = defaultdict(list)
    for run in runs:
        groups[run.recipe].append(run.row[column] / unit)
    told = ", ".join(f"{recipe} {readable(median(found))}" for recipe, found in sorted(groups.items()))
    caption = f"{what[0].upper()}{what[1:]}, a dot a run. {note}"
    return Picture(name, figure, caption, f"{what}, the median of each recipe: {told}")


def with_prefix(pictures: list[Picture], prefix: str) -> list[Picture]:
    return [replace(picture, name=prefix + picture.name) for picture in pictures]
