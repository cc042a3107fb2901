"""What a fit says, as plain data for law.json: constants and efficiencies with intervals, points, and warnings."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qtrain.scaling.laws import ALPHA, BETA, BOUNDS, CONSTANTS, DELTA, GAMMA, NU, A, Array, B, G
from qtrain.scaling.study import LawFit

INTERVAL = (2.5, 97.5)
IDENTIFIED = 3.0  # a constant whose interval spans a larger factor is not known from these runs
SPAN = 8.0  # of N or D, below which an exponent rests on extrapolation
TIED = 0.95  # correlation of log N and log D
AT_BOUND = 0.05  # share of draws, above which a constant rests on its bound
UNDETERMINED = "other values of it, with others of the rest, fit these runs exactly as well"


def law_json(fit: LawFit) -> dict[str, Any]:
    """law.json without what only the command knows (inputs, command, commit).

    Intervals are 95% percentiles of the draws. N non-embedding parameters, D tokens, loss, predicted and residual (loss
    less predicted) in nats per token.
    """
    constants = {name: _constant(fit, name) for name in fit.law.constants}
    efficiencies = {
        recipe: {which: _efficiency(fit, recipe, which) for which in fit.law.efficiencies}
        for recipe in _fitted_recipes(fit)
        if fit.law.efficiencies
    }
    points = _points(fit)
    return {
        "law": fit.law.name,
        "formula": fit.law.formula,
        "source": fit.law.source,
        "baseline": fit.baseline,
        "constants": constants,
        "efficiencies": efficiencies,
        "fit": _fit(fit, points),
        "points": points,
        "warnings": _warnings(fit, constants, efficiencies, points),
    }


def _warnings(
    fit: LawFit, constants: dict[str, Any], efficiencies: dict[str, Any], points: list[dict[str, Any]]
) -> list[str]:
    if len(fit.draws):
        unknown = [*_of_constants(fit, constants), *_of_efficiencies(fit, efficiencies)]
    else:
        unknown = ["without bootstrap draws there are no intervals, and nothing counts as identified"]
    return [*fit.warnings, *_of_data(fit), *_of_search(fit), *unknown, *_of_held_out(points)]


def _estimate(value: float, draws: Array) -> dict[str, Any]:
    low, high = np.percentile(draws, INTERVAL) if len(draws) else (math.nan, math.nan)
    return {"value": _finite(value), "low": _finite(low), "high": _finite(high)}


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return float(value) if math.isfinite(value) else None


def _constant(fit: LawFit, name: str) -> dict[str, Any]:
    index = CONSTANTS.index(name)
    values, draws = fit.constants()
    found = _estimate(values[index], draws[:, index])
    fitted = index in fit.free
    if _is_flat(fit, index):
        low, high = BOUNDS.get(name, (0.0, math.inf))
        return {**found, "low": low, "high": _finite(high), "identified": False, "fitted": fitted}
    known = not fitted or (_spread(found) <= IDENTIFIED and not any(_at_bound(fit, index)))
    return {**found, "identified": bool(known), "fitted": fitted}


# The values of A, B and G are those of theta's a, b and g and of these
SCALES = {A: {A, ALPHA, GAMMA}, B: {B, BETA, GAMMA}, G: {G, ALPHA, BETA, DELTA, NU}}


def _is_flat(fit: LawFit, index: int) -> bool:
    """Whether the runs leave a constant undetermined: its interval is then all that it may be."""
    return bool(SCALES.get(index, {index}) & fit.flat)


def _efficiency(fit: LawFit, recipe: str, which: str) -> dict[str, Any]:
    found = _estimate(*fit.efficiency(recipe, which))
    if fit.index_of(recipe, which) in fit.flat:
        found["low"], found["high"] = BOUNDS["efficiency"]
    return found


def _spread(estimate: dict[str, Any]) -> float:
    """The factor that an interval spans; infinite beyond what a float holds, or without draws."""
    if estimate["low"] is None or estimate["high"] is None:
        return math.inf
    return estimate["high"] / estimate["low"] if estimate["low"] > 0 else math.inf


def _at_bound(fit: LawFit, index: int) -> tuple[bool, float]:
    """Whether the fit lies at a bound of the constant, and the share of the draws that do, 0 where it is small."""
    low, high = (limit[index] for limit in fit.limits)
    at = lambda theta: (theta <= low + 1e-6) | (theta >= high - 1e-6)  # noqa: E731
    share = float(np.mean(at(fit.draws[:, index]))) if len(fit.draws) else 0.0
    return bool(at(fit.theta[index])), share if share > AT_BOUND else 0.0


def _fitted_recipes(fit: LawFit) -> list[str]:
    used = [run.recipe for run, used in zip(fit.runs, fit.used, strict=True) if used]
    return [recipe for recipe in dict.fromkeys(used) if recipe != fit.baseline]


def _points(fit: LawFit) -> list[dict[str, Any]]:
    """Runs that were fitted or held out; of those whose efficiencies are not known there is no prediction."""
    rows = zip(fit.runs, fit.predicted, fit.held, fit.used, strict=True)
    return [
        {"recipe": run.recipe, "seed": run.seed, "N": run.N, "D": run.D, "loss": run.loss,
         "predicted": float(predicted), "residual": run.loss - float(predicted), "held_out": bool(held)}
        for run, predicted, held, used in rows if used or (held and _is_known(fit, run.recipe))
    ]  # fmt: skip


def _is_known(fit: LawFit, recipe: str) -> bool:
    """Whether the recipe's efficiencies are 1, held or fitted, be it to runs of other recipes that share them."""
    indices = [fit.index_of(recipe, which) for which in fit.law.efficiencies]
    return all(index is None or index in fit.free or index in fit.holding for index in indices)


def _fit(fit: LawFit, points: list[dict[str, Any]]) -> dict[str, Any]:
    held = [point["residual"] for point in points if point["held_out"]]
    used = [point["residual"] for point in points if not point["held_out"]]
    constants = [run.loss - predicted for run, predicted, first in zip(fit.runs, fit.predicted, fit.first, strict=True)
                 if first]  # fmt: skip
    return {
        "huber_delta": fit.huber_delta,
        "objective": fit.objective,
        "points": len(used),
        "points_of_constants": int(fit.first.sum()),
        "starts": fit.starts,
        "starts_at_minimum": fit.agreeing,
        "bootstrap_draws": len(fit.draws),
        "rmse": _rms(used),
        "rmse_of_constants": _rms(constants),
        "held_out_points": len(held),
        "held_out_rmse": _rms(held),
    }


def _rms(residuals: list[float]) -> float | None:
    return float(np.sqrt(np.mean(np.square(residuals)))) if residuals else None


def _of_data(fit: LawFit) -> list[str]:
    """What the placing of the runs leaves open, whatever their losses."""
    runs = [run for run, used in zip(fit.runs, fit.first, strict=True) if used]
    free = {name for name, term in (("N", {A, ALPHA}), ("D", {B, BETA})) if term & {*fit.free}}
    found = []
    for name, exponent in (("N", "alpha"), ("D", "beta")):
        if name not in free:
            continue
        values = np.array([getattr(run, name) for run in runs])
        span, distinct = values.max() / values.min(), len(np.unique(values))
        if span < SPAN or distinct < 3:
            found.append(
                f"{name} spans a factor of {span:.3g} in {distinct} values: {exponent} and E are told apart by "
                "curvature alone, and what the law says beyond that span is extrapolation"
            )
    log_N, log_D = np.log([run.N for run in runs]), np.log([run.D for run in runs])
    together = float(np.corrcoef(log_N, log_D)[0, 1]) if np.ptp(log_N) and np.ptp(log_D) else 0.0
    if abs(together) > TIED and len(free) == 2:
        found.append(
            f"N and D grow together (correlation {together:.2f}): the terms of N and D cannot be told apart; vary D/N"
        )
    return found


def _of_search(fit: LawFit) -> list[str]:
    if fit.agreeing >= 0.2:
        return []
    return [f"only {fit.agreeing:.0%} of {fit.starts} starts reached the best objective: there may be a better one"]


def _of_constants(fit: LawFit, constants: dict[str, dict[str, Any]]) -> list[str]:
    found = []
    for name, constant in constants.items():
        if constant["identified"]:
            continue
        fitted, share = _at_bound(fit, CONSTANTS.index(name))
        if _is_flat(fit, CONSTANTS.index(name)):
            found.append(f"{name} is not identified: {UNDETERMINED}")
        elif fitted or share:
            where = " and ".join(["the fit"] * fitted + [f"{share:.0%} of the draws"] * bool(share))
            found.append(f"{name} is not identified: at its bound in {where}")
        else:
            partner = {"A": "alpha", "B": "beta"}.get(name)
            why = f"; it trades off against {partner}, and only the two together are known" if partner else ""
            found.append(f"{name} is not identified: its interval spans a factor of {_spread(constant):.3g}{why}")
    return found


def _of_efficiencies(fit: LawFit, efficiencies: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    return [
        f"{which} of {recipe} is not identified: "
        + (
            UNDETERMINED
            if fit.index_of(recipe, which) in fit.flat
            else f"its interval spans a factor of {_spread(estimate):.3g}"
        )
        for recipe, estimates in efficiencies.items()
        for which, estimate in estimates.items()
        if _spread(estimate) > IDENTIFIED
    ]


def _of_held_out(points: list[dict[str, Any]]) -> list[str]:
    """Against the fitted runs of the same recipes: those of a recipe that no law fits would excuse any miss."""
    recipes = {point["recipe"] for point in points if point["held_out"]}
    of_these = [point for point in points if point["recipe"] in recipes]
    inside, outside = (_rms([p["residual"] for p in of_these if p["held_out"] is flag]) for flag in (False, True))
    if inside is None or outside is None or outside <= 3 * inside:
        return []
    return [f"held-out runs are missed by {outside:.4f} nats (rms); the fitted ones of their recipes by {inside:.4f}"]
