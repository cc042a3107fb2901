"""The corpus that a run's settings name: opened where it lies prepared, else made.

How it is made is the plan's: `qtrain.data.tokenise` for text, `qtrain.data.token_files` for what is tokenised already,
`qtrain.data.mixture` for several sources.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from qtrain.config import TokenizerConfig
from qtrain.data.base import DataSettings, TextSettings
from qtrain.data.corpus import Corpus, Stream
from qtrain.data.files import TokenFiles
from qtrain.data.mixture import MixedCorpus, plan_mixture
from qtrain.data.sources.mixture import Mixture
from qtrain.data.token_files import TokenPlan, plan_tokens
from qtrain.data.tokenise import TextPlan, plan_text
from qtrain.data.tokenizer import FileTokenizer
from qtrain.errors import UserError

log = logging.getLogger(__name__)


class Plan(Protocol):
    """A corpus that was asked for. fingerprint: twelve hex digits of the sources, what is held out of them, and the
    tokenizer. find: the corpus where it lies prepared. make: the corpus, prepared; progress: show a bar where there is
    a terminal, else a line at the start and one at the end."""

    @property
    def fingerprint(self) -> str: ...
    def find(self) -> Corpus | MixedCorpus | None: ...
    def make(self, progress: bool) -> Corpus | MixedCorpus: ...


def _plan(data: DataSettings, tokenizer: TokenizerConfig, budget_tokens: int | None) -> Plan:
    if isinstance(data, Mixture):
        return plan_mixture(data, tokenizer, budget_tokens, _part_plan)
    return _part_plan(data, tokenizer, budget_tokens)


def _part_plan(
    data: DataSettings, tokenizer: TokenizerConfig, budget_tokens: int | None = None, only_val: bool = False
) -> TextPlan | TokenPlan:
    if isinstance(data, TokenFiles):
        return plan_tokens(data, tokenizer, only_val)
    assert isinstance(data, TextSettings)
    return plan_text(data, tokenizer, budget_tokens, only_val)


def prepare(
    data: DataSettings, tokenizer: TokenizerConfig, *, budget_tokens: int | None = None, progress: bool = True
) -> Corpus | MixedCorpus:
    """The corpus of these settings: opened from data.cache_dir where it lies prepared, else made there.

    budget_tokens: training tokens that the run will read; the limit of a streamed source without data.max_tokens.
    progress: show a bar where there is a terminal; else a line at the start and one at the end.
    Raises UserError for bad input, naming file and place, before anything of an earlier preparation is touched.
    """
    plan = _plan(data, tokenizer, budget_tokens)
    corpus = plan.find() or plan.make(progress)
    for part in corpus.parts:
        if part.corpus.is_cut:
            log.info("%s", describe_cut(part.corpus))
        if len(corpus.parts) > 1:
            _warn_of_training_text(part.place, part.corpus.val, corpus)
    wanted = tokenizer.vocab_size if tokenizer.kind == "bpe" else None
    if wanted is not None and corpus.vocab_size < wanted:
        log.warning(
            "the vocabulary has %d tokens, not tokenizer.vocab_size=%d: the training text has no more pairs to merge",
            corpus.vocab_size, wanted,
        )  # fmt: skip
    return corpus


def prepare_validation(
    validation: Mapping[str, DataSettings],
    data: DataSettings,
    tokenizer: TokenizerConfig,
    corpus: Corpus | MixedCorpus,
    *,
    progress: bool = True,
) -> dict[str, Corpus]:
    """The further sources that a run of `corpus` validates on, by name: of each the validation split that it names,
    else all of it, in the tokens of the run's tokenizer. UserError as `prepare`, naming the source.

    Documents that the run is trained on too are told in the log.
    """
    shared = _shared_tokenizer(tokenizer, corpus)
    found = {}
    for name, settings in validation.items():
        try:
            found[name] = prepare_text(settings.beside(data), shared, progress=progress)
        except UserError as error:
            raise UserError(f"validation.{name}: {error}") from None
        _warn_of_training_text(f"validation.{name}", found[name].val, corpus)
    return found


def prepare_text(data: DataSettings, tokenizer: TokenizerConfig, *, progress: bool = True) -> Corpus:
    """The text of one source as a validation split: that which the source names, else all of it. UserError as
    `prepare`, and for a mixture."""
    if isinstance(data, Mixture):
        raise UserError("a mixture is several texts; name one of its sources by data=...")
    plan = _part_plan(data, tokenizer, only_val=True)
    return plan.find() or plan.make(progress)


def _shared_tokenizer(tokenizer: TokenizerConfig, corpus: Corpus | MixedCorpus) -> TokenizerConfig:
    """The settings of the tokenizer of `corpus`, for another source: one that was trained on a text is read from its
    file."""
    if tokenizer.kind != "bpe":
        return tokenizer
    assert isinstance(corpus.tokenizer, FileTokenizer)
    path = corpus.parts[0].corpus.folder / "tokenizer.json"
    return TokenizerConfig(kind="huggingface", vocab_size=None, path=str(path), eos_token=corpus.tokenizer.eos_token)


def _warn_of_training_text(place: str, val: Stream, corpus: Corpus | MixedCorpus) -> None:
    count = sum(count_shared(part.corpus.train, val) for part in corpus.parts)
    if count:
        log.warning(
            "%d documents of %s are training text too: its loss tells less of text that the model has not seen",
            count, place,
        )  # fmt: skip


def count_shared(train: Stream, val: Stream) -> int:
    """How many documents of the training split stand in the validation split too, by their digests."""
    digests = b"".join(val.digests())
    if not digests:
        return 0
    wanted = np.unique(np.frombuffer(digests, "<u8")[::2])
    return sum(int(np.isin(np.frombuffer(block, "<u8")[::2], wanted).sum()) for block in train.digests())


def describe_cut(corpus: Corpus) -> str:
    """What to say of a corpus whose validation split is the end of its only text."""
    share = corpus.val.n_bytes / (corpus.train.n_bytes + corpus.val.n_bytes)
    return f"the data is one text: its last {share:.1%} is the validation split, and no training step reads it"


def fingerprint(data: DataSettings, tokenizer: TokenizerConfig, *, budget_tokens: int | None = None) -> str:
    """Twelve hex digits of the sources, what is held out of them, and the tokenizer, without reading any text: name,
    size and modification time of each file, or the name of a dataset on the hub. UserError as `prepare`."""
    return _plan(data, tokenizer, budget_tokens).fingerprint


def find(data: DataSettings, tokenizer: TokenizerConfig, *, budget_tokens: int | None) -> Corpus | MixedCorpus | None:
    """The corpus of these settings where it lies prepared; None where it does not, or its text is not here."""
    try:
        return _plan(data, tokenizer, budget_tokens).find()
    except UserError:
        return None


def same_text(
    data: DataSettings,
    tokenizer: TokenizerConfig,
    recorded: Mapping[str, Any],
    *,
    budget_tokens: int | None = None,
    may_prepare: bool = True,
) -> bool | None:
    """Whether a run that is over read the text that these settings name now.

    recorded: its summary.json or its row of a results file, with data_fingerprint and data_hash. Equal fingerprints say
    yes at once: name, size and modification time of each file, or the name of a dataset on the hub. Else the hashes of
    the content are compared, for which the corpus is prepared, as the run would have to; with may_prepare=False the
    answer is None where it lies not prepared yet, or where its files are not on this machine. UserError as `prepare`.
    """
    try:
        plan = _plan(data, tokenizer, budget_tokens)
        if recorded.get("data_fingerprint") == plan.fingerprint:
            return True
        corpus = plan.find()
    except UserError:
        if may_prepare:
            raise
        return None
    if corpus is None and not may_prepare:
        return None
    corpus = corpus or prepare(data, tokenizer, budget_tokens=budget_tokens)
    return corpus.data_hash == recorded.get("data_hash")
