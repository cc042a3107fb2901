"""QuantLinear: a linear layer whose three GEMMs run on quantised operands, as a recipe says.

# T tokens (all leading dims), K in features, N out features; H the block Hadamard, D random signs, Q a quantiser.
    fprop  Y  = Q(X D H) Q(W D H)^T                          contraction over K
    dgrad  dX = (Q(dY D' H) Q(W' D' H)  * mask_X) (D H)^-1   contraction over N
    wgrad  dW = (Q(dY^T D" H) Q(X' D" H) * mask_W) (D H)^-1  contraction over T
X', W': the master values, or the rotated and quantised ones of the forward, whose gradients leave the rotation by its
inverse. Masks are the forward's estimators. Weights are quantised from the float32 master in every forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qtrain.config import Backend, LinearRecipe, QuantSpec
from qtrain.errors import UserError
from qtrain.quant.quantizer import Operand, Quantizer, gemm
from qtrain.quant.random import USES, key_of, key_words
from qtrain.quant.rotation import rotate, rotation_matrix


@dataclass(frozen=True)
class Gemm:
    """The two operands of one GEMM; they share the rotation and its signs."""

    left: Quantizer
    right: Quantizer

    def matrix(self, key: Tensor) -> Tensor | None:
        spec = self.left.spec
        if spec.rotation_block is None:
            return None
        return rotation_matrix(spec.rotation_block, None if spec.signs == "none" else key, key.device)

    @property
    def multiple(self) -> int:
        return max(self.left.multiple, self.right.multiple)  # powers of two


@dataclass(frozen=True)
class Numerics:
    """A recipe's three GEMMs, resolved for one backend."""

    fprop: Gemm
    dgrad: Gemm
    wgrad: Gemm

    @staticmethod
    def build(recipe: LinearRecipe, backend: Backend) -> Numerics:
        """UserError for a recipe that asks for what is not there."""
        gemms = {}
        for gemm_name, operands in recipe.operands().items():
            left, right = (Quantizer.build(spec, backend) for spec in operands.values())
            gemms[gemm_name] = Gemm(left, right)
        return Numerics(**gemms)

    @property
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


class _QuantLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, keys: Tensor, numerics: Numerics, dtype: torch.dtype) -> Tensor:
        """x (T, K), weight (N, K) master, keys (9, 2) int32 in the order of USES -> (T, N) in dtype."""
        with torch.autocast(x.device.type, enabled=False):
            matrix = numerics.fprop.matrix(key_of(keys, "fprop.signs"))
            xq = numerics.fprop.left.operand(x, dtype, matrix, key_of(keys, "fprop.x"))
            wq = numerics.fprop.right.operand(weight, dtype, matrix, key_of(keys, "fprop.w"))
            y = gemm(xq, wq.t).to(dtype)
        w_source = wq if numerics.dgrad.right.spec.source == "forward" else Operand(weight)
        x_source = xq if numerics.wgrad.right.spec.source == "forward" else Operand(x)
        ctx.numerics, ctx.dtypes = numerics, (dtype, x.dtype, weight.dtype)
        ctx.constants, tensors = _split([w_source.post_scale, x_source.post_scale])
        ctx.save_for_backward(w_source.values, x_source.values, xq.mask, wq.mask, keys, matrix, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        dtype, x_dtype, weight_dtype = ctx.dtypes
        numerics: Numerics = ctx.numerics
        grad_output = grads[0]
        if numerics.dgrad.left.plan or numerics.wgrad.left.plan:
            grad_output = grad_output.float()  # once for both
        w_values, x_values, x_mask, w_mask, keys, matrix, *tensors = ctx.saved_tensors
        w_post, x_post = _join(ctx.constants, tensors)
        grad_input = grad_weight = None
        with torch.autocast(grad_output.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                source = Operand(w_values, w_post).dequantize()
                product = _dgrad(numerics.dgrad, grad_output, source, keys, dtype)
                forward_space = numerics.dgrad.right.spec.source == "forward"
                grad_input = _leave_rotation(product, x_mask, matrix, forward_space).to(x_dtype)
            if ctx.needs_input_grad[1]:
                source = Operand(x_values, x_post).dequantize()
                product = _wgrad(numerics.wgrad, grad_output, source, keys, dtype)
                forward_space = numerics.wgrad.right.spec.source == "forward"
                grad_weight = _leave_rotation(product, w_mask, matrix, forward_space).to(weight_dtype)
        return grad_input, grad_weight, None, None, None


@torch.compiler.disable(reason="quantised GEMMs keep their own graphs, so that their bits stay those of the reference")
def _apply(x: Tensor, weight: Tensor, keys: Tensor, numerics: Numerics, dtype: torch.dtype) -> Tensor:
    """Under torch.compile of a whole model this is a graph break: the rest of the model compiles around it."""
    keys = keys.to(x.device, non_blocking=True)
    return cast(Tensor, _QuantLinearFunction.apply(x, weight, keys, numerics, dtype))


def _dgrad(gemm_: Gemm, grad_output: Tensor, weight: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, N) @ (N, K), both quantised along N."""
    matrix = gemm_.matrix(key_of(keys, "dgrad.signs"))
    dy = gemm_.left.operand(grad_output, dtype, matrix, key_of(keys, "dgrad.dy"), dim=-1)
    w = gemm_.right.operand(weight, dtype, matrix, key_of(keys, "dgrad.w"), dim=-2)
    return gemm(dy, w)


def _wgrad(gemm_: Gemm, grad_output: Tensor, x: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, N)^T @ (T, K), both quantised along T, filled with zeros to whole blocks: the product stays."""
    padding = -x.shape[0] % gemm_.multiple
    if padding:
        grad_output, x = F.pad(grad_output, (0, 0, 0, padding)), F.pad(x, (0, 0, 0, padding))
    matrix = gemm_.matrix(key_of(keys, "wgrad.signs"))
    dy = gemm_.left.operand(grad_output, dtype, matrix, key_of(keys, "wgrad.dy"), dim=-2)
    xq = gemm_.right.operand(x, dtype, matrix, key_of(keys, "wgrad.x"), dim=-2)
    return gemm(dy.t, xq)


def _leave_rotation(grad: Tensor, mask: Tensor | None, matrix: Tensor | None, forward_space: bool) -> Tensor:
    """A gradient by the operand as quantised (forward_space: it is rotated; else not) -> by the operand itself."""
    if mask is None and not forward_space:
        return grad
    if not forward_space and matrix is not None:
        grad = rotate(grad.float(), matrix)
    if mask is not None:
        grad = grad.float().mul_(mask)
    return grad if matrix is None else rotate(grad.float(), matrix.T)


def _split(scales: list[Tensor | float]) -> tuple[list[float | None], list[Tensor]]:
    """Constants to keep on the context (None where a tensor stands), and tensors to save for backward."""
    return [None if isinstance(s, Tensor) else s for s in scales], [s for s in scales if isinstance(s, Tensor)]


def _join(constants: list[float | None], tensors: list[Tensor]) -> list[Tensor | float]:
    rest = iter(tensors)
    return [next(rest) if constant is None else constant for constant in constants]


class QuantLinear(nn.Linear):
    """An nn.Linear with the same parameters and state dict, whose GEMMs follow a recipe. Made by `qtrain.convert`.

    x (..., K) -> (..., N) in the autocast dtype, or x's own without autocast (bfloat16 or float32). The weight stays
    the master in its own dtype. A recipe that draws random bits needs `qtrain.set_step` before each training forward.
    """

    def __init__(self, linear: nn.Linear, recipe: LinearRecipe, name: str, seed: int, backend: Backend) -> None:
        """Takes over linear's parameters; name: its qualified name, which with seed keys its random bits."""
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.numerics = Numerics.build(recipe, backend)
        self.name, self.seed = name, seed
        self.step_is_set = False
        self.train(linear.training)
        self._draw_keys(0, 0)

    def set_step(self, step: int, micro_batch: int) -> None:
        """Keys every draw of the next forward and its backward; see `qtrain.set_step`."""
        self._draw_keys(step, micro_batch)
        self.step_is_set = True

    def _draw_keys(self, step: int, micro_batch: int) -> None:
        fixed = {f"{name}.signs" for name in ("fprop", "dgrad", "wgrad") if self._signs(name) == "fixed"}
        position = ("step", step, micro_batch)
        rows = [key_words(self.seed, self.name, use, *(() if use in fixed else position)) for use in USES]
        with torch.inference_mode(False):
            # No buffer, which ranks would share and to_empty would lose; replaced, as a graph may hold the old one.
            self.keys = torch.tensor(rows, dtype=torch.int32, device="cpu")

    def _signs(self, gemm_name: str) -> str:
        return cast(QuantSpec, getattr(self.numerics, gemm_name).left.spec).signs

    def forward(self, input: Tensor) -> Tensor:
        if self.training and self.numerics.stochastic and not self.step_is_set:
            raise UserError(
                f"{self.name}: its recipe draws random bits, and no step is set to key them; call "
                "qtrain.set_step(model, step, micro_batch) before each training forward"
            )
        device_type = input.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else input.dtype
        if dtype not in (torch.bfloat16, torch.float32):
            raise UserError(
                f"{self.name}: quantised GEMMs run in bfloat16 or float32; the compute dtype is {dtype}; "
                "use torch.autocast(..., dtype=torch.bfloat16)"
            )
        if input.shape[-1:] != (self.in_features,):
            raise UserError(
                f"{self.name}: expected an input of last dim {self.in_features}, found shape {tuple(input.shape)}; "
                "pass (..., in_features)"
            )
        if input.numel() == 0:
            return F.linear(input.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))
        tokens = input.reshape(-1, self.in_features)
        y = _apply(tokens, self.weight, self.keys, self.numerics, dtype)
        y = y.view(*input.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.numerics}"
