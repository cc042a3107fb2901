"""Activation checkpointing: what each block keeps for its backward, and what it computes again.

none       everything that autograd wants.
selective  the block's input, the results of its matrix products and of attention, and the quantised operands that the
           products leave; norms, rotary positions and the MLP's elementwise part are computed again.
full       the block's input alone.

Noise is a function of its position, so what is computed again has the same bits: gradients are equal to the bit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.attention.varlen  # defines its operator
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from qtrain.config.settings import Checkpointing
from qtrain.quant import functional
from qtrain_kernels.attention import DOCUMENT_ATTENTION

aten = torch.ops.aten
PRODUCTS = {
    functional.fprop,
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    DOCUMENT_ATTENTION,
    torch.ops.torch_attn._varlen_attn.default,
}


def checkpoint_activations(blocks: list[nn.Module], kept: Checkpointing) -> None:
    """Wrap the forward of each block, in place."""
    if kept == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if kept == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, **options)  # pyright: ignore[reportAttributeAccessIssue]


def _policy(_context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE
