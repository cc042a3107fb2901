"""What a preparation shows: a bar on a terminal, else a line at the start and one at the end; on stderr."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Self

import rich.console
import rich.progress

from qtrain.data.encode import Encoded
from qtrain.units import describe_time


class Progress:
    """n_bytes: size of the source's text, None where unknown; train_limit: training tokens wanted, where limited."""

    def __init__(self, name: str, folder: Path, n_bytes: int | None, train_limit: int | None, *, shown: bool) -> None:
        self._name, self._folder = name, folder
        self._total = train_limit if n_bytes is None else n_bytes
        self._in_bytes = n_bytes is not None
        self._done_bytes = 0
        self._start = time.monotonic()
        console = rich.console.Console(stderr=True)
        self._bar = None
        if shown and console.is_terminal:
            columns = (
                rich.progress.TextColumn("{task.description}", markup=False),
                rich.progress.BarColumn(),
                rich.progress.TextColumn("{task.fields[state]}"),
                rich.progress.TimeRemainingColumn(),
            )
            self._bar = rich.progress.Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task(f"Preparing {name}", total=self._total, state="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        else:
            print(f"Preparing {self._name} into {self._folder} ...", file=sys.stderr, flush=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None:
            seconds = time.monotonic() - self._start
            megabytes = self._done_bytes / 1e6
            told = f"{megabytes:.1f} MB of text in {describe_time(seconds)}"
            print(f"Prepared {self._name}: {told}", file=sys.stderr, flush=True)

    def resume(self, n_bytes: int) -> None:
        """So much text was prepared before."""
        self._done_bytes = n_bytes

    def phase(self, name: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=f"Preparing {self._name}: {name}")

    def advance(self, encoded: Encoded, train_tokens: int) -> None:
        self._done_bytes += int(encoded.n_bytes.sum())
        if self._bar is not None:
            state = f"{self._done_bytes / 1e6:.0f} MB, {train_tokens / 1e6:.1f}M training tokens"
            done = self._done_bytes if self._in_bytes else train_tokens
            self._bar.update(self._task, completed=done, state=state)
