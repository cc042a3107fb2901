"""A decoder of any family, and its size.

    x = embed(tokens)
    x = block(x, ...)            for every layer
    logits = lm_head(norm(x))

Weights start as the Quartet and QuEST code starts them: normal(0, init_std), and normal(0, init_std / sqrt(2 n_layers))
where they write to the residual stream. Biases start at zero.
"""

# B batch, T tokens, V vocabulary, N documents

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qtrain.errors import UserError
from qtrain.models.base import ModelSettings
from qtrain.models.chunked_loss import chunked_cross_entropy
from qtrain_kernels.precision import Linear


class Decoder(nn.Module):
    """tokens (B, T) int64 -> logits (B, T, V), in the dtype of the last matmul (float32, or bfloat16 under autocast).
    With targets (B, T) int64: their cross-entropy in nats, () float32, for which the logits never exist as a whole.

    With cu_seqlens (N + 1,) int32, the cumulative lengths of the documents that the rows are packed of, a token sees
    its own document alone. Rows are read one after the other, and each begins a document. Positions count on from the
    beginning of the row: rotary positions are relative, so that a document's own place does not matter.

    start: the position of the first token, where the attention's caches hold those before it; (B,) int64, that of the
    only token of each row. last: the logits of the last position alone, (B, 1, V).

    UserError when start + T exceeds config.seq_len.
    """

    def __init__(self, config: ModelSettings, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.embed = nn.Embedding(vocab_size, config.dim)
        self.layers = nn.ModuleList(config.block() for _ in range(config.n_layers))
        self.norm = config.norm()
        self.lm_head = Linear(config.dim, vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed.weight
        tables = config.tables()
        self._tables = tuple(tables)
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)
        self._init_weights()

    def _init_weights(self) -> None:
        residual_std = self.config.init_std / math.sqrt(2 * self.config.n_layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                to_residual = name.endswith(self.config.to_residual)
                nn.init.normal_(module.weight, std=residual_std if to_residual else self.config.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        reduction: str = "mean",
        cu_seqlens: Tensor | None = None,
        start: int | Tensor = 0,
        last: bool = False,
    ) -> Tensor:
        first = int(start.max()) if isinstance(start, Tensor) else start
        n_tokens = first + tokens.shape[1]
        if n_tokens > self.config.seq_len:
            raise UserError(
                f"the model {self.config.name} reads at most model.seq_len={self.config.seq_len} tokens at once, found "
                f"sequences of {n_tokens}; shorten them or raise model.seq_len"
            )
        if isinstance(start, Tensor):
            tables = [getattr(self, name)[start][:, None, None] for name in self._tables]
        else:
            tables = [getattr(self, name)[start:n_tokens] for name in self._tables]
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, *tables, cu_seqlens)
        x = self.norm(x[:, -1:] if last else x)
        return self.lm_head(x) if targets is None else chunked_cross_entropy(x, self.lm_head, targets, reduction)


def count_parameters(config: ModelSettings, vocab_size: int) -> tuple[int, int]:
    """(all parameters, all but those of embed and lm_head). Tied embeddings count once."""
    of_block, _, of_norm = _counts(config)
    non_embedding = config.n_layers * of_block + of_norm
    return non_embedding + vocab_size * config.dim * (1 if config.tie_embeddings else 2), non_embedding


def matmul_parameters(config: ModelSettings, vocab_size: int) -> int:
    """Weights that a token is multiplied with: the block linears and lm_head (also where it is tied to embed)."""
    _, of_linears, _ = _counts(config)
    return config.n_layers * of_linears + vocab_size * config.dim


def _counts(config: ModelSettings) -> tuple[int, int, int]:
    """Parameters of a block, those of its linears' weights among them, and parameters of the last norm. Counted on
    shapes alone."""
    with torch.device("meta"):
        block, norm = config.block(), config.norm()
    linears = sum(module.weight.numel() for module in block.modules() if isinstance(module, nn.Linear))
    return _size(block), linears, _size(norm)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
