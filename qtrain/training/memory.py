"""The memory that a step takes, found without taking it: on fake tensors, which have shapes and no storage."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from qtrain.config import Config
from qtrain.errors import UserError
from qtrain.models.decoder import count_parameters
from qtrain.plan import RunPlan, describe_bytes
from qtrain.quant import check_backend
from qtrain.training.activations import checkpoint_activations
from qtrain.training.build import build_model
from qtrain.training.causal_lm import CausalLM
from qtrain.training.parallel import blocks_of

OUT = (
    "shard it over more devices (trainer.strategy=fsdp2), lower trainer.micro_batch_size, or set "
    "trainer.checkpoint_activations=full or trainer.chunked_loss=true"
)


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


def check_state_fits(config: Config, plan: RunPlan, device: torch.device) -> None:
    """UserError where parameters, gradients and optimiser alone take more memory than a device has."""
    state = (8 + config.optimizer.state_bytes) * plan.parameters // shards(config)
    there = memory_of(device)
    if state > there:
        raise UserError(
            f"parameters, gradients and optimizer of {plan.parameters:,} parameters take {describe_bytes(state)} on "
            f"each device, and {device} has {describe_bytes(there)}; {OUT}"
        )


def measure_memory(config: Config, plan: RunPlan) -> Memory:
    """Of a step with the settings of config: the forwards and backwards of at most two micro-batches are done on fake
    tensors, layer by layer, as the run would do them on its device."""
    if config.recipe.operands():
        check_backend(config.backend, config.gemm, "cpu")  # which tries it out, on true tensors
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = CausalLM(config, plan, build_model(config, plan.vocab_size))
        model = module.model
        checkpoint_activations(blocks_of(model), config.trainer.checkpoint_activations)
        batch = torch.zeros(config.trainer.micro_batch_size, config.model.seq_len + 1, dtype=torch.int64)
        tracker = MemTracker()
        tracker.track_external(model)
        mixed = config.trainer.precision == "bf16-mixed"
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=mixed, cache_enabled=False)
        with autocast:
            module.begin_step(0, batch)
        with tracker, module.weights_kept():
            for micro_batch in range(min(plan.micro_batches, 2)):
                tracker.reset_mod_stats()
                with autocast:
                    loss = module.micro_batch_loss(model, batch, 0, micro_batch, 0, 1)
                loss.backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    total, outside = count_parameters(config.model, plan.vocab_size)
    return _on_a_device(config, 4 * total, 4 * (total - outside), config.optimizer.state_bytes * total, peak, plan)


def _on_a_device(config: Config, weights: int, root: int, state: int, peak: int, plan: RunPlan) -> Memory:
    """What a device of several holds of the memory of one. root: bytes of the parameters outside of blocks."""
    count = shards(config)
    kept = weights if plan.micro_batches > 1 else 0  # gradients of the micro-batches before
    working = peak - weights - kept
    gathered = 0 if count == 1 else root + 2 * (weights - root) // config.model.n_layers
    most = max(kept // count + working + gathered, weights // count)
    return Memory(weights // count, weights // count, state // count, weights // count + state // count + most)


def shards(config: Config) -> int:
    """Over how many devices the state of a model is split."""
    trainer = config.trainer
    fully = trainer.strategy == "fsdp2"
    return trainer.devices * trainer.num_nodes // trainer.sharding_groups if fully else 1


def memory_of(device: torch.device) -> int:
    """Bytes that a device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
