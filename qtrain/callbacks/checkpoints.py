"""Saving at whole optimiser steps, at intervals, at the end and when asked to stop."""

from __future__ import annotations

import logging
import signal
from types import FrameType
from typing import Any

import lightning

from qtrain.callbacks.measure import Measure
from qtrain.callbacks.step import StepCallback
from qtrain.checkpoint import checkpoint_path, prune
from qtrain.lightning_module import CausalLM
from qtrain.runs.directory import RunDirectory

log = logging.getLogger("qtrain")


class StopRequest:
    """While entered, Ctrl-C and SIGTERM ask the run to stop at the end of the current step; a second Ctrl-C stops at
    once, without saving."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.getsignal(number) for number in self.SIGNALS}
        self.listen()
        return self

    def listen(self) -> None:
        """Again once training starts: Lightning puts a handler of its own in front, which ends the run at once."""
        for number in self.SIGNALS:
            signal.signal(number, self._note)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        log.warning("%s: finishing this step and saving; again to stop at once", signal.Signals(number).name)


class Checkpoints(StepCallback):
    """Saves every `every` steps, after the last one, and when a stop is asked for; keeps the newest `keep`.

    No state is saved before the losses and gradient norms that led to it have been seen to be finite.
    """

    def __init__(self, directory: RunDirectory, every: int, keep: int, stop: StopRequest, measure: Measure):
        self.directory = directory
        self.every = every
        self.keep = keep
        self.stop = stop
        self.measure = measure

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.stop.listen()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.measure.resume_clock()  # validating and saving are not waiting for data

    def on_step_end(self, trainer: lightning.Trainer, module: CausalLM, step: int) -> None:
        due = step % self.every == 0 or step == module.plan.steps
        if not (due or self.stop.asked):
            return
        self.measure.check_finite(step)
        trainer.save_checkpoint(checkpoint_path(self.directory.checkpoints, step))
        if trainer.is_global_zero:
            prune(self.directory.checkpoints, self.keep)
        if self.stop.asked:
            trainer.should_stop = True
