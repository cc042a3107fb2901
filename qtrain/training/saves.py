"""When a run saves its state, and where."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from qtrain.runs.directory import RunDirectory
from qtrain.runs.files import clear_partial, write_atomically
from qtrain.training.causal_lm import CausalLM
from qtrain.training.checkpoint import Saver, folder_of, tensors_of, tidy
from qtrain.training.divergence import Guard
from qtrain.training.observers import Measure
from qtrain.training.parallel import Ranks
from qtrain.training.trunk import Trunk, metrics_beside

log = logging.getLogger("qtrain")

ABANDONED_SECONDS = 24 * 3600.0  # a partial trunk that nobody has written to for so long is a killed run's


class Saves:
    """Saves every `every` steps, every `minutes`, after the last step, and at the end of a trunk; keeps the newest
    `keep` checkpoints.

    No state is saved before the losses and gradient norms that led to it have been seen to be finite, nor before the
    lines of metrics.jsonl that it counts on are on disk.
    """

    def __init__(
        self,
        directory: RunDirectory,
        saver: Saver,
        module: CausalLM,
        optimizer: torch.optim.Optimizer,
        measure: Measure,
        guard: Guard,
        ranks: Ranks,
        trunk: Trunk | None,
        clock: Callable[[], float] = time.monotonic,
    ):
        settings = module.config.callbacks
        self.directory, self.saver, self.module, self.optimizer = directory, saver, module, optimizer
        self.measure, self.guard, self.ranks, self.trunk, self.clock = measure, guard, ranks, trunk, clock
        self.every, self.keep = module.plan.checkpoint_every_steps, settings.keep_checkpoints
        self.seconds = settings.checkpoint_every_minutes * 60
        self.last = clock()

    def due(self, step: int) -> bool:
        """Whether this rank finds that the state after so many steps is to be saved. One that does is enough; by the
        clock, only rank 0 does."""
        if step % self.every == 0 or step in (self.module.plan.steps, self.trunk.steps if self.trunk else 0):
            return True
        return self.ranks.is_zero and self.clock() - self.last >= self.seconds

    def save(self, step: int, samples: int) -> None:
        """The state after so many steps, on `samples` samples of the data. Every rank must call it. Writing goes on in
        the background."""
        self.measure.check_finite(step)
        values: dict[str, Any] = {"samples": samples, "vocab_size": self.module.plan.vocab_size}
        if not self.guard.idle:
            values["guard"] = self.guard.state()
        tensors = tensors_of(self.module.model, self.optimizer)
        if self.ranks.is_zero:
            self.directory.log.sync()
        self.saver.save(self.directory.checkpoints, step, tensors, values, keep=self.keep)
        if self.trunk and step == self.trunk.steps:
            self._leave_trunk(self.trunk, step, tensors, values)
        self.last = self.clock()

    def _leave_trunk(self, trunk: Trunk, step: int, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        """State and metrics for longer runs of the same schedule."""
        if self.ranks.is_zero:
            trunk.directory.mkdir(parents=True, exist_ok=True)
            tidy(trunk.directory, ABANDONED_SECONDS)
            clear_partial(trunk.directory, ABANDONED_SECONDS)
            lines = self.directory.metrics.read_text() if self.directory.metrics.exists() else ""
            write_atomically(metrics_beside(folder_of(trunk.directory, step)), lines)
        self.saver.save(trunk.directory, step, tensors, values)
        log.info("step %d: left for longer runs as %s", step, folder_of(trunk.directory, step))
