"""Randomness as a function: 64-bit keys from (seed, layer, step, micro-batch, use), bits from (key, element).

Nothing reads a global generator, so a resumed run, a recomputed forward and another worker count draw the same bits.
A key is two int32 words; `qtrain_kernels.reference.mix` turns it and an element's position into bits.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable
from functools import cache
from typing import SupportsIndex

import torch
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


def key_words(*parts: SupportsIndex | str) -> list[int]:
    """Two int32 words, a stable hash of the parts (equal on every machine and Python); any integer type counts."""
    parts = tuple(part if isinstance(part, str) else int(operator.index(part)) for part in parts)
    digest = _hash(*parts).digest()
    return [int.from_bytes(digest[at : at + 4], "little", signed=True) for at in (0, 4)]


@cache
def _hash(*parts: int | str) -> hashlib.blake2b:
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return hashlib.blake2b(text.encode(), digest_size=8)


def key_table(layers: Iterable[tuple[int, str, frozenset[str], bool]], step: int, micro_batch: int) -> Tensor:
    """(layers, 9, 2) int32, on the CPU: the keys of an optimiser step's micro-batch, rows in the order of USES.

    layers: (seed, qualified name, GEMMs whose signs are the same for all layers and steps, whether what belongs to the
    weight is drawn once a step) of each.
    """
    digests = []
    for seed, name, fixed, once_a_step in layers:
        for use in USES:
            gemm, _, kind = use.partition(".")
            if kind == "signs" and gemm in fixed:
                digests.append(_hash(seed, "signs").digest())
                continue
            found = _hash(seed, name, use, "step").copy()
            found.update(f"\x1fint:{step}\x1fint:{0 if once_a_step and use in OF_THE_WEIGHT else micro_batch}".encode())
            digests.append(found.digest())
    words = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.int32)
    return words.view(-1, len(USES), 2)


def keys_beside(tensor: Tensor, keys: Tensor) -> Tensor:
    """Keys on the device of a tensor; as they are where that is meta."""
    return keys if tensor.device.type == "meta" else keys.to(tensor.device)
