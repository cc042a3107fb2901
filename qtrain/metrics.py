"""What a run costs and how good it is, as pure functions of its settings and counts."""

from __future__ import annotations

import math

from qtrain.models.base import ModelSettings
from qtrain.models.decoder import matmul_parameters


def flops_per_token(config: ModelSettings, vocab_size: int) -> int:
    """FLOPs of training on one token of a full sequence: 6 N + 12 L T D.

    N matmul parameters, L layers, T seq_len, D elements of all query heads. Two FLOPs per multiply-add; a backward
    costs two forwards; attention counts the whole T x T matrix, though half of it is masked; recomputation counts
    nothing. Norms, activations, rotations, the embedding look-up, the optimiser and quantisation are left out. This is
    the convention of PaLM, arXiv 2204.02311, appendix B.
    """
    return 6 * matmul_parameters(config, vocab_size) + 12 * config.n_layers * config.seq_len * config.attention_width()


def bits_per_byte(loss: float, n_tokens: float, n_bytes: float) -> float:
    """Mean cross-entropy in nats per token -> bits per byte of the text that these tokens spell.

    Comparable between tokenizers, as a loss per token is not. Only the ratio of the two
    counts matters. ValueError for a text of no bytes.
    """
    if n_bytes <= 0:
        raise ValueError(f"bits per byte needs a text of some bytes, found {n_bytes} bytes for {n_tokens} tokens")
    return loss * n_tokens / (n_bytes * math.log(2))
