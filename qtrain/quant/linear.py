"""QuantLinear: a linear layer whose three GEMMs run on quantised operands, as a recipe says.

# T tokens (all leading dims), K in features, N out features; H the block Hadamard, D random signs, Q a quantiser.
    fprop  Y  = Q(X D H) Q(W D H)^T                          contraction over K
    dgrad  dX = (Q(dY D' H) Q(W' D' H)  * mask_X) (D H)^-1   contraction over N
    wgrad  dW = (Q(dY^T D" H) Q(X' D" H) * mask_W) (D H)^-1  contraction over T
X', W': the master values, or the rotated and quantised ones of the forward, whose gradients leave the rotation by its
inverse. Masks are the forward's estimators. Weights are quantised from the float32 master; what is not redrawn in each
micro-batch is quantised once for all micro-batches of an optimiser step (`qtrain.set_step` has the rule).
N (in dgrad) and T (in wgrad) are filled with zeros to whole blocks.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, SupportsIndex, cast

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from qtrain.errors import UserError
from qtrain.quant.quantizer import Operand, Quantizer, folded, gemm, rotate, unrotate
from qtrain.quant.random import OF_THE_WEIGHT, USES, key_of, key_words
from qtrain.quant.rotation import hadamard
from qtrain.recipe import LinearRecipe
from qtrain.settings import FP8_GEMMS, Backend, GemmKind, Redraw
from qtrain_kernels import dispatch
from qtrain_kernels.gemm import Folded, fp8_matmul
from qtrain_kernels.plans import Rotation, stored_integer
from qtrain_kernels.precision import Linear


@dataclass(frozen=True)
class Observed:
    """An operand of a GEMM as it is used, and what it was made of: x (M, N), quantised along dim after the rotation.
    raw: what came in, of which x may be filled up with zeros or have its rows rotated; None: x itself."""

    use: str
    quantizer: Quantizer
    x: Tensor
    rotation: Rotation | None
    dim: int
    operand: Operand
    raw: Tensor | None = None


@dataclass(frozen=True)
class Observer:
    """What is told of each quantised operand, and of each weight gradient (N, K), while a layer carries it. It leaves
    its tensors as they are."""

    operand: Callable[[Observed], None]
    gradient: Callable[[Tensor], None]


@dataclass(frozen=True)
class Gemm:
    """The two operands of one GEMM; they share the rotation and its signs. eight_bits: the dtypes in which 8-bit units
    can multiply them, or None."""

    left: Quantizer
    right: Quantizer
    eight_bits: tuple[torch.dtype, torch.dtype] | None = None

    def rotation(self, key: Tensor, size: int) -> Rotation | None:
        """Of the contraction dim, which has this size."""
        spec = self.left.spec
        if spec.rotation_block is None:
            return None
        drawn = None if spec.signs == "none" else key
        return hadamard(spec.rotation_block or size, drawn, key.device, self.left.backend)

    @property
    def held(self) -> str:
        """int8 | fp8 | float: the narrowest that holds both operands."""
        if self.eight_bits is None:
            return "float"
        return "int8" if self.eight_bits[0] == torch.int8 else "fp8"

    @property
    def multiple(self) -> int:
        return math.lcm(self.left.multiple, self.right.multiple)


@dataclass(frozen=True)
class Numerics:
    """A recipe's three GEMMs, resolved for one backend."""

    fprop: Gemm
    dgrad: Gemm
    wgrad: Gemm
    gemm: GemmKind
    redraw: Redraw

    @staticmethod
    def build(recipe: LinearRecipe, backend: Backend, gemm: GemmKind = "auto") -> Numerics:
        """UserError for a recipe that asks for what is not there."""
        gemms: dict[str, Gemm] = {}
        for gemm_name, operands in recipe.operands().items():
            left, right = (Quantizer.build(spec, backend) for spec in operands.values())
            dtypes = left.eight_bits, right.eight_bits
            if right.reuses:
                dtypes = left.eight_bits, _reused(gemms["fprop"], gemm_name, gemm_name == "wgrad" or left.multiple > 1)
            gemms[gemm_name] = Gemm(left, right, _multiplied(*dtypes))
        return Numerics(**gemms, gemm=gemm, redraw=recipe.redraw)

    @property
    def gemms(self) -> tuple[Gemm, Gemm, Gemm]:
        return self.fprop, self.dgrad, self.wgrad

    def kind(self, gemm_: Gemm, device_type: str) -> str:
        """int8 | fp8 | float: how one of the GEMMs is multiplied on a device."""
        return dispatch.resolve_gemm(self.gemm, gemm_.held, device_type)

    def lasts(self, gemm_: Gemm) -> bool:
        """Whether the weight's operand of fprop or dgrad is the same in every micro-batch of a step."""
        return self.redraw == "step" or not (gemm_.right.stochastic or gemm_.right.spec.signs == "step")

    def runs_on(self, device_type: str) -> str:
        """compiled on cpu, gemms int8 float float: what quantises on a device, and how fprop, dgrad, wgrad multiply."""
        if device_type == "meta":
            return "on no device yet"
        try:
            backend = dispatch.resolve(self.fprop.left.backend, device_type)
            return f"{backend} on {device_type}, gemms {' '.join(self.kind(each, device_type) for each in self.gemms)}"
        except ValueError as error:
            return str(error)

    @cached_property
    def operands(self) -> dict[str, Quantizer]:
        gemms = {"fprop": ("x", "w"), "dgrad": ("dy", "w"), "wgrad": ("dy", "x")}
        return {
            f"{gemm}.{name}": quantizer
            for gemm, names in gemms.items()
            for name, quantizer in zip(names, (getattr(self, gemm).left, getattr(self, gemm).right), strict=True)
        }

    @cached_property
    def stochastic(self) -> bool:
        return any(quantizer.stochastic or quantizer.spec.signs == "step" for quantizer in self.operands.values())

    def __str__(self) -> str:
        texts = {"fprop": [], "dgrad": [], "wgrad": []}
        for name, quantizer in self.operands.items():
            gemm_name, operand = name.split(".")
            texts[gemm_name].append(f"{operand}:{quantizer}")
        return f"fwd {' '.join(texts['fprop'])} dgrad {' '.join(texts['dgrad'])} wgrad {' '.join(texts['wgrad'])}"


def _reused(fprop: Gemm, gemm_name: str, fills: bool) -> torch.dtype | None:
    """The 8-bit dtype in which a backward GEMM can take the forward's codes, or None. A scale per row varies along the
    contraction, so only one scale per tensor qualifies. fills: the contraction may be filled with zeros, which integers
    stored without their half cannot encode."""
    forward = fprop.right if gemm_name == "dgrad" else fprop.left
    if forward.plan is None or not forward.plan.per_tensor or forward.eight_bits is None:
        return None
    if forward.eight_bits == torch.int8:
        _, offset = stored_integer(forward.plan.element)
        if fprop.held != "int8" or (offset and fills):
            return None
    return forward.eight_bits


def _multiplied(left: torch.dtype | None, right: torch.dtype | None) -> tuple[torch.dtype, torch.dtype] | None:
    """The dtypes of a product, if there is one of them: INT8 by INT8, or FP8 whose right side is E4M3 (as on CUDA)."""
    if left is None or right is None or (left == torch.int8) != (right == torch.int8) or right == torch.float8_e5m2:
        return None
    return left, right


class QuantizedWeight:
    """A layer's weight as the GEMMs take it: for fprop at once, for dgrad when a backward asks for it; folded into FP8
    where they multiply so. Later micro-batches of the same step may use the same one; an operand of dgrad that is
    redrawn in each micro-batch is then quantised in each."""

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor | None,
        keys: Tensor,
        numerics: Numerics,
        dtype: torch.dtype,
        fp8_counts: Tensor,
        observer: Observer | None,
    ):
        """weight (N, K) master; scale: the learned one; keys (9, 2) int32 on weight's device; fp8_counts:
        (2,) int64, to which elements that FP8 rounded, and all elements, are added by each FP8 product."""
        self.numerics, self.dtype = numerics, dtype
        self.fp8_counts, self.observer = fp8_counts, observer
        self.rotation = numerics.fprop.rotation(key_of(keys, "fprop.signs"), weight.shape[1])
        self.device_type = weight.device.type
        self.fprop = self.operand("fprop.w", weight, self.rotation, keys, learned=scale)
        self.fprop_side = self._right_side(numerics.fprop, self.fprop.t)
        self._master = weight if numerics.dgrad.right.spec.source == "master" else None
        self._dgrad: tuple[Operand | Folded, Rotation | None] | None = None

    def dtype_in(self, gemm_: Gemm) -> torch.dtype:
        """Of the operands of one of the GEMMs."""
        return torch.int8 if self.numerics.kind(gemm_, self.device_type) == "int8" else self.dtype

    def operand(
        self,
        use: str,
        x: Tensor,
        rotation: Rotation | None,
        keys: Tensor,
        dim: int = -1,
        learned: Tensor | None = None,
        with_blocks: bool = False,
        raw: Tensor | None = None,
    ) -> Operand:
        """x as the operand `use` (fprop.x) of its GEMM, along dim, drawn with that use's key; learned: (1,) a scale;
        with_blocks: with its block scales, which are needed to pack it and to observe it; raw: as in `Observed`."""
        quantizer, gemm_ = self.numerics.operands[use], getattr(self.numerics, use.partition(".")[0])
        observed = self.observer is not None and quantizer.plan is not None
        operand = quantizer.operand(
            x, self.dtype_in(gemm_), rotation, key_of(keys, use),
            dim=dim, learned=_scalar(learned), with_blocks=with_blocks or observed,
        )  # fmt: skip
        if self.observer is not None and observed:
            self.observer.operand(Observed(use, quantizer, x, rotation, dim, operand, raw))
        return operand if with_blocks else replace(operand, blocks=None)

    def again(
        self, use: str, source: Operand, rotation: Rotation | None, keys: Tensor, rows: int | None = None
    ) -> Operand:
        """An operand of the backward, along dim -2, from a master or forward value. A forward value that is neither
        rotated nor quantised again keeps its codes, and its tensor scale stays on the result; a scale per row lies
        along the contraction and is multiplied in. rows: how many came in, before zeros filled up source; None: all."""
        per_row = isinstance(source.post_scale, Tensor) and source.post_scale.ndim > 0
        if self.numerics.operands[use].reuses and not per_row:
            dtype = self.dtype_in(getattr(self.numerics, use.partition(".")[0]))
            return source if dtype == torch.int8 else source.floating(dtype)
        x = source.dequantize()
        return self.operand(use, x, rotation, keys, dim=-2, raw=x[:rows])

    def multiply(self, gemm_: Gemm, left: Operand, right: Operand | Folded) -> Tensor:
        """left @ right as one of the GEMMs is multiplied; what FP8 rounds is counted."""
        right = right if isinstance(right, Folded) else self._right_side(gemm_, right)
        if not isinstance(right, Folded):
            return gemm(left, right)
        assert gemm_.eight_bits is not None
        left_side = folded(left, -1, gemm_.eight_bits[0])
        elements = left_side.codes.numel() + right.codes.numel()
        inexact = left_side.inexact + right.inexact
        self.fp8_counts += torch.stack((inexact, torch.full_like(inexact, elements)))
        return fp8_matmul(left_side, right, fast=self.numerics.gemm == "fp8_fast")

    def _right_side(self, gemm_: Gemm, right: Operand) -> Operand | Folded:
        """As one of the GEMMs multiplies by it."""
        if self.numerics.kind(gemm_, self.device_type) != "fp8":
            return right
        assert gemm_.eight_bits is not None
        return folded(right, -2, gemm_.eight_bits[1])

    def dgrad(self, keys: Tensor) -> tuple[Operand | Folded, Rotation | None]:
        """W' (N, K), filled with zero rows to whole blocks and quantised along N, and how it was rotated."""
        if self._dgrad is None:
            gemm_ = self.numerics.dgrad
            source = self.fprop if self._master is None else Operand(self._master)
            rows = source.values.shape[0]
            source = _filled(source, -rows % gemm_.multiple, self.dtype)
            rotation = gemm_.rotation(key_of(keys, "dgrad.signs"), source.values.shape[0])
            operand = self.again("dgrad.w", source, rotation, keys, rows=rows)
            found = self._right_side(gemm_, operand), rotation
            if not self.numerics.lasts(gemm_):
                return found
            self._dgrad = found
        return self._dgrad


class _QuantLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        x_scale: Tensor | None,
        w_scale: Tensor | None,
        keys: Tensor,
        quantized: QuantizedWeight,
        saving: bool,
    ) -> Tensor:
        """x (T, K), weight (N, K) master, keys (9, 2) int32 in the order of USES -> (T, N) in quantized.dtype. saving:
        whether a backward may follow."""
        numerics, dtype, rotation = quantized.numerics, quantized.dtype, quantized.rotation
        saving = saving and any(ctx.needs_input_grad)
        reused = numerics.wgrad.right.spec.source == "forward"
        with torch.autocast(x.device.type, enabled=False):
            xq = quantized.operand("fprop.x", x, rotation, keys, learned=x_scale, with_blocks=saving and reused)
            y = quantized.multiply(numerics.fprop, xq, quantized.fprop_side).to(dtype)
            x_slope = _scale_slope(x, rotation, xq, x_scale, numerics.fprop.left)
            w_slope = _scale_slope(weight, rotation, quantized.fprop, w_scale, numerics.fprop.right)
        if saving:
            x_source = xq if reused else Operand(x, mask=xq.mask)
            saved, ctx.restore = numerics.fprop.left.save(x_source, pack=reused)
            ctx.quantized, ctx.dtypes = quantized, (x.dtype, weight.dtype)
            master = weight if numerics.dgrad.right.spec.source == "master" else None  # so that autograd guards it
            ctx.save_for_backward(keys, x_slope, w_slope, master, *saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_dtype, weight_dtype = ctx.dtypes
        quantized: QuantizedWeight = ctx.quantized
        numerics, rotation = quantized.numerics, quantized.rotation
        grad_output = grads[0]
        keys, x_slope, w_slope, _, *saved = ctx.saved_tensors
        x: Operand = ctx.restore(*saved)
        grad_input = grad_weight = grad_x_scale = grad_w_scale = None
        with torch.autocast(grad_output.device.type, enabled=False):
            if ctx.needs_input_grad[0] or x_slope is not None:
                product = _dgrad(numerics.dgrad, grad_output, quantized, keys)
                rotated = numerics.dgrad.right.spec.source == "forward"
                grad_input, grad_x_scale = _to_operand(
                    product, x.mask, x_slope, rotation, rotated, numerics.fprop.left, x_dtype
                )
            if ctx.needs_input_grad[1] or w_slope is not None:
                product = _wgrad(numerics.wgrad, grad_output, x, keys, quantized)
                rotated = numerics.wgrad.right.spec.source == "forward"
                w_mask = quantized.fprop.mask
                grad_weight, grad_w_scale = _to_operand(
                    product, w_mask, w_slope, rotation, rotated, numerics.fprop.right, weight_dtype
                )
                if quantized.observer is not None:
                    quantized.observer.gradient(grad_weight)
        return grad_input, grad_weight, grad_x_scale, grad_w_scale, None, None, None


def _dgrad(gemm_: Gemm, grad_output: Tensor, quantized: QuantizedWeight, keys: Tensor) -> Tensor:
    """(T, N) @ (N, K), both quantised along N, filled with zeros to whole blocks as `_wgrad` fills T."""
    (tokens, features), block = grad_output.shape, gemm_.left.spec.row_rotation_block
    weight, rotation = quantized.dgrad(keys)
    backend = gemm_.left.backend
    rows = None if block is None else hadamard(block, None, grad_output.device)
    padding = -features % gemm_.multiple
    turned = F.pad(grad_output, (0, padding)) if padding else grad_output
    if rows is not None:
        turned = rotate(F.pad(turned, (0, 0, 0, -tokens % rows.size)), rows, backend, dim=-2)
    dy = quantized.operand("dgrad.dy", turned, rotation, keys, raw=grad_output)
    product = quantized.multiply(gemm_, dy, weight)
    return product if rows is None else unrotate(product, rows, backend, dim=-2)[:tokens]


def _wgrad(gemm_: Gemm, grad_output: Tensor, x: Operand, keys: Tensor, quantized: QuantizedWeight) -> Tensor:
    """(T, N)^T @ (T, K), both quantised along T, filled with zeros to whole blocks. Zeros do not change the product,
    unless neither operand can represent zero and neither is rotated; no shipped recipe does that."""
    tokens = grad_output.shape[0]
    padding = -tokens % gemm_.multiple
    filled = F.pad(grad_output, (0, 0, 0, padding)) if padding else grad_output
    x = _filled(x, padding, quantized.dtype)
    rotation = gemm_.rotation(key_of(keys, "wgrad.signs"), filled.shape[0])
    dy = quantized.operand("wgrad.dy", filled, rotation, keys, dim=-2, raw=grad_output)
    return quantized.multiply(gemm_, dy.t, quantized.again("wgrad.x", x, rotation, keys, rows=tokens))


def _filled(operand: Operand, rows: int, dtype: torch.dtype) -> Operand:
    """An operand (M, N) with so many rows of zeros below it. A scale per row is multiplied in; integers stored without
    their half, which cannot encode zero, become floats in dtype."""
    if not rows:
        return operand
    if isinstance(operand.post_scale, Tensor) and operand.post_scale.ndim:
        operand = Operand(operand.dequantize())
    elif operand.offset:
        operand = operand.floating(dtype)
    return replace(operand, values=F.pad(operand.values, (0, 0, 0, rows)), mask=None, blocks=None)


def _to_operand(
    grad: Tensor,
    mask: Tensor | None,
    slope: Tensor | None,
    rotation: Rotation | None,
    rotated: bool,
    quantizer: Quantizer,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """A gradient by the operand as quantised (rotated: it is in rotated space) -> by the operand itself in dtype, and
    by its learned scale."""
    if mask is None and slope is None and not rotated:
        return grad.to(dtype), None
    if not rotated:
        grad = rotate(grad, rotation, quantizer.backend)
    by_scale = (
        None if slope is None else (grad.float() * slope).sum().view(1) * _scale_gradient_factor(slope, quantizer)
    )
    return unrotate(grad, rotation, quantizer.backend, mask=mask, dtype=dtype), by_scale


def _scalar(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.detach().float().view(())


def _scale_slope(
    x: Tensor, rotation: Rotation | None, operand: Operand, scale: Tensor | None, quantizer: Quantizer
) -> Tensor | None:
    """d(codes * scale) / d scale by the straight-through estimator (LSQ, arXiv 1902.08153), (M, N) float32: codes - x /
    scale inside the grid, the last code beyond it. None where no scale is learned."""
    if scale is None:
        return None
    assert quantizer.plan is not None
    u = rotate(x, rotation, quantizer.backend) / torch.where(scale == 0, 1.0, scale.float())
    codes = operand.values.float()
    return torch.where(u.abs() > quantizer.plan.element.max, codes, codes - u)


def _scale_gradient_factor(x: Tensor, quantizer: Quantizer) -> float:
    """LSQ's 1 / sqrt(numel * q_max), q_max the largest code of the grid with zero; 1 at one bit, where that is none."""
    assert quantizer.plan is not None
    return (x.numel() * max(math.floor(quantizer.plan.element.max), 1)) ** -0.5


class _OptimizerSteps:
    """How many steps the optimisers of torch have made in this process: a fused one moves no version of a weight."""

    count = 0


@torch.compiler.disable
def _note_step(*_: Any) -> None:
    _OptimizerSteps.count += 1


register_optimizer_step_post_hook(_note_step)  # pyright: ignore[reportArgumentType]: disable's type is too wide


@dataclass(frozen=True)
class _Kept:
    """A quantised weight, the micro-batch for which it was quantised, and what the weight was then."""

    quantized: QuantizedWeight
    micro_batch: int
    weight: Tensor
    state: tuple[int, ...]


def _state(weight: Tensor, scale: Tensor | None) -> tuple[int, ...]:
    """What moves when either is written to in place, or an optimiser of torch steps."""
    return _OptimizerSteps.count, weight._version, -1 if scale is None else scale._version


class QuantLinear(Linear):
    """An nn.Linear with the same parameters and state dict, whose GEMMs follow a recipe. Made by `qtrain.convert`.

    x (..., K) -> (..., N) in the autocast dtype, or x's own without autocast (bfloat16 or float32). The weight stays
    the master in its own dtype. A recipe that draws random bits needs `qtrain.set_step` before each training forward. A
    learned scale (LSQ) is one more parameter, input_scale or weight_scale, (1,) float32; NaN until the first training
    forward sets it from what it sees. Convert before the optimiser is made: it must know of them.
    """

    input_scale: nn.Parameter | None
    weight_scale: nn.Parameter | None

    def __init__(
        self, linear: nn.Linear, recipe: LinearRecipe, name: str, seed: int, backend: Backend, gemm: GemmKind = "auto"
    ) -> None:
        """Takes over linear's parameters; name: its qualified name, which with seed keys its random bits."""
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.numerics = Numerics.build(recipe, backend, gemm)
        for side, quantizer in (("input", self.numerics.fprop.left), ("weight", self.numerics.fprop.right)):
            learned = quantizer.plan is not None and quantizer.plan.rule == "learned"
            unset = torch.full((1,), math.nan, dtype=torch.float32, device=linear.weight.device)
            self.register_parameter(f"{side}_scale", nn.Parameter(unset) if learned else None)
        self.name, self.seed = name, seed
        self.step, self.micro_batch, self.step_is_set = 0, 0, False
        self.high_precision = False
        self.fp8_counts: Tensor | None = None  # (2,) int64: elements that FP8 rounded, and all that it multiplied
        self.observer: Observer | None = None
        self._quantized: _Kept | None = None
        self.train(linear.training)
        self._draw_keys(0, 0)

    def set_step(self, step: SupportsIndex, micro_batch: SupportsIndex) -> None:
        """Keys every draw of the next forward and its backward; see `qtrain.set_step`."""
        step, micro_batch = operator.index(step), operator.index(micro_batch)
        if step != self.step or micro_batch <= self.micro_batch:
            self._quantized = None
        self._draw_keys(step, micro_batch)
        self.step, self.micro_batch, self.step_is_set = step, micro_batch, True

    def _draw_keys(self, step: int, micro_batch: int) -> None:
        rows = [self._words(use, step, micro_batch) for use in USES]
        with torch.inference_mode(False):
            # No buffer, which ranks would share and to_empty would lose; replaced, as a graph may hold the old one.
            self.keys = torch.tensor(rows, dtype=torch.int32, device="cpu")

    def _words(self, use: str, step: int, micro_batch: int) -> list[int]:
        gemm_name, _, kind = use.partition(".")
        if kind == "signs" and getattr(self.numerics, gemm_name).left.spec.signs == "fixed":
            return key_words(self.seed, "signs")
        once_a_step = self.numerics.redraw == "step" and use in OF_THE_WEIGHT
        return key_words(self.seed, self.name, use, "step", step, 0 if once_a_step else micro_batch)

    def forward(self, input: Tensor) -> Tensor:
        if self.high_precision:
            return super().forward(input)
        dtype = self._compute_dtype(input)
        if input.shape[-1:] != (self.in_features,):
            raise UserError(
                f"{self.name}: expected an input of last dim {self.in_features}, found shape {tuple(input.shape)}; "
                "pass (..., in_features)"
            )
        if input.numel() == 0:
            return F.linear(input.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))
        y = self._matmul(input.reshape(-1, self.in_features), dtype).view(*input.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(dtype)

    @torch.compiler.disable(reason="quantised GEMMs keep their own graphs, so that their bits stay the reference's")
    def _matmul(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x (T, K) -> (T, N). A graph break under torch.compile of a whole model, which compiles around it."""
        if self.training and self.numerics.stochastic and not self.step_is_set:  # here: a compiled graph would guard it
            raise UserError(
                f"{self.name}: its recipe draws random bits, and no step is set to key them; call "
                "qtrain.set_step(model, step, micro_batch) before each training forward"
            )
        keys = self.keys.to(x.device, non_blocking=True)
        x_scale = self._learned(self.input_scale, self.numerics.fprop.left, x)
        w_scale = self._learned(self.weight_scale, self.numerics.fprop.right, self.weight)
        quantized = self._quantized_weight(w_scale, keys, dtype)
        quantized.observer = self.observer  # a kept weight has that of an earlier micro-batch
        saving = torch.is_grad_enabled()
        return cast(Tensor, _QuantLinearFunction.apply(x, self.weight, x_scale, w_scale, keys, quantized, saving))

    def _compute_dtype(self, input: Tensor) -> torch.dtype:
        device_type = input.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else input.dtype
        if self.numerics.gemm in FP8_GEMMS and dtype != torch.bfloat16:
            raise UserError(
                f"{self.name}: gemm {self.numerics.gemm!r} gives products in bfloat16; the compute dtype is {dtype}; "
                "use torch.autocast(..., dtype=torch.bfloat16), or convert with gemm='auto'"
            )
        if dtype not in (torch.bfloat16, torch.float32):
            raise UserError(
                f"{self.name}: quantised GEMMs run in bfloat16 or float32; the compute dtype is {dtype}; "
                "use torch.autocast(..., dtype=torch.bfloat16)"
            )
        return dtype

    def _quantized_weight(self, scale: Tensor | None, keys: Tensor, dtype: torch.dtype) -> QuantizedWeight:
        """Kept for later micro-batches of the same step, and for nothing else: only `set_step` says that the weight is
        still the same. Versions and the count of optimiser steps are checked besides, but a write to weight.data moves
        neither."""
        weight, kept = self.weight, self._quantized
        keep = self.training and self.step_is_set and self.numerics.lasts(self.numerics.fprop)
        keep = keep and not weight.is_inference()
        if keep and kept is not None and kept.micro_batch < self.micro_batch:
            unchanged = kept.weight is weight and kept.state == _state(weight, scale)
            if unchanged and kept.quantized.dtype == dtype:
                return kept.quantized
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            quantized = QuantizedWeight(
                weight.detach(), scale, keys, self.numerics, dtype, self._counts(), self.observer
            )
        self._quantized = _Kept(quantized, self.micro_batch, weight, _state(weight, scale)) if keep else None
        return quantized

    def _counts(self) -> Tensor:
        if self.fp8_counts is None or self.fp8_counts.device != self.weight.device:
            with torch.inference_mode(False):
                self.fp8_counts = torch.zeros(2, dtype=torch.int64, device=self.weight.device)
        return self.fp8_counts

    @torch.no_grad()
    def _learned(self, scale: nn.Parameter | None, quantizer: Quantizer, x: Tensor) -> Tensor | None:
        """The learned scale, set at the first training forward to LSQ's 2 E|x| / sqrt(q_max)."""
        if scale is None:
            return None
        assert quantizer.plan is not None
        if not scale.isnan().item():
            return scale
        first = 2.0 * x.float().abs().mean() / max(math.floor(quantizer.plan.element.max), 1) ** 0.5
        if not self.training:
            return first.view(1)
        if distributed.is_initialized():  # all ranks begin alike
            distributed.all_reduce(first)
            first = first / distributed.get_world_size()
        scale.copy_(first)
        return scale

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out the kept weight."""
        return super().__getstate__() | {"_quantized": None}

    def extra_repr(self) -> str:
        state = "high precision, after " if self.high_precision else ""
        return f"{super().extra_repr()}, {state}{self.numerics} | {self.numerics.runs_on(self.weight.device.type)}"
