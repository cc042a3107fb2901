"""Which parameters decay, as the code released with QuEST and Quartet has it."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from qtrain.optim.base import OptimizerSettings

NO_DECAY = ("embed", "lm_head")
LEARNED = ("input_scale", "weight_scale")  # LSQ's steps, which QuEST's search found best with the weights' decay


def parameter_groups(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """(with weight decay, without), each {name: parameter} sorted by name; every trainable parameter in exactly one.

    Matrices and the learned steps of quantisers decay; embed and lm_head do not, nor do vectors (norms, biases). A tied
    weight counts once, under the name that `named_parameters` gives it.
    """
    decay: dict[str, nn.Parameter] = {}
    no_decay: dict[str, nn.Parameter] = {}
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            small = parameter.ndim < 2 and not name.endswith(LEARNED)
            exempt = small or not set(NO_DECAY).isdisjoint(name.split("."))
            (no_decay if exempt else decay)[name] = parameter
    return decay, no_decay


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> Optimizer:
    """Of all trainable parameters. A fused optimiser makes Lightning's own clipping refuse mixed precision, so clip
    with torch's clip_grad_norm_."""
    return settings.build(*parameter_groups(model))
