"""Matrix products on 8-bit units: integer codes as INT8, exactly; values of few bits as FP8 with a scale per line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import ScalingType, scaled_mm

from qtrain_kernels.precision import matmul
from qtrain_kernels.reference import biased_exponent, power_of_two

LONGEST = 2**15  # of a contraction whose doubled products of 8 bits stay within int32: 255^2 * 2^15 < 2^31
CUDA_MULTIPLE, CUDA_ROWS = 8, 32  # torch._int_mm there: more than 16 rows; the other sizes multiples of 8
EXACT_IN_FLOAT32 = 2**10  # products of 2^14, within 2^24
FP8_MULTIPLE = 16  # of its contraction and columns, on CUDA
TOP = {torch.float8_e4m3fn: 8, torch.float8_e5m2: 15}  # exponent of the largest number, 1.75 * 2^TOP in both


def int8_matmul(left: Tensor, right: Tensor, left_offset: float = 0.0, right_offset: float = 0.0) -> Tensor:
    """(left + left_offset) @ (right + right_offset), float32: the exact product, rounded once.

    left (M, K), right (K, N) int8; offsets 0 or 1/2. ValueError for anything else.
    """
    _check_product(left, right, (torch.int8,))
    if not {left_offset, right_offset} <= {0.0, 0.5}:
        raise ValueError(f"offsets of integer codes are 0 or 1/2; got {left_offset} and {right_offset}")
    # 4 (l + a/2)(r + b/2) = 4 l r + 2 b l + 2 a r + a b
    a, b = round(2 * left_offset), round(2 * right_offset)
    found = None
    for first in range(0, left.shape[1], LONGEST):
        rows, columns = left[:, first : first + LONGEST], right[first : first + LONGEST]
        product = _int_mm(rows, columns)
        if a or b:
            product = product.mul_(4).add_(a * b * rows.shape[1])
            product = product.add_(rows.sum(1, keepdim=True, dtype=torch.int32), alpha=2 * b)
            product = product.add_(columns.sum(0, keepdim=True, dtype=torch.int32), alpha=2 * a)
        found = product if found is None else found.long() + product
    if found is None:
        return torch.zeros(left.shape[0], right.shape[1], device=left.device)
    return found.float() * 0.25 if a or b else found.float()


def _check_product(left: Tensor, right: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """ValueError for factors that no 8-bit unit multiplies."""
    for name, factor in (("left", left), ("right", right)):
        if factor.ndim != 2 or factor.dtype not in dtypes:
            wanted = " or ".join(map(str, dtypes))
            raise ValueError(f"{name} must be a matrix in {wanted}; got {tuple(factor.shape)} {factor.dtype}")
    if left.shape[1] != right.shape[0]:
        raise ValueError(f"left {tuple(left.shape)} and right {tuple(right.shape)} share no contraction")
    if left.device != right.device:
        raise ValueError(f"right is on {right.device}, left on {left.device}; move it with .to(left.device)")


def _int_mm(left: Tensor, right: Tensor) -> Tensor:
    """(M, K) @ (K, N) int8 -> int32, exact."""
    if left.is_cuda:
        return _int_mm_cuda(left, right)
    if not torch.cpu._is_vnni_supported() or 1 in (*left.shape, right.shape[1]):
        return _int_mm_by_float(left, right)
    return torch._int_mm(left, right)


def _int_mm_cuda(left: Tensor, right: Tensor) -> Tensor:
    """In the sizes and the layout that cuBLASLt takes: rows by columns."""
    rows, columns = left.shape[0], right.shape[1]
    few, missing, wide = max(CUDA_ROWS - rows, 0), -left.shape[1] % CUDA_MULTIPLE, -columns % CUDA_MULTIPLE
    return torch._int_mm(_filled(left, few, missing), _filled(right.T, wide, missing).T)[:rows, :columns]


def _int_mm_by_float(left: Tensor, right: Tensor) -> Tensor:
    """In float32, whose sums of 1024 products are exact. Processors without VNNI saturate sums of two products at 16
    bits; and oneDNN refuses some matrices with a size of 1, which torch (2.13) does not notice."""
    pieces = range(0, left.shape[1], EXACT_IN_FLOAT32)
    products = (
        matmul(left[:, at : at + EXACT_IN_FLOAT32].float(), right[at : at + EXACT_IN_FLOAT32].float()) for at in pieces
    )
    return sum((product.int() for product in products), torch.zeros((), dtype=torch.int32))


def _filled(x: Tensor, rows: int, columns: int) -> Tensor:
    """x, 8-bit, with so many rows and columns of zeros after its own, contiguous."""
    if rows or columns:
        x = F.pad(x.view(torch.uint8), (0, columns, 0, rows)).view(x.dtype)
    return x.contiguous()


# ----------------------------------------------------------------------------------------------------------------- FP8


class Folded(NamedTuple):
    """A matrix as codes * scale. codes: float8, its shape, the folded dim contiguous; scale: float32 powers of two, (M,
    1) or (1, N); inexact: () int64, elements that codes * scale does not give back."""

    codes: Tensor
    scale: Tensor
    inexact: Tensor


def fold(values: Tensor, dim: int, dtype: torch.dtype) -> Folded:
    """values (M, N) float32 or bfloat16 in float8, with one power of two along dim (-1: per row, -2: per column).

    The largest magnitude of a line comes to lie in (1.75 * 2^(TOP - 1), 1.75 * 2^TOP], or below where it is less than
    2^-117, so that float8_e4m3fn is exact for numbers of two significant bits, as MXFP4's are, down to 2^-16 of it, for
    four down to 2^-14; smaller ones are rounded, and counted. A line with a NaN has scale NaN. ValueError for a dtype
    that is none of these.
    """
    if dtype not in TOP:
        raise ValueError(f"values fold into {' or '.join(map(str, TOP))}; asked for {dtype}")
    if values.ndim != 2 or values.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"a matrix in float32 or bfloat16 folds; got {tuple(values.shape)} {values.dtype}")
    if not values.numel():
        shape = (values.shape[0], 1) if dim == -1 else (1, values.shape[1])
        nothing = values.new_zeros((), dtype=torch.int64)
        return Folded(values.to(dtype), values.new_ones(shape, dtype=torch.float32), nothing)
    largest = values.abs().amax(dim, keepdim=True).float()
    carried = largest.view(torch.int32) + 0x1FFFFF  # above 1.75: the next power of two
    biased = (biased_exponent(carried) - TOP[dtype]).clamp(1, 253)
    scale = torch.where(largest.isfinite(), power_of_two(biased), float("nan"))
    scaled = values * (1.0 / scale)
    lines = scaled.T if dim == -2 else scaled
    codes = lines.to(dtype, memory_format=torch.contiguous_format)
    codes = codes.T if dim == -2 else codes
    return Folded(codes, scale, ((codes.float() != scaled) & scaled.isfinite()).sum())


def fp8_matmul(left: Folded, right: Folded, fast: bool = False) -> Tensor:
    """(M, K) @ (K, N) of matrices folded along K -> bfloat16: sums in float32, rounded once.

    fast: CUDA's FP8 units keep the sums themselves, in fewer bits; else their partial sums are added up in float32. On
    CPU both are the float32 product of codes * scale. ValueError for factors that do not fit.
    """
    _check_product(left.codes, right.codes, tuple(TOP))
    if right.codes.dtype == torch.float8_e5m2:
        raise ValueError("right must be in float8_e4m3fn: CUDA multiplies by no other; got torch.float8_e5m2")
    if not left.codes.numel() or not right.codes.numel():
        shape = left.codes.shape[0], right.codes.shape[1]
        return torch.zeros(shape, dtype=torch.bfloat16, device=left.codes.device)
    if left.codes.is_cuda:
        return _scaled_mm(left, right, fast)
    # torch's scaled_mm has no CPU kernel before torch 2.12; from then on it takes this very product.
    return matmul(left.codes.float() * left.scale, right.codes.float() * right.scale).bfloat16()


def _scaled_mm(left: Folded, right: Folded, fast: bool) -> Tensor:
    """In the sizes and the layout that cuBLASLt takes: rows by columns, 16 elements at a time."""
    rows, columns = left.codes.shape[0], right.codes.shape[1]
    missing, wide = -left.codes.shape[1] % FP8_MULTIPLE, -columns % FP8_MULTIPLE
    a, b = _filled(left.codes, 0, missing), _filled(right.codes.T, wide, missing).T
    by_row = ScalingType.RowWise
    scales = left.scale, by_row, F.pad(right.scale, (0, wide)), by_row
    return scaled_mm(a, b, *scales, use_fast_accum=fast)[:rows, :columns]
