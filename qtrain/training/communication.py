"""What the ranks of a run send each other in an optimiser step.

Counted are weights and gradients. Left out are single numbers: norms, losses, decisions, the largest magnitude of a
weight that has one scale, and what is sent once: the first batch, and DDP's weights at the start.

A ring sends (n - 1) / n of a tensor from each of n ranks to gather it, as much to reduce and scatter it, and twice as
much to all-reduce it. That is the least that any algorithm sends.
A backend may send more: gloo reduces and scatters by an all-reduce.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from qtrain.config import Config
from qtrain.plan import RunPlan
from qtrain.quant import QuantLinear, gathered_bytes
from qtrain.training.build import build_model
from qtrain.training.parallel import blocks_of
from qtrain.units import describe_bytes


@dataclass(frozen=True)
class Collective:
    """times: how often in a step; payload: bytes of the whole tensors each time; ranks: among how many; rounds: 2 of an
    all-reduce, else 1."""

    kind: str
    times: int
    payload: int
    ranks: int
    rounds: int = 1

    @property
    def sent(self) -> int:
        """Bytes that a rank sends in a step."""
        return self.times * self.rounds * self.payload * (self.ranks - 1) // self.ranks

    def __str__(self) -> str:
        factors = [str(self.times)] * (self.times > 1) + [describe_bytes(self.payload)]
        factors += ["2"] * (self.rounds > 1) + [f"{self.ranks - 1}/{self.ranks}"]
        return f"{self.kind}: {' x '.join(factors)} = {describe_bytes(self.sent)}"


@dataclass(frozen=True)
class Communication:
    """Of one step."""

    collectives: tuple[Collective, ...]

    @property
    def sent(self) -> int:
        """Bytes that a rank sends in a step."""
        return sum(each.sent for each in self.collectives)

    def describe(self) -> str:
        if not self.collectives:
            return "none: one device"
        return "\n".join([f"{describe_bytes(self.sent)} sent by each rank in a step", *map(str, self.collectives)])


def plan_communication(config: Config, plan: RunPlan) -> Communication:
    """By the strategy of config. Activation checkpointing sends nothing more: a block computes again in its backward,
    for which FSDP2 gathers its weights anyway."""
    trainer = config.trainer
    ranks, shards = trainer.world_size, trainer.shards
    if ranks == 1:
        return Communication(())
    with torch.device("meta"):
        model = build_model(config, plan.vocab_size)
    if trainer.strategy != "fsdp2":  # DDP reduces in the last micro-batch alone
        return Communication((Collective("gradients, all-reduce", 1, _gathered(model, 1, False), ranks, rounds=2),))
    quantized = trainer.all_gather == "quantized"
    blocks = sum(_gathered(block, shards, quantized) for block in blocks_of(model))
    everything = _gathered(model, shards, quantized)
    found = [
        # The root's own weights (embed, norm, lm_head) stay gathered from its forward to its backward.
        Collective("weights, all-gather for the forward", plan.micro_batches, everything, shards),
        Collective("weights of blocks, all-gather for the backward", plan.micro_batches, blocks, shards),
        # In the last micro-batch alone. Until then, each rank adds up whole gradients of its own.
        Collective("gradients, reduce-scatter", 1, _gathered(model, shards, quantized=False), shards),
    ]
    if trainer.sharding_groups > 1:
        shard = _gathered(model, shards, quantized=False) // shards
        found.append(Collective("gradients between groups, all-reduce", 1, shard, trainer.sharding_groups, rounds=2))
    return Communication(tuple(found))


def _gathered(module: nn.Module, shards: int, quantized: bool) -> int:
    """Bytes of the parameters of a module as they travel: in float32, or of quantised layers as codes."""
    as_codes = {
        each.weight: gathered_bytes(each, shards)
        for each in module.modules()
        if quantized and isinstance(each, QuantLinear)
    }
    return sum(as_codes.get(each) or 4 * _padded(each.shape, shards) for each in module.parameters())


def _padded(shape: torch.Size, shards: int) -> int:
    """Elements of a parameter whose rows FSDP2 fills up with zeros, so that each shard has as many."""
    return math.ceil(shape[0] / shards) * shards * math.prod(shape[1:])
