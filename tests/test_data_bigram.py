"""The bigram cross-entropy against a slow count by hand, and against a text whose entropy is known."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from qtrain.data import bigram
from qtrain.data.bigram import bigram_cross_entropy


class Stream:
    def __init__(self, tokens: list[int] | np.ndarray) -> None:
        self.tokens = np.asarray(tokens, dtype=np.int64)
        self.n_tokens = len(self.tokens)

    def window(self, start: int, length: int) -> np.ndarray:
        assert start + length <= self.n_tokens
        return self.tokens[start : start + length]


def by_hand(train: list[int], val: list[int], vocab_size: int) -> float:
    unigrams, contexts = Counter(train), Counter(train[:-1])
    pairs = Counter(pairwise(train))
    total = 0.0
    for a, b in pairwise(val):
        p_b = (unigrams[b] + 1) / (len(train) + vocab_size)
        kinds = len({pair for pair in pairs if pair[0] == a})
        p = (pairs[a, b] + kinds * p_b) / (contexts[a] + kinds) if contexts[a] else p_b
        total -= math.log(p)
    return total / (len(val) - 1)


@pytest.mark.parametrize("vocab_size", [5, 50, 100_000])  # counted densely, and by sorting
def test_equals_the_count_by_hand(vocab_size: int) -> None:
    generator = np.random.default_rng(vocab_size)
    top = min(vocab_size, 40)
    train = (generator.integers(0, top - 1, 300) * (vocab_size // top)).tolist()
    val = (generator.integers(0, top, 100) * (vocab_size // top)).tolist()
    assert set(val[:-1]) - set(train)  # contexts that training never saw
    found = bigram_cross_entropy(Stream(train), Stream(val), vocab_size)
    assert found == pytest.approx(by_hand(train, val, vocab_size), rel=1e-12)


def test_approaches_the_entropy_of_a_markov_chain() -> None:
    """Each of 8 tokens is followed by one of two, with odds 3 to 1: 0.5623 nats per token."""
    generator = np.random.default_rng(0)
    steps = np.where(generator.random(200_000) < 0.25, 3, 1)
    stream = np.cumsum(steps) % 8
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    found = bigram_cross_entropy(Stream(stream[:150_000]), Stream(stream[150_000:]), 257)
    assert found == pytest.approx(entropy, abs=0.01)


def test_reads_no_more_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bigram, "MAX_TRAIN_TOKENS", 100)
    monkeypatch.setattr(bigram, "MAX_VAL_TOKENS", 50)
    generator = np.random.default_rng(1)
    train, val = generator.integers(0, 9, 200), generator.integers(0, 9, 90)
    found = bigram_cross_entropy(Stream(train), Stream(val), 9)
    assert found == pytest.approx(by_hand(train[:100].tolist(), val[:50].tolist(), 9), rel=1e-12)
