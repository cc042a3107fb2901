"""PEQA (arXiv 2305.14152): integer codes whose scales train; and PV-Tuning (arXiv 2405.14852), where the codes move.

# T tokens, N out features, K in features, G groups of a row
W = (codes - zero) * scale, a scale and a zero point for each group of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qtrain.errors import UserError
from qtrain_kernels.precision import matmul
from qtrain_kernels.reference import join, split

SHRINKS = torch.linspace(1.0, 0.2, 81).tolist()  # of the range of a group, among which the least error is looked for


def round_to_nearest(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """weight (N, K), K % group == 0 -> codes (N, K) and zero (N, G), uint8 below 2^bits, scale (N, G) float32.

    The range of a group, in which zero always lies, is shrunk as far as lowers its squared error, and cut into
    2^bits - 1 steps.
    """
    w = weight.float().view(len(weight), -1, group)
    low, high = w.amin(-1, True).clamp(max=0), w.amax(-1, True).clamp(min=0)
    best = None
    for shrink in SHRINKS[:1] if weight.is_meta else SHRINKS:  # shapes alone are soon known
        scale = (high - low) * shrink / (2**bits - 1)
        scale = torch.where(scale == 0, 1.0, scale)
        zero = (-low * shrink / scale).round()
        codes = (w / scale + zero).round().clamp(0, 2**bits - 1)
        error = ((codes - zero) * scale - w).square().sum(-1, True)
        found = [error, codes, zero, scale]
        best = found if best is None else [torch.where(error < best[0], new, old) for new, old in zip(found, best)]  # noqa: B905
    assert best is not None
    _, codes, zero, scale = best
    return codes.to(torch.uint8).view(weight.shape), zero.to(torch.uint8).squeeze(-1), scale.squeeze(-1)


class ScaledLinear(nn.Module):
    """A linear layer of integer codes. x (..., K) -> (..., N) in the autocast dtype, or x's own.

    codes: uint8, as many of 2, 4 or 8 bits in each byte as fit; zero (N, G) uint8; scale (N, G) float32, which trains.
    moves: None where the codes are frozen; else (N, K) float32, zero in every forward, whose gradient is that of the
    weight, and by which an optimiser moves the virtual weight that `move` rounds.
    """

    codes: Tensor
    zero: Tensor
    moves: nn.Parameter | None

    def __init__(self, linear: nn.Linear, name: str, bits: int, group: int | None, moves: bool = False) -> None:
        """UserError for a group that does not divide the inputs."""
        super().__init__()
        self.in_features, self.out_features, self.name = linear.in_features, linear.out_features, name
        self.bits, self.group = bits, group or linear.in_features
        if self.in_features % self.group:
            raise UserError(
                f"tune.scales.group={group} must divide the {self.in_features} inputs of {name}; choose another"
            )
        codes, zero, scale = round_to_nearest(linear.weight.detach(), bits, self.group)
        self.register_buffer("codes", join(codes.flatten(), self.width))
        self.register_buffer("zero", zero)
        self.scale = nn.Parameter(scale)
        self.register_parameter(
            "moves", nn.Parameter(torch.zeros_like(linear.weight, dtype=torch.float32)) if moves else None
        )
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=moves)

    @property
    def width(self) -> int:
        return 1 << (self.bits - 1).bit_length()

    def unpacked(self) -> Tensor:
        """codes, (N, G, K / G) float32."""
        count = self.in_features * self.out_features
        return split(self.codes, self.width, count).view(self.out_features, -1, self.group).float()

    def integers(self) -> Tensor:
        """codes - zero, (N, G, K / G) float32."""
        return self.unpacked() - self.zero[..., None].float()

    @torch.no_grad()
    def move(self, rate: float, largest_change: float) -> None:
        """Rounds the weight + rate * moves to codes under the scales, which stay; then moves are zero again.

        Of the codes that would change, those of the largest moves do, as many as keep the norm of the change at most
        largest_change times that of the weight. Equal moves are taken in the order of the weight.
        """
        assert self.moves is not None
        codes, scale = self.unpacked(), self.scale[..., None]
        moved = (rate * self.moves).view_as(codes)
        wanted = (codes + moved / torch.where(scale == 0, 1.0, scale)).round().clamp(0, 2**self.bits - 1)
        change = ((wanted - codes) * scale).flatten()
        chosen = (change != 0).nonzero().flatten()
        chosen = chosen[moved.flatten()[chosen].abs().argsort(descending=True, stable=True)]
        norms = change[chosen].double().square().cumsum(0).sqrt()
        chosen = chosen[norms <= largest_change * self.dequantize().double().norm()]
        codes.view(-1)[chosen] = wanted.view(-1)[chosen]
        self.codes.copy_(join(codes.to(torch.uint8).flatten(), self.width))
        self.moves.zero_()

    def dequantize(self) -> Tensor:
        """(N, K) float32."""
        return (self.integers() * self.scale.detach()[..., None]).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        y = _Product.apply(x.reshape(-1, self.in_features), self.scale, self.moves, self, dtype)
        y = y.view(*x.shape[:-1], self.out_features)  # pyright: ignore[reportOptionalMemberAccess]
        return y if self.bias is None else y + self.bias.to(dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, group={self.group}"
        )


class _Product(torch.autograd.Function):
    """Makes the weight anew in the backward, so that it does not wait for it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, moves: Tensor | None, layer: ScaledLinear, dtype: torch.dtype
    ) -> Tensor:
        ctx.layer, ctx.dtype = layer, dtype
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:3]) else None, scale)
        return matmul(x.to(dtype), layer.dequantize().to(dtype).T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, scale = ctx.saved_tensors
        layer, dy = ctx.layer, grads[0].to(ctx.dtype)
        integers = layer.integers()
        dx = dscale = dmoves = None
        if ctx.needs_input_grad[0]:
            weight = (integers * scale[..., None]).flatten(1)
            dx = matmul(dy, weight.to(ctx.dtype))
        if any(ctx.needs_input_grad[1:3]):
            dw = matmul(dy.T, x.to(ctx.dtype)).float().view_as(integers)
            dscale = (dw * integers).sum(-1) if ctx.needs_input_grad[1] else None
            dmoves = dw.flatten(1) if ctx.needs_input_grad[2] else None
        return dx, dscale, dmoves, None, None


def train_scales(model: nn.Module, bits: int, group: int | None, moves: bool = False) -> None:
    """Makes a ScaledLinear of each of a model's linear layers but lm_head, in place. moves: their codes move too, and
    all other parameters train; else all but the scales is frozen."""
    linears = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    model.requires_grad_(moves)
    for name, linear in linears.items():
        parent, _, child = name.rpartition(".")
        if child != "lm_head":
            setattr(model.get_submodule(parent), child, ScaledLinear(linear, name, bits, group, moves))
