"""Which window of the corpus the g-th sample of a run is: a pure function of (seed, g), in O(1) memory.

Each epoch visits every window once, in an order given by a keyed bijection: a Feistel network over the smallest even
number of bits that holds the window count, walked along its cycle until it lands below the count (Black and Rogaway,
"Ciphers with arbitrary finite domains"). Integer arithmetic only, so the order is the same on every machine and with
every version of numpy; no generator state has to be saved, and any sample can be asked for alone.
"""

from __future__ import annotations

import hashlib
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


def count_windows(n_tokens: int, seq_len: int) -> int:
    """Windows of seq_len tokens and the target of the last one that a split of n_tokens holds."""
    return (n_tokens - 1) // seq_len


def epochs(run_tokens: int, n_tokens: int, seq_len: int) -> float:
    """How often a run of run_tokens reads each window of a training split of n_tokens."""
    return run_tokens / seq_len / max(1, count_windows(n_tokens, seq_len))


def describe_epochs(read: float) -> str:
    """A row of a plan: how often the training text is read."""
    return f"{read:.3g} times" if read > 1 else f"{read:.1%} of it, each part once"


def repetition_warning(read: float) -> str | None:
    """What to say of a run that reads its text more than once; None of any other."""
    if read <= 1:
        return None
    return (
        f"the training text is read {read:.3g} times: repeated tokens teach less than new ones, and a scaling law that "
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
