"""Where documents come from: one `Source` per kind, read lazily, in an order that is the same on every machine.

A document is a text with a name that errors can point at: a file, a line of a JSONL file, a row of a table. Empty
documents are left out, since a boundary with nothing before it teaches nothing; an empty *file* that was asked for is
an error.
"""

from __future__ import annotations

import codecs
import difflib
import glob
import importlib.metadata
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qtrain.config import DataConfig
from qtrain.errors import UserError, first_line

# Folders of the standard library that are not code to learn from, and a file that differs with the build machine.
NOT_STDLIB = {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__"}
BUILD_DEPENDENT = "_sysconfigdata"


class Document(NamedTuple):
    name: str
    text: str


@dataclass(frozen=True)
class Source:
    """name: readable, for the cache folder. identity: plain data that changes when the content may have changed; the
    cache is keyed by it (files by relative path, size and modification time; datasets by name). n_bytes: size of the
    files, None where unknown. documents: starts a new pass over all documents."""

    name: str
    identity: Any
    n_bytes: int | None
    documents: Callable[[], Iterator[Document]]


class _File(NamedTuple):
    name: str  # relative, with forward slashes: the same wherever the files lie
    path: Path


def open_sources(data: DataConfig) -> tuple[Source, Source | None]:
    """The training source and, where data.val_files or data.val_split names one, the validation source.

    UserError for a missing or empty file, a glob without a match, a dataset that cannot be reached.
    """
    if data.source == "stdlib":
        return _code("stdlib", _stdlib_files()), None
    if data.source == "python_env":
        return _code("python_env", _environment_files(data.packages)), None
    if data.source == "huggingface":
        return _dataset(data, data.split), _dataset(data, data.val_split) if data.val_split else None
    return _files(data, "files", data.files), _files(data, "val_files", data.val_files) if data.val_files else None


# ---------------------------------------------------------------------------------------------------- Python's own code


def _stdlib_files() -> list[_File]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_STDLIB]
        paths = (Path(folder, name) for name in names if name.endswith(".py") and not name.startswith(BUILD_DEPENDENT))
        found += [_File(path.relative_to(root).as_posix(), path) for path in paths]
    if not found:
        raise UserError(f"data.source=stdlib found no .py files under {root}; use data=text with files of your own")
    return sorted(found)


def _environment_files(packages: Sequence[str]) -> list[_File]:
    """The .py files of these installed distributions."""
    installed = {_canonical(dist.metadata["Name"]): dist for dist in importlib.metadata.distributions()}
    missing = [name for name in packages if _canonical(name) not in installed]
    if missing:
        raise UserError(
            f"data.source=python_env reads packages that are not installed: {', '.join(missing)}; install them, or "
            "leave them out of data.packages"
        )
    found = []
    for name in sorted({_canonical(name) for name in packages}):
        for file in installed[name].files or ():
            if file.suffix == ".py" and ".." not in file.parts:
                found.append(_File(f"{name}/{file.as_posix()}", Path(str(file.locate()))))
    files = [file for file in sorted(found) if file.path.is_file()]
    if not files:
        raise UserError(f"data.source=python_env found no .py files in {', '.join(packages)}; use data=stdlib")
    return files


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _code(name: str, files: list[_File]) -> Source:
    def documents() -> Iterator[Document]:
        for file in files:
            try:
                text = file.path.read_bytes().decode()
            except UnicodeDecodeError:  # a handful of files in older encodings, which no user chose
                continue
            if text:
                yield Document(file.name, text)

    return Source(name, *_stat(files), documents)


# ---------------------------------------------------------------------------------------------------------- given files


def _files(data: DataConfig, key: str, patterns: Sequence[str]) -> Source:
    paths = [path for pattern in patterns for path in _expand(f"data.{key}", pattern)]
    paths = list(dict.fromkeys(paths))
    root = Path(os.path.commonpath([path.parent for path in paths]))
    files = [_File(path.relative_to(root).as_posix(), path) for path in paths]
    read = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}[data.source]

    def documents() -> Iterator[Document]:
        for file in files:
            yield from (document for document in read(file.path, data.text_field) if document.text)

    identity, n_bytes = _stat(files)
    field = "" if data.source == "text" else data.text_field
    return Source(f"{data.source}-{paths[0].stem}", [data.source, field, identity], n_bytes, documents)


def _expand(key: str, pattern: str) -> list[Path]:
    """The files of a path or glob, sorted. UserError if there are none, or if one is a folder or empty."""
    path = Path(pattern).expanduser()
    try:
        names = [str(path)] if path.exists() or path.is_symlink() else sorted(set(_matches(str(path.absolute()))))
        paths = [Path(name).absolute() for name in names]
        files = [path for path in paths if path.is_file()]
    except OSError as error:
        raise UserError(f"{key}={pattern} cannot be read: {error.strerror}; name another file") from None
    if paths and not files and paths[0].is_dir():
        raise UserError(f"{key}={pattern} is a folder; name its files, for example {key}='{pattern}/*'")
    if paths and not files:
        kind = "a link to nothing, or to itself" if paths[0].is_symlink() else "a pipe, a socket or a device"
        raise UserError(f"{key}={pattern} is {kind}; name a file")
    if not files:
        raise UserError(f"{key}={pattern} matches no file{_nearest_path(path)}")
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"{file} (of {key}) is empty; remove it or name another file")
    return files


def _matches(pattern: str) -> Iterator[str]:
    """The paths of a glob. `**` goes into each folder once, by whatever links it is reached: into a folder that holds a
    link to itself it would go for ever, and read its files again and again."""
    head, deep, rest = f"{pattern}/*".partition("/**/") if pattern.endswith("/**") else pattern.partition("/**/")
    if not deep:
        yield from glob.iglob(pattern)  # noqa: PTH207 (relative patterns with ..)
        return
    seen: set[tuple[int, int]] = set()
    for start in glob.iglob(head or "/"):  # noqa: PTH207
        for folder, folders, _ in os.walk(start, followlinks=True):
            found = Path(folder).stat()
            if (found.st_dev, found.st_ino) in seen:
                folders.clear()
                continue
            seen.add((found.st_dev, found.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))  # as the shell's **
            yield from _matches(f"{glob.escape(folder)}/{rest}")


def _nearest_path(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    names = sorted(entry.name for entry in parent.iterdir())
    if match := difflib.get_close_matches(path.name, names, n=1, cutoff=0.5):
        return f"; did you mean {parent / match[0]}?"
    return f"; {parent} holds {', '.join(names[:5]) or 'nothing'}{', ...' if len(names) > 5 else ''}"


def _read_text(path: Path, _field: str) -> Iterator[Document]:
    raw = _read(path).removeprefix(codecs.BOM_UTF8)  # a mark of the encoding, no text
    if (offset := raw.find(b"\0")) >= 0:
        raise UserError(f"{path} looks binary (a zero byte at offset {offset}); data.source=text needs UTF-8 text")
    yield Document(str(path), _decode(path, raw, 0))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; mend it, or leave it out of data.files") from None


def _decode(where: Path | str, raw: bytes, start: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 text (byte 0x{raw[error.start]:02x} at offset {start + error.start}); "
            "convert it, for example with iconv -t utf-8"
        ) from None


def _read_jsonl(path: Path, field: str) -> Iterator[Document]:
    offset = 0
    try:
        with path.open("rb") as lines:
            for number, raw in enumerate(lines, start=1):
                line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
                if line.strip():
                    where = f"{path}:{number}"
                    yield Document(where, _json_text(where, _decode(where, line, offset), field))
                offset += len(raw)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; mend it, or leave it out of data.files") from None


def _json_text(where: str, line: str, field: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not valid JSON ({error.msg} at column {error.colno}); mend or drop the line"
        ) from None
    except (RecursionError, ValueError):
        raise UserError(f"{where}: nested too deep, or a number too long; mend or drop the line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with a field {field!r}, found {type(row).__name__}")
    if field not in row:
        raise UserError(f"{where}: no field {field!r}; it has {', '.join(sorted(row))}; set data.text_field")
    text = row[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: field {field!r} is not a string (found {type(text).__name__}); set data.text_field")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: field {field!r} holds half a surrogate pair at character {error.start}"
            ) from None
    return text


def _read_parquet(path: Path, field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        table = pyarrow.parquet.ParquetFile(path)
        columns = table.schema_arrow.names
        if field not in columns:
            raise UserError(f"{path}: no column {field!r}; it has {', '.join(columns)}; set data.text_field")
        for batch in table.iter_batches(batch_size=1024, columns=[field]):
            for text in batch.column(0).to_pylist():
                yield Document(f"{path}:{row}", _string(f"{path}, row {row}", field, text))
                row += 1
    except UserError:
        raise
    except pyarrow.ArrowInvalid as error:
        what = "is not a Parquet file" if row == 0 else f"is damaged after row {row}"
        raise UserError(f"{path} {what} ({first_line(error)}); copy it anew, or leave it out") from None
    except Exception as error:  # damaged bytes raise whatever the code that meets them raises
        said = f"{path} is damaged after row {row} ({first_line(error)}); copy it anew, or leave it out"
        raise UserError(said) from None


def _string(where: str, field: str, text: Any) -> str:
    """A table's missing value counts as an empty document; anything else but a string is an error."""
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: column {field!r} is not text (found {type(text).__name__}); set data.text_field")
    return text


# ------------------------------------------------------------------------------------------------ Hugging Face datasets


def _dataset(data: DataConfig, split: str) -> Source:
    folder = Path(data.path or "").expanduser()
    path = str(folder) if folder.is_dir() else str(data.path)
    local = [_File(file.relative_to(folder).as_posix(), file) for file in sorted(folder.rglob("*")) if file.is_file()]
    identity = [Path(path).name if folder.is_dir() else path, data.subset, split, data.text_field, data.streaming]
    if folder.is_dir():
        identity.append(_stat(local)[0])

    def documents() -> Iterator[Document]:
        import datasets

        try:
            rows = datasets.load_dataset(path, name=data.subset, split=split, streaming=data.streaming)
            for number, row in enumerate(rows):
                yield _row(f"{path} ({split}), row {number}", row, data.text_field)
        except UserError:
            raise
        except Exception as error:  # whatever the network, the hub or a loading script raises, the user must hear of it
            raise UserError(
                f"dataset {path}{f' ({data.subset})' if data.subset else ''}, split {split}, could not be read: "
                f"{first_line(error)}\nWithout a network, prepare it elsewhere (python scripts/prepare_data.py ...) "
                "and copy data.cache_dir, or point HF_HOME at a filled Hugging Face cache."
            ) from error

    name = "-".join([Path(path).name, *([data.subset] if data.subset else [])])
    return Source(name, identity, None, lambda: (document for document in documents() if document.text))


def _row(where: str, row: Any, field: str) -> Document:
    if field not in row:
        raise UserError(f"{where}: no column {field!r}; it has {', '.join(sorted(row))}; set data.text_field")
    return Document(where, _string(where, field, row[field]))


def _stat(files: list[_File]) -> tuple[list[tuple[str, int, int]], int]:
    """[(name, size, modification time in ns)] and the sum of sizes. A changed file changes it; nothing is read."""
    facts = []
    for name, path in files:
        status = path.stat()
        facts.append((name, status.st_size, status.st_mtime_ns))
    return facts, sum(size for _, size, _ in facts)
