"""Tokenises chunks of documents in worker processes; results come back in the order of the chunks."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from qtrain.data.tokenizer import Tokenizer, token_dtype
from qtrain.runs.processes import end_with_parent

_worker_tokenizer: Tokenizer | None = None  # one per worker process, sent once


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
    tokens (with the end token) and UTF-8 bytes of each."""

    split: str
    tokens: np.ndarray
    lengths: np.ndarray
    n_bytes: np.ndarray
    digests: list[bytes]


def encode_all(chunks: Iterable[Chunk | Mark], tokenizer: Tokenizer, workers: int) -> Iterator[Encoded | Mark]:
    """One Encoded per Chunk, and each Mark as it is, in order, whatever the number of workers. At most 2 chunks per
    worker are in flight, so that memory stays bounded and a consumer that stops early wastes little."""
    if workers == 1:
        for chunk in chunks:
            yield chunk if isinstance(chunk, Mark) else encode_chunk(chunk, tokenizer)
        return
    # fork where there is one: a spawned worker would import the program again, seconds for a text of megabytes
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer,)) as pool:
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


def encode_chunk(chunk: Chunk, tokenizer: Tokenizer) -> Encoded:
    end = np.array([tokenizer.eos_id], dtype=token_dtype(tokenizer.vocab_size))
    parts = [tokenizer.encode(text) for text in chunk.texts]
    lengths = np.array([len(part) + 1 for part in parts], dtype=np.int64)
    n_bytes = np.array([len(text.encode()) for text in chunk.texts], dtype=np.int64)
    tokens = np.concatenate([piece for part in parts for piece in (part, end)])
    return Encoded(chunk.split, tokens, lengths, n_bytes, chunk.digests)


def _start_worker(tokenizer: Tokenizer) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    end_with_parent()


def _encode_in_worker(chunk: Chunk) -> Encoded:
    assert _worker_tokenizer is not None
    return encode_chunk(chunk, _worker_tokenizer)
