"""Scaling laws as data: which constants a law has, which are held, and where the form comes from.

All are one formula. N non-embedding parameters, D training tokens, L loss in nats per token:

    L = E + (A / (N eff_N)^alpha + B / (D eff_D)^beta + Q)^gamma
    Q = (D^beta / N^alpha) log2(block) / (G (exponent + 0.5)^delta (mantissa + 0.5)^nu)

eff_N and eff_D are 1 for the baseline and belong to a recipe otherwise. Q is there in the floating-point law alone,
which has gamma = 1 and no efficiencies.

Fitted are `theta`: a = gamma log(A / N0^alpha) and b likewise, at the geometric means N0 and D0 of the data, and the
logarithms of all others. A and alpha alone are nearly degenerate (N^alpha at 1e8 turns a small change of alpha into a
large one of A); a and alpha are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from qtrain.errors import UserError

Array = np.ndarray

CONSTANTS = ("A", "alpha", "B", "beta", "E", "gamma", "G", "delta", "nu")
A, ALPHA, B, BETA, E, GAMMA, G, DELTA, NU = range(len(CONSTANTS))

# What a constant may be
BOUNDS = {"alpha": (0.005, 5.0), "beta": (0.005, 5.0), "E": (1e-4, 100.0), "gamma": (0.02, 20.0),
          "delta": (0.02, 50.0), "nu": (0.02, 50.0), "efficiency": (1e-7, 100.0)}  # fmt: skip


@dataclass(frozen=True)
class Law:
    """fixed: constants that are held. efficiencies: what a recipe has. joint: fitted to all runs at once, as its source
    did, instead of to the baseline first and to each recipe then. huber_delta: of the source, on log loss."""

    name: str
    formula: str
    source: str
    huber_delta: float
    constants: tuple[str, ...] = CONSTANTS[:6]
    fixed: Mapping[str, float] = field(default_factory=dict)
    efficiencies: tuple[str, ...] = ("eff_N", "eff_D")
    joint: bool = False

    @property
    def quantised_term(self) -> bool:
        return "G" in self.constants

    def free(self, held: Mapping[str, float]) -> list[str]:
        """The constants that data decide."""
        return [name for name in self.constants if name not in held]


LAWS = {
    law.name: law
    for law in (
        Law(
            "quartet",
            "(A / (N eff_N)^alpha + B / (D eff_D)^beta)^gamma + E",
            "Quartet, arXiv 2505.14669, equation 1; the form of Busbridge et al., arXiv 2502.08606",
            huber_delta=1e-4,
        ),
        Law(
            "chinchilla",
            "A / (N eff_N)^alpha + B / (D eff_D)^beta + E",
            "Hoffmann et al., arXiv 2203.15556: gamma = 1",
            huber_delta=1e-3,
            fixed={"gamma": 1.0},
        ),
        Law(
            "kaplan",
            "(A / (N eff_N)^alpha + B / (D eff_D))^gamma + E",
            "Kaplan et al., arXiv 2001.08361, with the E that Quartet gives it: beta = 1 (E = 0 is Kaplan's own)",
            huber_delta=1e-4,
            fixed={"beta": 1.0},
        ),
        Law(
            "quest",
            "A / (N eff_N)^alpha + B / D^beta + E",
            "QuEST, arXiv 2502.05003, equation 5",
            huber_delta=1e-3,
            fixed={"gamma": 1.0},
            efficiencies=("eff_N",),
            joint=True,
        ),
        Law(
            "floating_point",
            "A / N^alpha + B / D^beta + E + (D^beta / N^alpha) log2(block) / "
            "(G (exponent + 0.5)^delta (mantissa + 0.5)^nu)",
            "Scaling laws for floating-point quantisation training, arXiv 2501.02423",
            huber_delta=1e-3,
            constants=CONSTANTS,
            fixed={"gamma": 1.0},
            efficiencies=(),
            joint=True,
        ),
    )
}


def law_named(name: str) -> Law:
    if name not in LAWS:
        raise UserError(f"there is no law named {name!r}; there are: {', '.join(LAWS)}")
    return LAWS[name]


@dataclass(frozen=True)
class Design:
    """What the loss of n runs depends on, and which efficiency each run has.

    log_size, log_tokens (of N and D), log_exponent, log_mantissa: (n,) less their `centre`; log_log2_block: (n,),
    -inf without Q. size_group, token_group: (n,) index of the run's efficiency of N and of D, -1 for 1; `groups` has
    how many of each there are.
    """

    log_size: Array
    log_tokens: Array
    log_exponent: Array
    log_mantissa: Array
    log_log2_block: Array
    centre: tuple[float, float, float, float]
    size_group: Array
    token_group: Array
    groups: tuple[int, int] = (0, 0)

    @property
    def width(self) -> int:
        """Length of a theta."""
        return len(CONSTANTS) + sum(self.groups)

    def subset(self, keep: Array) -> Design:
        cut = {
            name: getattr(self, name)[keep]
            for name in (
                "log_size",
                "log_tokens",
                "log_exponent",
                "log_mantissa",
                "log_log2_block",
                "size_group",
                "token_group",
            )
        }
        return Design(**cut, centre=self.centre, groups=self.groups)


def log_loss(theta: Array, design: Design) -> tuple[Array, Array]:
    """log L of each run and its derivatives: (S, n) and (S, n, P) of S thetas (S, P) and n runs."""
    alpha, beta, floor, gamma, delta, nu = np.exp(theta[:, [ALPHA, BETA, E, GAMMA, DELTA, NU]]).T[:, :, None]
    a, b, g = theta[:, [A, B, G]].T[:, :, None]
    first_D = len(CONSTANTS) + design.groups[0]
    efficiency_N, efficiency_D = theta[:, len(CONSTANTS) : first_D], theta[:, first_D:]
    log_N = design.log_size + _of_group(efficiency_N, design.size_group)
    log_D = design.log_tokens + _of_group(efficiency_D, design.token_group)
    q = beta * log_D - alpha * log_N + design.log_log2_block - g
    q = q - delta * design.log_exponent - nu * design.log_mantissa
    terms = np.stack(np.broadcast_arrays(a / gamma - alpha * log_N, b / gamma - beta * log_D, q))
    largest = terms.max(axis=0)
    shares = np.exp(terms - largest)
    total = shares.sum(axis=0)
    log_sum = largest + np.log(total)
    reducible = np.exp(gamma * log_sum)
    loss = floor + reducible
    above_floor = reducible / loss
    in_N, in_D, in_Q = shares / total * above_floor

    slope_N = -gamma * alpha * (in_N + in_Q)  # by log N
    slope_D = -gamma * beta * (in_D - in_Q)
    jacobian = np.empty((*loss.shape, design.width))
    for index, column in {
        A: in_N, ALPHA: slope_N * log_N, B: in_D, BETA: slope_D * log_D, E: floor / loss,
        GAMMA: above_floor * gamma * log_sum - in_N * a - in_D * b, G: -gamma * in_Q,
        DELTA: -gamma * in_Q * delta * design.log_exponent, NU: -gamma * in_Q * nu * design.log_mantissa,
    }.items():  # fmt: skip
        jacobian[:, :, index] = column
    for group in range(design.groups[0]):
        jacobian[:, :, len(CONSTANTS) + group] = slope_N * (design.size_group == group)
    for group in range(design.groups[1]):
        jacobian[:, :, first_D + group] = slope_D * (design.token_group == group)
    return np.log(loss), jacobian


def _of_group(efficiencies: Array, group: Array) -> Array:
    """(S, n): the log efficiency of each run, 0 where its group is -1."""
    padded = np.concatenate((efficiencies, np.zeros((len(efficiencies), 1))), axis=1)
    return padded[:, group]


def theta_of(constants: Mapping[str, float], centre: tuple[float, float, float, float]) -> Array:
    """(9,): the theta of a law's constants; what a law lacks is neutral."""
    neutral = dict.fromkeys(CONSTANTS, 1.0) | dict(constants)
    with np.errstate(divide="ignore"):
        theta = np.log(np.array([neutral[name] for name in CONSTANTS], dtype=np.float64))
    log_N, log_D, log_exponent, log_mantissa = centre
    alpha, beta, gamma, delta, nu = (neutral[name] for name in ("alpha", "beta", "gamma", "delta", "nu"))
    theta[A] = gamma * (theta[A] - alpha * log_N)
    theta[B] = gamma * (theta[B] - beta * log_D)
    theta[G] += alpha * log_N - beta * log_D + delta * log_exponent + nu * log_mantissa
    return theta


def constants_of(theta: Array, centre: tuple[float, float, float, float]) -> Array:
    """(S, 9): the constants of S thetas, the inverse of `theta_of`."""
    log_N, log_D, log_exponent, log_mantissa = centre
    found = np.exp(theta[:, : len(CONSTANTS)])
    alpha, beta, gamma, delta, nu = found[:, [ALPHA, BETA, GAMMA, DELTA, NU]].T
    with np.errstate(over="ignore"):
        found[:, A] = np.exp(theta[:, A] / gamma + alpha * log_N)
        found[:, B] = np.exp(theta[:, B] / gamma + beta * log_D)
        shift = beta * log_D - alpha * log_N - delta * log_exponent - nu * log_mantissa
        found[:, G] = np.exp(theta[:, G] + shift)
    return found
