"""Checkpoints that survive a kill at any moment: written whole or not at all, checked before they are trusted, and
loaded without unpickling code.

A checkpoint is Lightning's dict of tensors and plain values, at checkpoints/step-<step>.ckpt: weights, optimiser,
schedule, loop counters and the number of samples consumed. It holds no random state: noise is a function of
(seed, step, micro-batch, layer, operand, element).
"""

from __future__ import annotations

import logging
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from qtrain.errors import UserError

log = logging.getLogger("qtrain")

_NAME = re.compile(r"step-(\d+)\.ckpt")


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs to disk, renames."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
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


def newest_checkpoint(directory: Path) -> tuple[int, Path] | None:
    """(step, path) of the newest good checkpoint, None where there is none.

    A damaged one is renamed to *.damaged, so that it is neither tried again nor lost, and the one before it is taken.
    """
    for partial in directory.glob(".step-*"):
        partial.unlink()  # left by a process that was killed while it wrote
    for step, path in reversed(list_checkpoints(directory)):
        problem = _damage(path)
        if problem is None:
            return step, path
        aside = path.with_suffix(".ckpt.damaged")
        path.replace(aside)
        log.warning(
            "checkpoint %s is damaged (%s): set aside as %s, trying the one before it", path, problem, aside.name
        )
    return None


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
    """What is wrong with the file; None for a whole one. torch itself does not check the checksums in its archives."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        return f"{type(error).__name__}: {error}"
    return f"wrong checksum of {bad}" if bad else None
