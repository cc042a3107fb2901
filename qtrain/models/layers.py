"""Parts of blocks, on plain nn.Linear. They know nothing of precision.

Rotary positions pair element i of a head with element i + d/2, as transformers does.
"""

# B batch, T tokens, D model dim, H query heads, G key/value heads, d head dim, F feed-forward dim

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from qtrain.models.base import RopeScaling, Transformer
from qtrain_kernels.precision import Linear, causal_attention


class Composed(nn.Module):
    """Named parts and the function that uses them: forward(x, ...) is function(self, x, ...), where each part is an
    attribute of self."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self._function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *inputs: Tensor | None) -> Tensor:
        return self._function(self, *inputs)


class Codec(Protocol):
    """How keys and values are kept. encode: rows (M, d) -> tensors of M rows each; decode: the rows again, in dtype."""

    def encode(self, rows: Tensor) -> list[Tensor]: ...
    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor: ...


class KVCache:
    """The keys and values of the tokens of one sequence that a layer has seen. length: how many there are.

    codec: keeps each token's keys and values of a head as a row; None keeps them in the dtype that they come in."""

    def __init__(self, heads: int, n_tokens: int, head_dim: int, codec: Codec | None = None) -> None:
        self._shape, self._codec = (heads, n_tokens, head_dim), codec
        self._kept: list[Tensor] = []
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep k, v (1, G, T, d) of the next T tokens; those of all tokens so far, (1, G, length, d)."""
        (heads, most, width), start = self._shape, self.length
        self.length += k.shape[2]
        both = torch.cat([k, v])  # (2, G, T, d)
        parts = [both] if self._codec is None else self._codec.encode(both.reshape(-1, width))
        parts = [part.view(2, heads, k.shape[2], -1) for part in parts]
        if not self._kept:
            self._kept = [part.new_empty(2, heads, most, part.shape[-1]) for part in parts]
        for kept, part in zip(self._kept, parts, strict=True):
            kept[:, :, start : self.length] = part
        found = [kept[:, :, : self.length] for kept in self._kept]
        if self._codec is None:
            return found[0][:1], found[0][1:]
        rows = self._codec.decode([part.flatten(0, 2) for part in found], k.dtype)
        keys, values = rows.view(2, 1, heads, self.length, width)
        return keys, values

    def nbytes(self) -> int:
        """Bytes of the tokens so far."""
        return sum(kept[:, :, : self.length].numel() * kept.element_size() for kept in self._kept)


class Attention(nn.Module):
    """Causal self-attention: n_heads queries share n_kv_heads keys and values. x (B, T, D) -> (B, T, D). With
    cu_seqlens, within each document alone: see `qtrain.models.decoder`. caches: where there are some, one for each row
    of x, a row is what follows the tokens that its cache holds: the first of a sequence, then one at a time."""

    def __init__(self, config: Transformer) -> None:
        super().__init__()
        width, kv_width = config.attention_width(), config.kv_heads * config.head_width
        self.head_dim, self.kv_heads = config.head_width, config.kv_heads
        self.caches: Sequence[KVCache] = ()
        self.q = Linear(config.dim, width, bias=config.qkv_bias)
        self.k = Linear(config.dim, kv_width, bias=config.qkv_bias)
        self.v = Linear(config.dim, kv_width, bias=config.qkv_bias)
        self.o = Linear(width, config.dim, bias=config.o_bias)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity() for _ in "qk"
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        q, k, v = (rearrange(y, "B T (H d) -> B H T d", d=self.head_dim) for y in (self.q(x), self.k(x), self.v(x)))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        if self.caches:
            rows = zip(self.caches, q.split(1), k.split(1), v.split(1), strict=True)
            y = torch.cat([causal_attention(q, *cache.append(k, v)) for cache, q, k, v in rows])
        else:
            y = causal_attention(q, k, v, cu_seqlens)
        return self.o(rearrange(y, "B H T d -> B T (H d)"))


class MLP(nn.Module):
    """SwiGLU. x (B, T, D) -> (B, T, D)"""

    def __init__(self, config: Transformer) -> None:
        super().__init__()
        self.gate = Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
        self.up = Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
        self.down = Linear(config.ffn_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def rope_tables(seq_len: int, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin (T, d/2) float32 of the angles position * theta^(-2i/d). Source: RoFormer, arXiv 2104.09864."""
    inv_freq = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is not None:
        inv_freq = _scaled(inv_freq, scaling)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32), inv_freq)
    return angles.cos(), angles.sin()


def _scaled(inv_freq: Tensor, scaling: RopeScaling) -> Tensor:
    """1 / wavelength times 2 pi, as `RopeScaling` changes it."""
    turns = scaling.original_seq_len * inv_freq / (2 * math.pi)  # of a pair, over the original length
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return kept * inv_freq + (1 - kept) * inv_freq / scaling.factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pair (x[i], x[i + d/2]) of every head by its position's angle i, in float32; the dtype of x comes back.

    x: (B, H, T, d); cos, sin: (T, d/2) float32, or (B, 1, T, d/2).
    """
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
