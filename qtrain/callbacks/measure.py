"""What a run is measured by: training lines and validation lines of metrics.jsonl, mirrored to the loggers."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning
import torch
from torch import Tensor

from qtrain.callbacks.step import StepCallback
from qtrain.errors import UserError
from qtrain.lightning_module import CausalLM, evaluate
from qtrain.metrics import bits_per_byte
from qtrain.runs.directory import RunDirectory

Line = Mapping[str, Any]


class DivergedError(UserError):
    """The loss is not finite."""


class Recorder:
    """Writes a line to metrics.jsonl, hands it to the loggers and to whoever listens. Only rank zero writes."""

    def __init__(self, directory: RunDirectory, listeners: list[Callable[[Line], None]]):
        self.directory = directory
        self.listeners = listeners

    def write(self, trainer: lightning.Trainer, module: CausalLM, step: int, values: Line) -> None:
        if not trainer.is_global_zero:
            return
        tokens = step * module.plan.batch_tokens
        line = {"step": step, "tokens": tokens, "flops": tokens * module.plan.flops_per_token, **values}
        self.directory.append_metrics(line)
        for logger in trainer.loggers:
            logger.log_metrics({key: value for key, value in line.items() if key != "step"}, step=step)
        for listen in self.listeners:
            listen(line)


class Measure(StepCallback):
    """Every `every` steps: loss and gradient norm of that step, learning rate, tokens/s, waiting for data, memory.

    Losses and norms stay on the device until a line is due. DivergedError at the first that is not finite.
    """

    def __init__(self, recorder: Recorder, every: int):
        self.recorder = recorder
        self.every = every
        self.history: list[tuple[Tensor, Tensor]] = []
        self.busy = self.waiting = 0.0
        self.started = self.ready = time.perf_counter()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.resume_clock()

    def resume_clock(self) -> None:
        """From here to the next batch is waiting for data. Called by the last callback of a batch's end."""
        self.ready = time.perf_counter()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.started = time.perf_counter()
        self.waiting += self.started - self.ready

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.busy += time.perf_counter() - self.started
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: lightning.Trainer, module: CausalLM, step: int) -> None:
        self.history.append((module.step_loss, module.grad_norm))
        if step % self.every == 0 or step == module.plan.steps:
            self.flush(trainer, module, step)

    def flush(self, trainer: lightning.Trainer, module: CausalLM, step: int) -> None:
        started = time.perf_counter()
        self.check_finite(step)
        self.busy += time.perf_counter() - started
        seconds = self.busy + self.waiting
        values = {
            "loss": float(trainer.strategy.reduce(module.step_loss, reduce_op="mean")),
            "lr": module.config.optimizer.lr * module.lr_factor(step - 1),
            "grad_norm": float(module.grad_norm),
            "tokens_per_second": round(len(self.history) * module.plan.batch_tokens / seconds, 1),
            "data_wait": round(self.waiting / seconds, 5),
            "memory_bytes": memory_bytes(module.device),
        }
        self.history.clear()
        self.busy = self.waiting = 0.0
        self.recorder.write(trainer, module, step, values)

    def check_finite(self, step: int) -> None:
        """DivergedError when a loss or gradient norm since the last line, `step` included, is not finite. Waits for
        the device."""
        pairs = torch.tensor([]) if not self.history else torch.stack([torch.stack(pair) for pair in self.history])
        for number, (loss, norm) in enumerate(pairs.tolist(), start=step - len(pairs) + 1):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise DivergedError(f"step {number} is not finite: loss {loss}, gradient norm {norm}")


class Validate(StepCallback):
    """Every `every` steps and after the last: loss and bits per byte on the validation split.

    Lightning's own validation loop runs after the end-of-step hooks, hence after the checkpoint, and is not run again
    on resume: a kill in between would lose its line.
    """

    def __init__(self, recorder: Recorder, every: int, bytes_per_token: float):
        self.recorder = recorder
        self.every = every
        self.bytes_per_token = bytes_per_token

    def on_step_end(self, trainer: lightning.Trainer, module: CausalLM, step: int) -> None:
        if step % self.every == 0 or step == module.plan.steps:
            batches = trainer.datamodule.val_dataloader()  # pyright: ignore[reportAttributeAccessIssue]
            precision = module.config.trainer.precision
            here = torch.tensor(evaluate(module.model, batches, module.device, precision), dtype=torch.float64)
            total, count = trainer.strategy.reduce(here.to(module.device), reduce_op="sum").tolist()
            values = validation_values(total, count, self.bytes_per_token)
            if not math.isfinite(values["val_loss"]):
                raise DivergedError(f"the validation loss is {values['val_loss']} at step {step}")
            self.recorder.write(trainer, module, step, values)


def validation_values(total: float, count: float, bytes_per_token: float) -> dict[str, float]:
    """val_loss in nats per token and val_bits_per_byte from a summed loss over `count` tokens."""
    loss = total / count
    return {"val_loss": loss, "val_bits_per_byte": bits_per_byte(loss, 1, bytes_per_token)}


def memory_bytes(device: torch.device) -> int:
    """Peak memory so far: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
