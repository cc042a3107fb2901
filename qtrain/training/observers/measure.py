"""What a run is measured by: training lines and validation lines of metrics.jsonl, mirrored to the loggers."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor

from qtrain.data.batches import ValidationSet
from qtrain.errors import DivergedError
from qtrain.runs.directory import RunDirectory
from qtrain.training.causal_lm import CausalLM
from qtrain.training.losses import evaluate, validation_values
from qtrain.training.observers.loggers import mirrored
from qtrain.training.observers.observer import Observer
from qtrain.training.parallel import Ranks

Line = Mapping[str, Any]


class Recorder:
    """Writes a line to metrics.jsonl, hands it to the loggers and to whoever listens. Only rank 0 writes."""

    def __init__(
        self,
        directory: RunDirectory,
        module: CausalLM,
        ranks: Ranks,
        loggers: Iterable[Logger] = (),
        listeners: Iterable[Callable[[Line], None]] = (),
    ):
        self.directory, self.module, self.ranks = directory, module, ranks
        self.loggers, self.listeners = list(loggers), list(listeners)
        self.validated: tuple[int, float] | None = None  # step and loss of the last validation, on every rank

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def write(self, step: int, values: Line) -> None:
        if "val_loss" in values:
            self.validated = step, values["val_loss"]
        if not self.ranks.is_zero:
            return
        plan = self.module.plan
        tokens = step * plan.batch_tokens
        line = {"step": step, "tokens": tokens, "flops": tokens * plan.flops_per_token, **values}
        self.directory.append_metrics(line)
        shown = mirrored(line, self.module.config.logger.per_layer) if self.loggers else {}
        for logger in self.loggers:
            logger.log_metrics({key: value for key, value in shown.items() if key != "step"}, step=step)
        for listen in self.listeners:
            listen(line)


class Measure(Observer):
    """Every `every` steps: loss and gradient norm of that step, learning rate, tokens/s, waiting for data, memory. Of
    several ranks the loss is the mean; time and memory are those of the worst.

    Losses and norms stay on the device until a line is due. DivergedError, on all ranks, at the first that is not
    finite. First in the list of observers: what the others do is no time of training.
    """

    def __init__(self, recorder: Recorder, every: int):
        self.recorder = recorder
        self.module, self.ranks = recorder.module, recorder.ranks
        self.every = every
        self.history: list[tuple[Tensor, Tensor]] = []
        self.steps = 0  # since the last line
        self.seconds = self.waiting = 0.0
        self.began = time.perf_counter()

    def timed(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """The batches; the time that each takes to come is noted."""
        source = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(source, None)
            self.waiting += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def on_step_start(self, step: int) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, step: int) -> None:
        self.history.append((self.module.step_loss, self.module.grad_norm))
        due = step % self.every == 0 or step == self.module.plan.steps
        local = self._checked(step) if due else 0.0
        self.seconds += time.perf_counter() - self.began
        if due:
            self._flush(step, local)

    def _flush(self, step: int, local: float) -> None:
        module, ranks = self.module, self.ranks
        memory = memory_bytes(self.recorder.device)
        seconds, waited, most = ranks.maximum(self.seconds, self.waiting / self.seconds, memory)
        (loss,) = ranks.total(local / ranks.size)
        values = {
            "loss": loss,
            "lr": module.config.optimizer.lr * module.lr_factor(step - 1),
            "grad_norm": float(module.grad_norm),
            "tokens_per_second": round(self.steps * module.plan.batch_tokens / seconds, 1),
            "data_wait": round(waited, 5),
            "memory_bytes": int(most),
        }
        self.seconds = self.waiting = 0.0
        self.steps = 0
        self.recorder.write(step, values)

    def _checked(self, step: int) -> float:
        """The last loss on this rank, in nats per token, once all since the last line are known to be finite."""
        self.steps += len(self.history)
        pairs = torch.stack([torch.stack(pair) for pair in self.history]).tolist() if self.history else []
        self.history.clear()
        bad = [(step - len(pairs) + 1 + i, *pair) for i, pair in enumerate(pairs) if not all(map(math.isfinite, pair))]
        (first,) = self.ranks.maximum(-bad[0][0] if bad else -math.inf)
        if first > -math.inf:
            seen = f": loss {bad[0][1]}, gradient norm {bad[0][2]}" if bad else ", on another rank"
            raise DivergedError(f"step {-first:.0f} is not finite{seen}")
        return pairs[-1][0] if pairs else float(self.module.step_loss)

    def check_finite(self, step: int) -> None:
        """DivergedError, on all ranks, when a loss or gradient norm up to and with `step` is not finite. Waits for the
        device; every rank must call it."""
        self._checked(step)

    def forget(self) -> None:
        """What was measured since the last line is of steps that are taken back."""
        self.history.clear()
        self.seconds = self.waiting = 0.0
        self.steps = 0


class Validate(Observer):
    """Every `every` steps and after the last: loss and bits per byte on each of the sets, by name, whose windows the
    ranks share."""

    def __init__(self, recorder: Recorder, every: int, sets: Mapping[str, ValidationSet]):
        self.recorder, self.every, self.sets = recorder, every, sets

    def on_step_end(self, step: int) -> None:
        module, ranks = self.recorder.module, self.recorder.ranks
        if step % self.every and step != module.plan.steps:
            return
        trainer, device = module.config.trainer, self.recorder.device
        sums = {}
        for name, each in self.sets.items():
            here = evaluate(module.model, each.batches(), device, trainer.precision, **module.loss_options)
            sums[name] = ranks.total(*here)
        values = validation_values(self.sets, sums)
        for key, value in values.items():
            if not math.isfinite(value):
                which = "" if key == "val_loss" else f" ({key})"
                raise DivergedError(f"the validation loss is {value} at step {step}{which}")
        self.recorder.write(step, values)


def by_source(line: Line) -> dict[str, dict[str, float]]:
    """Of a validation line: loss, bits_per_byte and tokens of each set that has a name."""
    found: dict[str, dict[str, float]] = {}
    for key, value in line.items():
        kind, _, name = key.partition("/")
        if name and kind in ("val_loss", "val_bits_per_byte", "val_tokens"):
            found.setdefault(name, {})[kind.removeprefix("val_")] = value
    return found


def memory_bytes(device: torch.device) -> int:
    """Peak memory so far: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
