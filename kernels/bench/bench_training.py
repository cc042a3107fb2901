"""Training steps of a whole model: wall time and peak memory over those of bfloat16, model FLOPs utilisation.

    python kernels/bench/bench_training.py
    python kernels/bench/bench_training.py --model llama_800m --vocabulary 32000 --batch 32 --compile 1
    python kernels/bench/bench_training.py --model llama_3200m --layers 4 --recipes bf16,quartet --out build/bench

Forward, backward, clipping and AdamW on random tokens, without loader and callbacks (scripts/bench_training_loop.py has
those). Steps of all recipes alternate in one process, whose models must fit into memory together; peak memory is of a
process for each; what the linear layers save for their backward is counted where autograd saves it, each tensor once.
FLOPs are those of `qtrain.metrics.flops_per_token`, of which each recipe multiplies a share as INT8 or FP8 and the rest
in bfloat16; how much of the device's peaks they use, says peaks.py. --layers: instead of the model's own, so that
shapes of large models fit.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from harness import arguments, gemm_flops, gemm_for, in_turns, ratio, report
from peaks import shares, utilisation
from torch import Tensor, nn

import qtrain
from qtrain.config import Config
from qtrain.lightning_module import next_token_loss
from qtrain.metrics import flops_per_token
from qtrain.optim import build_optimizer
from qtrain.run import build_model
from qtrain.train import compose

RECIPES = "bf16,quartet,quest,quartet_ii,nvidia_nvfp4"


def config_of(recipe: str, options: Any) -> Config:
    """gemm "auto" for a recipe that has no product of the kind that is asked for."""
    layers = [f"model.n_layers={options.layers}"] if options.layers else []
    gemm, backend = gemm_for(recipe, options.gemm), options.backend
    return compose(
        [f"recipe={recipe}", f"model={options.model}", f"name={recipe}", f"gemm={gemm}", f"backend={backend}", *layers]
    )


def trainer(config: Config, options: Any) -> Callable[[], Tensor]:
    """Does one optimiser step, gives its loss."""
    device = options.device
    model = build_model(config, options.vocabulary).to(device)
    optimizer = build_optimizer(model, config.optimizer)
    generator = torch.Generator().manual_seed(0)
    shape = options.batch, config.model.seq_len + 1
    tokens = torch.randint(options.vocabulary, shape, generator=generator).to(device)
    steps = iter(range(2**31))
    if options.compile:
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # not eager unnoticed
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


def saved_bytes(config: Config, options: Any) -> float:
    """What the linear layers of the blocks keep for their backward, bytes per token: of two sequences less that of one,
    in which copies of the weights cancel."""
    whole, half = (_saved_bytes(config, options, sequences) for sequences in (2, 1))
    return (whole - half) / config.model.seq_len


def _saved_bytes(config: Config, options: Any, sequences: int) -> int:
    device = options.device
    model = build_model(config, options.vocabulary).to(device)
    qtrain.set_step(model, 0)
    inputs = torch.zeros(sequences, config.model.seq_len + 1, dtype=torch.long, device=device)
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
    options = Namespace(**json.loads(sys.argv[1]))
    torch.set_num_threads(options.threads or torch.get_num_threads())
    step = trainer(config_of(options.recipe, options), options)
    for _ in range(3):
        step()
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(torch.cuda.max_memory_allocated() if options.device == "cuda" else kibibytes * 1024)


def flops_of(config: Config, options: Any) -> dict[str, float]:
    """Of a step, by the precision in which they are multiplied."""
    tokens = options.batch * config.model.seq_len
    model = build_model(config, options.vocabulary).to("meta")
    found: dict[str, float] = {}
    for layer in model.modules():
        for precision, flops in gemm_flops(layer, tokens, options.device).items():
            found[precision] = found.get(precision, 0.0) + flops
    rest = tokens * flops_per_token(config.model, options.vocabulary) - sum(found.values())
    return found | {"bfloat16": found.get("bfloat16", 0.0) + rest}  # attention


def main() -> None:
    options = arguments(
        __doc__, model="mini", layers=0, vocabulary=257, recipes=RECIPES, batch=8, compile=0, rounds=5, gemm="auto"
    )
    recipes = list(dict.fromkeys(["bf16", *options.recipes.split(",")]))
    configs = {recipe: config_of(recipe, options) for recipe in recipes}
    peaks = {recipe: peak_bytes(recipe, options) for recipe in recipes}  # first: the models below fill the device
    saved = {recipe: saved_bytes(config, options) for recipe, config in configs.items()}
    steps = {name: trainer(config, options) for name, config in configs.items()}
    times = in_turns(steps, options.rounds, options.device)
    shape = configs["bf16"].model
    tokens = options.batch * shape.seq_len
    device_name = torch.cuda.get_device_name() if options.device == "cuda" else ""

    def row(name: str) -> dict[str, Any]:
        seconds, flops = median(times[name]), flops_of(configs[name], options)
        return {
            "recipe": name,
            "ms a step": seconds * 1e3,
            "tokens/s": round(tokens / seconds),
            "x time of bf16": ratio(times, name, "bf16"),
            "peak GB": peaks[name] / 1e9,
            "x memory of bf16": peaks[name] / peaks["bf16"],
            "saved B a token": round(saved[name]),
            "x saved of bf16": saved[name] / saved["bf16"],
            "TFLOP/s": sum(flops.values()) / seconds / 1e12,
            **shares(flops),
            **utilisation(flops, seconds, device_name),
        }

    size = f"{shape.name}-{shape.n_layers}x{tokens}"
    compiled = ", compiled" if options.compile else ""
    title = f"training {shape.name}, {shape.n_layers} layers, {tokens} tokens a step{compiled}"
    report(f"training-{size}{'-compiled' if options.compile else ''}", title, [row(name) for name in recipes], options)


if __name__ == "__main__":
    main()
