"""Randomness as a function: 64-bit keys from (seed, layer, step, micro-batch, use), bits from (key, element).

Nothing reads a global generator, so a resumed run, a recomputed forward and another worker count draw the same bits.
A key is two int32 words; `qtrain_kernels.reference.mix` turns it and an element's position into bits.
"""

from __future__ import annotations

import hashlib
import operator
from typing import SupportsIndex

from torch import Tensor

from qtrain.errors import UserError

# What one layer draws for, in the order of the rows of its key table.
USES = ("fprop.x", "fprop.w", "dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x", "fprop.signs", "dgrad.signs", "wgrad.signs")

# What enters a GEMM with the weight. Drawn in each micro-batch, or once for all micro-batches of an optimiser step, as
# `LinearRecipe.redraw` says; the others are drawn in each.
OF_THE_WEIGHT = ("fprop.w", "dgrad.w", "fprop.signs", "dgrad.signs")


def checked_seed(seed: SupportsIndex) -> int:
    """UserError for what is no integer."""
    try:
        return operator.index(seed)
    except TypeError:
        raise UserError(f"seed is {seed!r}; give an integer") from None


def key_of(keys: Tensor, use: str) -> Tensor:
    """The row (2,) of a layer's key table (9, 2) for one of USES."""
    return keys[USES.index(use)]


def key_words(*parts: SupportsIndex | str) -> list[int]:
    """Two int32 words, a stable hash of the parts (equal on every machine and Python); any integer type counts."""
    parts = tuple(part if isinstance(part, str) else int(operator.index(part)) for part in parts)
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return [int.from_bytes(digest[at : at + 4], "little", signed=True) for at in (0, 4)]
