"""Causal attention within the documents that sequences are packed of.

A document is a run of tokens of one sequence. All documents of a batch are described by `cu_seqlens`, the cumulative
lengths that torch.nn.attention.varlen and flash-attention take: document i is tokens cu_seqlens[i] to cu_seqlens[i + 1]
of the batch read row by row. Every row begins a document, so that none lies in two rows.

On CUDA the kernel is torch's varlen_attn (flash attention, bfloat16 or float16). torch has none for a CPU. There each
document is a call of the kernel that scaled_dot_product_attention uses: the result of a document has the bits that it
has alone.

A mask of (T, T) instead computes what causal attention leaves out, and no border saves anything.
`scripts/bench_training_loop.py --mask` times a training with documents against one without.
"""

# B batch, T tokens of a sequence, H heads, d head dim, N documents

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def document_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Causal attention of each document by itself. q (B, H, T, d); k, v the same, or fewer heads that divide H.
    cu_seqlens (N + 1,) int32. Returns (B, H, T, d). ValueError for float32 on CUDA, for which torch has no kernel."""
    batch, heads, length, _ = q.shape
    k, v = (x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    if q.device.type == "cpu":
        return _document_attention(q, k, v, cu_seqlens)[0]
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"attention within documents is computed in bfloat16 or float16 on {q.device.type}, found {q.dtype}"
        )
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    y = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, length, length, window_size=(-1, 0))
    assert isinstance(y, Tensor)
    return y.unflatten(0, (batch, length)).transpose(1, 2)


@torch.library.custom_op("qtrain_kernels::document_attention", mutates_args=(), device_types="cpu")
def _document_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The result (B, H, T, d) and the log-sum-exp of the scores (B, H, T), both laid out as (B, T, ...)."""
    y, log_sum = _results(q)
    for part in _documents(cu_seqlens, q.shape[2]):
        own = (x[part] for x in (q, k, v))
        y[part], log_sum[part] = aten._scaled_dot_product_flash_attention_for_cpu(*own, dropout_p=0.0, is_causal=True)
    return y, log_sum


@torch.library.custom_op("qtrain_kernels::document_attention_backward", mutates_args=(), device_types="cpu")
def _document_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, y: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = tuple(torch.empty_like(x) for x in (q, k, v))
    for part in _documents(cu_seqlens, q.shape[2]):
        own = (x[part] for x in (grad, q, k, v, y, log_sum))
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(*own, dropout_p=0.0, is_causal=True)
        for whole, of_document in zip(grads, found, strict=True):
            whole[part] = of_document
    return grads  # pyright: ignore[reportReturnType]


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, length, dim = q.shape
    scores = torch.float64 if q.dtype == torch.float64 else torch.float32
    y = torch.empty(batch, length, heads, dim, dtype=q.dtype, device=q.device)
    log_sum = torch.empty(batch, length, heads, dtype=scores, device=q.device)
    return y.transpose(1, 2), log_sum.transpose(1, 2)


def _documents(cu_seqlens: Tensor, length: int) -> Iterator[tuple[slice, slice, slice]]:
    """Where each document lies in tensors of (B, H, T, ...): its row, all heads, its tokens."""
    borders = cu_seqlens.tolist()
    for start, end in itertools.pairwise(borders):
        row, first = divmod(start, length)
        yield slice(row, row + 1), slice(None), slice(first, first + end - start)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    # The kernel reads rows of heads whose elements lie side by side, which those of an expanded gradient do not.
    return *_document_attention_backward(grad.contiguous(), *ctx.saved_tensors), None


_document_attention.register_fake(lambda q, k, v, cu_seqlens: _results(q))
_document_attention_backward.register_fake(
    lambda grad, q, k, v, cu_seqlens, y, log_sum: tuple(torch.empty_like(x) for x in (q, k, v))
)
_document_attention.register_autograd(_backward, setup_context=_save)
DOCUMENT_ATTENTION = torch.ops.qtrain_kernels.document_attention.default
