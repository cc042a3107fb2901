"""Each recipe's gap to a baseline, paired by seed. Reads rows of runs alone (`qtrain.runs.table`)."""

from __future__ import annotations

import csv
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from qtrain.errors import UserError
from qtrain.runs.table import Row, finished_runs, is_table, read_table, run_directories
from qtrain.units import readable

Point = tuple[Any, ...]


def read_summaries(*places: Path) -> list[Row]:
    """The finished runs of these places, by size, budget, name and seed; a place is a folder of run directories or a
    results file of `write_table`. UserError where there is none, where two agree in all four, or where they were
    trained or validated on different data, whose losses do not compare."""
    rows = [row for place in places for row in (read_table(place) if is_table(place) else _some_finished(place))]
    return check_rows([row for row in rows if row["status"] == "finished"], " and ".join(map(str, places)))


def check_rows(rows: list[Row], where: str) -> list[Row]:
    """`read_summaries` of these rows. where: what they are called in an error."""
    if not rows:
        raise UserError(f"{where} holds no finished run: there is nothing to compare")
    _check_same_data(rows, where)
    keys = Counter((point_of(row), row["name"], row["seed"]) for row in rows)
    twice = [key for key, count in keys.items() if count > 1]
    if twice:
        _, name, seed = twice[0]
        raise UserError(f"there are several runs named {name!r} of seed {seed} in {where}; give them their own names")
    return sorted(rows, key=lambda row: (row["non_embedding_parameters"], row["tokens"], row["name"], row["seed"]))


def point_of(row: Row) -> Point:
    """What runs have in common that are compared: model size and tokens."""
    return (row["non_embedding_parameters"], row["model"], row["tokens"])


def _check_same_data(rows: list[Row], where: str) -> None:
    kinds = {
        "were trained on": ("data_hash", "corpora"),
        "have": ("tokenizer", "tokenizers"),
        "were validated on": ("val_tokens", "sizes of validation text"),
    }
    for verb, (column, what) in reversed(kinds.items()):
        found = {row[column] for row in rows} - {None}
        if len(found) > 1:
            names = ", ".join(sorted(map(str, found)))
            raise UserError(f"the runs in {where} {verb} {len(found)} different {what} ({names}); compare them apart")


def _some_finished(root: Path) -> list[Row]:
    if not root.is_dir():
        raise UserError(f"{root} is no folder and no results file (.csv, .parquet); name a folder of runs")
    rows = finished_runs(root)
    if not rows:
        raise UserError(f"{root} holds {len(run_directories(root))} runs, none of them finished")
    return rows


# ---------------------------------------------------------------------------------------------------- comparison


@dataclass(frozen=True)
class Comparison:
    """A named set of runs. gap: mean difference of val_loss to the baseline's run of the same seed, nats per token;
    half_width: of its 95% interval by Student's t (NaN from one seed)."""

    name: str
    losses: dict[int, float]
    gap: float
    half_width: float


def compare(rows: Iterable[Row], baseline: str) -> list[Comparison]:
    """One Comparison a name, the baseline first, of rows of one size and budget. UserError when the baseline is not
    among them."""
    rows = list(rows)
    losses: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        losses[row["name"]][row["seed"]] = row["val_loss"]
    if baseline not in losses:
        raise UserError(f"there is no run named {baseline!r} to compare with; there are: {', '.join(losses)}")
    names = sorted(losses, key=lambda name: (name != baseline, name))
    return [_comparison(name, losses[name], losses[baseline]) for name in names]


def compare_all(rows: Iterable[Row], baseline: str) -> dict[Point, list[Comparison]]:
    """The Comparisons of each size and budget; one that has no run of the baseline has no entry. UserError when none
    has one."""
    points: dict[Point, list[Row]] = defaultdict(list)
    for row in rows:
        points[point_of(row)].append(row)
    with_baseline = {at: found for at, found in points.items() if baseline in {row["name"] for row in found}}
    if not with_baseline:
        compare((row for found in points.values() for row in found), baseline)
    return {at: compare(found, baseline) for at, found in with_baseline.items()}


def _comparison(name: str, losses: dict[int, float], baseline: dict[int, float]) -> Comparison:
    gaps = [loss - baseline[seed] for seed, loss in losses.items() if seed in baseline]
    spread = (
        stats.t.ppf(0.975, len(gaps) - 1) * np.std(gaps, ddof=1) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
    )
    return Comparison(name, losses, float(np.mean(gaps)) if gaps else math.nan, float(spread))


def read_published(path: Path) -> dict[str, float]:
    """name -> gap in nats per token, of a CSV file with these two columns among its own. UserError naming the row."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    found = {}
    for number, row in enumerate(rows, 2):
        try:
            found[row["name"]] = float(row["gap"])
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path}, row {number}: needs the columns name and gap, a number; found {row}") from None
    return found


def markdown(comparisons: list[Comparison], published: Mapping[str, float] | None = None) -> str:
    """A table: one column a seed, then the mean, the gap with its interval, and published gaps where given."""
    seeds = sorted({seed for comparison in comparisons for seed in comparison.losses})
    head = ["run", *(f"seed {seed}" for seed in seeds), "mean", f"gap to {comparisons[0].name}"]
    head += ["published"] if published else []
    lines = [_line(head), "|" + "---|" * len(head)]
    for comparison in comparisons:
        cells = [f"{comparison.losses[seed]:.4f}" if seed in comparison.losses else "" for seed in seeds]
        mean = sum(comparison.losses.values()) / len(comparison.losses)
        cells = [comparison.name, *cells, f"{mean:.4f}", _gap(comparison, comparisons[0])]
        if published:
            cells.append(f"{published[comparison.name]:+.3f}" if comparison.name in published else "")
        lines.append(_line(cells))
    return "\n".join(lines)


def ladder_markdown(found: Mapping[Point, list[Comparison]]) -> str:
    """A table of several sizes and budgets: one line for each of their names, with the mean over its seeds."""
    first = next(iter(found.values()))[0].name
    head = ["run", "model", "parameters", "tokens", "per parameter", "seeds", "mean", f"gap to {first}"]
    lines = [_line(head), "|" + "---|" * len(head)]
    for (parameters, model, tokens), comparisons in found.items():
        size = [str(model or ""), readable(parameters), readable(tokens), f"{tokens / parameters:.3g}"]
        for one in comparisons:
            mean = sum(one.losses.values()) / len(one.losses)
            lines.append(_line([one.name, *size, str(len(one.losses)), f"{mean:.4f}", _gap(one, comparisons[0])]))
    return "\n".join(lines)


def _gap(one: Comparison, baseline: Comparison) -> str:
    """Empty for the baseline, and where no seed is shared."""
    if one is baseline or math.isnan(one.gap):
        return ""
    return f"{one.gap:+.4f}" + ("" if math.isnan(one.half_width) else f" ± {one.half_width:.4f}")


def comparison_table(rows: Iterable[Row], baseline: str, published: Mapping[str, float] | None = None) -> str:
    """`markdown` of runs of one size and budget, `ladder_markdown` of several; below it what was left out."""
    rows = list(rows)
    found = compare_all(rows, baseline)
    without = {point_of(row) for row in rows} - {*found}
    if len(found) + len(without) == 1:
        return markdown(next(iter(found.values())), published)
    sizes = [f"{readable(parameters)} parameters on {readable(tokens)} tokens" for parameters, _, tokens in without]
    told = f"\n\nLeft out, without a run of {baseline}: {'; '.join(sorted(sizes))}." if without else ""
    return ladder_markdown(found) + told


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
