"""What a run costs and how good it is, as pure functions of its settings and counts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qtrain.models.base import ModelSettings
from qtrain.models.decoder import count_parameters, matmul_parameters


def flops_per_token(config: ModelSettings, vocab_size: int) -> int:
    """FLOPs of training on one token of a full sequence: 6 N + 12 L T D.

    N matmul parameters, L layers, T seq_len, D elements of all query heads. Two FLOPs per multiply-add; a backward
    costs two forwards; attention counts the whole T x T matrix, though half of it is masked; recomputation counts
    nothing. Norms, activations, rotations, the embedding look-up, the optimiser and quantisation are left out. This is
    the convention of PaLM, arXiv 2204.02311, appendix B.
    """
    return 6 * matmul_parameters(config, vocab_size) + 12 * config.n_layers * config.seq_len * config.attention_width()


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. Weights, gradients and the optimiser's state are exact; activations are an estimate."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations


def estimate_memory(
    config: ModelSettings, vocab_size: int, micro_batch_size: int, *, mixed: bool, state_bytes: int
) -> Memory:
    """Memory of unsharded training on float32 weights. mixed: matmuls on bfloat16 copies of their inputs; state_bytes:
    that the optimiser keeps for each parameter.

    Activations are what the unquantised, uncompiled model keeps for its backward: of each block its family's estimate,
    of the head one more norm, and at the peak of the loss the logits in the compute dtype and two float32 tensors of
    their size. Mixed precision also copies every weight once. Quantised operands, the allocator's slack and temporaries
    come on top; so do float32 copies of what mixed precision multiplies, on a processor without bfloat16 units
    (`qtrain_kernels.precision`).
    """
    total, _ = count_parameters(config, vocab_size)
    size = 2 if mixed else 4
    head = (2 * 4 + size) * config.dim + vocab_size * (size + 2 * 4)
    activations = micro_batch_size * config.seq_len * (config.n_layers * config.kept_bytes(mixed) + head)
    weight_copies = 2 * matmul_parameters(config, vocab_size) if mixed else 0
    return Memory(4 * total, 4 * total, state_bytes * total, activations + weight_copies)


def bits_per_byte(loss: float, n_tokens: float, n_bytes: float) -> float:
    """Mean cross-entropy in nats per token -> bits per byte of the text that these tokens spell.

    Comparable between tokenizers, as a loss per token is not. Only the ratio of the two
    counts matters. ValueError for a text of no bytes.
    """
    if n_bytes <= 0:
        raise ValueError(f"bits per byte needs a text of some bytes, found {n_bytes} bytes for {n_tokens} tokens")
    return loss * n_tokens / (n_bytes * math.log(2))
