"""A converted model in Hugging Face's Trainer: a callback keys the random bits of every micro-batch.

    from qtrain.integrations.transformers import StepCallback

    qtrain.convert(model, recipe="quartet")
    Trainer(model, arguments, train_dataset=..., callbacks=[StepCallback()]).train()

Needs the extra hf. `qtrain.integrations.accelerate` is for loops of one's own.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qtrain.errors import UserError
from qtrain.quant import quant_linears, set_seed, set_step


class StepCallback(TrainerCallback):
    """Calls `qtrain.set_step` before each micro-batch; when training begins, gives the layers TrainingArguments.seed.

    The step is Trainer's global_step, so a run that is resumed from a checkpoint goes on with its own noise. With
    gradient accumulation over M micro-batches on R processes, micro-batch m of process r has number m * R + r. The seed
    of `qtrain.convert` is replaced: one seed decides the order of the data, dropout and rounding.
    """

    def __init__(self) -> None:
        self.micro_batch = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """UserError for a model that is not converted: the callback would do nothing."""
        model = kwargs["model"]
        if not quant_linears(model):
            raise UserError("StepCallback found no quantised layer in the model; call qtrain.convert before Trainer")
        set_seed(model, args.seed)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.micro_batch = 0
        self._set_step(args, state, kwargs["model"])

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A micro-batch that ends no step is done; the next is of the same step."""
        self.micro_batch += 1
        self._set_step(args, state, kwargs["model"])

    def _set_step(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        set_step(model, state.global_step, self.micro_batch * args.world_size + args.process_index)
