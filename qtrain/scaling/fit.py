"""The numerics of a fit: Huber loss on log residuals, minimised for many starts or many bootstrap draws at once.

In the published fits Huber's delta (1e-4 on log loss) is small against the noise, so that the objective is nearly the
sum of absolute residuals. It is minimised by Levenberg and Marquardt's steps on weighted squares, the weight of a
residual r being min(1, delta / |r|), from a large delta down to the one that is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from qtrain.scaling.laws import ALPHA, BETA, BOUNDS, CONSTANTS, GAMMA, A, Array, B, Design, E, G, log_loss

COARSE_DELTAS = (1.0, 0.03, 0.003)  # before the one that is asked for
FLOORS = (0.1, 0.4, 0.6, 0.8, 0.95)  # of starts: E over the least loss
GAMMAS = (0.15, 0.35, 0.7, 1.0, 2.0)
SLOPES = (0.03, 0.1, 0.3)  # gamma times alpha or beta
SHARES = (0.2, 0.5, 0.8)  # of A's term in the sum
COARSE_STEPS = 40
SETTLED = 1e-9  # a step that lowers the objective relatively less than this, three times in a row, ends it


@dataclass(frozen=True)
class Minimum:
    """theta: (S, P). objective: (S,) sum of Huber losses of the log residuals."""

    theta: Array
    objective: Array


def bounds(design: Design) -> tuple[Array, Array]:
    """Lowest and highest theta, (P,)."""
    low, high = np.full(design.width, -np.inf), np.full(design.width, np.inf)
    for index, name in enumerate(CONSTANTS):
        if name in BOUNDS:
            low[index], high[index] = np.log(BOUNDS[name])
    first = len(CONSTANTS)
    low[first:], high[first:] = np.log(BOUNDS["efficiency"])
    return low, high


def huber(residuals: Array, delta: float) -> Array:
    """Sum over the last axis of r^2 / 2, or delta (|r| - delta / 2) beyond delta."""
    size = np.abs(residuals)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta)).sum(axis=-1)


def minimise(
    design: Design, log_losses: Array, start: Array, free: Array, delta: float, limits: tuple[Array, Array],
    coarse: tuple[float, ...] = (), steps: int = 1500,
) -> Minimum:  # fmt: skip
    """The nearest minimum from each start.

    log_losses: (n,) of all, or (S, n). start: (S, P). free: indices into theta of what is fitted; the rest stays.
    limits: lowest and highest theta. coarse: deltas to go through before, those that are larger.
    """
    theta = start.copy()
    theta[:, free] = np.clip(start, *limits)[:, free]
    targets = np.broadcast_to(log_losses, (len(theta), log_losses.shape[-1]))
    for larger in coarse:
        if larger > delta:
            theta = _descend(design, targets, theta, free, larger, limits, COARSE_STEPS)
    theta = _descend(design, targets, theta, free, delta, limits, steps)
    return Minimum(theta, huber(log_loss(theta, design)[0] - targets, delta))


def _descend(
    design: Design, targets: Array, start: Array, free: Array, delta: float, limits: tuple[Array, Array], steps: int
) -> Array:
    result = start.copy()
    low, high = (limit[free] for limit in limits)
    going = np.arange(len(start))
    theta, damping, settled = start.copy(), np.full(len(start), 1e-3), np.zeros(len(start), dtype=int)
    values, jacobian = log_loss(theta, design)
    residuals = values - targets
    objective = huber(residuals, delta)
    for _ in range(steps):
        if not len(going) or not len(free):
            break
        change = _step(jacobian[:, :, free], residuals, theta[:, free], (low, high), damping, delta)
        proposal = theta.copy()
        proposal[:, free] = np.clip(theta[:, free] - change, low, high)
        with np.errstate(over="ignore", invalid="ignore"):
            values, new_jacobian = log_loss(proposal, design)
            new_residuals = values - targets[going]
            new_objective = huber(new_residuals, delta)
        better = new_objective < objective
        small = ~better | (objective - new_objective < SETTLED * objective)
        settled = np.where(better & ~small, 0, settled + (small & (better | (damping > 1e3))))
        damping = np.clip(np.where(better, damping * 0.2, damping * 5), 1e-12, 1e12)
        theta[better], residuals[better] = proposal[better], new_residuals[better]
        jacobian[better], objective[better] = new_jacobian[better], new_objective[better]
        keep = settled < 3
        if not keep.all():
            result[going[~keep]] = theta[~keep]
            going, theta, damping, settled = going[keep], theta[keep], damping[keep], settled[keep]
            residuals, jacobian, objective = residuals[keep], jacobian[keep], objective[keep]
    result[going] = theta
    return result


def _step(
    jacobian: Array, residuals: Array, theta: Array, limits: tuple[Array, Array], damping: Array, delta: float
) -> Array:
    """(S, F): the damped Gauss-Newton step; what would leave its bounds stays where it is."""
    weights = delta / np.maximum(np.abs(residuals), delta)
    weighted = jacobian * weights[:, :, None]
    gradient = np.einsum("snf,sn->sf", weighted, residuals)
    normal = np.matmul(weighted.transpose(0, 2, 1), jacobian)
    stuck = ((theta <= limits[0]) & (gradient > 0)) | ((theta >= limits[1]) & (gradient < 0))
    gradient[stuck] = 0
    normal *= ~stuck[:, :, None] & ~stuck[:, None, :]
    width = normal.shape[-1]
    diagonal = normal[:, range(width), range(width)]
    normal[:, range(width), range(width)] += damping[:, None] * diagonal + stuck + 1e-14
    change = np.linalg.solve(normal, gradient[:, :, None])[:, :, 0]
    return np.clip(change, -2.0, 2.0)


def starts(design: Design, log_losses: Array, theta: Array, free: list[int]) -> Array:
    """(S, P): thetas spread over what laws of language models look like, at the level of the data; theta itself where
    nothing of a law is free. Of equal starts one is kept."""
    level, least = np.exp(np.median(log_losses)), np.exp(np.min(log_losses))
    found = []
    for floor, gamma, slope, share in product(FLOORS, GAMMAS, SLOPES, SHARES):
        reducible = np.log(max(level - floor * least, 0.02 * level))
        gamma = gamma if GAMMA in free else np.exp(theta[GAMMA])
        spread = {E: np.log(floor * least), GAMMA: np.log(gamma), ALPHA: np.log(slope / gamma),
                  BETA: np.log(slope / gamma), A: reducible + gamma * np.log(share),
                  B: reducible + gamma * np.log(1 - share), G: 4.0}  # fmt: skip
        one = theta.copy()
        for index in set(spread) & set(free):
            one[index] = spread[index]
        found.append(one)
    return np.unique(found, axis=0)
