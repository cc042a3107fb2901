"""A run's directory: a function of the settings that determine the result, never of the clock.

    runs/<name>-<hash8>/
        config.yaml         the settings, complete
        environment.json    versions, machine, commit and command of each start
        metrics.jsonl       one flat JSON object a line: the source of truth; loggers mirror it
        metrics.discarded.jsonl   lines that a resumed run took back
        summary.json        status and results
        loss.png
        tokenizer/          as the Hugging Face libraries read it; not of bytes
        checkpoints/
        best.safetensors    where callbacks.keep_best asked for it
        profile/            traces, where callbacks.profile_steps asked for them

Starting the same command again finds the same directory: it resumes an unfinished run and skips a finished one.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import yaml

from qtrain.config import Config, config_hash, differences, parse_saved
from qtrain.errors import UserError
from qtrain.runs.environment import environment
from qtrain.runs.files import clear_partial, read_json, read_yaml, write_atomically
from qtrain.runs.metrics_log import MetricsLog
from qtrain.runs.status import Status

log = logging.getLogger("qtrain")

LOCK_SECONDS = 8.0  # the loader processes of a killed run notice its end, and let go of its lock, within five


class RunDirectory:
    """One run's files. `open` it before training; `close` it (or leave the `with` block) to release its lock."""

    def __init__(self, path: Path):
        self.path = path
        self._lock: TextIO | None = None

    @classmethod
    def of(cls, config: Config) -> RunDirectory:
        """Where this config's run lives; nothing is touched."""
        if config.run_dir is not None:
            return cls(Path(config.run_dir).expanduser())
        return cls(Path(config.run_root).expanduser() / f"{config.name}-{config_hash(config)}")

    # -------------------------------------------------------------------------------------------- open, close

    def open(self, config: Config) -> None:
        """Make the directory, or take up the one that is there. UserError when it holds another config or no run, or
        when another process is training in it."""
        try:
            self._take(config)
            clear_partial(self.path)
            if not (self.path / "config.yaml").exists():
                text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
                write_atomically(self.path / "config.yaml", text)
            self.checkpoints.mkdir(exist_ok=True)
            self._note_environment()
        except OSError as error:
            self.close()
            raise UserError(
                f"cannot write run directory {self.path}: {error.strerror}; set run_root or run_dir"
            ) from error

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, config: Config) -> None:
        """Lock the directory for this config; with force=true one that was locked while it held no run, or none since
        it was moved aside."""
        moved = not config.force
        while True:
            self.check(config.model_copy(update={"force": not moved}))
            if not moved and not (self.path / "config.yaml").exists():
                moved = True
            self.path.mkdir(parents=True, exist_ok=True)
            if not self._take_lock():
                continue  # another process moved the directory aside while this one waited
            if not moved:
                self._move_aside()
                moved = True
                continue
            try:
                self.check(config.model_copy(update={"force": False}))  # now that nobody else can write there
            except UserError:
                self.close()
                raise
            return

    def _move_aside(self) -> None:
        """Of a locked directory: a process that trains there would go on writing by name."""
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.old{number}")).exists():
            number += 1
        self.path.rename(aside)
        self.close()
        log.info("force=true: the earlier run is now %s", aside)

    def check(self, config: Config) -> None:
        """UserError when the directory cannot hold this run: a file, something else's folder, or a run of another
        config, whose differences it names. Nothing is touched."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run_dir={self.path} is a file; name a directory")
        if not (self.path / "config.yaml").exists():
            if self.path.is_dir() and any(not child.name.startswith(".") for child in self.path.iterdir()):
                raise UserError(
                    f"run_dir={self.path} is not empty and holds no run (no config.yaml); name another directory"
                )
            return
        if config.force:
            return
        there = self.read_config()
        if config_hash(there) == config_hash(config):
            return
        found = "; ".join(differences(there, config))
        raise UserError(
            f"run_dir={self.path} was made with another config: {found}. "
            "Name another run_dir, or set force=true to move the old one aside"
        )

    def _take_lock(self) -> bool:
        """Whether the directory of this name is locked now. A lock is on a file, not on its name: false where the name
        meanwhile is another directory's. UserError when another process holds it for longer than LOCK_SECONDS."""
        path = self.path / ".lock"
        try:
            lock = path.open("w")
        except FileNotFoundError:  # moved aside since it was made
            return False
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    lock.close()
                    message = f"another process is training in {self.path}; wait for it or stop it"
                    raise UserError(message) from None
                time.sleep(0.2)
        if not path.exists() or not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
            lock.close()
            return False
        self._lock = lock
        return True

    def _note_environment(self) -> None:
        """Append this start to environment.json."""
        path = self.path / "environment.json"
        record = self._environment or {"wandb_id": f"{self.path.name}-{secrets.token_hex(3)}", "starts": []}
        record["starts"].append(environment())
        write_atomically(path, json.dumps(record, indent=2) + "\n")

    # ------------------------------------------------------------------------------------------------ contents

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """The weights of the lowest validation loss, where callbacks.keep_best asked for them."""
        return self.path / "best.safetensors"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> MetricsLog:
        """What reads and writes metrics.jsonl."""
        return MetricsLog(self.metrics)

    @property
    def wandb_id(self) -> str:
        return self._environment["wandb_id"]

    @property
    def _environment(self) -> dict[str, Any]:
        path = self.path / "environment.json"
        record = read_json(path)
        if record and not (isinstance(record.get("starts"), list) and isinstance(record.get("wandb_id"), str)):
            raise UserError(f"{path} lacks the list `starts` or the text `wandb_id`; restore it, or move it away")
        return record

    @property
    def summary(self) -> dict[str, Any]:
        return read_json(self.path / "summary.json")

    @property
    def finished(self) -> bool:
        return self.summary.get("status") == Status.FINISHED

    @property
    def starts(self) -> int:
        """How many processes have begun to train here."""
        return len(self._environment.get("starts", ()))

    @property
    def busy(self) -> bool:
        """Whether a process trains here now."""
        path = self.path / ".lock"
        if not path.exists():
            return False
        with path.open("r+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def write_summary(self, values: Mapping[str, Any]) -> None:
        write_atomically(self.path / "summary.json", json.dumps(dict(values), indent=2) + "\n")

    def read_config(self) -> Config:
        path = self.path / "config.yaml"
        if not path.exists():
            raise UserError(f"{self.path} is no run directory: it has no config.yaml")
        try:
            tree = read_yaml(path)
            if not isinstance(tree, dict):
                raise UserError(f"it holds {type(tree).__name__}, not a mapping")
            return parse_saved(tree)
        except UserError as error:
            raise UserError(f"{path} does not read as the settings of a run: {error}") from None

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        self.log.append(line)

    def lines(self, having: str) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl that have this key."""
        return self.log.lines(having)

    def discard_metrics_after(self, step: int) -> int:
        """`MetricsLog.discard_after`."""
        return self.log.discard_after(step)
