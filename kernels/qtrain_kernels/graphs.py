"""The functions of reference.py through torch.compile: one graph per plan, for every number of blocks. On CUDA;
packing is triton's.

Each graph is traced once on sizes that coincide in nothing, with the sizes marked as unknown: torch.compile would
otherwise take equal sizes for one symbol, or a first shape for a constant, and compile again at the next layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import count
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config
from torch._subclasses.fake_tensor import unset_fake_temporarily

from qtrain_kernels import packing, reference
from qtrain_kernels.packing import join, split
from qtrain_kernels.reference import Packed, Plan, Rotation, rotate, tensor_scale, unrotate

__all__ = [
    "encode", "fake_quantize", "join", "operand", "pack", "rotate", "split", "tensor_scale", "unpack", "unrotate",
]  # fmt: skip

# Traced at sizes of real work: inductor decides from them if a loop is worth two threads. Rows in eights: sparsity.
TRACED_OUTER, TRACED_INNER, TRACED_ROW = 1031, 387, 528
_SERIAL = count()


@cache
def _graph(
    plan: Plan, dtype: torch.dtype | None, along_last: bool, device: str, with_blocks: bool
) -> Callable[..., tuple]:
    """The compiled `operand` (dtype given) or `encode` (None) of a plan; along_last: the operands' inner size is 1."""

    def graph(x: Tensor, scale: Tensor | float, key: Tensor) -> tuple:
        if dtype is None:
            return reference.encode(x, scale, key, plan)
        return reference.operand(x, scale, key, plan, dtype, None, with_blocks)

    # Dynamo keeps its graphs by code object (eight at most, their guards tried in turn) and remembers by its name which
    # arguments varied: each graph gets a code object and a name of its own.
    code = graph.__code__.replace(co_name=f"graph_{next(_SERIAL)}")
    own = FunctionType(code, globals(), closure=graph.__closure__)
    compiled = torch.compile(own, fullgraph=True, options=_eager_arithmetic(device))
    with torch.inference_mode(False), torch.no_grad():
        compiled(*_example(plan, along_last, device))
    return compiled


def _eager_arithmetic(device: str) -> dict[str, Any]:
    """Inductor's options for the arithmetic of eager: no fused multiply-add, division rounded as IEEE says."""
    if device == "cpu":
        return {"cpp.enable_floating_point_contract_flag": "off"}
    division = "eager_numerics.division_rounding" if hasattr(config, "eager_numerics") else "emulate_divison_rounding"
    return {"emulate_precision_casts": True, division: True}


def _example(plan: Plan, along_last: bool, device: str) -> tuple[Tensor, Tensor | float, Tensor]:
    """Arguments to trace with: every size but the block's, and a 1, marked as unknown."""
    outer = 1 if _one_outer(plan, along_last) else TRACED_OUTER
    x = torch.ones(outer, plan.span or TRACED_ROW, 1 if along_last else TRACED_INNER, device=device)
    scale = torch.ones((), device=device) if plan.rule == "learned" else reference.tensor_scale(x, plan)
    for tensor in (x, scale):
        if isinstance(tensor, Tensor) and tensor.ndim:
            for dim in range(3):
                if tensor.shape[dim] not in (1, plan.span):
                    torch._dynamo.mark_dynamic(tensor, dim)
    return x, scale, torch.zeros(2, dtype=torch.int32, device=device)


@cache
def _no_key(device: torch.device) -> Tensor:
    """A key for graphs that draw nothing."""
    with torch.inference_mode(False), unset_fake_temporarily():  # it is kept: whoever asks first must not mark it
        return torch.zeros(2, dtype=torch.int32, device=device)


def _one_outer(plan: Plan, along_last: bool) -> bool:
    """Column scales: the whole matrix is one block high."""
    return plan.span is None and not along_last


def _run(
    x: Tensor,
    scale: Tensor | float,
    key: Tensor | None,
    plan: Plan,
    dtype: torch.dtype | None,
    rotation: Rotation | None,
    with_blocks: bool = True,
) -> tuple:
    x = rotate(x, rotation).detach()  # the graph would guard what needs a gradient
    scale = scale.detach() if isinstance(scale, Tensor) else scale
    along_last = x.shape[2] == 1
    if x.shape[0] == 1 and not _one_outer(plan, along_last):  # a size of 1 would compile once more; the bits are equal
        if dtype is None:
            return reference.encode(x, scale, key, plan)
        return reference.operand(x, scale, key, plan, dtype, None, with_blocks)
    graph = _graph(plan, dtype, along_last, x.device.type, with_blocks)
    key = _no_key(x.device) if key is None else key
    with torch.no_grad():  # the graph's guards see the grad mode
        return graph(x.contiguous(), scale if isinstance(scale, Tensor) else 1.0, key)  # reads no constant scale


def encode(x: Tensor, scale: Tensor | float, key: Tensor | None, plan: Plan, rotation: Rotation | None = None) -> tuple:
    """Equals reference.encode bit for bit."""
    return _run(x, scale, key, plan, None, rotation)


def operand(
    x: Tensor,
    scale: Tensor | float,
    key: Tensor | None,
    plan: Plan,
    dtype: torch.dtype,
    rotation: Rotation | None = None,
    with_blocks: bool = True,
) -> tuple:
    """Equals reference.operand bit for bit."""
    return _run(x, scale, key, plan, dtype, rotation, with_blocks)


fake_quantize = reference.fake_quantize_by(operand, unrotate)


def pack(values: Tensor, blocks: Tensor | None, plan: Plan) -> Packed:
    """Equals reference.pack bit for bit."""
    return (packing if packing.takes(plan) else reference).pack(values, blocks, plan)


def unpack(packed: Packed, shape: torch.Size, plan: Plan, dtype: torch.dtype) -> Tensor:
    """Equals reference.unpack bit for bit."""
    return (packing if packing.takes(plan) else reference).unpack(packed, shape, plan, dtype)
