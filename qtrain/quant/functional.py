"""The quantised linear layer as four operators of torch: quantize_weight, fprop, dgrad and wgrad.

# T tokens (all leading dims), K in features, N out features; H the block Hadamard, D random signs, Q a quantiser.
    fprop  Y  = Q(X D H) Q(W D H)^T                          contraction over K
    dgrad  dX = (Q(dY D' H) Q(W' D' H)  * mask_X) (D H)^-1   contraction over N
    wgrad  dW = (Q(dY^T D" H) Q(X' D" H) * mask_W) (D H)^-1  contraction over T
X', W': the master values, or the rotated and quantised ones of the forward, whose gradients leave the rotation by its
inverse. Masks are the forward's estimators. Weights are quantised from the float32 master. N (in dgrad) and T (in
wgrad) are filled with zeros to whole blocks.

Each operator is a pure function of its arguments: tensors, keys of its random bits, and the layer's numerics as text.
torch.compile, export, checkpointing, saved-tensor hooks and FSDP see one node for each. Its fake implementation is the
operator itself on the reference backend, run on fake tensors, so that shapes are stated in one place.

The backward keeps no quantised weight: it quantises the weight again, with the same keys and hence the same bits,
unless the caller passes one that it keeps itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, distributed
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from qtrain.quant.quantizer import Operand, Quantizer, folded, gemm, rotate, unrotate
from qtrain.quant.random import USES, key_of
from qtrain.quant.rotation import hadamard
from qtrain.recipe import LinearRecipe
from qtrain.settings import Backend, GemmKind, Redraw
from qtrain_kernels import dispatch
from qtrain_kernels.gemm import fp8_matmul
from qtrain_kernels.plans import Rotation, stored_integer

OPERANDS = {"fprop": ("x", "w"), "dgrad": ("dy", "w"), "wgrad": ("dy", "x")}

# ----------------------------------------------------------------------------------------------------- what is observed


@dataclass(frozen=True)
class Observed:
    """A quantised operand of a GEMM with its input. x (M, N): the input after padding and the rotation of its rows,
    quantised along dim after `rotation`; raw: the input before them, None where it is x. fp8_rounded: () float32, the
    share of elements that FP8 rounds, where the GEMM multiplies in FP8."""

    use: str
    quantizer: Quantizer
    x: Tensor
    rotation: Rotation | None
    dim: int
    operand: Operand
    raw: Tensor | None = None
    fp8_rounded: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Observer:
    """Is called with each quantised operand, and with each weight gradient (N, K), of the forwards that began while a
    layer carried it, and of their backwards. It must not change their tensors."""

    operand: Callable[[Observed], None]
    gradient: Callable[[Tensor], None]
    number: int = field(default_factory=count(1).__next__, init=False)

    def __post_init__(self) -> None:
        _observers[self.number] = self


# By number, which an operator takes (0: none), since graphs hold numbers and no Python objects.
_observers: WeakValueDictionary[int, Observer] = WeakValueDictionary()


# ----------------------------------------------------------------------------------------- a layer's numerics, resolved


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
    text: str  # what `read_numerics` makes them of: how they travel through operators

    @staticmethod
    def build(recipe: LinearRecipe, backend: Backend, gemm: GemmKind = "auto") -> Numerics:
        """UserError for a recipe that asks for what is not there."""
        written = recipe.model_dump(mode="json", include={"name", "bits", "format", "redraw", *OPERANDS})
        return read_numerics(json.dumps([written, backend, gemm]))

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
        """fprop.x -> its quantiser, and so on."""
        sides = {name: (getattr(self, name).left, getattr(self, name).right) for name in OPERANDS}
        return {f"{name}.{OPERANDS[name][side]}": sides[name][side] for name in OPERANDS for side in (0, 1)}

    @cached_property
    def uses(self) -> tuple[str, ...]:
        """What it draws random bits for, of `USES`; other than the signs of all layers and steps."""
        drawn = {name for name, quantizer in self.operands.items() if quantizer.stochastic}
        drawn |= {f"{name}.signs" for name in OPERANDS if getattr(self, name).left.spec.signs == "step"}
        return tuple(use for use in USES if use in drawn)

    @property
    def stochastic(self) -> bool:
        return bool(self.uses)

    def __str__(self) -> str:
        texts = {"fprop": [], "dgrad": [], "wgrad": []}
        for name, quantizer in self.operands.items():
            gemm_name, operand = name.split(".")
            texts[gemm_name].append(f"{operand}:{quantizer}")
        return f"fwd {' '.join(texts['fprop'])} dgrad {' '.join(texts['dgrad'])} wgrad {' '.join(texts['wgrad'])}"


@cache
def read_numerics(text: str, backend: Backend | None = None) -> Numerics:
    """The Numerics of their text, or the same on another backend."""
    if text in _own:
        return _own[text]
    written, own, kind = json.loads(text)
    recipe, gemms = LinearRecipe.model_validate(written), {}
    for name, operands in recipe.operands().items():
        left, right = (Quantizer.build(spec, backend or own) for spec in operands.values())
        dtypes = left.eight_bits, right.eight_bits
        if right.reuses:
            dtypes = left.eight_bits, _reused(gemms["fprop"], name, name == "wgrad" or left.multiple > 1)
        gemms[name] = Gemm(left, right, _multiplied(*dtypes))
    return Numerics(**gemms, gemm=kind, redraw=recipe.redraw, text=text)


_own: dict[str, Numerics] = {}


def text_of_own(numerics: Numerics) -> str:
    """A text for numerics that no recipe says; known in this process alone."""
    text = f"own {len(_own)}"
    _own[text] = replace(numerics, text=text)
    return text


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


# ------------------------------------------------------------------------------------------------------- the arithmetic


@dataclass(frozen=True)
class Call:
    """One call of an operator: what its three GEMMs share. keys: (9, 2) int32 in the order of USES, on the device;
    dtype: the compute dtype, bfloat16 or float32."""

    numerics: Numerics
    keys: Tensor
    dtype: torch.dtype
    observer: Observer | None

    def kind(self, gemm_: Gemm) -> str:
        return self.numerics.kind(gemm_, self.keys.device.type)

    def dtype_in(self, gemm_: Gemm) -> torch.dtype:
        """Of the operands of one of the GEMMs."""
        return torch.int8 if self.kind(gemm_) == "int8" else self.dtype

    def rotation(self, gemm_name: str, size: int) -> Rotation | None:
        return getattr(self.numerics, gemm_name).rotation(key_of(self.keys, f"{gemm_name}.signs"), size)

    def operand(
        self,
        use: str,
        x: Tensor,
        rotation: Rotation | None,
        dim: int = -1,
        learned: Tensor | None = None,
        with_blocks: bool = False,
        raw: Tensor | None = None,
    ) -> Operand:
        """x as the operand `use` (fprop.x) of its GEMM, along dim, drawn with that use's key; learned: () a scale;
        with_blocks: with its block scales, which packing and observing need; raw: as in `Observed`."""
        quantizer, gemm_ = self.numerics.operands[use], getattr(self.numerics, use.partition(".")[0])
        observed = self.observer is not None and quantizer.plan is not None
        operand = quantizer.operand(
            x, self.dtype_in(gemm_), rotation, key_of(self.keys, use),
            dim=dim, learned=learned, with_blocks=with_blocks or observed,
        )  # fmt: skip
        if self.observer is not None and observed:
            rounded = None
            if self.kind(gemm_) == "fp8":
                side = use.endswith((".w", "wgrad.x"))
                along = -1 if use in ("fprop.x", "fprop.w", "dgrad.dy") else -2
                rounded = folded(operand, along, gemm_.eight_bits[side]).inexact / operand.values.numel()
            self.observer.operand(Observed(use, quantizer, x, rotation, dim, operand, raw, rounded))
        return operand if with_blocks else replace(operand, blocks=None)

    def again(self, use: str, source: Operand, rotation: Rotation | None, rows: int) -> Operand:
        """An operand of the backward, along dim -2, from a master or forward value of which `rows` rows came in before
        zeros filled it up. A forward value that is neither rotated nor quantised again is returned as it is, its tensor
        scale beside it; a scale per row lies along the contraction and is multiplied in."""
        per_row = isinstance(source.post_scale, Tensor) and source.post_scale.ndim > 0
        if self.numerics.operands[use].reuses and not per_row:
            dtype = self.dtype_in(getattr(self.numerics, use.partition(".")[0]))
            return source if dtype == torch.int8 else source.floating(dtype)
        x = source.dequantize()
        return self.operand(use, x, rotation, dim=-2, raw=x[:rows])

    def multiply(self, gemm_: Gemm, left: Operand, right: Operand) -> Tensor:
        """left @ right as one of the GEMMs is multiplied."""
        if self.kind(gemm_) != "fp8":
            return gemm(left, right)
        assert gemm_.eight_bits is not None
        sides = folded(left, -1, gemm_.eight_bits[0]), folded(right, -2, gemm_.eight_bits[1])
        return fp8_matmul(*sides, fast=self.numerics.gemm == "fp8_fast")


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
    grad: Tensor, mask: Tensor | None, slope: Tensor | None, rotation: Rotation | None, rotated: bool,
    quantizer: Quantizer, dtype: torch.dtype, ranks: int = 1,
) -> list[Tensor]:  # fmt: skip
    """A gradient by the operand as quantised (rotated: it is in rotated space) -> by the operand itself in dtype, and
    by its learned scale, (1,) float32, where there is one. ranks: among which the operand's rows are divided."""
    if mask is None and slope is None and not rotated:
        return [grad.to(dtype)]
    if not rotated:
        grad = rotate(grad, rotation, quantizer.backend)
    found = [unrotate(grad, rotation, quantizer.backend, mask=mask, dtype=dtype)]
    if slope is not None:
        found.append((grad.float() * slope).sum().view(1) * _scale_gradient_factor(ranks * slope.numel(), quantizer))
    return found


def _scale_slope(x: Tensor, rotation: Rotation | None, operand: Operand, scale: Tensor, quantizer: Quantizer) -> Tensor:
    """d(codes * scale) / d scale by the straight-through estimator (LSQ, arXiv 1902.08153), (M, N) float32: codes - x /
    scale inside the grid, the last code beyond it."""
    assert quantizer.plan is not None
    u = rotate(x, rotation, quantizer.backend) / torch.where(scale == 0, 1.0, scale.float())
    codes = operand.values.float()
    return torch.where(u.abs() > quantizer.plan.element.max, codes, codes - u)


def _scale_gradient_factor(elements: int, quantizer: Quantizer) -> float:
    """LSQ's 1 / sqrt(elements * q_max), q_max the largest code of the grid with zero; 1 at one bit, where that is
    none."""
    assert quantizer.plan is not None
    return (elements * max(math.floor(quantizer.plan.element.max), 1)) ** -0.5


# -------------------------------------------------------------------------------------------------------- the operators
#
# A held operand travels as a list of tensors, in the order of `Quantizer.parts`; a weight's ends with its slope (see
# `_scale_slope`) where its scale is learned. Arguments that all four share come last: keys, numerics, dtype, observer.

Held = list[Tensor]


def _quantize_weight(call: Call, weight: Tensor, scale: Tensor | None, packed: bool) -> Held:
    """weight (N, K) master -> as fprop takes it; packed: in the bits of its format, where it has such."""
    operand, slope = _weight(call, weight, scale, [], with_blocks=packed)
    held = list(call.numerics.fprop.right.hold(operand, packed).values())
    return held if slope is None else [*held, slope]


def _weight(
    call: Call, weight: Tensor, scale: Tensor | None, kept: Held, with_blocks: bool = False
) -> tuple[Operand, Tensor | None]:
    """The operand fprop.w and its slope: as kept, or else quantised here."""
    gemm_ = call.numerics.fprop
    if kept:
        parts = gemm_.right.restore(kept, weight.shape, call.dtype_in(gemm_))
        return parts, None if scale is None else kept[-1]
    rotation = call.rotation("fprop", weight.shape[1])
    operand = call.operand("fprop.w", weight, rotation, learned=_scalar(scale), with_blocks=with_blocks)
    return operand, None if scale is None else _scale_slope(weight, rotation, operand, scale, gemm_.right)


def _fprop(
    call: Call, x: Tensor, weight: Tensor, x_scale: Tensor | None, w_scale: Tensor | None, kept: Held,
    save_x: bool, save_mask: bool,
) -> list[Tensor]:  # fmt: skip
    """x (T, K), weight (N, K) master, both scales () learned ones, kept: of quantize_weight, or nothing -> y (T, N) in
    dtype, and what `saved_parts` names."""
    gemm_ = call.numerics.fprop
    names = saved_parts(call.numerics, call.kind(gemm_), call.dtype, save_x, save_mask)
    w, _ = _weight(call, weight, w_scale, kept)
    rotation = call.rotation("fprop", x.shape[1])
    xq = call.operand("fprop.x", x, rotation, learned=_scalar(x_scale), with_blocks="codes" in names)
    y = call.multiply(gemm_, xq, w.t).to(call.dtype)
    held = gemm_.left.hold(xq, packed="codes" in names)
    if "slope" in names:
        assert x_scale is not None
        held["slope"] = _scale_slope(x, rotation, xq, x_scale, gemm_.left)
    return [y, *(held[name] for name in names)]


def saves_codes(numerics: Numerics) -> bool:
    """Whether wgrad takes x as fprop has quantised or rotated it, and not x itself."""
    forward = numerics.fprop.left
    return numerics.wgrad.right.spec.source == "forward" and (forward.plan is not None or forward.rotates)


def saved_parts(numerics: Numerics, kind: str, dtype: torch.dtype, save_x: bool, save_mask: bool) -> tuple[str, ...]:
    """What fprop keeps of x for wgrad (save_x) and dgrad (save_mask): of `Quantizer.parts`, and the slope of a learned
    scale."""
    quantizer = numerics.fprop.left
    parts = quantizer.parts(torch.int8 if kind == "int8" else dtype, packed=True)
    wanted = {"codes", "scales", "post_scale"} if save_x and saves_codes(numerics) else set()
    wanted |= {"mask"} if save_mask else set()
    slope = ("slope",) if quantizer.learned and save_mask else ()
    return tuple(name for name in parts if name in wanted) + slope


def _dgrad(
    call: Call, dy: Tensor, weight: Tensor, w: Held, x_mask: Tensor | None, x_slope: Tensor | None,
    x_dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """dy (T, N), weight (N, K) master, w: of quantize_weight, where its codes are multiplied; x_mask: bits, x_slope (T,
    K) -> dX (T, K) in x_dtype, and the gradient of a learned scale, (1,). Both operands are quantised along N, filled
    with zeros to whole blocks."""
    gemm_, forward = call.numerics.dgrad, call.numerics.fprop
    (tokens, features), block = dy.shape, gemm_.left.spec.row_rotation_block
    from_codes = gemm_.right.spec.source == "forward"
    source = _weight(call, weight, None, w)[0] if from_codes else Operand(weight)
    source = _filled(source, -features % gemm_.multiple, call.dtype)
    rotation = call.rotation("dgrad", source.values.shape[0])
    right = call.again("dgrad.w", source, rotation, features)
    backend = gemm_.left.backend
    rows = None if block is None else hadamard(block, None, dy.device)
    padding = -features % gemm_.multiple
    turned = F.pad(dy, (0, padding)) if padding else dy
    if rows is not None:
        turned = rotate(F.pad(turned, (0, 0, 0, -tokens % rows.size)), rows, backend, dim=-2)
    product = call.multiply(gemm_, call.operand("dgrad.dy", turned, rotation, raw=dy), right)
    if rows is not None:
        product = unrotate(product, rows, backend, dim=-2)[:tokens]
    shape = (tokens, weight.shape[1])
    mask = None if x_mask is None else forward.left.bytes_of(x_mask, shape)
    turn = call.rotation("fprop", shape[1])
    ranks = distributed.get_world_size() if x_slope is not None and distributed.is_initialized() else 1
    return _to_operand(product, mask, x_slope, turn, from_codes, forward.left, x_dtype, ranks)


def _wgrad(
    call: Call, dy: Tensor, x: Held, w_mask: Tensor | None, w_slope: Tensor | None, features: int,
    weight_dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """dy (T, N), x: the input (T, K) itself, or what fprop saved of its codes; w_mask: bits, w_slope (N, K) -> dW
    (N, K) in weight_dtype, K = features, and the gradient of a learned scale, (1,). Both operands are quantised along
    T, filled with zeros to whole blocks. Zeros do not change the product, unless neither operand can represent zero and
    neither is rotated; no shipped recipe does that."""
    gemm_, forward = call.numerics.wgrad, call.numerics.fprop
    tokens, from_codes = dy.shape[0], gemm_.right.spec.source == "forward"
    if saves_codes(call.numerics):
        source = forward.left.restore(x, torch.Size((tokens, features)), call.dtype_in(forward))
    else:
        source = Operand(x[0].to(call.dtype) if from_codes else x[0])
    padding = -tokens % gemm_.multiple
    filled = F.pad(dy, (0, 0, 0, padding)) if padding else dy
    source = _filled(source, padding, call.dtype)
    rotation = call.rotation("wgrad", filled.shape[0])
    left = call.operand("wgrad.dy", filled, rotation, dim=-2, raw=dy)
    product = call.multiply(gemm_, left.t, call.again("wgrad.x", source, rotation, tokens))
    shape = (dy.shape[1], features)
    mask = None if w_mask is None else forward.right.bytes_of(w_mask, shape)
    turn = call.rotation("fprop", features)
    found = _to_operand(product, mask, w_slope, turn, from_codes, forward.right, weight_dtype)
    if call.observer is not None:
        call.observer.gradient(found[0])
    return found


def _scalar(scale: Tensor | None) -> Tensor | None:
    """A copy, since an operator's result must not be its argument."""
    return None if scale is None else scale.to(torch.float32, copy=True).view(())


LIBRARY = torch.library.Library("qtrain", "FRAGMENT")


def _described(argument: Any) -> Any:
    """A tensor by what decides the shapes of results."""
    if isinstance(argument, Tensor):
        return tuple(argument.shape), argument.dtype, argument.device.type
    return tuple(map(_described, argument)) if isinstance(argument, list) else argument


def _is_static(arguments: list[Any]) -> bool:
    """Whether no size is a symbol of torch.compile's."""
    tensors = [each for each in tree_leaves(arguments) if isinstance(each, Tensor)]
    return all(type(size) is int for each in tensors for size in each.shape)


def _define(function: Callable[..., list[Tensor]], arguments: str) -> Any:
    """torch.ops.qtrain.<name>, of a function whose first argument is a Call, which comes last in the operator's."""
    name = function.__name__.lstrip("_")
    schema = f"{name}({arguments}, Tensor keys, str numerics, ScalarType dtype, int observer) -> Tensor[]"
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def real(*given: Any) -> list[Tensor]:
        *own, keys, numerics, dtype, observer = given
        return function(Call(read_numerics(numerics), keys, dtype, _observers.get(observer)), *own)

    known: dict[Any, list[tuple[torch.Size, torch.dtype]]] = {}

    def fake(*given: Any) -> list[Tensor]:
        *own, keys, numerics, dtype, _ = given
        key = (numerics, dtype, *map(_described, own))
        found = known.get(key)
        if found is None:
            outputs = function(Call(read_numerics(numerics, "reference"), keys, dtype, None), *own)
            found = [(each.shape, each.dtype) for each in outputs]
            if _is_static(own):
                known[key] = found
        return [keys.new_empty(shape, dtype=kind) for shape, kind in found]

    LIBRARY.impl(name, real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qtrain::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.qtrain, name).default


quantize_weight = _define(_quantize_weight, "Tensor weight, Tensor? scale, bool packed")
fprop = _define(
    _fprop,
    "Tensor x, Tensor weight, Tensor? x_scale, Tensor? w_scale, Tensor[] kept, bool save_x, bool save_mask",
)
dgrad = _define(_dgrad, "Tensor dy, Tensor weight, Tensor[] w, Tensor? x_mask, Tensor? x_slope, ScalarType x_dtype")
wgrad = _define(_wgrad, "Tensor dy, Tensor[] x, Tensor? w_mask, Tensor? w_slope, int features, ScalarType weight_dtype")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """Saves only what the gradients that are asked for need."""
    x, weight, _, w_scale, kept, save_x, save_mask, keys, text, dtype, observer = inputs
    numerics = read_numerics(text)
    kind = numerics.kind(numerics.fprop, x.device.type)
    ctx.parts = saved_parts(numerics, kind, dtype, save_x, save_mask)
    ctx.shared, ctx.x_dtype, ctx.counts = (text, dtype, observer), x.dtype, (len(kept), len(ctx.parts))
    ctx.observer = _observers.get(observer)  # holds it
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        keys, weight, w_scale, x if save_x and not saves_codes(numerics) else None, *kept, *output[1:]
    )


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    keys, weight, w_scale, x, *rest = ctx.saved_tensors
    kept, parts = rest[: ctx.counts[0]], dict(zip(ctx.parts, rest[ctx.counts[0] :], strict=True))
    shared = keys, *ctx.shared
    numerics, dtype = read_numerics(ctx.shared[0]), ctx.shared[1]
    needs_x, needs_w, needs_x_scale, needs_w_scale = ctx.needs_input_grad[:4]
    dy, found = grads[0].contiguous(), [None] * 4
    w, names = kept, numerics.fprop.right.parts(_values_dtype(numerics, dy.device.type, dtype), bool(kept))
    from_codes = numerics.dgrad.right.spec.source == "forward" and numerics.fprop.right.plan is not None
    if not kept and (((needs_x or needs_x_scale) and from_codes) or (needs_w and "mask" in names) or needs_w_scale):
        w = quantize_weight(weight, w_scale, False, *shared[:-1], 0)  # which the forward has shown to the observer
    of_w = dict(zip((*names, "slope"), w, strict=False))
    if needs_x or needs_x_scale:
        slope = parts.get("slope") if needs_x_scale else None
        found[0:3:2] = _two(dgrad(dy, weight, w if from_codes else [], parts.get("mask"), slope, ctx.x_dtype, *shared))
    if needs_w or needs_w_scale:
        held = [x] if x is not None else [parts[name] for name in ("codes", "scales", "post_scale") if name in parts]
        given = of_w.get("mask"), of_w.get("slope") if needs_w_scale else None
        found[1:4:2] = _two(wgrad(dy, held, *given, weight.shape[1], weight.dtype, *shared))
    return *found, [None] * len(kept), *[None] * 6


def _two(found: list[Tensor]) -> list[Tensor | None]:
    """A gradient, and that of a learned scale, if there is one."""
    return [*found, None][:2]


def _values_dtype(numerics: Numerics, device_type: str, dtype: torch.dtype) -> torch.dtype:
    return torch.int8 if numerics.kind(numerics.fprop, device_type) == "int8" else dtype


torch.library.register_autograd("qtrain::fprop", _backward, setup_context=_setup, lib=LIBRARY)
