"""QuantLinear: an nn.Linear whose three GEMMs run on quantised operands, as a recipe says (functional.py)."""

from __future__ import annotations

import math
import operator
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, SupportsIndex
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from qtrain.config.recipe import LinearRecipe
from qtrain.config.settings import BFLOAT16_GEMMS, Backend, GemmKind
from qtrain.errors import UserError
from qtrain.quant import functional
from qtrain.quant.functional import OPERANDS, Numerics, Observer, read_numerics, text_of_own
from qtrain.quant.random import checked_seed, key_table, keys_beside
from qtrain_kernels.precision import Linear

REMEMBERED = 64  # steps or micro-batches whose forwards can still be recomputed
UNCALIBRATED = (
    "its recipe learns a scale, which has no value yet; call qtrain.calibrate(model, input), or load a checkpoint"
)


class QuantLinear(Linear):
    """An nn.Linear with the same parameters and state dict, whose GEMMs follow a recipe. Made by `qtrain.convert`.

    x (..., K) -> (..., N) in the autocast dtype, or x's own without autocast (bfloat16 or float32). The weight stays
    the master in its own dtype. A recipe that draws random bits needs `qtrain.set_step` before each training forward. A
    learned scale (LSQ) is one more parameter, input_scale (1,) or weight_scale of `Quantizer.learned_shape`, float32,
    which `qtrain.calibrate` or a checkpoint sets. Convert before the optimiser is made: it must know of them.
    """

    input_scale: nn.Parameter | None
    weight_scale: nn.Parameter | None
    rows: Tensor | None

    def __init__(
        self, linear: nn.Linear, recipe: LinearRecipe, name: str, seed: int, backend: Backend, gemm: GemmKind = "auto"
    ) -> None:
        """Takes over linear's parameters; name: its qualified name, which with seed keys its random bits."""
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.text = Numerics.build(recipe, backend, gemm).text
        self.gemm, self.stochastic = gemm, self.numerics.stochastic  # which graphs can ask for
        for side, quantizer in (("input", self.numerics.fprop.left), ("weight", self.numerics.fprop.right)):
            shape = quantizer.learned_shape(linear.out_features, linear.in_features) if quantizer.learned else (0,)
            unset = torch.full(shape, math.nan, dtype=torch.float32, device=linear.weight.device)
            self.register_parameter(f"{side}_scale", nn.Parameter(unset) if quantizer.learned else None)
        self.register_buffer("rows", None)  # (R,) int64, where the gradient of but some rows is wanted (EfQAT)
        self.calibrated = self.input_scale is None and self.weight_scale is None
        self.name, self.seed = name, seed
        self.step_is_set = False
        self.high_precision = False
        self.observer: Observer | None = None
        self.keeps, self.kept, self.kept_of = False, [], ()
        self.train(linear.training)
        fixed = frozenset(each for each in OPERANDS if getattr(self.numerics, each).left.spec.signs == "fixed")
        self.keyed_by = seed, name, fixed, recipe.redraw == "step"  # as `key_table` takes it
        with torch.inference_mode(False):  # no buffer, which ranks would share and to_empty would lose
            self.keys = keys_beside(self.weight, key_table([self.keyed_by], 0, 0)[0])
        self.history: deque[tuple[int, Tensor]] = deque([(-1, self.keys)], REMEMBERED)

    @property
    def numerics(self) -> Numerics:
        return read_numerics(self.text)

    @numerics.setter
    def numerics(self, numerics: Numerics) -> None:
        self.text = text_of_own(numerics)

    def set_step(self, step: SupportsIndex, micro_batch: SupportsIndex) -> None:
        """Keys every draw of the next forward and its backward; see `qtrain.set_step`."""
        set_step(self, step, micro_batch)

    def forward(self, input: Tensor) -> Tensor:
        if self.high_precision:
            return super().forward(input)
        dtype = compute_dtype(self.name, self.gemm, input)
        if input.shape[-1:] != (self.in_features,):
            raise UserError(
                f"{self.name}: expected an input of last dim {self.in_features}, found shape {tuple(input.shape)}; "
                "pass (..., in_features)"
            )
        if input.numel() == 0:
            return F.linear(input.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))
        if self.training and self.stochastic and not self.step_is_set:
            raise UserError(
                f"{self.name}: its recipe draws random bits, and no step is set to key them; call "
                "qtrain.set_step(model, step, micro_batch) before each training forward"
            )
        if not self.calibrated:
            raise UserError(f"{self.name}: {UNCALIBRATED}")
        x = input.reshape(-1, self.in_features)
        y = functional.fprop(
            x, self.weight, self.input_scale, self.weight_scale, self._kept(),
            _learns(self.weight, self.weight_scale), _learns(x, self.input_scale), self.rows, self._keys(input.device),
            self.text, dtype, 0 if self.observer is None else self.observer.number,
        )[0].view(*input.shape[:-1], self.out_features)  # fmt: skip
        return y if self.bias is None else y + self.bias.to(dtype)

    def _kept(self) -> list[Tensor]:
        """The kept weight, unless the weight has been written to since; graphs cannot ask for that."""
        if not self.kept or not self.training:
            return []
        return self.kept if torch.compiler.is_compiling() or self.kept_of[1:] == self._state() else []

    def _state(self) -> tuple[int, int]:
        return id(self.weight), self.weight._version

    def _keys(self, device: torch.device) -> Tensor:
        """Of this forward; of a recomputed one, those of the forward that it repeats: it runs within a backward, by a
        node of the graph that was made after that forward's `set_step` and before the next."""
        keys = self.keys
        if not torch.compiler.is_compiling() and (node := torch._C._current_autograd_node()) is not None:
            number = node._sequence_nr()
            keys = next((keys for first, keys in reversed(self.history) if first <= number), None)
            if keys is None:
                raise UserError(
                    f"{self.name}: a forward of more than {REMEMBERED} calls of qtrain.set_step ago is recomputed; its "
                    "keys are no longer known; run its backward earlier"
                )
        return keys if keys.device == device else keys.to(device)

    def keep(self, step: int) -> None:
        """Quantises the weight for all micro-batches of a step, unless that is done, or there is nothing to keep, as of
        a shard of a weight."""
        weight = self.weight
        if not self.numerics.keeps or self.high_precision or isinstance(weight, DTensor) or weight.is_inference():
            return
        state = step, *self._state()
        if not self.kept or self.kept_of != state:
            self.kept = functional.quantize_weight(
                weight.detach(),
                None,
                True,
                self._keys(weight.device),
                self.text,
                torch.bfloat16,
                0 if self.observer is None else self.observer.number,
            )
            self.kept_of = state

    def _apply(self, fn: Any, recurse: bool = True) -> QuantLinear:
        """Keys move too: a copy in each forward would hold up a GPU."""
        super()._apply(fn, recurse)
        self.keys = keys_beside(self.weight, self.keys)
        self.history = deque(((first, keys_beside(self.weight, keys)) for first, keys in self.history), REMEMBERED)
        return self

    def reset_parameters(self) -> None:
        """As nn.Linear's; a learned scale has no value again."""
        super().reset_parameters()
        for name in ("input_scale", "weight_scale"):
            if self._parameters.get(name) is not None:
                nn.init.constant_(getattr(self, name), math.nan)
                self.calibrated = False

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        scales = (name for name in ("input_scale", "weight_scale") if getattr(self, name) is not None)
        self.calibrated = self.calibrated or all(f"{prefix}{name}" in state_dict for name in scales)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out the kept weight and the steps of past forwards."""
        history = deque([(-1, self.keys)], REMEMBERED)
        return super().__getstate__() | {
            "kept": [],
            "kept_of": (),
            "keeps": False,
            "history": history,
            "observer": None,
        }

    def extra_repr(self) -> str:
        """Widths, number formats, and what they run on; the Report of `qtrain.convert` says all of a recipe."""
        state = "high precision, after " if self.high_precision else ""
        runs = self.numerics.runs_on(self.weight.device.type)
        return f"{super().extra_repr()}, {state}{self.numerics.formats} | {runs}"


def compute_dtype(name: str, gemm: str, input: Tensor) -> torch.dtype:
    """In which a layer multiplies: autocast's, or the input's own. UserError, naming the layer, for one that its GEMMs
    do not have."""
    device_type = input.device.type
    autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)  # which knows no meta device
    dtype = torch.get_autocast_dtype(device_type) if autocast else input.dtype
    if gemm in BFLOAT16_GEMMS and dtype != torch.bfloat16:
        raise UserError(
            f"{name}: gemm {gemm!r} gives products in bfloat16; the compute dtype is {dtype}; "
            "use torch.autocast(..., dtype=torch.bfloat16), or convert with gemm='auto'"
        )
    if dtype not in (torch.bfloat16, torch.float32):
        raise UserError(
            f"{name}: quantised GEMMs run in bfloat16 or float32; the compute dtype is {dtype}; "
            "use torch.autocast(..., dtype=torch.bfloat16)"
        )
    return dtype


def _learns(tensor: Tensor, scale: Tensor | None) -> bool:
    """Whether a backward will want the gradient of an operand or of its learned scale."""
    return torch.is_grad_enabled() and (tensor.requires_grad or (scale is not None and scale.requires_grad))


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is called before or after a module's forward or backward, as an adapter is."""
    return any(getattr(module, f"_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre"))


def quant_linears(model: nn.Module) -> list[QuantLinear]:
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


def set_step(model: nn.Module, step: SupportsIndex, micro_batch: SupportsIndex = 0) -> None:
    """Key the random bits of every QuantLinear in model by the optimiser step and the micro-batch within it.

    Call it before every training forward: with another step after every optimiser step, and with another micro_batch
    for each further forward of the same step. Without it, a forward repeats the noise of the last. It changes nothing
    of earlier forwards: their backwards, and what activation checkpointing recomputes of them, keep their own noise.
    The exception is a compiled model inside an activation checkpoint that is not itself compiled: there, call it after
    the backward. A layer used twice in one forward draws the same bits twice. `LinearRecipe.redraw` says whether
    micro-batches of a step share the weight's noise.
    """
    step, micro_batch = operator.index(step), operator.index(micro_batch)
    layers = quant_linears(model)
    drawing = [layer for layer in layers if layer.stochastic]
    if drawing:
        with torch.inference_mode(False):
            _hand_out(key_table([layer.keyed_by for layer in drawing], step, micro_batch), drawing)
    for layer in layers:
        layer.step_is_set = True
        if layer.keeps:
            layer.keep(step)


def _hand_out(table: Tensor, layers: Sequence[QuantLinear]) -> None:
    """A row of the table to each layer, in one copy to each device."""
    first = torch.autograd._get_sequence_nr()  # of the nodes that are made from here on
    for device in dict.fromkeys(layer.weight.device for layer in layers):
        if device.type != "meta":
            rows = table.to(device, non_blocking=True).unbind()
            for layer, keys in zip(layers, rows, strict=True):
                if layer.weight.device == device:
                    layer.keys = keys
                    layer.history.append((first, keys))


def set_seed(model: nn.Module, seed: SupportsIndex) -> None:
    """Another seed than that of `qtrain.convert` for the random bits of every QuantLinear in model, from the next
    `set_step` on. UserError for what is no seed."""
    seed = checked_seed(seed)
    for layer in quant_linears(model):
        layer.seed, layer.keyed_by = seed, (seed, *layer.keyed_by[1:])


_keepers: WeakSet[QuantLinear] = WeakSet()


def sees_tokens_apart(model: nn.Module) -> bool:
    """Whether each token is quantised by itself in a forward: no scale of a tensor or a tile of rows, no rotation over
    rows, and no random bits, which are those of a token's place in the batch. Then a token's output is the same
    whichever others are computed with it."""
    found = (getattr(module, "numerics", None) for module in model.modules())  # of packed layers too
    sides = [numerics.fprop.left for numerics in found if isinstance(numerics, Numerics)]
    return not any(
        side.draws
        or side.spec.row_rotation is not None
        or (side.plan is not None and (side.plan.per_tensor or side.plan.scale_kind == "minifloat" or side.tile[0] > 1))
        for side in sides
    )


@contextmanager
def keep_weights(model: nn.Module) -> Iterator[None]:
    """Within it, a weight is quantised once for all micro-batches of an optimiser step, in the bits of its format.

    `set_step` quantises it, when it is called with another step or finds the weight changed; a step of an optimiser of
    torch drops it. Only what can be packed and is the same in all micro-batches is kept, and nothing of a weight that
    is sharded (FSDP2), since what is kept would be whole on every rank. What torch does not see (a write to
    weight.data, an optimiser of another library) must be followed by a set_step with another step. Use it where a step
    has several micro-batches:

        with qtrain.keep_weights(model):
            for micro_batch, batch in enumerate(batches):
                qtrain.set_step(model, step, micro_batch)
                loss(model(batch)).backward()
        optimizer.step()
    """
    _watch_optimizers()
    layers = quant_linears(model)
    _keepers.update(layers)
    for layer in layers:
        layer.keeps = True
    try:
        yield
    finally:
        for layer in layers:
            layer.keeps, layer.kept, layer.kept_of = False, [], ()
            _keepers.discard(layer)


@cache
def _watch_optimizers() -> None:
    """Have every optimiser's step drop what is kept. Not on import, of which torch.compiler takes half a second."""
    hook: Any = torch.compiler.disable(_drop_kept)
    register_optimizer_step_post_hook(hook)


def _drop_kept(*_: Any) -> None:
    for layer in _keepers:
        layer.kept, layer.kept_of = [], ()
