"""What every family of models has. Importing it, or a family, imports no torch."""

# B batch, T tokens, D model dim, H query heads, G key/value heads, d head dim, F feed-forward dim

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from qtrain.config.settings import Member, Strict

if TYPE_CHECKING:
    from torch import Tensor, nn


class ModelSettings(Member):
    """Settings of a decoder (`qtrain.models.decoder`): an embedding, n_layers blocks that are alike, a norm, lm_head.

    name: what tables and figures call the size.
    dim: elements of a token's state between the blocks.
    n_layers: number of blocks.
    seq_len: tokens in a sequence.
    tie_embeddings: let lm_head have the embedding's weights.
    vocab_size: rows of the embedding; None is as many as the tokenizer has tokens.
    nominal_parameters: the paper's name for the size (30M -> 30e6): a token budget per parameter counts it where it is
        given, else the non-embedding parameters.
    init_std: standard deviation of the normal distribution that weights start from.
    to_residual: names of the linear layers of a block that write to the residual stream; theirs start from a smaller
        one, init_std / sqrt(2 n_layers).
    init_from: a Hugging Face checkpoint, a folder or a name on the hub, whose settings hold where no others are given,
        and whose weights the model starts from.
    init_hash: hash of that checkpoint's settings and weights; found out when it is read, not to be set.
    """

    CHOSEN_BY: ClassVar[str] = "family"
    to_residual: ClassVar[tuple[str, ...]] = ()
    name: str
    dim: int = Field(gt=0, le=2**20)
    n_layers: int = Field(gt=0, le=1_000)
    seq_len: int = Field(gt=1, le=2**30)
    tie_embeddings: bool = False
    vocab_size: int | None = Field(None, gt=0, le=2**31)
    init_std: float = Field(0.02, gt=0)
    nominal_parameters: int | None = Field(None, gt=0)
    init_from: str | None = None
    init_hash: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_checkpoint(cls, tree: Any) -> Any:
        """Settings that were read once have the hash, and need the checkpoint no more."""
        if isinstance(tree, Mapping) and tree.get("init_from") is not None and tree.get("init_hash") is None:
            from qtrain.models.hf_config import settings_of

            asked = tree.get("seq_len")
            return settings_of(str(tree["init_from"]), asked if isinstance(asked, int) else None) | {
                key: value for key, value in tree.items() if value is not None
            }
        return tree

    def block(self) -> nn.Module:
        """A new block: x (B, T, D), the first T rows of each of `tables`, and cu_seqlens (N + 1,) int32 or None ->
        (B, T, D). Where cu_seqlens is given, no token may see one of another document."""
        raise NotImplementedError

    def norm(self) -> nn.Module:
        """A new norm before lm_head: x (B, T, D) -> (B, T, D)."""
        raise NotImplementedError

    def tables(self) -> dict[str, Tensor]:
        """What all blocks read beside x, by name: one row for each of seq_len positions."""
        return {}

    def shape(self) -> str:
        """The sizes in words, for the plan of a run."""
        return f"{self.n_layers} layers, dim {self.dim}, context {self.seq_len}"

    def attention_width(self) -> int:
        """Elements of all query heads of a block together, which its attention multiplies with keys and weights."""
        raise NotImplementedError


class RopeScaling(Strict):
    """Llama 3.1's change of the rotary frequencies (its release, and transformers' rope_type llama3). Wavelengths above
    original_seq_len / low_freq_factor grow by `factor`, those below original_seq_len / high_freq_factor stay, and
    between the two the change is linear in original_seq_len over the wavelength.

    factor: by how much the longest wavelengths grow.
    low_freq_factor: wavelengths above original_seq_len over it grow by `factor`.
    high_freq_factor: wavelengths below original_seq_len over it stay.
    original_seq_len: tokens in the sequences that the model was first trained on.
    """

    factor: float = Field(gt=0)
    low_freq_factor: float = Field(gt=0)
    high_freq_factor: float = Field(gt=0)
    original_seq_len: int = Field(gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> RopeScaling:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"model.rope_scaling: high_freq_factor={self.high_freq_factor:g} must exceed "
                f"low_freq_factor={self.low_freq_factor:g}"
            )
        return self


class Transformer(ModelSettings):
    """Settings of blocks of grouped-query attention with rotary positions, and a gated feed-forward network.

    n_heads: number of heads of queries.
    n_kv_heads: number of heads of keys and values, which groups of the n_heads queries share; None is one for each.
    ffn_dim: elements inside the feed-forward network.
    rope_theta: the base of the rotary wavelengths.
    norm_eps: what the norms add to a mean square.
    head_dim: elements of a head; None is dim / n_heads.
    qkv_bias: whether the linear layers of queries, keys and values have a bias (Qwen2; Llama's attention_bias).
    o_bias: whether the linear layer of the attention's output has a bias (Llama's attention_bias).
    mlp_bias: whether the linear layers of the feed-forward network have a bias.
    qk_norm: an RMSNorm of each head's queries and keys before they are rotated (Qwen3).
    rope_scaling: a change of the rotary wavelengths for longer sequences (Llama 3.1); None is none.
    """

    n_heads: int = Field(gt=0)
    n_kv_heads: int | None = Field(None, gt=0)
    ffn_dim: int = Field(gt=0, le=2**24)
    rope_theta: float = Field(10000.0, gt=0)
    norm_eps: float = Field(1e-5, gt=0)
    head_dim: int | None = Field(None, gt=0, le=2**16)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rope_scaling: RopeScaling | None = None

    @model_validator(mode="after")
    def _divides(self) -> Transformer:
        if self.head_dim is None and self.dim % self.n_heads:
            raise ValueError(
                f"model.dim={self.dim} must split into n_heads={self.n_heads} heads, or set model.head_dim"
            )
        if self.head_width % 2:
            raise ValueError(
                f"model.dim={self.dim} in n_heads={self.n_heads} heads gives heads of {self.head_width} elements; RoPE "
                "pairs elements: heads must be of even size"
                if self.head_dim is None
                else f"model.head_dim={self.head_dim} must be even: RoPE pairs elements"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(f"model.n_heads={self.n_heads} must be a multiple of n_kv_heads={self.kv_heads}")
        return self

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_width(self) -> int:
        """Elements of a head."""
        return self.head_dim or self.dim // self.n_heads

    def shape(self) -> str:
        heads = f"{self.n_heads} heads" + (f" on {self.kv_heads}" if self.kv_heads != self.n_heads else "")
        return f"{self.n_layers} layers, dim {self.dim}, {heads}, ffn {self.ffn_dim}, context {self.seq_len}"

    def attention_width(self) -> int:
        return self.n_heads * self.head_width
