"""PackedLinear: a linear layer whose weight is codes, with no master beside them."""

# T tokens, N out features, K in features

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.errors import UserError
from qtrain.quant.functional import (
    Call,
    Numerics,
    define,
    given_scale,
    read_numerics,
    refuse_second_gradient,
)
from qtrain.quant.linear import UNCALIBRATED, QuantLinear, compute_dtype, has_hooks, quant_linears
from qtrain.quant.outliers import PARTS, FixedDtypes, Outliers
from qtrain.quant.quantizer import unrotate
from qtrain.quant.random import key_table, keys_beside
from qtrain_kernels import dispatch
from qtrain_kernels.few_rows import exact
from qtrain_kernels.gemm import scaled, scales_of
from qtrain_kernels.plans import Rotation
from qtrain_kernels.precision import matmul
from qtrain_kernels.qtensor import TENSORS, Layout, QTensor, float_storage

KEPT = tuple(name for name in TENSORS if name != "mask")  # of a weight's QTensor


class PackedLinear(FixedDtypes):
    """A linear layer that multiplies the codes of a weight as a recipe's forward does. Made by `qtrain.pack`.

    x (..., K) -> (..., N) in the autocast dtype, or x's own without autocast. The tensors of the weight's QTensor
    (codes, block_scale, tensor_scale, zero_point) are buffers: the state dict has those of its format, packed to the
    bits of the format where it has such. The inputs are rotated and quantised as the recipe says. Their gradient is
    that of the dequantised weight in the compute dtype, straight through their quantiser; the weight has none. A weight
    of which parts stay in 16 bits has them in `outliers`.

    Few rows of inputs multiply the weight in its bits, unless the backend is the reference: at most 8 on a CPU, or 128
    under block scales that are floats (`qtrain_kernels.few_rows`), at most 64 on CUDA (`qtrain_kernels.gpu_few_rows`).
    Where both sides are integers without block scales, sums are exact and the same. Where the recipe leaves the inputs
    as they are, float32 sums are taken in another order, and are not rounded to bfloat16 before the weight's scale.
    Everywhere else, and with more rows, the outputs are those of the layer, bit for bit.
    """

    codes: Tensor
    input_scale: Tensor | None

    def __init__(
        self, weight: QTensor, bias: Tensor | None, numerics: Numerics, name: str, keys: Tensor,
        input_scale: Tensor | None = None, outliers: Outliers | None = None,
    ) -> None:  # fmt: skip
        """weight: (N, K) in rotated space, in `layout_of(numerics, (N, K))`. name: of the layer in its model; keys: its
        row of `key_table` at step 0, of which the signs of rotations are drawn. outliers: added to the codes."""
        super().__init__()
        self.name, self.text, self.layout = name, numerics.text, weight.layout
        self.gemm = numerics.gemm  # which graphs can ask for
        self.out_features, self.in_features = weight.shape
        for part in KEPT:
            self.register_buffer(part, getattr(weight, part))
        self.register_buffer("input_scale", input_scale)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.keys, self.outliers = keys_beside(weight.codes, keys), outliers
        self._ready: Any = None  # where the buffers lie, and a FewRows that reads them there

    @classmethod
    def of(cls, layer: QuantLinear) -> PackedLinear:
        """The codes of a layer's own forward. UserError where it has none that stay."""
        reason = without_codes(layer)
        if reason is not None:
            raise UserError(f"{layer.name} cannot be packed: {reason}")
        scale = None if layer.input_scale is None else layer.input_scale.detach().clone()
        keys = key_table([layer.keyed_by], 0, 0)[0]
        return cls(codes_of(layer, layer.weight.detach()), layer.bias, layer.numerics, layer.name, keys, scale)

    @property
    def numerics(self) -> Numerics:
        return read_numerics(self.text)

    @property
    def weight(self) -> QTensor:
        """(N, K), in rotated space, without the outliers."""
        parts = {part: self.get_buffer(part) for part in KEPT}
        return QTensor(mask=None, layout=self.layout, **parts)

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[-1:] != (self.in_features,):
            raise UserError(
                f"{self.name}: expected an input of last dim {self.in_features}, found shape {tuple(input.shape)}; "
                "pass (..., in_features)"
            )
        dtype = compute_dtype(self.name, self.gemm, input)
        x = input.reshape(-1, self.in_features)
        learns = torch.is_grad_enabled() and x.requires_grad
        y = _Product.apply(x, self, dtype) if learns else self.product(x, dtype)
        y = y.view(*input.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(dtype)

    def rotation(self) -> Rotation | None:
        """Of the inputs and of the rows of the weight."""
        call = Call(self.numerics, self.keys, torch.float32, None)
        return call.rotation("fprop", self.in_features)

    def product(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x (T, K) -> (T, N) in dtype, without the bias."""
        if torch.compiler.is_compiling():
            return packed_product(x, *self._as_arguments(dtype))[0]
        if not x.shape[0]:
            return x.new_zeros(0, self.out_features, dtype=dtype)
        if self.outliers is None:
            return self._product_of_codes(x, dtype)
        beside = self.outliers.product(x, self.rotation(), self.numerics.backend, dtype)
        return self._product_of_codes(self.outliers.without_columns(x), dtype) + beside

    def _as_arguments(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """Of the operators that stand for its products in a graph."""
        beside = [] if self.outliers is None else list(self.outliers.buffers())
        shape = self.out_features, self.in_features
        return self.weight.tensors(), beside, self.input_scale, *shape, self.keys, self.text, dtype, 0

    def _product_of_codes(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        module = dispatch.few_rows(self.numerics.backend, x.device.type, self.layout)
        few = module is not None and len(x) <= module.most(self.layout)
        if few and self.numerics.fprop.left.plan is None:  # quantising takes longer than the product
            return self._few_rows(module).linear(x.detach(), dtype)
        call = Call(self.numerics, self.keys, dtype, None)
        xq, _ = call.operand("fprop.x", x, self.rotation(), learned=given_scale(self.input_scale))
        if few and exact(xq.layout, self.layout.t):
            held = xq.to(float_storage(xq.layout.plan, torch.bfloat16), call.numerics.backend)
            sums = self._few_rows(module)(held.codes, scaled=False)
            if xq.codes.is_floating_point():  # whose product is rounded to their dtype before the scales
                sums = sums.to(xq.codes.dtype)
            return scaled(sums, scales_of(xq, self.weight.t)).to(dtype)
        return call.multiply("fprop", xq, self.weight.t, dtype)

    def _few_rows(self, module: Any) -> Any:
        """The weight as the FewRows of a module of `dispatch.few_rows`, made once for the buffers that are there."""
        places = [0 if buffer is None else buffer.data_ptr() for buffer in self._buffers.values()]
        ready = self._ready
        if ready is None or ready[0] != places:
            ready = self._ready = places, module.FewRows(self.weight, self.rotation(), self.numerics.backend)
        return ready[1]

    def product_back(self, dy: Tensor, dtype: torch.dtype) -> Tensor:
        """dY (T, N) -> dX (T, K) in dtype, by the dequantised weight in the compute dtype of dY."""
        if torch.compiler.is_compiling():
            return packed_product_back(dy, *self._as_arguments(dtype))[0]
        if self.outliers is not None:
            return matmul(dy, self.dequantize().to(dy.dtype)).to(dtype)
        dx = matmul(dy, self.weight.dequantize(self.numerics.backend).to(dy.dtype))
        return unrotate(dx, self.rotation(), self.numerics.backend).to(dtype)

    def dequantize(self) -> Tensor:
        """(N, K) float32: the weight that inputs are multiplied by, out of its rotation, with the outliers."""
        rotation, backend = self.rotation(), self.numerics.backend
        weight = self.weight.dequantize(backend).float()
        if self.outliers is None:
            return unrotate(weight, rotation, backend)
        return self.outliers.whole(weight, rotation, backend)

    def bits(self) -> float:
        """Of a weight, with its scales and outliers, as they are kept."""
        held = sum(buffer.nbytes for name, buffer in self.named_buffers() if name != "input_scale")
        return 8 * held / (self.in_features * self.out_features)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        super()._apply(fn, recurse)
        self.keys = keys_beside(self.codes, self.keys)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ready = None  # it may read tensors that were replaced

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, or a pickle: without the addresses that few rows read, which are of this process and tensor."""
        return self.__dict__ | {"_ready": None}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.numerics.formats.partition(',')[0]}, {self.bits():.3g} bits a weight"
        )


# Graphs of torch.compile and torch.export have no layer; they hold its products as two operators of its tensors.


def _layer_of(
    call: Call, weight: list[Tensor], outliers: list[Tensor], input_scale: Tensor | None, *shape: int
) -> PackedLinear:
    q = QTensor.of(layout_of(call.numerics, (shape[0], shape[1])), weight)
    beside = Outliers(*outliers) if outliers else None
    return PackedLinear(q, None, call.numerics, "a packed layer", call.keys, input_scale, beside)


def _packed_product(call: Call, x: Tensor, *held: Any) -> list[Tensor]:
    return [_layer_of(call, *held).product(x, call.dtype)]


def _packed_product_back(call: Call, dy: Tensor, *held: Any) -> list[Tensor]:
    return [_layer_of(call, *held).product_back(dy, call.dtype)]


_HELD = "Tensor[] weight, Tensor[] outliers, Tensor? input_scale, int out_features, int in_features"
packed_product = define(
    _packed_product, lambda call, x, *held: [((x.shape[0], held[-2]), call.dtype)], f"Tensor x, {_HELD}"
)
packed_product_back = define(
    _packed_product_back, lambda call, dy, *held: [((dy.shape[0], held[-1]), call.dtype)], f"Tensor dy, {_HELD}"
)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear, dtype: torch.dtype) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return layer.product(x, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        refuse_second_gradient()
        return ctx.layer.product_back(grads[0], ctx.dtype), None, None


def layout_of(numerics: Numerics, shape: tuple[int, int]) -> Layout:
    """In which a PackedLinear keeps a weight (N, K): packed to the bits of its format where it has such, else in floats
    that hold it exactly, beside the block scales without which there would be no codes to export."""
    quantizer = numerics.fprop.right
    found = quantizer.layout(shape, -1, float_storage(quantizer.plan, torch.bfloat16)).unmasked
    return found.stored(found.storage if found.lacks("packed") else "packed", blocks=True)


def codes_of(layer: QuantLinear, weight: Tensor) -> QTensor:
    """A weight (N, K) as a layer's forward quantises it, in `layout_of`; without values on the meta device. UserError
    for a NaN or infinity under a learned scale: such codes have no bits."""
    layout = layout_of(layer.numerics, (layer.out_features, layer.in_features))
    if weight.device.type == "meta":
        return QTensor.of(layout, [torch.empty(size, dtype=dtype, device="meta") for size, dtype in layout.shapes()])
    call = Call(layer.numerics, key_table([layer.keyed_by], 0, 0)[0].to(weight.device), torch.float32, None)
    rotation, learned = call.rotation("fprop", layer.in_features), given_scale(layer.weight_scale)
    if layout.loses_nan and not all(tensor.isfinite().all() for tensor in (weight, learned) if tensor is not None):
        raise UserError(
            f"{layer.name} cannot be packed: its weight or its learned scale holds a NaN or infinity, which has no "
            "bits; take a checkpoint from before the training diverged"
        )
    return call.operand("fprop.w", weight, rotation, learned=learned, layout=layout)[0]


def unsettled(numerics: Numerics) -> str | None:
    """Why the forward of a recipe has no codes of its weights that stay; None if it has."""
    quantizer = numerics.fprop.right
    if quantizer.plan is None:
        return "its forward multiplies the weights without quantising them"
    if quantizer.draws:
        return f"its weights are rounded by {quantizer.plan.rounding}, anew in every step"
    if quantizer.spec.signs == "step":
        return "its weights are rotated by signs that change each step"
    return None


def without_codes(layer: QuantLinear) -> str | None:
    """Why a layer has no codes of its weight to keep; None if it has. On the meta device nothing has values yet, and a
    learned scale needs none."""
    is_unset = not layer.calibrated and layer.weight.device.type != "meta"
    return unsettled(layer.numerics) or (UNCALIBRATED if is_unset else None)


def obstacle(model: nn.Module) -> str | None:
    """Why `pack` refuses a model; None if it does not."""
    layers = quant_linears(model)
    if not layers:
        return f"the model ({type(model).__name__}) has no quantised layer, so there is nothing to pack"
    shared = {id(parameter) for module in model.modules() if not isinstance(module, QuantLinear)
              for parameter in module.parameters(recurse=False)}  # fmt: skip
    for layer in layers:
        reason = without_codes(layer)
        if layer.high_precision:
            reason = "it computes in high precision"
        if has_hooks(layer):
            reason = "it carries hooks, as an adapter's, which would be lost; remove them, or merge the adapter"
        if id(layer.weight) in shared:
            reason = "it shares its weight with another module, which reads it as it is"
        if reason is not None:
            return f"{layer.name} cannot be packed: {reason}"
    return None


def pack(model: nn.Module, kind: type[PackedLinear] | None = None) -> None:
    """Replace every QuantLinear inside model by a PackedLinear of its codes, in place; the master weights are freed.
    kind: a PackedLinear, or a class derived of it.

    Outputs stay as they are in eval mode, bit for bit but for few rows (see PackedLinear). UserError, with the
    model untouched, where a recipe has no codes that stay, where a learned scale has no value yet or the weight under
    it holds a NaN, or where a layer computes in high precision, carries hooks or shares its weight with an embedding.
    """
    reason = obstacle(model)
    if reason is not None:
        raise UserError(reason)
    kind = kind or PackedLinear
    named = model.named_modules(remove_duplicate=False)
    layers = {name: layer for name, layer in named if isinstance(layer, QuantLinear)}
    # A layer used under two names stays one layer.
    made = {layer: kind.of(layer).train(layer.training) for layer in dict.fromkeys(layers.values())}
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[layer])


def reserve_outliers(model: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
    """Make room in packed layers for the outliers that a state dict has, whose shapes are given by its names."""
    for layer in model.modules():
        if isinstance(layer, PackedLinear) and f"{layer.name}.outliers.columns" in shapes:
            parts = [torch.empty(shapes[f"{layer.name}.outliers.{part}"], dtype=dtype) for part, dtype in PARTS.items()]
            layer.outliers = Outliers(*parts)
