"""Files that are whole at any moment, and files that others may have damaged."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from qtrain.errors import UserError, first_line

PARTIAL = ".partial"  # how the name of a half-written file ends
MAX_YAML_NODES = 100_000  # of a file of settings, every alias counted as what it stands for; a run's has about 300
MAX_YAML_DEPTH = 50  # a run's settings are 5 deep
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # 500 settings files: under a second instead of ten


def write_synced(path: Path, text: str) -> None:
    """The text is on disk when this returns; a kill or a full disk may leave a part of it."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, text: str) -> None:
    """Replace a file: it holds the old text or the new text at any moment, also after a crash or a power loss.

    The new text is written beside the file under a name that no other process has: process numbers repeat on machines
    and in containers that share a file system. A file that could not be written (full disk) is removed.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PARTIAL}")
    try:
        with naming(path):
            write_synced(partial, text)
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the file system within it names a file. Python's does not where an open file cannot grow."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def clear_partial(folder: Path, older_than: float = 0.0) -> None:
    """Remove the half-written files that killed processes left in a folder. older_than: seconds since they were last
    written to; 0 for the process that holds the folder's lock, a day for a folder that several processes write to."""
    for partial in folder.glob(f".*{PARTIAL}"):
        try:
            if older_than == 0 or time.time() - partial.stat().st_mtime > older_than:
                partial.unlink()
        except FileNotFoundError:
            continue  # another process has finished or removed it


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


def read_yaml(path: Path) -> Any:
    """The plain data in a YAML file. UserError for one that cannot be read, is no YAML, is nested too deep, or says
    more by its aliases than MAX_YAML_NODES."""
    try:
        text = path.read_text(encoding="utf-8")
        _check_depth(path, text)
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None and _size(node, {}) > MAX_YAML_NODES:
            raise UserError(f"{path} stands for more than {MAX_YAML_NODES:,} values, as no file of settings does")
        return None if node is None else loader.construct_document(node)
    except RecursionError:
        raise UserError(f"cannot read {path}: it is nested too deep, or within itself") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot read {path}: {' '.join(str(error).split()) or first_line(error)}") from None


def _check_depth(path: Path, text: str) -> None:
    """UserError for a file that is nested deeper than MAX_YAML_DEPTH. libyaml's loader is recursive in C: a hundred
    thousand brackets end the process. Its parser, which is asked here, is not."""
    depth = 0
    for event in yaml.parse(text, _Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_YAML_DEPTH:
            raise UserError(f"cannot read {path}: it is nested more than {MAX_YAML_DEPTH} deep")


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """How many nodes a node stands for. An alias is a node that several others hold."""
    if id(node) not in known:
        parts = node.value if isinstance(node.value, list) else []
        pairs = [part if isinstance(part, tuple) else (part,) for part in parts]
        known[id(node)] = 1 + sum(_size(each, known) for pair in pairs for each in pair)
    return known[id(node)]
