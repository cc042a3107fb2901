"""The training loop, the same for one process and many, for DDP and FSDP2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricModule

from qtrain.data.batches import TokenBatches
from qtrain.training.causal_lm import CausalLM
from qtrain.training.divergence import Guard
from qtrain.training.observers import Best, Measure, Observer
from qtrain.training.parallel import Ranks
from qtrain.training.saves import Saves
from qtrain.training.stop import StopRequest


@dataclass
class Training:
    """All that the loop works with. forward: module.model, as the strategy wraps it. observers: `measure` first,
    `best` among them."""

    fabric: Fabric
    ranks: Ranks
    module: CausalLM
    forward: _FabricModule
    optimizer: torch.optim.Optimizer
    data: TokenBatches
    measure: Measure
    observers: Sequence[Observer]
    guard: Guard
    saves: Saves
    stop: StopRequest
    best: Best


def train(run: Training, step: int, samples: int) -> int:
    """Train on from optimiser step `step`, after so many samples of the data. 0 when all steps are done, or enough of
    them (`Best`), else the exit code that a rank was asked to stop with; either way the last state is saved.

    DivergedError for a loss that is not finite, RewindError to go back to the last checkpoint, on all ranks.
    """
    module, plan, fabric, ranks = run.module, run.module.plan, run.fabric, run.ranks
    per_step = plan.micro_batches * run.data.per_batch
    batches = run.measure.timed(run.data.train(samples, samples + (plan.steps - step) * per_step))
    for observer in run.observers:
        observer.on_start(step)
    while step < plan.steps and run.best.enough_at is None:
        for observer in run.observers:
            observer.on_step_start(step)
        with module.weights_kept():
            for micro_batch in range(plan.micro_batches):
                batch = next(batches).to(fabric.device, non_blocking=True)
                if micro_batch == 0:
                    with fabric.autocast():
                        module.begin_step(step, batch)
                for observer in run.observers:
                    observer.on_micro_batch_start(step, micro_batch, batch)
                with fabric.no_backward_sync(run.forward, enabled=micro_batch + 1 < plan.micro_batches):
                    loss = module.micro_batch_loss(run.forward, batch, step, micro_batch, ranks.rank, ranks.size)
                    fabric.backward(loss / plan.micro_batches)
                for observer in run.observers:
                    observer.on_backward_end()
        module.clip_norm()
        if run.guard.accepts(step):
            for group in run.optimizer.param_groups:
                group["lr"] = module.config.optimizer.lr * module.lr_factor(step)
            run.optimizer.step()
        run.optimizer.zero_grad()
        step, samples = step + 1, samples + per_step
        for observer in run.observers:
            observer.on_step_end(step)
        asked, due = ranks.maximum(run.stop.asked, run.saves.due(step))
        enough = run.best.enough_at is not None
        if asked or due or enough:
            run.saves.save(step, samples)
        if asked and step < plan.steps and not enough:
            return int(asked)
    return 0
