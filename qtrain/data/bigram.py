"""Cross-entropy of a bigram model of the corpus: the mark that a trained language model has to pass.

p(b | a) = (c(a, b) + t(a) p(b)) / (c(a) + t(a)), p(b) = (c(b) + 1) / (N + V), with counts c of the training split, t(a)
the number of distinct tokens seen after a, N tokens and V ids: Witten-Bell smoothing over add-one unigrams. It has no
constant to choose, so it serves 257 ids and 32 thousand alike. Pairs that span two documents count like any other.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from qtrain.data.counted import counts as counts_loss
from qtrain.data.counted import ids_of

# Enough for the counts to settle at 257 ids; sorting the pairs of 32k ids takes about 2 s and 0.5 GB.
MAX_TRAIN_TOKENS = 16_000_000
MAX_VAL_TOKENS = 2_000_000


class Tokens(Protocol):
    @property
    def n_tokens(self) -> int: ...
    def window(self, start: int, length: int) -> np.ndarray: ...


def bigram_cross_entropy(train: Tokens, val: Tokens, vocab_size: int) -> float:
    """Nats per token that a loss counts, of the first MAX_VAL_TOKENS of val, from counts of the first MAX_TRAIN_TOKENS
    of train."""
    seen = ids_of(train.window(0, min(train.n_tokens, MAX_TRAIN_TOKENS)))
    asked = val.window(0, min(val.n_tokens, MAX_VAL_TOKENS))
    counted, asked = counts_loss(asked)[1:], ids_of(asked)
    if len(asked) < 2:
        return float("nan")
    unigram = (np.bincount(seen, minlength=vocab_size) + 1.0) / (len(seen) + vocab_size)
    pairs, counts = _count(seen[:-1] * vocab_size + seen[1:], vocab_size**2)
    followers = np.bincount(pairs // vocab_size, minlength=vocab_size)
    contexts = np.bincount(seen[:-1], minlength=vocab_size)

    before, after = asked[:-1], asked[1:]
    hits = _look_up(before * vocab_size + after, pairs, counts)
    novel = followers[before] + (contexts[before] == 0)  # an unseen context falls back to the unigram
    p = (hits + novel * unigram[after]) / (contexts[before] + novel)
    return float(-np.log(p[counted]).mean()) if counted.any() else float("nan")


def _count(codes: np.ndarray, n_codes: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct codes, ascending, and how often each occurs."""
    if n_codes <= 1 << 24:
        counts = np.bincount(codes, minlength=n_codes)
        present = np.flatnonzero(counts)
        return present, counts[present]
    return np.unique(codes, return_counts=True)


def _look_up(codes: np.ndarray, present: np.ndarray, counts: np.ndarray) -> np.ndarray:
    if not len(present):
        return np.zeros(len(codes))
    at = np.minimum(np.searchsorted(present, codes), len(present) - 1)
    return np.where(present[at] == codes, counts[at], 0)
