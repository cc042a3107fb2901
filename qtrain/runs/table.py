"""Rows of runs: one row a run directory, one column a setting or result, and the files that hold them.

A results file is a CSV or Parquet table of rows. Runs of any number of processes add their rows to one CSV file.
Nothing here imports torch: reports read rows too.
"""

from __future__ import annotations

import csv
import fcntl
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

from qtrain.errors import UserError
from qtrain.runs.files import read_json
from qtrain.runs.metrics_log import last_line
from qtrain.runs.status import REASONS, Status

# What every results file has; the first ones had no other column.
REQUIRED: tuple[str, ...] = (
    "name", "recipe", "seed", "val_loss", "val_bits_per_byte", "bigram_cross_entropy", "tokens", "steps",
    "non_embedding_parameters", "flops", "tokens_per_second", "config_hash", "data_hash", "commit",
)  # fmt: skip
COLUMNS: tuple[str, ...] = (
    *REQUIRED, "status", "reason", "model", "n_layers", "dim", "lr", "batch_tokens", "schedule",
    "tokens_per_parameter", "tokens_seen", "memory_bytes", "data", "tokenizer", "val_tokens", "directory",
)  # fmt: skip

INTEGERS = (
    "seed", "tokens", "steps", "non_embedding_parameters", "flops", "n_layers", "dim", "batch_tokens", "tokens_seen",
    "memory_bytes", "val_tokens",
)  # fmt: skip
NUMBERS = (
    "val_loss", "val_bits_per_byte", "bigram_cross_entropy", "tokens_per_second", "lr", "tokens_per_parameter"
)  # fmt: skip
_KINDS: tuple[tuple[tuple[str, ...], Callable[[Any], Any], str], ...] = (
    (INTEGERS, int, "an integer"),
    (NUMBERS, float, "a number"),
)
MAY_BE_EMPTY = {*COLUMNS} - {*REQUIRED} | {"bigram_cross_entropy"}  # in the row of a finished run

Row = dict[str, Any]
_MOVED_ASIDE = re.compile(r"\.old\d+$")  # by force=true
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # 500 settings files: under a second instead of ten


def finished_runs(root: Path, folders: str = "**") -> list[Row]:
    """A row for each finished run in those folders below root: "**" all, "*" its own alone. UserError for a run that
    cannot be read."""
    return [row for path in run_directories(root, folders) if (row := read_run(path))["status"] == "finished"]


def run_directories(root: Path, folders: str = "**") -> list[Path]:
    """The run directories in those folders below root, without those that force=true moved aside: what has a
    summary.json, and what has a config.yaml and was begun."""
    found = {path.parent for path in root.glob(f"{folders}/summary.json")}
    begun = {path.parent for name in ("environment.json", "metrics.jsonl") for path in root.glob(f"{folders}/{name}")}
    found |= {path for path in begun if (path / "config.yaml").exists()}
    return sorted(path for path in found if not _MOVED_ASIDE.search(path.name))


def read_run(directory: Path) -> Row:
    """The row of one run directory, of whatever status. UserError for a damaged summary or settings file, and for one
    that says finished and has no finite loss."""
    return run_row(directory, read_settings(directory))


def run_row(directory: Path, settings: Mapping[str, Any]) -> Row:
    """`read_run` of a run directory whose settings were read."""
    path = directory / "summary.json"
    summary = read_json(path) if path.exists() else {"status": Status.UNKNOWN}
    if "status" not in summary:
        raise UserError(f"{path} is no run's summary")
    row = dict.fromkeys(COLUMNS) | _settings_columns(settings, directory / "config.yaml")
    row |= {key: value for key, value in summary.items() if key in COLUMNS}
    if row["status"] == "finished" and not _is_finite(row["val_loss"]):
        raise UserError(f"{path} says finished, and val_loss is {row['val_loss']!r}; train it again with force=true")
    if row["name"] is None or type(row["seed"]) is not int:
        raise UserError(f"{path} is no run's summary: it lacks name or seed")
    _check_values(row, path)
    last = last_line(directory / "metrics.jsonl", having="memory_bytes")
    if row["tokens"] and row["non_embedding_parameters"]:
        row["tokens_per_parameter"] = row["tokens"] / row["non_embedding_parameters"]
    reason = row["reason"] or REASONS.get(str(row["status"]))  # pyright: ignore[reportArgumentType]
    return row | {
        "reason": reason, "directory": str(directory),
        "tokens_seen": last.get("tokens"), "memory_bytes": last.get("memory_bytes"),
    }  # fmt: skip


def _check_values(row: Row, path: Path) -> None:
    """UserError for a summary whose figures are no numbers, and for a finished run of no size or budget."""
    for columns, _, what in _KINDS:
        for column in columns:
            if type(row[column]) not in (int, float, NoneType):
                raise UserError(f"{path}: {column} is {row[column]!r}, not {what}; train it again with force=true")
    for column in ("tokens", "non_embedding_parameters"):
        if row["status"] == "finished" and not row[column]:
            raise UserError(f"{path} says finished, and {column} is {row[column]!r}; train it again with force=true")


def damaged_run(directory: Path, error: UserError) -> Row:
    """The row of a run directory that `read_run` cannot read: status "damaged" and the reason."""
    named = {"name": directory.name, "directory": str(directory)}
    return dict.fromkeys(COLUMNS) | named | {"status": "damaged", "reason": str(error)}


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def read_settings(directory: Path) -> dict[str, Any]:
    """config.yaml of a run directory as it stands, of whatever version; {} where there is no such file. UserError where
    it cannot be read or has no settings."""
    path = directory / "config.yaml"
    if not path.exists():
        return {}
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict) or not settings:
        raise UserError(f"{path} does not read as the settings of a run: it holds no key")
    return settings


def _settings_columns(config: Mapping[str, Any], path: Path) -> Row:
    """The columns that the settings of path tell; none of none."""
    if not config:
        return {}
    try:
        tokenizer = config["tokenizer"]
        parts = [tokenizer["kind"], tokenizer.get("path") or tokenizer.get("vocab_size")]
        return {
            "name": config["name"], "recipe": config["recipe"]["name"], "seed": config["seed"],
            "model": config["model"]["name"], "n_layers": config["model"]["n_layers"], "dim": config["model"]["dim"],
            "lr": config["optimizer"]["lr"], "schedule": config["scheduler"]["name"],
            "batch_tokens": config["trainer"]["batch_tokens"], "data": config["data"]["source"],
            "tokenizer": "-".join(str(part) for part in parts if part), "val_tokens": config["data"]["val_tokens"],
        }  # fmt: skip
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} does not read as the settings of a run: {error}") from None


# ------------------------------------------------------------------------------------------------- results files


def is_table(path: Path) -> bool:
    return path.suffix in (".csv", ".parquet")


def read_table(path: Path) -> list[Row]:
    """The rows of a results file, CSV or Parquet, perhaps none; columns that an older file lacks are None. UserError
    where it is no such file; of a field it names the row, the header of a CSV being row 1, and the column."""
    if path.suffix == ".csv":
        return read_csv(path)
    return _checked(path, *_read_parquet(path))


def read_csv(path: Path) -> list[Row]:
    """`read_table` of a CSV file, whatever its suffix."""
    return _checked(path, *_read_csv(path))


def _checked(path: Path, columns: list[str], rows: list[Row]) -> list[Row]:
    missing = [column for column in REQUIRED if column not in columns]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; it is no results file of scripts/compare_runs.py")
    return [_parsed(row, f"{path}, row {number}") for number, row in enumerate(rows, 2)]


def _read_csv(path: Path) -> tuple[list[str], list[Row]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns, rows = list(reader.fieldnames or ()), list(reader)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error):
        raise UserError(f"{path} is no text; a results file is what scripts/compare_runs.py writes") from None
    if not columns:
        raise UserError(f"{path} is empty, not even a header; delete it")
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            fault = "more" if None in row else "fewer"
            raise UserError(f"{path}, row {number} has {fault} fields than the header")
    return columns, rows


def _read_parquet(path: Path) -> tuple[list[str], list[Row]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    return table.column_names, table.to_pylist()


def _parsed(row: Row, where: str) -> Row:
    """Of a row that is not finished any field may be empty, of a finished one those of MAY_BE_EMPTY; its name
    and recipe are there."""
    status = row.get("status") or "finished"  # older files have finished runs alone
    parsed: Row = {column: row.get(column) for column in COLUMNS}
    for columns, kind, what in _KINDS:
        for column in columns:
            value = parsed[column]
            if value in (None, "") and (status != "finished" or column in MAY_BE_EMPTY):
                parsed[column] = None
                continue
            try:
                parsed[column] = kind(value)
            except (TypeError, ValueError):
                raise UserError(f"{where}: {column} is {value!r}, not {what}") from None
    for column in ("name", "recipe"):
        if status == "finished" and not parsed[column]:
            raise UserError(f"{where}: {column} is empty; a finished run has one")
    if status == "finished" and not _is_finite(parsed["val_loss"]):
        raise UserError(f"{where}: val_loss is {row['val_loss']!r}, which no finished run has")
    empty = {column: None for column in COLUMNS if parsed[column] == ""}
    return parsed | empty | {"status": status}


def write_table(rows: Iterable[Row], path: Path) -> None:
    """A results file, by its suffix CSV or Parquet (whole numbers int64, but FLOPs, which may exceed it, float64)."""
    if path.suffix != ".parquet":
        write_csv(rows, path)
        return
    import pyarrow
    from pyarrow import parquet

    integers = {*INTEGERS} - {"flops"}
    kinds = {column: pyarrow.int64() for column in integers} | dict.fromkeys((*NUMBERS, "flops"), pyarrow.float64())
    schema = pyarrow.schema([(column, kinds.get(column, pyarrow.string())) for column in COLUMNS])
    columns = {column: [] for column in COLUMNS}
    for row in rows:
        for column in COLUMNS:
            value = row.get(column)
            columns[column].append(float(value) if column == "flops" and value is not None else value)
    parquet.write_table(pyarrow.table(columns, schema=schema), path)


def write_csv(rows: Iterable[Row], path: Path, append: bool = False) -> None:
    """append: add the rows to those that the file has, under the columns that it has; what it has is never
    rewritten."""
    columns = _read_csv(path)[0] if append and path.is_file() else None
    # without its last newline, as an editor may save it or a write that was cut short
    cut_off = columns is not None and not path.read_bytes().endswith(b"\n")
    with path.open("a" if append else "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns or COLUMNS, lineterminator="\n", extrasaction="ignore")
        if columns is None:
            writer.writeheader()
        if cut_off:
            file.write("\n")
        writer.writerows(rows)


# ------------------------------------------------------------------------------------------------- rows of a sweep


def recorded(path: Path) -> dict[tuple[str, str], Row]:
    """(name, config_hash) -> row of a results file; none where it is not there yet. UserError for what is none."""
    path = path.expanduser()
    if path.is_dir():
        raise UserError(f"results={path} is a folder; name a file in it: results={path / 'results.csv'}")
    rows = read_csv(path) if path.exists() else []
    return {(row["name"], row["config_hash"]): row for row in rows}


def record(path: Path, row: Row) -> None:
    """Add the row of a finished run, if it is not there. What the file has is never rewritten; a new one has its header
    when it appears, whenever the process is killed."""
    path = path.expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if not path.exists():
            new = path.with_name(f".{path.name}.new")
            write_csv([], new)
            new.replace(path)
        if (row["name"], row["config_hash"]) not in recorded(path):
            write_csv([row | {"directory": None}], path, append=True)  # a place on one machine
