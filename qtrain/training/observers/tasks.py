"""Scores of a run's model on tasks of lm-evaluation-harness: lines of their own in metrics.jsonl.

    task/<task>/<metric>    task/choice/acc, as lm-eval names them
    tasks_seconds           how long all tasks took, which is no time of training

Rank 0 computes them on its own copy of the model, and the other ranks wait for it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng

from qtrain.config import Config
from qtrain.errors import UserError
from qtrain.training.observers.best import Best
from qtrain.training.observers.measure import Recorder
from qtrain.training.observers.observer import Observer
from qtrain.training.parallel import Ranks

if TYPE_CHECKING:
    from qtrain.evaluate.target import Target


def check_tasks(config: Config, ranks: Ranks) -> None:
    """UserError for sharded weights, for a task file that does not exist or that lm-eval does not read, and where the
    extra `eval` is not installed."""
    files = config.callbacks.tasks
    if not files:
        return
    if config.trainer.strategy == "fsdp2":
        raise UserError(
            "callbacks.tasks computes on rank 0 alone, and trainer.strategy=fsdp2 leaves a part of each weight there; "
            "set trainer.strategy=ddp, or callbacks.tasks=[] and run `qtrain evaluate --tasks` on the checkpoints"
        )

    def read() -> None:
        from qtrain.evaluate.tasks import check_task_files

        check_task_files(files, "callbacks.tasks")
        from qtrain.integrations.lm_eval import read_tasks

        read_tasks(files)

    ranks.decided(read)


class Tasks(Observer):
    """Every `every` steps (None: never before the end) and at the end of the run: the scores that `qtrain evaluate
    --tasks` gives for the same weights.

    Stands behind Best, which knows where a run ends early. target: the run's own model. limit: documents of each task.
    The mode of the model and the global random states, which lm-eval seeds, are as before afterwards.
    """

    def __init__(
        self, recorder: Recorder, best: Best, target: Target, files: Sequence[str], every: int | None, limit: int | None
    ) -> None:
        self.recorder, self.best, self.target = recorder, best, target
        self.files, self.every, self.limit = files, every, limit

    def on_step_end(self, step: int) -> None:
        if not self._due(step):
            return
        began = time.perf_counter()
        found = self.recorder.ranks.decided(self._scores)
        values = {
            f"task/{task}/{metric}": value
            for task, values in found.items()
            for metric, value in values.items()
            if math.isfinite(value)  # JSON has no other numbers
        }
        self.recorder.write(step, values | {"tasks_seconds": round(time.perf_counter() - began, 3)})

    def _due(self, step: int) -> bool:
        ends = step == self.recorder.module.plan.steps or step == self.best.enough_at
        return ends or (self.every is not None and step % self.every == 0)

    def _scores(self) -> dict[str, dict[str, Any]]:
        """Without torch.compile: lm-eval's inputs have many lengths, and each would compile another graph."""
        from qtrain.integrations.lm_eval import QtrainLM, run_tasks

        model = self.target.model
        training = model.training
        model.eval()
        try:
            with isolate_rng(), torch.compiler.set_stance("force_eager"):
                return run_tasks(QtrainLM(self.target), self.files, self.limit)
        finally:
            model.train(training)


def by_task(line: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of a line of metrics.jsonl: task -> metric -> value."""
    found: dict[str, dict[str, float]] = {}
    for key, value in line.items():
        kind, _, rest = key.partition("/")
        if kind == "task":
            task, _, metric = rest.rpartition("/")
            found.setdefault(task, {})[metric] = value
    return found
