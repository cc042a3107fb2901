"""Leaving the state before the decay to longer runs of the same schedule."""

from __future__ import annotations

import logging

import lightning

from qtrain.callbacks.measure import Measure
from qtrain.callbacks.step import StepCallback
from qtrain.checkpoint import checkpoint_path
from qtrain.lightning_module import CausalLM
from qtrain.run_directory import RunDirectory, write_atomically
from qtrain.trunk import Trunk, metrics_beside

log = logging.getLogger("qtrain")


class LeaveTrunk(StepCallback):
    """Saves state and metrics after the trunk's last step, once, for whoever comes."""

    def __init__(self, trunk: Trunk, directory: RunDirectory, measure: Measure):
        self.trunk = trunk
        self.directory = directory
        self.measure = measure

    def on_step_end(self, trainer: lightning.Trainer, module: CausalLM, step: int) -> None:
        path = checkpoint_path(self.trunk.directory, step)
        if step != self.trunk.steps or path.exists():
            return
        self.measure.check_finite(step)
        if trainer.is_global_zero:
            self.trunk.directory.mkdir(parents=True, exist_ok=True)
            write_atomically(metrics_beside(path), self.directory.metrics.read_text())
        trainer.save_checkpoint(path)
        log.info("step %d: left for longer runs as %s", step, path)
