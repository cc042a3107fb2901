"""Two FSDP2 steps on two gloo ranks of this machine: peak memory and traffic against the plan. Writes steps.csv.

python experiments/large/step.py

Each case is two processes of their own. Measured of each rank: the largest resident memory while the model is built and
sharded, and until the second step has ended, both less what the process held before; and the whole tensors that
torch.distributed was given to gather and to reduce in the second step. A case that would take more than 60% of the free
memory is refused. It goes on after a stop.
"""

from __future__ import annotations

import csv
import ctypes
import gc
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import distributed, multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from qtrain.config import Config
from qtrain.optim.groups import build_optimizer
from qtrain.plan import make_plan
from qtrain.train import compose
from qtrain.training.activations import checkpoint_activations
from qtrain.training.build import build_model, build_without_weights
from qtrain.training.causal_lm import CausalLM
from qtrain.training.communication import plan_communication
from qtrain.training.memory import measure_memory
from qtrain.training.parallel import blocks_of, shard

RESULTS = Path(__file__).with_name("steps.csv")
RANKS, STEPS = 2, 2
SHARED = [
    "trainer.strategy=fsdp2",
    f"trainer.devices={RANKS}",
    "trainer.precision=32-true",
    "trainer.chunked_loss=true",
    "trainer.checkpoint_activations=full",
    "trainer.micro_batch_size=1",
    "model.seq_len=128",
]
ONE, TWO = "trainer.batch_tokens=256", "trainer.batch_tokens=512"  # micro-batches of each rank
ONE_SHORT = "trainer.batch_tokens=64"
CASES = {  # name: (settings, whether each rank builds the whole model first, as it did before)
    "100M, whole model on each rank first": (["model=llama_100m", "recipe=bf16", ONE], True),
    "100M": (["model=llama_100m", "recipe=bf16", ONE], False),
    "430M, 32 tokens": (["model=llama_430m", "recipe=bf16", ONE_SHORT, "model.seq_len=32"], False),
    "100M, quartet_v1, quantized": (
        ["model=llama_100m", "recipe=quartet_v1", ONE, "trainer.all_gather=quantized"],
        False,
    ),
    "100M, two micro-batches": (["model=llama_100m", "recipe=bf16", TWO], False),
    "100M, adamw8bit": (["model=llama_100m", "recipe=bf16", ONE, "optimizer=adamw8bit"], False),
}


def main() -> None:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "131072"  # glibc gives each larger block back when it is freed
    rows = list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []
    for name, (settings, whole_first) in CASES.items():
        if name in {row["case"] for row in rows}:
            continue
        rows.append({"case": name} | measured([*SHARED, *settings], whole_first))
        print(rows[-1], file=sys.stderr, flush=True)
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def measured(arguments: list[str], whole_first: bool) -> dict[str, Any]:
    config = compose(arguments)
    plan = make_plan(config)
    peak = measure_memory(config, plan, torch.device("cpu")).peak
    start_peak = 4 * plan.parameters if whole_first else 4 * plan.parameters // RANKS
    if RANKS * max(peak, start_peak) > 0.6 * free():
        raise SystemExit(
            f"{arguments}: {RANKS} ranks take {RANKS * peak / 2**30:.1f} GiB, more than 60% of what is free"
        )
    sent = {each.kind.split(", ")[1].split()[0]: 0 for each in plan_communication(config, plan).collectives}
    for each in plan_communication(config, plan).collectives:
        sent[each.kind.split(", ")[1].split()[0]] += each.times * each.payload
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    processes = [
        context.Process(target=on_a_rank, args=(rank, port, arguments, whole_first, answers)) for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    of_ranks = sorted((answers.get() for _ in processes), key=lambda answer: answer["rank"])
    for process in processes:
        process.join()
    mib = 2**20
    row: dict[str, Any] = {"parameters": plan.parameters, "planned_mib": round(peak / mib, 1)}
    for answer in of_ranks:
        rank = answer["rank"]
        row |= {
            f"rank{rank}_start_mib": round(answer["start"] / mib, 1),
            f"rank{rank}_mib": round(answer["peak"] / mib, 1),
        }
    row |= {"ratio": round(peak / max(answer["peak"] for answer in of_ranks), 3)}
    moved = of_ranks[0]["moved"]
    row |= {"planned_gathered": sent["all-gather"], "gathered": moved["all-gather"]}
    row |= {"planned_reduced": sent["reduce-scatter"], "reduced": moved["reduce-scatter"]}
    return row | {"seconds": round(of_ranks[0]["seconds"], 1)}


def free() -> int:
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


class Moved(TorchDispatchMode):
    """Adds up the whole tensors of collectives within it, in bytes by kind."""

    WHOLE: ClassVar = {
        torch.ops.c10d._allgather_base_.default: ("all-gather", 0),
        torch.ops.c10d._reduce_scatter_base_.default: ("reduce-scatter", 1),
    }

    def __init__(self) -> None:
        super().__init__()
        self.found = {"all-gather": 0, "reduce-scatter": 0}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in self.WHOLE:
            kind, at = self.WHOLE[function]
            self.found[kind] += args[at].nbytes
        return function(*args, **(kwargs or {}))


def on_a_rank(rank: int, port: int, arguments: list[str], whole_first: bool, answers: Any) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    tiny = ["model.dim=256", "model.ffn_dim=256", "model.n_layers=1", "model.n_heads=2", "model.vocab_size=512"]
    take_steps(compose([*arguments, *tiny]), whole_first=False)  # loads the libraries
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    started = time.perf_counter()
    start, moved = take_steps(compose(arguments), whole_first)
    seconds = time.perf_counter() - started
    peak = resident("VmHWM")
    answers.put({"rank": rank, "start": start - before, "peak": peak - before, "moved": moved, "seconds": seconds})
    distributed.barrier()
    distributed.destroy_process_group()


def take_steps(config: Config, whole_first: bool) -> tuple[int, dict[str, int]]:
    """(largest resident memory until the model is sharded, what moved in the last step)."""
    plan = make_plan(config)
    model = (build_model if whole_first else build_without_weights)(config, plan.vocab_size)
    module = CausalLM(config, plan, model)
    checkpoint_activations(blocks_of(model), config.trainer.checkpoint_activations)
    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("data_parallel", "tensor_parallel"))
    shard(model, mesh, quantized=config.trainer.all_gather == "quantized")
    assert isinstance(model, FSDPModule)
    start = resident("VmHWM")
    optimizer = build_optimizer(model, config.optimizer)
    rank, moved = distributed.get_rank(), Moved()
    for step in range(STEPS):
        shape = config.trainer.micro_batch_size, config.model.seq_len + 1
        tokens = torch.randint(plan.vocab_size, shape, generator=torch.Generator().manual_seed(rank))
        module.begin_step(step, tokens)
        moved = Moved()
        with module.weights_kept(), moved:
            for micro_batch in range(plan.micro_batches):
                model.set_requires_gradient_sync(micro_batch + 1 == plan.micro_batches)
                loss = module.micro_batch_loss(model, tokens, step, micro_batch, rank, RANKS)
                loss.backward()
                del loss
        optimizer.step()
        optimizer.zero_grad()
    return start, moved.found


def resident(name: str) -> int:
    """Bytes, as /proc has them."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
