"""metrics.jsonl: one flat JSON object a line, the source of truth about a run. Every writer and reader of it is here.

A line has `step`, `tokens` and figures. A process that is killed leaves at most one half-written line, the last one.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtrain.errors import UserError
from qtrain.runs.files import naming, sync_folder, write_atomically

log = logging.getLogger("qtrain")

Line = dict[str, Any]


class MetricsLog:
    """The metrics.jsonl of a run, for the process that writes it."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, line: Mapping[str, Any]) -> None:
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def sync(self) -> None:
        """Make every line durable. Call it before a checkpoint is written: a checkpoint that survives a power loss
        counts on the lines of its steps."""
        if self.path.exists():
            with self.path.open("rb+") as file:
                os.fsync(file.fileno())
            sync_folder(self.path.parent)

    def replace(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write the whole file anew."""
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def lines(self, having: str) -> list[Line]:
        """The whole lines that have this key."""
        return [line for _, line in self._parsed() if line is not None and having in line]

    def line_of(self, step: int, having: str) -> Line | None:
        """The last line of a step that has this key; None where there is none."""
        return next((line for line in reversed(self.lines(having)) if line["step"] == step), None)

    def lost_before(self, step: int, every: int) -> str | None:
        """What is missing of a run whose checkpoint is of `step` and which writes its loss every `every` steps; None
        if nothing is. Lines that were not synced are lost with the machine's power."""
        expected = step // every * every
        last = max((line["step"] for line in self.lines("loss") if line["step"] <= step), default=0)
        if last >= expected:
            return None
        return (
            f"{self.path} ends at step {last}, and the checkpoint is of step {step}: the lines between them were lost, "
            "as happens when a machine loses power. The run goes on; its curves have a gap there"
        )

    def discard_after(self, step: int) -> int:
        """Move the lines of steps beyond `step`, and a half-written line, to metrics.discarded.jsonl; their number."""
        kept, dropped = [], []
        for text, line in self._parsed():
            (kept if line is not None and line["step"] <= step else dropped).append(text)
        if dropped:
            with self.path.with_name("metrics.discarded.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(text if text.endswith("\n") else text + "\n" for text in dropped)
            write_atomically(self.path, "".join(kept))
        return len(dropped)

    def _parsed(self) -> Iterator[tuple[str, Line | None]]:
        """(text, line) of each line; None for one that is damaged or was not written to its end."""
        if not self.path.exists():
            return
        for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            line = _flat(text) if text.endswith("\n") else None
            yield text, line if line is not None and type(line.get("step")) is int else None


# ------------------------------------------------------------------------------------------------- for reports


@dataclass(frozen=True)
class DamagedLine:
    """A line of metrics.jsonl that is no metrics line; text is its beginning."""

    number: int
    text: str
    last: bool


def read_metrics(path: Path) -> list[Line]:
    """The lines of a metrics.jsonl, in order. A half-written last line is left out, with a warning in the log.
    UserError where there is no file, and for damage before the last line."""
    if not path.exists():
        raise UserError(f"{path} does not exist; is {path.parent} a run directory?")
    lines, damaged, _ = scan_metrics(path)
    for fault in damaged:
        if not fault.last:
            raise UserError(f"line {fault.number} of {path} is no line of metrics: {fault.text!r}; remove it")
        log.warning("%s: the last line is half-written and left out", path)
    return lines


def scan_metrics(path: Path, without: tuple[str, ...] = ()) -> tuple[list[Line], list[DamagedLine], int]:
    """The lines of a metrics.jsonl, in order, those that are damaged, and how many were passed over: those that look
    whole and hold one of the texts `without` are not parsed."""
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    lines, damaged, passed = [], [], 0
    for number, text in enumerate(texts, start=1):
        if any(key in text for key in without) and _looks_whole(text):
            passed += 1
            continue
        line = _flat(text)
        if line is not None and isinstance(line.get("tokens"), int) and _are_numbers(line):
            lines.append(line)
        else:
            damaged.append(DamagedLine(number, text[:60], number == len(texts)))
    return lines, damaged, passed


def last_line(path: Path, having: str) -> Line:
    """The last whole line with this key; {} where there is none. Other lines, which may be long, are not parsed."""
    if not path.exists():
        return {}
    texts = reversed(path.read_text(encoding="utf-8", errors="replace").splitlines())
    return next((line for text in texts if f'"{having}"' in text and (line := _flat(text)) is not None), {})


def _flat(text: str) -> Line | None:
    """The JSON object of a line; None for anything else."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def _are_numbers(line: Line) -> bool:
    """A metric may be null, where a run had none."""
    return all(value is None or type(value) in (int, float) for value in line.values())


def _looks_whole(text: str) -> bool:
    """A line is flat: one with a second brace is two, the first of them cut off."""
    return text.startswith("{") and text.endswith("}") and text.count("{") == 1
