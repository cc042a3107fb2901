"""The memory that a step takes, found without taking it: on fake tensors, which have shapes and no storage."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qtrain.config import Config
from qtrain.errors import UserError
from qtrain.models.decoder import count_parameters
from qtrain.plan import RunPlan, describe_bytes
from qtrain.quant import check_backend
from qtrain.training.activations import checkpoint_activations
from qtrain.training.build import build_model
from qtrain.training.causal_lm import CausalLM
from qtrain.training.parallel import blocks_of

FEW, MORE = 4, 8  # blocks, of which the difference is what a block takes


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. peak: of all that is alive at once at the worst moment of a step, parameters, gradients and
    the optimiser's state included. The allocator's slack and the workspaces of libraries come on top."""

    parameters: int
    gradients: int
    optimizer: int
    peak: int

    def describe(self) -> str:
        parts = {"parameters": self.parameters, "gradients": self.gradients, "optimizer": self.optimizer}
        held = ", ".join(f"{name} {describe_bytes(size)}" for name, size in parts.items())
        return f"about {describe_bytes(self.peak)} on each device at the peak of a step: {held}, the rest activations"

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
    state = (8 + config.optimizer.state_bytes) * plan.parameters // config.trainer.shards
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
    trainer.compile. A deep model whose blocks are all alike takes for each block what the last of a few took."""
    recipe, layers = config.recipe, config.model.n_layers
    if recipe.operands():
        check_backend(config.backend, config.gemm, device.type)  # which tries it out, on true tensors
    alike = not (recipe.first_blocks or recipe.last_blocks or recipe.overrides)
    if layers <= MORE or not alike:
        return _on_each_device(config, plan, _peak(config, plan, device))
    few, more = (
        _peak(config.model_copy(update={"model": config.model.model_copy(update={"n_layers": count})}), plan, device)
        for count in (FEW, MORE)
    )
    return _on_each_device(config, plan, more + (layers - MORE) * (more - few) // (MORE - FEW))


def _peak(config: Config, plan: RunPlan, device: torch.device) -> int:
    """Bytes of parameters, gradients and activations on one device that does all alone."""
    from torch.distributed._tools.mem_tracker import MemTracker  # private: a torch that moves it leaves runs alone

    # A mask of documents takes no memory, and fake tokens have no borders.
    config = config.model_copy(update={"data": config.data.model_copy(update={"document_mask": False})})
    with FakeTensorMode(allow_non_fake_inputs=True), device:
        module = CausalLM(config, plan, build_model(config, plan.vocab_size))
        model = module.model
        checkpoint_activations(blocks_of(model), config.trainer.checkpoint_activations)
        shape = config.trainer.micro_batch_size, config.model.seq_len + 1
        batch = torch.zeros(shape, dtype=torch.int64)
        tracker = MemTracker()
        tracker.track_external(model)
        mixed = config.trainer.precision == "bf16-mixed"
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=mixed, cache_enabled=False)
        with autocast:
            module.begin_step(0, batch)
        with tracker, module.weights_kept():
            for micro_batch in range(min(plan.micro_batches, 2)):
                tracker.reset_mod_stats()
                with autocast:
                    loss = module.micro_batch_loss(model, batch, 0, micro_batch, 0, 1)
                loss.backward()
    peaks = tracker.get_tracker_snapshot("peak")
    return next(of["Total"] for at, of in peaks.items() if at.type == device.type)


def _on_each_device(config: Config, plan: RunPlan, peak: int) -> Memory:
    """What each of several devices holds of the memory that a step takes on one: its shards of parameters, gradients
    and the optimiser's state, all activations of its own micro-batch, and what FSDP2 has gathered at a time: the
    parameters outside of blocks, and those of the block at work and of the next. peak: of parameters, gradients and
    activations, in bytes."""
    count, layers = config.trainer.shards, config.model.n_layers
    total, in_blocks = count_parameters(config.model, plan.vocab_size)
    weights, state = 4 * total, config.optimizer.state_bytes * total
    gradients_before = weights if plan.micro_batches > 1 else 0  # those of the micro-batches before are there too
    activations = peak - weights - gradients_before
    gathered = 0 if count == 1 else 4 * (total - in_blocks) + 2 * 4 * in_blocks // layers
    while_training = gradients_before // count + activations + gathered
    at_the_update = weights // count  # all gradients, and no activations
    worst = max(while_training, at_the_update)
    return Memory(weights // count, weights // count, state // count, (weights + state) // count + worst)


def memory_of(config: Config, device: torch.device) -> int:
    """Bytes that each device of a run has. Ranks on CPUs share those of their machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // config.trainer.devices
