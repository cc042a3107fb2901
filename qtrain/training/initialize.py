"""Initial weights without the whole model: each rank draws one parameter at a time and keeps its shard of it.

Construction draws from one generator, parameter after parameter, so a parameter's values depend on all draws before its
own. `DeferredWeights` notes the draws while a model is constructed without memory for its weights. `draw_shards` makes
them again after sharding, in the same order: the shards are those of a model that was constructed whole, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
DEFERRED = "deferred_weights"  # the attribute under which a model carries its DeferredWeights
META = torch.device("meta")
# What initialisation writes by. Each of these gives all elements of its tensor a value, whatever they were before.
WRITES = {aten.normal_.default, aten.uniform_.default, aten.zero_.default, aten.fill_.Scalar}


@dataclass(frozen=True)
class Write:
    """function(weight, *arguments, **options), in place. weight: on the meta device."""

    weight: Tensor
    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class DeferredWeights(TorchDispatchMode):
    """Within it, torch.empty gives tensors on the meta device; what would be written into them is noted in `writes`.
    All other tensors, tables of rotary positions and learned scales, are small and made as ever."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.writes: list[Write] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if function is aten.empty.memory_format:
            return function(*args, **{**options, "device": META})
        if options.get("device") == META:  # made beside a weight, on the weight's device
            options["device"] = torch.device("cpu")
        target = args[0] if args else None
        if isinstance(target, Tensor) and target.is_meta and function._schema.is_mutable:
            if function not in WRITES:
                raise NotImplementedError(f"initial weights by {function} cannot be made shard by shard; extend WRITES")
            self.writes.append(Write(target, function, args[1:], options))
            return target
        return function(*args, **options)


def draw_shards(model: nn.Module, deferred: DeferredWeights, names: dict[int, str], device: torch.device) -> None:
    """Give the sharded parameters of `model` memory on `device` and their initial values. names: {id of a parameter
    before sharding: its name}. The global random state is left as it was."""
    model._apply(lambda x: torch.empty_like(x, device=device) if x.is_meta else x)
    parameters = dict(model.named_parameters())
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(deferred.seed)
        for write in _needed(deferred.writes, names):
            whole = torch.empty(write.weight.shape, dtype=write.weight.dtype)
            write.function(whole, *write.arguments, **write.options)
            name = names.get(id(write.weight))  # None: a weight that construction has replaced, as where two are tied
            if name is not None:
                _keep_shard(parameters[name], whole)


def _needed(writes: list[Write], names: dict[int, str]) -> list[Write]:
    """All writes up to the last one into a parameter of the model: conversion makes linears that it fills in vain."""
    last = max((at for at, write in enumerate(writes) if id(write.weight) in names), default=-1)
    return writes[: last + 1]


def _keep_shard(parameter: Tensor, whole: Tensor) -> None:
    """FSDP2 cuts rows as torch.chunk does, so that the last ranks may have fewer or none."""
    assert isinstance(parameter, DTensor)
    for dim, placement in enumerate(parameter.placements):
        if placement.is_shard():
            mesh, shards = parameter.device_mesh, whole.chunk(parameter.device_mesh.size(dim))
            rank = mesh.get_local_rank(dim)
            whole = shards[rank] if rank < len(shards) else whole[:0]
    parameter._local_tensor.copy_(whole)
