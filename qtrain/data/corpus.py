"""A prepared corpus: memory-mapped token shards, document records and a manifest in one folder.

    manifest.json           what it is and what it holds
    tokenizer.json          unless the tokenizer is bytes
    train-00000.bin ...     token ids, little-endian uint16 (uint32 above 65536 ids), one stream cut into shards
    train-documents.bin     one DOCUMENT record per document, in stream order
    val-00000.bin ...       the same for the validation split

Every document ends with the tokenizer's end-of-document token.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qtrain.data.bigram import MAX_TRAIN_TOKENS, bigram_cross_entropy
from qtrain.data.tokenizer import Tokenizer, load_saved
from qtrain.errors import UserError

# end: tokens up to and with this document; end_bytes: the same in UTF-8 bytes of text; digest: sha256 of the text, cut.
DOCUMENT = np.dtype([("end", "<u8"), ("end_bytes", "<u8"), ("digest", "V16")])
BLOCK = 1 << 16
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Split:
    """The tokens of one side. n_tokens counts the end-of-document tokens, n_bytes is the text's UTF-8 length."""

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


@dataclass(frozen=True)
class Corpus:
    """Tokens of a training and a validation split that share no document, and what they were made of.

    data_hash: of the documents, their order, the split and the tokenizer; the same on every machine. Each run reads a
        streamed source as far as its own budget, so there the first training document stands for those that follow:
        budgets of one sweep are of the same data.
    bigram_cross_entropy: nats per token on the validation split, see `qtrain.data.bigram`.
    fingerprint: of the sources that it was found or made for (`qtrain.data.prepare.fingerprint`); "" of a corpus that
        was opened by its folder.
    """

    folder: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    train: Split
    val: Split
    data_hash: str
    bigram_cross_entropy: float
    fingerprint: str = ""

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per token of the validation split: bits per byte = loss in nats / ln 2 / bytes_per_token."""
        return self.val.n_bytes / self.val.n_tokens


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
    check_sizes(folder, manifest)
    train, val = (_split(folder, manifest, name) for name in ("train", "val"))
    file = folder / "tokenizer.json"
    tokenizer = load_saved(file if manifest["tokenizer"]["file"] else None, manifest["tokenizer"]["eos_id"])
    digest, bigram = manifest["data_hash"], manifest["bigram_cross_entropy"]
    if train_tokens is not None and train_tokens < train.n_tokens:
        whole, train = train, train.head(train_tokens)
        if not manifest["options"]["streaming"]:
            digest = data_hash(manifest["tokenizer"]["hash"], train, val)
        if train.n_tokens < min(MAX_TRAIN_TOKENS, whole.n_tokens):
            bigram = bigram_cross_entropy(train, val, tokenizer.vocab_size)
    return Corpus(folder, manifest, tokenizer, train, val, digest, bigram)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a corpus folder. UserError if it is missing, damaged or of another format version."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); prepare the corpus again") from None
    found = manifest.get("format_version") if isinstance(manifest, dict) else None
    if found != FORMAT_VERSION:
        raise UserError(f"{path} has format version {found}, not {FORMAT_VERSION}; prepare the corpus again")
    return manifest


def check_sizes(folder: Path, manifest: dict[str, Any]) -> None:
    """UserError naming the first file that is missing or has another size than the manifest says. Reads no content."""
    for name, facts in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != facts["bytes"]:
            found = "missing" if size is None else f"{size} bytes"
            raise UserError(f"{path}: {found}, the manifest says {facts['bytes']} bytes; prepare the corpus again")


def verify(folder: Path) -> None:
    """Reads everything. UserError naming the first file whose size or sha256 is not the manifest's."""
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    for name, facts in manifest["files"].items():
        with (folder / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != facts["sha256"]:
            raise UserError(
                f"{folder / name}: content differs from the manifest (sha256 {found[:12]}..., expected "
                f"{facts['sha256'][:12]}...); delete {folder} and prepare the corpus again"
            )


def check_vocab(corpus: Corpus, vocab_size: int) -> None:
    """UserError if the model's vocabulary does not hold every token id of the corpus."""
    if vocab_size < corpus.vocab_size:
        raise UserError(
            f"model.vocab_size={vocab_size} is smaller than the tokenizer's {corpus.vocab_size} ids; set it to "
            f"{corpus.vocab_size} or more, or leave it null to take the tokenizer's"
        )


def _split(folder: Path, manifest: dict[str, Any], name: str) -> Split:
    counts = {key: manifest["splits"][name][key] for key in ("n_tokens", "n_documents", "n_bytes")}
    return Split(folder, name, manifest["dtype"], manifest["shard_tokens"], **counts)
