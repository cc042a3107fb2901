"""What dry runs say of models of 1.6 and 7 billion parameters. Writes plan.csv beside it, and goes on after a stop.

python experiments/large/plan.py

Nothing is trained and no rank is started: memory is measured on fake tensors, traffic and hours are arithmetic. With
--table it prints the rows as the README has them.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import torch

from qtrain.plan import make_plan
from qtrain.train import compose
from qtrain.training.communication import plan_communication
from qtrain.training.memory import measure_memory

RESULTS = Path(__file__).with_name("plan.csv")
TFLOPS, GIGABYTES_PER_SECOND = 300, 50  # stated, of no device in particular
SHARED = [
    "recipe=quartet_v1",
    "trainer.strategy=fsdp2",
    "trainer.precision=bf16-mixed",
    "trainer.chunked_loss=true",
    "trainer.tokens=null",
    "trainer.tokens_per_parameter=20",
    "trainer.batch_tokens=524288",
    "trainer.micro_batch_size=16",
]
NODES = {2: (2, 1), 8: (8, 1), 64: (8, 8)}  # ranks: (devices of a node, nodes)
WAYS = (("full", "full"), ("full", "quantized"), ("selective", "full"))  # what blocks keep, how weights are gathered
COLUMNS = ("model", "ranks", "checkpointing", "all-gather")


def main() -> None:
    rows = list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []
    if "--table" in sys.argv:
        print(table(rows))
        return
    done = {tuple(row[name] for name in COLUMNS) for row in rows}
    cases = [(model, ranks, *way) for way in WAYS for model in ("llama_1600m", "llama_7b") for ranks in map(str, NODES)]
    for case in cases:
        if case not in done:
            rows.append(dict(zip(COLUMNS, case, strict=True)) | planned(*case))
            print(rows[-1], file=sys.stderr, flush=True)
            with RESULTS.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)


def planned(model: str, ranks: str, kept: str, gather: str) -> dict[str, Any]:
    devices, nodes = NODES[int(ranks)]
    more = [f"model={model}", f"trainer.devices={devices}", f"trainer.num_nodes={nodes}"]
    config = compose(
        [*SHARED, *more, f"trainer.checkpoint_activations={kept}", f"trainer.all_gather={gather}", "dry_run=true"]
    )
    plan = make_plan(config)
    memory = measure_memory(config, plan, torch.device("cpu"))
    found = plan_communication(config, plan)
    forward, backward, reduced = found.collectives
    return {
        "micro_batches": plan.micro_batches,
        "steps": plan.steps,
        "parameter_bytes": memory.parameters,
        "gradient_bytes": memory.gradients,
        "optimizer_bytes": memory.optimizer,
        "peak_bytes": memory.peak,
        "gathered_for_forward": forward.sent,
        "gathered_for_backward": backward.sent,
        "reduced": reduced.sent,
        "sent_bytes": found.sent,
        "computing_hours": round(plan.flops / int(ranks) / (TFLOPS * 1e12) / 3600, 2),
        "traffic_hours": round(plan.steps * found.sent / (GIGABYTES_PER_SECOND * 1e9) / 3600, 2),
    }


def table(rows: list[dict[str, str]]) -> str:
    names = ("parameters", "gradients", "optimizer", "peak", "gathered forward", "gathered backward", "reduced", "sent")
    head = [*COLUMNS, "micro-batches", *names, "hours of computing", "hours of traffic"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in sorted(rows, key=lambda row: (row["model"], int(row["ranks"]))):
        values = list(row.values())
        sizes = [f"{int(value) / 2**30:,.2f}" for value in values[6:14]]
        hours = [f"{float(value):,.0f}" for value in values[14:]]
        lines.append("| " + " | ".join([*values[:5], *sizes, *hours]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
