"""QTensor: a quantised matrix as codes and scales. What quantisers make, products take, and layers keep.

# M, N the matrix. L lines of n elements lie along the contraction: (M, N) for dim -1, (N, M) for dim -2.
x ≈ codes * block_scale * tensor_scale

A Layout says how the tensors of a QTensor hold this. Its storages:
- float32, bfloat16: codes * block_scale, exact, (M, N). What a float product takes.
- int8: integers q, (M, N), that stand for the codes (q + offset) * unit of `reference.stored_integer`.
- packed: the bits of the format (`reference.pack`), contraction last. Block scales are bytes (L, n / block). The zero
  points of a line are joined as codes are (`reference.join_lines`).
- swizzled: packed, with the bytes of the block scales in the order of `swizzle`. What FP4 and MX units take.
- float8: codes (L, n) in float8 with one float32 scale a line, a power of two. Codes far below the largest of their
  line are rounded; `inexact` counts them.
- float8_128: codes (L, n) in float8 with float32 scales in the order that cuBLASLt reads: one for each 128 elements
  along the contraction, (n / 128, L), or for each tile of 128x128, (L / 128, n / 128).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from qtrain_kernels import dispatch, reference
from qtrain_kernels.formats import E4M3, E5M2, MX_E2M1
from qtrain_kernels.plans import Packed, Plan, Rotation, can_pack, field_width, stored_integer
from qtrain_kernels.reference import constant_scale

Storage = Literal["float32", "bfloat16", "int8", "packed", "swizzled", "float8", "float8_128"]
STORAGES: tuple[Storage, ...] = get_args(Storage)
FLOATS: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GROUP = 128  # elements along the contraction that share a scale in float8_128
FLOAT8 = {torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}
SWIZZLED = ("e2m1/32/e8m0", "e2m1/16/e4m3", "e4m3/32/e8m0")  # what FP4 and MX units take

TENSORS = ("codes", "block_scale", "tensor_scale", "mask", "zero_point")  # of a QTensor, as `Layout.parts` has them

Shape = tuple[int, ...]


# --------------------------------------------------------------------------------------------------------------- layout


@dataclass(frozen=True)
class Layout:
    """How the tensors of a QTensor hold a matrix.

    plan: what quantised it; None for a matrix left in the compute dtype. A QTensor has a mask where its plan has one.
    shape: (M, N). dim: the contraction, -1 or -2, along which blocks lie. rows: lines that share a block scale (16 of a
    16x16 tile). blocks: whether a float storage keeps the block scales beside the values that contain them.
    ValueError for a storage that cannot hold the plan.
    """

    plan: Plan | None
    shape: tuple[int, int] = (0, 0)
    dim: int = -1
    storage: Storage = "float32"
    rows: int = 1
    blocks: bool = False

    def __post_init__(self) -> None:
        if self.dim not in (-1, -2):
            raise ValueError(f"blocks lie along dim -1 or -2; got {self.dim}")
        reason = self.lacks(self.storage)
        if reason:
            raise ValueError(f"storage {self.storage!r} cannot hold this matrix: {reason}")

    @cached_property
    def t(self) -> Layout:
        """Of the transpose, which has no mask."""
        return replace(self.unmasked, shape=self.shape[::-1], dim=-3 - self.dim)

    @cached_property
    def unmasked(self) -> Layout:
        """The same without a mask."""
        if self.plan is None or self.plan.mask is None:
            return self
        return replace(self, plan=replace(self.plan, mask=None))

    @cached_property
    def lines(self) -> tuple[int, int]:
        """(L, n): the shape with the contraction last."""
        return self.shape if self.dim == -1 else (self.shape[1], self.shape[0])

    @cached_property
    def flat(self) -> bool:
        """Whether codes have the shape (M, N); else the contraction lies last."""
        return self.storage in (*FLOATS, "int8")

    @cached_property
    def packed(self) -> bool:
        """Whether codes and block scales are bits of the format."""
        return self.storage in ("packed", "swizzled")

    @cached_property
    def loses_nan(self) -> bool:
        """Whether a NaN shows in neither codes nor scales: it has no bits, and a given scale stays finite beside it."""
        return self.packed and self.plan is not None and self.plan.scale_rule.given

    @cached_property
    def size(self) -> int | None:
        """Elements along the contraction that share a block scale; None without blocks."""
        return None if self.plan is None or self.plan.block is None else self.plan.block // self.rows

    @cached_property
    def constant(self) -> float:
        """What multiplies all codes beside the tensor scale, and follows from the plan: 4/3 where the quantiser leaves
        headroom, else 1."""
        known = None if self.plan is None or self.plan.line_rule is not None else constant_scale(self.plan)
        return 1.0 if known is None else known

    @property
    def float8_dtype(self) -> torch.dtype:
        """The float8 that has all of the plan's codes, after a shift of their exponents."""
        wide = self.plan is not None and self.plan.element.max > E4M3.max
        return torch.float8_e5m2 if wide else torch.float8_e4m3fn

    def stored(self, storage: Storage, blocks: bool = False) -> Layout:
        """The same in another storage. ValueError where the plan does not fit it."""
        return replace(self, storage=storage, blocks=blocks and self.size is not None and storage in FLOATS)

    @cached_property
    def saved(self) -> Layout:
        """The storage of the fewest bits that holds the same, NaN included: packed where that is smaller, else as it
        is, or in floats where float8 may round."""
        if self.packed or self.plan is None:
            return self.stored(self.storage)
        rounds = not self.flat and self.size is not None
        storage = float_storage(self.plan, torch.bfloat16) if rounds else self.storage
        width = 8 * FLOATS[storage].itemsize if storage in FLOATS else 8
        packs = not (self.lacks("packed") or self.plan.scale_rule.given) and field_width(self.plan.element) < width
        return self.stored("packed" if packs else storage)

    @cached_property
    def held(self) -> Layout:
        """The same where every backend writes it: floats, integers, bits that lose no NaN, and float8 where codes need
        no shift. Else the floats, beside their block scales, of which it can be made."""
        of_codes = self.storage == "float8_128" and self.plan is not None and self.plan.scale_kind == "float32"
        if self.storage in (*FLOATS, "int8") or (self.storage == "packed" and not self.loses_nan) or of_codes:
            return self
        return self.stored(float_storage(self.plan, torch.bfloat16), blocks=True)

    def along(self, dim: int) -> Layout:
        """The layout in which the same codes serve a product that contracts the other dim. ValueError where a scale
        would vary along that contraction."""
        if dim == self.dim:
            return self
        lined = self._tensor_scale is not None and self._tensor_scale[0] != ()
        if lined or (self.size is not None and self.storage not in FLOATS):
            raise ValueError("scales of rows or blocks vary along the other dim; dequantise, and quantise again")
        if not self.flat:
            raise ValueError(f"{self.storage} codes lie along dim {self.dim}; convert them to float or int8 first")
        return replace(self, dim=dim, blocks=False)

    def lacks(self, storage: str) -> str | None:
        """Why a storage cannot hold what the plan quantises, with the remedy; None if it can."""
        return _lacks(self.plan, self.rows, storage)

    def shapes(self) -> list[tuple[Shape, torch.dtype]]:
        """(shape, dtype) of each of the tensors, in the order of TENSORS, without those not there."""
        return [part for part in self.parts if part is not None]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Those of TENSORS that are there, in the order of `shapes`."""
        return tuple(name for name, part in zip(TENSORS, self.parts, strict=True) if part is not None)

    @cached_property
    def parts(self) -> tuple[tuple[Shape, torch.dtype] | None, ...]:
        """As `shapes`, with None for what is not there."""
        mask = ((-(-math.prod(self.shape) // 8),), torch.uint8) if self.plan is not None and self.plan.mask else None
        return self._codes, self._block_scales, self._tensor_scale, mask, self._zero_points

    @property
    def _codes(self) -> tuple[Shape, torch.dtype]:
        if self.flat:
            return self.shape, FLOATS.get(self.storage, torch.int8)
        assert self.plan is not None
        lines, length = self.lines
        if self.storage in ("float8", "float8_128"):
            return self.lines, self.float8_dtype
        bits = length * field_width(self.plan.element)
        # Lines that fill no whole bytes follow each other without a gap, as reference.pack writes them.
        return ((lines, bits // 8) if bits % 8 == 0 else (-(-lines * bits // 8),)), torch.uint8

    @property
    def _block_scales(self) -> tuple[Shape, torch.dtype] | None:
        lines, blocks = self.scale_grid
        if self.size is None or (self.storage in FLOATS and not self.blocks):
            return None
        if self.storage == "swizzled":
            return (-(-lines // 128) * 128 * -(-blocks // 4) * 4,), torch.uint8
        turned = self.dim == -2 if self.storage in FLOATS else self.storage == "float8_128" and not self.tiled
        return ((blocks, lines) if turned else (lines, blocks)), self._packed_scales if self.packed else torch.float32

    @property
    def _zero_points(self) -> tuple[Shape, torch.dtype] | None:
        """Where the block scales are."""
        if self._block_scales is None or self.plan is None or not self.plan.element.zero_point:
            return None
        lines, blocks = self.scale_grid
        if self.packed:
            return (lines, -(-blocks * field_width(self.plan.element) // 8)), torch.uint8
        return self._block_scales[0], torch.uint8

    @property
    def _packed_scales(self) -> torch.dtype:
        assert self.plan is not None
        return reference.SCALE_DTYPES.get(self.plan.scale_kind, torch.uint8)

    @property
    def _tensor_scale(self) -> tuple[Shape, torch.dtype] | None:
        plan = self.plan
        if plan is None or plan.line_rule is None:
            return None
        if plan.whole:
            return (), torch.float32
        return ((self.shape[0], 1) if self.dim == -1 else (1, self.shape[1])), torch.float32

    @cached_property
    def scale_grid(self) -> tuple[int, int]:
        """(lines, blocks) of the block scales, contraction last: a scale for each tile in a float storage."""
        lines, length = self.lines
        if self.storage == "float8":
            return lines, 1
        if self.storage == "float8_128":
            return (-(-lines // self.rows) if self.tiled else lines), -(-length // GROUP)
        return -(-lines // self.rows), -(-length // (self.size or 1))

    @property
    def tiled(self) -> bool:
        """Whether tiles keep one scale each in float8_128: those of 128x128 under float32 scales. Other tiles have one
        for each line."""
        return self.rows == GROUP == self.size and self.plan is not None and self.plan.scale_kind == "float32"

    # Operations of reference.py work on (outer, span, inner).

    def whole_lines(self, x: Tensor) -> Tensor:
        """x (M, N) -> (outer, contraction, inner), without a copy."""
        return x.reshape(-1, x.shape[1], 1) if self.dim == -1 else x.reshape(1, *x.shape)

    def spans(self, x: Tensor) -> Tensor:
        """x (M, N) -> (outer, span, inner), without a copy but for tiles, which are filled with zeros at the edges."""
        span = 1 if self.plan is None else (self.plan.span or 1) // self.rows
        if self.rows > 1:
            (height, width), (below, right) = self._tile, self._padding
            x = F.pad(x, (0, right, 0, below))
            tiles = x.view(x.shape[0] // height, height, -1, width).transpose(1, 2)
            return tiles.reshape(-1, height * width, 1)
        if span == 1:
            return self.whole_lines(x)
        return x.reshape(-1, span, 1) if self.dim == -1 else x.reshape(x.shape[0] // span, span, x.shape[1])

    def unspan(self, spans: Tensor) -> Tensor:
        """`spans` undone: (M, N)."""
        if self.rows == 1:
            return spans.reshape(self.shape)
        (height, width), padding = self._tile, self._padding
        down, right = (size + extra for size, extra in zip(self.shape, padding, strict=True))
        tiles = spans.reshape(down // height, right // width, height, width).transpose(1, 2)
        return tiles.reshape(down, right)[: self.shape[0], : self.shape[1]]

    @property
    def _tile(self) -> tuple[int, int]:
        assert self.size is not None
        return (self.rows, self.size) if self.dim == -1 else (self.size, self.rows)

    @property
    def _padding(self) -> tuple[int, int]:
        """Zeros below and to the right of the matrix that fill its last tiles; no scale by magnitude sees them."""
        return -self.shape[0] % self._tile[0], -self.shape[1] % self._tile[1]


def float_storage(plan: Plan | None, dtype: torch.dtype) -> Storage:
    """The storage of an operand that multiplies in dtype: float32 where bfloat16 does not hold codes * block_scale."""
    return "bfloat16" if dtype == torch.bfloat16 and (plan is None or plan.exact_in_bfloat16) else "float32"


@cache
def _lacks(plan: Plan | None, rows: int, storage: str) -> str | None:
    if storage not in STORAGES:
        return f"there is no such storage; use {', '.join(STORAGES)}"
    if plan is None:
        return None if storage in FLOATS else "it is not quantised; use float32 or bfloat16"
    element, size = plan.element, None if plan.block is None else plan.block // rows
    integers, powers = element.uniform, plan.block is None or plan.scale_kind == "e8m0"
    codes = {MX_E2M1.levels(): "e2m1", E4M3.levels(): "e4m3"}.get(element.levels(), "other codes")
    written = f"{codes}/{plan.block or 'line'}/{'e4m3' if plan.scale_element == E4M3 else plan.scale_kind}"
    of_128 = plan.scale_kind == "float32" and size == GROUP and rows in (1, GROUP) and element == E4M3
    obstacles = (
        ("bfloat16", not plan.exact_in_bfloat16, "codes times block scales have more than 8 significant bits"),
        ("int8", not integers or plan.block is not None, "int8 holds integer codes without block scales"),
        ("int8", plan.rule == "learned", "a NaN has no integer, and a learned scale stays finite"),
        (
            "int8", plan.sparsity is not None and stored_integer(element)[1] > 0,
            "sparsity makes codes zero, which integers stored less a half do not hold",
        ),
        ("packed swizzled", rows > 1, f"tiles of {rows} rows are not packed; give each row a block scale of its own"),
        ("packed", not can_pack(plan), "the bits of its format do not hold every code and scale (can_pack)"),
        ("swizzled", written not in SWIZZLED, f"FP4 and MX units take {', '.join(SWIZZLED)}; found {written}"),
        ("float8_128", size is None or GROUP % size > 0, f"its block scales are not those of {GROUP} elements or less"),
        (
            "float8_128", not (powers or of_128),
            f"block scales in {plan.scale_kind} must be float32 of E4M3 codes, in blocks of {GROUP} or {GROUP}x{GROUP}",
        ),
        ("float8", not powers, f"block scales in {plan.scale_kind} are no powers of two, so no float8 codes hold them"),
        (
            "float8 float8_128",
            element.mantissa_bits is None or element.precision_bits > 3 or plan.rule == "learned",
            "float8 holds minifloat codes of at most 3 mantissa bits under computed scales",
        ),
    )  # fmt: skip
    reasons = (reason for storages, found, reason in obstacles if found and storage in storages.split())
    return next((reason + "; use float32 or bfloat16" for reason in reasons), None)


# --------------------------------------------------------------------------------------------------------------- tensor


@dataclass(frozen=True, eq=False)
class QTensor:
    """A matrix (M, N) ≈ codes * block_scale * tensor_scale * layout.constant, as layout says.

    tensor_scale: () or, a scale for each line, (M, 1) along dim -1 and (1, N) along dim -2, float32. mask: bits, eight
    a byte, of (M, N) in row-major order, 1 where a gradient passes (`reference.join`). zero_point: the level of zero in
    each block, uint8, beside the block scales: codes are levels less it. Each is None where the layout has none.
    """

    codes: Tensor
    block_scale: Tensor | None
    tensor_scale: Tensor | None
    mask: Tensor | None
    layout: Layout
    zero_point: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """The tensors that are there, in the order of `layout.shapes()`."""
        return [part for part in (getattr(self, name) for name in TENSORS) if part is not None]

    @staticmethod
    def of(layout: Layout, tensors: Sequence[Tensor]) -> QTensor:
        """`tensors()` undone. ValueError where shapes or dtypes are not those of the layout."""
        found = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        if found != layout.shapes():
            raise ValueError(f"storage {layout.storage!r} has tensors {layout.shapes()}; got {found}")
        there = dict(zip(layout.names, tensors, strict=True))
        return QTensor(layout=layout, **{name: there.get(name) for name in TENSORS})  # pyright: ignore

    @property
    def shape(self) -> tuple[int, int]:
        return self.layout.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def t(self) -> QTensor:
        """The transpose (N, M), without a copy and without a mask."""
        codes, blocks, scale, zeros = self.codes, self.block_scale, self.tensor_scale, self.zero_point
        if self.layout.flat:
            codes = codes.T
            blocks, zeros = (None if part is None else part.T for part in (blocks, zeros))
        return QTensor(
            codes, blocks, scale.T if scale is not None and scale.ndim else scale, None, self.layout.t, zeros
        )

    @property
    def unmasked(self) -> QTensor:
        """The same without a mask."""
        if self.mask is None:
            return self
        return QTensor(self.codes, self.block_scale, self.tensor_scale, None, self.layout.unmasked, self.zero_point)

    def along(self, dim: int) -> QTensor:
        """The same codes for a product that contracts the other dim, without a mask; see `Layout.along`."""
        blocks, zeros = (self.block_scale, self.zero_point) if dim == self.layout.dim else (None, None)
        return replace(self, block_scale=blocks, zero_point=zeros, layout=self.layout.along(dim)).unmasked

    def passes(self, backend: str = "auto") -> Tensor | None:
        """The mask as uint8 (M, N) of 0 and 1; None without one."""
        return None if self.mask is None else bytes_of(self.mask, self.shape, backend)

    def filled(self, rows: int) -> QTensor:
        """A matrix of flat codes under one tensor scale, without a mask, with so many rows of zeros below it."""
        if not rows:
            return self
        shape = self.shape[0] + rows, self.shape[1]
        return replace(self, codes=F.pad(self.codes, (0, 0, 0, rows)), layout=replace(self.layout, shape=shape))

    def dequantize(self, backend: str = "auto") -> Tensor:
        """(M, N): the values themselves where they are floats and no scale is left to multiply, else float32."""
        values = self._decoded(FLOATS.get(self.layout.storage, torch.float32), backend)
        if self.tensor_scale is not None:
            return values.float() * self.tensor_scale
        return values if self.layout.constant == 1.0 else values.float() * self.layout.constant

    def scale_of_each(self) -> Tensor:
        """Of float8 storages: the block scale of every element, (L, n), or (L, 1) where a line has one."""
        assert self.block_scale is not None
        if self.layout.storage == "float8":
            return self.block_scale
        lines, length = self.layout.lines
        if self.layout.tiled:
            return self.block_scale.repeat_interleave(GROUP, 0)[:lines].repeat_interleave(GROUP, 1)[:, :length]
        return self.block_scale.repeat_interleave(GROUP, 0)[:length].T

    def to(self, target: Layout | Storage, backend: str = "auto") -> QTensor:
        """The same matrix in another layout, without the loss of a bit, but for what float8 rounds (`inexact`).

        target: a storage, or a layout of the same matrix. It may lack the mask, may give each row of a tile and each
        part of a block a scale of its own, and may widen the codes to an element that has them all (E2M1 as E4M3).
        ValueError for whatever would lose bits.
        """
        if not isinstance(target, Layout):
            target = self.layout.stored(target, self.layout.blocks)
        q = self if target.plan is None or target.plan.mask is not None else self.unmasked
        if q.layout == target:
            return q
        reason = obstacle(q.layout, target)
        if reason:
            raise ValueError(f"{self.layout.storage} {self.shape} cannot become {target.storage}: {reason}")
        return q._opened(target, backend)._regrouped(target)._closed(target, backend)

    def _opened(self, target: Layout, backend: str) -> QTensor:
        """In a float storage or int8, with the block scales that the target needs."""
        layout, blocks, zeros = self.layout, None, None
        if layout.flat:
            return self
        storage = target.storage if target.flat else float_storage(layout.plan, torch.bfloat16)
        if layout.size is not None and (not target.flat or target.blocks):
            assert layout.plan is not None
            blocks = reference._scales_of(self._scale_bytes(), layout.plan)
            zeros = self._zeros_of_blocks()
            if layout.dim == -2:
                blocks, zeros = blocks.T, None if zeros is None else zeros.T
        values = self._decoded(FLOATS.get(storage, torch.int8), backend)
        opened = layout.stored(storage, blocks is not None)
        return replace(self, codes=values, block_scale=blocks, zero_point=zeros, layout=opened)

    def _decoded(self, dtype: torch.dtype, backend: str) -> Tensor:
        """(M, N) in dtype, without the tensor scale."""
        layout, plan = self.layout, self.layout.plan
        if layout.storage in FLOATS:
            return self.codes.to(dtype)
        assert plan is not None
        if layout.storage == "int8":
            unit, offset = stored_integer(plan.element)
            codes = self.codes.to(dtype)
            return (codes.add_(offset) if offset else codes).mul_(unit)
        if layout.packed:
            lines, length = layout.lines
            zeros = self._zeros_of_blocks()
            packed = Packed(
                self.codes.reshape(-1),
                None if layout.size is None else self._scale_bytes().reshape(-1),
                None if zeros is None else zeros.reshape(-1),
            )
            size = layout.size or length
            shape = torch.Size((lines * length // max(size, 1), size, 1))
            unpack = dispatch.get("unpack", backend, self.codes.device.type, plan)
            values = unpack(packed, shape, plan, dtype).view(lines, length)
        else:
            values = self.codes.float()
            values = (values if self.block_scale is None else values * self.scale_of_each()).to(dtype)
        return values if layout.dim == -1 else values.T

    def _scale_bytes(self) -> Tensor:
        """(L, n / block) of a packed or swizzled matrix, as `Packed.scales`."""
        assert self.block_scale is not None
        if self.layout.storage == "packed":
            return self.block_scale
        return unswizzle(self.block_scale, *self.layout.scale_grid)

    def _zeros_of_blocks(self) -> Tensor | None:
        """(L, n / block) uint8 of a packed matrix; None where its element has no zero point."""
        if self.zero_point is None:
            return None
        assert self.layout.plan is not None
        return reference.split_lines(self.zero_point, field_width(self.layout.plan.element), self.layout.scale_grid[1])

    def _regrouped(self, target: Layout) -> QTensor:
        """With the target's plan: a block scale for each of its rows and blocks, the values unchanged."""
        layout = self.layout

        def of_each(blocks: Tensor | None) -> Tensor | None:
            if blocks is None or layout.size is None or target.size is None:
                return blocks
            lines = blocks if layout.dim == -1 else blocks.T
            if layout.rows != target.rows:
                lines = lines.repeat_interleave(layout.rows, 0)[: layout.lines[0]]
            if layout.size != target.size:
                lines = lines.repeat_interleave(layout.size // target.size, 1)
            return lines if layout.dim == -1 else lines.T

        blocks, zeros = of_each(self.block_scale), of_each(self.zero_point)
        return replace(
            self, block_scale=blocks, zero_point=zeros, layout=replace(layout, plan=target.plan, rows=target.rows)
        )

    def _closed(self, target: Layout, backend: str) -> QTensor:
        """Out of a float storage or int8 in the target's."""
        plan, layout, codes = target.plan, self.layout, self.codes
        blocks, zeros = self.block_scale, self.zero_point
        if target.storage in FLOATS:
            codes = self._decoded(FLOATS[target.storage], backend)
            blocks, zeros = (blocks, zeros) if target.blocks else (None, None)
            return replace(self, codes=codes, block_scale=blocks, zero_point=zeros, layout=target)
        assert plan is not None
        if target.storage == "int8":
            unit, offset = stored_integer(plan.element)
            if layout.storage != "int8":
                codes = (codes.float() * (1.0 / unit) - offset).to(torch.int8)
            return replace(self, codes=codes, layout=target)
        if not target.packed:
            shifted, scale = _shifted(self, target)
            codes = shifted.to(target.float8_dtype, memory_format=torch.contiguous_format)
            return replace(self, codes=codes, block_scale=scale, layout=target)
        if layout.dim == -2:
            codes = codes.T
            blocks, zeros = (None if part is None else part.T for part in (blocks, zeros))
        if target.loses_nan and codes.isnan().any():
            raise ValueError(
                f"{layout.storage} {self.shape} cannot become {target.storage}: it holds a NaN, which has no bits "
                "under a learned scale; keep it in float32 or bfloat16"
            )
        spans = codes.reshape(-1, layout.size or target.lines[1], 1)
        pack = dispatch.get("pack", backend, codes.device.type, plan)
        given = () if zeros is None else (zeros.reshape(-1),)
        packed = pack(spans, None if blocks is None else blocks.reshape(-1, 1, 1), plan, *given)
        scales = None if packed.scales is None else packed.scales.view(target.scale_grid)
        scales = swizzle(scales) if scales is not None and target.storage == "swizzled" else scales
        codes = packed.codes.view(target._codes[0])
        if zeros is not None:
            zeros = reference.join_lines(zeros, field_width(plan.element))
        return replace(self, codes=codes, block_scale=scales, zero_point=zeros, layout=target)


def unquantised(x: Tensor) -> QTensor:
    """A matrix as it is, float32 or bfloat16."""
    storage: Storage = "bfloat16" if x.dtype == torch.bfloat16 else "float32"
    return QTensor(x, None, None, None, Layout(None, (x.shape[0], x.shape[1]), storage=storage))


def bytes_of(bits: Tensor, shape: Sequence[int], backend: str = "auto") -> Tensor:
    """A mask in bits, eight a byte -> uint8 of `shape`, 0 or 1."""
    return dispatch.get("split", backend, bits.device.type)(bits, 1, math.prod(shape)).view(*shape)


def obstacle(here: Layout, target: Layout) -> str | None:
    """Why a matrix in one layout cannot become another without the loss of bits; None if it can."""
    if (here.shape, here.dim) != (target.shape, target.dim):
        return f"it lies along dim {here.dim}; asked for {target.shape} along dim {target.dim}"
    if here.plan is None or target.plan is None:
        widens = here.plan is target.plan and (here.storage, target.storage) == ("bfloat16", "float32")
        return None if widens else "it is not quantised, so another form would round it; quantise it"
    if target.plan.mask not in (None, here.plan.mask):
        return "it has no such mask"
    regroups = (here.unmasked.plan, here.rows) != (target.unmasked.plan, target.rows)
    if not refines(here, target) or (regroups and here.storage == "int8"):
        return "its codes and blocks are not among those of the target's plan"
    if here.storage in ("float8", "float8_128"):
        rounded = here.size is not None and here.plan.scale_kind == "e8m0"
        if rounded or regroups or target.storage not in FLOATS or target.blocks:
            return "float8 may have rounded its codes, and block scales are gone; convert what it was made of"
    needs_blocks = target.size is not None and (target.storage not in FLOATS or target.blocks)
    if here.storage in FLOATS and needs_blocks and not here.blocks:
        return "its block scales are not kept beside the values; quantise with blocks=True"
    if target.storage == "float8_128" and here.plan.scale_kind == "float32":
        return "codes cannot be told from their product with float32 scales; quantise into float8_128"
    return None


def refines(here: Layout, target: Layout) -> bool:
    """Whether the target's plan has every code under every scale of ours: its element has all of our codes, its rows
    and blocks divide ours, and all else but masks and corrections is the same."""
    return _refines(here.plan, here.rows, target.plan, target.rows)


@cache
def _refines(ours: Plan | None, rows: int, theirs: Plan | None, their_rows: int) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    like = replace(theirs, element=ours.element, block=ours.block, mask=ours.mask, correction=ours.correction)
    size = None if ours.block is None else ours.block // rows
    their_size = None if theirs.block is None else theirs.block // their_rows
    divides = size == their_size or (size is not None and size % (their_size or size + 1) == 0)
    codes = ours.element == theirs.element or set(ours.element.levels()) <= set(theirs.element.levels())
    return like == ours and their_rows in (1, rows) and divides and codes


# --------------------------------------------------------------------------------------------------------------- float8


def _shifted(q: QTensor, target: Layout) -> tuple[Tensor, Tensor | None]:
    """((L, n) values over their scale, float, before float8 rounds them; the scale (L, 1) or (groups, L), or None).

    The scale of a line or group is the largest of its block scales over 2^k, where 2^k times the largest code still is
    below float8's largest. A NaN among the block scales makes it NaN.
    """
    values = q.codes if q.layout.dim == -1 else q.codes.T
    if q.layout.size is None:
        return values, None
    assert q.block_scale is not None and target.plan is not None
    scales = q.block_scale if q.layout.dim == -1 else q.block_scale.T
    scales = scales.repeat_interleave(q.layout.rows, 0)[: values.shape[0]]
    if target.storage == "float8_128":
        per_group = GROUP // q.layout.size
        scales = F.pad(scales, (0, -scales.shape[1] % per_group)).view(len(scales), -1, per_group)
    element = target.plan.element
    headroom = math.floor(math.log2(FLOAT8[target.float8_dtype].max / element.max))
    scale = (
        scales.amax(-1, keepdim=target.storage == "float8") if scales.numel() else scales.new_ones(target.scale_grid)
    )
    scale = (scale * 2.0**-headroom).clamp_min(2.0**-126)  # below, the reciprocal would be infinite
    inverse = (1.0 / scale).to(values.dtype)
    if target.storage == "float8":
        return values * inverse, scale
    return values * inverse.repeat_interleave(GROUP, 1)[:, : values.shape[1]], scale.T.contiguous()


def inexact(q: QTensor, storage: Storage = "float8") -> Tensor:
    """() int64: how many elements of q, which is in a float storage with block scales, float8 would round."""
    target = q.layout.unmasked.stored(storage)
    reason = obstacle(q.layout, target)
    if reason or q.layout.storage not in FLOATS:
        raise ValueError(f"{q.layout.storage} {q.shape} cannot be counted in {storage}: {reason or 'it is no float'}")
    assert target.plan is not None
    shifted, _ = _shifted(q, target)
    return ((shifted.to(target.float8_dtype).to(shifted.dtype) != shifted) & shifted.isfinite()).sum()


# -------------------------------------------------------------------------------------------------------------- swizzle


def swizzle(scales: Tensor) -> Tensor:
    """Block scales (L, blocks), a byte each, in the order that cuBLASLt reads: flat, in tiles of 128 lines by 4 blocks,
    which follow each other along the blocks first. In a tile, the scale of line l and block b lies at
    (l % 32) * 16 + (l // 32) * 4 + b. Zeros fill up the last tiles.

    Source: cuBLAS, "1D block scaling factors layout"; torch's SwizzleType.SWIZZLE_32_4_4.
    """
    lines, blocks = scales.shape
    filled = F.pad(scales, (0, -blocks % 4, 0, -lines % 128))
    return filled.view(-1, 4, 32, filled.shape[1] // 4, 4).permute(0, 3, 2, 1, 4).reshape(-1)


def unswizzle(flat: Tensor, lines: int, blocks: int) -> Tensor:
    """`swizzle` undone: (lines, blocks)."""
    across = -(-blocks // 4)
    tiles = flat.view(-(-lines // 128), across, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(-1, 4 * across)[:lines, :blocks].contiguous()


# ------------------------------------------------------------------------------------------------------------- quantise


@dataclass(frozen=True, eq=False)
class Side:
    """How one operand is quantised.

    layout: what it becomes. rotation: along layout.dim, before all else. key: (2,) int32 for stochastic rounding and
    EDEN. learned: float32, the scales themselves where the plan's rule is `learned`: () of a tensor, (M, 1) of rows,
    (M, G) of the G blocks of each row. packed: whether the same codes are written packed too, for the backward.
    """

    layout: Layout
    rotation: Rotation | None = None
    key: Tensor | None = None
    learned: Tensor | None = None
    packed: bool = False


def quantize(
    x: Tensor,
    layout: Layout,
    rotation: Rotation | None = None,
    key: Tensor | None = None,
    learned: Tensor | None = None,
    backend: str = "auto",
) -> QTensor:
    """x (M, N), float, rotated along layout.dim and quantised as layout says; the other arguments are those of a Side.
    ValueError as of the backend's `quantize`, and for another shape."""
    if tuple(x.shape) != layout.shape:
        raise ValueError(f"the layout is of {layout.shape}; got {tuple(x.shape)}")
    return quantize_side(x, Side(layout, rotation, key, learned), backend)[0]


def quantize_side(x: Tensor | QTensor, side: Side, backend: str) -> tuple[QTensor, QTensor | None]:
    """x (M, N) as the Side says; and, with side.packed, the same without a mask in the storage of the fewest bits.
    A QTensor is dequantised first, within the kernel where there is one that does. ValueError for side.packed where the
    element has zero points."""
    layout = side.layout
    if layout.plan is None:
        values = _turned(x.dequantize(backend) if isinstance(x, QTensor) else x, side, backend)
        q = QTensor(values.to(FLOATS[layout.storage]), None, None, None, layout)
        return q, q if side.packed else None
    module = dispatch.module(backend, x.device.type, layout.plan, side.rotation, layout.rows)
    if isinstance(x, QTensor) and not (module.FUSED and module.requantizes(x.layout)):
        x = x.dequantize(backend)
    saved = layout.unmasked.saved
    packs, packed = side.packed and saved.storage == "packed", None
    both = packs or not side.packed or saved.storage == layout.storage  # else what is saved is made of floats too
    held = layout if module.FUSED and module.writes(layout) and both else layout.held
    if layout.plan.rule == "learned" and layout.plan.block is not None:
        assert isinstance(x, Tensor)
        q = _quantize_groups(x, side, held, backend)
    else:
        asked = Side(held, side.rotation, side.key, side.learned, packs)
        codes, blocks, scale, mask, *bits = module.quantize(x, asked)
        zeros = bits.pop(0) if layout.plan.element.zero_point else None
        q = QTensor(codes, blocks, scale, mask, held, zeros)
        packed = QTensor(bits[0], bits[1], scale, None, saved) if packs else None
    if side.packed and packed is None:
        packed = q.unmasked.to(saved, backend)
    return q if held is layout else q.to(layout, backend), packed


def quantize_both(x: Tensor, rows: Side, columns: Side, backend: str) -> list[QTensor]:
    """x (M, N) along its rows and along its columns, each as its Side says; in one reading of x where the backend
    can."""
    sides = rows, columns
    modules = [
        dispatch.module(backend, x.device.type, side.layout.plan, side.rotation, side.layout.rows) for side in sides
    ]
    if all(module.FUSED and module.writes(side.layout) for module, side in zip(modules, sides, strict=True)):
        found = modules[0].quantize_both(x, rows, columns)
        return [
            QTensor(parts[0], parts[1], parts[2], None, side.layout) for parts, side in zip(found, sides, strict=True)
        ]
    return [quantize_side(x, side, backend)[0] for side in sides]


def _turned(x: Tensor, side: Side, backend: str) -> Tensor:
    """x (M, N) as the Side rotates it."""
    if side.rotation is None:
        return x
    rotate = dispatch.get("rotate", backend, x.device.type, rotation=side.rotation)
    return rotate(side.layout.whole_lines(x), side.rotation).view(x.shape)


def _quantize_groups(x: Tensor, side: Side, held: Layout, backend: str) -> QTensor:
    """By kernels whose blocks find their own scales: each block, whose scale is learned, is a row of a matrix of its
    own. ValueError where the scales are not those of the blocks."""
    plan, scale = held.plan, side.learned
    assert plan is not None and plan.block is not None
    if held.dim != -1 or scale is None or tuple(scale.shape) != held.scale_grid:
        found = "none" if scale is None else tuple(scale.shape)
        raise ValueError(f"learned scales of blocks are {held.scale_grid} along dim -1; got {found} along {held.dim}")
    scales = scale.reshape(-1, 1)
    of_rows = Layout(replace(plan, block=None), (scales.shape[0], plan.block), -1, "float32")
    rows = quantize(_turned(x, side, backend).reshape(of_rows.shape), of_rows, None, None, scales, backend)
    codes = (rows.codes * scales).view(held.shape).to(FLOATS[held.storage])
    return QTensor(codes, scale if held.blocks else None, None, rows.mask, held)
