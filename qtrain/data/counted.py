"""Which tokens a loss counts, told by the sign of a token.

A token that no loss counts, such as one of a prompt, is stored as ~id, which is negative. The model reads its id all
the same. Plain text has no such token. Both functions work on arrays of numpy and on tensors of torch, of signed
integers.
"""

from __future__ import annotations

from typing import TypeVar

Tokens = TypeVar("Tokens")

DTYPE = "<i4"  # of the shards of a corpus that has such tokens


def ids_of(tokens: Tokens) -> Tokens:
    """The ids that the tokenizer gave, counted or not."""
    return tokens ^ (tokens >> 63)  # pyright: ignore[reportOperatorIssue]


def counts(tokens: Tokens) -> Tokens:
    """True where a loss counts the prediction of the token."""
    return tokens >= 0  # pyright: ignore[reportOperatorIssue]
