"""How many processes train together, and which of them this one is, as its launcher says. Nothing is started here, and
torch is not needed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qtrain.config import TrainerConfig
from qtrain.errors import UserError

Launcher = Literal["nobody", "fabric", "torchrun", "slurm"]

# What launchers tell each process of their number, in the order in which they are believed: torchrun may run in SLURM.
SIZES = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@dataclass(frozen=True)
class World:
    """size: processes of the run; rank: the number of this one, from 0.

    launcher: nobody (one process), fabric (the first process of each node starts the others), torchrun or slurm.
    starts_others: whether this process will start the others of its node.
    """

    size: int
    rank: int
    launcher: Launcher
    starts_others: bool = False

    @property
    def alone(self) -> bool:
        """Whether no other process runs yet."""
        return self.size == 1 or (self.starts_others and self.rank == 0)

    @property
    def has_parent(self) -> bool:
        """Whether the process that started this one has to live on for the run to make sense."""
        return self.launcher == "torchrun" or (self.launcher == "fabric" and not self.starts_others)


def find_world(trainer: TrainerConfig, environment: Mapping[str, str] = os.environ) -> World:
    """UserError when a launcher has started another number of processes than trainer.devices x trainer.num_nodes: each
    would train alone, in one and the same run directory."""
    size = trainer.world_size
    name = next((name for name in SIZES if name in environment), None)
    asked = f"trainer.devices={trainer.devices} x trainer.num_nodes={trainer.num_nodes}"
    if name is not None and environment[name] != str(size):
        raise UserError(
            f"the launcher started {environment[name]} processes ({name}), and {asked} is {size}; set trainer.devices "
            "to the processes of a node and trainer.num_nodes to the nodes, or start as many"
        )
    if size == 1:
        return World(1, 0, "nobody")
    if "TORCHELASTIC_RUN_ID" in environment:
        return World(size, int(environment["RANK"]), "torchrun")
    if "SLURM_NTASKS" in environment:
        if "SLURM_PROCID" not in environment or "SLURM_LOCALID" not in environment:
            raise UserError(f"{asked}: SLURM gives this process no number; start it with srun")
        return World(size, int(environment["SLURM_PROCID"]), "slurm")
    if name not in (None, "WORLD_SIZE") or ("RANK" in environment and "LOCAL_RANK" not in environment):
        raise UserError(f"{asked}: the launcher is none that is known ({name or 'RANK'} is set); use torchrun or srun")
    if trainer.num_nodes > 1 and not {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"} <= environment.keys():
        raise UserError(
            f"{asked}: on each node, start with torchrun or srun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK"
        )
    node, local = int(environment.get("NODE_RANK", 0)), environment.get("LOCAL_RANK")
    return World(size, node * trainer.devices + int(local or 0), "fabric", starts_others=local is None)


def started_by_another(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one that the first process of its node has started."""
    others = ("TORCHELASTIC_RUN_ID", "SLURM_PROCID")
    return environment.get("LOCAL_RANK", "0") != "0" and not any(name in environment for name in others)
