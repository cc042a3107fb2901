"""Where compiled kernels are kept between processes: a private folder below the user's own cache.

    $XDG_CACHE_HOME/qtrain/kernels/<key>-<sha256>.so        ($XDG_CACHE_HOME: ~/.cache where it is not set)

Loading a library runs its code. So the folder belongs to this user and nobody else can write to it, and a file counts
only if it belongs to this user, can be written by nobody else, and has the content that its name says: one that was cut
or flipped would end the process while it is loaded. A file appears under its name when it is whole and on disk.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def folder() -> Path:
    """The folder, made if it is not there. RuntimeError where that cannot be, or where others could put files in it."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    path = Path(root) / "qtrain" / "kernels"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.stat()
    except OSError as error:
        raise _refused(f"cannot make {path} ({error.strerror})") from None
    if found.st_uid != os.geteuid() or found.st_mode & OTHERS_MAY_WRITE:
        raise _refused(f"{path} belongs to another user, or others can write to it; `chmod 700` it, or delete it")
    return path


def find(key: str) -> Path | None:
    """The library of this key; None where there is none that is whole and this user's own. A damaged one is removed."""
    for path in folder().glob(f"{key}-*.so"):
        try:
            found = path.lstat()
            own = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & OTHERS_MAY_WRITE
            if own and hashlib.sha256(path.read_bytes()).hexdigest() == path.stem.rpartition("-")[2]:
                return path
            path.unlink()
        except FileNotFoundError:
            continue  # another process has removed it
        except OSError as error:
            raise _refused(f"cannot use {path} ({error.strerror})") from None
    return None


def keep(key: str, library: bytes) -> Path:
    """Write a library; where it is. RuntimeError where it cannot be written."""
    here = folder()
    path = here / f"{key}-{hashlib.sha256(library).hexdigest()}.so"
    partial = here / f".{secrets.token_hex(8)}.partial"
    try:
        partial.touch(mode=0o600, exist_ok=False)
        with partial.open("wb") as file:
            file.write(library)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _refused(f"cannot write {path} ({error.strerror})") from None
    return path


def find_or_make(key: str, make: Callable[[], bytes]) -> Path:
    """`find`, or else what `make` gives, kept. Whether it can be kept is asked first: compiling takes seconds."""
    return find(key) or keep(key, make())


def _refused(reason: str) -> RuntimeError:
    return RuntimeError(f"the cache of compiled kernels: {reason}. XDG_CACHE_HOME names another place")
