"""Quantizer: rotate -> scale -> round -> codes, of a matrix along one of its two dims.

# M, N the matrix; quantised along dim -1 (each row) or -2 (each column): no transpose is made.
x ≈ codes * block_scale * tensor_scale. A GEMM takes codes * block_scale, exact in bfloat16, and its result takes the
tensor scale: one GEMM in bfloat16 thus holds exactly the operands that a low-precision GEMM would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qtrain.config import Backend, QuantSpec, parse
from qtrain.errors import UserError
from qtrain.quant.estimator import gradient_mask
from qtrain.quant.random import key_words
from qtrain.quant.rotation import rotate, rotation_matrix
from qtrain_kernels import dispatch, reference
from qtrain_kernels.formats import check_scale, get_format
from qtrain_kernels.reference import Plan


@dataclass(frozen=True)
class QuantizedTensor:
    """x (M, N) in rotated space as codes and scales.

    codes: (M, N) float32 on the format's grid. block_scale: float32, one per block, (M, N / block) or (M / block, N);
    None without blocks. tensor_scale: a float, a () tensor, or one per row (M, 1) or column (1, N).
    mask: (M, N) bool, True where a gradient passes; None where all do.
    """

    codes: Tensor
    block_scale: Tensor | None
    tensor_scale: Tensor | float
    mask: Tensor | None
    dim: int

    def dequantize(self) -> Tensor:
        """(M, N) float32."""
        if self.block_scale is None:
            return self.codes * self.tensor_scale
        block = self.codes.shape[self.dim] // self.block_scale.shape[self.dim]
        return self.codes * self.block_scale.repeat_interleave(block, dim=self.dim) * self.tensor_scale


@dataclass(frozen=True)
class Operand:
    """One side of a GEMM: values (M, N) in the compute dtype, and what multiplies the result instead of them.

    post_scale: a float, () or, along the dim that is not contracted, (M, 1) or (1, N) float32. mask: (M, N) uint8, 1
    where a gradient passes (a product with bool takes four times as long on CPU); None where all do.
    """

    values: Tensor
    post_scale: Tensor | float = 1.0
    mask: Tensor | None = None

    @property
    def t(self) -> Operand:
        post_scale = (
            self.post_scale.T if isinstance(self.post_scale, Tensor) and self.post_scale.ndim else self.post_scale
        )
        return Operand(self.values.T, post_scale)

    def dequantize(self) -> Tensor:
        """(M, N): the values themselves (compute dtype) where nothing is left to multiply, else float32."""
        if isinstance(self.post_scale, float) and self.post_scale == 1.0:
            return self.values
        return self.values.float() * self.post_scale


def gemm(left: Operand, right: Operand) -> Tensor:
    """left (M, K) @ right (K, N) in their dtype; float32 where a post-scale multiplies the result.

    In bfloat16 the product is then rounded once to bfloat16 before the post-scale, and once more by the caller's cast.
    """
    product = left.values @ right.values
    scales = [left.post_scale, right.post_scale]
    if isinstance(scales[0], float) and isinstance(scales[1], float):
        scales = [scales[0] * scales[1]]
    for scale in scales:
        if isinstance(scale, Tensor) or scale != 1.0:
            product = product.float().mul_(scale)
    return product


@dataclass(frozen=True)
class Quantizer:
    """One operand's numerics, resolved: spec with its format named; plan None leaves it in the compute dtype."""

    spec: QuantSpec
    plan: Plan | None
    backend: Backend

    @staticmethod
    def build(spec: QuantSpec, backend: Backend = "auto") -> Quantizer:
        """UserError for a scale that the format lacks, or a rounding that is not there."""
        if spec.format is None:
            raise UserError("a QuantSpec without a format; name one, or 'none' for the compute dtype")
        if not spec.quantised:
            return Quantizer(spec, None, backend)
        if spec.rounding == "eden":
            raise UserError("rounding 'eden' is not available yet; use nearest or stochastic")
        fmt = get_format(spec.format)
        try:
            rule = check_scale(fmt, spec.scale)
        except ValueError as error:
            raise UserError(str(error)) from None
        mask = gradient_mask(spec.estimator, fmt, spec.rotation is not None)
        return Quantizer(spec, Plan(fmt.element, fmt.scale_format, fmt.block, rule, spec.rounding, mask), backend)

    @property
    def stochastic(self) -> bool:
        return self.spec.quantised and self.spec.rounding == "stochastic"

    @property
    def multiple(self) -> int:
        """What the contraction dim must be a multiple of."""
        return math.lcm(self.plan.block or 1 if self.plan else 1, self.spec.rotation_block or 1)

    def quantize(
        self, x: Tensor, matrix: Tensor | None = None, key: Tensor | None = None, dim: int = -1
    ) -> QuantizedTensor:
        """x (M, N), float -> codes and scales of x rotated by matrix, along dim (-1 or -2); key (2,) int32."""
        assert self.plan is not None
        blocks, scale = self._prepare(x, matrix, dim)
        encode = dispatch.get("encode", self.backend, x.device.type)
        codes, block_scale, mask = encode(blocks, scale, key, self.plan)
        passes = None if mask is None else mask.view(torch.bool).view(x.shape)
        if block_scale is not None:
            block_scale = block_scale.view(*((x.shape[0], -1) if dim == -1 else (-1, x.shape[1])))
        return QuantizedTensor(codes.view(x.shape), block_scale, _flat(scale), passes, dim)

    def operand(
        self, x: Tensor, dtype: torch.dtype, matrix: Tensor | None = None, key: Tensor | None = None, dim: int = -1
    ) -> Operand:
        """As quantize, but ready for a GEMM in dtype (bfloat16 or float32)."""
        if self.plan is None:
            return Operand((x if matrix is None else rotate(x.float(), matrix, dim)).to(dtype))
        blocks, scale = self._prepare(x, matrix, dim)
        values, mask = dispatch.get("operand", self.backend, x.device.type)(blocks, scale, key, self.plan, dtype)
        return Operand(values.view(x.shape), _flat(scale), None if mask is None else mask.view(x.shape))

    def _prepare(self, x: Tensor, matrix: Tensor | None, dim: int) -> tuple[Tensor, Tensor | float]:
        """x rotated and viewed as (outer, block, inner), and its tensor scale."""
        assert self.plan is not None
        block = self.plan.block or x.shape[dim]
        rotated = rotate(x.float(), matrix, dim)
        blocks = rotated.reshape(-1, block, 1) if dim == -1 else rotated.reshape(-1, block, x.shape[1])
        return blocks, reference.tensor_scale(blocks, self.plan)

    def __str__(self) -> str:
        """mxfp4/std/nearest/had32/clip, as in the printed model."""
        spec, plan = self.spec, self.plan
        rotation = (
            f"had{spec.rotation_block}" + ("" if spec.signs == "none" else f"±{spec.signs}") if spec.rotation else None
        )
        parts = [spec.format, plan.rule if plan else None, plan.rounding if plan else None, rotation]
        parts += [spec.estimator if spec.estimator != "ste" else None, "forward" if spec.source == "forward" else None]
        return "/".join(part for part in parts if part)


def _flat(scale: Tensor | float) -> Tensor | float:
    """(outer, 1, inner) of a row or column scale -> (M, 1) or (1, N)."""
    return scale.squeeze(1) if isinstance(scale, Tensor) and scale.ndim else scale


@torch.no_grad()
def fake_quantize(
    x: Tensor,
    format: str,
    *,
    scale: str | None = None,
    rounding: Literal["nearest", "stochastic", "eden"] = "nearest",
    rotation: str | None = None,
    seed: int = 0,
    backend: Backend = "auto",
) -> Tensor:
    """x quantised and dequantised along its last dim, rotated back; same shape, dtype and device, no gradient.

    x: (..., K), a float dtype; computed in float32. K % block == 0 and % rotation == 0. format: a name of
    qtrain_kernels.formats; scale: one of its rules, None for the format's default (mxfp*: floor; nvfp4: absmax of the
    whole x, then of each block; int*: the Gaussian fit; other minifloats: absmax); rotation: None or "hadamard<n>";
    seed: of stochastic rounding, every value draws its own bits. NaN or infinity makes its block (row; with nvfp4 all
    of x) NaN. UserError for anything that does not fit.
    """
    spec = parse(QuantSpec, {"format": format, "scale": scale, "rounding": rounding, "rotation": rotation})
    quantizer = Quantizer.build(spec, backend)
    if not x.is_floating_point():
        raise UserError(f"fake_quantize takes a float tensor; got {x.dtype}; convert it with x.float()")
    if x.ndim == 0 or x.shape[-1] % quantizer.multiple:
        found = f"shape {tuple(x.shape)}"
        raise UserError(f"{quantizer} needs a last dim % {quantizer.multiple} == 0; x has {found}; pad it")
    if x.numel() == 0 or quantizer.plan is None:
        return x.clone()
    matrix = rotation_matrix(spec.rotation_block, None, x.device) if spec.rotation_block else None
    key = torch.tensor(key_words("fake_quantize", seed), dtype=torch.int32, device=x.device)
    rows = quantizer.quantize(x.reshape(-1, x.shape[-1]), matrix, key).dequantize()
    return rotate(rows, None if matrix is None else matrix.T).view(x.shape).to(x.dtype)
