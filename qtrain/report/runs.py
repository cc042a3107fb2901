"""What a report is made of: every run of some places, what is wrong with any of them, and which compare with which."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qtrain.errors import UserError
from qtrain.report.loss import readable, scan_metrics
from qtrain.report.summaries import Row, damaged_run, is_table, read_run, read_table, run_directories

TELEMETRY = ('"quant/', '"grad/')  # lines of their own, long and many: read for the few runs that show them

Point = tuple[Any, ...]


@dataclass(frozen=True)
class Run:
    """A row of the table and the run's training and validation lines, none for a row of a results file.

    telemetry: how many lines of it metrics.jsonl has. recipe: what the run is called in a legend, the same at every
    size; label: that and the learning rate, batch or schedule where runs of its recipe differ in them. compared: it is
    finished, and no other run has its label, size, tokens and seed.
    """

    row: Row
    lines: list[dict[str, Any]] = field(default_factory=list)
    telemetry: int = 0
    recipe: str = ""
    label: str = ""
    compared: bool = False

    @property
    def point(self) -> Point:
        """What runs have in common that are compared: model size and tokens."""
        return (self.row["non_embedding_parameters"], self.row["model"], self.row["tokens"])

    @property
    def variant(self) -> Point:
        return tuple(self.row[column] for column in VARIANT)

    def __str__(self) -> str:
        return str(self.row["directory"] or f"{self.row['name']}, seed {self.row['seed']}")


VARIANT = {"lr": "lr {:g}", "batch_tokens": "batch {:,}", "schedule": "{}"}


@dataclass(frozen=True)
class Corpus:
    """Runs whose losses compare: trained and validated on the same text and tokenizer."""

    title: str
    runs: list[Run]

    @property
    def compared(self) -> list[Run]:
        return [run for run in self.runs if run.compared]


def read_runs(places: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Every run of these places, folders of run directories or results files, and what is wrong, a sentence each.
    UserError for a place that does not exist or holds no run at all."""
    runs: list[Run] = []
    rows: list[Row] = []
    problems: list[str] = []
    seen: set[Path] = set()
    for place in places:
        if is_table(place):
            rows += read_table(place)
            continue
        if not place.is_dir():
            raise UserError(f"{place} is no folder and no results file (.csv, .parquet); name a folder of runs")
        directories = [path for path in run_directories(place) if path.resolve() not in seen]
        runs += [_read(path, problems) for path in directories]
        seen |= {path.resolve() for path in directories}
        if not directories and not run_directories(place):
            raise UserError(f"{place} holds no run directory (none with a summary.json): there is nothing to show")
    runs += _only_in_tables(rows, runs, problems)
    if not runs:
        raise UserError("there is no run in the results files given: there is nothing to show")
    return sorted(runs, key=_order), problems


def _only_in_tables(rows: list[Row], runs: list[Run], problems: list[str]) -> list[Run]:
    """The rows whose run is not among those of the folders, which have its lines too."""
    in_folders = {_identity(run.row) for run in runs}
    found = [Run(row) for row in rows if row["config_hash"] is None or _identity(row) not in in_folders]
    if len(found) < len(rows):
        count = len(rows) - len(found)
        problems.append(f"rows of the results files whose run is in the folders too, and stands here once: {count}")
    return [_known(run, problems) for run in found]


def _identity(row: Row) -> Point:
    return (row["name"], row["config_hash"], row["val_loss"])


def _order(run: Run) -> tuple[Any, ...]:
    row = run.row
    numbers = [row[column] or 0 for column in ("non_embedding_parameters", "tokens", "lr")]
    return (*numbers, str(row["recipe"]), row["name"], row["seed"] or 0)


def _known(run: Run, problems: list[str], faults: Iterable[str] = ()) -> Run:
    """The run, with what is wrong with it in one sentence of problems."""
    told = [*faults]
    if run.row["status"] != "finished":
        reason = run.row["reason"] or "no reason is given"
        told.insert(0, f"{run.row['status']} and not compared with others: {reason}")
    if told:
        problems.append(f"{run}: {'; '.join(told)}")
    return run


def _read(directory: Path, problems: list[str]) -> Run:
    try:
        row = read_run(directory)
    except UserError as error:
        return _known(Run(damaged_run(directory, error)), problems)
    metrics = directory / "metrics.jsonl"
    if not metrics.exists():
        return _known(Run(row), problems, ["no metrics.jsonl, so its curves are not drawn"])
    lines, damaged, telemetry = scan_metrics(metrics, without=TELEMETRY)
    faults = [
        f"line {line.number} of metrics.jsonl is {'half-written' if line.last else 'damaged'} and left out "
        f"({line.text[:24]!r}...)"
        for line in damaged
    ]
    validated = Counter(line["tokens"] for line in lines if "val_loss" in line)
    faults += [
        f"{count} validation losses at {tokens:,} tokens, none of which is drawn or compared over tokens"
        for tokens, count in validated.items()
        if count > 1
    ]
    lines = [line for line in lines if "val_loss" not in line or validated[line["tokens"]] == 1]
    return _known(Run(row, lines, telemetry), problems, faults)


def corpora(runs: Iterable[Run], problems: list[str]) -> list[Corpus]:
    """The runs that say what they were trained on, apart by it, the most runs first; labelled, and with the doubles
    among them named in problems."""
    apart: dict[Hashable, list[Run]] = defaultdict(list)
    for run in runs:
        if run.row["data_hash"] is not None:
            apart[(run.row["data_hash"], run.row["val_tokens"])].append(run)
    found = [Corpus(_title(members[0].row), _labelled(members, problems)) for members in apart.values()]
    found.sort(key=lambda corpus: -len(corpus.runs))
    if len(found) > 1:
        titles = "; ".join(f"{corpus.title} ({len(corpus.runs)} runs)" for corpus in found)
        problems.append(
            f"the runs are of {len(found)} sets of data, whose losses do not compare; shown apart: {titles}"
        )
    return found


def _title(row: Row) -> str:
    parts = [row["data"], row["tokenizer"], row["val_tokens"] and f"{readable(row['val_tokens'])} validation tokens"]
    return ", ".join([*(str(part) for part in parts if part), f"data {row['data_hash'][:8]}"])


def _labelled(runs: list[Run], problems: list[str]) -> list[Run]:
    runs = [replace(run, recipe=name) for run, name in zip(runs, _recipes(runs), strict=True)]
    varied = _distinct(runs, by=lambda run: (run.point, run.recipe), of=lambda run: run.variant)
    labelled = []
    for run in runs:
        variants = varied[(run.point, run.recipe)]
        parts = [run.recipe]
        for number, (column, text) in enumerate(VARIANT.items()):
            if len({variant[number] for variant in variants}) > 1 and run.row[column] is not None:
                parts.append(text.format(run.row[column]))
        labelled.append(replace(run, label=" ".join(parts)))
    return _without_doubles(labelled, problems)


def _recipes(runs: list[Run]) -> list[str]:
    """The recipe of each; its name instead where runs of one recipe, size, budget and settings have several."""
    names = _distinct(runs, by=lambda run: (run.row["recipe"], run.point, run.variant), of=lambda run: run.row["name"])
    ambiguous = {recipe for (recipe, *_), found in names.items() if len(found) > 1}
    return [str(run.row["name" if run.row["recipe"] in ambiguous else "recipe"]) for run in runs]


def _distinct(runs: list[Run], by: Callable[[Run], Hashable], of: Callable[[Run], Hashable]) -> dict[Any, set[Any]]:
    found: dict[Any, set[Any]] = defaultdict(set)
    for run in runs:
        found[by(run)].add(of(run))
    return found


def _without_doubles(runs: list[Run], problems: list[str]) -> list[Run]:
    twins: dict[Hashable, list[Run]] = defaultdict(list)
    for run in runs:
        if run.row["status"] == "finished":
            twins[(run.point, run.label, run.row["seed"])].append(run)
    for members in twins.values():
        if len(members) > 1:
            names = " and ".join(map(str, members))
            problems.append(f"{names} are of the same recipe, size, tokens and seed: none of them is compared")
    alone = {id(members[0]) for members in twins.values() if len(members) == 1}
    return [replace(run, compared=id(run) in alone) for run in runs]


def point_title(point: Point) -> str:
    """ "nano, 427k parameters, 8.53M tokens (20 a parameter)"."""
    parameters, model, tokens = point
    size = f"{readable(parameters)} parameters, {readable(tokens)} tokens ({tokens / parameters:.3g} a parameter)"
    return f"{model}, {size}" if model else size
