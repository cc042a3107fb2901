"""Each recipe's gap to a baseline, paired by seed. Reads rows of runs alone (`qtrain.runs.table`)."""

from __future__ import annotations

import csv
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from qtrain.errors import UserError
from qtrain.runs.table import Row, finished_runs, is_table, read_table, run_directories


def read_summaries(*places: Path) -> list[Row]:
    """The finished runs of these places, by name and seed; a place is a folder of run directories or a results file of
    `write_table`. UserError where there is none, where two are of one name and seed, or where they were trained or
    validated on different data, whose losses do not compare."""
    rows = [row for place in places for row in (read_table(place) if is_table(place) else _some_finished(place))]
    rows = [row for row in rows if row["status"] == "finished"]
    where = " and ".join(map(str, places))
    if not rows:
        raise UserError(f"{where} holds no finished run: there is nothing to compare")
    _check_same_data(rows, where)
    twice = [key for key, count in Counter((row["name"], row["seed"]) for row in rows).items() if count > 1]
    if twice:
        name, seed = twice[0]
        raise UserError(f"there are several runs named {name!r} of seed {seed} in {where}; give them their own names")
    return sorted(rows, key=lambda row: (row["name"], row["seed"]))


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
    """One Comparison a name, the baseline first. UserError when the baseline is not among the rows, or a run of another
    size or budget than the baseline's run of its seed."""
    rows = list(rows)
    losses: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        losses[row["name"]][row["seed"]] = row["val_loss"]
    if baseline not in losses:
        raise UserError(f"there is no run named {baseline!r} to compare with; there are: {', '.join(losses)}")
    _check_same_size(rows, baseline)
    names = sorted(losses, key=lambda name: (name != baseline, name))
    return [_comparison(name, losses[name], losses[baseline]) for name in names]


def _check_same_size(rows: list[Row], baseline: str) -> None:
    paired = {row["seed"]: row for row in rows if row["name"] == baseline}
    for row in rows:
        other = paired.get(row["seed"], row)
        for column in ("non_embedding_parameters", "tokens"):
            if None not in (row[column], other[column]) and row[column] != other[column]:
                told = f"{baseline} has {other[column]:,} {column}, {row['name']} {row[column]:,}"
                raise UserError(
                    f"the runs of seed {row['seed']} are of several sizes or budgets ({told}); compare them apart"
                )


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
        spread = "" if math.isnan(comparison.half_width) else f" ± {comparison.half_width:.4f}"
        gap = "" if comparison is comparisons[0] else f"{comparison.gap:+.4f}{spread}"
        cells = [comparison.name, *cells, f"{mean:.4f}", gap]
        if published:
            cells.append(f"{published[comparison.name]:+.3f}" if comparison.name in published else "")
        lines.append(_line(cells))
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
