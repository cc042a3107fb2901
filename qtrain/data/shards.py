"""Writes one split: a stream of tokens cut into shards, and a record per document."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from qtrain.data.corpus import DOCUMENT, Split, shard_path
from qtrain.data.encode import Encoded
from qtrain.errors import UserError

SHARD_TOKENS = 1 << 27  # 256 MiB of uint16: few files, and small enough to copy one by one


class NotAsWrittenError(UserError):
    """A file of a preparation that goes on is another than it was left."""


class HashedFile:
    """A file that is hashed while it is written, and on disk when closed. kept: what `synced` said of one that was not
    closed, which goes on from there; NotAsWrittenError where the file no longer has that."""

    def __init__(self, path: Path, kept: dict[str, Any] | None = None) -> None:
        self.path = path
        self._file = path.open("r+b" if kept else "wb")
        self._sha256 = hashlib.sha256()
        self._bytes = 0
        if kept is None:
            return
        while block := self._file.read(min(1 << 22, kept["bytes"] - self._bytes)):
            self._sha256.update(block)
            self._bytes += len(block)
        if self._sha256.hexdigest() != kept["sha256"]:
            self.abandon()
            raise NotAsWrittenError(f"{path} is not what was written to it")
        self._file.truncate(self._bytes)

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._bytes += len(data)

    def flush(self) -> None:
        self._file.flush()

    def synced(self) -> dict[str, Any]:
        """{"bytes": size, "sha256": hex digits} of what was written so far, which is on disk now."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"bytes": self._bytes, "sha256": self._sha256.hexdigest()}

    def abandon(self) -> None:
        """Close it as it is."""
        self._file.close()

    def close(self) -> dict[str, Any]:
        """Returns what `synced` does."""
        facts = self.synced()
        self._file.close()
        return facts


class SplitWriter:
    """Appends encoded documents. limit: documents are taken, whole, until there are more than so many tokens. kept: the
    `state` of a writer to the same folder, which goes on from there; NotAsWrittenError where the files are others."""

    def __init__(
        self, folder: Path, name: str, dtype: np.dtype, limit: int | None, kept: dict[str, Any] | None = None
    ) -> None:
        self.folder, self.name, self.limit = folder, name, limit
        self.dtype = dtype
        self.n_tokens, self.n_documents, self.n_bytes = kept["counts"] if kept else (0, 0, 0)
        self.files: dict[str, dict[str, Any]] = kept["files"] if kept else {}
        self._documents = HashedFile(folder / f"{name}-documents.bin", kept and kept["documents"])
        self._shard: HashedFile | None = None
        if kept and kept["shard"]:
            try:
                self._shard = HashedFile(shard_path(folder, name, self.n_tokens // SHARD_TOKENS), kept["shard"])
            except (NotAsWrittenError, OSError):
                self.abandon()
                raise

    def state(self) -> dict[str, Any]:
        """What was written so far, which is on disk now, as plain data."""
        shard = self._shard.synced() if self._shard else None
        counts = (self.n_tokens, self.n_documents, self.n_bytes)
        return {"counts": counts, "files": self.files, "documents": self._documents.synced(), "shard": shard}

    @property
    def full(self) -> bool:
        return self.limit is not None and self.n_tokens > self.limit

    def add(self, encoded: Encoded) -> None:
        ends = self.n_tokens + np.cumsum(encoded.lengths)
        taken = len(ends)
        if self.limit is not None:
            taken = 0 if self.full else min(taken, int(np.searchsorted(ends, self.limit, side="right")) + 1)
        if taken == 0:
            return
        records = np.empty(taken, dtype=DOCUMENT)
        records["end"] = ends[:taken]
        records["end_bytes"] = self.n_bytes + np.cumsum(encoded.n_bytes[:taken])
        records["digest"] = np.frombuffer(b"".join(encoded.digests[:taken]), dtype="V16")
        self._documents.write(records.tobytes())
        self._append(encoded.tokens[: int(ends[taken - 1]) - self.n_tokens])
        self.n_documents += taken
        self.n_bytes = int(records["end_bytes"][-1])

    def abandon(self) -> None:
        """Close the files as they are."""
        for file in (self._documents, self._shard):
            if file is not None:
                file.abandon()

    def _append(self, tokens: np.ndarray) -> None:
        while len(tokens):
            index, filled = divmod(self.n_tokens, SHARD_TOKENS)
            if self._shard is None:
                self._shard = HashedFile(shard_path(self.folder, self.name, index))
            part, tokens = tokens[: SHARD_TOKENS - filled], tokens[SHARD_TOKENS - filled :]
            self._shard.write(part.astype(self.dtype).tobytes())
            self.n_tokens += len(part)
            if self.n_tokens % SHARD_TOKENS == 0:
                self._close_shard()

    def _close_shard(self) -> None:
        if self._shard is not None:
            self.files[self._shard.path.name] = self._shard.close()
            self._shard = None

    def close(self) -> Split:
        self._close_shard()
        self.files[self._documents.path.name] = self._documents.close()
        counts = (self.n_tokens, self.n_documents, self.n_bytes)
        return Split(self.folder, self.name, self.dtype.str, SHARD_TOKENS, *counts)

    def digests(self) -> set[bytes]:
        """The digests of the documents written so far."""
        self._documents.flush()
        records = np.fromfile(self._documents.path, dtype=DOCUMENT)
        return {digest.tobytes() for digest in records["digest"]}
