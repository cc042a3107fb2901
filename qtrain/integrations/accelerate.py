"""A converted model in a loop of Hugging Face's Accelerate: a counter keys the random bits of every micro-batch.

from qtrain.integrations.accelerate import Steps

qtrain.convert(model, recipe="quartet")
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
steps = Steps(accelerator, model)
for batch in loader:
    with steps.accumulate():  # in place of accelerator.accumulate(model)
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from qtrain.errors import UserError
from qtrain.quant import quant_linears, set_step


class Steps:
    """Counts optimiser steps and their micro-batches, and calls `qtrain.set_step` before each forward.

    accelerator: an accelerate.Accelerator. model: what its prepare gave. step: of the next micro-batch, from 0. With R
    processes, micro-batch m of process r has number m * R + r. accelerator.register_for_checkpointing(steps) saves the
    step and loads it again.
    UserError for a model that is not converted.
    """

    def __init__(self, accelerator: Any, model: nn.Module, step: int = 0) -> None:
        if not quant_linears(model):
            raise UserError(
                "Steps found no quantised layer in the model; call qtrain.convert before accelerator.prepare"
            )
        self.accelerator, self.model = accelerator, model
        self.step, self.micro_batch = step, 0

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """accelerator.accumulate(model) of one micro-batch, under its own random bits."""
        accelerator = self.accelerator
        with accelerator.accumulate(self.model):
            number = self.micro_batch * accelerator.num_processes + accelerator.process_index
            set_step(self.model, self.step, number)
            yield
        if accelerator.sync_gradients:  # the optimiser has stepped
            self.step, self.micro_batch = self.step + 1, 0
        else:
            self.micro_batch += 1

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step, "micro_batch": self.micro_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step, self.micro_batch = state["step"], state["micro_batch"]
