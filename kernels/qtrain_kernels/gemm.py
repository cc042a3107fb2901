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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

from qtrain_kernels.formats import E4M3, MX_E2M1, Element
from qtrain_kernels.plans import stored_integer
from qtrain_kernels.precision import matmul
from qtrain_kernels.qtensor import GROUP, Layout, QTensor, Storage, float_storage, refines

LONGEST = 2**15  # of a contraction whose doubled products of 8 bits stay within int32: 255^2 * 2^15 < 2^31
CUDA_MULTIPLE, CUDA_ROWS = 8, 32  # torch._int_mm there: more than 16 rows; the other sizes multiples of 8
EXACT_IN_FLOAT32 = 2**10  # products of 2^14, within 2^24
FP8_MULTIPLE = 16  # of its contraction and columns, on CUDA
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


# ----------------------------------------------------------------------------------------------------------- the table

Capability = tuple[int, int]
Scale = Tensor | float
ANY: tuple[Capability, Capability] = (0, 0), (99, 0)


@dataclass(frozen=True, eq=False)
class Product:
    """A row of the table.

    storage: of the layout that it takes; "float" for float32 or bfloat16. wants: that layout of a side, given the
    compute dtype; ValueError where the side does not go into it. run: the product of two QTensors in those layouts, in
    bfloat16 or float32, and the scales that are left to multiply it. devices: the types of device that it runs on, with
    the least and the largest CUDA compute capability; None: all. pair: why it does not take two sides together, each of
    which it takes; None if it does.
    """

    name: str
    storage: str
    wants: Callable[[Layout, torch.dtype], Layout]
    run: Callable[[QTensor, QTensor], tuple[Tensor, list[Scale]]]
    devices: Mapping[str, tuple[Capability, Capability]] | None
    pair: Callable[[Layout, Layout], str | None] = lambda left, right: None

    def unscaled(self, left: QTensor, right: QTensor, dtype: torch.dtype, backend: str) -> tuple[Tensor, list[Scale]]:
        """The product of two sides that it accepts, without a check; and the scales that are left to multiply it."""
        return self.run(self._taken(left, dtype, backend), self._taken(right, dtype, backend))

    def _taken(self, side: QTensor, dtype: torch.dtype, backend: str) -> QTensor:
        """A side as `run` takes it."""
        storage = float_storage(side.layout.plan, dtype) if self.storage == "float" else self.storage
        if side.layout.storage == storage != "swizzled":  # whose plan may differ
            return side
        return side.to(self.wants(side.layout.unmasked, dtype), backend)

    def accepts(self, left: Layout, right: Layout) -> str | None:
        """Why it does not multiply left (M, K) by right (K, N); None if it does."""
        for side, layout in (("left", left), ("right", right)):
            try:
                wanted = self.wants(layout, torch.float32)
            except ValueError as error:
                return f"{side}: {error}"
            if not refines(layout, wanted):
                return f"{side}: its codes and blocks are not among those that {self.name} takes"
        return self.pair(left, right)

    def needs(self, device_type: str, capability: Capability) -> str | None:
        """Why it does not run on a device, with the remedy; None if it does. capability: of a CUDA device."""
        if self.devices is None:
            return None
        if device_type in self.devices:
            least, most = self.devices[device_type]
            if device_type != "cuda" or least <= capability <= most:
                return None
        least, most = self.devices["cuda"]
        range_ = f"{least[0]}.{least[1]} to {most[0]}.{most[1]}" if most < ANY[1] else f"{least[0]}.{least[1]} or later"
        found = f"{capability[0]}.{capability[1]}" if device_type == "cuda" else device_type
        return f"{self.name} needs a CUDA device of compute capability {range_}; found {found}"


def multiply(product: Product, left: QTensor, right: QTensor, dtype: torch.dtype, backend: str = "auto") -> Tensor:
    """left (M, K) @ right (K, N), each converted to the layout that the product wants. dtype: the compute dtype,
    bfloat16 or float32. ValueError for operands that it does not take."""
    if left.shape[1] != right.shape[0]:
        raise ValueError(f"left {left.shape} and right {right.shape} share no contraction")
    for name, side, dim in (("left", left.layout, -1), ("right", right.layout, -2)):
        if side.plan is not None and side.dim != dim:
            raise ValueError(f"{name} contracts dim {dim}, and is quantised along {side.dim}; quantise it again")
    reason = product.accepts(left.layout, right.layout)
    if reason:
        raise ValueError(f"product {product.name!r} does not take these operands: {reason}")
    return scaled(*product.unscaled(left, right, dtype, backend))


@lru_cache(1024)
def resolve(
    setting: str, left: Layout, right: Layout, device_type: str, capability: Capability | None = None
) -> Product:
    """The row by which a gemm setting multiplies two layouts on a device.

    It is the first row of the setting that accepts them. Operands that no row of the setting accepts multiply as float.
    ValueError where rows accept them and none of these runs on the device; setting auto then multiplies as float.
    capability: of the CUDA device.
    """
    if setting not in SETTINGS:
        raise ValueError(f"unknown gemm {setting!r}; gemms: {', '.join(SETTINGS)}")
    accepting = [TABLE[name] for name in SETTINGS[setting] if TABLE[name].accepts(left, right) is None]
    obstacles = {product: product.needs(device_type, capability or (0, 0)) for product in accepting}
    for product, obstacle in obstacles.items():
        if obstacle is None:
            return product
    if obstacles and setting != "auto":
        reasons = "; ".join(map(str, obstacles.values()))
        raise ValueError(f"gemm {setting!r} cannot run on {device_type}: {reasons}; ask for gemm 'auto'")
    return TABLE["float"]


def check_setting(setting: str, device_type: str, capability: Capability | None = None) -> None:
    """ValueError for an unknown gemm setting, or one of whose products, float and int8 apart, a device has none."""
    if setting not in SETTINGS:
        raise ValueError(f"unknown gemm {setting!r}; gemms: {', '.join(SETTINGS)}")
    if device_type == "cuda" and capability is None:
        capability = torch.cuda.get_device_capability()
    own = [TABLE[name].needs(device_type, capability or (0, 0)) for name in SETTINGS[setting] if name != "int8"]
    if own and all(own):
        raise ValueError(f"gemm {setting!r} cannot run on {device_type}: {own[-1]}; ask for gemm 'auto'")


def reused(forward: Layout, fprop: Product, dim: int, pads: bool) -> Layout:
    """The layout in which a backward product contracts the forward's codes along dim; one of a matrix in the compute
    dtype where they must be dequantised first.

    Scales of rows and blocks vary along that contraction, so only codes under one scale of the tensor are contracted
    again. pads: whether zeros fill up the contraction, which integers that are stored less a half do not hold.
    """
    plan = forward.plan
    integers = plan is not None and plan.element.uniform
    if plan is None or not plan.per_tensor or plan.block is not None or (integers and fprop.name != "int8"):
        return Layout(None, forward.shape, dim)
    if integers and pads and stored_integer(plan.element)[1]:
        return Layout(None, forward.shape, dim)
    return forward.unmasked.along(dim)


def _native(element: Element, block: int) -> Callable[[Layout, torch.dtype], Layout]:
    """The layout that FP4 and MX units take: codes of `element`, a scale for each row and `block` elements."""

    def wants(layout: Layout, dtype: torch.dtype) -> Layout:
        plan = layout.plan and replace(layout.plan, element=element, block=block, correction=None)
        return replace(layout, plan=plan, rows=1, storage="swizzled", blocks=False)

    return wants


def _stored(storage: Storage) -> Callable[[Layout, torch.dtype], Layout]:
    return lambda layout, dtype: layout.stored(storage)


def _floats(layout: Layout, dtype: torch.dtype) -> Layout:
    return layout.stored(float_storage(layout.plan, dtype))


def _not_e5m2_on_the_right(left: Layout, right: Layout) -> str | None:
    wide = right.float8_dtype == torch.float8_e5m2
    return "right: its codes need float8_e5m2, and FP8 units take float8_e4m3fn there" if wide else None


def _in_blocks(left: Layout, right: Layout) -> str | None:
    if torch.float8_e5m2 in (left.float8_dtype, right.float8_dtype):
        return "codes that need float8_e5m2; its units take float8_e4m3fn alone"
    return "both sides are in tiles of 128x128; only one may be" if left.tiled and right.tiled else None


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


def fp8_matmul(left: Tensor, left_scale: Tensor, right: Tensor, right_scale: Tensor, fast: bool) -> Tensor:
    """(M, K) * (M, 1) @ (K, N) * (1, N) in float8 with float32 scales -> bfloat16: sums in float32, rounded once."""
    _check_product(left, right, FLOAT8)
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


# ------------------------------------------------------------------------------------------------------------ products


def scaled(product: Tensor, scales: Sequence[Scale]) -> Tensor:
    """A product times its scales, each rounded to float32, in place where it can be; as it is where there are none."""
    for scale in scales:
        product = product.float().mul_(scale)
    return product


def scales_of(left: QTensor, right: QTensor) -> list[Scale]:
    """Both sides' tensor scales; without those that are 1."""
    found = _constants(left, right) if left.tensor_scale is None else [left.tensor_scale, *_constants(left, right)]
    return found if right.tensor_scale is None else [*found, right.tensor_scale]


def _constants(left: QTensor, right: QTensor) -> list[Scale]:
    """The product of the tensor scales that follow from plans, in a list; an empty one where it is 1."""
    factor = left.layout.constant if left.tensor_scale is None else 1.0
    factor *= right.layout.constant if right.tensor_scale is None else 1.0
    return [] if factor == 1.0 else [factor]


def _float_product(left: QTensor, right: QTensor) -> tuple[Tensor, list[Scale]]:
    """In the dtype of the two, float32 if either is; float32 where a tensor scale multiplies the product.

    A bfloat16 product is rounded once before the scale, and once more by the caller who casts it.
    """
    dtype = torch.promote_types(left.codes.dtype, right.codes.dtype)
    return matmul(left.codes.to(dtype), right.codes.to(dtype)), scales_of(left, right)


def _int8_product(left: QTensor, right: QTensor) -> tuple[Tensor, list[Scale]]:
    """The exact sum, rounded to float32, times each scale."""
    (unit, offset), (other_unit, other_offset) = (
        stored_integer(side.layout.plan.element) for side in (left, right) if side.layout.plan is not None
    )
    product = int8_matmul(left.codes, right.codes, offset, other_offset).mul_(unit * other_unit)
    return product, scales_of(left, right)


def _line_scale(q: QTensor) -> Tensor:
    """(L, 1) float32 or, by blocks of 128, as the layout has them: what multiplies float8 codes but for a constant."""
    scale, blocks = q.tensor_scale, q.block_scale
    if blocks is None:
        blocks = q.codes.new_ones((q.codes.shape[0], 1), dtype=torch.float32)
    if scale is None:
        return blocks
    by_line = q.layout.storage == "float8" and scale.ndim
    return blocks * (scale.view(-1, 1) if by_line else scale.view(-1))


def _fp8_product(left: QTensor, right: QTensor, fast: bool = False) -> tuple[Tensor, list[Scale]]:
    sides = left.codes, _line_scale(left), right.codes.T, _line_scale(right).T
    return fp8_matmul(*sides, fast=fast), _constants(left, right)


def _fp8_block_product(left: QTensor, right: QTensor) -> tuple[Tensor, list[Scale]]:
    """bfloat16. Tensor scales that are read are multiplied into the block scales."""
    a, b = (replace(side, block_scale=_line_scale(side)) for side in (left, right))
    if left.codes.is_cuda:
        return _block_scaled_mm(a, b), _constants(left, right)
    values, others = (side.codes.float() * side.scale_of_each() for side in (a, b))
    return matmul(values, others.T).bfloat16(), _constants(left, right)


def _block_scaled_mm(left: QTensor, right: QTensor) -> Tensor:
    """In the sizes and the layout that cuBLASLt takes, and torch checks: whole groups of 128 along the contraction, 16
    lines of the right side, and whole tiles of 128 lines."""
    a, scale_a, kind_a = _in_groups(left, 1)
    b, scale_b, kind_b = _in_groups(right, FP8_MULTIPLE)
    return scaled_mm(a, b.T, scale_a, kind_a, scale_b, kind_b)[: left.shape[0], : right.shape[1]]


def _in_groups(q: QTensor, multiple: int) -> tuple[Tensor, Tensor, ScalingType]:
    """Codes and block scales of a side, filled with zeros: lines to a multiple, without a copy where sizes are
    multiples of 128 and 512. Scales are (L, n / 128) with L contiguous; of 128x128 tiles (n / 128, L / 128), n / 128
    contiguous and a multiple of 4."""
    assert q.block_scale is not None
    kind = ScalingType.BlockWise128x128 if q.layout.tiled else ScalingType.BlockWise1x128
    below = -q.codes.shape[0] % (GROUP if q.layout.tiled else multiple)
    codes, scale = _filled(q.codes, below, -q.codes.shape[1] % GROUP), q.block_scale
    lines = codes.shape[0] // GROUP if q.layout.tiled else codes.shape[0]
    if q.layout.tiled:
        missing = (0, -scale.shape[1] % 4, 0, lines - scale.shape[0])
    else:
        missing = (0, lines - scale.shape[1])
    return codes, (F.pad(scale, missing) if any(missing) else scale).T, kind


def _native_product(left: QTensor, right: QTensor) -> tuple[Tensor, list[Scale]]:
    """On FP4 and MX units, bfloat16; and the scales that the units do not read."""
    plan, wide = left.layout.plan, -right.shape[1] % FP8_MULTIPLE
    assert plan is not None and left.block_scale is not None and right.block_scale is not None
    two_levels = plan.scale_kind == "minifloat"
    dtype = torch.float8_e4m3fn if plan.element == E4M3 else torch.float4_e2m1fn_x2
    scale_dtype = torch.float8_e4m3fn if two_levels else torch.float8_e8m0fnu
    a, b = left.codes.view(dtype), _filled(right.codes, wide, 0).view(dtype).T
    scales = [left.block_scale.view(scale_dtype)], [right.block_scale.view(scale_dtype)]
    kinds, orders = [ScalingType.BlockWise1x32], [SwizzleType.SWIZZLE_32_4_4]
    if two_levels:
        kinds, orders = [ScalingType.BlockWise1x16, ScalingType.TensorWise], [*orders, SwizzleType.NO_SWIZZLE]
        assert left.tensor_scale is not None and right.tensor_scale is not None
        scales = [*scales[0], left.tensor_scale], [*scales[1], right.tensor_scale]
    product = scaled_mm(a, b, scales[0], kinds, scales[1], kinds, orders, orders)[:, : right.shape[1]]
    return product, [] if two_levels else scales_of(left, right)


ON_8_BIT_UNITS = {"cpu": ANY, "cuda": ANY}
ON_FP8_UNITS, ON_HOPPER = {"cpu": ANY, "cuda": ((8, 9), ANY[1])}, {"cpu": ANY, "cuda": ((9, 0), (9, 9))}
ON_FP4_UNITS, ON_DATACENTER_BLACKWELL = {"cuda": ((10, 0), ANY[1])}, {"cuda": ((10, 0), (10, 9))}
_fast = partial(_fp8_product, fast=True)
TABLE = {
    product.name: product
    for product in (
        Product("int8", "int8", _stored("int8"), _int8_product, ON_8_BIT_UNITS),
        Product("mxfp4", "swizzled", _native(MX_E2M1, 32), _native_product, ON_DATACENTER_BLACKWELL),
        Product("nvfp4", "swizzled", _native(MX_E2M1, 16), _native_product, ON_FP4_UNITS),
        Product("mxfp8", "swizzled", _native(E4M3, 32), _native_product, ON_FP4_UNITS),
        Product("fp8", "float8", _stored("float8"), _fp8_product, ON_FP8_UNITS, _not_e5m2_on_the_right),
        Product("fp8_fast", "float8", _stored("float8"), _fast, ON_FP8_UNITS, _not_e5m2_on_the_right),
        Product("fp8_block", "float8_128", _stored("float8_128"), _fp8_block_product, ON_HOPPER, _in_blocks),
        Product("float", "float", _floats, _float_product, None),
    )
}
SETTINGS = {  # the rows that a setting tries, in this order; then float
    "auto": ("int8",),
    "float": (),
    "fp8": ("int8", "fp8_block", "fp8"),  # a quantiser writes scales of 128 elements at once, those of a line not
    "fp8_fast": ("int8", "fp8_fast", "fp8_block"),
    "fp4": ("int8", "mxfp4", "nvfp4", "mxfp8"),
}
