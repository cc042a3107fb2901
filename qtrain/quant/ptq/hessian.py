"""The second moments of what a layer multiplies: of its output error, the Hessian."""

# T tokens, K in features

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

PARTS = 4  # of the features: of the products of two parts, each is computed once


class Hessian:
    """The mean over all tokens of 2 x x^T, (K, K) float32: the Hessian of |(W - W') X|^2 / tokens in a row of W'.
    Source: GPTQ, arXiv 2210.17323."""

    def __init__(self, features: int, device: torch.device | None = None) -> None:
        self.sum = torch.zeros(features, features, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """x: (T, K), further tokens."""
        x = x.float()
        edges = [x.shape[1] * part // PARTS for part in range(PARTS + 1)]
        spans = [slice(begin, end) for begin, end in pairwise(edges)]
        for i, rows in enumerate(spans):
            self.sum[rows, rows.start :].addmm_(x[:, rows].T, x[:, spans[i].start :])  # on and above the diagonal
        self.tokens += len(x)

    def mean(self) -> Tensor:
        """(K, K), symmetric. ValueError before any token has been seen."""
        if not self.tokens:
            raise ValueError("no token has been seen; add inputs of the layer first")
        upper = self.sum.triu()
        return (upper + upper.triu(1).T) * (2.0 / self.tokens)
