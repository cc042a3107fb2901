"""Files that are whole at any moment, and files that others may have damaged."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

from qtrain.errors import UserError


def write_atomically(path: Path, text: str) -> None:
    """Replace a file: it holds the old text or the new text at any moment, also after a crash or a power loss.

    The new text is written beside the file under a name that no other process has: process numbers repeat on machines
    and in containers that share a file system. A file that could not be written (full disk) is removed.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PARTIAL}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


PARTIAL = ".partial"  # how the name of a half-written file ends


def clear_partial(folder: Path) -> None:
    """Remove the half-written files that killed processes left in a folder, for the process that holds its lock."""
    for partial in folder.glob(f".*{PARTIAL}"):
        partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: syncing a file makes its content durable alone."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is no file. UserError for a file that holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}; restore it, or move it away") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a JSON {type(found).__name__}, not an object; restore it, or move it away")
    return found
