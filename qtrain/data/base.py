"""What every source of text has. Importing it, or one of them, imports neither torch nor a library of data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from pydantic import Field

from qtrain.config.settings import Member
from qtrain.config.settings import Names as Names


class Document(NamedTuple):
    """A text, and a name that errors can point at: a file, a line of a JSONL file, a row of a table."""

    name: str
    text: str


@dataclass(frozen=True)
class Source:
    """name: readable, for the cache folder. identity: plain data that changes when the content may have changed; the
    cache is keyed by it (files by relative path, size and modification time; datasets by name). n_bytes: size of the
    files, None where unknown. documents: starts a new pass over all documents, in an order that is the same on every
    machine."""

    name: str
    identity: Any
    n_bytes: int | None
    documents: Callable[[], Iterator[Document]]


class DataSettings(Member):
    """Where the text comes from.

    streaming: read the source only as far as the limits ask, and hold documents out by a range of their content hash.
    document_mask: a token attends to those of its own document alone, in training and in validation. The token that
        ends a document belongs to it, and predicts the first token of the next.
    max_tokens: stop the training split there; None takes the whole source, or, when streaming, the run's budget.
    val_fraction: where the source has no validation split of its own, whole documents are held out by their content
        hash until about so much is. Of a source that is one text, the end is held out.
    cache_dir: where token shards are kept, one folder per (source, tokenizer).
    """

    CHOSEN_BY: ClassVar[str] = "source"
    streaming: bool = False
    document_mask: bool = False
    max_tokens: int | None = Field(None, gt=0)
    val_fraction: float = Field(0.05, gt=0, lt=1)
    val_tokens: int = Field(gt=0, description="validation reads at most this many tokens, spread over its split")
    cache_dir: str = ".cache/qtrain"
    num_workers: int = Field(0, ge=0, description="loader processes; 0 loads in the training process")
    prepare_workers: int | None = Field(None, gt=0, description="tokenising processes; None: one per core")

    def open(self) -> tuple[Source, Source | None]:
        """The training source and, where the settings name one, the validation source. Empty documents are left out,
        since a boundary with nothing before it teaches nothing.

        UserError for what is missing, empty or cannot be reached; reading documents raises it for damaged ones.
        """
        raise NotImplementedError
