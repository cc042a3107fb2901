"""A results file: the CSV of `write_table`, to which runs of any number of processes add their rows."""

from __future__ import annotations

import fcntl
from pathlib import Path

from qtrain.report.summaries import Row, read_csv, write_csv


def recorded(path: Path, name: str, config_hash: str) -> Row | None:
    """The row of the run with this name and these settings; None where the file has none, or is not there. UserError
    for a file that is no results file."""
    rows = read_csv(path) if path.is_file() else []
    return next((row for row in rows if (row["name"], row["config_hash"]) == (name, config_hash)), None)


def record(path: Path, row: Row) -> None:
    """Add the row of a finished run, if it is not there. What the file has is never rewritten."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if recorded(path, row["name"], row["config_hash"]) is None:
            write_csv([row | {"directory": None}], path, append=True)  # a place on one machine
