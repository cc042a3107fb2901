"""Products of quantised matrices, as a table. Each row says which operands it takes, in which layouts, and on what.

| product | operands | multiplies |
|---|---|---|
| int8 | integer codes without block scales | as integers, exactly; rounded once to float32 |
| mxfp4 | E2M1 codes in blocks of 32 under E8M0 scales | on FP4 units, compute capability 10 |
| nvfp4 | E2M1 codes in blocks of 16 under E4M3 scales | on FP4 units, compute capability 10.0 and later |
| mxfp8 | codes that E4M3 has, in blocks of 32 under E8M0 scales | on MX units, compute capability 10.0 and later |
| fp8 | minifloat codes under scales of lines, or powers of two of blocks | in FP8, compute capability 8.9 and later |
| fp8_block | E4M3 codes under a float32 scale for 128 elements | in FP8, compute capability 9 (Hopper) |
| float | anything | in the compute dtype |

The units of FP4 and MX products read block scales. All products keep their sums in float32. Those in FP8, FP4
and MX are rounded to bfloat16. On CPU, products in FP8 are float32 products of codes * scale; FP4 and MX have none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

from qtrain_kernels.formats import E4M3, MX_E2M1, Element
from qtrain_kernels.precision import matmul
from qtrain_kernels.qtensor import Layout, QTensor, Storage, float_storage, obstacle
from qtrain_kernels.reference import biased_exponent, power_of_two, stored_integer

LONGEST = 2**15  # of a contraction whose doubled products of 8 bits stay within int32: 255^2 * 2^15 < 2^31
CUDA_MULTIPLE, CUDA_ROWS = 8, 32  # torch._int_mm there: more than 16 rows; the other sizes multiples of 8
EXACT_IN_FLOAT32 = 2**10  # products of 2^14, within 2^24
FP8_MULTIPLE = 16  # of its contraction and columns, on CUDA
TOP = {torch.float8_e4m3fn: 8, torch.float8_e5m2: 15}  # exponent of the largest number, 1.75 * 2^TOP in both


# ---------------------------------------------------------------------------------------------------------- the table

Capability = tuple[int, int]


@dataclass(frozen=True)
class Product:
    """A row of the table.

    accepts: why it does not take two layouts, left (M, K) contracted along -1 and right (K, N) along -2; None if it
    does. needs: why it cannot run on a type of device of a CUDA compute capability, with the remedy. wants: the layout
    that it takes one side in, given the compute dtype. run: the product of two QTensors in those layouts, in bfloat16
    or float32.
    """

    name: str
    accepts: Callable[[Layout, Layout], str | None]
    needs: Callable[[str, Capability], str | None]
    wants: Callable[[Layout, torch.dtype], Layout]
    run: Callable[[QTensor, QTensor], Tensor]


def multiply(product: Product, left: QTensor, right: QTensor, dtype: torch.dtype, backend: str = "auto") -> Tensor:
    """left (M, K) @ right (K, N), each converted to the layout that the product wants. dtype: the compute dtype,
    bfloat16 or float32. ValueError for layouts that it does not accept."""
    if left.shape[1] != right.shape[0]:
        raise ValueError(f"left {left.shape} and right {right.shape} share no contraction")
    for name, side, dim in (("left", left, -1), ("right", right, -2)):
        if side.layout.dim != dim and side.layout.plan is not None:
            raise ValueError(
                f"{name} must be quantised along dim {dim}, the contraction; it is along {side.layout.dim}"
            )
    reason = product.accepts(left.layout, right.layout)
    if reason:
        raise ValueError(f"product {product.name!r} does not take these operands: {reason}")
    left, right = (side.unmasked.to(product.wants(side.layout.unmasked, dtype), backend) for side in (left, right))
    return product.run(left, right)


def resolve(
    setting: str, left: Layout, right: Layout, device_type: str, capability: Capability | None = None
) -> Product:
    """The row by which a setting of GEMMS multiplies two layouts on a device.

    It is the first row of the setting that accepts them. A setting other than auto raises ValueError where no such row
    runs on the device; auto then takes the next. Operands that no row of the setting accepts multiply as float.
    capability: of the CUDA device; None: of the current one.
    """
    if setting not in SETTINGS:
        raise ValueError(f"unknown gemm {setting!r}; gemms: {', '.join(SETTINGS)}")
    if device_type == "cuda" and capability is None:
        capability = torch.cuda.get_device_capability()
    obstacles = []
    for product in (TABLE[name] for name in SETTINGS[setting]):
        if product.accepts(left, right) is None:
            obstacle = product.needs(device_type, capability or (0, 0))
            if obstacle is None:
                return product
            obstacles.append(f"product {product.name} {obstacle}")
    if obstacles and setting != "auto":
        raise ValueError(f"gemm {setting!r} cannot run on {device_type}: {'; '.join(obstacles)}")
    return TABLE["float"]


def reused(forward: Layout, fprop: Product, dim: int, pads: bool) -> Layout:
    """The layout in which a backward product contracts the forward's codes along dim; one of a matrix in the compute
    dtype where they must be dequantised first.

    Scales of rows and blocks vary along that contraction, so only codes under one scale of the tensor are contracted
    again. pads: whether zeros fill up the contraction, which integers that are stored less a half do not hold.
    """
    plain = Layout(None, forward.shape, dim)
    plan = forward.plan
    if plan is None or not plan.per_tensor or plan.block is not None:
        return plain
    if plan.element.mantissa_bits is None and (fprop.name != "int8" or (pads and stored_integer(plan.element)[1])):
        return plain
    return forward.unmasked.along(dim)


# ----------------------------------------------------------------------------------------- which operands, where, how


def _both(lacks: Callable[[Layout], str | None]) -> Callable[[Layout, Layout], str | None]:
    """Of a question about one layout that of both."""

    def accepts(left: Layout, right: Layout) -> str | None:
        reasons = {"left": lacks(left), "right": lacks(right)}
        return next((f"{side}: {reason}" for side, reason in reasons.items() if reason), None)

    return accepts


def _quantised(storage: Storage) -> Callable[[Layout], str | None]:
    return lambda layout: "it is not quantised" if layout.plan is None else layout.lacks(storage)


def _fp8_accepts(left: Layout, right: Layout) -> str | None:
    reason = _both(_quantised("float8"))(left, right)
    if reason is None and right.float8_dtype == torch.float8_e5m2:
        return "right: its codes need float8_e5m2, and FP8 units take float8_e4m3fn there"
    return reason


def _fp8_block_accepts(left: Layout, right: Layout) -> str | None:
    reason = _both(_quantised("float8_128"))(left, right)
    if reason is None and torch.float8_e5m2 in (left.float8_dtype, right.float8_dtype):
        return "its units take codes in float8_e4m3fn alone"
    return (
        "both sides have 128x128 tiles, which only one may" if reason is None and left.tiled and right.tiled else reason
    )


def _native(element: Element, block: int) -> Callable[[Layout], Layout]:
    """The layout that FP4 and MX units take: codes of `element`, a scale for each row and `block` elements."""

    def layout(found: Layout) -> Layout:
        assert found.plan is not None
        correction = found.plan.correction and block
        plan = replace(found.plan, element=element, block=block, correction=correction, mask=None)
        return replace(found, plan=plan, rows=1, storage="swizzled", blocks=False)

    return layout


def _in(native: Callable[[Layout], Layout]) -> Callable[[Layout], str | None]:
    """Why a layout does not go into that of `native` without the loss of bits."""

    def lacks(found: Layout) -> str | None:
        if found.plan is None:
            return "it is not quantised"
        try:
            return obstacle(found.stored("float32", blocks=True), native(found))
        except ValueError as error:
            return str(error)

    return lacks


def _on_cuda(
    least: Capability, most: Capability = (99, 0), cpu: bool = True
) -> Callable[[str, Capability], str | None]:
    def needs(device_type: str, capability: Capability) -> str | None:
        if device_type == "cpu" and cpu:
            return None
        range_ = f"compute capability {least[0]}.{least[1]}" + (f" to {most[0]}.{most[1]}" if most < (99, 0) else "")
        if device_type == "cuda" and least <= capability <= most:
            return None
        found = f"capability {capability[0]}.{capability[1]}" if device_type == "cuda" else device_type
        return f"needs a CUDA device of {range_}; found {found}; ask for gemm 'auto'"

    return needs


def _everywhere(device_type: str, capability: Capability) -> str | None:
    return None


def _on_8_bit_devices(device_type: str, capability: Capability) -> str | None:
    return None if device_type in ("cpu", "cuda") else f"has no kernel on {device_type}; ask for gemm 'float'"


def _stored(storage: Storage) -> Callable[[Layout, torch.dtype], Layout]:
    return lambda layout, dtype: layout.stored(storage)


def _as(native: Callable[[Layout], Layout]) -> Callable[[Layout, torch.dtype], Layout]:
    return lambda layout, dtype: native(layout)


def _floats(layout: Layout, dtype: torch.dtype) -> Layout:
    return layout.stored(float_storage(layout.plan, dtype))


# ---------------------------------------------------------------------------------------------------------------- INT8


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


def _fp8_matmul(left: Tensor, left_scale: Tensor, right: Tensor, right_scale: Tensor, fast: bool) -> Tensor:
    """(M, K) * (M, 1) @ (K, N) * (1, N) in float8 with float32 scales -> bfloat16: sums in float32, rounded once."""
    _check_product(left, right, tuple(TOP))
    if right.dtype == torch.float8_e5m2:
        raise ValueError("right must be in float8_e4m3fn: CUDA multiplies by no other; got torch.float8_e5m2")
    if not left.numel() or not right.numel():
        return torch.zeros((left.shape[0], right.shape[1]), dtype=torch.bfloat16, device=left.device)
    if left.is_cuda:
        return _scaled_mm(left, left_scale, right, right_scale, fast)
    # torch's scaled_mm has no CPU kernel before torch 2.12; from then on it takes this very product.
    return matmul(left.float() * left_scale, right.float() * right_scale).bfloat16()


def _scaled_mm(left: Tensor, left_scale: Tensor, right: Tensor, right_scale: Tensor, fast: bool) -> Tensor:
    """In the sizes and the layout that cuBLASLt takes: rows by columns, 16 elements at a time."""
    rows, columns = left.shape[0], right.shape[1]
    missing, wide = -left.shape[1] % FP8_MULTIPLE, -columns % FP8_MULTIPLE
    a, b = _filled(left, 0, missing), _filled(right.T, wide, missing).T
    by_row = ScalingType.RowWise
    scales = left_scale, by_row, F.pad(right_scale, (0, wide)), by_row
    return scaled_mm(a, b, *scales, use_fast_accum=fast)[:rows, :columns]


# What the layers take until they multiply QTensors.


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
    return _fp8_matmul(left.codes, left.scale, right.codes, right.scale, fast)


# ------------------------------------------------------------------------------------------------------------ products


def _scaled(product: Tensor, left: QTensor, right: QTensor) -> Tensor:
    """A product of codes times both sides' tensor scales, float32; as it is where there are none."""
    scales = [each.layout.constant if each.tensor_scale is None else each.tensor_scale for each in (left, right)]
    if isinstance(scales[0], float) and isinstance(scales[1], float):
        scales = [scales[0] * scales[1]]
    for scale in scales:
        if isinstance(scale, Tensor) or scale != 1.0:
            product = product.float().mul_(scale)
    return product


def _float_product(left: QTensor, right: QTensor) -> Tensor:
    """In the dtype of the two, float32 if either is; float32 where a tensor scale multiplies the product.

    A bfloat16 product is rounded once before the scale, and once more by the caller who casts it.
    """
    dtype = torch.promote_types(left.codes.dtype, right.codes.dtype)
    return _scaled(matmul(left.codes.to(dtype), right.codes.to(dtype)), left, right)


def _int8_product(left: QTensor, right: QTensor) -> Tensor:
    """The exact sum, rounded to float32, times each scale."""
    (unit, offset), (other_unit, other_offset) = (
        stored_integer(side.layout.plan.element) for side in (left, right) if side.layout.plan is not None
    )
    product = int8_matmul(left.codes, right.codes, offset, other_offset).mul_(unit * other_unit)
    return _scaled(product, left, right)


def _line_scale(q: QTensor) -> Tensor:
    """(L, 1) float32: what multiplies each line of float8 codes."""
    scale = q.layout.constant if q.tensor_scale is None else q.tensor_scale
    if isinstance(scale, Tensor) and scale.ndim:
        scale = scale.view(-1, 1)
    lines = q.codes.new_ones((q.codes.shape[0], 1), dtype=torch.float32) if q.block_scale is None else q.block_scale
    return lines * scale


def _fp8_product(left: QTensor, right: QTensor, fast: bool = False) -> Tensor:
    sides = left.codes, _line_scale(left), right.codes.T, _line_scale(right).T
    return _fp8_matmul(*sides, fast=fast)


def _fp8_block_product(left: QTensor, right: QTensor) -> Tensor:
    """bfloat16. The tensor scales are multiplied into the block scales."""
    left, right = (replace(side, block_scale=_line_scale(side)) for side in (left, right))
    if not left.codes.is_cuda:
        values = (side.codes.float() * side.scale_of_each() for side in (left, right))
        return matmul(next(values), next(values).T).bfloat16()
    missing, wide = -left.shape[1] % FP8_MULTIPLE, -right.shape[1] % FP8_MULTIPLE
    a, b = _filled(left.codes, 0, missing), _filled(right.codes, wide, missing).T
    (scale_a, kind_a), (scale_b, kind_b) = _block_scales(left, 0), _block_scales(right, wide)
    return scaled_mm(a, b, scale_a, kind_a, scale_b, kind_b)[:, : right.shape[1]]


def _block_scales(q: QTensor, wide: int) -> tuple[Tensor, ScalingType]:
    """Of a side of a product by blocks of 128, as cuBLASLt takes them, for so many more lines: (L, n / 128) with L
    contiguous; of 128x128 tiles (n / 128, L / 128), n / 128 contiguous and a multiple of 4."""
    assert q.block_scale is not None
    if q.layout.tiled:
        more = -(-(q.layout.lines[0] + wide) // 128) - q.block_scale.shape[0]
        return F.pad(q.block_scale, (0, -q.block_scale.shape[1] % 4, 0, more)).T, ScalingType.BlockWise128x128
    return F.pad(q.block_scale, (0, 0, 0, wide)).T.contiguous().T, ScalingType.BlockWise1x128


def _native_product(left: QTensor, right: QTensor) -> Tensor:
    """On FP4 and MX units, bfloat16; float32 where a scale that the units do not read multiplies it."""
    wide = -right.shape[1] % FP8_MULTIPLE
    codes = _filled(left.codes, 0, 0), _filled(right.codes, wide, 0)
    assert left.layout.plan is not None and left.block_scale is not None and right.block_scale is not None
    if left.layout.plan.element != E4M3:
        codes = tuple(each.view(torch.float4_e2m1fn_x2) for each in codes)
    else:
        codes = tuple(each.view(torch.float8_e4m3fn) for each in codes)
    swizzle = SwizzleType.SWIZZLE_32_4_4
    if left.layout.plan.scale_kind == "minifloat":
        scales = [[side.block_scale.view(torch.float8_e4m3fn), side.tensor_scale] for side in (left, right)]
        kinds, orders = [ScalingType.BlockWise1x16, ScalingType.TensorWise], [swizzle, SwizzleType.NO_SWIZZLE]
        found = scaled_mm(codes[0], codes[1].T, scales[0], kinds, scales[1], kinds, orders, orders)
        return found[:, : right.shape[1]]
    scales = [side.block_scale.view(torch.float8_e8m0fnu) for side in (left, right)]
    kind = ScalingType.BlockWise1x32
    found = scaled_mm(codes[0], codes[1].T, scales[0], kind, scales[1], kind, swizzle, swizzle)
    return _scaled(found[:, : right.shape[1]], left, right)


FP4_UNITS, MXFP4_UNITS, FP8_UNITS, HOPPER = (10, 0), (10, 9), (8, 9), ((9, 0), (9, 9))
MXFP4, NVFP4, MXFP8 = _native(MX_E2M1, 32), _native(MX_E2M1, 16), _native(E4M3, 32)
TABLE = {
    product.name: product
    for product in (
        Product("int8", _both(_quantised("int8")), _on_8_bit_devices, _stored("int8"), _int8_product),
        Product("mxfp4", _both(_in(MXFP4)), _on_cuda(FP4_UNITS, MXFP4_UNITS, cpu=False), _as(MXFP4), _native_product),
        Product("nvfp4", _both(_in(NVFP4)), _on_cuda(FP4_UNITS, cpu=False), _as(NVFP4), _native_product),
        Product("mxfp8", _both(_in(MXFP8)), _on_cuda(FP4_UNITS, cpu=False), _as(MXFP8), _native_product),
        Product("fp8", _fp8_accepts, _on_cuda(FP8_UNITS), _stored("float8"), _fp8_product),
        Product("fp8_fast", _fp8_accepts, _on_cuda(FP8_UNITS), _stored("float8"), partial(_fp8_product, fast=True)),
        Product("fp8_block", _fp8_block_accepts, _on_cuda(*HOPPER), _stored("float8_128"), _fp8_block_product),
        Product("float", lambda left, right: None, _everywhere, _floats, _float_product),
    )
}
SETTINGS = {  # the rows that a setting tries, in this order; then float
    "auto": ("int8",),
    "float": (),
    "fp8": ("int8", "fp8", "fp8_block"),
    "fp8_fast": ("int8", "fp8_fast", "fp8_block"),
    "fp4": ("int8", "mxfp4", "nvfp4", "mxfp8"),
}
