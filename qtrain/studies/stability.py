"""How stable a recipe trains: the sharpness of a checkpoint, and how the loss depends on the learning rate.

Both measures are those of "To FP8 and Back Again" (Lee et al., arXiv 2405.18710), which compares precisions by them.

Sharpness. f is the mean cross-entropy of the last token of each sequence, x the logits that predict it. The sharpness
is the largest relative rise of f when each logit moves by at most epsilon (|x| + 1):

    100 (max f(x + y) - f(x)) / (1 + f(x)),    |y| <= epsilon (|x| + 1)

which is the measure of Keskar et al. (arXiv 1609.04836, equation 3) with A = 1 and logits in the place of weights. f
falls with the logit of the right token and rises with every other, so the maximum lies at a corner of the box and needs
no search.

Learning rates. A run that diverged counts with the loss that runs of its seed began with, and any other with the
smaller of that loss and its last one. The sensitivity is the mean of these over the learning rates less the best of
them (Wortsman et al., arXiv 2309.14322): 0 where every learning rate is as good as the best.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from qtrain.data.batches import TokenBatches
from qtrain.data.counted import ids_of
from qtrain.data.prepare import prepare
from qtrain.errors import UserError
from qtrain.plan import budget_tokens
from qtrain.runs.directory import RunDirectory
from qtrain.runs.status import Status
from qtrain.runs.table import Row, read_run
from qtrain.training.build import load_run
from qtrain.training.checkpoint import list_checkpoints

DRAWS = 2000  # of the bootstrap over sequences


@dataclass(frozen=True)
class Sharpness:
    """Of one checkpoint. value, low, high: percent, with the 95% interval of the bootstrap over sequences; loss: of the
    last tokens, in nats."""

    step: int
    value: float
    low: float
    high: float
    loss: float


def losses_at_and_around(logits: Tensor, targets: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Cross-entropies in nats, (N,) float64 each: at the logits (N, V), and the largest in the box around them.
    targets: (N,) int64."""
    logits = logits.double()
    move = epsilon * (logits.abs() + 1)
    is_target = F.one_hot(targets, logits.shape[1]).bool()
    worst = logits + torch.where(is_target, -move, move)
    return F.cross_entropy(logits, targets, reduction="none"), F.cross_entropy(worst, targets, reduction="none")


def sharpness(losses: Tensor, worst: Tensor) -> float:
    """Percent, of the losses (N,) of sequences and the largest ones around them."""
    mean = losses.mean().item()
    return 100 * (worst.mean().item() - mean) / (1 + mean)


def sharpness_of(run: Path, epsilon: float, sequences: int) -> list[Sharpness]:
    """Of every checkpoint of a run directory, by its step, on so many sequences spread over the validation split.
    UserError when the directory holds no run or no checkpoint, and when its text can no longer be read."""
    batches = _validation(run, sequences)
    return [_measured(run, step, batches, epsilon) for step, _ in list_checkpoints(RunDirectory(run).checkpoints)]


def _validation(run: Path, sequences: int) -> list[Tensor]:
    config = RunDirectory(run).read_config()
    parts = prepare(config.data, config.tokenizer, budget_tokens=budget_tokens(config)).parts
    tokens = -(-sequences // len(parts)) * config.model.seq_len  # of each part of a mixture
    batches: list[Tensor] = []
    for part in parts:
        data = TokenBatches(
            replace(part.corpus, val_tokens=tokens), seq_len=config.model.seq_len, seed=config.seed,
            micro_batch_size=config.trainer.micro_batch_size, num_workers=0,
        )  # fmt: skip
        batches += map(ids_of, data.validation[""].batches())
    return batches


@torch.no_grad()
def _measured(run: Path, step: int, batches: Sequence[Tensor], epsilon: float) -> Sharpness:
    mixed = RunDirectory(run).read_config().trainer.precision == "bf16-mixed"
    model = load_run(run, step)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        parts = [losses_at_and_around(model(batch[:, :-1])[:, -1], batch[:, -1], epsilon) for batch in batches]
    losses, worst = (torch.cat(part) for part in zip(*parts, strict=True))
    drawn = torch.from_numpy(np.random.default_rng(0).integers(len(losses), size=(DRAWS, len(losses))))
    values = [sharpness(losses[draw], worst[draw]) for draw in drawn]
    low, high = np.quantile(values, (0.025, 0.975))
    return Sharpness(step, sharpness(losses, worst), float(low), float(high), losses.mean().item())


@dataclass(frozen=True)
class LearningRates:
    """Of all runs of one name, size and budget. diverged: share of the runs, with its 95% interval by Wilson.
    best: the learning rate of the least mean loss. sensitivity: nats, the mean over seeds; half_width: of its 95%
    interval by Student's t (NaN from one seed)."""

    name: str
    runs: int
    rates: tuple[float, ...]
    diverged: float
    diverged_interval: tuple[float, float]
    best: float
    loss: float
    sensitivity: float
    half_width: float


def learning_rates(runs: Iterable[Path]) -> list[LearningRates]:
    """One entry for each name, size and budget that was trained with several learning rates, by name. Runs that neither
    finished nor diverged are left out. UserError for a seed that lacks a learning rate which another seed has."""
    groups: dict[tuple[str, int, int], list[Row]] = defaultdict(list)
    for run in runs:
        row = read_run(run)
        if row["status"] in (Status.FINISHED, Status.DIVERGED):
            row["began_at"] = next((line["loss"] for line in RunDirectory(run).lines("loss")), -math.inf)
            groups[row["name"], row["non_embedding_parameters"], row["tokens"]].append(row)
    several = {key: rows for key, rows in groups.items() if len({row["lr"] for row in rows}) > 1}
    return [_of_group(key[0], rows) for key, rows in sorted(several.items())]


def _of_group(name: str, rows: list[Row]) -> LearningRates:
    rates = tuple(sorted({row["lr"] for row in rows}))
    losses: dict[int, dict[float, float]] = defaultdict(dict)
    for row in rows:
        began_at = max(other["began_at"] for other in rows if other["seed"] == row["seed"])
        last = math.inf if row["status"] == Status.DIVERGED else row["val_loss"]
        losses[row["seed"]][row["lr"]] = min(last, began_at)
    for seed, found in losses.items():
        if missing := {*rates} - {*found}:
            raise UserError(
                f"{name}: seed {seed} has no run with optimizer.lr={min(missing):g}, which another seed has; train it, "
                "or compare the seeds apart"
            )
    table = np.array([[of_seed[rate] for rate in rates] for of_seed in losses.values()])
    sensitivity = (table - table.min(1, keepdims=True)).mean(1)
    seeds, best = len(table), int(table.mean(0).argmin())
    diverged = sum(row["status"] == Status.DIVERGED for row in rows)
    interval = stats.binomtest(diverged, len(rows)).proportion_ci(method="wilson")
    return LearningRates(
        name,
        len(rows),
        rates,
        diverged / len(rows),
        (float(interval.low), float(interval.high)),
        rates[best],
        float(table.mean(0)[best]),
        float(sensitivity.mean()),
        float(stats.t.ppf(0.975, seeds - 1) * sensitivity.std(ddof=1) / math.sqrt(seeds)) if seeds > 1 else math.nan,
    )
