"""The functions of reference.py through torch.compile: one graph per plan, for every number of blocks.

Each graph is traced once on sizes that coincide in nothing, with the sizes marked as unknown: torch.compile would
otherwise take equal sizes for one symbol, or a first shape for a constant, and compile again at the next layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from qtrain_kernels import reference
from qtrain_kernels.reference import Plan

# Traced at sizes of real work: inductor decides from them whether a loop is worth two threads.
TRACED_OUTER, TRACED_INNER, TRACED_ROW = 1031, 387, 523


@cache
def _graph(plan: Plan, dtype: torch.dtype | None, along_last: bool, device: str) -> Callable[..., tuple]:
    """The compiled `operand` (dtype given) or `encode` (None) of a plan; along_last: the operands' inner size is 1."""
    function = partial(reference.encode, plan=plan) if dtype is None else partial(_operand, plan=plan, dtype=dtype)
    compiled = torch.compile(function, fullgraph=True)
    block, inner = plan.block or TRACED_ROW, 1 if along_last else TRACED_INNER
    x = torch.ones(TRACED_OUTER, block, inner, device=device)
    scale = reference.tensor_scale(x, plan)
    for tensor in (x, scale):
        for dim in (0, 1, 2):
            if isinstance(tensor, Tensor) and tensor.ndim and tensor.shape[dim] not in (1, plan.block):
                torch._dynamo.mark_dynamic(tensor, dim)
    compiled(x, scale, torch.zeros(2, dtype=torch.int32, device=device))
    return compiled


def _operand(x: Tensor, scale: Tensor | float, key: Tensor | None, plan: Plan, dtype: torch.dtype) -> tuple:
    return reference.operand(x, scale, key, plan, dtype)


_NO_KEY: dict[torch.device, Tensor] = {}


def _run(x: Tensor, scale: Tensor | float, key: Tensor | None, plan: Plan, dtype: torch.dtype | None) -> tuple:
    graph = _graph(plan, dtype, x.shape[2] == 1, x.device.type)
    if key is None:
        key = _NO_KEY.setdefault(x.device, torch.zeros(2, dtype=torch.int32, device=x.device))
    return graph(x, scale, key)


def encode(x: Tensor, scale: Tensor | float, key: Tensor | None, plan: Plan) -> tuple:
    """Equals reference.encode bit for bit."""
    return _run(x, scale, key, plan, None)


def operand(x: Tensor, scale: Tensor | float, key: Tensor | None, plan: Plan, dtype: torch.dtype) -> tuple:
    """Equals reference.operand bit for bit."""
    return _run(x, scale, key, plan, dtype)
