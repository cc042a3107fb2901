"""Learned scales (LSQ, arXiv 1902.08153): what they start from."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from qtrain.quant.linear import QuantLinear, quant_linears
from qtrain.quant.quantizer import Quantizer


@torch.no_grad()
def calibrate(model: nn.Module, *inputs: Any, **named: Any) -> None:
    """Set every learned scale in model to LSQ's start, 2 E|x| / sqrt(q_max), by a forward of model(*inputs, **named).

    A layer's input is what the layers before it give with their own scales set. Where torch.distributed is initialised,
    every rank must call this; E|x| of the inputs is then the mean over all ranks. A model without learned scales is
    left alone. Call it in the autocast context that the training will have, once, before the first training step.
    """
    layers = [
        layer for layer in quant_linears(model) if layer.input_scale is not None or layer.weight_scale is not None
    ]
    found: dict[QuantLinear, dict[str, Tensor]] = {}

    def start(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, QuantLinear)
        values = {"input_scale": arguments[0], "weight_scale": layer.weight}
        sides = {"input_scale": layer.numerics.fprop.left, "weight_scale": layer.numerics.fprop.right}
        learned = {name: _start(values[name], sides[name]) for name in values if getattr(layer, name) is not None}
        if "input_scale" in learned and distributed.is_initialized():
            distributed.all_reduce(learned["input_scale"])
            learned["input_scale"] /= distributed.get_world_size()
        for name, value in learned.items():
            getattr(layer, name).copy_(
                value
            )  # of a shard that was gathered for this forward, which it then loses again
        found[layer], layer.calibrated = learned, True

    hooks = [layer.register_forward_pre_hook(start) for layer in layers]
    try:
        if layers:
            model(*inputs, **named)
    finally:
        for hook in hooks:
            hook.remove()
    for layer, learned in found.items():
        for name, value in learned.items():
            _write(getattr(layer, name), value)


def _start(x: Tensor, quantizer: Quantizer) -> Tensor:
    """float32, of `Quantizer.learned_shape`: of each block the start of its own elements. x: (..., K) inputs, or a
    weight (N, K)."""
    plan = quantizer.plan
    assert plan is not None
    size = x.abs().float()
    mean = size.mean().view(1) if plan.whole else size.view(*quantizer.learned_shape(*x.shape), -1).mean(-1)
    return 2.0 * mean / max(math.floor(plan.element.max), 1) ** 0.5


def _write(scale: Tensor, value: Tensor) -> None:
    if isinstance(scale, DTensor):
        value = distribute_tensor(value, scale.device_mesh, scale.placements)
    scale.copy_(value)
