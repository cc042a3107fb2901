from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from qtrain.models.base import Transformer

if TYPE_CHECKING:
    from torch import Tensor, nn


class Llama(Transformer):
    """RMSNorm, rotary positions, SwiGLU, grouped-query attention. With other settings it is Mistral, Qwen2 or Qwen3;
    `qtrain.models.hf` reads and writes their Hugging Face checkpoints. The Quartet and QuEST code fuses q, k, v (and
    gate, up) into one linear; here they are separate. Parameter counts are the same, and so are the numerics of a
    recipe whose weight scales belong to rows or to blocks within rows.

    family: llama, whose other settings make it Mistral, Qwen2 or Qwen3.
    """

    to_residual: ClassVar[tuple[str, ...]] = ("attention.o", "mlp.down")
    family: Literal["llama"] = "llama"

    def block(self) -> nn.Module:
        from qtrain.models.layers import MLP, Attention, Composed

        return Composed(
            pre_norm, attention_norm=self.norm(), attention=Attention(self), mlp_norm=self.norm(), mlp=MLP(self)
        )

    def norm(self) -> nn.Module:
        from torch import nn

        return nn.RMSNorm(self.dim, eps=self.norm_eps)

    def tables(self) -> dict[str, Tensor]:
        from qtrain.models.layers import rope_tables

        cos, sin = rope_tables(self.seq_len, self.head_width, self.rope_theta, self.rope_scaling)
        return {"cos": cos, "sin": sin}


def pre_norm(block: Any, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    x = x + block.attention(block.attention_norm(x), cos, sin, cu_seqlens)
    return x + block.mlp(block.mlp_norm(x))
