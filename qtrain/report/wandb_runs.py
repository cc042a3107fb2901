"""Runs that Weights & Biases holds, as run directories again: offline folders, or a project on its server.

What a run mirrors there (settings, every line of metrics.jsonl, summary.json) becomes config.yaml, metrics.jsonl and
summary.json in a folder of the run's W&B id, so that every table, law and page reads it as any other run.

An offline file is a log in LevelDB's format: after seven bytes of its own, blocks of 32 KiB that hold pieces of records
(checksum, length, kind, bytes), each record a protobuf message of wandb's.
"""

from __future__ import annotations

import json
import logging
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qtrain.errors import UserError, first_line, need
from qtrain.runs.files import write_atomically
from qtrain.runs.metrics_log import MetricsLog

log = logging.getLogger("qtrain")

BLOCK = 32768
FILE_HEADER = b":W&B\xe1\xbe\x00"
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4
WRITTEN = ("config.yaml", "metrics.jsonl", "summary.json")
SUMMARY = "run"  # training.observers.loggers writes summary.json under this name
STEP = "trainer/global_step"  # Lightning's name for what metrics.jsonl calls step


@dataclass
class MirroredRun:
    """What W&B holds of a run: its settings, summary.json ({} of another program's), and lines as they were logged."""

    id: str
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


def fetch_runs(place: str, into: Path) -> list[Path]:
    """Run directories below `into` of the runs in `place`: a folder with offline runs somewhere below it, or
    entity/project on the server. Those that were fetched before are renewed.

    A run without the summary that qtrain writes (it was killed, or is another program's) is left out, with its name in
    the log. UserError without the package wandb, where no run is found, or where a file is damaged before its end.
    """
    need("wandb", "reading W&B runs")
    offline = Path(place).expanduser()
    runs = list(offline_runs(offline) if offline.is_dir() else project_runs(place))
    if not runs:
        raise UserError(f"{place} holds no W&B run")
    for run in runs:
        if not run.summary:
            log.warning("%s is left out: it has no summary of a qtrain run", run.id)
    try:
        return [write_run(run, into) for run in runs if run.summary]
    except OSError as error:
        told = f"cannot write {error.filename or into}: {error.strerror or error}; give another --out"
        raise UserError(told) from None


def write_run(run: MirroredRun, into: Path) -> Path:
    """The run's directory, made or renewed. A line that a resumed run logged again counts once, as it came last."""
    directory = into / _checked_id(run.id)
    if directory.is_symlink() or any((directory / name).is_symlink() for name in WRITTEN):
        raise UserError(f"{directory} is a link, or has one, which would lead out of {into}; remove it")
    directory.mkdir(parents=True, exist_ok=True)
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in run.history:
        line = {key: value for key, value in row.items() if not key.startswith("_") and value is not None}
        if type(line.get(STEP)) in (int, float):
            line = {"step": line.pop(STEP), **line}
            lines[(line["step"], *sorted(line))] = line
    write_atomically(directory / "config.yaml", yaml.safe_dump(run.config, sort_keys=False))
    MetricsLog(directory / "metrics.jsonl").replace(lines.values())
    write_atomically(directory / "summary.json", json.dumps(run.summary, indent=2) + "\n")
    return directory


def _checked_id(name: str) -> str:
    """UserError for an id that is not W&B's: it becomes the name of a folder, and comes from a file of anybody's."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise UserError(
            f"{name!r} is no id of a W&B run (letters, digits, _ - .); leave that run out, or rename its file"
        )
    return name


# ------------------------------------------------------------------------------------------------------------- offline


def offline_runs(folder: Path) -> Iterable[MirroredRun]:
    """The runs of every offline-run-*/run-*.wandb below folder. The several starts of one run are put together."""
    from wandb.proto import wandb_internal_pb2

    runs: dict[str, MirroredRun] = {}
    for path in sorted(folder.rglob("offline-run-*/run-*.wandb"), key=lambda path: path.parent.name):
        run_id = path.stem.removeprefix("run-")
        run = runs.setdefault(run_id, MirroredRun(run_id))
        for content in read_records(path):
            try:
                record = wandb_internal_pb2.Record.FromString(content)  # pyright: ignore[reportAttributeAccessIssue]
            except Exception as error:  # protobuf's own, of a package that wandb brings along
                raise UserError(f"{path} holds a record that is none of W&B's ({error}); leave it out") from None
            if record.HasField("run"):
                run.config |= _values(record.run.config.update, path)
            elif record.HasField("config"):
                run.config |= _values(record.config.update, path)
            elif record.HasField("summary"):
                run.summary = _own_summary(_values(record.summary.update, path)) or run.summary
            elif record.HasField("history"):
                run.history.append(_values(record.history.item, path))
    return runs.values()


def _own_summary(entries: Mapping[str, Any]) -> dict[str, Any]:
    """summary.json among the entries of a W&B summary; {} of another program's, whose `run` may be anything."""
    found = entries.get(SUMMARY)
    return dict(found) if isinstance(found, Mapping) and isinstance(found.get("status"), str) else {}


def _values(items: Iterable[Any], path: Path) -> dict[str, Any]:
    """name -> value of wandb's own items in the file `path`, without those that wandb keeps for itself."""
    pairs = ((item.key or "/".join(item.nested_key), item.value_json) for item in items)
    found = {name: text for name, text in pairs if not name.startswith("_")}
    try:
        return {name: json.loads(text) for name, text in found.items()}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} holds a value that is no JSON ({first_line(error)}); leave it out") from None


def read_records(path: Path) -> Iterator[bytes]:
    """The records of an offline file. One that was not written to its end is left out, with a warning in the log."""
    data = path.read_bytes()
    if not data.startswith(FILE_HEADER[:4]):
        raise UserError(f"{path} is no offline file of W&B: it does not begin with ':W&B'")
    at, record = len(FILE_HEADER), b""
    while at + 7 <= len(data):
        left = BLOCK - at % BLOCK
        if left < 7:  # no room for a header: the rest of the block is empty
            at += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, at)
        piece = data[at + 7 : at + 7 + length]
        if kind == 0:
            break
        if kind > LAST or length > left - 7:
            raise UserError(f"{path} is damaged at byte {at}; copy it anew, or leave it out")
        if len(piece) < length:
            break
        if zlib.crc32(data[at + 6 : at + 7 + length]) != checksum:
            raise UserError(f"{path} is damaged at byte {at}; copy it anew, or leave it out")
        at += 7 + length
        record = piece if kind in (WHOLE, FIRST) else record + piece
        if kind in (WHOLE, LAST):
            yield record
            record = b""
    if at < len(data) or record:
        log.warning("%s: the last record is half-written and left out", path)


# -------------------------------------------------------------------------------------------------------------- server


def project_runs(project: str, api: Any = None) -> Iterator[MirroredRun]:
    """The runs of entity/project on the server that `wandb login` or WANDB_API_KEY names. api: a wandb.Api, None makes
    one. UserError where the server does not let us in, or has no such project."""
    if project.count("/") != 1 or project.startswith((".", "/", "~")):
        raise UserError(f"{project} is no folder, and no W&B project; give entity/project")
    import wandb
    from wandb.errors import CommError, UsageError

    try:
        api = api or wandb.Api()
        for run in api.runs(project):
            yield MirroredRun(
                run.id,
                {key: value for key, value in run.config.items() if not key.startswith("_")},
                _own_summary(run.summary_metrics),
                list(run.scan_history()),
            )
    except (CommError, UsageError, ValueError) as error:
        raise UserError(f"cannot read {project} from W&B: {error}") from None
