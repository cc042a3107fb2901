"""Low-rank adapters beside the linear layers of a frozen model, of whatever kind these are.

An adapter is a module `adapter` of its linear layer, whose output a forward hook adds. The layer keeps its class and
the names of its own tensors. LoRA (arXiv 2106.09685) trains adapters. LoRC (arXiv 2303.08302, 2307.09782) computes them
from the error of quantised weights.
"""

# T tokens, K in features, N out features, r rank

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from qtrain.errors import UserError
from qtrain.quant.convert import matches
from qtrain.quant.packed import PackedLinear, reserve_outliers
from qtrain.quant.random import key_words
from qtrain_kernels.precision import linear
from qtrain_kernels.reference import element_index, uniform


class Adapter(nn.Module):
    """x (..., K) -> alpha / r * B A dropout(x), (..., N), in the autocast dtype or x's own. A (r, K), B (N, r) float32,
    or bfloat16 where they were computed and not trained.

    What dropout drops is a function of (seed, name, step, micro-batch, element): `set_adapter_step`.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, alpha: float, dropout: float, name: str, seed: int
    ) -> None:
        """A and B start as peft starts them: A from kaiming_uniform with a = sqrt(5), B from zero."""
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.factor, self.dropout, self.keyed_by = alpha / rank, dropout, (seed, name, "adapter")
        self.key: Tensor | None = None

    def set_step(self, step: SupportsIndex, micro_batch: SupportsIndex) -> None:
        if self.dropout:
            words = key_words(*self.keyed_by, step, micro_batch)
            self.key = torch.tensor(words, dtype=torch.int32, device=self.A.device)

    def forward(self, x: Tensor) -> Tensor:
        return linear(linear(self._dropped(x), self.A.to(x.dtype)), self.B.to(x.dtype)) * self.factor

    def _dropped(self, x: Tensor) -> Tensor:
        if not (self.dropout and self.training):
            return x
        if self.key is None:
            raise UserError(
                f"{self.keyed_by[1]}: its adapter drops inputs at random, and no step is set to key them; call "
                "qtrain.quant.adapter.set_adapter_step(model, step, micro_batch) before each training forward"
            )
        rows = x.reshape(-1, x.shape[-1], 1)
        kept = uniform(element_index(rows), self.key).view(x.shape) >= self.dropout
        return x * kept.to(x.dtype) / (1.0 - self.dropout)

    def product(self) -> Tensor:
        """alpha / r * B A, (N, K) float32: what merging adds to the weight."""
        return self.factor * (self.B.float() @ self.A.float())

    def extra_repr(self) -> str:
        return f"rank={len(self.A)}, factor={self.factor:g}, dropout={self.dropout:g}"


def _add_adapter(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + layer.get_submodule("adapter")(inputs[0]).to(output.dtype)


def attach(
    model: nn.Module, layers: tuple[str, ...], *, rank: int, alpha: float, dropout: float = 0.0, seed: int = 0
) -> list[str]:
    """Freezes a model and puts an adapter beside each of its linear layers of these names or patterns; () is all but
    lm_head. Returns their names. UserError for a name that matches no linear layer, for a layer that has an adapter,
    and for a head that is the embedding: merged, its adapter would change both."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | PackedLinear)}
    chosen = [name for name in linears if any(matches(entry, name) for entry in layers)]
    if not layers:
        chosen = [name for name in linears if name.rpartition(".")[2] != "lm_head"]
    if unknown := [entry for entry in layers if not any(matches(entry, name) for name in linears)]:
        raise UserError(
            f"tune.adapter.layers names {unknown[0]!r}, which matches no linear layer; there are: "
            f"{', '.join(dict.fromkeys(name.rpartition('.')[2] for name in linears))}"
        )
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name in chosen:
        if "adapter" in linears[name]._modules:
            raise UserError(f"{name} has an adapter already, as one of --low-rank; merge it, or leave {name} out")
        if id(linears[name]._parameters.get("weight")) in embeddings:  # the codes of a packed layer are none
            raise UserError(
                f"{name} has the weight of the embedding, into which its adapter could not be merged; leave it out of "
                "tune.adapter.layers, or take a model with model.tie_embeddings=false"
            )
    model.requires_grad_(False)
    for name in chosen:
        layer = linears[name]
        _put_beside(layer, Adapter(layer.in_features, layer.out_features, rank, alpha, dropout, name, seed))
    return chosen


def _put_beside(layer: nn.Module, adapter: Adapter) -> None:
    layer.add_module("adapter", adapter)
    layer.register_forward_hook(_add_adapter)


# ----------------------------------------------------------------------------------------------- computed from an error


@torch.no_grad()
def compensate(layer: PackedLinear, weight: Tensor, rank: int) -> None:
    """Puts the rank r part of a packed layer's error beside it: B A is the truncated singular value decomposition of
    W - W', with the root of each singular value in both factors, which are stored in bfloat16. Source: LoRC of
    ZeroQuant-V2 (arXiv 2303.08302), with rank 8 in ZeroQuant-FP (arXiv 2307.09782).

    weight: W (N, K), in the space of the layer's inputs; W' is what these are multiplied by without the adapter. The
    adapter multiplies the inputs unquantised; the papers' simulation adds B A to W' and multiplies quantised inputs.
    rank is at most the smaller of N and K.
    B A is a projection of W - W' from the left. So the output error is never above that without it, whatever the inputs
    are, but for the rounding of the factors.
    """
    assert 0 < rank <= min(weight.shape)
    left, values, right = torch.linalg.svd(weight.float() - layer.dequantize(), full_matrices=False)
    root = values[:rank].sqrt()
    adapter = _computed(layer, rank)
    adapter.A.copy_(root[:, None] * right[:rank])
    adapter.B.copy_(left[:, :rank] * root)
    _put_beside(layer, adapter)


def _computed(layer: PackedLinear, rank: int) -> Adapter:
    with torch.device("meta"):  # where starting values draw nothing
        adapter = Adapter(layer.in_features, layer.out_features, rank, rank, 0.0, layer.name, 0)
    return adapter.requires_grad_(False).bfloat16().to_empty(device=layer.codes.device)


def reserve_beside(model: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
    """Make room in packed layers for what a state dict has beside their codes, outliers and computed adapters. shapes:
    of its tensors, by their names."""
    reserve_outliers(model, shapes)
    for layer in [module for module in model.modules() if isinstance(module, PackedLinear)]:
        if (shape := shapes.get(f"{layer.name}.adapter.A")) is not None:
            _put_beside(layer, _computed(layer, shape[0]))


def whole_weight(layer: PackedLinear) -> Tensor:
    """(N, K) float32: the weight that inputs are multiplied by, out of its rotation, with its outliers and adapter."""
    beside = adapters(layer).get("")
    return layer.dequantize() if beside is None else layer.dequantize() + beside.product()


def whole_bits(layer: PackedLinear) -> float:
    """Of a weight, with its scales, outliers and adapter."""
    held = sum(parameter.nbytes for each in adapters(layer).values() for parameter in each.parameters())
    return layer.bits() + 8 * held / (layer.in_features * layer.out_features)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a model by the names of their layers."""
    found = ((name.removesuffix("adapter").removesuffix("."), module) for name, module in model.named_modules())
    return {name: module for name, module in found if isinstance(module, Adapter)}


def set_adapter_step(model: nn.Module, step: SupportsIndex, micro_batch: SupportsIndex = 0) -> None:
    """Keys what every adapter drops in the next training forward and in what is recomputed of it."""
    for adapter in adapters(model).values():
        adapter.set_step(step, micro_batch)
