"""A run's directory: a function of the settings that determine the result, never of the clock.

    runs/<name>-<hash8>/
        config.yaml         the settings, complete
        environment.json    versions, machine, commit and command of each start
        metrics.jsonl       one flat JSON object a line: the source of truth; loggers mirror it
        metrics.discarded.jsonl   lines that a resumed run took back
        summary.json        status and results
        loss.png
        checkpoints/

Starting the same command again finds the same directory: it resumes an unfinished run and skips a finished one.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import yaml

from qtrain.config import Config, config_hash, parse_saved, result_keys
from qtrain.errors import UserError
from qtrain.settings import configs_dir

log = logging.getLogger("qtrain")

LOCK_SECONDS = 8.0  # the loader processes of a killed run notice its end, and let go of its lock, within five
PACKAGES = ("qtrain", "torch", "triton", "lightning", "hydra-core", "datasets", "tokenizers", "numpy")


def write_atomically(path: Path, text: str) -> None:
    """The file is the old one or the new one, at any moment and after a crash."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is no file. UserError for a file that holds none."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


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
            if config.force and (self.path / "config.yaml").exists():
                self._move_aside()
            self.check(config)
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            if not (self.path / "config.yaml").exists():
                text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
                write_atomically(self.path / "config.yaml", text)
            self.checkpoints.mkdir(exist_ok=True)
            self._note_environment()
        except OSError as error:
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

    def _move_aside(self) -> None:
        self._take_lock()  # a process that trains there would go on writing by name
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
        differences = list(_differences(result_keys(there), result_keys(config)))
        raise UserError(
            f"run_dir={self.path} was made with another config: {'; '.join(differences)}. "
            "Name another run_dir, or set force=true to move the old one aside"
        )

    def _take_lock(self) -> None:
        lock = (self.path / ".lock").open("w")
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
        self._lock = lock

    def _note_environment(self) -> None:
        """Append this start to environment.json."""
        path = self.path / "environment.json"
        record = read_json(path) or {"wandb_id": f"{self.path.name}-{secrets.token_hex(3)}", "starts": []}
        record["starts"].append(environment())
        write_atomically(path, json.dumps(record, indent=2) + "\n")

    # ------------------------------------------------------------------------------------------------ contents

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def wandb_id(self) -> str:
        return read_json(self.path / "environment.json")["wandb_id"]

    @property
    def summary(self) -> dict[str, Any]:
        return read_json(self.path / "summary.json")

    @property
    def finished(self) -> bool:
        return self.summary.get("status") == "finished"

    @property
    def starts(self) -> int:
        """How many processes have begun to train here."""
        return len(read_json(self.path / "environment.json").get("starts", ()))

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
            return parse_saved(yaml.safe_load(path.read_text()))
        except (yaml.YAMLError, UserError) as error:
            raise UserError(f"{path} does not read as the settings of a run: {error}") from None

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def sync_metrics(self) -> None:
        """Everything that was appended to metrics.jsonl is on disk when this returns."""
        if self.metrics.exists():
            with self.metrics.open("a") as file:
                os.fsync(file.fileno())

    def lines(self, having: str) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl that have this key."""
        text = self.metrics.read_text() if self.metrics.exists() else ""
        whole = [json.loads(line) for line in text.splitlines(keepends=True) if _step_of(line) < float("inf")]
        return [line for line in whole if having in line]

    def discard_metrics_after(self, step: int) -> int:
        """Move the lines of steps beyond `step`, and a half-written line, to metrics.discarded.jsonl; their number."""
        if not self.metrics.exists():
            return 0
        lines = self.metrics.read_text().splitlines(keepends=True)
        kept = [line for line in lines if _step_of(line) <= step]
        dropped = [line for line in lines if _step_of(line) > step]
        if dropped:
            with (self.path / "metrics.discarded.jsonl").open("a") as file:
                file.writelines(line if line.endswith("\n") else line + "\n" for line in dropped)
            write_atomically(self.metrics, "".join(kept))
        return len(dropped)


def _step_of(line: str) -> float:
    """The step of a metrics line; infinity for a line that was not written to its end."""
    if not line.endswith("\n"):
        return float("inf")
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")


def _differences(there: Any, here: Any, path: str = "") -> Iterator[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(there.keys() | here.keys()):
            yield from _differences(there.get(key), here.get(key), f"{path}.{key}" if path else key)
    elif there != here:
        yield f"{path} was {there!r}, now {here!r}"


# ------------------------------------------------------------------------------------------------- environment


def environment() -> dict[str, Any]:
    """Versions, machine, commit and command of this process."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "command": shlex.join(sys.orig_argv),
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": versions,
    }


def commit() -> str | None:
    """The checkout's commit, "+changes" after it where files differ from it; None for an installed package."""
    root = configs_dir().parent
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    # A status that refreshes the index would lock it against its owner, for good if the run is killed meanwhile.
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
