"""A prepared corpus: memory-mapped token shards, document records and a manifest in one folder.

    manifest.json           what it is and what it holds
    verified.json           which files were read and found whole, as they are now
    tokenizer.json          unless the tokenizer is bytes
    chat_template.jinja     where the tokenizer has one
    train-00000.bin ...     token ids, little-endian uint16 (uint32 above 65536 ids; int32 where a loss counts but some
                            of them, see `qtrain.data.counted`), one stream cut into shards
    train-documents.bin     one DOCUMENT record per document, in stream order
    val-00000.bin ...       the same for the validation split

Every document ends with the tokenizer's end-of-document token.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import numpy as np
from pydantic import BaseModel, Field, ValidationError, model_validator

from qtrain.config.settings import Strict
from qtrain.data.bigram import MAX_TRAIN_TOKENS, bigram_cross_entropy
from qtrain.data.counted import DTYPE as MASKED
from qtrain.data.counted import counts as counts_loss
from qtrain.data.tokenizer import Tokenizer, load_saved
from qtrain.errors import UserError
from qtrain.runs.files import read_json, write_atomically

# end: tokens up to and with this document; end_bytes: the same in UTF-8 bytes of text; digest: sha256 of the text, cut.
DOCUMENT = np.dtype([("end", "<u8"), ("end_bytes", "<u8"), ("digest", "V16")])
BLOCK = 1 << 16
FORMAT_VERSION = 1
MAX_SHARDS = 1 << 20  # of a split: more than any corpus has, and than a damaged manifest may ask us to count
VERIFIED = "verified.json"  # beside the manifest: which files were read and found whole


@dataclass(frozen=True)
class Split:
    """The tokens of one side. n_tokens counts the end-of-document tokens, n_bytes is the UTF-8 length of the
    text that a loss counts."""

    folder: Path
    name: str
    dtype: str
    shard_tokens: int
    n_tokens: int
    n_documents: int
    n_bytes: int

    def window(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) of the stream, (length,) int64. Reads those alone, across shard borders."""
        if start < 0 or start + length > self.n_tokens:
            raise IndexError(f"tokens {start} to {start + length} of a split of {self.n_tokens}")
        parts = []
        while length > 0:
            shard, offset = divmod(start, self.shard_tokens)
            part = self._shards[shard][offset : offset + length]
            parts.append(part)
            start, length = start + len(part), length - len(part)
        return np.concatenate(parts, dtype=np.int64) if parts else np.empty(0, np.int64)

    @cached_property
    def documents(self) -> np.ndarray:
        """One DOCUMENT record per document, memory-mapped."""
        return np.memmap(self.folder / f"{self.name}-documents.bin", dtype=DOCUMENT, mode="r")[: self.n_documents]

    def head(self, n_tokens: int) -> Split:
        """The whole documents that hold the first n_tokens + 1 tokens (a window's targets are one token ahead)."""
        if n_tokens >= self.n_tokens:
            return self
        count = int(np.searchsorted(self.documents["end"], n_tokens, side="right")) + 1
        last = self.documents[count - 1]
        return replace(self, n_tokens=int(last["end"]), n_bytes=int(last["end_bytes"]), n_documents=count)

    def digests(self) -> Iterator[bytes]:
        """The documents' digests, concatenated, in blocks."""
        for start in range(0, self.n_documents, BLOCK):
            yield self.documents["digest"][start : start + BLOCK].tobytes()

    @cached_property
    def _shards(self) -> list[np.ndarray]:
        count = math.ceil(self.n_tokens / self.shard_tokens)
        return [np.memmap(shard_path(self.folder, self.name, i), dtype=self.dtype, mode="r") for i in range(count)]

    def __getstate__(self) -> dict[str, Any]:
        """Without the maps: a loader process opens its own, where a pickled map would be a copy of the corpus."""
        return {key: value for key, value in self.__dict__.items() if key not in ("documents", "_shards")}


class Stream(Protocol):
    """A split's tokens, one after the other; see Split. digests: of the documents' text, where there is text."""

    @property
    def n_tokens(self) -> int: ...
    @property
    def n_documents(self) -> int: ...
    @property
    def n_bytes(self) -> int: ...
    def window(self, start: int, length: int) -> np.ndarray: ...
    def digests(self) -> Iterator[bytes]: ...


class HasVocabulary(Protocol):
    @property
    def vocab_size(self) -> int: ...


class Part(NamedTuple):
    """A source of a mixture. weight: its share of the samples is this over the sum of all weights."""

    name: str
    weight: int
    corpus: Corpus

    @property
    def place(self) -> str:
        """Of its settings."""
        return f"data.parts.{self.name}" if self.name else "data"


@dataclass(frozen=True)
class Corpus:
    """Tokens of a training and a validation split that share no document, and what they were made of.

    data_hash: of the documents, their order, the split and the tokenizer; the same on every machine. Each run reads a
        streamed source as far as its own budget, so there the first training document stands for those that follow:
        budgets of one sweep are of the same data.
    bigram_cross_entropy: nats per token on the validation split, see `qtrain.data.bigram`.
    fingerprint: of the sources that it was found or made for (`qtrain.data.prepare.fingerprint`); "" of a corpus that
        was opened by its folder.
    val_tokens: a validation reads at most so many tokens of the validation split; 0 of a corpus that was opened by its
        folder.
    reread: reads all of it again; UserError for what is not as it was. None: `verify` of its folder.
    """

    folder: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    train: Stream
    val: Stream
    data_hash: str
    bigram_cross_entropy: float
    fingerprint: str = ""
    val_tokens: int = 0
    reread: Callable[[], object] | None = None

    def verify(self) -> None:
        """Reads everything. UserError naming the first file that is not what it was."""
        if self.reread is None:
            verify(self.folder)
        else:
            self.reread()

    @property
    def parts(self) -> tuple[Part, ...]:
        """The sources that it is mixed of: itself alone."""
        return (Part("", 1, self),)

    @property
    def name(self) -> str:
        return self.manifest["source"]

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per token of the validation split, of what a loss counts: bits per byte = loss in nats / ln 2 /
        bytes_per_token."""
        if not self.is_masked:
            return self.val.n_bytes / self.val.n_tokens
        steps = range(0, self.val.n_tokens, 1 << 24)
        windows = (self.val.window(at, min(1 << 24, self.val.n_tokens - at)) for at in steps)
        return self.val.n_bytes / max(1, sum(int(counts_loss(window).sum()) for window in windows))

    @property
    def is_masked(self) -> bool:
        """Whether a loss counts but some of the tokens (`qtrain.data.counted`)."""
        return self.manifest.get("dtype") == MASKED

    @property
    def is_cut(self) -> bool:
        """Whether the validation split is the end of the only text there is."""
        return self.manifest.get("is_cut", False)


def shard_path(folder: Path, split: str, index: int) -> Path:
    return folder / f"{split}-{index:05d}.bin"


def data_hash(tokenizer_hash: str, train: Split, val: Split) -> str:
    """64 hex digits over the tokenizer and, per split, the digests of its documents in order. Text and tokenizer
    determine the tokens, so reading them is not needed."""
    total = hashlib.sha256(tokenizer_hash.encode())
    for split in (train, val):
        part = hashlib.sha256()
        for block in split.digests():
            part.update(block)
        total.update(part.digest())
    return total.hexdigest()


def open_corpus(folder: Path, train_tokens: int | None = None) -> Corpus:
    """The corpus in a folder; with train_tokens only the training documents that hold so many, exactly as if it had
    been prepared with that limit. UserError naming the file if one is missing, damaged or of another size."""
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    train, val = (_split(folder, manifest, name) for name in ("train", "val"))
    tokenizer = _tokenizer(folder, manifest)
    digest, bigram = manifest["data_hash"], manifest["bigram_cross_entropy"]
    if train_tokens is not None and train_tokens < train.n_tokens:
        whole, train = train, train.head(train_tokens)
        if not manifest["options"]["streaming"]:
            digest = data_hash(manifest["tokenizer"]["hash"], train, val)
        if train.n_tokens < min(MAX_TRAIN_TOKENS, whole.n_tokens):
            bigram = bigram_cross_entropy(train, val, tokenizer.vocab_size)
    return Corpus(folder, manifest, tokenizer, train, val, digest, bigram)


class _Counts(Strict):
    n_tokens: int = Field(ge=0)
    n_documents: int = Field(ge=0)
    n_bytes: int = Field(ge=0)


class _File(Strict):
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class _SavedTokenizer(BaseModel):
    hash: str
    vocab_size: int = Field(gt=0)
    eos_id: int = Field(ge=0)
    file: bool


class _Options(BaseModel):
    streaming: bool


class _Manifest(BaseModel):
    """What the code reads of a manifest; what else it says is for people."""

    tokenizer: _SavedTokenizer
    options: _Options
    dtype: Literal["<u2", "<u4", "<i4"]
    shard_tokens: int = Field(gt=0)
    train_limit: int | None
    train_complete: bool
    splits: dict[Literal["train", "val"], _Counts] = Field(min_length=2)
    data_hash: str
    bigram_cross_entropy: float
    files: dict[Annotated[str, Field(pattern="^[a-z][a-z0-9._-]*$")], _File]

    @model_validator(mode="after")
    def _files_hold_the_tokens(self) -> _Manifest:
        item = np.dtype(self.dtype).itemsize
        if self.splits["val"].n_tokens == 0:
            raise ValueError("it counts no token of val")
        for name, counts in self.splits.items():
            full, rest = divmod(counts.n_tokens, self.shard_tokens)
            if full > MAX_SHARDS:
                raise ValueError(f"it counts {counts.n_tokens:,} tokens of {name}, in {full:,} files")
            shards = [self.shard_tokens] * full + [rest] * (rest > 0)
            expected = {shard_path(Path(), name, i).name: n * item for i, n in enumerate(shards)}
            expected[f"{name}-documents.bin"] = counts.n_documents * DOCUMENT.itemsize
            found = {key: file.bytes for key, file in self.files.items() if key.startswith(f"{name}-")}
            if found != expected:
                raise ValueError(f"its files of {name} do not hold the {counts.n_tokens:,} tokens that it counts")
        if (
            self.tokenizer.file != ("tokenizer.json" in self.files)
            or self.tokenizer.eos_id >= self.tokenizer.vocab_size
        ):
            raise ValueError("its tokenizer does not fit its files")
        return self


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a corpus folder. UserError if it is missing, damaged, of another format version, or says of the
    files what they cannot hold."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); prepare the corpus again") from None
    found = manifest.get("format_version") if isinstance(manifest, dict) else None
    if found != FORMAT_VERSION:
        raise UserError(f"{path} has format version {found}, not {FORMAT_VERSION}; prepare the corpus again")
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        said = f"{where}: {first['msg']}" if where else first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path} is damaged ({said}); prepare the corpus again") from None
    return manifest


def check_files(folder: Path, manifest: dict[str, Any]) -> None:
    """UserError naming the first file that is missing or differs from what the manifest says.

    The content is read once, and again when a file was written to since: VERIFIED remembers each file's size, inode,
    and time of change. A disk that forgets bits without being written to is found by `verify` alone.
    """
    _check_sizes(folder, manifest)
    stamps = {name: stamp_of(folder / name) for name in manifest["files"]}
    known = _read_verified(folder)
    changed = [name for name, stamp in stamps.items() if known.get(name) != [stamp, manifest["files"][name]["sha256"]]]
    for name in changed:
        _check_content(folder, name, manifest)
    if changed:
        sums = {name: [stamp, manifest["files"][name]["sha256"]] for name, stamp in stamps.items()}
        with contextlib.suppress(OSError):  # a cache that is read-only is read each time
            write_atomically(folder / VERIFIED, json.dumps(sums))


def verify(folder: Path) -> None:
    """Reads everything. UserError naming the first file whose size, sha256 or token ids are not the manifest's."""
    manifest = read_manifest(folder)
    _check_sizes(folder, manifest)
    for name in manifest["files"]:
        _check_content(folder, name, manifest)


def _check_sizes(folder: Path, manifest: dict[str, Any]) -> None:
    for name, facts in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != facts["bytes"]:
            found = "missing" if size is None else f"{size} bytes"
            raise UserError(f"{path}: {found}, the manifest says {facts['bytes']} bytes; prepare the corpus again")


def stamp_of(path: Path) -> list[int]:
    """What changes when a file is written to; nobody can set st_ctime."""
    found = path.stat()
    return [found.st_size, found.st_ino, found.st_ctime_ns]


def _read_verified(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / VERIFIED)
    except UserError:
        return {}


def _check_content(folder: Path, name: str, manifest: dict[str, Any]) -> None:
    """One pass over a file: its sha256, and of a shard that the tokenizer has each id."""
    total, largest = hashlib.sha256(), 0
    is_shard = name.endswith(".bin") and not name.endswith("-documents.bin")
    with (folder / name).open("rb") as file:
        while block := file.read(1 << 22):
            total.update(block)
            if is_shard:
                tokens = np.frombuffer(block, manifest["dtype"])
                largest = max(largest, int(tokens.max()), ~int(tokens.min()))
    found, expected = total.hexdigest(), manifest["files"][name]["sha256"]
    if found != expected:
        raise UserError(
            f"{folder / name}: content differs from the manifest (sha256 {found[:12]}..., expected "
            f"{expected[:12]}...); delete {folder} and prepare the corpus again"
        )
    if largest >= manifest["tokenizer"]["vocab_size"]:
        raise UserError(
            f"{folder / name} has the token {largest}, and the tokenizer {manifest['tokenizer']['vocab_size']} ids; "
            f"delete {folder} and prepare the corpus again"
        )


def _tokenizer(folder: Path, manifest: dict[str, Any]) -> Tokenizer:
    """UserError for a tokenizer that is not the one that the tokens were made with."""
    saved = manifest["tokenizer"]
    tokenizer = load_saved(folder / "tokenizer.json" if saved["file"] else None, saved["eos_id"])
    if (tokenizer.vocab_size, tokenizer.eos_id) != (saved["vocab_size"], saved["eos_id"]):
        raise UserError(
            f"{folder / 'manifest.json'} is of another tokenizer than its folder holds; prepare the corpus again"
        )
    return tokenizer


def check_vocab(corpus: HasVocabulary, vocab_size: int) -> None:
    """UserError if the model's vocabulary does not hold every token id of the corpus."""
    if vocab_size < corpus.vocab_size:
        raise UserError(
            f"model.vocab_size={vocab_size} is smaller than the tokenizer's {corpus.vocab_size} ids; set it to "
            f"{corpus.vocab_size} or more, or leave it null to take the tokenizer's"
        )


def _split(folder: Path, manifest: dict[str, Any], name: str) -> Split:
    counts = {key: manifest["splits"][name][key] for key in ("n_tokens", "n_documents", "n_bytes")}
    return Split(folder, name, manifest["dtype"], manifest["shard_tokens"], **counts)
