"""The memory that a step takes, found without taking it: on fake tensors, which have shapes and no storage."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule

from qtrain.config import Config
from qtrain.errors import UserError
from qtrain.models.decoder import Decoder
from qtrain.plan import RunPlan
from qtrain.quant import check_backend
from qtrain.training.activations import checkpoint_activations
from qtrain.training.build import build_model
from qtrain.training.causal_lm import CausalLM
from qtrain.training.parallel import blocks_of, imagined_mesh, shard
from qtrain.training.tune import state_bytes
from qtrain.units import describe_bytes

FEW, MORE = 4, 8  # blocks, of which the difference is what a block takes


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. peak: of all that is alive at once at the worst moment of a step, parameters, gradients and
    the optimiser's state included. The allocator's slack and the workspaces of libraries come on top.

    parameters, gradients, optimizer: of the device's shards, where there are several. rest: what else there is.
    """

    parameters: int
    gradients: int
    optimizer: int
    peak: int
    rest: str = "activations"

    def describe(self) -> str:
        parts = {"parameters": self.parameters, "gradients": self.gradients, "optimizer": self.optimizer}
        held = ", ".join(f"{name} {describe_bytes(size)}" for name, size in parts.items())
        return f"about {describe_bytes(self.peak)} on each device at the peak of a step: {held}, the rest {self.rest}"

    def excess(self, config: Config, device: torch.device) -> str | None:
        """What to say where a device of this machine has less; None where it has enough."""
        there = memory_of(config, device)
        if self.peak <= there:
            return None
        return (
            f"a step takes about {describe_bytes(self.peak)} on each device, and {device} has {describe_bytes(there)}: "
            "shard the model over more devices (trainer.strategy=fsdp2), lower trainer.micro_batch_size, or set "
            "trainer.checkpoint_activations=full or trainer.chunked_loss=true"
        )


def check_state_fits(config: Config, plan: RunPlan, device: torch.device) -> None:
    """UserError where parameters, gradients and optimiser alone take more memory than a device has."""
    state = sum(_state_bytes(config, plan)) // config.trainer.shards
    there = memory_of(config, device)
    if state > there:
        raise UserError(
            f"parameters, gradients and optimizer of {plan.parameters:,} parameters take {describe_bytes(state)} on "
            f"each device, and {device} has {describe_bytes(there)}; shard them over more devices "
            "(trainer.strategy=fsdp2), or take a smaller model"
        )


def measure_memory(config: Config, plan: RunPlan, device: torch.device) -> Memory:
    """Of a step with the settings of config, on a type of device that this machine has: the forwards and backwards of
    at most two micro-batches are done on fake tensors, layer by layer, as the run would do them without
    trainer.compile. FSDP2 shards them over ranks that are not started. A deep model whose blocks are all alike takes
    for each block what the last of a few took."""
    recipe, layers = config.recipe, config.model.n_layers
    if recipe.operands():
        check_backend(config.backend, config.gemm, device.type)  # which tries it out, on true tensors
    alike = not (recipe.first_blocks or recipe.last_blocks or recipe.overrides)
    if layers <= MORE or not alike:
        return _with_optimizer(config, plan, _peak(config, plan, device))
    few, more = (
        _peak(config.model_copy(update={"model": config.model.model_copy(update={"n_layers": count})}), plan, device)
        for count in (FEW, MORE)
    )
    return _with_optimizer(config, plan, more + (layers - MORE) * (more - few) // (MORE - FEW))


def _peak(config: Config, plan: RunPlan, device: torch.device) -> int:
    """Bytes of parameters, gradients and activations on one device while forwards and backwards are done."""
    from torch.distributed._tools.mem_tracker import MemTracker  # private: a torch that moves it leaves runs alone

    # A mask of documents takes no memory, and fake tokens have no borders.
    config = config.model_copy(update={"data": config.data.model_copy(update={"document_mask": False})})
    trainer = config.trainer
    passes = min(plan.micro_batches, 2)
    if trainer.strategy != "fsdp2" and trainer.world_size > 1:
        passes = 2  # DDP's gradients lie in buckets that are there before the first backward
    with ExitStack() as stack:
        mesh = stack.enter_context(imagined_mesh(trainer, device)) if trainer.strategy == "fsdp2" else None
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(device)
        module = CausalLM(config, plan, build_model(_unpacked(config), plan.vocab_size))
        model = module.model
        _hold_frozen(model)
        checkpoint_activations(blocks_of(model), trainer.checkpoint_activations)
        if mesh is not None:
            shard(model, mesh, trainer.sharding_groups, trainer.all_gather == "quantized")
        batch = torch.zeros(trainer.micro_batch_size, config.model.seq_len + 1, dtype=torch.int64)
        tracker = MemTracker()
        tracker.track_external(model)
        mixed = trainer.precision == "bf16-mixed"
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=mixed, cache_enabled=False)
        with autocast:
            module.begin_step(0, batch)
        with tracker, module.weights_kept():
            for micro_batch in range(passes):
                tracker.reset_mod_stats()
                if isinstance(model, FSDPModule):
                    model.set_requires_gradient_sync(micro_batch + 1 == passes)
                with autocast:
                    loss = module.micro_batch_loss(model, batch, 0, micro_batch, 0, 1)
                loss.backward()
    peaks = tracker.get_tracker_snapshot("peak")
    return next(of["Total"] for at, of in peaks.items() if at.type == device.type)


def _hold_frozen(model: nn.Module) -> None:
    """Parameters that do not train become buffers: torch's tracker hangs a hook on the gradient of every parameter."""
    for module in model.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            if not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.detach())


def _with_optimizer(config: Config, plan: RunPlan, peak: int) -> Memory:
    """peak: as `_peak` gives it."""
    weights, gradients, state = (size // config.trainer.shards for size in _state_bytes(config, plan))
    at_the_update = weights + gradients  # and no activations
    rest = "activations"
    if config.trainer.strategy == "fsdp2":
        rest = "activations and gathered weights"
        if plan.micro_batches > 1:
            whole = describe_bytes(4 * plan.parameters)
            rest += f" and, until the last micro-batch, the whole gradients ({whole}), which FSDP2 then reduces"
    if config.tune and config.tune.adapter and config.tune.adapter.pack:
        peak += weights - state_bytes(_without_weights(_unpacked(config), plan))[0]
    return Memory(weights, gradients, state, state + max(peak, at_the_update), rest)


def _state_bytes(config: Config, plan: RunPlan) -> tuple[int, int, int]:
    """(weights, gradients, state of the optimiser) of the whole model."""
    model = _without_weights(config, plan)
    trains = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return *state_bytes(model), sum(config.optimizer.state_bytes(tuple(each.shape)) for each in trains)


def _without_weights(config: Config, plan: RunPlan) -> Decoder:
    with torch.device("meta"):
        return build_model(config, plan.vocab_size)


def _unpacked(config: Config) -> Config:
    """The settings with a base that is not packed: fake tensors cannot be packed."""
    if not (config.tune and config.tune.adapter and config.tune.adapter.pack):
        return config
    adapter = config.tune.adapter.model_copy(update={"pack": False, "double_quantization": False})
    return config.model_copy(update={"tune": config.tune.model_copy(update={"adapter": adapter})})


def memory_of(config: Config, device: torch.device) -> int:
    """Bytes that each device of a run has. Ranks on CPUs share those of their machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // config.trainer.devices
