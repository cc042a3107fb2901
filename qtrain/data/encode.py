"""Tokenises chunks of documents in worker processes; results come back in the order of the chunks."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from qtrain.data.tokenizer import Tokenizer, token_dtype
from qtrain.runs.processes import end_with_parent

_worker_encoder: Encoder | None = None  # one per worker process, sent once


@dataclass
class Chunk:
    """Documents of one split, in order."""

    split: str
    texts: list[str]
    digests: list[bytes]
    n_characters: int = 0


@dataclass(frozen=True)
class Mark:
    """Stands among the chunks where all documents read so far are in those before it. place: of the last one, see
    `qtrain.data.base.Document`; dropped: how many were left out so far."""

    place: Any
    dropped: int


@dataclass(frozen=True)
class Encoded:
    """tokens: all documents of the chunk, each with its end token, concatenated. lengths, n_bytes: (documents,) int64,
    tokens (with the end token) and UTF-8 bytes of the text that a loss counts of each."""

    split: str
    tokens: np.ndarray
    lengths: np.ndarray
    n_bytes: np.ndarray
    digests: list[bytes]


class Encoder(Protocol):
    """Makes tokens of documents. dtype: in which they are stored. hash: hex digits; equal hashes encode equally.
    encode: (the tokens of a document with the one that ends it, (n,) in dtype; the UTF-8 bytes of text that a loss
    counts)."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def dtype(self) -> np.dtype: ...
    @property
    def hash(self) -> str: ...
    def encode(self, document: str) -> tuple[np.ndarray, int]: ...


class Text:
    """Encodes documents of plain text, all of which a loss counts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.dtype = token_dtype(tokenizer.vocab_size)

    @property
    def hash(self) -> str:
        return self.tokenizer.hash

    def encode(self, document: str) -> tuple[np.ndarray, int]:
        end = np.array([self.tokenizer.eos_id], dtype=self.dtype)
        return np.concatenate([self.tokenizer.encode(document), end]), len(document.encode())


def encode_all(chunks: Iterable[Chunk | Mark], encoder: Encoder, workers: int) -> Iterator[Encoded | Mark]:
    """One Encoded per Chunk, and each Mark as it is, in order, whatever the number of workers. At most 2 chunks per
    worker are in flight, so that memory stays bounded and a consumer that stops early wastes little."""
    if workers == 1:
        for chunk in chunks:
            yield chunk if isinstance(chunk, Mark) else encode_chunk(chunk, encoder)
        return
    # fork where there is one: a spawned worker would import the program again, seconds for a text of megabytes
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(workers, context, _start_worker, (encoder,)) as pool:
        waiting: deque[Future[Encoded] | Mark] = deque()

        def first() -> Encoded | Mark:
            found = waiting.popleft()
            return found if isinstance(found, Mark) else found.result()

        try:
            for chunk in chunks:
                waiting.append(chunk if isinstance(chunk, Mark) else pool.submit(_encode_in_worker, chunk))
                if len(waiting) >= 2 * workers:
                    yield first()
            while waiting:
                yield first()
        finally:
            pool.shutdown(cancel_futures=True)


def encode_chunk(chunk: Chunk, encoder: Encoder) -> Encoded:
    parts, sizes = zip(*(encoder.encode(text) for text in chunk.texts), strict=True)
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    return Encoded(chunk.split, np.concatenate(parts), lengths, np.array(sizes, dtype=np.int64), chunk.digests)


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    end_with_parent()


def _encode_in_worker(chunk: Chunk) -> Encoded:
    assert _worker_encoder is not None
    return encode_chunk(chunk, _worker_encoder)
