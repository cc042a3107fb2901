"""What a report is made of: every run of some places, what is wrong with any of them, and which compare with which."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qtrain.config import NOT_IN_HASH
from qtrain.errors import UserError
from qtrain.runs.metrics_log import scan_metrics
from qtrain.runs.table import Row, damaged_run, is_table, read_settings, read_table, run_directories, run_row
from qtrain.units import readable

TELEMETRY = ('"quant/', '"grad/')  # lines of their own, long and many: read for the few runs that show them

Point = tuple[Any, ...]


@dataclass(frozen=True)
class Run:
    """A row of the table and the run's training and validation lines, none for a row of a results file.

    telemetry: how many lines of it metrics.jsonl has. recipe: what the run is called in a legend, the same at every
    size; label: that and the learning rate, batch or schedule where runs of its recipe differ in them. compared: it is
    finished, no other run has its label, size, tokens and seed, and those of other seeds have its settings.
    settings: config.yaml as it stands, none for a row of a results file.
    """

    row: Row
    lines: list[dict[str, Any]] = field(default_factory=list)
    telemetry: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
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

# Settings in which runs of one label may differ: NOT_IN_HASH, which change no result,
# ... and those that the seed, the budget and the data say: half of them are places on one machine.
SAID_ELSEWHERE = ("seed", "data", "tokenizer", "trainer.tokens", "trainer.tokens_per_parameter")
WHOLE = "recipe.overrides"  # its keys are patterns: one that a run lacks is no setting of a later version


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
    """The rows whose run is not among those of the folders, which have its lines too, nor in an earlier row."""
    seen = {_identity(run.row) for run in runs}
    found = []
    for row in rows:
        if row["config_hash"] is None or _identity(row) not in seen:
            found.append(Run(row))
            seen.add(_identity(row))
    if len(found) < len(rows):
        count = len(rows) - len(found)
        told = "rows of the results files whose run is in the folders or in another row too, and stands here once"
        problems.append(f"{told}: {count}")
    return [_known(run, problems) for run in found]


def _identity(row: Row) -> Point:
    return (row["name"], row["seed"], row["config_hash"], row["val_loss"])


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
    elif run.row["data_hash"] is None:
        told.append("says no data_hash, the text it was trained on: compared with none")
    if told:
        problems.append(f"{run}: {'; '.join(told)}")
    return run


def _read(directory: Path, problems: list[str]) -> Run:
    try:
        settings = read_settings(directory)
        row = run_row(directory, settings)
    except UserError as error:
        return _known(Run(damaged_run(directory, error)), problems)
    metrics = directory / "metrics.jsonl"
    if not metrics.exists():
        return _known(Run(row, settings=settings), problems, ["no metrics.jsonl, so its curves are not drawn"])
    lines, damaged, telemetry = scan_metrics(metrics, without=TELEMETRY)
    faults = [
        f"line {line.number} of metrics.jsonl is {'half-written' if line.last else 'damaged'} and left out "
        f"({line.text[:24]!r}...)"
        for line in damaged
    ]
    if not lines and not damaged:
        faults.append("metrics.jsonl holds no loss, so its curves are not drawn")
    lines, again = _last_of_each(lines)
    if again:
        faults.append(
            f"training losses that were written again at the same tokens, the last of which is drawn: {again}"
        )
    validated = Counter(line["tokens"] for line in lines if "val_loss" in line)
    faults += [
        f"{count} validation losses at {tokens:,} tokens, none of which is drawn or compared over tokens"
        for tokens, count in validated.items()
        if count > 1
    ]
    lines = [line for line in lines if "val_loss" not in line or validated[line["tokens"]] == 1]
    return _known(Run(row, lines, telemetry, settings), problems, faults)


def _last_of_each(lines: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """The lines without the training losses that a later line has at the same tokens, and how many those are."""
    last = {line["tokens"]: number for number, line in enumerate(lines) if "loss" in line}
    kept = [line for number, line in enumerate(lines) if "loss" not in line or last[line["tokens"]] == number]
    return kept, len(lines) - len(kept)


def corpora(runs: Iterable[Run], problems: list[str]) -> list[Corpus]:
    """The runs that say what they were trained on, apart by it, the most runs first; labelled, and with the doubles
    among them named in problems."""
    apart: dict[Hashable, list[Run]] = defaultdict(list)
    for run in runs:
        if run.row["data_hash"] is not None:
            apart[tuple(run.row[column] for column in ("data_hash", "tokenizer", "val_tokens"))].append(run)
    found = [Corpus(_title(members[0].row), _labelled(members, problems)) for members in apart.values()]
    found.sort(key=lambda corpus: -len(corpus.runs))
    if len(found) > 1:
        titles = "; ".join(f"{corpus.title} ({len(corpus.runs)} runs)" for corpus in found)
        problems.append(
            f"the runs are of {len(found)} sets of data, whose losses do not compare; shown apart: {titles}"
        )
    return found


def _title(row: Row) -> str:
    validation = "unknown amount of validation text"
    if row["val_tokens"] is not None:
        validation = f"{readable(row['val_tokens'])} validation tokens"
    parts = [row["data"], row["tokenizer"], validation]
    return ", ".join([*(str(part) for part in parts if part), f"data {row['data_hash'][:8]}"])


def _labelled(runs: list[Run], problems: list[str]) -> list[Run]:
    runs = [replace(run, recipe=name) for run, name in zip(runs, _recipes(runs), strict=True)]
    groups: dict[Hashable, list[Run]] = defaultdict(list)
    for run in runs:
        groups[(run.point, run.recipe)].append(run)
    labels = {id(run): name for members in groups.values() for run, name in told_apart(members, VARIANT)}
    return _marked([replace(run, label=labels[id(run)]) for run in runs], problems)


def told_apart(runs: list[Run], columns: Iterable[str]) -> Iterator[tuple[Run, str]]:
    """Each of these runs of one recipe with its name among them: the recipe, and those columns in which they differ."""
    varied = [column for column in columns if len({run.row[column] for run in runs}) > 1]
    for run in runs:
        parts = [VARIANT[column].format(run.row[column]) for column in varied if run.row[column] is not None]
        yield run, " ".join([run.recipe, *parts])


def _recipes(runs: list[Run]) -> list[str]:
    """The recipe of each; its name instead where runs of one recipe, size, budget and variant have several names that
    are not those of seeds."""
    groups: dict[Hashable, list[Run]] = defaultdict(list)
    for run in runs:
        groups[(run.row["recipe"], run.point, run.variant)].append(run)
    ambiguous = {members[0].row["recipe"] for members in groups.values() if not _seeds_of_one(members)}
    return [str(run.row["name" if run.row["recipe"] in ambiguous else "recipe"]) for run in runs]


def _seeds_of_one(members: list[Run]) -> bool:
    """Whether these runs have one name, or names that no two of them share a seed under and settings that differ in
    nothing else, as far as they are known: bf16-s0 and bf16-s1."""
    named = {(run.row["name"], run.row["seed"]) for run in members}
    if len({name for name, _ in named}) == 1:
        return True
    settings = [run.settings for run in members if run.settings]
    return len({seed for _, seed in named}) == len(named) and not (settings and any(_differing(settings)))


def _marked(runs: list[Run], problems: list[str]) -> list[Run]:
    """The runs, marked which of them are compared."""
    groups: dict[Hashable, list[Run]] = defaultdict(list)
    for run in runs:
        if run.row["status"] == "finished":
            groups[(run.point, run.label)].append(run)
    alike = [run for members in groups.values() for run in _of_one_setting(members, problems)]
    compared = {id(run) for run in _without_doubles(alike, problems)}
    return [replace(run, compared=id(run) in compared) for run in runs]


def _of_one_setting(members: list[Run], problems: list[str]) -> list[Run]:
    """These runs of one label, without those whose settings differ in more than the seed: they are no sample of one
    thing. A row of a results file, which tells no settings, stays."""
    found = [run for run in members if run.settings]
    keys = [*_differing([run.settings for run in found])] if found else []
    if not keys:
        return members
    problems.append(
        f"{' and '.join(map(str, found))} are all called {members[0].label} and differ in {', '.join(keys)}: none of "
        "them is compared; give those of other settings a name of their own"
    )
    return [run for run in members if not run.settings]


def _differing(values: list[Any], key: str = "") -> Iterator[str]:
    """The dotted names of the settings that differ. What a run lacks, which is of an older version, it shares."""
    if key in NOT_IN_HASH or key in SAID_ELSEWHERE:
        return
    if key != WHOLE and all(isinstance(value, Mapping) for value in values):
        for name in dict.fromkeys(name for value in values for name in value):
            there = [value[name] for value in values if name in value]
            yield from _differing(there, f"{key}.{name}" if key else name)
    elif any(value != values[0] for value in values):
        yield key


def _without_doubles(runs: list[Run], problems: list[str]) -> list[Run]:
    twins: dict[Hashable, list[Run]] = defaultdict(list)
    for run in runs:
        twins[(run.point, run.label, run.row["seed"])].append(run)
    for members in twins.values():
        if len(members) > 1:
            names = " and ".join(map(str, members))
            problems.append(f"{names} are of the same recipe, size, tokens and seed: none of them is compared")
    return [members[0] for members in twins.values() if len(members) == 1]


def point_title(point: Point) -> str:
    """ "nano, 427k parameters, 8.53M tokens (20 a parameter)"."""
    parameters, model, tokens = point
    size = f"{readable(parameters)} parameters, {readable(tokens)} tokens ({tokens / parameters:.3g} a parameter)"
    return f"{model}, {size}" if model else size
