"""The quantised linear layer as five operators of torch: quantize_weight, fprop, quantize_grad, dgrad and wgrad.

# T tokens (all leading dims), K in features, N out features; H the block Hadamard, D random signs, Q a quantiser.
    fprop  Y  = Q(X D H) Q(W D H)^T                          contraction over K
    dgrad  dX = (Q(dY D' H) Q(W' D' H)  * mask_X) (D H)^-1   contraction over N
    wgrad  dW = (Q(dY^T D" H) Q(X' D" H) * mask_W) (D H)^-1  contraction over T
X', W': the master values, or the rotated and quantised ones of the forward, whose gradients leave the rotation by its
inverse. Masks are the forward's estimators. Weights are quantised from the float32 master. N (in dgrad) and T (in
wgrad) are filled with zeros to whole blocks.

Each operator is a pure function of its arguments: tensors, keys of its random bits, and the layer's numerics as text.
torch.compile, export, checkpointing, saved-tensor hooks and FSDP see one node for each.

The backward keeps no quantised weight: it quantises the weight again, with the same keys and hence the same bits,
unless the caller passes one that it keeps itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from qtrain.config.recipe import LinearRecipe
from qtrain.config.settings import Backend, GemmKind, Redraw
from qtrain.errors import UserError
from qtrain.quant.quantizer import Quantizer, rotate, unrotate
from qtrain.quant.random import USES
from qtrain.quant.rotation import base, hadamard
from qtrain_kernels import dispatch, qtensor, reference
from qtrain_kernels.gemm import Product, resolve, reused, scaled
from qtrain_kernels.plans import Rotation
from qtrain_kernels.qtensor import Layout, QTensor, Side, float_storage, inexact, unquantised

NO_SHAPE = (0, 0)
# Of what the operators' results look like: graphs that torch keeps on disk must not outlive it.
VERSION = blake2b(b"".join(Path(each).read_bytes() for each in (__file__, qtensor.__file__)), digest_size=4).hexdigest()
ROWS = {use: row for row, use in enumerate(USES)}  # of a layer's table of keys
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

    @cached_property
    def quantizes(self) -> bool:
        """Whether the left operand is more than x in the compute dtype: quantised or rotated."""
        return self.left.plan is not None or self.left.rotates or self.rows_block is not None

    @cached_property
    def rows_block(self) -> int | None:
        """Of the rotation of the left operand's rows, which leaves the product again (HALO-2)."""
        return self.left.spec.row_rotation_block

    @cached_property
    def multiple(self) -> int:
        return math.lcm(self.left.multiple, self.right.multiple)


@dataclass(frozen=True, eq=False)
class Numerics:
    """A recipe's three GEMMs, resolved for one backend. There is one object of each text."""

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
        return self.redraw == "step" or not (gemm_.right.draws or gemm_.right.spec.signs == "step")

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

    @cached_property
    def backend(self) -> Backend:
        return self.fprop.left.backend

    @cached_property
    def save_codes(self) -> bool:
        """Whether wgrad takes x as fprop has quantised or rotated it, and not x itself."""
        forward = self.fprop.left
        return self.wgrad.right.spec.source == "forward" and (forward.plan is not None or forward.rotates)

    @cached_property
    def operands(self) -> dict[str, Quantizer]:
        """fprop.x -> its quantiser, and so on."""
        sides = {name: (getattr(self, name).left, getattr(self, name).right) for name in OPERANDS}
        return {f"{name}.{OPERANDS[name][side]}": sides[name][side] for name in OPERANDS for side in (0, 1)}

    @cached_property
    def uses(self) -> tuple[str, ...]:
        """What it draws random bits for, of `USES`; other than the signs of all layers and steps."""
        drawn = {name for name, quantizer in self.operands.items() if quantizer.draws}
        drawn |= {f"{name}.signs" for name in OPERANDS if getattr(self, name).left.spec.signs == "step"}
        return tuple(use for use in USES if use in drawn)

    @property
    def stochastic(self) -> bool:
        return bool(self.uses)

    @property
    def learns(self) -> bool:
        """Whether a scale of its forward is a parameter."""
        return self.fprop.left.learned or self.fprop.right.learned

    @cached_property
    def recipe(self) -> LinearRecipe:
        """That they are built of, without its source and what belongs to a whole model."""
        return LinearRecipe.model_validate(json.loads(self.text)[0])

    @property
    def formats(self) -> str:
        """fprop int4 x int4, dgrad none x none, ...: of the operands, where one takes the forward's codes those."""
        named = {name: quantizer.spec.format or "none" for name, quantizer in self.operands.items()}
        for name, quantizer in self.operands.items():
            if quantizer.spec.source == "forward" and not quantizer.spec.quantised:
                named[name] = named[f"fprop.{name[-1]}"]
        gemms = {name: [named[each] for each in named if each.startswith(name)] for name in OPERANDS}
        return ", ".join(f"{name} {' x '.join(pair)}" for name, pair in gemms.items())

    def __str__(self) -> str:
        texts = {"fprop": [], "dgrad": [], "wgrad": []}
        for name, quantizer in self.operands.items():
            gemm_name, operand = name.split(".")
            texts[gemm_name].append(f"{operand}:{quantizer}")
        return f"fwd {' '.join(texts['fprop'])} dgrad {' '.join(texts['dgrad'])} wgrad {' '.join(texts['wgrad'])}"


@cache
def read_numerics(text: str) -> Numerics:
    """The Numerics of their text."""
    if text in _own:
        return _own[text]
    written, backend, kind, _ = json.loads(text)
    recipe = LinearRecipe.model_validate(written)
    gemms = {
        name: Gemm(*(Quantizer.build(spec, backend) for spec in operands.values()))
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


@dataclass(frozen=True, eq=False)
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
        """Of the contraction, which has this size, of one of the GEMMs."""
        quantizer = getattr(self.numerics, name).left
        if quantizer.rotation_block is None:
            return None
        drawn = None if quantizer.spec.signs == "none" else self.keys[ROWS[f"{name}.signs"]]
        size = quantizer.rotation_block or size
        return Rotation(size, drawn, base(size, self.keys.device))

    def layout(self, use: str, shape: Sequence[int], dim: int) -> Layout:
        """In which an operand is quantised: as its product takes it, if that changes no code, or else in floats."""
        sizes = shape[0], shape[1]
        made = _layout if type(sizes[0]) is type(sizes[1]) is int else _layout.__wrapped__  # symbols have no hash
        return made(self.numerics.operands[use], self.product(use[:5]), sizes, dim, self.dtype)

    def side(
        self, use: str, x: Tensor | QTensor, rotation: Rotation | None, dim: int, learned: Tensor | None = None,
        layout: Layout | None = None, packed: bool = False,
    ) -> Side:  # fmt: skip
        """As of `operand`."""
        key = self.keys[ROWS[use]] if self.numerics.operands[use].draws else None
        return Side(layout or self.layout(use, x.shape, dim), rotation, key, learned, packed)

    def operand(
        self,
        use: str,
        x: Tensor | QTensor,
        rotation: Rotation | None,
        dim: int = -1,
        learned: Tensor | None = None,
        layout: Layout | None = None,
        packed: bool = False,
        raw: Tensor | None = None,
    ) -> tuple[QTensor, QTensor | None]:
        """x as the operand `use` (fprop.x) of its GEMM along dim, drawn with that use's key, in its own layout or the
        one given; with packed, also in the storage of the fewest bits. learned: of `given_scale`; raw: as in
        `Observed`."""
        quantizer = self.numerics.operands[use]
        side = self.side(use, x, rotation, dim, learned, layout, packed)
        if self.observer is not None and quantizer.plan is not None:
            values = x.dequantize(quantizer.backend) if isinstance(x, QTensor) else x
            self._show(self.observer, use, values, side, raw)
        return qtensor.quantize_side(x, side, quantizer.backend)

    def _show(self, observer: Observer, use: str, x: Tensor, side: Side, raw: Tensor | None) -> None:
        """Quantises once more, in floats beside their block scales, which the observer looks at."""
        quantizer, dim, storage = self.numerics.operands[use], side.layout.dim, self.product(use[:5]).storage
        held = "int8" if storage == "int8" else float_storage(quantizer.plan, self.dtype)
        layout = quantizer.layout(side.layout.shape, dim, held, blocks=True)
        operand = quantizer.operand(x, layout, side.rotation, side.key, side.learned)
        rounded = inexact(operand, storage) / x.numel() if storage in ("float8", "float8_128") else None
        observer.operand(Observed(use, quantizer, x, side.rotation, dim, operand, raw, rounded))

    def again(self, use: str, source: QTensor, rotation: Rotation | None, padding: int) -> QTensor:
        """An operand of the backward, along dim -2, from a master or forward value, and so many rows of zeros below it.
        A forward value that is neither rotated nor quantised again keeps its codes, and its tensor scale beside them; a
        scale per row lies along the contraction and is multiplied in."""
        backend = self.numerics.backend
        if self.numerics.operands[use].reuses and (source.tensor_scale is None or not source.tensor_scale.ndim):
            if self.product(use[:5]).storage != "int8":
                source = source.unmasked.to(float_storage(source.layout.plan, self.dtype), backend)
            return source.along(-2).filled(padding)
        if not padding:
            return self.operand(use, source, rotation, dim=-2)[0]
        x = source.dequantize(backend)
        return self.operand(use, F.pad(x, (0, 0, 0, padding)), rotation, dim=-2, raw=x)[0]

    def weight(self, weight: Tensor, scale: Tensor | None, held: Held) -> QTensor:
        """The operand fprop.w: of what quantize_weight gave, or else quantised here."""
        if held:
            layout = self.weight_layout(weight, held[0].dtype == torch.uint8)
            return QTensor.of(layout, held[: len(layout.shapes())])
        rotation = self.rotation("fprop", weight.shape[1])
        return self.operand("fprop.w", weight, rotation, learned=given_scale(scale))[0]

    def weight_layout(self, weight: Tensor, packed: bool) -> Layout:
        """Of quantize_weight's result, which any product can be made of."""
        quantizer, integers = self.numerics.fprop.right, self.product("fprop").storage == "int8"
        storage = "int8" if integers else float_storage(quantizer.plan, self.dtype)
        layout = quantizer.layout((weight.shape[0], weight.shape[1]), -1, storage)
        return layout.saved if packed else layout

    def gradient(self, use: str, dy: Held, shape: tuple[int, int], dim: int, padding: Sequence[int]) -> QTensor:
        """dY as its GEMM takes it, (M, N): of what quantize_grad gave, or dY itself, filled with zeros."""
        if getattr(self.numerics, use[:5]).quantizes:
            return QTensor.of(self.layout(use, shape, dim), dy)
        return unquantised(_filled(dy[0], padding).to(self.dtype))

    def multiply(
        self, name: str, left: QTensor, right: QTensor, dtype: torch.dtype, rotation: Rotation | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """left @ right as one of the GEMMs is multiplied, masked (by bits) and out of the rotation of its rows."""
        backend = self.numerics.backend
        product, scales = self.product(name).unscaled(left, right, self.dtype, backend)
        module = dispatch.module(backend, product.device.type, rotation=rotation)
        if rotation is None and mask is None and not (scales and module.FUSED):
            return scaled(product, scales).to(dtype)
        lines = [scale[..., None] if isinstance(scale, Tensor) and scale.ndim else scale for scale in scales]
        return module.unrotate(product[..., None], rotation, mask, dtype, lines).view(product.shape)


@lru_cache(4096)
def _layout(quantizer: Quantizer, product: Product, shape: tuple[int, int], dim: int, dtype: torch.dtype) -> Layout:
    plain = quantizer.layout(shape, dim)
    wanted = product.wants(plain, dtype)
    if (wanted.plan, wanted.rows) == (plain.plan, plain.rows):
        return wanted
    return quantizer.layout(shape, dim, float_storage(plain.plan, dtype), blocks=True)


def _filled(x: Tensor, padding: Sequence[int]) -> Tensor:
    """x with so many zeros as F.pad takes them."""
    return F.pad(x, padding) if any(padding) else x


def _to_operand(
    call: Call, name: str, left: QTensor, right: QTensor, mask: Tensor | None, slope: Tensor | None, rotated: bool,
    dtype: torch.dtype, ranks: int = 1, rows: Rotation | None = None, tokens: int | None = None,
) -> list[Tensor]:  # fmt: skip
    """left @ right as dgrad or wgrad, a gradient by the operand as quantised (rotated: it is in rotated space) -> by
    the operand itself in dtype, and by its learned scale, float32, where there is one. mask: bits. ranks: that
    share the operand's rows. rows: the rotation of the product's rows, whose first `tokens` are the operand's."""
    side = call.numerics.fprop.left if name == "dgrad" else call.numerics.fprop.right
    rotation, backend = call.rotation("fprop", right.shape[1]), side.backend
    if rows is None and slope is None and (rotated or mask is None):
        return [call.multiply(name, left, right, dtype, rotation if rotated else None, mask)]
    grad = call.multiply(name, left, right, torch.float32)
    if rows is not None:
        grad = unrotate(grad, rows, backend, dim=-2)[:tokens]
    if mask is None and slope is None and not rotated:
        return [grad.to(dtype)]
    if not rotated:
        grad = rotate(grad, rotation, backend)
    found = [unrotate(grad, rotation, backend, mask=mask, dtype=dtype)]
    if slope is not None:
        each, shape = grad * slope, side.learned_shape(*slope.shape)
        sums = each.sum().view(1) if shape == (1,) else each.view(*shape, -1).sum(-1)
        found.append(sums * _scale_gradient_factor(ranks * slope.numel() // sums.numel(), side))
    return found


def _scale_slope(x: Tensor, rotation: Rotation | None, operand: QTensor, scale: Tensor, quantizer: Quantizer) -> Tensor:
    """d(codes * scale) / d scale by the straight-through estimator (LSQ, arXiv 1902.08153), (M, N) float32: codes - x /
    scale inside the grid, the last code beyond it. scale: (1,), (M, 1) or (M, G)."""
    assert quantizer.plan is not None
    each = scale if scale.ndim == 1 else scale.repeat_interleave(x.shape[1] // scale.shape[1], 1)
    each = torch.where(each == 0, 1.0, each.float())
    u = rotate(x, rotation, quantizer.backend) / each
    codes = operand.codes.float()
    if quantizer.plan.block is not None:  # multiplied by their scales
        codes = codes / each
    return torch.where(u.abs() > quantizer.plan.element.max, codes, codes - u)


def _scale_gradient_factor(elements: int, quantizer: Quantizer) -> float:
    """LSQ's 1 / sqrt(elements * q_max). elements: under one scale. q_max: the largest code of the grid with zero; 1 at
    one bit, where that is none."""
    assert quantizer.plan is not None
    return (elements * max(math.floor(quantizer.plan.element.max), 1)) ** -0.5


# -------------------------------------------------------------------------------------------------------- the operators
#
# A quantised operand travels as the tensors of a QTensor. A weight's are followed by its slope (`_scale_slope`) where
# its scale is learned. Arguments that all share come last: keys, numerics, dtype, observer.

Held = list[Tensor]


def _quantize_weight(call: Call, weight: Tensor, scale: Tensor | None, packed: bool) -> Held:
    """weight (N, K) master -> quantised for fprop; packed: in the bits of its format, where it has such."""
    rotation, layout = call.rotation("fprop", weight.shape[1]), call.weight_layout(weight, packed)
    operand, _ = call.operand("fprop.w", weight, rotation, learned=given_scale(scale), layout=layout)
    if scale is None:
        return operand.tensors()
    return [*operand.tensors(), _scale_slope(weight, rotation, operand, scale, call.numerics.fprop.right)]


def _fprop(
    call: Call,
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    kept: Held,
    save_x: bool,
    save_mask: bool,
    rows: Tensor | None = None,
) -> list[Tensor]:
    """x (T, K), weight (N, K) master, learned scales x_scale (1,) and w_scale of `Quantizer.learned_shape`, kept: of
    quantize_weight, or nothing -> y (T, N) in dtype; then, of x, the tensors of its codes (with save_x, if the
    numerics `save_codes`), and the bits of its mask and the slope of its learned scale (with save_mask, if it has
    them). rows: see `_Layer`."""
    rotation = call.rotation("fprop", x.shape[1])
    w = call.weight(weight, w_scale, kept)
    xq, codes = call.operand(
        "fprop.x",
        x,
        rotation,
        learned=given_scale(x_scale),
        packed=save_x and call.numerics.save_codes,
    )
    found = [call.multiply("fprop", xq, w.t, call.dtype), *(() if codes is None else codes.tensors())]
    if save_mask and xq.mask is not None:
        found.append(xq.mask)
    if save_mask and x_scale is not None:
        found.append(_scale_slope(x, rotation, xq, x_scale, call.numerics.fprop.left))
    return found


def _quantize_grad(call: Call, dy: Tensor, for_x: bool, for_w: bool) -> Held:
    """dy (T, N) -> the tensors of dgrad's operand (for_x, if dgrad `quantizes`), then of wgrad's (for_w). Along N and T
    they are filled with zeros to whole blocks."""
    dgrad, wgrad, (tokens, features) = call.numerics.dgrad, call.numerics.wgrad, dy.shape
    uses: list[tuple[str, Tensor, int]] = []
    if for_x and dgrad.quantizes:
        below = 0 if dgrad.rows_block is None else -tokens % dgrad.rows_block
        turned = _filled(dy, (0, -features % dgrad.multiple, 0, below))
        if dgrad.rows_block is not None:
            turned = rotate(turned, hadamard(dgrad.rows_block, None, dy.device), call.numerics.backend, dim=-2)
        uses.append(("dgrad", turned, -1))
    if for_w and wgrad.quantizes:
        uses.append(("wgrad", _filled(dy, (0, 0, 0, -tokens % wgrad.multiple)), -2))
    rotations = [call.rotation(name, x.shape[dim]) for name, x, dim in uses]
    if len(uses) == 2 and uses[0][1] is uses[1][1] is dy and call.observer is None:
        sides = [
            call.side(f"{name}.dy", x, rotation, dim) for (name, x, dim), rotation in zip(uses, rotations, strict=True)
        ]
        found = qtensor.quantize_both(dy, sides[0], sides[1], call.numerics.backend)
    else:
        found = [
            call.operand(f"{name}.dy", x, rotation, dim, raw=dy)[0]
            for (name, x, dim), rotation in zip(uses, rotations, strict=True)
        ]
    return [tensor for operand in found for tensor in operand.tensors()]


def _dgrad(
    call: Call,
    dy: Held,
    weight: Tensor,
    w: Held,
    x_mask: Tensor | None,
    x_slope: Tensor | None,
    tokens: int,
    x_dtype: torch.dtype,
) -> list[Tensor]:
    """dy: dY (T, N) itself, or of quantize_grad, T = tokens; weight (N, K) master, w: of quantize_weight, where its
    codes are multiplied; x_mask: bits, x_slope (T, K) -> dX (T, K) in x_dtype, and the gradient of a learned scale,
    (1,)."""
    gemm = call.numerics.dgrad
    padding, below = -weight.shape[0] % gemm.multiple, -tokens % (gemm.rows_block or 1)
    from_codes = gemm.right.spec.source == "forward"
    source = call.weight(weight, None, w) if from_codes else unquantised(weight)
    rotation = call.rotation("dgrad", weight.shape[0] + padding)
    right = call.again("dgrad.w", source, rotation, padding)
    left = call.gradient("dgrad.dy", dy, (tokens + below, weight.shape[0] + padding), -1, (0, padding))
    ranks = distributed.get_world_size() if x_slope is not None and distributed.is_initialized() else 1
    rows = None if gemm.rows_block is None else hadamard(gemm.rows_block, None, weight.device)
    return _to_operand(call, "dgrad", left, right, x_mask, x_slope, from_codes, x_dtype, ranks, rows, tokens)


def _wgrad(
    call: Call,
    dy: Held,
    x: Held,
    w_mask: Tensor | None,
    w_slope: Tensor | None,
    tokens: int,
    out_features: int,
    in_features: int,
    weight_dtype: torch.dtype,
) -> list[Tensor]:
    """dy: dY (T, N) itself, or of quantize_grad; x: the input (T, K) itself, or what fprop saved of its codes; w_mask:
    bits, w_slope (N, K) -> dW (N, K) in weight_dtype, and the gradient of a learned scale. T = tokens is filled with
    zeros to whole blocks. Zeros do not change the product, unless neither operand can represent zero and neither
    is rotated; no shipped recipe does that."""
    gemm, from_codes = call.numerics.wgrad, call.numerics.wgrad.right.spec.source == "forward"
    if call.numerics.save_codes:
        source = QTensor.of(call.layout("fprop.x", (tokens, in_features), -1).saved.unmasked, x)
    else:
        source = unquantised(x[0].to(call.dtype) if from_codes else x[0])
    padding = -tokens % gemm.multiple
    rotation = call.rotation("wgrad", tokens + padding)
    left = call.gradient("wgrad.dy", dy, (tokens + padding, out_features), -2, (0, 0, 0, padding))
    right = call.again("wgrad.x", source, rotation, padding)
    found = _to_operand(call, "wgrad", left.t, right, w_mask, w_slope, from_codes, weight_dtype)
    if call.observer is not None:
        call.observer.gradient(found[0])
    return found


def given_scale(scale: Tensor | None) -> Tensor | None:
    """A learned scale of `Quantizer.learned_shape` as a quantiser takes it: () where it is of a tensor. A copy, since
    an operator's result must not be its argument."""
    if scale is None:
        return None
    copy = scale.detach().to(torch.float32, copy=True)
    return copy.view(()) if copy.ndim == 1 else copy


LIBRARY = torch.library.Library("qtrain", "FRAGMENT")


Shapes = list[tuple[Any, torch.dtype]]


def _weight_shapes(call: Call, weight: Tensor, scale: Tensor | None, packed: bool) -> Shapes:
    found = call.weight_layout(weight, packed).shapes()
    return found if scale is None else [*found, (weight.shape, torch.float32)]


def _fprop_shapes(
    call: Call, x: Tensor, weight: Tensor, x_scale: Tensor | None, _: Any, kept: Held, save_x: bool, save_mask: bool,
    rows: Any,
) -> Shapes:  # fmt: skip
    layout = call.layout("fprop.x", x.shape, -1)
    found: Shapes = [((x.shape[0], weight.shape[0]), call.dtype)]
    if save_x and call.numerics.save_codes:
        found += layout.saved.unmasked.shapes()
    mask = layout.parts[3]
    found += [mask] if save_mask and mask is not None else []
    return [*found, (x.shape, torch.float32)] if save_mask and x_scale is not None else found


def _grad_shapes(call: Call, dy: Tensor, for_x: bool, for_w: bool) -> Shapes:
    dgrad, wgrad, (tokens, features), found = call.numerics.dgrad, call.numerics.wgrad, dy.shape, []
    if for_x and dgrad.quantizes:
        shape = tokens + -tokens % (dgrad.rows_block or 1), features + -features % dgrad.multiple
        found += call.layout("dgrad.dy", shape, -1).shapes()
    if for_w and wgrad.quantizes:
        found += call.layout("wgrad.dy", (tokens + -tokens % wgrad.multiple, features), -2).shapes()
    return found


def _dgrad_shapes(
    call: Call, dy: Held, weight: Tensor, w: Held, mask: Any, slope: Tensor | None, tokens: int, dtype: torch.dtype
) -> Shapes:
    return [((tokens, weight.shape[1]), dtype), *([] if slope is None else [((1,), torch.float32)])]


def _wgrad_shapes(
    call: Call, dy: Held, x: Held, mask: Any, slope: Tensor | None, tokens: int, out_features: int, in_features: int,
    dtype: torch.dtype,
) -> Shapes:  # fmt: skip
    found: Shapes = [((out_features, in_features), dtype)]
    if slope is not None:
        found.append((call.numerics.fprop.right.learned_shape(out_features, in_features), torch.float32))
    return found


def define(function: Callable[..., list[Tensor]], shapes: Callable[..., Shapes], arguments: str) -> Any:
    """torch.ops.qtrain.<name>, of a function whose first argument is a Call, which comes last in the operator's.
    shapes: of its results."""
    name = function.__name__.lstrip("_")
    schema = f"{name}({arguments}, Tensor keys, str numerics, ScalarType dtype, int observer) -> Tensor[]"
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def real(*given: Any) -> list[Tensor]:
        *own, keys, numerics, dtype, observer = given
        return function(Call(read_numerics(numerics), keys, dtype, _observers.get(observer)), *own)

    def fake(*given: Any) -> list[Tensor]:
        *own, keys, numerics, dtype, _ = given
        found = shapes(Call(read_numerics(numerics), keys, dtype, None), *own)
        return [keys.new_empty(shape, dtype=kind) for shape, kind in found]

    LIBRARY.impl(name, real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qtrain::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.qtrain, name).default


quantize_weight = define(_quantize_weight, _weight_shapes, "Tensor weight, Tensor? scale, bool packed")
fprop = define(
    _fprop,
    _fprop_shapes,
    "Tensor x, Tensor weight, Tensor? x_scale, Tensor? w_scale, Tensor[] kept, bool save_x, bool save_mask, "
    "Tensor? rows",
)
quantize_grad = define(_quantize_grad, _grad_shapes, "Tensor dy, bool for_x, bool for_w")
dgrad = define(
    _dgrad,
    _dgrad_shapes,
    "Tensor[] dy, Tensor weight, Tensor[] w, Tensor? x_mask, Tensor? x_slope, SymInt tokens, ScalarType x_dtype",
)
wgrad = define(
    _wgrad,
    _wgrad_shapes,
    "Tensor[] dy, Tensor[] x, Tensor? w_mask, Tensor? w_slope, SymInt tokens, SymInt out_features, SymInt in_features, "
    "ScalarType weight_dtype",
)


class _Layer(torch.autograd.Function):
    """Autograd of fprop. What torch.library.register_autograd makes takes lists of tensors apart at every call, in
    Python; here they are arguments of their own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, x_scale: Tensor | None, w_scale: Tensor | None, save_x: bool,
        save_mask: bool, rows: Tensor | None, keys: Tensor, text: str, dtype: torch.dtype, observer: int,
        *kept: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Saves only what the gradients that are asked for need. rows (R,) int64: the rows of the weight whose gradient
        is computed, that of all others being zero; None is all."""
        with torch._C._AutoDispatchBelowAutograd():
            y, *saved = fprop(
                x, weight, x_scale, w_scale, list(kept), save_x, save_mask, None, keys, text, dtype, observer
            )
        ctx.shared, ctx.x_dtype, ctx.held = (text, dtype, observer), x.dtype, (len(kept), save_mask)
        ctx.observer = _observers.get(observer)  # holds it
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*saved)
        own = x if save_x and not read_numerics(text).save_codes else None
        ctx.save_for_backward(keys, weight, w_scale, own, rows, *kept, *saved)
        return y, *saved

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        refuse_second_gradient()
        keys, weight, w_scale, x, rows, *rest = ctx.saved_tensors
        count, save_mask = ctx.held
        kept, saved = rest[:count], rest[count:]
        shared, numerics = (keys, *ctx.shared), read_numerics(ctx.shared[0])
        call, forward = Call(numerics, keys, ctx.shared[1], None), numerics.fprop
        needs_x, needs_w, needs_x_scale, needs_w_scale = ctx.needs_input_grad[:4]
        for_x, for_w = needs_x or needs_x_scale, needs_w or needs_w_scale
        x_slope = saved.pop() if save_mask and forward.left.learned else None
        x_mask = saved.pop() if save_mask and forward.left.masks else None
        dy, w, w_mask, w_slope = grads[0].contiguous(), kept, None, None
        dx, dw, dx_scale, dw_scale = (None,) * 4
        from_codes = numerics.dgrad.right.spec.source == "forward" and forward.right.plan is not None
        needed = (for_x and from_codes) or (needs_w and forward.right.masks) or needs_w_scale
        if not kept and needed:
            packed = dispatch.module(numerics.backend, keys.device.type).FUSED  # whose kernels read packed weights
            w = quantize_weight(weight, w_scale, packed, *shared[:-1], 0)  # which the forward has shown to the observer
        if w:
            w_slope = w[-1] if forward.right.learned else None
            w_mask = w[-1 - forward.right.learned] if forward.right.masks else None
        dy_w = dy
        if rows is not None and for_w:
            dy_w, w_mask, w_slope = (
                dy[:, rows],
                _bits_of_rows(w_mask, weight, rows),
                w_slope if w_slope is None else w_slope[rows],
            )
        operands = []
        if for_x and numerics.dgrad.quantizes and for_w and numerics.wgrad.quantizes and dy_w is dy:
            operands = quantize_grad(dy, True, True, *shared)
        else:
            operands = quantize_grad(dy, True, False, *shared) if for_x and numerics.dgrad.quantizes else []
            operands += quantize_grad(dy_w, False, True, *shared) if for_w and numerics.wgrad.quantizes else []
        if for_x:
            own = [dy]
            if numerics.dgrad.quantizes:
                own = operands[: len(call.layout("dgrad.dy", NO_SHAPE, -1).shapes())]
                operands = operands[len(own) :]
            slope = x_slope if needs_x_scale else None
            dx, dx_scale = _two(
                dgrad(own, weight, w if from_codes else [], x_mask, slope, dy.shape[0], ctx.x_dtype, *shared)
            )
        if for_w:
            own, slope = operands if numerics.wgrad.quantizes else [dy_w], w_slope if needs_w_scale else None
            held = saved if x is None else [x]
            shape = dy_w.shape[1], weight.shape[1]
            dw, dw_scale = _two(wgrad(own, held, w_mask, slope, dy.shape[0], *shape, weight.dtype, *shared))
            if rows is not None:
                dw = torch.zeros_like(weight).index_copy_(0, rows, dw)
                if dw_scale is not None and dw_scale.ndim == 2:
                    dw_scale = torch.zeros_like(w_scale).index_copy_(0, rows, dw_scale)
        return dx, dw, dx_scale, dw_scale, *[None] * (7 + len(kept))


def refuse_second_gradient() -> None:
    """UserError in a backward whose gradients are to be differentiated again: their kernels record no graph."""
    if torch.is_grad_enabled():
        raise UserError(
            "gradients of quantised layers have no gradients of their own, and this backward was asked for a graph of "
            "them (create_graph=True); ask for none, or compute in high precision: "
            "qtrain.quant.set_high_precision(model)"
        )


def _bits_of_rows(mask: Tensor | None, weight: Tensor, rows: Tensor) -> Tensor | None:
    """Of the bits of a mask of the weight (N, K), those of some rows."""
    if mask is None:
        return None
    whole = reference.split(mask, 1, weight.numel()).view(weight.shape)
    return reference.join(whole[rows].flatten(), 1)


def _two(found: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """A gradient, and that of a learned scale, if there is one."""
    return found[0], found[1] if len(found) == 2 else None


def _differentiable(
    x: Tensor, weight: Tensor, x_scale: Tensor | None, w_scale: Tensor | None, kept: Held, *rest: Any
) -> list[Tensor]:
    return list(_Layer.apply(x, weight, x_scale, w_scale, *rest, *kept))  # pyright: ignore[reportArgumentType]


LIBRARY.impl("fprop", _differentiable, "Autograd")
