"""PV-Tuning (arXiv 2405.14852): integer codes that move after each step of the optimiser.

The paper tunes codes of learned codebooks. Here a code is an integer under a scale and a zero point: the virtual weight
is rounded, and no beam search is needed.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from qtrain.quant.scaled import ScaledLinear


def move_codes(model: nn.Module, optimizer: Optimizer, rate: float, beta2: float, largest_change: float) -> None:
    """Makes every later step of an AdamW also a V step of the codes of a model's layers (`ScaledLinear.move`).

    optimizer: has the layers' `moves` among its parameters, which become a group of their own without a mean of
    gradients. rate: the learning rate of the virtual weight over that of the optimiser, by which its schedule holds for
    both.
    """
    layers = [each for each in model.modules() if isinstance(each, ScaledLinear) and each.moves is not None]
    moves = {id(layer.moves): layer.moves for layer in layers}
    for group in optimizer.param_groups:
        group["params"] = [each for each in group["params"] if id(each) not in moves]
    optimizer.add_param_group({"params": list(moves.values()), "betas": (0.0, beta2), "weight_decay": 0.0})

    def move(*_: Any) -> None:
        for layer in layers:
            layer.move(rate, largest_change)

    optimizer.register_step_post_hook(move)
