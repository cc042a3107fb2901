"""EfQAT (arXiv 2411.11038): which rows of each quantised weight train, chosen anew now and then."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import Optimizer

from qtrain.quant.linear import quant_linears


def reserve(model: nn.Module, fraction: float) -> None:
    """Gives each quantised layer the place for the numbers of its rows, which a checkpoint keeps: fraction of the rows,
    rounded up."""
    for layer in quant_linears(model):
        count = math.ceil(fraction * layer.out_features)
        layer.rows = torch.arange(count, device=layer.weight.device)


class Rows:
    """Every `every` optimiser steps, each quantised layer's rows of the largest mean magnitude become those that train.

    The optimiser's state of all others becomes zero, so that without a gradient and weight decay AdamW leaves them as
    they are.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, every: int) -> None:
        self.layers, self.optimizer, self.every = quant_linears(model), optimizer, every

    @torch.no_grad()
    def refresh(self, step: int) -> None:
        """Before optimiser step `step` (from 0)."""
        if step % self.every:
            return
        for layer in self.layers:
            assert layer.rows is not None
            importance = layer.weight.float().abs().mean(1)
            layer.rows.copy_(importance.topk(len(layer.rows)).indices.sort().values)
            frozen = torch.ones_like(importance)
            frozen[layer.rows] = 0
            for name, state in self.optimizer.state.get(layer.weight, {}).items():
                if name in ("exp_avg", "exp_avg_sq"):
                    state[frozen.bool()] = 0
