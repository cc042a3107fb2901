"""Quantizer: rotate -> scale -> round -> codes, of a matrix along one of its two dims.

# M, N the matrix; quantised along dim -1 (each row) or -2 (each column): no transpose is made.
x ≈ codes * block_scale * tensor_scale. A GEMM takes codes * block_scale, exact in bfloat16, and its result takes the
tensor scale: one GEMM in bfloat16 thus holds exactly the operands that a low-precision GEMM would. Integer codes
without blocks go into an INT8 GEMM as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from qtrain.errors import UserError
from qtrain.quant.estimator import gradient_mask
from qtrain.quant.random import checked_seed, key_words
from qtrain.quant.rotation import hadamard
from qtrain.recipe import QuantSpec, check_spec
from qtrain.settings import Backend, parse
from qtrain_kernels import dispatch
from qtrain_kernels.formats import get_format
from qtrain_kernels.gemm import Folded, fold, int8_matmul
from qtrain_kernels.plans import (
    ROUNDINGS,
    Packed,
    Plan,
    Rotation,
    RoundingName,
    can_pack,
    field_width,
    stored_integer,
)
from qtrain_kernels.precision import matmul


@dataclass(frozen=True)
class QuantizedTensor:
    """x (M, N) in rotated space as codes and scales.

    codes: (M, N) float32 on the format's grid. block_scale: float32 (M, N), the block's at each of its elements; None
    without blocks. tensor_scale: a float, a () tensor, or one per row (M, 1) or column (1, N). mask: (M, N) bool, True
    where a gradient passes; None where all do.
    """

    codes: Tensor
    block_scale: Tensor | None
    tensor_scale: Tensor | float
    mask: Tensor | None

    def dequantize(self) -> Tensor:
        """(M, N) float32."""
        values = self.codes if self.block_scale is None else self.codes * self.block_scale
        return values * self.tensor_scale


@dataclass(frozen=True)
class Counts:
    """What quantising did to so many elements. not_a_number: of the result; a NaN or an infinity makes its whole block,
    row or tensor so. saturated: pulled back to the largest code. flushed: became zero without being it."""

    elements: int
    not_a_number: int
    saturated: int
    flushed: int


@dataclass(frozen=True)
class Operand:
    """One side of a GEMM: values (M, N) in the compute dtype, and what multiplies the result instead of them.

    values: in float32 where the compute dtype cannot hold codes * block_scale; int8 for integer codes, which are
    (values + offset) * unit. post_scale: a float, () or, along the dim that is not contracted, (M, 1) or (1, N)
    float32. mask: (M, N) uint8, 1 where a gradient passes (a product with bool takes four times as long on CPU); None
    where all do. blocks: the block scales that values contain, as the operation `operand` gives them; None
    without, and where nothing asks.
    """

    values: Tensor
    post_scale: Tensor | float = 1.0
    mask: Tensor | None = None
    unit: float = 1.0
    offset: float = 0.0
    blocks: Tensor | None = None

    @property
    def t(self) -> Operand:
        post_scale = (
            self.post_scale.T if isinstance(self.post_scale, Tensor) and self.post_scale.ndim else self.post_scale
        )
        return replace(self, values=self.values.T, post_scale=post_scale, mask=None, blocks=None)

    def floating(self, dtype: torch.dtype) -> Operand:
        """The same with float values: integer codes in dtype, bfloat16 or float32, both of which hold them."""
        if self.values.dtype != torch.int8:
            return self
        codes = self.values.to(dtype)
        if self.offset:
            codes = codes.add_(self.offset)
        return replace(self, values=codes.mul_(self.unit), unit=1.0, offset=0.0)

    def dequantize(self) -> Tensor:
        """(M, N): the values themselves where nothing is left to multiply, else float32."""
        if self.values.dtype != torch.int8 and isinstance(self.post_scale, float) and self.post_scale == 1.0:
            return self.values
        return self.floating(torch.float32).values.float() * self.post_scale


def folded(operand: Operand, dim: int, dtype: torch.dtype) -> Folded:
    """An operand for FP8 units, which contract dim (-1: of the left one, -2: of the right one); its scales inside."""
    found = fold(operand.values, dim, dtype)
    return found._replace(scale=found.scale * operand.post_scale)


def gemm(left: Operand, right: Operand) -> Tensor:
    """left (M, K) @ right (K, N) in their dtype, float32 if either is; float32 where a post-scale multiplies it.

    In bfloat16 the product is then rounded once to bfloat16 before the post-scale, and once more by the caller's cast.
    Of two int8 operands the sum is exact, rounded to float32, and multiplied by each scale.
    """
    scales = [left.post_scale, right.post_scale]
    if left.values.dtype == torch.int8:
        product = int8_matmul(left.values, right.values, left.offset, right.offset).mul_(left.unit * right.unit)
    else:
        dtype = torch.promote_types(left.values.dtype, right.values.dtype)
        product = matmul(left.values.to(dtype), right.values.to(dtype))
    if isinstance(scales[0], float) and isinstance(scales[1], float):
        scales = [scales[0] * scales[1]]
    for scale in scales:
        if isinstance(scale, Tensor) or scale != 1.0:
            product = product.float().mul_(scale)
    return product


def rotate(x: Tensor, rotation: Rotation | None, backend: Backend, dim: int = -1) -> Tensor:
    """x (M, N) -> x D H in blocks along dim -1 or -2, float32."""
    turned = dispatch.get("rotate", backend, x.device.type, rotation=rotation)(_lines(x, dim), rotation)
    return turned.view(x.shape)


def unrotate(
    x: Tensor,
    rotation: Rotation | None,
    backend: Backend,
    dim: int = -1,
    mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(x * mask) (D H)^-1 in dtype; mask (M, N) uint8."""
    passes = None if mask is None else _lines(mask, dim)
    turn_back = dispatch.get("unrotate", backend, x.device.type, rotation=rotation)
    return turn_back(_lines(x, dim), rotation, passes, dtype).view(x.shape)


def _lines(x: Tensor, dim: int) -> Tensor:
    """(outer, contraction, inner): whole rows or columns."""
    return x.reshape(-1, x.shape[1], 1) if dim == -1 else x.reshape(1, *x.shape)


@dataclass(frozen=True)
class Quantizer:
    """One operand's numerics, resolved: spec with its format named; plan None leaves it in the compute dtype."""

    spec: QuantSpec
    plan: Plan | None
    backend: Backend

    @staticmethod
    def build(spec: QuantSpec, backend: Backend = "auto") -> Quantizer:
        """UserError for a scale, rounding or sparsity that the format does not have."""
        if spec.format is None:
            raise UserError("a QuantSpec without a format; name one, or 'none' for the compute dtype")
        if not spec.quantised:
            return Quantizer(spec, None, backend)
        fmt = get_format(spec.format)
        try:
            rule = check_spec(spec, fmt)
        except ValueError as error:
            raise UserError(str(error)) from None
        plan = Plan(
            fmt.element,
            fmt.scale_kind,
            fmt.block_size,
            rule,
            spec.rounding,
            gradient_mask(spec.estimator, fmt, spec.rotation is not None, spec.clip_scale),
            scale_element=fmt.scale_element,
            per_tensor=fmt.block == "tensor",
            correction=(spec.correction or fmt.block_size) if ROUNDINGS[spec.rounding].corrects else None,
            sparsity=spec.sparsity,
        )
        return Quantizer(spec, plan, backend)

    @property
    def stochastic(self) -> bool:
        return self.spec.quantised and ROUNDINGS[self.spec.rounding].draws

    @property
    def eight_bits(self) -> torch.dtype | None:
        """The 8-bit dtype that a GEMM can take it in: int8 for integer codes with scales that multiply the product;
        float8 for values of few significant bits, each line of them times a power of two. None where there is none."""
        plan = self.plan
        if plan is None or plan.rule == "learned":  # a NaN has no integer, and a learned scale does not show it
            return None
        if plan.element.mantissa_bits is None:
            _, offset = stored_integer(plan.element)
            dropped = plan.sparsity is not None and offset  # what sparsity drops is zero, which a centred grid lacks
            return torch.int8 if plan.block is None and not dropped else None
        if plan.element.mantissa_bits > 3 or (plan.block is not None and plan.scale_kind != "e8m0"):
            return None
        return torch.float8_e5m2 if plan.element.max > 448 else torch.float8_e4m3fn

    @property
    def reuses(self) -> bool:
        """Whether it leaves the forward's codes as they are."""
        return self.plan is None and self.spec.source == "forward" and self.spec.rotation_block is None

    @cached_property
    def tile(self) -> tuple[int, int]:
        """(rows, elements along the contraction dim) that share a scale or a correction."""
        if self.plan is None or self.spec.number_format is None:
            return 1, 1
        rows = self.spec.number_format.rows
        return rows, (self.plan.span or 1) // rows

    @cached_property
    def multiple(self) -> int:
        """What the contraction dim must be a multiple of."""
        return math.lcm(self.tile[1], self.spec.rotation_block or 1, 8 if self.spec.sparsity else 1)

    def quantize(
        self, x: Tensor, rotation: Rotation | None = None, key: Tensor | None = None, dim: int = -1
    ) -> QuantizedTensor:
        """x (M, N), float -> codes and scales of x rotated, along dim (-1 or -2); key (2,) int32."""
        assert self.plan is not None
        view = _View(x.shape, dim, *self.tile)
        blocks, scale, post, rotation = self._prepare(x, rotation, view)
        encode = dispatch.get("encode", self.backend, x.device.type, self.plan, rotation)
        codes, block_scale, mask = encode(blocks, scale, key, self.plan, rotation)
        passes = None if mask is None else view.undo(mask).view(torch.bool)
        if block_scale is not None:
            size = self.plan.block or 1
            block_scale = view.undo(block_scale.expand(-1, size, -1))
        return QuantizedTensor(view.undo(codes), block_scale, post, passes)

    def in_blocks(self, x: Tensor, dim: int) -> Tensor:
        """x (M, N), quantised along dim, as its format's blocks, (blocks, elements of one, inner); zeros fill up its
        last tiles."""
        assert self.plan is not None and self.plan.block is not None
        rows = self.tile[0]
        return _View(x.shape, dim, rows, self.plan.block // rows).spans(x)

    def count(self, x: Tensor, rotation: Rotation | None = None, key: Tensor | None = None, dim: int = -1) -> Counts:
        """What `quantize` does to x: nothing becomes NaN, saturates or vanishes without being counted here."""
        assert self.plan is not None
        quantized, rotated = self.quantize(x, rotation, key, dim), rotate(x, rotation, self.backend, dim)
        values = quantized.dequantize()
        largest = QuantizedTensor(
            torch.full_like(values, self.plan.element.max), quantized.block_scale, quantized.tensor_scale, None
        ).dequantize()
        return Counts(
            elements=x.numel(),
            not_a_number=int(values.isnan().sum()),
            saturated=int((rotated.abs() > largest * (1 + 2.0**-22)).sum()),
            flushed=int(((values == 0) & (rotated != 0)).sum()),
        )

    def operand(
        self,
        x: Tensor,
        dtype: torch.dtype,
        rotation: Rotation | None = None,
        key: Tensor | None = None,
        dim: int = -1,
        learned: Tensor | None = None,
        with_blocks: bool = False,
    ) -> Operand:
        """As quantize, but ready for a GEMM in dtype: bfloat16, float32, or int8 where `eight_bits` says so. learned:
        () float32, the scale itself where the rule is `learned`. with_blocks: block scales too, which `save` packs."""
        if self.plan is None:
            return Operand((x if rotation is None else rotate(x, rotation, self.backend, dim)).to(dtype))
        view = _View(x.shape, dim, *self.tile)
        blocks, scale, post, rotation = self._prepare(x, rotation, view, learned)
        exact = dtype if dtype == torch.int8 or self.plan.exact_in_bfloat16 else torch.float32
        operand = dispatch.get("operand", self.backend, x.device.type, self.plan, rotation)
        values, block_scale, mask = operand(blocks, scale, key, self.plan, exact, rotation, with_blocks)
        unit, offset = stored_integer(self.plan.element) if dtype == torch.int8 else (1.0, 0.0)
        passes = None if mask is None else view.undo(mask)
        return Operand(view.undo(values), post, passes, unit, offset, block_scale)

    def save(self, operand: Operand, pack: bool) -> tuple[list[Tensor | None], Callable[..., Operand]]:
        """Tensors that hold an operand (M, N), and a function that makes it of them again, but for its blocks.

        pack: the operand is this quantiser's, along dim -1, and is held in the bits of its format where that can be
        (`can_pack`, no tiles of rows, fewer bits than values have). Masks are held in bits.
        """
        values, post, mask = operand.values, operand.post_scale, operand.mask
        shape, dtype, count, unit, offset = values.shape, values.dtype, values.numel(), operand.unit, operand.offset
        view, plan, constant = _View(shape, -1, *self.tile), self.plan, post if isinstance(post, float) else 1.0
        packs = pack and plan is not None and view.rows == 1 and can_pack(plan)
        packs = packs and plan is not None and field_width(plan.element) < 8 * dtype.itemsize
        op = partial(dispatch.get, backend=self.backend, device_type=values.device.type, plan=plan if packs else None)
        spans = view.spans(values) if packs else values
        span_shape = spans.shape
        held = op("pack")(spans, operand.blocks, plan) if packs else (values, None)

        def restore(codes: Tensor, scales: Tensor | None, post: Tensor | None, bits: Tensor | None) -> Operand:
            values = op("unpack")(Packed(codes, scales), span_shape, plan, dtype).view(shape) if packs else codes
            mask = None if bits is None else op("split")(bits, 1, count).view(shape)
            return Operand(values, constant if post is None else post, mask, unit, offset)

        bits = None if mask is None else op("join")(mask, 1)
        return [*held, post if isinstance(post, Tensor) else None, bits], restore

    def fake_quantize(self, x: Tensor, rotation: Rotation | None = None, key: Tensor | None = None) -> Tensor:
        """x (M, N) quantised along dim -1, dequantised and rotated back, in its own dtype."""
        assert self.plan is not None
        view = _View(x.shape, -1, *self.tile)
        blocks, scale, _, left = self._prepare(x, rotation, view)
        function = dispatch.get("fake_quantize", self.backend, x.device.type, self.plan, left)
        dtype = x.dtype if left is rotation else torch.float32
        values = view.undo(function(blocks, scale, key, self.plan, dtype, left))
        return values if left is rotation else unrotate(values, rotation, self.backend, dtype=x.dtype)

    def _prepare(
        self, x: Tensor, rotation: Rotation | None, view: _View, learned: Tensor | None = None
    ) -> tuple[Tensor, Tensor | float, Tensor | float, Rotation | None]:
        """x in spans; its tensor scale for `encode`, and as it multiplies the matrix; the rotation left to do."""
        assert self.plan is not None
        if view.rows > 1 and rotation is not None:  # tiles are copies, in which a rotation's blocks do not lie together
            x, rotation = rotate(x, rotation, self.backend, view.dim), None
        tensor_scale = dispatch.get("tensor_scale", self.backend, x.device.type, self.plan, rotation)
        scale = learned if learned is not None else tensor_scale(view.lines(x), self.plan, rotation)
        blocks = view.spans(x)
        if not isinstance(scale, Tensor) or not scale.ndim:
            return blocks, scale, scale, rotation
        post = scale.squeeze(1)
        if scale.shape[0] != blocks.shape[0]:  # one scale per row over several blocks
            scale = scale.repeat_interleave(blocks.shape[0] // scale.shape[0], 0)
        return blocks, scale.expand(-1, -1, blocks.shape[2]).contiguous(), post, rotation

    def __str__(self) -> str:
        """mxfp4/std/nearest/had32/clip, as in the printed model."""
        spec, plan = self.spec, self.plan
        rotation = spec.rotation and spec.rotation.replace("hadamard", "had")
        if rotation and spec.signs != "none":
            rotation += f"±{spec.signs}"
        rounding = plan.rounding if plan else None
        if plan and plan.correction and plan.correction != plan.block:
            rounding = f"{rounding}{plan.correction}"
        parts = [spec.format, plan.rule if plan else None, rounding, rotation, spec.sparsity]
        parts += [spec.row_rotation and spec.row_rotation.replace("hadamard", "rows-had")]
        estimator = spec.estimator if spec.clip_scale == 1.0 else f"{spec.estimator}{spec.clip_scale:g}"
        parts += [estimator if estimator != "ste" else None, "forward" if spec.source == "forward" else None]
        return "/".join(part for part in parts if part)


@dataclass(frozen=True)
class _View:
    """A matrix of `shape` (M, N) as spans of `size` elements along dim -1 or -2; tiles of rows become blocks."""

    shape: torch.Size
    dim: int
    rows: int
    size: int

    def lines(self, x: Tensor) -> Tensor:
        return _lines(x, self.dim)

    def spans(self, x: Tensor) -> Tensor:
        """(outer, span, inner), without a copy unless in tiles."""
        if self.rows > 1:
            (height, width), (padding_down, padding_right) = self._tile, self._padding
            x = F.pad(x, (0, padding_right, 0, padding_down))
            tiles = x.view(x.shape[0] // height, height, -1, width).transpose(1, 2)
            return tiles.reshape(-1, height * width, 1)
        if self.size == 1:
            return self.lines(x)
        return x.reshape(-1, self.size, 1) if self.dim == -1 else x.reshape(-1, self.size, x.shape[1])

    def undo(self, spans: Tensor) -> Tensor:
        """(M, N) again."""
        if self.rows == 1:
            return spans.reshape(self.shape)
        (height, width), padding = self._tile, self._padding
        down, right = (size + extra for size, extra in zip(self.shape, padding, strict=True))
        tiles = spans.reshape(down // height, right // width, height, width).transpose(1, 2)
        return tiles.reshape(down, right)[: self.shape[0], : self.shape[1]]

    @property
    def _tile(self) -> tuple[int, int]:
        return (self.rows, self.size) if self.dim == -1 else (self.size, self.rows)

    @property
    def _padding(self) -> tuple[int, int]:
        """Zeros below and to the right of the matrix that fill its last tiles; no scale by magnitude sees them."""
        return -self.shape[0] % self._tile[0], -self.shape[1] % self._tile[1]


@torch.no_grad()
def fake_quantize(
    x: Tensor,
    format: str,
    *,
    scale: str | None = None,
    rounding: RoundingName = "nearest",
    rotation: str | None = None,
    seed: int = 0,
    backend: Backend = "auto",
) -> Tensor:
    """x quantised and dequantised along its last dim, rotated back; same shape, dtype and device, no gradient.

    x: (..., K), a float dtype; computed in float32. K % block == 0 and % rotation == 0; rows are padded to whole tiles.
    format: a name of qtrain_kernels.formats, or element/block/scale; scale: one of its rules, None for the format's
    default (mxfp*: floor; nvfp4: absmax of the whole x, then of each block; int*: the Gaussian fit; other minifloats:
    absmax); rotation: None, "hadamard<n>" or "hadamard" for all of K; seed: of stochastic rounding and EDEN, each value
    (scale) draws its own bits. NaN or infinity makes its block (row; with nvfp4 all of x) NaN. UserError for anything
    that does not fit.
    """
    spec = parse(QuantSpec, {"format": format, "scale": scale, "rounding": rounding, "rotation": rotation})
    quantizer = Quantizer.build(spec, backend)
    if quantizer.plan is not None and quantizer.plan.rule == "learned":
        raise UserError("scale 'learned' is a parameter of a layer; name another rule here (gaussian)")
    if not isinstance(x, Tensor):
        raise UserError(
            f"fake_quantize takes a torch.Tensor; got {type(x).__name__}; convert it with torch.as_tensor(x)"
        )
    if not x.is_floating_point():
        raise UserError(f"fake_quantize takes a float tensor; got {x.dtype}; convert it with x.float()")
    if x.ndim == 0 or x.shape[-1] % quantizer.multiple:
        found = f"shape {tuple(x.shape)}"
        raise UserError(f"{quantizer} needs a last dim % {quantizer.multiple} == 0; x has {found}; pad it")
    if x.numel() == 0 or quantizer.plan is None:
        return x.clone()
    blocks = None
    if spec.rotation_block is not None:
        blocks = hadamard(spec.rotation_block or x.shape[-1], None, x.device)
    key = torch.tensor(key_words("fake_quantize", checked_seed(seed)), dtype=torch.int32, device=x.device)
    return quantizer.fake_quantize(x.reshape(-1, x.shape[-1]), blocks, key).view(x.shape)
