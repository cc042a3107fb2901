"""Which recipe is best at equal compute, given what each gains in speed.

A budget is what training (N_max, D_max) with the baseline costs, and what serving N_max costs. A recipe whose forward
pass is f times as fast serves a model f times as large; one that trains t times as fast spends the same training time
on D = D_max t / f tokens of it. Its loss there is L(N_max f, D_max t / f). Source: Quartet, arXiv 2505.14669, Table 1.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qtrain.errors import UserError
from qtrain.scaling.laws import Array, Design, log_loss
from qtrain.scaling.study import LawFit

FORWARD_SHARE = 1 / 3  # of a training step's operations
DRAWS = 200  # of the bootstrap, for how sure a cell is


@dataclass(frozen=True)
class SpeedModel:
    """speeds: recipe -> (forward, training), times as fast as the baseline; forward 1 where only training is known."""

    source: str
    speeds: dict[str, tuple[float, float]]


def read_speeds(path: Path) -> SpeedModel:
    """{"source": ..., "speeds": {recipe: {"forward": 2.0, "backward": 1.0}}}, or what kernels/bench/bench_training.py
    wrote, which knows of training alone.

    A training step is a third forward and two thirds backward by operations, so t = 1 / (1 / 3f + 2 / 3b).
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if "rows" in found:
            return SpeedModel(f"{path.name}: {found['name']}, {found['machine']['device']}", _measured(found["rows"]))
        stated = {
            recipe: (_positive(speed["forward"]), _training(_positive(speed["forward"]), _positive(speed["backward"])))
            for recipe, speed in found["speeds"].items()
        }
        return SpeedModel(str(found["source"]), stated)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'{path} is no speed model ({error!r}); it needs "source" and "speeds": recipe -> forward and backward, '
            "times as fast as the baseline, or to be a result of kernels/bench/bench_training.py"
        ) from None


def _training(forward: float, backward: float) -> float:
    return 1 / (FORWARD_SHARE / forward + (1 - FORWARD_SHARE) / backward)


def _measured(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    return {row["recipe"]: (1.0, 1 / _positive(row["x time of bf16"])) for row in rows}


def _positive(value: Any) -> float:
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{value} is no speed")
    return number


def speed_map(fit: LawFit, model: SpeedModel, cells: int = 40) -> dict[str, Any]:
    """The best recipe over N_max and D_max / N_max, for law.json's `map`.

    best: (cells of N, cells of D/N) index into recipes. share: of the bootstrap draws that agree. gain: the baseline's
    loss less the best one's, nats per token. observed: the range of the fitted runs; beyond it all is extrapolation.
    UserError where the model has speeds for no fitted recipe.
    """
    runs = [run for run, used in zip(fit.runs, fit.used, strict=True) if used]
    fitted = list(dict.fromkeys(run.recipe for run in runs))
    recipes = [fit.baseline, *(name for name in model.speeds if name in fitted and name != fit.baseline)]
    if len(recipes) == 1 or fit.baseline not in fitted:
        raise UserError(
            f"the speed model has {', '.join(model.speeds)}; the runs have {', '.join(fitted)}; a map needs "
            f"the baseline {fit.baseline} and another"
        )
    N, ratio = np.array([run.N for run in runs]), np.array([run.D / run.N for run in runs])
    grid_N = np.geomspace(N.min(), 300 * N.max(), cells)
    grid_ratio = np.geomspace(ratio.min() / 2, 10 * ratio.max(), cells)
    thetas = np.concatenate((fit.theta[None], fit.draws[:DRAWS]))
    speeds = {name: model.speeds.get(name, (1.0, 1.0)) for name in recipes}
    losses = np.stack([_equal_compute(fit, thetas, name, speeds[name], grid_N, grid_ratio) for name in recipes])
    best = losses.argmin(axis=0)
    return {
        "speed_model": model.source,
        "recipes": recipes,
        "speeds": {name: {"forward": forward, "training": training} for name, (forward, training) in speeds.items()},
        "N": grid_N.tolist(),
        "D_per_N": grid_ratio.tolist(),
        "best": best[0].tolist(),
        "share": np.mean(best[1:] == best[0], axis=0).round(3).tolist() if len(best) > 1 else None,
        "gain": (losses[0, 0] - losses[:, 0].min(axis=0)).round(5).tolist(),
        "observed": {"N": [N.min(), N.max()], "D_per_N": [ratio.min(), ratio.max()]},
    }


def _equal_compute(
    fit: LawFit, thetas: Array, recipe: str, speed: tuple[float, float], grid_N: Array, grid_ratio: Array
) -> Array:
    """(S, cells, cells): the losses of one recipe."""
    forward, training = speed
    N, ratio = np.meshgrid(grid_N, grid_ratio, indexing="ij")
    return predict(fit, thetas, recipe, N * forward, N * ratio * training / forward)


def predict(fit: LawFit, thetas: Array, recipe: str, N: Array, D: Array) -> Array:
    """(S, *shape) losses of a fitted recipe (nats per token) by S thetas, at N and D of equal shape."""
    index = next(index for index, run in enumerate(fit.runs) if run.recipe == recipe)
    one = fit.design.subset(np.full(N.size, index))
    moved = Design(
        np.log(N.ravel()) - one.centre[0], np.log(D.ravel()) - one.centre[1], one.log_exponent, one.log_mantissa,
        one.log_log2_block, one.centre, one.size_group, one.token_group, one.groups,
    )  # fmt: skip
    return np.exp(log_loss(thetas, moved)[0]).reshape(len(thetas), *N.shape)
