"""What watches a run. Everything counts optimiser steps."""

from __future__ import annotations

from torch import Tensor


class Observer:
    """Is told what the loop does, on every rank. It must not change the training. Observers are called in the order of
    their list. Each hook does nothing by default."""

    def on_start(self, step: int) -> None:
        """Training begins after so many steps: 0, or those of a checkpoint."""

    def on_step_start(self, step: int) -> None:
        """Optimiser step number `step` (from 0) begins."""

    def on_micro_batch_start(self, step: int, micro_batch: int, batch: Tensor) -> None:
        """The batch, (B, T+1) int64 on the device, is about to be trained on."""

    def on_backward_end(self) -> None:
        """The backward of a micro-batch is over, the optimiser has not stepped."""

    def on_step_end(self, step: int) -> None:
        """So many optimiser steps are done."""

    def on_end(self) -> None:
        """Training is over: done, stopped or failed."""
