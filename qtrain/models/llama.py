"""Llama in plain nn.Linear: RMSNorm, rotary positions, SwiGLU, grouped-query attention. It knows nothing of precision.

    x = embed(tokens)
    x = x + o(attention(rope(q(n)), rope(k(n)), v(n)))     n = attention_norm(x)     for every layer
    x = x + down(silu(gate(n)) * up(n))                    n = mlp_norm(x)
    logits = lm_head(norm(x))

Rotary positions pair element i of a head with element i + d/2, as transformers does, so that weights of a
LlamaForCausalLM transfer as they are. Weights start as the Quartet and QuEST code starts them: normal(0, init_std),
and normal(0, init_std / sqrt(2 n_layers)) for o and down, which write to the residual stream. That code fuses q, k, v
(and gate, up) into one linear; here they are separate. Parameter counts are the same, and so are the numerics of a
recipe whose weight scales belong to rows or to blocks within rows.
"""

# B batch, T tokens, D model dim, H query heads, G key/value heads, d head dim, F feed-forward dim, V vocabulary

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from qtrain.config import ModelConfig
from qtrain.errors import UserError
from qtrain.models.chunked_loss import chunked_cross_entropy
from qtrain_kernels.precision import Linear, causal_attention


class Llama(nn.Module):
    """tokens (B, T) int64 -> logits (B, T, V), in the dtype of the last matmul (float32, or bfloat16 under autocast).
    With targets (B, T) int64: their cross-entropy in nats, () float32, for which the logits never exist as a whole.

    UserError when T exceeds config.seq_len.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.embed = nn.Embedding(vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.lm_head = Linear(config.dim, vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed.weight
        cos, sin = rope_tables(config.seq_len, config.head_dim, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._init_weights()

    def _init_weights(self) -> None:
        residual_std = self.config.init_std / math.sqrt(2 * self.config.n_layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                to_residual = name.endswith(("attention.o", "mlp.down"))
                nn.init.normal_(module.weight, std=residual_std if to_residual else self.config.init_std)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, reduction: str = "mean") -> Tensor:
        n_tokens = tokens.shape[1]
        if n_tokens > self.config.seq_len:
            raise UserError(
                f"the model {self.config.name} reads at most model.seq_len={self.config.seq_len} tokens at once, found "
                f"sequences of {n_tokens}; shorten them or raise model.seq_len"
            )
        cos, sin = self.cos[:n_tokens], self.sin[:n_tokens]
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        x = self.norm(x)
        return self.lm_head(x) if targets is None else chunked_cross_entropy(x, self.lm_head, targets, reduction)


class Block(nn.Module):
    """x (B, T, D) -> (B, T, D)"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    """Causal self-attention: n_heads queries share n_kv_heads keys and values. x (B, T, D) -> (B, T, D)"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        kv_dim = config.kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.grouped = config.kv_heads != config.n_heads
        self.q = Linear(config.dim, config.dim, bias=False)
        self.k = Linear(config.dim, kv_dim, bias=False)
        self.v = Linear(config.dim, kv_dim, bias=False)
        self.o = Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (rearrange(y, "B T (H d) -> B H T d", d=self.head_dim) for y in (self.q(x), self.k(x), self.v(x)))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = causal_attention(q, k, v, enable_gqa=self.grouped)
        return self.o(rearrange(y, "B H T d -> B T (H d)"))


class MLP(nn.Module):
    """SwiGLU. x (B, T, D) -> (B, T, D)"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Linear(config.dim, config.ffn_dim, bias=False)
        self.up = Linear(config.dim, config.ffn_dim, bias=False)
        self.down = Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def rope_tables(seq_len: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin (T, d/2) float32 of the angles position * theta^(-2i/d). Source: RoFormer, arXiv 2104.09864."""
    inv_freq = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32), inv_freq)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pair (x[i], x[i + d/2]) of every head by its position's angle i, in float32; the dtype of x comes back.

    x: (B, H, T, d); cos, sin: (T, d/2) float32.
    """
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def count_parameters(config: ModelConfig, vocab_size: int) -> tuple[int, int]:
    """(all parameters, all but those of embed and lm_head), in closed form. Tied embeddings count once."""
    kv_dim = config.kv_heads * config.head_dim
    attention = 2 * config.dim * config.dim + 2 * config.dim * kv_dim
    mlp = 3 * config.dim * config.ffn_dim
    norms = 2 * config.dim
    non_embedding = config.n_layers * (attention + mlp + norms) + config.dim
    embedding = vocab_size * config.dim * (1 if config.tie_embeddings else 2)
    return non_embedding + embedding, non_embedding


@torch.no_grad()
def generate(
    model: Llama,
    prompt_ids: Sequence[int],
    n_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
) -> list[int]:
    """prompt_ids and n_tokens sampled after them, in eval mode (the mode of each module is restored).

    temperature 0 takes the likeliest token; top_k keeps only so many candidates. The model sees the last
    config.seq_len tokens. The same seed draws the same tokens, whatever the global random state.
    UserError for an empty prompt, an id beyond the vocabulary, or a negative temperature.
    """
    if not prompt_ids:
        raise UserError("generate needs at least one prompt token, found none; give a non-empty prompt")
    beyond = [i for i in prompt_ids if not 0 <= i < model.vocab_size]
    if beyond:
        raise UserError(
            f"prompt token {beyond[0]} is outside the vocabulary of {model.vocab_size}; check the tokenizer"
        )
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise UserError(f"temperature must be >= 0 and top_k >= 1 or None, found {temperature} and {top_k}")
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt_ids)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for _ in range(n_tokens):
            window = torch.tensor([ids[-model.config.seq_len :]], device=model.embed.weight.device)
            ids.append(_pick(model(window)[0, -1], temperature, top_k, generator))
    finally:
        for module, training in modes.items():
            module.training = training
    return ids


def _pick(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """One token from logits (V,); on the CPU in float64, so that a draw does not depend on the device's sampler."""
    logits = logits.to("cpu", torch.float64)
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
