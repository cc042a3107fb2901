"""Codes of a weight, of which each column makes up for the errors of those before it: GPTQ, arXiv 2210.17323."""

# N out features, K in features

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qtrain.quant.ptq.scales import Scales, nearest, scales_of
from qtrain.quant.quantizer import Quantizer
from qtrain_kernels.qtensor import QTensor
from qtrain_kernels.reference import nearest_code

COLUMNS_AT_ONCE = 128  # whose errors are spread among themselves before they reach the rest


@dataclass(frozen=True)
class Method:
    """How a weight gets its codes. The format, its scale rule and the rotation are the recipe's.

    search: how many scales are tried for each block, 0 for the recipe's rule alone; norm: of the error that is least.
    weighted: the search counts columns by the second moments of their inputs.
    compensation: none (to nearest) | gptq. order: of the columns, natural | activation (by falling second moment, under
    the scales of the original weight). damping: added to the Hessian's diagonal, in means of it.
    """

    search: int = 0
    norm: float = 2.4
    weighted: bool = False
    compensation: Literal["none", "gptq"] = "none"
    order: Literal["natural", "activation"] = "natural"
    damping: float = 0.01


def quantize_weight(
    weight: Tensor, hessian: Tensor, quantizer: Quantizer, method: Method, outliers: Tensor | None = None
) -> tuple[QTensor, Tensor]:
    """weight: (N, K) in rotated space; hessian: (K, K) of the rotated inputs; outliers: (N, K) bool, which elements
    stay in bfloat16 -> the codes and scales of a quantiser's format, in floats beside their block scales, and what is
    added to them, (N, K), zero but for outliers. Scales are those of the original weight without its outliers, whatever
    the codes."""
    weight = weight.float()
    outliers = torch.zeros_like(weight, dtype=torch.bool) if outliers is None else outliers
    importance = hessian.diagonal() if method.weighted else None
    scales = scales_of(weight.masked_fill(outliers, 0.0), quantizer, method.search, method.norm, importance)
    if method.compensation == "none":
        codes, values = nearest(weight, scales)
        beside = _beside(weight, values, outliers)
    else:
        codes, beside = compensated(weight, hessian, scales, method.order, method.damping, outliers)
    return scales.qtensor(codes), beside


def compensated(
    weight: Tensor, hessian: Tensor, scales: Scales, order: Literal["natural", "activation"], damping: float,
    outliers: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes (N, K) float32, column by column: each is rounded to nearest, and its error is spread over the columns
    after it so that the output error over the Hessian's inputs is least. Scales and zero points stay as they are.
    Outliers have codes too, and beside them (N, K) float32 what is left of their value at that time, rounded to
    bfloat16.

    A column whose inputs were all zero gets the code nearest to zero. ValueError for a Hessian that is not finite, or
    not positive definite with this damping.
    """
    plan = scales.layout.plan
    assert plan is not None
    hessian, dead = damped(hessian, damping)
    weight = torch.where(dead, 0.0, weight)
    outliers = torch.zeros_like(weight, dtype=torch.bool) if outliers is None else outliers & ~dead
    columns = torch.arange(weight.shape[1], device=weight.device)
    if order == "activation":
        columns = hessian.diagonal().argsort(descending=True, stable=True)
        hessian, weight = hessian[columns][:, columns], weight[:, columns]
    factor = inverse_factor(hessian).float()
    scale = scales.of_columns(0, weight.shape[1]).expand(weight.shape)[:, columns]
    scale = torch.where(scale == 0, 1.0, scale).T.contiguous()  # of a column, one after the other
    zeros = scales.zero_points_of_columns()
    zeros = None if zeros is None else zeros[:, columns].T.contiguous()
    left, kept = weight.T.contiguous(), outliers[:, columns].T.contiguous()
    codes, beside = torch.zeros_like(left), torch.zeros_like(left)
    for begin in range(0, len(left), COLUMNS_AT_ONCE):
        end = min(begin + COLUMNS_AT_ONCE, len(left))
        errors = torch.empty_like(left[begin:end])
        for j in range(begin, end):
            codes[j] = nearest_code(left[j] / scale[j], plan.element, None if zeros is None else zeros[j])
            value = codes[j] * scale[j]
            beside[j] = _beside(left[j], value, kept[j])
            errors[j - begin] = (left[j] - value - beside[j]) / factor[j, j]
            left[j + 1 : end].addr_(factor[j, j + 1 : end], errors[j - begin], alpha=-1)
        left[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    back = columns.argsort()
    return codes[back].T.contiguous(), beside[back].T.contiguous()


def _beside(weight: Tensor, values: Tensor, outliers: Tensor) -> Tensor:
    return torch.where(outliers, (weight - values).bfloat16().float(), 0.0)


def damped(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """hessian: (K, K) -> (the same in float64 with 1 for the diagonal of dead columns, and with damping times the mean
    of the diagonal added to it; which columns are dead: all of their inputs were zero)."""
    dead, hessian = hessian.diagonal() == 0, hessian.double().clone()
    hessian.diagonal()[dead] = 1.0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    return hessian, dead


def inverse_factor(hessian: Tensor) -> Tensor:
    """U, upper triangular, of which U^T U is the inverse of a positive definite matrix (K, K)."""
    lower, info = torch.linalg.cholesky_ex(hessian)
    if info or not lower.isfinite().all():
        raise ValueError(
            "the inputs' second moments are not positive definite, or not finite; raise the damping, or calibrate on "
            "more text"
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def relative_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """|(W - W') X|^2 / |W X|^2 over the inputs of a Hessian; weights (N, K), hessian (K, K)."""
    difference = weight - quantized
    wrong = torch.einsum("nk,nk->", difference @ hessian, difference).item()
    return wrong / max(torch.einsum("nk,nk->", weight @ hessian, weight).item(), torch.finfo(torch.float32).tiny)
