"""x times the transpose of a weight in few bits, for few rows of x, on CPU (few_rows.cpp): what generation waits for.

A weight is read once, as it lies: packed codes of 1, 2 or 4 bits, or bfloat16. Nothing is dequantised into memory.

Sums are float32 in an order that few_rows.cpp states; it depends on the shapes alone, so a row has the same result
alone and among others, and for any number of threads. Multiply-adds are fused where the processor has them. Each result
is within (K / 8 + 8) 2^-24 sum |x w| of the exact product of the same values. Sums of integers are exact where they
stay below 2^24 (`exact`), and then equal those of any other order.
"""

# R rows of x, N lines of the weight, K elements along the contraction

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from qtrain_kernels import dispatch, reference
from qtrain_kernels.cpu import GRAIN, TYPES, _at, library
from qtrain_kernels.plans import Packed, Plan, Rotation, field_width, scale_nan
from qtrain_kernels.precision import FEW, FEW_MULTIPLE
from qtrain_kernels.qtensor import Layout, QTensor, float_storage

SOURCE = Path(__file__).with_suffix(".cpp")
CHUNK_BYTES = 16  # of codes that are decoded at once
MOST = 128  # rows, in slices of FEW


def lacks(layout: Layout) -> str | None:
    """Why a weight in this layout is not multiplied as it lies; None if it is."""
    plan = layout.plan
    if plan is None or layout.storage != "packed" or layout.dim != -1:
        return "it is not packed along its contraction"
    width = field_width(plan.element)
    if width > 4:
        return f"its codes take {width} bits; 1, 2 and 4 are decoded"
    if plan.element.table is not None:
        return "codes of a table are not decoded"
    chunk = CHUNK_BYTES * 8 // width
    if layout.shape[1] % chunk:
        return f"its contraction of {layout.shape[1]} is no multiple of {chunk}"
    if plan.block is not None and plan.block != chunk // 2 and plan.block % chunk:
        return f"its blocks of {plan.block} are no multiple of {chunk}"
    return None


def most(layout: Layout) -> int:
    """Rows of x up to which the product is the faster one: more where the weight would be dequantised to float32."""
    return MOST if float_storage(layout.plan, torch.bfloat16) == "float32" else FEW


def exact(left: Layout, right: Layout) -> bool:
    """Whether sums of the codes of x and of a weight are whole numbers that float32 holds."""
    if left.plan is None or right.plan is None or left.plan.block or right.plan.block:
        return False
    largest = 1.0
    for element in (left.plan.element, right.plan.element):
        if not element.uniform:
            return False
        largest *= element.max / min(abs(code) for code in element.levels() if code)
    return largest * right.shape[0] < 2**24


class _Weight(ctypes.Structure):
    """As few_rows.cpp has it, of codes."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "table", "levels", "line")),
        *((name, ctypes.c_int64) for name in ("n", "k", "apart")),
        ("unit", ctypes.c_float),
    )


class _Bfloat16Weight(ctypes.Structure):
    _fields_ = (("values", ctypes.c_void_p), ("n", ctypes.c_int64), ("k", ctypes.c_int64))


class _Rotation(ctypes.Structure):
    _fields_ = (("signs", ctypes.c_void_p), ("block", ctypes.c_int64), ("norm", ctypes.c_float))


class FewRows:
    """A weight (N, K), ready for products: it keeps what these read, and no copy of contiguous codes.
    rotation: of the weight's rows, for `linear`; backend: of a rotation that is not done here. ValueError for a weight
    that `lacks` names a reason against, and a rotation that does not fit it."""

    def __init__(self, weight: QTensor, rotation: Rotation | None = None, backend: str = "auto") -> None:
        reason = lacks(weight.layout)
        if reason is not None:
            raise ValueError(f"this weight is not multiplied in its bits: {reason}")
        if rotation is not None and weight.shape[1] % rotation.size:
            raise ValueError(f"a weight of {weight.shape} has no whole blocks of a rotation of {rotation.size}")
        plan = weight.layout.plan
        assert plan is not None
        self.shape, codes = weight.shape, weight.codes.contiguous()
        levels, unit = _levels(plan)
        table = None if weight.block_scale is None or plan.scale_kind == "float32" else _table(plan)
        line = weight.tensor_scale
        if line is None and weight.layout.constant != 1.0:
            line = torch.tensor(weight.layout.constant)
        parts = codes, weight.block_scale, weight.zero_point, table, levels, line
        apart = int(line is not None and line.ndim > 0)
        self._weight = _Weight(*map(_at, parts), *self.shape, apart, unit)
        self._rotation, self._before, signs = None, None, None
        if rotation is not None and rotation.base is not None:  # a product of matrices, for which there is no code here
            self._before = partial(rotate_rows, rotation=rotation, backend=backend)
        elif rotation is not None:
            signs = reference.signs_of(rotation)
            signs = None if signs is None else signs.float().contiguous()
            self._rotation = _Rotation(_at(signs), rotation.size, rotation.size**-0.5)
        self._held = parts, signs  # whose addresses the products read
        self._product = _of_codes(plan)

    def __call__(self, x: Tensor, scaled: bool = True) -> Tensor:
        """x (R, K), float32 or bfloat16, R at most MOST -> (R, N) float32. scaled: whether the scale of the weight's
        tensor or lines multiplies the sums."""
        return _call(self._product, self._weight, self.shape, x, None, torch.float32, scaled)

    def linear(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x (R, K), float32 or bfloat16, R at most MOST -> (R, N) in dtype, one of these: x is rotated in float32 and
        rounded to dtype, and so is the product."""
        if self._before is not None:
            x = self._before(x)
        return _call(self._product, self._weight, self.shape, x, self._rotation, dtype)


def rotate_rows(x: Tensor, rotation: Rotation, backend: str) -> Tensor:
    """x (R, K) -> x D H, float32."""
    return dispatch.get("rotate", backend, x.device.type, rotation=rotation)(x.unsqueeze(-1), rotation).squeeze(-1)


def bfloat16_rows(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """x (R, K), float32 or bfloat16, R at most MOST, times the transpose of weight (N, K) bfloat16 -> (R, N) in dtype,
    one of these: x is rounded to dtype, and so is the product. ValueError where K is no multiple of 32."""
    if weight.dtype != torch.bfloat16 or weight.ndim != 2 or weight.shape[1] % FEW_MULTIPLE:
        raise ValueError(f"weight must be (N, K) bfloat16, K % 32 == 0; got {tuple(weight.shape)} {weight.dtype}")
    weight, shape = weight.contiguous(), (weight.shape[0], weight.shape[1])
    return _call(_of_bfloat16(), _Bfloat16Weight(weight.data_ptr(), *shape), shape, x, None, dtype)


def _call(
    product: Callable[..., None], weight: ctypes.Structure, shape: tuple[int, int], x: Tensor,
    rotation: _Rotation | None, dtype: torch.dtype, scaled: bool = True,
) -> Tensor:  # fmt: skip
    if dtype not in TYPES:
        raise ValueError(f"a product is in float32 or bfloat16; got {dtype}")
    if x.ndim != 2 or x.shape[1] != shape[1] or not 0 < x.shape[0] <= MOST or not x.is_cpu:
        raise ValueError(f"x must be (1 to {MOST}, {shape[1]}) on CPU; got {tuple(x.shape)} on {x.device}")
    x = (x if x.dtype in TYPES else x.float()).resolve_neg().contiguous()
    out = torch.empty((x.shape[0], shape[0]), dtype=dtype, device="cpu")
    halves, threads = (x.dtype == torch.bfloat16, dtype == torch.bfloat16), _threads(shape)
    for rows, results in zip(x.split(FEW), out.split(FEW), strict=True):
        product(weight, rotation, len(rows), rows.data_ptr(), *halves, scaled, results.data_ptr(), threads)
    return out


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
    scale_type = "float" if plan.scale_kind == "float32" else "uint16_t" if plan.has_float_scales else "uint8_t"
    constants = f"#define CODES\n#define WIDTH {field_width(plan.element)}\n#define BLOCK {plan.block or 0}\n"
    constants += f"#define SCALE_BITS {scale_type}\n#define ZERO_POINT {int(plan.element.zero_point)}\n"
    return _function(constants, _Weight)


@cache
def _of_bfloat16() -> Callable[..., None]:
    return _function("", _Bfloat16Weight)


def _function(constants: str, weight: type[ctypes.Structure]) -> Callable[..., None]:
    """ValueError of the compiler's, as of cpu.py."""
    function = library(f"{constants}{SOURCE.read_text()}", "-ffp-contract=fast", "-O3").few_rows
    pointer, number = ctypes.c_void_p, ctypes.c_int
    function.argtypes = [
        ctypes.POINTER(weight), ctypes.POINTER(_Rotation), number, pointer, number, number, number, pointer, number,
    ]  # fmt: skip
    function.restype = None
    return function
