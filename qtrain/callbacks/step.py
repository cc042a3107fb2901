"""Lightning counts micro-batches; everything here counts optimiser steps."""

from __future__ import annotations

from typing import Any

import lightning

from qtrain.lightning_module import CausalLM


class StepCallback(lightning.Callback):
    """`on_step_end` is called once an optimiser step, with the number of steps done."""

    def on_step_end(self, trainer: lightning.Trainer, module: CausalLM, step: int) -> None:
        raise NotImplementedError

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % pl_module.plan.micro_batches == 0:
            self.on_step_end(trainer, pl_module, trainer.global_step)
