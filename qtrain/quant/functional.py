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
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, distributed
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from qtrain.quant.quantizer import Quantizer, rotate, unrotate
from qtrain.quant.random import USES, key_of
from qtrain.quant.rotation import hadamard
from qtrain.recipe import LinearRecipe
from qtrain.settings import Backend, GemmKind, Redraw
from qtrain_kernels import dispatch, qtensor
from qtrain_kernels.gemm import Product, resolve, reused
from qtrain_kernels.plans import Rotation
from qtrain_kernels.qtensor import Layout, QTensor, bytes_of, float_storage, inexact, unquantised

NO_SHAPE = (0, 0)
# Of what the operators' results look like: graphs that torch keeps on disk must not outlive it.
VERSION = blake2b(b"".join(Path(each).read_bytes() for each in (__file__, qtensor.__file__)), digest_size=4).hexdigest()
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
    operand: QTensor
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
    """The two operands of one GEMM; they share the rotation and its signs."""

    left: Quantizer
    right: Quantizer

    def rotation(self, key: Tensor, size: int) -> Rotation | None:
        """Of the contraction dim, which has this size."""
        spec = self.left.spec
        if spec.rotation_block is None:
            return None
        drawn = None if spec.signs == "none" else key
        return hadamard(spec.rotation_block or size, drawn, key.device, self.left.backend)

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
        return read_numerics(json.dumps([written, backend, gemm, VERSION]))

    def product(self, name: str, device_type: str, capability: tuple[int, int] | None = None) -> Product:
        """The row of the table by which one of the GEMMs is multiplied on a device; capability: of a CUDA device, None
        is the one that is there. ValueError where the rows that could do not run there."""
        return _product(self, name, device_type, capability)

    def lasts(self, gemm_: Gemm) -> bool:
        """Whether the weight's operand of fprop or dgrad is the same in every micro-batch of a step."""
        return self.redraw == "step" or not (gemm_.right.stochastic or gemm_.right.spec.signs == "step")

    @cached_property
    def keeps(self) -> bool:
        """Whether the weight of fprop can be kept for all micro-batches of a step: it is the same in each, no learned
        scale moves it, and its codes take fewer bits than its values."""
        quantizer = self.fprop.right
        if quantizer.plan is None or quantizer.learned or not self.lasts(self.fprop):
            return False
        return quantizer.layout(NO_SHAPE, blocks=True).saved.packed

    def runs_on(self, device_type: str) -> str:
        """compiled on cpu, gemms int8 float float: what quantises on a device, and how fprop, dgrad, wgrad multiply."""
        if device_type == "meta":
            return "on no device yet"
        try:
            backend = dispatch.resolve(self.fprop.left.backend, device_type)
            products = " ".join(self.product(name, device_type).name for name in OPERANDS)
            return f"{backend} on {device_type}, gemms {products}"
        except ValueError as error:
            return str(error)

    def __hash__(self) -> int:
        return hash(self.text)

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
    written, own, kind, _ = json.loads(text)
    recipe = LinearRecipe.model_validate(written)
    gemms = {
        name: Gemm(*(Quantizer.build(spec, backend or own) for spec in operands.values()))
        for name, operands in recipe.operands().items()
    }
    return Numerics(**gemms, gemm=kind, redraw=recipe.redraw, text=text)


@cache
def _product(numerics: Numerics, name: str, device_type: str, capability: tuple[int, int] | None) -> Product:
    gemm, fprop = getattr(numerics, name), numerics.fprop
    if device_type == "cuda" and capability is None:
        capability = torch.cuda.get_device_capability()
    left, right = gemm.left.layout(NO_SHAPE, -1), gemm.right.layout(NO_SHAPE, -2)
    if name != "fprop" and gemm.right.reuses:
        forward = (fprop.right if name == "dgrad" else fprop.left).layout(NO_SHAPE)
        right = reused(
            forward, numerics.product("fprop", device_type, capability), -2, name == "wgrad" or gemm.left.multiple > 1
        )
    return resolve(numerics.gemm, left, right, device_type, capability)


_own: dict[str, Numerics] = {}


def text_of_own(numerics: Numerics) -> str:
    """A text for numerics that no recipe says; known in this process alone."""
    text = f"own {len(_own)}"
    _own[text] = replace(numerics, text=text)
    return text


# ------------------------------------------------------------------------------------------------------- the arithmetic


@dataclass(frozen=True)
class Call:
    """One call of an operator: what its three GEMMs share. keys: (9, 2) int32 in the order of USES, on the device;
    dtype: the compute dtype, bfloat16 or float32."""

    numerics: Numerics
    keys: Tensor
    dtype: torch.dtype
    observer: Observer | None

    def product(self, name: str) -> Product:
        return self.numerics.product(name, self.keys.device.type)

    def rotation(self, name: str, size: int) -> Rotation | None:
        """Of one of the GEMMs."""
        return getattr(self.numerics, name).rotation(key_of(self.keys, f"{name}.signs"), size)

    def layout(self, use: str, shape: tuple[int, int], dim: int, blocks: bool = False) -> Layout:
        """In which an operand is quantised: as its product takes it, or in floats where that is made of floats. blocks:
        with block scales beside the floats."""
        quantizer, product = self.numerics.operands[use], self.product(use.partition(".")[0])
        if product.storage == "int8":
            return quantizer.layout(shape, dim, "int8")
        floats = float_storage(quantizer.plan, self.dtype)
        return quantizer.layout(shape, dim, floats, blocks or product.storage != "float")

    def operand(
        self,
        use: str,
        x: Tensor,
        rotation: Rotation | None,
        dim: int = -1,
        learned: Tensor | None = None,
        blocks: bool = False,
        raw: Tensor | None = None,
    ) -> QTensor:
        """x as the operand `use` (fprop.x) of its GEMM, along dim, drawn with that use's key; learned: () a scale;
        blocks: with its block scales, of which packed codes are made; raw: as in `Observed`."""
        quantizer, observer = self.numerics.operands[use], self.observer
        layout = self.layout(use, (x.shape[0], x.shape[1]), dim, blocks or observer is not None)
        operand = quantizer.operand(x, layout, rotation, key_of(self.keys, use), learned)
        if observer is not None and quantizer.plan is not None:
            storage = self.product(use.partition(".")[0]).storage
            rounded = inexact(operand, storage) / x.numel() if storage in ("float8", "float8_128") else None
            observer.operand(Observed(use, quantizer, x, rotation, dim, operand, raw, rounded))
        return operand

    def again(self, use: str, source: QTensor, rotation: Rotation | None, padding: int) -> QTensor:
        """An operand of the backward, along dim -2, from a master or forward value, and so many rows of zeros below it.
        A forward value that is neither rotated nor quantised again keeps its codes, and its tensor scale beside them; a
        scale per row lies along the contraction and is multiplied in."""
        name = use.partition(".")[0]
        if self.numerics.operands[use].reuses and (source.tensor_scale is None or not source.tensor_scale.ndim):
            if self.product(name).storage != "int8":
                source = source.unmasked.to(
                    float_storage(source.layout.plan, self.dtype), self.numerics.fprop.left.backend
                )
            return source.along(-2).filled(padding)
        x = source.dequantize(self.numerics.fprop.left.backend)
        filled = F.pad(x, (0, 0, 0, padding)) if padding else x
        return self.operand(use, filled, rotation, dim=-2, raw=x)

    def multiply(self, name: str, left: QTensor, right: QTensor) -> Tensor:
        """left @ right as one of the GEMMs is multiplied."""
        return self.product(name).multiply(left, right, self.dtype, self.numerics.fprop.left.backend)


def _to_operand(
    grad: Tensor, mask: Tensor | None, slope: Tensor | None, rotation: Rotation | None, rotated: bool,
    quantizer: Quantizer, dtype: torch.dtype, ranks: int = 1,
) -> list[Tensor]:  # fmt: skip
    """A gradient by the operand as quantised (rotated: it is in rotated space) -> by the operand itself in dtype, and
    by its learned scale, (1,) float32, where there is one. mask: bits. ranks: that share the operand's rows."""
    if mask is None and slope is None and not rotated:
        return [grad.to(dtype)]
    if not rotated:
        grad = rotate(grad, rotation, quantizer.backend)
    passes = None if mask is None else bytes_of(mask, grad.shape, quantizer.backend)
    found = [unrotate(grad, rotation, quantizer.backend, mask=passes, dtype=dtype)]
    if slope is not None:
        found.append((grad.float() * slope).sum().view(1) * _scale_gradient_factor(ranks * slope.numel(), quantizer))
    return found


def _scale_slope(x: Tensor, rotation: Rotation | None, operand: QTensor, scale: Tensor, quantizer: Quantizer) -> Tensor:
    """d(codes * scale) / d scale by the straight-through estimator (LSQ, arXiv 1902.08153), (M, N) float32: codes - x /
    scale inside the grid, the last code beyond it."""
    assert quantizer.plan is not None
    u = rotate(x, rotation, quantizer.backend) / torch.where(scale == 0, 1.0, scale.float())
    codes = operand.codes.float()
    return torch.where(u.abs() > quantizer.plan.element.max, codes, codes - u)


def _scale_gradient_factor(elements: int, quantizer: Quantizer) -> float:
    """LSQ's 1 / sqrt(elements * q_max), q_max the largest code of the grid with zero; 1 at one bit, where that is
    none."""
    assert quantizer.plan is not None
    return (elements * max(math.floor(quantizer.plan.element.max), 1)) ** -0.5


# -------------------------------------------------------------------------------------------------------- the operators
#
# A quantised operand travels as the tensors of a QTensor. A weight's are followed by its slope (`_scale_slope`) where
# its scale is learned. Arguments that all four share come last: keys, numerics, dtype, observer.

Held = list[Tensor]


def _quantize_weight(call: Call, weight: Tensor, scale: Tensor | None, packed: bool) -> Held:
    """weight (N, K) master -> as fprop takes it; packed: in the bits of its format, where it has such."""
    operand, slope = _weight(call, weight, scale, [], blocks=packed)
    if packed:
        operand = operand.to(operand.layout.saved, call.numerics.fprop.right.backend)
    return operand.tensors() if slope is None else [*operand.tensors(), slope]


def _weight(
    call: Call, weight: Tensor, scale: Tensor | None, kept: Held, blocks: bool = False
) -> tuple[QTensor, Tensor | None]:
    """The operand fprop.w and its slope: as kept, or else quantised here."""
    quantizer = call.numerics.fprop.right
    if kept:
        packed = kept[0].dtype == torch.uint8
        layout = call.layout("fprop.w", (weight.shape[0], weight.shape[1]), -1, packed)
        layout = layout.saved if packed else layout
        return QTensor.of(layout, kept[: len(layout.shapes())]), None if scale is None else kept[-1]
    rotation = call.rotation("fprop", weight.shape[1])
    operand = call.operand("fprop.w", weight, rotation, learned=_scalar(scale), blocks=blocks)
    return operand, None if scale is None else _scale_slope(weight, rotation, operand, scale, quantizer)


def _fprop(
    call: Call,
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    kept: Held,
    save_x: bool,
    save_mask: bool,
) -> list[Tensor]:
    """x (T, K), weight (N, K) master, both scales (1,) learned ones, kept: of quantize_weight, or nothing -> y (T, N)
    in dtype; then, of x, the tensors of its codes (with save_x, if it `saves_codes`), and the bits of its mask and the
    slope of its learned scale (with save_mask, if it has them)."""
    quantizer, rotation = call.numerics.fprop.left, call.rotation("fprop", x.shape[1])
    codes = save_x and saves_codes(call.numerics)
    w, _ = _weight(call, weight, w_scale, kept)
    xq = call.operand("fprop.x", x, rotation, learned=_scalar(x_scale), blocks=codes)
    found = [call.multiply("fprop", xq, w.t).to(call.dtype)]
    if codes:
        found += xq.unmasked.to(xq.layout.unmasked.saved, quantizer.backend).tensors()
    if save_mask and xq.mask is not None:
        found.append(xq.mask)
    if save_mask and x_scale is not None:
        found.append(_scale_slope(x, rotation, xq, x_scale, quantizer))
    return found


def saves_codes(numerics: Numerics) -> bool:
    """Whether wgrad takes x as fprop has quantised or rotated it, and not x itself."""
    forward = numerics.fprop.left
    return numerics.wgrad.right.spec.source == "forward" and (forward.plan is not None or forward.rotates)


def _dgrad(
    call: Call,
    dy: Tensor,
    weight: Tensor,
    w: Held,
    x_mask: Tensor | None,
    x_slope: Tensor | None,
    x_dtype: torch.dtype,
) -> list[Tensor]:
    """dy (T, N), weight (N, K) master, w: of quantize_weight, where its codes are multiplied; x_mask: bits, x_slope (T,
    K) -> dX (T, K) in x_dtype, and the gradient of a learned scale, (1,). Both operands are quantised along N, filled
    with zeros to whole blocks."""
    gemm_, forward = call.numerics.dgrad, call.numerics.fprop
    (tokens, features), block = dy.shape, gemm_.left.spec.row_rotation_block
    padding, backend = -features % gemm_.multiple, gemm_.left.backend
    from_codes = gemm_.right.spec.source == "forward"
    source = _weight(call, weight, None, w)[0] if from_codes else unquantised(weight)
    rotation = call.rotation("dgrad", features + padding)
    right = call.again("dgrad.w", source, rotation, padding)
    rows = None if block is None else hadamard(block, None, dy.device)
    turned = F.pad(dy, (0, padding)) if padding else dy
    if rows is not None:
        turned = rotate(F.pad(turned, (0, 0, 0, -tokens % rows.size)), rows, backend, dim=-2)
    product = call.multiply("dgrad", call.operand("dgrad.dy", turned, rotation, raw=dy), right)
    if rows is not None:
        product = unrotate(product, rows, backend, dim=-2)[:tokens]
    ranks = distributed.get_world_size() if x_slope is not None and distributed.is_initialized() else 1
    turn = call.rotation("fprop", weight.shape[1])
    return _to_operand(product, x_mask, x_slope, turn, from_codes, forward.left, x_dtype, ranks)


def _wgrad(
    call: Call,
    dy: Tensor,
    x: Held,
    w_mask: Tensor | None,
    w_slope: Tensor | None,
    features: int,
    weight_dtype: torch.dtype,
) -> list[Tensor]:
    """dy (T, N), x: the input (T, K) itself, or what fprop saved of its codes; w_mask: bits, w_slope (N, K) -> dW
    (N, K) in weight_dtype, K = features, and the gradient of a learned scale, (1,). Both operands are quantised along
    T, filled with zeros to whole blocks. Zeros do not change the product, unless neither operand can represent zero and
    neither is rotated; no shipped recipe does that."""
    gemm_, forward = call.numerics.wgrad, call.numerics.fprop
    tokens, from_codes = dy.shape[0], gemm_.right.spec.source == "forward"
    if saves_codes(call.numerics):
        layout = call.layout("fprop.x", (tokens, features), -1, blocks=True).unmasked.saved
        source = QTensor.of(layout, x)
    else:
        source = unquantised(x[0].to(call.dtype) if from_codes else x[0])
    padding = -tokens % gemm_.multiple
    filled = F.pad(dy, (0, 0, 0, padding)) if padding else dy
    rotation = call.rotation("wgrad", tokens + padding)
    left = call.operand("wgrad.dy", filled, rotation, dim=-2, raw=dy)
    product = call.multiply("wgrad", left.t, call.again("wgrad.x", source, rotation, padding))
    turn = call.rotation("fprop", features)
    found = _to_operand(product, w_mask, w_slope, turn, from_codes, forward.right, weight_dtype)
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


Outputs = list[tuple[tuple[int, ...], torch.dtype]]


def _gradients(shape: tuple[int, int], dtype: torch.dtype, slope: Tensor | None) -> Outputs:
    """Shapes and dtypes of a gradient and of that of a learned scale, if there is one."""
    return [(shape, dtype)] if slope is None else [(shape, dtype), ((1,), torch.float32)]


def _define(
    function: Callable[..., list[Tensor]], arguments: str, outputs: Callable[..., Outputs] | None = None
) -> Any:
    """torch.ops.qtrain.<name>, of a function whose first argument is a Call, which comes last in the operator's.
    outputs: gives shapes and dtypes of the results; without it they are those of the function on fake tensors, which
    takes minutes for a backward pass whose number of tokens is a symbol of torch.compile's."""
    name = function.__name__.lstrip("_")
    schema = f"{name}({arguments}, Tensor keys, str numerics, ScalarType dtype, int observer) -> Tensor[]"
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def real(*given: Any) -> list[Tensor]:
        *own, keys, numerics, dtype, observer = given
        return function(Call(read_numerics(numerics), keys, dtype, _observers.get(observer)), *own)

    known: dict[Any, Outputs] = {}

    def fake(*given: Any) -> list[Tensor]:
        *own, keys, numerics, dtype, _ = given
        key = (numerics, dtype, *map(_described, own)) if _is_static(own) else None
        found = outputs(*own) if outputs is not None else known.get(key)
        if found is None:
            results = function(Call(read_numerics(numerics, "reference"), keys, dtype, None), *own)
            found = [(tuple(each.shape), each.dtype) for each in results]
            if key is not None:
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
dgrad = _define(
    _dgrad,
    "Tensor dy, Tensor weight, Tensor[] w, Tensor? x_mask, Tensor? x_slope, ScalarType x_dtype",
    lambda dy, weight, w, mask, slope, dtype: _gradients((dy.shape[0], weight.shape[1]), dtype, slope),
)
wgrad = _define(
    _wgrad,
    "Tensor dy, Tensor[] x, Tensor? w_mask, Tensor? w_slope, int features, ScalarType weight_dtype",
    lambda dy, x, mask, slope, features, dtype: _gradients((dy.shape[1], features), dtype, slope),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """Saves only what the gradients that are asked for need."""
    x, weight, _, w_scale, kept, save_x, save_mask, keys, text, dtype, observer = inputs
    ctx.shared, ctx.x_dtype, ctx.held = (text, dtype, observer), x.dtype, (len(kept), save_mask)
    ctx.observer = _observers.get(observer)  # holds it
    ctx.set_materialize_grads(False)
    own = x if save_x and not saves_codes(read_numerics(text)) else None
    ctx.save_for_backward(keys, weight, w_scale, own, *kept, *output[1:])


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    keys, weight, w_scale, x, *rest = ctx.saved_tensors
    count, save_mask = ctx.held
    kept, saved = rest[:count], rest[count:]
    shared, numerics = (keys, *ctx.shared), read_numerics(ctx.shared[0])
    forward = numerics.fprop
    needs_x, needs_w, needs_x_scale, needs_w_scale = ctx.needs_input_grad[:4]
    x_slope = saved.pop() if save_mask and forward.left.learned else None
    x_mask = saved.pop() if save_mask and forward.left.masks else None
    dy, w, w_mask, w_slope = grads[0].contiguous(), kept, None, None
    dx, dw, dx_scale, dw_scale = (None,) * 4
    from_codes = numerics.dgrad.right.spec.source == "forward" and forward.right.plan is not None
    needed = ((needs_x or needs_x_scale) and from_codes) or (needs_w and forward.right.masks) or needs_w_scale
    if not kept and needed:
        w = quantize_weight(weight, w_scale, False, *shared[:-1], 0)  # which the forward has shown to the observer
    if w:
        w_slope = w[-1] if forward.right.learned else None
        w_mask = w[-1 - forward.right.learned] if forward.right.masks else None
    if needs_x or needs_x_scale:
        slope = x_slope if needs_x_scale else None
        dx, dx_scale = _two(dgrad(dy, weight, w if from_codes else [], x_mask, slope, ctx.x_dtype, *shared))
    if needs_w or needs_w_scale:
        slope = w_slope if needs_w_scale else None
        held = saved if x is None else [x]
        dw, dw_scale = _two(wgrad(dy, held, w_mask, slope, weight.shape[1], weight.dtype, *shared))
    return dx, dw, dx_scale, dw_scale, [None] * len(kept), *[None] * 6


def _two(found: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """A gradient, and that of a learned scale, if there is one."""
    return found[0], found[1] if len(found) == 2 else None


torch.library.register_autograd("qtrain::fprop", _backward, setup_context=_setup, lib=LIBRARY)
