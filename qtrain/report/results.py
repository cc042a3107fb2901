"""A results file: the CSV of `write_table`, to which runs of any number of processes add their rows."""

from __future__ import annotations

import fcntl
from pathlib import Path

from qtrain.errors import UserError
from qtrain.report.summaries import Row, read_csv, write_csv


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
