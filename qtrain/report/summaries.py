"""Finished runs side by side: one row a run, and each recipe's gap to a baseline, paired by seed. Reads files only."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from qtrain.errors import UserError

COLUMNS: tuple[str, ...] = (
    "name", "recipe", "seed", "val_loss", "val_bits_per_byte", "bigram_cross_entropy", "tokens", "steps",
    "non_embedding_parameters", "flops", "tokens_per_second", "config_hash", "data_hash", "commit",
)  # fmt: skip

INTEGERS = ("seed", "tokens", "steps", "non_embedding_parameters", "flops")
NUMBERS = ("val_loss", "val_bits_per_byte", "tokens_per_second")

Row = dict[str, Any]
_MOVED_ASIDE = re.compile(r"\.old\d+$")  # by force=true


def read_summaries(*places: Path) -> list[Row]:
    """The finished runs of these places, by name and seed; a place is a folder of run directories or a results file of
    `write_csv`. UserError where there is none, where two are of one name and seed, or where they were trained on
    different data, whose losses do not compare."""
    rows = [row for place in places for row in (read_csv(place) if place.suffix == ".csv" else _some_finished(place))]
    where = " and ".join(map(str, places))
    if not rows:
        raise UserError(f"{where} holds no run: there is nothing to compare")
    data = {row["data_hash"] for row in rows}
    if len(data) > 1:
        raise UserError(f"the runs in {where} were trained on {len(data)} different corpora; compare them apart")
    twice = [key for key, count in Counter((row["name"], row["seed"]) for row in rows).items() if count > 1]
    if twice:
        name, seed = twice[0]
        raise UserError(f"there are several runs named {name!r} of seed {seed} in {where}; give them their own names")
    return sorted(rows, key=lambda row: (row["name"], row["seed"]))


def _some_finished(root: Path) -> list[Row]:
    rows = finished_runs(root)
    if not rows:
        raise UserError(f"{root} holds {len(_summaries(root, '**'))} runs, none of them finished")
    return rows


def finished_runs(root: Path, folders: str = "**") -> list[Row]:
    """A row for each finished run in those folders below root: "**" all, "*" its own alone. UserError for a summary
    that cannot be read."""
    summaries = [_read_json(path) for path in _summaries(root, folders)]
    return [row_of(summary) for summary in summaries if summary.get("status") == "finished"]


def row_of(summary: Mapping[str, Any]) -> Row:
    """The row of a run whose summary.json this is."""
    return {key: summary.get(key) for key in COLUMNS}


def _summaries(root: Path, folders: str) -> list[Path]:
    return [path for path in root.glob(f"{folders}/summary.json") if not _MOVED_ASIDE.search(path.parent.name)]


def _read_json(path: Path) -> Row:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is no run's summary")
    return found


def read_csv(path: Path) -> list[Row]:
    """The rows of a results file, perhaps none. UserError where it is no such file; of a field it names the row, the
    header being row 1, and the column."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns, rows = reader.fieldnames or (), list(reader)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error):
        raise UserError(f"{path} is no text; a results file is what scripts/compare_runs.py writes") from None
    if not columns:
        raise UserError(f"{path} is empty, not even a header; delete it")
    missing = [column for column in COLUMNS if column not in columns]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; it is no results file of scripts/compare_runs.py")
    return [_parsed(row, f"{path}, row {number}") for number, row in enumerate(rows, 2)]


def _parsed(row: dict[str, Any], where: str) -> Row:
    if None in row or None in row.values():
        raise UserError(f"{where} has {'more' if None in row else 'fewer'} fields than the header")
    parsed = {column: row[column] for column in COLUMNS}
    for columns, kind, what in ((INTEGERS, int, "an integer"), (NUMBERS, float, "a number")):
        for column in columns:
            try:
                parsed[column] = kind(row[column])
            except ValueError:
                raise UserError(f"{where}: {column} is {row[column]!r}, not {what}") from None
    return parsed


def write_csv(rows: Iterable[Row], path: Path, append: bool = False) -> None:
    """append: add the rows to those that the file has; what it has is never rewritten."""
    header = not (append and path.is_file())
    with path.open("a" if append else "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)


@dataclass(frozen=True)
class Comparison:
    """A named set of runs. gap: mean difference of val_loss to the baseline's run of the same seed, nats per token;
    half_width: of its 95% interval by Student's t (NaN from one seed)."""

    name: str
    losses: dict[int, float]
    gap: float
    half_width: float


def compare(rows: Iterable[Row], baseline: str) -> list[Comparison]:
    """One Comparison a name, the baseline first. UserError when the baseline is not among the rows."""
    losses: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        losses[row["name"]][row["seed"]] = row["val_loss"]
    if baseline not in losses:
        raise UserError(f"there is no run named {baseline!r} to compare with; there are: {', '.join(losses)}")
    names = sorted(losses, key=lambda name: (name != baseline, name))
    return [_comparison(name, losses[name], losses[baseline]) for name in names]


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
