"""Quantizer: rotate -> scale -> round -> codes, of a matrix along one of its two dims.

# M, N the matrix; quantised along dim -1 (each row) or -2 (each column): no transpose is made.
x ≈ codes * block_scale * tensor_scale. `Quantizer.operand` gives a QTensor for a product, `Quantizer.quantize` codes
and scales to look at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from qtrain.config.recipe import QuantSpec, check_spec
from qtrain.config.settings import Backend, parse
from qtrain.errors import UserError
from qtrain.quant.estimator import gradient_mask
from qtrain.quant.random import checked_seed, key_words
from qtrain.quant.rotation import hadamard
from qtrain_kernels import dispatch, qtensor
from qtrain_kernels.formats import get_format
from qtrain_kernels.plans import ROUNDINGS, Plan, Rotation, RoundingName
from qtrain_kernels.qtensor import Layout, QTensor, Side, Storage
from qtrain_kernels.reference import round_nearest


@dataclass(frozen=True)
class QuantizedTensor:
    """x (M, N) in rotated space as codes and scales.

    codes: (M, N) float32 on the format's grid, less the zero point of their block where it has one. block_scale:
    float32 (M, N), the block's at each of its elements; None without blocks. tensor_scale: a float, a () tensor, or one
    per row (M, 1) or column (1, N). mask: (M, N) bool, True where a gradient passes; None where all do.
    """

    codes: Tensor
    block_scale: Tensor | None
    tensor_scale: Tensor | float
    mask: Tensor | None

    @staticmethod
    def of(q: QTensor, backend: Backend = "auto") -> QuantizedTensor:
        """Of a matrix in float32 with its block scales."""
        codes, blocks, layout = q.codes, None, q.layout
        if q.block_scale is not None:
            tiles = q.block_scale if layout.dim == -1 else q.block_scale.T
            each = tiles.repeat_interleave(layout.rows, 0).repeat_interleave(layout.size or 1, 1)
            each = each[: layout.lines[0], : layout.lines[1]]
            blocks = each if layout.dim == -1 else each.T
            codes = codes / torch.where(blocks == 0, 1.0, blocks)
            plan = layout.plan
            if plan is not None and plan.has_float_scales and not plan.element.zero_point:  # whose products are exact
                codes = torch.where(codes == 0, codes, round_nearest(codes, plan.element))
        passes = q.passes(backend)
        scale = layout.constant if q.tensor_scale is None else q.tensor_scale
        return QuantizedTensor(codes, blocks, scale, None if passes is None else passes.view(torch.bool))

    def dequantize(self) -> Tensor:
        """(M, N) float32."""
        values = self.codes if self.block_scale is None else self.codes * self.block_scale
        return values * self.tensor_scale


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
    """(x * mask) (D H)^-1 in dtype; mask (M, N) uint8, or its bits, eight a byte."""
    passes = None if mask is None else _lines(mask, dim) if mask.shape == x.shape else mask
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
            per_tensor=fmt.block == "tensor" or (rule == "learned" and spec.learns_whole),
            correction=(spec.correction or fmt.block_size) if ROUNDINGS[spec.rounding].corrects else None,
            sparsity=spec.sparsity,
        )
        return Quantizer(spec, plan, backend)

    @cached_property
    def draws(self) -> bool:
        """Whether it takes random bits, for which there must be a key."""
        return self.spec.quantised and ROUNDINGS[self.spec.rounding].draws

    @cached_property
    def rotation_block(self) -> int | None:
        """0: the whole contraction; None: it is not rotated."""
        return self.spec.rotation_block

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

    def layout(
        self, shape: tuple[int, int], dim: int = -1, storage: Storage = "float32", blocks: bool = False
    ) -> Layout:
        """Of a matrix (M, N) that it quantises along dim."""
        made = _layout if type(shape[0]) is type(shape[1]) is int else _layout.__wrapped__  # symbols have no hash
        return made(self.plan, shape, dim, storage, self.tile[0], blocks)

    def operand(
        self,
        x: Tensor,
        layout: Layout,
        rotation: Rotation | None = None,
        key: Tensor | None = None,
        learned: Tensor | None = None,
    ) -> QTensor:
        """x (M, N), float -> x rotated and quantised, in a layout of this quantiser. key: (2,) int32; learned: of
        a `qtensor.Side`, the scales themselves where they are learned."""
        return qtensor.quantize(x, layout, rotation, key, learned, self.backend)

    def quantize(
        self, x: Tensor, rotation: Rotation | None = None, key: Tensor | None = None, dim: int = -1
    ) -> QuantizedTensor:
        """x (M, N), float -> codes and scales of x rotated, along dim (-1 or -2); key (2,) int32."""
        assert self.plan is not None
        layout = self.layout((x.shape[0], x.shape[1]), dim, blocks=True)
        return QuantizedTensor.of(self.operand(x, layout, rotation, key), self.backend)

    @property
    def rotates(self) -> bool:
        return self.rotation_block is not None

    @cached_property
    def masks(self) -> bool:
        """Whether its estimator stops some gradients."""
        return self.plan is not None and self.plan.mask is not None

    @cached_property
    def learned(self) -> bool:
        """Whether its scale is a parameter."""
        return self.plan is not None and self.plan.rule == "learned"

    def learned_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Of the parameter that is the scale of a matrix (rows, columns): (1,) of a tensor, (rows, 1) of rows, (rows,
        G) of the G groups of each row."""
        assert self.plan is not None
        if self.plan.whole:
            return (1,)
        return rows, 1 if self.plan.block is None else columns // self.plan.block

    def fake_quantize(self, x: Tensor, rotation: Rotation | None = None, key: Tensor | None = None) -> Tensor:
        """x (M, N) quantised along dim -1, dequantised and rotated back, in its own dtype."""
        assert self.plan is not None
        layout = self.layout((x.shape[0], x.shape[1]))
        module = dispatch.module(self.backend, x.device.type, self.plan, rotation, layout.rows)
        return module.fake_quantize(x, Side(layout, rotation, key), x.dtype)

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


@lru_cache(4096)
def _layout(plan: Plan | None, shape: tuple[int, int], dim: int, storage: Storage, rows: int, blocks: bool) -> Layout:
    return Layout(plan, shape, dim, storage, rows, blocks and plan is not None and plan.block is not None)


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
    try:
        return _fake_quantize(x, spec, seed, backend)
    except UserError:
        raise
    except ValueError as error:  # of the kernels, which know no UserError
        raise UserError(str(error)) from None


def _fake_quantize(x: Tensor, spec: QuantSpec, seed: int, backend: Backend) -> Tensor:
    quantizer = Quantizer.build(spec, backend)
    if quantizer.plan is not None and quantizer.plan.rule == "learned":
        raise UserError("scale 'learned' is a parameter of a layer; name another rule here (gaussian)")
    if not isinstance(x, Tensor):
        raise UserError(
            f"fake_quantize takes a torch.Tensor; got {type(x).__name__}; convert it with torch.as_tensor(x)"
        )
    if not x.is_floating_point():
        raise UserError(f"fake_quantize takes a float tensor; got {x.dtype}; convert it with x.float()")
    if x.layout != torch.strided:
        raise UserError(f"fake_quantize takes a dense tensor; got layout {x.layout}; convert it with x.to_dense()")
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
