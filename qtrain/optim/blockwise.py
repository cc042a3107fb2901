"""AdamW on torchao's 8-bit state tensors, in eager mode and by rows.

torchao compiles its step, for which a CPU needs a C++ compiler. Uncompiled, the step of a whole matrix has temporaries
of some 40 bytes an element. Taken by rows they are small, and since each block of a state lies within a row, the result
is the same, bit for bit, for any number of rows at a time and on any ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchao.optim import AdamW8bit
from torchao.optim.adam import single_param_adam

from qtrain.errors import UserError

ELEMENTS = 2**18  # at a time


class BlockwiseAdamW(AdamW8bit):
    """in_8_bits: whether the moments of a parameter of a shape, that of all its shards, are in 8 bits."""

    def __init__(
        self,
        in_8_bits: Callable[[Sequence[int]], bool],
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        block_size: int,
    ) -> None:
        super().__init__(groups, lr, betas, eps, block_size=block_size)
        self.in_8_bits = in_8_bits

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        local = p.to_local() if isinstance(p, DTensor) else p
        if not self.in_8_bits(p.shape):
            return torch.zeros_like(p)
        if not isinstance(p, DTensor):
            return self._subclass_zeros(local, signed, self.block_size)
        shards = p.device_mesh.size(p.device_mesh.ndim - 1)
        if (shards - 1) * math.ceil(p.shape[0] / shards) >= p.shape[0]:
            raise UserError(
                f"optimizer=adamw8bit: a matrix of {p.shape[0]} rows leaves some of {shards} shards without any; use "
                "optimizer=adamw, or more trainer.sharding_groups"
            )
        state = self._subclass_zeros(local, signed, self.block_size)
        return DTensor.from_local(state, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None
        for group in self.param_groups:
            lr = torch.as_tensor(group["lr"], dtype=torch.float32)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, lr, group)

    def _update(self, parameter: Tensor, lr: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = self._new_buffer(parameter, True)
            state["exp_avg_sq"] = self._new_buffer(parameter, False)
        state["step"] += 1
        tensors = parameter.detach(), parameter.grad, state["exp_avg"], state["exp_avg_sq"]
        weight, grad, first, second = (_local(x) for x in tensors)
        beta1, beta2 = group["betas"]
        rows = max(1, ELEMENTS // max(1, weight[:1].numel()))
        for start in range(0, len(weight), rows):
            end = min(start + rows, len(weight))
            single_param_adam(
                weight[start:end], grad[start:end], state["step"], first[start:end], second[start:end], None, lr,
                beta1, beta2, group["weight_decay"], group["eps"], IS_ADAMW=True, BF16_STOCHASTIC_ROUND=False,
            )  # fmt: skip


def _local(x: Tensor | None) -> Tensor:
    assert x is not None
    return x._local_tensor if isinstance(x, DTensor) else x
