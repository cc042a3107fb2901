"""Which input columns and which elements of a weight stay in 16 bits, and what becomes of the rest."""

# N out features, K in features, C outlier columns, B = K / size blocks that share a scale

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtrain.quant.ptq.codes import damped, inverse_factor
from qtrain.quant.ptq.scales import Scales, nearest, scales_of
from qtrain.quant.quantizer import Quantizer

LEAST_TRIED, SHARE_TRIED = 4, 64  # max(4, size / 64) of the largest of a block are tried as outliers


@dataclass(frozen=True)
class Split:
    """Which parts of a weight stay in 16 bits.

    columns: so many input columns, those of the largest magnitude of inputs on the calibration text (QUIK). above:
    every column with a larger magnitude there; None for no such (LLM.int8 has 6, and finds the columns anew in each
    batch). weights: a threshold of `sensitive`; None for no elements (SpQR has 0.2).
    """

    columns: int = 0
    above: float | None = None
    weights: float | None = None

    def __str__(self) -> str:
        """Without spaces, "" for no split."""
        parts = {"columns": self.columns or None, "above": self.above, "weights": self.weights}
        return "".join(f"-{name}{value:g}" for name, value in parts.items() if value is not None)

    def columns_of(self, largest: Tensor) -> Tensor:
        """largest: (K,) magnitudes of inputs -> the columns that stay, (C,) int64, ascending. Of equal magnitudes the
        first come first. ValueError where no column is left to quantise."""
        chosen = torch.zeros_like(largest, dtype=torch.bool)
        chosen[largest.argsort(descending=True, stable=True)[: self.columns]] = True
        if self.above is not None:
            chosen |= largest > self.above
        if chosen.all():
            raise ValueError(
                f"all of its {len(largest)} input columns would be outliers, the largest inputs lying between "
                f"{largest.min():.3g} and {largest.max():.3g}; ask for fewer columns, or for a higher bound"
            )
        return chosen.nonzero().squeeze(1)


def eliminated(hessian: Tensor, columns: Tensor, damping: float) -> Tensor:
    """hessian: (K, K) -> (K, K), that of the other columns while these C take whatever values make up best for the
    errors of the others: H_kk - H_kc (H_cc + damping mean(diag H_cc))^-1 H_ck. Rows and columns of the C are zero.

    Codes that are chosen under it are those of GPTQ with the outlier columns last.
    """
    if not columns.numel():
        return hessian
    h = hessian.double()
    left = h - h[:, columns] @ torch.linalg.solve(_within(h, columns, damping), h[columns])
    left = (left + left.T) / 2
    left[columns], left[:, columns] = 0.0, 0.0
    return left.to(hessian.dtype)


def make_up(weight: Tensor, quantized: Tensor, hessian: Tensor, columns: Tensor, damping: float) -> Tensor:
    """The values (N, C) of the outlier columns that make up best for the errors of the others: weight and quantized
    (N, K), whose C columns are not read in the second, out of rotation; hessian: (K, K)."""
    h = hessian.double()
    errors = (weight - quantized).double().index_fill(1, columns, 0.0)
    update = torch.linalg.solve(_within(h, columns, damping), h[columns] @ errors.T).T
    return weight[:, columns] + update.to(weight.dtype)


def _within(hessian: Tensor, columns: Tensor, damping: float) -> Tensor:
    return damped(hessian[columns][:, columns], damping)[0]


def sensitive(weight: Tensor, hessian: Tensor, quantizer: Quantizer, threshold: float, damping: float) -> Tensor:
    """Which elements of a weight (N, K) in rotated space stay, (N, K) bool. Source: SpQR, arXiv 2306.03078.
    SpQR leaves out single elements of a group when GPTQ reaches it, and stores the scales of groups in 3 bits; here the
    outliers are those of the original weight, and scales are of the recipe's format.

    The sensitivity of an element is error^2 / [H^-1]_kk, and the limit is threshold * mean_k(var_n(w) / [H^-1]_kk). An
    outlier has to lower the sum of all sensitivities by more than the limit, be it by its own error or by a finer scale
    for its block. So in each block the m largest are left out, under the recipe's rule for the rest, for the m of the
    least sum of min(sensitivity, limit), an outlier counting as the limit; then all above the limit are outliers too.
    ValueError for a format whose scales are not of parts of rows.
    """
    layout = scales_of(weight, quantizer).layout
    if layout.rows != 1 or layout.plan is None or (layout.size is None and layout.plan.whole):
        raise ValueError(
            f"{quantizer.spec.format} has a scale for several rows, and outliers are chosen in a row; take a format "
            "with scales of blocks or rows, or no outliers by element"
        )
    full, dead = damped(hessian, damping)
    importance = torch.where(dead, 0.0, 1.0 / inverse_factor(full).square().sum(0)).float()
    limit = threshold * (weight.var(0) * importance).mean()
    size = layout.size or weight.shape[1]
    rank = _ranks(weight.unflatten(1, (-1, size)).abs())
    best, least = None, None
    for tried in range(max(LEAST_TRIED, size // SHARE_TRIED) + 1):
        out = rank < tried
        left = weight.masked_fill(out.flatten(1), 0.0)
        error = _sensitivity(left, scales_of(left, quantizer), importance).view_as(rank)
        out = out | (error > limit)
        cost = error.masked_fill(out, limit.item()).sum(2, keepdim=True)
        lower = torch.ones_like(cost, dtype=torch.bool) if least is None else cost < least
        best = out if best is None else torch.where(lower, out, best)
        least = cost if least is None else torch.where(lower, cost, least)
    assert best is not None
    return best.flatten(1)


def _ranks(magnitudes: Tensor) -> Tensor:
    """(N, B, size) -> of each in its block, 0 for the largest."""
    return magnitudes.argsort(dim=2, descending=True, stable=True).argsort(dim=2)


def _sensitivity(weight: Tensor, scales: Scales, importance: Tensor) -> Tensor:
    return (nearest(weight, scales)[1] - weight).square() * importance
