"""Run directories for the tests of reports, written as training writes them, with losses of a known law."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

OPERANDS = ("fprop.x", "fprop.w", "dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x")
GAPS = {"bf16": 0.0, "quartet": 0.1, "quest": 0.05}


def settings(name: str, seed: int, **more: Any) -> dict[str, Any]:
    """The parts of config.yaml that a report reads."""
    return {
        "name": name,
        "seed": seed,
        "model": {"name": more.get("model", "nano"), "n_layers": 2, "dim": 128},
        "data": {"source": "stdlib", "val_tokens": more.get("val_tokens", 65536)},
        "tokenizer": {"kind": more.get("tokenizer", "bytes"), "vocab_size": None, "path": None},
        "recipe": {"name": more.get("recipe", name)},
        "optimizer": {"lr": more.get("lr", 0.002)},
        "scheduler": {"name": "cosine"},
        "trainer": {"batch_tokens": 1000},
    }


def write_run(
    root: Path, name: str, seed: int = 0, *, parameters: int = 100_000, steps: int = 50, loss: float | None = None,
    folder: str | None = None, status: str = "finished", telemetry: bool = False, **more: Any,
) -> Path:  # fmt: skip
    """A run of `steps` steps of 1000 tokens; it ends at `loss`, by default the law's, plus seed/100."""
    lr = more.get("lr", 0.002)
    directory = root / (folder or f"{name}-{parameters}-{steps}-{lr}-{seed}")
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(settings(name, seed, **more)))
    (directory / "environment.json").write_text("{}")
    gap = GAPS.get(name, 0.2) + 0.1 * math.log(lr / 0.002) ** 2
    last = loss if loss is not None else law(parameters, steps * 1000) + gap + seed / 100
    lines = []
    for step in range(1, steps + 1):
        stamp = {"step": step, "tokens": step * 1000, "flops": step * 1000 * 6 * parameters}
        value = last + 1 / step - 1 / steps
        speed = {"lr": lr, "grad_norm": 1.0, "tokens_per_second": 500.0, "memory_bytes": 2**30 + step}
        lines.append({**stamp, "loss": value, **speed})
        if step % 10 == 0:
            lines.append({**stamp, "val_loss": value, "val_bits_per_byte": value * 1.5})
        if telemetry and step % 25 == 0:
            lines += [{**stamp, **quant_values(step)}, {**stamp, **grad_values(step)}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = {"val_loss": last, "val_bits_per_byte": last * 1.5, "tokens_per_second": 500.0}
    summary = {
        "status": status, "name": name, "recipe": more.get("recipe", name), "seed": seed, "parameters": parameters,
        "non_embedding_parameters": parameters, "tokens": steps * 1000, "steps": steps,
        "flops": steps * 6000 * parameters, "bigram_cross_entropy": 2.5, "config_hash": "0" * 8,
        "data_hash": more.get("data_hash", "d" * 64), "commit": None,
        **(done if status == "finished" else dict.fromkeys(done)),
    }  # fmt: skip
    (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def law(parameters: int, tokens: int) -> float:
    return 1.5 + (1e5 / parameters) ** 0.3 + (1e5 / tokens) ** 0.3


LAYERS = [f"layers.{block}.{part}" for block in (0, 2, 10) for part in ("attention.q", "mlp.down")]


def quant_values(step: int) -> dict[str, float]:
    metrics = {"sqnr_db": 18.0, "clipped": 0.01, "scale_underflow": 0.0, "mask_density": 0.9, "kurtosis": 4.0}
    return {
        f"quant/{layer}/{operand}/{metric}": value * (1 - 0.02 * depth - step / 1000)
        for depth, layer in enumerate(LAYERS)
        for operand in OPERANDS
        for metric, value in metrics.items()
    }


def grad_values(step: int) -> dict[str, float]:
    return {
        f"grad/{layer}/{metric}": 0.9 - 0.01 * depth - step / 1000
        for depth, layer in enumerate(LAYERS)
        for metric in ("cosine", "projection")
    }


def write_sweep(root: Path) -> None:
    """Recipes, sizes, budgets, seeds and learning rates, telemetry, and runs that did not finish: every section."""
    for name in GAPS:
        for seed in (0, 1):
            for parameters, steps in ((100_000, 50), (400_000, 100)):
                write_run(root, name, seed, parameters=parameters, steps=steps, telemetry=name == "quartet")
        for lr in (0.0005, 0.008):
            write_run(root, name, lr=lr)
    write_run(root, "quest", 5, status="diverged")
    write_run(root, "quest", 6, status="running")
