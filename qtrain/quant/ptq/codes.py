"""Codes of a weight, of which each column makes up for the errors of those before it: GPTQ, arXiv 2210.17323."""

# N out features, K in features

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qtrain.quant.ptq.scales import Scales, scales_of
from qtrain.quant.quantizer import Quantizer
from qtrain_kernels.qtensor import QTensor
from qtrain_kernels.reference import round_nearest

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


def quantize_weight(weight: Tensor, hessian: Tensor, quantizer: Quantizer, method: Method) -> QTensor:
    """weight: (N, K) in rotated space; hessian: (K, K) of the rotated inputs -> the codes and scales of a quantiser's
    format, in floats beside their block scales. Scales are those of the original weight, whatever the codes."""
    weight = weight.float()
    importance = hessian.diagonal() if method.weighted else None
    scales = scales_of(weight, quantizer, method.search, method.norm, importance)
    if method.compensation == "none":
        return scales.qtensor(_nearest(weight, scales))
    return scales.qtensor(compensated(weight, hessian, scales, method.order, method.damping))


def compensated(
    weight: Tensor, hessian: Tensor, scales: Scales, order: Literal["natural", "activation"], damping: float
) -> Tensor:
    """Codes (N, K) float32, column by column: each is rounded to nearest, and its error is spread over the columns
    after it so that the output error over the Hessian's inputs is least.

    A column whose inputs were all zero gets the code nearest to zero. ValueError for a Hessian that is not finite, or
    not positive definite with this damping.
    """
    plan = scales.layout.plan
    assert plan is not None
    dead = hessian.diagonal() == 0
    hessian, weight = hessian.double().clone(), torch.where(dead, 0.0, weight)
    hessian.diagonal()[dead] = 1.0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    columns = torch.arange(weight.shape[1], device=weight.device)
    if order == "activation":
        columns = hessian.diagonal().argsort(descending=True, stable=True)
        hessian, weight = hessian[columns][:, columns], weight[:, columns]
    factor = _inverse_factor(hessian).float()
    scale = scales.of_columns(0, weight.shape[1]).expand(weight.shape)[:, columns]
    scale = torch.where(scale == 0, 1.0, scale).T.contiguous()  # of a column, one after the other
    left, codes = weight.T.contiguous(), torch.empty_like(weight.T, memory_format=torch.contiguous_format)
    for begin in range(0, len(left), COLUMNS_AT_ONCE):
        end = min(begin + COLUMNS_AT_ONCE, len(left))
        errors = torch.empty_like(left[begin:end])
        for j in range(begin, end):
            codes[j] = round_nearest(left[j] / scale[j], plan.element)
            errors[j - begin] = (left[j] - codes[j] * scale[j]) / factor[j, j]
            left[j + 1 : end].addr_(factor[j, j + 1 : end], errors[j - begin], alpha=-1)
        left[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    found = torch.empty_like(codes)
    found[columns] = codes
    return found.T.contiguous()


def _inverse_factor(hessian: Tensor) -> Tensor:
    """U, upper triangular, of which U^T U is the inverse of a positive definite matrix (K, K)."""
    lower, info = torch.linalg.cholesky_ex(hessian)
    if info or not lower.isfinite().all():
        raise ValueError(
            "the inputs' second moments are not positive definite, or not finite; raise the damping, or calibrate on "
            "more text"
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def _nearest(weight: Tensor, scales: Scales) -> Tensor:
    scale = scales.of_columns(0, weight.shape[1])
    assert scales.layout.plan is not None
    return round_nearest(weight / torch.where(scale == 0, 1.0, scale), scales.layout.plan.element)


def relative_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """|(W - W') X|^2 / |W X|^2 over the inputs of a Hessian; weights (N, K), hessian (K, K)."""
    difference = weight - quantized
    wrong = torch.einsum("nk,nk->", difference @ hessian, difference).item()
    return wrong / max(torch.einsum("nk,nk->", weight @ hessian, weight).item(), torch.finfo(torch.float32).tiny)
