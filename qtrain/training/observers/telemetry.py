"""How the quantisers fare, layer by layer: lines of their own in metrics.jsonl.

    quant/<layer>/<operand>/<metric>    quant/layers.0.mlp.down/wgrad.dy/sqnr_db, as `operand_health` defines them
    grad/<layer>/cosine, projection     <g_hat, g> / |g_hat| |g| and <g_hat, g> / <g, g>

Taken in the first micro-batch of a step, of the operands and gradients that this very step trains with: nothing is
quantised again, and nothing of the step changes. g_hat is the layer's weight gradient in that micro-batch, or that of
the rows that train (tune.rows), g the one that a second forward and backward of the same loss give where every layer
computes in the compute dtype. Every rank takes them, since sharded weights need all; those of rank 0 are written.
A value that is not finite (of a gradient of zeros, of an operand without error) is left out, for JSON has none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qtrain.quant import Observed, Observer, QuantLinear, operand_health, quant_linears, set_high_precision
from qtrain.training.causal_lm import CausalLM
from qtrain.training.observers import observer
from qtrain.training.observers.measure import Recorder

MAX_LINES = 64  # of an operand: an SQNR of all lines differs by 0.2 dB (RMS over nano's layers, Quartet, step 60)


class Telemetry(observer.Observer):
    """Every `every` steps (0: never); with `gradients`, weight gradients too, at the price of one more forward and
    backward.

    Values stay on the device until the step has ended. Layers that compute in high precision have none.
    """

    def __init__(self, recorder: Recorder, every: int, gradients: bool, max_lines: int = MAX_LINES):
        self.recorder, self.module = recorder, recorder.module
        self.every = every
        self.gradients = gradients
        self.max_lines = max_lines
        self.values: dict[str, Tensor] = {}
        self.observers: dict[QuantLinear, Observer] = {}
        self.seen: dict[QuantLinear, Tensor] = {}  # the weight gradients of this step's first micro-batch
        self.batch: Tensor | None = None  # that is being watched

    def on_micro_batch_start(self, step: int, micro_batch: int, batch: Tensor) -> None:
        if micro_batch or not self.every or (step + 1) % self.every:
            return
        self.batch = batch
        for layer in quant_linears(self.module.model):
            if layer not in self.observers:  # one for each layer: a compiled graph is made for its number
                self.observers[layer] = self._observer(layer)
            layer.observer = self.observers[layer]

    def _observer(self, layer: QuantLinear) -> Observer:
        def operand(seen: Observed) -> None:
            for metric, value in operand_health(seen, self.max_lines).items():
                self.values[f"quant/{layer.name}/{seen.use}/{metric}"] = value

        def gradient(grad_weight: Tensor) -> None:
            if self.gradients:
                self.seen[layer] = grad_weight

        return Observer(operand, gradient)

    def on_backward_end(self) -> None:
        if self.batch is None:
            return
        for layer in quant_linears(self.module.model):
            layer.observer = None
        if self.seen:
            exact = exact_gradients(self.module, self.batch, list(self.seen))
            for (layer, found), wanted in zip(self.seen.items(), exact, strict=True):
                wanted = wanted if layer.rows is None else wanted[layer.rows]
                cosine, projection = agreement(found * self.module.plan.micro_batches, wanted)
                self.values[f"grad/{layer.name}/cosine"] = cosine
                self.values[f"grad/{layer.name}/projection"] = projection
        self.batch, self.seen = None, {}

    def on_step_end(self, step: int) -> None:
        if not self.values:
            return
        numbers = torch.stack([value.float() for value in self.values.values()]).tolist()
        found = {name: float(f"{x:.6g}") for name, x in zip(self.values, numbers, strict=True) if math.isfinite(x)}
        self.values = {}
        self.recorder.write(step, found)


def exact_gradients(module: CausalLM, batch: Tensor, layers: list[QuantLinear]) -> list[Tensor]:
    """The weight gradients of the training's loss of this rank's batch (B, T+1), with every layer in the compute dtype.
    The gradients that the model holds are left alone. Where weights are sharded, every rank must call this."""
    mixed = module.config.trainer.precision == "bf16-mixed"
    weights: dict[nn.Module, Tensor] = {}

    def note(layer: nn.Module, _: tuple[Tensor, ...]) -> None:
        weights[layer] = layer.weight  # pyright: ignore[reportArgumentType]: whole, also of a sharded layer

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    set_high_precision(module.model)
    try:
        with torch.enable_grad(), torch.autocast(batch.device.type, torch.bfloat16, enabled=mixed):
            loss = module.loss(module.model, batch)
        return list(torch.autograd.grad(loss, [weights[layer] for layer in layers]))
    finally:
        set_high_precision(module.model, False)
        for hook in hooks:
            hook.remove()


def agreement(found: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """(cosine, projection of found on exact, 1 where they are equal), float64: squares of small gradients are no
    float32."""
    found, exact = found.double().flatten(), exact.double().flatten()
    product, norm = found @ exact, torch.linalg.vector_norm(exact)
    return product / (norm * torch.linalg.vector_norm(found)), product / norm.square()
