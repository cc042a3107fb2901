"""FSDP2's all-gather of quantised weights: packed codes and scales travel between the ranks, not the master weights.

FSDP2 shards a weight (N, K) by its rows. The quantiser of fprop works along K, so each rank quantises the rows that it
holds, and the rows of all ranks, one after the other, are the codes and scales of the whole weight, bit for bit. A
scale of the whole tensor is made of the largest magnitude over all ranks, which they tell each other first. Whatever
else would need the whole weight is refused by name (`obstacle`).

FSDP2 asks a sharded tensor for two functions: fsdp_pre_all_gather gives what travels, fsdp_post_all_gather makes the
parameter of it that the forward and the backward see. That parameter is a `GatheredWeight`: a tensor of the weight's
shape and dtype that holds codes in place of values. Source: torch 2.13, torch/distributed/fsdp/_fully_shard.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from qtrain.errors import UserError
from qtrain.quant import functional
from qtrain.quant.functional import NO_SHAPE, Call, Numerics
from qtrain.quant.linear import QuantLinear, quant_linears
from qtrain.quant.quantizer import rotate
from qtrain_kernels import dispatch, reference
from qtrain_kernels.plans import Plan, field_width
from qtrain_kernels.qtensor import Layout

# ------------------------------------------------------------------------------------------------------------- who can


def check_quantized_gather(model: nn.Module, shards: int) -> None:
    """UserError where the weights of a model's QuantLinears cannot be gathered as codes over so many shards."""
    if shards == 1:
        raise UserError("trainer.all_gather=quantized: each device holds whole weights, so none is gathered; drop it")
    layers = quant_linears(model)
    if not layers:
        raise UserError("trainer.all_gather=quantized: the recipe quantises no layer; use trainer.all_gather=full")
    for layer in layers:
        reason = obstacle(layer.numerics) or _misfit(layer, shards)
        if reason is not None:
            raise UserError(f"trainer.all_gather=quantized: {layer.name}: {reason}; use trainer.all_gather=full")


def obstacle(numerics: Numerics) -> str | None:
    """Why a recipe's weights cannot be gathered as codes; None if they can."""
    quantizer, plan = numerics.fprop.right, numerics.fprop.right.plan
    if plan is None:
        return "its forward multiplies the weight without quantising it"
    if numerics.dgrad.right.spec.source != "forward":
        return "its dgrad quantises the master weight again, so codes of the forward are not enough"
    if quantizer.learned:
        return "its weight has a learned scale, whose gradient needs the master weight"
    if quantizer.draws:
        return f"its weight is rounded by {plan.rounding}, whose noise is keyed by the place in the whole weight"
    if quantizer.spec.signs == "step":
        return "its weight is rotated by signs that change each step"
    if quantizer.tile[0] > 1:
        return f"its weight is scaled in tiles of {quantizer.tile[0]} rows, which are not packed"
    if plan.element.table is not None:
        return "its codes are those of a table, under float32 scales"
    if not quantizer.layout(NO_SHAPE, blocks=True).saved.packed:
        return f"its weight is not packed: {quantizer.layout(NO_SHAPE, blocks=True).lacks('packed')}"
    rule = plan.line_rule if plan.whole else None
    if rule is not None and rule.statistic != "amax":
        return f"its weight has one scale, of the {rule.statistic} of all elements, a sum that shards round otherwise"
    return None


def _misfit(layer: QuantLinear, shards: int) -> str | None:
    """Why the rows of one layer do not fit the shards."""
    plan = layer.numerics.fprop.right.plan
    assert plan is not None
    if layer.out_features % shards:
        return f"its {layer.out_features} rows do not divide among {shards} devices"
    multiple = 16 // math.gcd(16, 1 if plan.mask else field_width(plan.element))  # of which codes fill two bytes
    if layer.in_features % multiple:
        return f"its rows of {layer.in_features} elements are not a multiple of {multiple}"
    return None


def gathered_bytes(layer: QuantLinear, shards: int) -> int:
    """Bytes of a layer's weight as it travels, of all shards together."""
    rows = torch.empty(layer.out_features // shards, layer.in_features, device="meta")
    return shards * sum(math.prod(shape) * dtype.itemsize for shape, dtype in sent_of(layer, rows))


# ------------------------------------------------------------------------------------------------------- around FSDP2's


def quantize_gathers(model: nn.Module) -> None:
    """Let FSDP2 gather the weights of a model's QuantLinears as codes. Call it after `fully_shard` and before the first
    forward; `check_quantized_gather` says whether it can be done."""
    for layer in quant_linears(model):
        weight = layer.weight
        assert isinstance(weight, DTensor)
        shard: Any = weight._local_tensor
        shard.fsdp_pre_all_gather, shard.fsdp_post_all_gather = _before, _after


def _before(
    mesh: DeviceMesh, shape: torch.Size, stride: tuple[int, ...], layer: nn.Module, policy: Any
) -> tuple[tuple[Tensor, ...], Any]:
    """(what travels of this rank's rows of the layer's weight, what `_after` is told)."""
    assert isinstance(layer, QuantLinear) and isinstance(layer.weight, DTensor)
    return tuple(_packed_rows(layer, layer.weight._local_tensor.detach(), mesh)), layer


def _after(
    gathered: tuple[Tensor, ...], layer: QuantLinear, dtype: torch.dtype, *, out: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """The weight of what all ranks sent. out: the one of an earlier call, whose memory FSDP2 has filled again."""
    return None if out is not None else (GatheredWeight(layer, gathered, dtype), ())


class GatheredWeight(Tensor):
    """A weight (N, K) without values, of which a QuantLinear's operators take the codes. Whatever else reads it is
    answered by a UserError. gathered: what travelled, in memory that FSDP2 frees and fills."""

    layer: QuantLinear
    gathered: tuple[Tensor, ...]

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(cls, layer: QuantLinear, gathered: tuple[Tensor, ...], dtype: torch.dtype) -> GatheredWeight:
        shape = layer.out_features, layer.in_features
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=gathered[0].device)  # pyright: ignore
        self.layer, self.gathered = layer, gathered
        return self

    def __repr__(self, **_: Any) -> str:
        return f"GatheredWeight({self.layer.name}, {tuple(self.shape)})"

    # What memory is behind the weight, for torch's memory tracker.

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names = [f"part{number}" for number in range(len(self.gathered))]
        for name, part in zip(names, self.gathered, strict=True):
            setattr(self, name, part)
        return names, (self.layer, self.dtype)

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], told: Any, *_: Any) -> GatheredWeight:
        layer, dtype = told
        return cls(layer, tuple(parts.values()), dtype)

    def packed_weight(self) -> list[Tensor]:
        """The weight as `functional.quantize_weight` gives it, packed."""
        call = _call(self.layer, self.device)
        layout = call.weight_layout(self, packed=True)
        parts = [
            part.reshape(-1)[: math.prod(shape)].view(shape)  # a tensor scale came from each rank
            for part, (shape, _) in zip(self.gathered, _travels(layout), strict=True)
        ]
        return _split_mask(parts, layout, call.numerics.backend) if joins_mask(layout.plan) else parts

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.detach.default, torch.ops.aten.as_strided.default):
            weight = args[0]
            return cls(weight.layer, weight.gathered, weight.dtype)
        if function is functional.quantize_weight:
            return args[0].packed_weight()
        if function is functional.fprop:
            x, weight, x_scale, w_scale, _, *rest = args
            return function(x, weight._shape_alone(), x_scale, w_scale, weight.packed_weight(), *rest)
        if function is functional.dgrad:
            dy, weight, *rest = args
            return function(dy, weight._shape_alone(), *rest)
        name = next((each.layer.name for each in tree_leaves((args, kwargs)) if isinstance(each, cls)), "a layer")
        raise UserError(
            f"{name}: {function} needs the values of the weight, and trainer.all_gather=quantized has gathered its "
            "codes alone; use trainer.all_gather=full"
        )

    def _shape_alone(self) -> Tensor:
        """A tensor of the same shape, for operators that take the codes as another argument."""
        return torch.empty(1, dtype=self.dtype, device=self.device).expand(self.shape)


def _call(layer: QuantLinear, device: torch.device) -> Call:
    return Call(layer.numerics, layer.keys.to(device), torch.bfloat16, layer.observer)


# --------------------------------------------------------------------------------------------------------- what travels


def sent_of(layer: QuantLinear, rows: Tensor) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of what a rank sends of its rows (n, K) of a layer's weight. rows may be without memory."""
    return _travels(_call(layer, rows.device).weight_layout(rows, packed=True))


def _packed_rows(layer: QuantLinear, rows: Tensor, mesh: DeviceMesh) -> list[Tensor]:
    """rows (n, K) float32 of a weight -> what travels of them. Collective, where one scale is the whole weight's."""
    call, plan = _call(layer, rows.device), layer.numerics.fprop.right.plan
    assert plan is not None
    if isinstance(rows, FakeTensor):  # of a plan, which wants sizes
        return [rows.new_empty(shape, dtype=dtype) for shape, dtype in sent_of(layer, rows)]
    rotation = call.rotation("fprop", rows.shape[1])
    if plan.whole and plan.line_rule is not None:
        turned = rows if rotation is None else rotate(rows, rotation, call.numerics.backend)
        extended = torch.cat((turned, _row_of_largest(turned, mesh)))
        layout = call.weight_layout(extended, packed=True)
        found = call.operand("fprop.w", extended, None, layout=layout, raw=rows)[0].tensors()
        sizes = [shape for shape, _ in call.weight_layout(rows, packed=True).shapes()]
        found = [part.reshape(-1)[: math.prod(size)].view(size) for part, size in zip(found, sizes, strict=True)]
    else:
        layout = call.weight_layout(rows, packed=True)
        found = call.operand("fprop.w", rows, rotation, layout=layout)[0].tensors()
    return _join_mask(found, plan, call.numerics.backend) if joins_mask(plan) else found


def _row_of_largest(rows: Tensor, mesh: DeviceMesh) -> Tensor:
    """(1, K): the largest magnitude over the rows of all ranks, and zeros. Below the rows of a rank, it gives them the
    scale of the whole weight."""
    largest = rows.float().abs().amax().view(torch.int32)  # whose order is that of the floats, NaN above all
    distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=mesh.get_group())
    row = rows.new_zeros(1, rows.shape[1])
    row[0, 0] = largest.view(torch.float32)
    return row


# A mask is one bit for each element. Of four-bit codes it says something of the largest magnitude alone where whatever
# it stops is as large: then an element is one of 18 symbols, the 16 fields of four bits and the two outermost codes
# masked, and a pair of elements is one of 324 = 18 * 18: element a, then b, is the number a + 18 b, in nine bits
# in place of ten.
SYMBOLS = 18


@cache
def joins_mask(plan: Plan) -> bool:
    """Whether codes and mask travel in nine bits a pair."""
    if plan.mask is None or field_width(plan.element) != 4 or plan.sparsity or plan.rounding != "nearest":
        return False
    if plan.mask.kind == "error":
        # In a minifloat, differences of neighbours are exact in float32, so rounding inside the grid passes.
        return plan.element.mantissa_bits is not None and plan.mask.limit >= plan.element.half_interval
    return plan.mask.limit >= plan.element.max


def _travels(layout: Layout) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of what travels of a weight with this layout, over all ranks."""
    shapes = layout.shapes()
    if layout.plan is not None and joins_mask(layout.plan):
        shapes[-1] = (math.prod(layout.shape) // 16,), torch.uint8  # in place of the mask
    return shapes


@cache
def _tables(plan: Plan, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of a pair's nine bits: the byte of its codes (512,) and the two bits of its mask (512,), uint8; and the nine bits
    by mask and byte (4 * 256,), int32."""
    with torch.inference_mode(False):
        ends = reference.pack_codes(torch.tensor([-plan.element.max, plan.element.max]), None, plan).codes
        fields = torch.cat((torch.arange(16), torch.stack((ends[0] & 15, ends[0] >> 4)).long()))
        passes = (torch.arange(SYMBOLS) < 16).long()
        numbers = torch.arange(SYMBOLS**2)
        first, second = numbers % SYMBOLS, numbers // SYMBOLS
        codes, masks = fields[first] | fields[second] << 4, passes[first] | passes[second] << 1
        joined = torch.zeros(4, 256, dtype=torch.int32)
        both = masks == 3
        joined[:, codes[both]] = numbers[both].int()  # where a NaN is masked, whose code is any
        joined[masks, codes] = numbers.int()
        room = torch.zeros(512 - SYMBOLS**2, dtype=torch.long)
        parts = [torch.cat((each, room)).to(torch.uint8) for each in (codes, masks)]
        return parts[0].to(device), parts[1].to(device), joined.view(-1).to(device)


def _join_mask(parts: list[Tensor], plan: Plan, backend: str) -> list[Tensor]:
    """[codes, ..., mask] -> [the low eight of each pair's nine bits, ..., the ninth bits, eight a byte]."""
    codes, mask = parts[0], parts[-1]
    device = codes.device.type
    passes = dispatch.get("split", backend, device)(mask, 2, codes.numel()).to(torch.int32)
    nine = _tables(plan, codes.device)[2].index_select(0, codes.view(-1).to(torch.int32) | passes << 8)
    ninth = dispatch.get("join", backend, device)((nine >> 8).to(torch.uint8), 1)
    return [(nine & 255).to(torch.uint8).view(codes.shape), *parts[1:-1], ninth]


def _split_mask(parts: list[Tensor], layout: Layout, backend: str) -> list[Tensor]:
    """`_join_mask` undone."""
    low, ninth = parts[0], parts[-1]
    assert layout.plan is not None
    if isinstance(low, FakeTensor):
        return [low.new_empty(shape, dtype=dtype) for shape, dtype in layout.shapes()]
    device = low.device.type
    high = dispatch.get("split", backend, device)(ninth, 1, low.numel()).to(torch.int32)
    nine = low.view(-1).to(torch.int32) | high << 8
    codes, masks, _ = _tables(layout.plan, low.device)
    mask = dispatch.get("join", backend, device)(masks.index_select(0, nine), 2)
    return [codes.index_select(0, nine).view(low.shape), *parts[1:-1], mask]
