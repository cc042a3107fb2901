"""What every source of text has. Importing it, or one of them, imports neither torch nor a library of data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

from pydantic import Field

from qtrain.config.settings import Member
from qtrain.config.settings import Names as Names

NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*"  # of a source among several


class Document(NamedTuple):
    """A text, and a name that errors can point at: a file, a line of a JSONL file, a row of a table.

    place: tells, before the next document is asked for, where a later pass goes on after this one, as plain data.
    """

    name: str
    text: str
    place: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Source:
    """name: readable, for the cache folder. identity: plain data that changes when the content may have changed; the
    cache is keyed by it (files by relative path, size and modification time; datasets by name). n_bytes: size of the
    files, None where unknown. documents: starts a new pass over all documents, in an order that is the same on every
    machine; with the place of a document, over those after it."""

    name: str
    identity: Any
    n_bytes: int | None
    documents: Callable[..., Iterator[Document]]


# Those of `data` hold for every source of a run.
OF_THE_RUN = ("document_mask", "cache_dir", "num_workers", "prepare_workers")


class DataSettings(Member):
    """Where the tokens come from.

    document_mask: a token attends to those of its own document alone, in training and in validation. The token that
        ends a document belongs to it, and predicts the first token of the next.
    cache_dir: where token shards are kept, one folder per (source, tokenizer).
    num_workers: processes that load batches; 0 loads them in the training process.
    prepare_workers: processes that tokenise; None is one per core.
    """

    CHOSEN_BY: ClassVar[str] = "source"
    document_mask: bool = False
    cache_dir: str = ".cache/qtrain"
    num_workers: int = Field(0, ge=0)
    prepare_workers: int | None = Field(None, gt=0)

    @property
    def reads_to_the_budget(self) -> bool:
        """Whether the run's budget says how much text is read."""
        return False

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sources that it is mixed of."""
        return ()

    def beside(self, data: DataSettings) -> Self:
        """These settings of a further source of a run, with those that the run has for all."""
        return self.model_copy(update={name: getattr(data, name) for name in OF_THE_RUN})

    def check_beside(self, place: str) -> None:
        """ValueError where the settings of a further source say what the run says for all, and for a place whose last
        part is a name that no table, file or key can hold."""
        name = place.rpartition(".")[2]
        if not re.fullmatch(NAME, name):
            raise ValueError(f"{name!r} cannot name a source: {place}; use letters, digits, _ and -")
        for key in OF_THE_RUN:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{place}.{key}: all sources of a run have one; set data.{key}")


class TextSettings(DataSettings):
    """Text that is tokenised before the training.

    conversations: whether documents are conversations (`qtrain.data.dialogue`), of which a loss counts the completions.
    streaming: read the source only as far as the limits ask, and hold documents out by a range of their content hash.
    max_tokens: stop the training split there; None takes the whole source, or, when streaming, the run's budget.
    val_fraction: the part that is held out for validation, where the source has no validation split of its own. It is
        whole documents, chosen by their content hash; of a source that is one text, the end.
    val_tokens: validation reads at most so many tokens, spread over its split.
    """

    conversations: ClassVar[bool] = False
    streaming: bool = False
    max_tokens: int | None = Field(None, gt=0)
    val_fraction: float = Field(0.05, gt=0, lt=1)
    val_tokens: int = Field(gt=0)

    @property
    def reads_to_the_budget(self) -> bool:
        return self.streaming and self.max_tokens is None

    def open(self) -> tuple[Source, Source | None]:
        """The training source and, where the settings name one, the validation source. Empty documents are left out,
        since a boundary with nothing before it teaches nothing.

        UserError for what is missing, empty or cannot be reached; reading documents raises it for damaged ones.
        """
        raise NotImplementedError
