"""Leaving the state before the decay to longer runs of the same schedule."""

from __future__ import annotations

import logging
from typing import Any

import lightning
import torch

from qtrain.callbacks.measure import Measure
from qtrain.callbacks.step import StepCallback
from qtrain.checkpoint import checkpoint_path
from qtrain.errors import UserError
from qtrain.lightning_module import CausalLM
from qtrain.runs.directory import RunDirectory
from qtrain.runs.files import write_atomically
from qtrain.trunk import Trunk, metrics_beside

log = logging.getLogger("qtrain")


class LeaveTrunk(StepCallback):
    """Saves state and metrics after the trunk's last step, for whoever comes. What is there may be damaged, and is
    replaced by what equals it: looking first would have ranks differ in what they saw."""

    def __init__(self, trunk: Trunk, directory: RunDirectory, measure: Measure):
        self.trunk = trunk
        self.directory = directory
        self.measure = measure

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Each rank has looked for a trunk by itself, and another run may have left one in between. UserError."""
        step = torch.tensor(float(trainer.global_step), device=pl_module.device)
        if float(trainer.strategy.reduce(step.clone(), reduce_op="mean")) != trainer.global_step:
            raise UserError(f"a trunk appeared in {self.trunk.directory} while the devices started; start again")

    def on_step_end(self, trainer: lightning.Trainer, module: CausalLM, step: int) -> None:
        if step != self.trunk.steps:
            return
        path = checkpoint_path(self.trunk.directory, step)
        self.measure.check_finite(step)
        if trainer.is_global_zero:
            self.trunk.directory.mkdir(parents=True, exist_ok=True)
            lines = self.directory.metrics.read_text() if self.directory.metrics.exists() else ""
            write_atomically(metrics_beside(path), lines)
        trainer.save_checkpoint(path)
        log.info("step %d: left for longer runs as %s", step, path)
