"""Which window of the corpus the g-th sample of a run is: a pure function of (seed, g), in O(1) memory.

Each epoch visits every window once, in an order given by a keyed bijection: a Feistel network over the smallest even
number of bits that holds the window count, walked along its cycle until it lands below the count (Black and Rogaway,
"Ciphers with arbitrary finite domains"). Integer arithmetic only, so the order is the same on every machine and with
every version of numpy; no generator state has to be saved, and any sample can be asked for alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

ROUNDS = 8
MASK32 = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True)
class WindowOrder:
    """Maps sample numbers of a run to window numbers, epoch after epoch.

    seed: any integer; n_windows: windows in the corpus, at least 1 and below 2**62.
    """

    seed: int
    n_windows: int

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """samples: (n,) int64, each >= 0. Returns (n,) int64 window numbers in [0, n_windows)."""
        samples = np.asarray(samples, dtype=np.int64)
        epochs, positions = np.divmod(samples, self.n_windows)
        windows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            windows[chosen] = self._permute(positions[chosen].astype(np.uint64), int(epoch))
        return windows

    def _permute(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        half = np.uint64(max(1, -(-(self.n_windows - 1).bit_length() // 2)))
        keys = _round_keys(self.seed, epoch)
        result = _feistel(positions, keys, half)
        outside = result >= self.n_windows
        while outside.any():
            result[outside] = _feistel(result[outside], keys, half)
            outside = result >= self.n_windows
        return result.astype(np.int64)


class MixedOrder:
    """Maps sample numbers of a run to a part and to a window of it.

    The parts take turns as evenly as their weights allow: after n samples a part has given its share of them, to half a
    sample for it and for each part before it. So every batch has nearly the same mixture, which a draw would not give,
    and the place of a sample is arithmetic of its number alone. Each part is read in its own WindowOrder of the same
    seed, epoch after epoch; a single part is read as if there were no mixture.

    weights: whole numbers, at least 1, and n_windows: of each part.
    """

    def __init__(self, seed: int, weights: Sequence[int], n_windows: Sequence[int]) -> None:
        self.weights = list(weights)
        self.orders = [WindowOrder(seed, count) for count in n_windows]
        self.remaining = [sum(self.weights[number:]) for number in range(len(self.weights))]

    def __call__(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """samples: (n,) int64, each >= 0. Returns the parts, (n,) int64, and the windows, (n,) int64."""
        places = [self._place(int(sample)) for sample in np.asarray(samples)]
        parts, numbers = (np.array(column, dtype=np.int64) for column in zip(*places, strict=True))
        windows = np.empty_like(numbers)
        for part, order in enumerate(self.orders):
            windows[parts == part] = order(numbers[parts == part])
        return parts, windows

    def _place(self, sample: int) -> tuple[int, int]:
        """(part, how many samples it has given before this one). The first part takes the sample where its share of
        those so far, rounded, grows; else it is the others', among which the same is asked."""
        number = sample
        for part, (weight, total) in enumerate(zip(self.weights, self.remaining, strict=True)):
            given, then = ((2 * count * weight + total) // (2 * total) for count in (number, number + 1))
            if then > given:
                return part, given
            number -= given
        raise AssertionError("the last part takes what is left")


def count_windows(n_tokens: int, seq_len: int) -> int:
    """Windows of seq_len tokens and the target of the last one that a split of n_tokens holds."""
    return (n_tokens - 1) // seq_len


def epochs(run_tokens: float, n_tokens: int, seq_len: int) -> float:
    """How often a run of run_tokens reads each window of a training split of n_tokens."""
    return run_tokens / seq_len / max(1, count_windows(n_tokens, seq_len))


def describe_epochs(read: Mapping[str, float]) -> str:
    """A row of a plan: how often each training text is read. It has no name where there is one."""
    told = {name: f"{n:.3g} times" if n > 1 else f"{n:.1%} of it, each part once" for name, n in read.items()}
    return "; ".join(f"{name}: {text}" if name else text for name, text in told.items())


def repetition_warning(read: Mapping[str, float]) -> str | None:
    """What to say of a run that reads a text more than once; None of any other."""
    more = [f"{f' of {name}' if name else ''} is read {n:.3g} times" for name, n in read.items() if n > 1]
    if not more:
        return None
    return (
        f"the training text{', and that'.join(more)}: repeated tokens teach less than new ones, and a scaling law that "
        "counts them as new is off; give more text, or lower trainer.tokens"
    )


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    digest = hashlib.sha256(f"qtrain order {seed} {epoch}".encode()).digest()
    return np.frombuffer(digest, dtype="<u4").astype(np.uint64)[:ROUNDS]


def _feistel(values: np.ndarray, keys: np.ndarray, half: np.uint64) -> np.ndarray:
    """A permutation of [0, 2**(2 half)) for any round function, because each round only XORs one half."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right, key) & mask)
    return (left << half) | right


def _mix(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """A 32-bit finaliser hash of (value, key): every input bit reaches every output bit."""
    x = (values * np.uint64(0x9E3779B1) + key) & MASK32
    for multiplier in (np.uint64(0x85EBCA6B), np.uint64(0xC2B2AE35)):
        x = ((x ^ (x >> np.uint64(16))) * multiplier) & MASK32
    return x ^ (x >> np.uint64(15))
