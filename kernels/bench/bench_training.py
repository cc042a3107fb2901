"""Training steps of a whole model: wall time and peak memory over those of bfloat16, model FLOPs utilisation.

    python kernels/bench/bench_training.py
    python kernels/bench/bench_training.py --model llama_800m --batch 64 --compile 1 --out training.json

Forward, backward, clipping and AdamW on random tokens, without loader and callbacks (scripts/bench_training_loop.py has
those). Steps of all recipes alternate in one process; peak memory is of a process for each; what the linear layers save
for their backward is counted where autograd saves it, each tensor once. FLOPs are those of
`qtrain.metrics.flops_per_token`; their share is of the bfloat16 peak, in which all GEMMs run here.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from harness import arguments, gemm_for, in_turns, ratio, report
from torch import Tensor, nn

import qtrain
from qtrain.config import Config
from qtrain.lightning_module import next_token_loss
from qtrain.metrics import flops_per_token
from qtrain.optim import build_optimizer
from qtrain.run import build_model
from qtrain.train import compose

RECIPES = ("bf16", "quartet", "quest", "quartet_ii", "nvidia_nvfp4")
VOCABULARY = 257
BFLOAT16_PEAKS = {"A100": 312.0, "H100": 989.5, "H200": 989.5, "B200": 2250.0}  # dense TFLOP/s, NVIDIA's data sheets


def config_of(recipe: str, model: str, gemm: str) -> Config:
    """gemm "auto" for a recipe that has no product of the kind that is asked for."""
    return compose([f"recipe={recipe}", f"model={model}", f"name={recipe}", f"gemm={gemm_for(recipe, gemm)}"])


def trainer(config: Config, device: str, batch: int, compile: bool) -> Callable[[], Tensor]:
    """Does one optimiser step, gives its loss."""
    model = build_model(config, VOCABULARY).to(device)
    optimizer = build_optimizer(model, config.optimizer)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (batch, config.model.seq_len + 1), generator=generator).to(device)
    steps = iter(range(2**31))
    if compile:
        model.compile()

    def step() -> Tensor:
        qtrain.set_step(model, next(steps))
        with torch.autocast(device, torch.bfloat16):
            loss = next_token_loss(model, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def saved_bytes(config: Config, device: str, batch: int) -> float:
    """What the linear layers of the blocks keep for their backward, bytes per token: of twice as many tokens less that
    of so many, in which copies of the weights cancel."""
    seq_len = config.model.seq_len
    whole, half = (_saved_bytes(config, device, sequences * seq_len) for sequences in (2 * batch, batch))
    return (whole - half) / (batch * seq_len)


def _saved_bytes(config: Config, device: str, tokens: int) -> int:
    model = build_model(config, VOCABULARY).to(device)
    qtrain.set_step(model, 0)
    inputs = torch.zeros(tokens // config.model.seq_len, config.model.seq_len + 1, dtype=torch.long, device=device)
    sizes: dict[int, int] = {}

    def count(saved: Tensor) -> Tensor:
        sizes[saved.data_ptr()] = saved.nbytes
        return saved

    saving = torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda *_: saving.__enter__())
            module.register_forward_hook(lambda *_: saving.__exit__())
    with torch.autocast(device, torch.bfloat16):
        loss = next_token_loss(model, inputs)
    assert loss.requires_grad  # its graph still holds all that is counted, so no address came twice
    return sum(sizes.values())


def peak_bytes(recipe: str, options: Any) -> int:
    """Of a process that does three steps: resident memory on CPU, allocated on CUDA."""
    code = "import bench_training; bench_training.print_peak()"
    settings = json.dumps({"recipe": recipe, **{key: value for key, value in vars(options).items() if key != "out"}})
    folder = sys.path[0]
    shown = subprocess.run(
        [sys.executable, "-c", code, settings], check=True, capture_output=True, text=True, cwd=folder
    ).stdout
    return int(shown.splitlines()[-1])


def print_peak() -> None:
    options = json.loads(sys.argv[1])
    device = options["device"]
    torch.set_num_threads(options["threads"] or torch.get_num_threads())
    step = trainer(
        config_of(options["recipe"], options["model"], options["gemm"]),
        device,
        options["batch"],
        bool(options["compile"]),
    )
    for _ in range(3):
        step()
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(torch.cuda.max_memory_allocated() if device == "cuda" else kibibytes * 1024)


def main() -> None:
    options = arguments(__doc__, model="mini", batch=8, compile=0, rounds=5, gemm="auto")
    configs = {recipe: config_of(recipe, options.model, options.gemm) for recipe in RECIPES}
    steps = {name: trainer(config, options.device, options.batch, options.compile) for name, config in configs.items()}
    for step in steps.values():
        step()  # a second warm-up: the first compiles
    times = in_turns(steps, options.rounds, options.device)
    peaks = {recipe: peak_bytes(recipe, options) for recipe in RECIPES}
    saved = {recipe: saved_bytes(config, options.device, options.batch) for recipe, config in configs.items()}
    shape = configs["bf16"].model
    tokens = options.batch * shape.seq_len
    flops = tokens * flops_per_token(shape, VOCABULARY)
    device_name = torch.cuda.get_device_name() if options.device == "cuda" else ""
    peak = next((found for name, found in BFLOAT16_PEAKS.items() if name in device_name), None)

    def row(name: str) -> dict[str, Any]:
        seconds = median(times[name])
        return {
            "recipe": name,
            "gemm": configs[name].gemm,
            "ms a step": seconds * 1e3,
            "tokens/s": round(tokens / seconds),
            "x time of bf16": ratio(times, name, "bf16"),
            "peak GB": peaks[name] / 1e9,
            "x memory of bf16": peaks[name] / peaks["bf16"],
            "saved B a token": round(saved[name]),
            "x saved of bf16": saved[name] / saved["bf16"],
            "TFLOP/s": flops / seconds / 1e12,
            "of bf16 peak": flops / seconds / 1e12 / peak if peak else None,
        }

    report(f"training {shape.name}, {tokens} tokens a step", [row(name) for name in RECIPES], options)


if __name__ == "__main__":
    main()
