"""One training step of a causal language model. The loop (`qtrain.training.loop`) and a stock lightning.Trainer both
take it from here."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lightning
import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from qtrain.config import Config
from qtrain.data.counted import counts
from qtrain.optim.groups import build_optimizer
from qtrain.plan import RunPlan, computes_in_high_precision
from qtrain.quant import calibrate, keep_weights, set_high_precision, set_step
from qtrain.quant.adapter import set_adapter_step
from qtrain.training.losses import distillation_loss, documents_in, inputs_and_targets, next_token_loss
from qtrain.training.rows import Rows


class CausalLM(lightning.LightningModule):
    """Trains `model` for plan.steps optimiser steps of plan.micro_batches forwards each.

    step_loss and grad_norm hold the last optimiser step's mean loss on this device (nats per token) and gradient norm
    before clipping, as 0-dim tensors there: reading them waits for the device. Both are per token that counts.

    counts_all: whether a loss counts every token. Where it does not (`qtrain.data.counted`), a step's gradient is
    divided by how many of its tokens count, over all micro-batches and ranks.
    teacher: what tune.teacher distils from, on the device that the model will be on.
    end_of_document: the tokenizer's token that ends a document. data.document_mask=true needs it (ValueError).

    Under lightning.Trainer: Trainer(accumulate_grad_batches=plan.micro_batches, max_steps=plan.steps,
    use_distributed_sampler=False), over batches in the order of `qtrain.data.batches.TokenBatches`.
    """

    def __init__(
        self,
        config: Config,
        plan: RunPlan,
        model: nn.Module,
        end_of_document: int | None = None,
        counts_all: bool = True,
        teacher: nn.Module | None = None,
    ):
        super().__init__()
        self.model = model
        self.config = config
        self.plan = plan
        if config.data.document_mask and end_of_document is None:
            raise ValueError("data.document_mask=true needs the token that ends a document, found None")
        masked = end_of_document if config.data.document_mask else None
        self.loss_options = {"chunked": config.trainer.chunked_loss, "end_of_document": masked}
        self.__dict__["teacher"] = teacher  # no submodule, which would be saved and trained
        self.rows: Rows | None = None  # what chooses the rows that train, where not all do
        self.counts_all = counts_all
        self.counted = torch.zeros(())  # share of the step's tokens that count, on this rank
        self.step_loss = torch.zeros(())
        self.grad_norm = torch.zeros(())
        self._kept = ExitStack()  # closed before the weights change

    # ---------------------------------------------------------------------------------------- what both loops share

    def begin_step(self, step: int, batch: Tensor) -> None:
        """Before the first forward of optimiser step `step` (from 0). batch: the first micro-batch of this rank. Call
        it in the autocast context of the training, on every rank."""
        if self.rows is not None:
            self.rows.refresh(step)
        set_high_precision(self.model, computes_in_high_precision(self.config, self.plan, step))
        if step == 0:
            tokens, _ = inputs_and_targets(of_rank_zero(batch))
            calibrate(self.model, tokens, **documents_in(tokens, self.loss_options["end_of_document"]))

    def weights_kept(self) -> ExitStack:
        """A context for all micro-batches of one step: what they share is quantised once."""
        stack = ExitStack()
        if self.plan.micro_batches > 1:
            stack.enter_context(keep_weights(self.model))
        return stack

    def micro_batch_loss(
        self, model: nn.Module, batch: Tensor, step: int, micro_batch: int, rank: int, ranks: int
    ) -> Tensor:
        """The loss of this rank's micro-batch `micro_batch` (from 0). model: self.model, or what wraps it."""
        # Numbered over all ranks, as the data is: the same samples draw the same bits on any number of them.
        set_step(self.model, step, micro_batch * ranks + rank)
        set_adapter_step(self.model, step, micro_batch * ranks + rank)
        loss = self.loss(model, batch)
        share = loss.detach() / self.plan.micro_batches
        self.step_loss = share if micro_batch == 0 else self.step_loss + share
        if not self.counts_all:
            counted = counts(batch[:, 1:]).float().mean() / self.plan.micro_batches
            self.counted = counted if micro_batch == 0 else self.counted + counted
        return loss

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """What this training minimises, () float32, of batch (B, T+1)."""
        teacher = self.__dict__["teacher"]
        settings = self.config.tune and self.config.tune.teacher
        if teacher is None or settings is None:
            return next_token_loss(model, batch, **self.loss_options)
        return distillation_loss(
            model, teacher, batch, temperature=settings.temperature, weight=settings.weight,
            end_of_document=self.loss_options["end_of_document"],
        )  # fmt: skip

    @torch.no_grad()
    def clip_norm(self) -> None:
        """Makes the step's gradients those of the mean over the tokens that count, and clips them."""
        if not self.counts_all:
            self._divide_by_counted()
        limit = self.config.trainer.grad_clip
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), float("inf") if limit is None else limit)
        self.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _divide_by_counted(self) -> None:
        counted = mean_over_ranks(self.counted)
        factor = torch.where(counted > 0, 1 / counted, 0.0)  # no token counts: no gradient
        self.step_loss = self.step_loss * factor
        for parameter in self.model.parameters():
            if (grad := parameter.grad) is not None:
                local = grad.to_local() if isinstance(grad, DTensor) else grad
                local.mul_(factor)

    def lr_factor(self, step: int) -> float:
        """The learning rate of optimiser step `step` (from 0), as a factor of optimizer.lr."""
        return self.config.scheduler.factor(step, self.plan.steps)

    # ------------------------------------------------------------------------------------------- for lightning.Trainer

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        micro_batch = batch_idx % self.plan.micro_batches
        if micro_batch == 0:
            self.begin_step(self.trainer.global_step, batch)
            self._kept = self.weights_kept()
        step, ranks = self.trainer.global_step, self.trainer.world_size
        return self.micro_batch_loss(self.model, batch, step, micro_batch, self.global_rank, ranks)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self._kept.close()

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.clip_norm()

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.model, self.config.optimizer)
        schedule = LambdaLR(optimizer, lambda step: self.lr_factor(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def mean_over_ranks(value: Tensor) -> Tensor:
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        value = value.clone()
        distributed.all_reduce(value)
        value /= distributed.get_world_size()
    return value


def of_rank_zero(batch: Tensor) -> Tensor:
    """Rank 0's batch, on every rank: what is calibrated on it is the same for any number of ranks."""
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        batch = batch.clone()
        distributed.broadcast(batch, 0)
    return batch
