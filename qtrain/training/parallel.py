"""The processes of a run: how they start, meet, agree, and share or shard the model. On Lightning Fabric."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from inspect import signature
from typing import Any, TypeVar, cast

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from qtrain.config import Config, TrainerConfig
from qtrain.errors import RefusedError, UserError
from qtrain.quant import quantize_gathers
from qtrain.training.initialize import DEFERRED, draw_shards
from qtrain.training.stop import StopRequest
from qtrain.training.world import World

log = logging.getLogger("qtrain")
T = TypeVar("T")

ROLL_CALL_SECONDS = 5.0  # for a rank to answer when others have waited for one in vain
MEETING_SECONDS = 50.0  # for all processes to start, of which importing torch takes the most
# The buffers are tables, equal on all ranks. torch 2.13 has another word for not sending them at each forward.
_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in signature(DistributedDataParallel).parameters
)
PARENT_SECONDS = 1.0  # how often a process looks whether its launcher lives


class Ranks:
    """What the processes of a run tell each other beside the gradients: numbers and decisions, between their CPUs, so
    that no device is waited for. rank: of this process, from 0; size: how many there are; timeout: how long they wait
    for each other."""

    def __init__(self, rank: int = 0, size: int = 1, timeout: timedelta | None = None):
        self.rank, self.size, self.timeout = rank, size, timeout
        # A group in which a rank was waited for in vain is of no use afterwards: the roll is called in another.
        self._group, self._roll_group = (
            cast(distributed.ProcessGroup, distributed.new_group(backend="gloo", timeout=timeout)) if size > 1 else None
            for _ in range(2)
        )

    @property
    def is_zero(self) -> bool:
        return self.rank == 0

    def maximum(self, *values: float) -> list[float]:
        """Of each value, the largest that a rank has."""
        return self._reduced(values, distributed.ReduceOp.MAX)

    def total(self, *values: float) -> list[float]:
        return self._reduced(values, distributed.ReduceOp.SUM)

    def _reduced(self, values: tuple[float, ...], operation: Any) -> list[float]:
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(tensor, operation, group=self._group)
        return tensor.tolist()

    def decided(self, decide: Callable[[], T]) -> T:
        """What rank 0 decides, on every rank. An error of rank 0 ends all: RefusedError on the others."""
        if self.size == 1:
            return decide()
        found: list[Any] = [None, True]
        if self.is_zero:
            try:
                found = [decide(), False]
            except BaseException:
                distributed.broadcast_object_list(found, 0, group=self._group)
                raise
        distributed.broadcast_object_list(found, 0, group=self._group)
        if found[1]:
            raise RefusedError("rank 0 has refused to go on")
        return found[0]

    def meet(self) -> None:
        """Return when every rank has called this."""
        self.maximum(0.0)

    @contextmanager
    def naming_the_silent(self) -> Iterator[None]:
        """Within it, who waits in vain for another rank in a collective of gloo learns which one does not answer:
        SilentRankError."""
        try:
            yield
        except Exception as error:
            if self.size == 1 or not _has_waited_in_vain(error):
                raise
            raise SilentRankError(f"{self._silent()} for {self.timeout}") from error

    def _silent(self) -> str:
        """All who have waited in vain are here at the same time, give or take a step."""
        seconds = timedelta(seconds=ROLL_CALL_SECONDS)
        try:
            distributed.monitored_barrier(self._roll_group, seconds, wait_all_ranks=True)
        except RuntimeError as error:
            if not self.is_zero:
                return "rank 0 does not answer, or names another that does not,"
            missing = re.search(r"[Rr]anks? ([\d, ]*\d) failed to pass", str(error))
            return f"rank {missing[1]} does not answer" if missing else "a rank does not answer"
        return "ranks wait for each other in different collectives"


class SilentRankError(RuntimeError):
    """A rank does not answer, though it has not ended."""


def _has_waited_in_vain(error: BaseException) -> bool:
    return any("Timed out waiting" in str(cause) for cause in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def is_lost_rank(error: BaseException) -> bool:
    """Whether the error, or what it came from, says that another rank no longer answers."""
    return any(isinstance(cause, distributed.DistError) or "gloo/transport" in str(cause) for cause in _causes(error))


# --------------------------------------------------------------------------------------------------------------- start


@contextmanager
def joined(config: Config, world: World, device: torch.device, stop: StopRequest) -> Iterator[tuple[Fabric, Ranks]]:
    """All processes of the run, started and met. They are parted again at the end."""
    environment = dict(os.environ)
    try:
        fabric = _fabric(config, world, device)
        if world.has_parent:
            _follow_parent(stop)
        with stop.meeting(MEETING_SECONDS, f"{world.size} processes did not meet"):
            fabric.launch()
            ranks = Ranks(fabric.global_rank, fabric.world_size, _timeout(config))
            ranks.meet()
        with ranks.naming_the_silent():
            yield fabric, ranks
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        for name in os.environ.keys() - environment.keys():  # which the launch has set for the processes it started
            del os.environ[name]


def _fabric(config: Config, world: World, device: torch.device) -> Fabric:
    trainer = config.trainer
    assert trainer.precision != "auto"  # the settings of a run are resolved
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    try:
        return Fabric(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=trainer.devices,
            num_nodes=trainer.num_nodes,
            strategy=_strategy(config, world, device),
            precision=trainer.precision,
            plugins=[_environment(world)],
        )
    except RuntimeError as error:  # Lightning's checks of SLURM's variables
        if world.launcher != "slurm":
            raise
        raise UserError(f"cannot start {world.size} processes by {world.launcher}: {error}") from None


def _environment(world: World) -> ClusterEnvironment:
    if world.launcher == "torchrun":
        return TorchElasticEnvironment()
    if world.launcher == "slurm":
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()


def _timeout(config: Config) -> timedelta:
    return timedelta(minutes=config.trainer.timeout_minutes)


def _strategy(config: Config, world: World, device: torch.device) -> Strategy:
    trainer = config.trainer
    if trainer.strategy == "fsdp2":
        copies = trainer.sharding_groups
        return ModelParallelStrategy(
            partial(shard, groups=copies, quantized=trainer.all_gather == "quantized"),
            data_parallel_size=copies,
            tensor_parallel_size=world.size // copies,
            timeout=_timeout(config),
        )
    if trainer.strategy == "ddp" or world.size > 1:
        options: dict[str, Any] = {"gradient_as_bucket_view": True, "timeout": _timeout(config), _BUFFERS: False}
        return DDPStrategy(**options)
    return SingleDeviceStrategy(device if device.type == "cpu" else torch.device("cuda", 0))


def _follow_parent(stop: StopRequest) -> None:
    """A process whose launcher was killed stops too, and saves: it would go on unseen."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        stop.ask_from_outside()

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


# --------------------------------------------------------------------------------------------------------------- shard


def shard(model: nn.Module, mesh: DeviceMesh, groups: int = 1, quantized: bool = False) -> nn.Module:
    """FSDP2: parameters, gradients and optimiser state sharded, block by block and in the root. No mixed-precision
    policy: weights and gradients travel in float32, so that each rank quantises the whole master weight, with the
    noise, masks and scales of one process. groups: how many groups of ranks hold a whole model each. quantized: weights
    of quantised layers travel as codes, which are the same (`qtrain.quant.gather`). A model of
    `build.build_without_weights` gets its initial weights here, each rank its shard of them."""
    mesh = mesh if groups > 1 else mesh["tensor_parallel"]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    deferred = model.__dict__.pop(DEFERRED, None)
    if deferred is not None:
        draw_shards(model, deferred, names, torch.device(mesh.device_type))
    if quantized:
        quantize_gathers(model)
    return model


@contextmanager
def imagined_mesh(trainer: TrainerConfig, device: torch.device) -> Iterator[DeviceMesh]:
    """The mesh that `shard` takes, of a run whose ranks are not started: a collective returns at once and gives any
    values. This process is rank 0."""
    from torch.testing._internal.distributed.fake_pg import (
        FakeStore,
    )  # private: a torch that moves it leaves runs alone

    groups = trainer.sharding_groups
    distributed.init_process_group("fake", rank=0, world_size=trainer.world_size, store=FakeStore())
    try:
        shape, names = (groups, trainer.world_size // groups), ("data_parallel", "tensor_parallel")
        yield init_device_mesh(device.type, shape, mesh_dim_names=names)
    finally:
        distributed.destroy_process_group()


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return list(model.layers)  # pyright: ignore[reportArgumentType]


def check_strategy(config: Config) -> None:
    """UserError for groups that do not divide the devices, and for what all_gather=quantized does not go with."""
    trainer, size = config.trainer, config.trainer.world_size
    if trainer.sharding_groups > 1 and (trainer.strategy != "fsdp2" or size % trainer.sharding_groups):
        raise UserError(
            f"trainer.sharding_groups={trainer.sharding_groups} needs trainer.strategy=fsdp2 and must divide "
            f"{size} devices; found strategy {trainer.strategy}"
        )
    if trainer.all_gather == "full":
        return
    others = (  # each reads the values of a whole weight, or has a graph made of the layers
        ("trainer.strategy", trainer.strategy, trainer.strategy == "fsdp2", "set it to fsdp2"),
        ("trainer.compile", trainer.compile, not trainer.compile, "set it to false"),
        ("callbacks.telemetry_gradients", True, not config.callbacks.telemetry_gradients, "set it to false"),
        (
            "recipe.high_precision_after", config.recipe.high_precision_after,
            config.recipe.high_precision_after is None, "set it to null",
        ),
    )  # fmt: skip
    for name, found, fits, remedy in others:
        if not fits:
            raise UserError(
                f"trainer.all_gather=quantized gathers no values of weights, and does not go with {name}={found}; "
                f"{remedy}, or trainer.all_gather to full"
            )
