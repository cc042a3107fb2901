"""Rows of runs: one row a run directory, one column a setting or result, and the files that hold them.

A results file is a CSV or Parquet table of rows. Runs of any number of processes add their rows to one CSV file.
Nothing here imports torch: reports read rows too.
"""

from __future__ import annotations

import csv
import fcntl
import io
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from pydantic import BaseModel

from qtrain.config.naming import model_title
from qtrain.errors import UserError
from qtrain.runs.files import read_json, read_yaml, write_atomically
from qtrain.runs.metrics_log import last_line
from qtrain.runs.status import REASONS, Status


class RunRow(BaseModel):
    """A row: the columns, in their order, with what may stand in them.

    Columns with a default came after the first results files, which lack them. tokens_per_second is the median over the
    run; tokens_seen and memory_bytes are of its last training line; data_fingerprint and data_hash: of the text, see
    `qtrain.data.prepare.same_text`; directory is a place on one machine, empty in a file to which runs add their rows.
    """

    name: str
    recipe: str
    seed: int
    val_loss: float
    val_bits_per_byte: float
    bigram_cross_entropy: float | None
    tokens: int
    steps: int
    non_embedding_parameters: int
    flops: int
    tokens_per_second: float
    config_hash: str
    data_hash: str
    commit: str
    status: str | None = None
    reason: str | None = None
    model: str | None = None
    n_layers: int | None = None
    dim: int | None = None
    lr: float | None = None
    batch_tokens: int | None = None
    schedule: str | None = None
    tokens_per_parameter: float | None = None
    tokens_seen: int | None = None
    memory_bytes: int | None = None
    data: str | None = None
    tokenizer: str | None = None
    val_tokens: int | None = None
    directory: str | None = None
    data_fingerprint: str | None = None


def _columns(kind: type) -> tuple[str, ...]:
    return tuple(name for name, field in RunRow.model_fields.items() if field.annotation in (kind, kind | None))


COLUMNS = tuple(RunRow.model_fields)
REQUIRED = tuple(name for name, field in RunRow.model_fields.items() if field.is_required())
INTEGERS, NUMBERS = _columns(int), _columns(float)
_KINDS: tuple[tuple[tuple[str, ...], Callable[[Any], Any], str], ...] = (
    (INTEGERS, int, "an integer"),
    (NUMBERS, float, "a number"),
)
MAY_BE_EMPTY = {*COLUMNS} - {*REQUIRED} | {"bigram_cross_entropy"}  # in the row of a finished run

MODEL = {"name": "model", "n_layers": "n_layers", "dim": "dim"}  # settings of a model, and their columns

log = logging.getLogger("qtrain")

Row = dict[str, Any]  # of RunRow's columns; None where a run has none
_MOVED_ASIDE = re.compile(r"\.old\d+$")  # by force=true


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
    settings = read_yaml(path)
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
            "model": model_title(config["model"]), "n_layers": config["model"]["n_layers"],
            "dim": config["model"]["dim"],
            "lr": config["optimizer"]["lr"], "schedule": config["scheduler"]["name"],
            "batch_tokens": config["trainer"]["batch_tokens"],
            "tokenizer": "-".join(str(part) for part in parts if part),
            "data": config["data"]["source"], "val_tokens": _validation_tokens(config["data"]),
        }  # fmt: skip
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} does not read as the settings of a run: {error}") from None


def _validation_tokens(data: Mapping[str, Any]) -> int:
    """Of a mixture those of all its parts."""
    return sum(part["val_tokens"] for part in data["parts"].values()) if "parts" in data else data["val_tokens"]


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
    return _checked(path, *_parse_csv(path, _whole_lines(path)))


def _checked(path: Path, columns: list[str], rows: list[Row]) -> list[Row]:
    missing = [column for column in REQUIRED if column not in columns]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; it is no results file of `qtrain compare`")
    return [_parsed(row, f"{path}, row {number}") for number, row in enumerate(rows, 2)]


def _read_text(path: Path) -> str:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text; a results file is what `qtrain compare --csv` writes") from None


def _parse_csv(path: Path, text: str) -> tuple[list[str], list[Row]]:
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        columns, rows = list(reader.fieldnames or ()), list(reader)
    except csv.Error:
        raise UserError(f"{path} is no text; a results file is what `qtrain compare --csv` writes") from None
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
    parsed |= empty | {"status": status}
    if parsed["model"]:  # rows of older files have its name alone
        parsed["model"] = model_title({key: parsed[column] for key, column in MODEL.items()})
    return parsed


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


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """A results file as CSV, whole or not at all: with a full disk the file stays as it was."""
    write_atomically(path, _csv_text(rows, COLUMNS, header=True))


def _csv_text(rows: Iterable[Row], columns: Iterable[str], header: bool) -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(columns), lineterminator="\n", extrasaction="ignore")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------- rows of a sweep


def recorded(path: Path) -> dict[tuple[str, str], list[Row]]:
    """(name, config_hash) -> rows of a results file, one for each text that such a run read; none where the file is not
    there yet. UserError for what is none."""
    path = path.expanduser()
    if path.is_dir():
        raise UserError(f"results={path} is a folder; name a file in it: results={path / 'results.csv'}")
    found: dict[tuple[str, str], list[Row]] = {}
    for row in read_csv(path) if path.exists() else []:
        found.setdefault((row["name"], row["config_hash"]), []).append(row)
    return found


def record(path: Path, row: Row) -> None:
    """Add the row of a finished run, if no row of it and its text is there, under the columns that the file has.

    The file is written anew and put in place of the old one, under a lock: it has the row whole or not at all, whenever
    the process is killed or the disk is full. A last line that was cut off, as older versions left it, is taken out.
    """
    path = path.expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        text = _whole_lines(path) if path.exists() else _csv_text([], COLUMNS, header=True)
        columns, rows = _parse_csv(path, text)
        there = _checked(path, columns, rows)
        identity = ("name", "seed", "config_hash", "data_hash")
        if all(any(row[key] != other[key] for key in identity) for other in there):
            text += _csv_text([row | {"directory": None}], columns, header=False)  # a place on one machine
        if not path.exists() or text != path.read_text(encoding="utf-8"):
            write_atomically(path, text)


def _whole_lines(path: Path) -> str:
    """The text of a CSV file, with a newline at its end, and without a last line that has fewer fields than the header
    and no newline: a write was cut short there."""
    text = _read_text(path)
    if not text or text.endswith("\n"):
        return text
    lines = text.splitlines(keepends=True)
    fields = [len(next(csv.reader([line]), [])) for line in (lines[0], lines[-1])]
    if fields[1] < fields[0]:
        log.warning("%s: its last line was cut off and is taken out: %s", path, lines[-1])
        return "".join(lines[:-1])
    return text + "\n"
