"""x times the transpose of a weight in few bits, for few rows of x, on CPU (few_rows.cpp): what generation waits for.

A weight is read once, as it lies: packed codes of 1, 2 or 4 bits, or bfloat16. Nothing is dequantised into memory.

Sums are float32 in an order that few_rows.cpp states; it depends on the shapes alone, so a row has the same result
alone and among others, and for any number of threads. Multiply-adds are fused where the processor has them. Each result
is within (K / 8 + 8) 2^-24 sum |x w| of the exact product of the same values. Sums of integers are exact where they
stay below 2^24 (`exact`), and then equal those of any other order.
"""

# R rows of x, N lines of the weight, K elements along the contraction

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from qtrain_kernels import reference
from qtrain_kernels.cpu import GRAIN, _at, bound, library
from qtrain_kernels.plans import Packed, Plan, field_width, scale_nan
from qtrain_kernels.precision import FEW, FEW_MULTIPLE
from qtrain_kernels.qtensor import Layout, QTensor

SOURCE = Path(__file__).with_suffix(".cpp")
CHUNK_BYTES = 16  # of codes that are decoded at once


def lacks(layout: Layout) -> str | None:
    """Why a weight in this layout is not multiplied as it lies; None if it is."""
    plan = layout.plan
    if plan is None or layout.storage != "packed" or layout.dim != -1:
        return "it is not packed along its contraction"
    width = field_width(plan.element)
    if width > 4:
        return f"its codes take {width} bits; 1, 2 and 4 are decoded"
    if plan.element.table is not None or (plan.block is not None and plan.scale_kind == "float32"):
        return "codes of a table and float32 scales of blocks are not decoded"
    chunk = CHUNK_BYTES * 8 // width
    if layout.shape[1] % chunk:
        return f"its contraction of {layout.shape[1]} is no multiple of {chunk}"
    if plan.block is not None and plan.block != chunk // 2 and plan.block % chunk:
        return f"its blocks of {plan.block} are no multiple of {chunk}"
    return None


def exact(left: Layout, right: Layout) -> bool:
    """Whether sums of the codes of x and of a weight are whole numbers that float32 holds."""
    if left.plan is None or right.plan is None or left.plan.block or right.plan.block:
        return False
    largest = 1.0
    for element in (left.plan.element, right.plan.element):
        if element.mantissa_bits is not None:
            return False
        largest *= element.max / min(abs(code) for code in element.levels() if code)
    return largest * right.shape[0] < 2**24


class FewRows:
    """A weight (N, K), ready for products: it keeps what these read, and no copy of the codes, which lie at `address`.
    ValueError for one that `lacks` names a reason against."""

    def __init__(self, weight: QTensor) -> None:
        reason = lacks(weight.layout)
        if reason is not None:
            raise ValueError(f"this weight is not multiplied in its bits: {reason}")
        plan = weight.layout.plan
        assert plan is not None
        self.shape, self.codes = weight.shape, weight.codes.contiguous()
        levels, unit = _levels(plan)
        table = None if weight.block_scale is None else _table(plan)
        line = weight.tensor_scale
        if line is None and weight.layout.constant != 1.0:
            line = torch.tensor(weight.layout.constant)
        scales, zeros = weight.block_scale, weight.zero_point
        self._held = levels, table, line, scales, zeros  # whose addresses the products read
        self._weight = _at(self.codes), _at(scales), _at(zeros), _at(table), _at(levels), unit
        self._line = _at(line), int(line is not None and line.ndim > 0)
        self._product = _of_codes(plan)
        self.address = weight.codes.data_ptr()

    def __call__(self, x: Tensor, scaled: bool = True) -> Tensor:
        """x (R, K), float32 or bfloat16, R at most 8 -> (R, N) float32. scaled: whether the scale of the weight's
        tensor or lines multiplies the sums."""
        x = _filled(x, self.shape[1])
        rows, line = x.shape[0], self._line if scaled else (None, 0)
        out = x.new_empty((rows, self.shape[0]))
        self._product(rows, *self._weight, *line, x.data_ptr(), *self.shape, out.data_ptr(), _threads(self.shape))
        return out


def bfloat16_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x (R, K), float32 or bfloat16, R at most 8, times the transpose of weight (N, K) bfloat16 -> (R, N) float32.
    ValueError where K is no multiple of 32."""
    if weight.dtype != torch.bfloat16 or weight.ndim != 2 or weight.shape[1] % FEW_MULTIPLE:
        raise ValueError(f"weight must be (N, K) bfloat16, K % 32 == 0; got {tuple(weight.shape)} {weight.dtype}")
    weight, shape = weight.contiguous(), (weight.shape[0], weight.shape[1])
    x = _filled(x, shape[1])
    rows = x.shape[0]
    out = x.new_empty((rows, shape[0]))
    _of_bfloat16()(rows, weight.data_ptr(), x.data_ptr(), *shape, out.data_ptr(), _threads(shape))
    return out


def _filled(x: Tensor, k: int) -> Tensor:
    """x as contiguous float32. There is code for each number of rows."""
    if x.ndim != 2 or x.shape[1] != k or not 0 < x.shape[0] <= FEW or not x.is_cpu:
        raise ValueError(f"x must be (1 to {FEW}, {k}) on CPU; got {tuple(x.shape)} on {x.device}")
    return x.float().contiguous()


def _threads(shape: tuple[int, int]) -> int:
    return max(1, min(torch.get_num_threads(), shape[0] * shape[1] // (4 * GRAIN)))


@cache
def _levels(plan: Plan) -> tuple[Tensor, float]:
    """(16,) int8: the code of each bit pattern in units, of zero point 0, and the unit."""
    element, width = plan.element, field_width(plan.element)
    patterns = torch.arange(2**width, dtype=torch.uint8)
    packed = Packed(reference.join(patterns, width), None)
    codes = reference.unpack(
        packed,
        torch.Size((2**width, 1, 1)),
        replace(plan, block=None, scale_kind="float32", scale_element=None, rule="absmax"),
        torch.float32,
    ).view(-1)
    unit = min(abs(code) for code in element.levels() if code)
    levels = torch.zeros(16, dtype=torch.int8)
    levels[: len(codes)] = (codes / unit).to(torch.int8)
    return levels, unit


@cache
def _table(plan: Plan) -> Tensor:
    """float32: the block scale of each byte, (256,), or of each 16 bits, (65536,)."""
    if plan.has_float_scales:
        bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
        return reference._scales_of(bits.view(reference.SCALE_DTYPES[plan.scale_kind]), plan)
    places = torch.arange(256).clamp_max(scale_nan(plan)).to(torch.uint8)
    return reference._scales_of(places, plan).float().contiguous()


@cache
def _of_codes(plan: Plan) -> Callable[..., None]:
    scale_type = "uint16_t" if plan.has_float_scales else "uint8_t"
    constants = f"#define CODES\n#define WIDTH {field_width(plan.element)}\n#define BLOCK {plan.block or 0}\n"
    constants += f"#define SCALE_BITS {scale_type}\n#define ZERO_POINT {int(plan.element.zero_point)}\n"
    return _function(constants, "ipppppfpipllpi")


@cache
def _of_bfloat16() -> Callable[..., None]:
    return _function("", "ippllpi")


def _function(constants: str, arguments: str) -> Callable[..., None]:
    made = library(f"{constants}{SOURCE.read_text()}", "-ffp-contract=fast", "-O3")
    return bound(made, "few_rows", arguments)
