"""The training step, optimiser and schedule of a causal language model, as a LightningModule."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from qtrain.config import Config
from qtrain.optim.groups import build_optimizer
from qtrain.plan import RunPlan
from qtrain.quant import calibrate, keep_weights, set_high_precision, set_step

# B sequences, T tokens, V vocabulary


def next_token_loss(model: nn.Module, tokens: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of each next token. tokens: (B, T+1) int64; the loss is float32 whatever the logits are."""
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction=reduction)


def computes_in_high_precision(config: Config, plan: RunPlan, step: int) -> bool:
    """Whether optimiser step `step` (from 0) lies in the last part of the run, which the recipe gives to the compute
    dtype."""
    after = config.recipe.high_precision_after
    return after is not None and step >= after * plan.steps - 1e-6  # 0.28 * 25 is 7.000000000000001


class CausalLM(lightning.LightningModule):
    """Trains `model` for plan.steps optimiser steps of plan.micro_batches forwards each.

    step_loss and grad_norm hold the last optimiser step's mean loss on this device (nats per token) and gradient norm
    before clipping, as 0-dim tensors there: who wants them on the host pays for the wait.
    """

    def __init__(self, config: Config, plan: RunPlan, model: nn.Module):
        super().__init__()
        self.model = model
        self.config = config
        self.plan = plan
        self.step_loss = torch.zeros(())
        self.grad_norm = torch.zeros(())
        self._step = ExitStack()  # closed before the weights change

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        micro_batch = batch_idx % self.plan.micro_batches
        if micro_batch == 0:
            set_high_precision(self.model, computes_in_high_precision(self.config, self.plan, self.trainer.global_step))
            if self.trainer.global_step == 0:
                calibrate(self.model, batch[:, :-1])
            if self.plan.micro_batches > 1:
                self._step.enter_context(keep_weights(self.model))
        # numbered over all devices, as the data is: the same samples draw the same bits on any number of them
        set_step(self.model, self.trainer.global_step, micro_batch * self.trainer.world_size + self.global_rank)
        loss = next_token_loss(self.model, batch)
        share = loss.detach() / self.plan.micro_batches
        self.step_loss = share if micro_batch == 0 else self.step_loss + share
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self._step.close()

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        limit = self.config.trainer.grad_clip
        self.grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), float("inf") if limit is None else limit)

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.model, self.config.optimizer)
        schedule = LambdaLR(optimizer, lambda step: self.lr_factor(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_factor(self, step: int) -> float:
        """The learning rate of optimiser step `step` (from 0), as a factor of optimizer.lr."""
        return self.config.scheduler.factor(step, self.plan.steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["vocab_size"] = self.plan.vocab_size


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Tensor], device: torch.device, precision: str) -> tuple[float, int]:
    """(summed loss in nats, predicted tokens) over batches of (B, T+1) int64 tokens. The model's mode is restored."""
    training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    count = 0
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        for tokens in batches:
            total += next_token_loss(model, tokens.to(device), reduction="sum").double()
            count += tokens[:, 1:].numel()
    model.train(training)
    return total.item(), count
