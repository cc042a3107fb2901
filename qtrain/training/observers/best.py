"""The best state of a run by its validation loss: kept as a file, and the reason to end where none better comes."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor

from qtrain.training.checkpoint import MODEL, tensors_of, write_weights
from qtrain.training.observers.measure import Recorder
from qtrain.training.observers.observer import Observer

log = logging.getLogger("qtrain")


class Best(Observer):
    """After each validation: has the loss fallen below all before? Stands behind Validate in the list of observers.

    file: the weights of the best state are written there, by the names of the model's state dict, with step and
    val_loss as its metadata; None for no file. patience: the run has had enough after so many validations in a row that
    were no better; None for never. What came before a resumed run's start is read from metrics.jsonl, so that a run
    that was stopped ends where it would have ended. Rank 0 decides for all.
    """

    def __init__(self, recorder: Recorder, file: Path | None, patience: int | None):
        self.recorder, self.ranks = recorder, recorder.ranks
        self.file, self.patience = file, patience
        self.lowest, self.waited, self.kept = math.inf, 0, math.inf
        self.enough_at: int | None = None  # the step after which the run has had enough

    @property
    def idle(self) -> bool:
        return self.file is None and self.patience is None

    def on_start(self, step: int) -> None:
        self.lowest, self.waited, self.enough_at = math.inf, 0, None
        if self.idle:
            return
        before = self.ranks.decided(lambda: self._before(step))
        for at, loss in before:
            self._take(at, loss)
        if self.enough_at is not None:
            self.enough_at = step
        kept = self.ranks.decided(lambda: kept_loss(self.file) if self.file else math.inf)
        if self.file is not None and self.lowest < kept:  # of a shared trunk, or before callbacks.keep_best was set
            log.info("the state of the lowest validation loss so far, %.4f, was not kept: a lower one is", self.lowest)
        self.kept = min(kept, self.lowest)

    def _before(self, step: int) -> list[tuple[int, float]]:
        lines = self.recorder.directory.lines("val_loss")
        return [(line["step"], line["val_loss"]) for line in lines if line["step"] <= step]

    def on_step_end(self, step: int) -> None:
        if self.idle or self.recorder.validated is None or self.recorder.validated[0] != step:
            return
        loss = self.ranks.decided(lambda: self.recorder.validated[1])  # pyright: ignore[reportOptionalSubscript]
        self._take(step, loss)
        if self.file is not None and loss < self.kept:
            self.kept = loss
            self._write(self.file, step, loss)
        if self.enough_at == step and step < self.recorder.module.plan.steps:
            log.info("step %d: %d validations in a row were no better than %.4f", step, self.waited, self.lowest)

    def _take(self, step: int, loss: float) -> None:
        self.waited = 0 if loss < self.lowest else self.waited + 1
        self.lowest = min(self.lowest, loss)
        if self.patience is not None and self.waited >= self.patience and self.enough_at is None:
            self.enough_at = step

    def _write(self, file: Path, step: int, loss: float) -> None:
        """Every rank must call it: sharded weights are gathered, one after the other."""
        whole = {}
        for name, tensor in tensors_of(self.recorder.module.model).items():
            gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.ranks.is_zero:
                whole[name.removeprefix(MODEL)] = gathered.detach().cpu().contiguous()
        self.ranks.decided(lambda: write_weights(file, whole, {"step": str(step), "val_loss": repr(loss)}))


def kept_loss(file: Path) -> float:
    """The validation loss of the weights in this file; infinite where there is none, or another program's."""
    if not file.exists():
        return math.inf
    try:
        with safe_open(file, "pt") as opened:
            return float((opened.metadata() or {})["val_loss"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return math.inf
