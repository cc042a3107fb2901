"""Checkpoints that survive a kill at any moment: written whole or not at all, checked before they are trusted, and
loaded without unpickling code.

A checkpoint is Lightning's dict of tensors and plain values, at checkpoints/step-<step>.ckpt: weights, optimiser,
schedule, loop counters and the number of samples consumed. It holds no random state: noise is a function of
(seed, step, micro-batch, layer, operand, element).
"""

from __future__ import annotations

import logging
import math
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from qtrain.errors import UserError, first_line
from qtrain.runs.environment import commit

log = logging.getLogger("qtrain")

_NAME = re.compile(r"step-(\d+)\.ckpt")


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs to disk, renames. A checkpoint says at which commits of the code its state was
    computed, be it by this run or by the one that left the trunk."""

    def __init__(self) -> None:
        self.commits = [commit()]

    def load_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(path, *args, **options)
        earlier = [one for one in checkpoint.get("commits", [None]) if one not in self.commits]
        if earlier:
            computed = ", ".join(map(str, earlier))
            log.warning("%s was computed at commit %s; the code is now at %s", path, computed, self.commits[-1])
        self.commits = earlier + self.commits
        return checkpoint

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        checkpoint["commits"] = self.commits
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint, oldest first."""
    named = [(_NAME.fullmatch(path.name), path) for path in directory.glob("step-*.ckpt")]
    return sorted((int(match[1]), path) for match, path in named if match)


def newest_checkpoint(directory: Path, at_most: float = math.inf) -> tuple[int, Path] | None:
    """(step, path) of the newest good checkpoint of at most so many steps, None where there is none. Nothing is
    touched: another process may be writing there."""
    found = reversed(list_checkpoints(directory))
    return next(((step, path) for step, path in found if step <= at_most and not _damage(path)), None)


def tidy(directory: Path) -> None:
    """Clear away half-written files and set damaged checkpoints aside as *.damaged, neither tried again nor lost. For
    the process that holds the run's lock, before it writes."""
    for partial in directory.glob(".step-*"):
        partial.unlink()  # left by a process that was killed while it wrote
    for _, path in list_checkpoints(directory):
        problem = _damage(path)
        if problem is not None:
            path.replace(path.with_suffix(".ckpt.damaged"))
            log.warning("checkpoint %s is damaged (%s): set aside as *.damaged", path, problem)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content on the CPU, tensors and plain values only. UserError when it is damaged."""
    problem = _damage(path)
    if problem is not None:
        raise UserError(f"checkpoint {path} is damaged ({problem})")
    return torch.load(path, map_location="cpu", weights_only=True)


def prune(directory: Path, keep: int) -> None:
    for _, path in list_checkpoints(directory)[:-keep]:
        path.unlink()


def _damage(path: Path) -> str | None:
    """What is wrong with the file; None if it loads whole. torch itself does not check its archives' checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        if bad is None:
            torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # untrusted bytes: each kind of damage raises an exception of its own
        return first_line(error)
    return f"wrong checksum of {bad}" if bad else None
