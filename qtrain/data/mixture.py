"""A corpus that is mixed of others, which are prepared one by one and share a tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import filelock
import numpy as np

from qtrain.config import TokenizerConfig
from qtrain.config.settings import proportions
from qtrain.data.base import DataSettings
from qtrain.data.bigram import MAX_TRAIN_TOKENS, bigram_cross_entropy
from qtrain.data.corpus import Corpus, Part
from qtrain.data.sources.mixture import Mixture
from qtrain.data.tokenise import BPE_TEXT_BYTES, TextPlan, training_text
from qtrain.data.tokenizer import END, Tokenizer, train_bpe
from qtrain.errors import UserError
from qtrain.runs.files import write_atomically

# A part that is streamed is read so far beyond its share of the budget. The samples that it gives differ from its share
# by half a sample for each part, and a window of its last tokens must not be its first again.
MARGIN_TOKENS = 1 << 17


@dataclass(frozen=True)
class MixedCorpus:
    """Parts, by name in order, as a run reads them; see `qtrain.data.order.MixedOrder`.

    data_hash: of the parts' own and their weights. bigram_cross_entropy: the parts' validation splits, by weight, from
    the pair counts of all training text, each part by its weight as far as it reaches.
    """

    parts: tuple[Part, ...]
    fingerprint: str
    is_cut: bool = False

    @property
    def tokenizer(self) -> Tokenizer:
        return self.parts[0].corpus.tokenizer

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def is_masked(self) -> bool:
        return any(part.corpus.is_masked for part in self.parts)

    @property
    def data_hash(self) -> str:
        facts = [(part.weight, part.corpus.data_hash) for part in self.parts]
        return hashlib.sha256(json.dumps(["mixture", *facts]).encode()).hexdigest()

    @cached_property
    def bigram_cross_entropy(self) -> float:
        total = sum(part.weight for part in self.parts)
        heads = [
            part.corpus.train.window(0, min(part.corpus.train.n_tokens, MAX_TRAIN_TOKENS * part.weight // total))
            for part in self.parts
        ]
        seen = Read(np.concatenate(heads))
        losses = (bigram_cross_entropy(seen, part.corpus.val, self.vocab_size) for part in self.parts)
        return sum(part.weight * loss for part, loss in zip(self.parts, losses, strict=True)) / total


class Read:
    """Tokens in memory, as a split."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens, self.n_tokens = tokens, len(tokens)

    def window(self, start: int, length: int) -> np.ndarray:
        return self.tokens[start : start + length]


class PartPlan(Protocol):
    @property
    def fingerprint(self) -> str: ...
    def find(self) -> Corpus | None: ...
    def make(self, progress: bool) -> Corpus: ...


MakePlan = Callable[[DataSettings, TokenizerConfig, int | None], PartPlan]


@dataclass(frozen=True)
class MixturePlan:
    """A mixture that was asked for. plans: of the parts, by name in order. reader: the settings by which the parts'
    tokenizer is read: those of the run, or of the file that the run's is trained into."""

    data: Mixture
    tokenizer: TokenizerConfig
    reader: TokenizerConfig
    weights: dict[str, int]
    fingerprint: str
    sources: dict[str, PartPlan]
    replan: Callable[[TokenizerConfig], dict[str, PartPlan]]

    @property
    def _trains_tokenizer(self) -> bool:
        return self.reader != self.tokenizer

    @property
    def _parts(self) -> dict[str, PartPlan]:
        return self.replan(self.reader) if self._trains_tokenizer else self.sources

    def find(self) -> MixedCorpus | None:
        if self._trains_tokenizer and not Path(str(self.reader.path)).exists():
            return None
        found = {name: plan.find() for name, plan in self._parts.items()}
        corpora = {name: corpus for name, corpus in found.items() if corpus is not None}
        return self._mixed(corpora) if len(corpora) == len(found) else None

    def make(self, progress: bool) -> MixedCorpus:
        if self._trains_tokenizer:
            self._train_tokenizer()
        return self._mixed({name: plan.find() or plan.make(progress) for name, plan in self._parts.items()})

    def _mixed(self, corpora: dict[str, Corpus]) -> MixedCorpus:
        parts = (Part(name, weight, corpora[name]) for name, weight in self.weights.items())
        return MixedCorpus(tuple(parts), self.fingerprint)

    def _train_tokenizer(self) -> None:
        """Of the training text of all parts, of each by its weight."""
        file = Path(str(self.reader.path))
        file.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(file.with_name(f".{file.name}.lock")):
            if not file.exists():
                assert self.tokenizer.vocab_size is not None, "TokenizerConfig requires it for bpe"
                write_atomically(file, train_bpe(self._text(), self.tokenizer.vocab_size).text)

    def _text(self) -> Iterator[str]:
        for name, plan in self.sources.items():
            assert isinstance(plan, TextPlan), "other sources have a tokenizer"
            yield from training_text(plan, BPE_TEXT_BYTES * self.weights[name] // sum(self.weights.values()))


def plan_mixture(
    data: Mixture, tokenizer: TokenizerConfig, budget_tokens: int | None, make_plan: MakePlan
) -> MixturePlan:
    """make_plan: of a part. UserError for what is missing, naming the part."""
    weights = proportions(data.weights)

    def plans(reader: TokenizerConfig) -> dict[str, PartPlan]:
        found = {}
        for name, weight in weights.items():
            budget = budget_tokens
            if budget is not None:
                budget = -(-budget * weight // sum(weights.values())) + MARGIN_TOKENS
            try:
                found[name] = make_plan(data.parts[name].beside(data), reader, budget)
            except UserError as error:
                raise UserError(f"data.parts.{name}: {error}") from None
        return found

    sources = plans(tokenizer)
    facts = [[weights[name], plan.fingerprint] for name, plan in sources.items()]
    fingerprint = hashlib.sha256(json.dumps(["mixture", *facts]).encode()).hexdigest()[:12]
    reader = tokenizer
    if tokenizer.kind == "bpe":
        path = Path(data.cache_dir).expanduser() / f"mixture-{fingerprint}.tokenizer.json"
        reader = TokenizerConfig(kind="huggingface", vocab_size=None, path=str(path), eos_token=END)
    return MixturePlan(data, tokenizer, reader, weights, fingerprint, sources, plans)
