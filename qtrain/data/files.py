"""What sources that read files share: their settings, how a path or glob becomes files, and what is said of bad ones.

An empty document is left out, but an empty *file* that was asked for is an error.
"""

from __future__ import annotations

import codecs
import difflib
import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from qtrain.data.base import DataSettings, Document, Names, Source, TextSettings
from qtrain.errors import UserError

if TYPE_CHECKING:
    import numpy as np


class File(NamedTuple):
    name: str  # relative, with forward slashes: the same wherever the files lie
    path: Path


class NamedFiles(DataSettings):
    """Files that the user names.

    files: paths or globs of the training text.
    val_files: paths or globs of the validation text; without them a part of `files` is held out.
    """

    USUAL: ClassVar[str] = "*.txt"  # what the names of such files look like
    files: Names = ()
    val_files: Names = ()

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if not self.files:
            raise ValueError(f"data.source={self} needs data.files, a path or a glob: data.files='corpus/{self.USUAL}'")
        return self

    def found(self, key: Literal["files", "val_files"]) -> list[File]:
        """The files, each once, in their order. UserError for a pattern that matches none."""
        paths = [path for pattern in getattr(self, key) for path in _expand(f"data.{key}", pattern)]
        paths = list(dict.fromkeys(paths))
        root = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path()
        return [File(path.relative_to(root).as_posix(), path) for path in paths]


@dataclass(frozen=True)
class TokenFile:
    """One file of token ids and the file that says where its documents end.

    ends: the ends of documents first to last - 1, in tokens from the start of the file. check: UserError for an index
    that is not what it should be, where `ends` cannot tell.
    """

    path: Path
    index: Path
    dtype: str
    n_tokens: int
    n_documents: int
    ends: Callable[[int, int], np.ndarray]
    check: Callable[[], None] = lambda: None

    def tokens(self) -> np.ndarray:
        import numpy as np

        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.n_tokens,))

    def end(self, document: int) -> int:
        """UserError where the index leads out of the file."""
        found = int(self.ends(document, document + 1)[0])
        if not 0 <= found <= self.n_tokens:
            raise UserError(
                f"{self.index} is damaged: a document ends at {found} of {self.n_tokens} tokens; copy it anew"
            )
        return found

    def border(self, wanted: int) -> tuple[int, int]:
        """(documents, tokens) up to and with the first document that ends at `wanted` tokens or later."""
        low, high = 0, self.n_documents - 1
        while low < high:
            middle = (low + high) // 2
            if self.end(middle) < wanted:
                low = middle + 1
            else:
                high = middle
        return low + 1, self.end(low)


class TokenFiles(NamedFiles):
    """Files of tokens, which are read where they lie.

    val_fraction: the part that is held out for validation, where the source has no validation split of its own: the
        last documents.
    val_tokens: validation reads at most so many tokens, spread over its split.
    """

    val_fraction: float = Field(0.05, gt=0, lt=1)
    val_tokens: int = Field(gt=0)

    def token_file(self, path: Path) -> TokenFile:
        """What a file and its index say, without reading the tokens. UserError where they are no such files, or cut."""
        raise NotImplementedError


class Files(NamedFiles, TextSettings):
    """Documents in files."""

    def read(self, path: Path) -> Iterator[Document]:
        """The documents of a file, in their order; empty ones may be among them."""
        raise NotImplementedError

    def options(self) -> Any:
        """What beside the files decides which documents are read, as plain data."""
        return ""

    def open(self) -> tuple[Source, Source | None]:
        return self._source(self.found("files")), self._source(self.found("val_files")) if self.val_files else None

    def _source(self, files: list[File]) -> Source:

        def documents(place: Sequence[int] = (0, 0)) -> Iterator[Document]:
            first, read = place
            for number in range(first, len(files)):
                for count, document in enumerate(self.read(files[number].path), 1):
                    if document.text and (number > first or count > read):
                        yield document._replace(place=partial(list, (number, count)))

        facts, n_bytes = stat(files)
        return Source(f"{self}-{files[0].path.stem}", [str(self), self.options(), facts], n_bytes, documents)


class RowFiles(Files):
    """Files whose lines or rows are documents.

    text_field: the field or column that holds the text.
    """

    text_field: str = "text"

    def options(self) -> Any:
        return self.text_field


def code_source(name: str, files: list[File]) -> Source:
    """One file of Python code is one document."""

    def documents(place: int = 0) -> Iterator[Document]:
        for number, file in enumerate(files[place:], place + 1):
            try:
                text = file.path.read_bytes().decode()
            except UnicodeDecodeError:  # a handful of files in older encodings, which no user chose
                continue
            if text:
                yield Document(file.name, text, partial(int, number))

    return Source(name, *stat(files), documents)


def stat(files: list[File]) -> tuple[list[tuple[str, int, int]], int]:
    """[(name, size, modification time in ns)] and the sum of sizes. A changed file changes it; nothing is read."""
    facts = []
    for name, path in files:
        status = path.stat()
        facts.append((name, status.st_size, status.st_mtime_ns))
    return facts, sum(size for _, size, _ in facts)


def unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot read {path}: {error.strerror}; mend it, or leave it out of data.files")


def lines_of(path: Path) -> Iterator[tuple[str, str]]:
    """(file and number, text) of each line of a file that is not blank. UserError for what cannot be read, and for a
    line that is not UTF-8."""
    offset = 0
    try:
        with path.open("rb") as lines:
            for number, raw in enumerate(lines, start=1):
                line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, decoded(where, line, offset)
                offset += len(raw)
    except OSError as error:
        raise unreadable(path, error) from None


def decoded(where: Path | str, raw: bytes, start: int) -> str:
    """Text from UTF-8. UserError naming the first byte that is none; start: offset of raw in its file."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 text (byte 0x{raw[error.start]:02x} at offset {start + error.start}); "
            "convert it, for example with iconv -t utf-8"
        ) from None


def cell_text(where: str, field: str, text: Any) -> str:
    """The text of a table's cell. A missing value counts as an empty document; anything else but a string is a
    UserError."""
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: column {field!r} is not text (found {type(text).__name__}); set data.text_field")
    return text


def _expand(key: str, pattern: str) -> list[Path]:
    """The files of a path or glob, sorted. UserError if there are none, or if one is a folder or empty."""
    path = Path(os.path.expanduser(pattern))  # noqa: PTH111 (Path raises for a user that is not there)
    try:
        there = path.exists() or path.is_symlink()
        names = [str(path)] if there else sorted(set(_matches(str(_from_here(path)))))
        paths = [Path(name).absolute() for name in names]
        files = [path for path in paths if path.is_file()]
    except (OSError, ValueError) as error:  # ValueError: a character that no name has
        told = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{key}={pattern} cannot be read: {told}; name another file") from None
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


def _from_here(pattern: Path) -> Path:
    """A relative glob as an absolute one. The working directory is none, though its name may hold brackets."""
    return Path(glob.escape(str(Path.cwd()))) / pattern


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
