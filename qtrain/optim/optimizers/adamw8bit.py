from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from qtrain.errors import need
from qtrain.optim.base import OptimizerSettings

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

# What importing torchao logs wherever its compiled kernels are for other machines; its optimisers use none of them.
NOTES = {"torchao": "Failed to load ", "torch.utils._pytree": "<enum 'KernelPreference'> is an Enum subclass"}
TABLE_BYTES = 4 * 256  # of the values that the 8-bit codes stand for, which each state has for itself


class AdamW8bit(OptimizerSettings):
    """AdamW with both moments in 8 bits: torchao's state tensors and update, arXiv 2110.02861.

    beta1: how much of its mean gradient a step keeps.
    beta2: how much of its mean squared gradient a step keeps.
    eps: what is added to the root of the mean squared gradient.
    block_size: elements that share a scale. A matrix whose rows are whole blocks gets 8-bit moments, which are then the
        same on any number of ranks, since FSDP2 shards rows. All other parameters keep float32 moments.
    """

    name: Literal["adamw8bit"]
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    block_size: int = Field(256, gt=0)

    def in_8_bits(self, shape: Sequence[int]) -> bool:
        return len(shape) == 2 and shape[1] % self.block_size == 0

    def state_bytes(self, shape: Sequence[int]) -> int:
        elements = math.prod(shape)
        if not self.in_8_bits(shape):
            return 8 * elements
        return 2 * (elements + 4 * elements // self.block_size + TABLE_BYTES)

    def build(self, decay: Mapping[str, nn.Parameter], no_decay: Mapping[str, nn.Parameter]) -> Optimizer:
        """Group 0 has weight decay, group 1 has none. UserError without torchao."""
        need("torchao", "optimizer=adamw8bit")
        with ExitStack() as quiet:
            for name, start in NOTES.items():
                logger, spare = logging.getLogger(name), lambda record, start=start: start not in record.getMessage()
                logger.addFilter(spare)
                quiet.callback(logger.removeFilter, spare)
            from qtrain.optim.blockwise import BlockwiseAdamW

        groups = [
            {"params": list(decay.values()), "weight_decay": self.weight_decay},
            {"params": list(no_decay.values()), "weight_decay": 0.0},
        ]
        return BlockwiseAdamW(self.in_8_bits, groups, self.lr, (self.beta1, self.beta2), self.eps, self.block_size)
