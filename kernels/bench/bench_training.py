"""Training steps of a whole model: wall time and peak memory over those of bfloat16, model FLOPs utilisation.

    python kernels/bench/bench_training.py
    python kernels/bench/bench_training.py --model llama_800m --vocabulary 32000 --batch 32 --compile 1
    python kernels/bench/bench_training.py --model llama_3200m --layers 4 --recipes bf16,quartet --out build/bench

Forward, backward, clipping and AdamW on random tokens, without loader and callbacks (scripts/bench_training_loop.py has
those). A recipe's steps alternate with those of bf16, whose model stays in memory. Peak memory on CUDA is what a
recipe's own model and steps allocate beyond what lay there before; on CPU it is that of a process for each recipe. What
the linear layers save for their backward is counted where autograd saves it, each tensor once. FLOPs are those of
`qtrain.metrics.flops_per_token`, of which each recipe multiplies a share as INT8 or FP8 and the rest in bfloat16; how
much of the device's peaks they use, says peaks.py. --layers, --seq-len: instead of the model's own, so that shapes of
large models fit.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness import Case, Row, arguments, gemm_flops, gemm_for, in_turns, ratio, run
from peaks import shares, utilisation
from torch import Tensor, nn

import qtrain
from qtrain.config import Config
from qtrain.lightning_module import next_token_loss
from qtrain.metrics import flops_per_token
from qtrain.optim.groups import build_optimizer
from qtrain.run import build_model
from qtrain.train import compose

RECIPES = "bf16,quartet,quest,quartet_ii,nvidia_nvfp4"


def config_of(recipe: str, options: Any) -> Config:
    """gemm "auto" for a recipe that has no product of the kind that is asked for."""
    shape = [f"model.n_layers={options.layers}"] if options.layers else []
    shape += [f"model.seq_len={options.seq_len}"] if options.seq_len else []
    gemm, backend = gemm_for(recipe, options.gemm), options.backend
    return compose(
        [f"recipe={recipe}", f"model={options.model}", f"name={recipe}", f"gemm={gemm}", f"backend={backend}", *shape]
    )


class Trainer:
    """A model on its device, with what is known of it; `step` trains it."""

    def __init__(self, recipe: str, options: Any):
        self.options = options
        self.config = config_of(recipe, options)
        with torch.device(options.device):
            self.model = build_model(self.config, options.vocabulary)
        self.flops = self._flops()

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.options.batch * self.config.model.seq_len

    @cached_property
    def step(self) -> Callable[[], Tensor]:
        """Does one optimiser step, gives its loss. Compiles the model, if that is asked for, at the first one."""
        model, options = self.model, self.options
        optimizer = build_optimizer(model, self.config.optimizer)
        generator = torch.Generator().manual_seed(0)
        shape = options.batch, self.config.model.seq_len + 1
        tokens = torch.randint(options.vocabulary, shape, generator=generator).to(options.device)
        steps = iter(range(2**31))
        if options.compile:
            torch._dynamo.config.fail_on_recompile_limit_hit = True  # not eager unnoticed
            model.compile()

        def step() -> Tensor:
            qtrain.set_step(model, next(steps))
            with torch.autocast(options.device, torch.bfloat16):
                loss = next_token_loss(model, tokens)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return step

    def _flops(self) -> dict[str, float]:
        """Of a step, by the precision in which they are multiplied."""
        found: dict[str, float] = {}
        for layer in self.model.modules():
            for precision, flops in gemm_flops(layer, self.tokens, self.options.device).items():
                found[precision] = found.get(precision, 0.0) + flops
        rest = self.tokens * flops_per_token(self.config.model, self.options.vocabulary) - sum(found.values())
        return found | {"bfloat16": found.get("bfloat16", 0.0) + rest}  # attention

    def saved_bytes(self) -> float:
        """What the linear layers of the blocks keep for their backward, bytes per token: of two sequences less that of
        one, in which copies of the weights cancel. Before the first step, since a compiled model saves for itself."""
        whole, half = (self._saved_bytes(sequences) for sequences in (2, 1))
        return (whole - half) / self.config.model.seq_len

    def _saved_bytes(self, sequences: int) -> int:
        device = self.options.device
        qtrain.set_step(self.model, 0)
        inputs = torch.zeros(sequences, self.config.model.seq_len + 1, dtype=torch.long, device=device)
        sizes: dict[int, int] = {}

        def count(saved: Tensor) -> Tensor:
            sizes[saved.data_ptr()] = saved.nbytes
            return saved

        saving = torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved)
        hooks = []
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                hooks.append(module.register_forward_pre_hook(lambda *_: saving.__enter__()))
                hooks.append(module.register_forward_hook(lambda *_: saving.__exit__()))
        with torch.autocast(device, torch.bfloat16):
            loss = next_token_loss(self.model, inputs)
        assert loss.requires_grad  # its graph still holds all that is counted, so no address came twice
        for hook in hooks:
            hook.remove()
        return sum(sizes.values())


def peak_bytes(recipe: str, options: Any) -> int:
    """Resident memory of a process on CPU that does three steps."""
    code = "import bench_training; bench_training.print_peak()"
    settings = json.dumps({"recipe": recipe, **{key: value for key, value in vars(options).items() if key != "out"}})
    command, folder = [sys.executable, "-c", code, settings], Path(__file__).parent
    shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=folder).stdout
    return int(shown.splitlines()[-1])


def print_peak() -> None:
    options = argparse.Namespace(**json.loads(sys.argv[1]))
    torch.set_num_threads(options.threads or torch.get_num_threads())
    trainer = Trainer(options.recipe, options)
    for _ in range(3):
        trainer.step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


class Baseline:
    """bf16, whose model and peak memory all others are compared with; made by the first case that needs it."""

    def __init__(self, options: Any):
        self.options = options

    @cached_property
    def measured(self) -> tuple[Trainer, float, int | None]:
        return prepared("bf16", self.options)


def prepared(recipe: str, options: Any) -> tuple[Trainer, float, int | None]:
    """A trainer that has done three steps, what its layers save in bytes a token, and its peak memory in bytes, which
    a rehearsal does not have."""
    peak, before = None, 0
    if options.device == "cpu" and not options.rehearse:
        peak = peak_bytes(recipe, options)
    if options.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(recipe, options)
    saved = trainer.saved_bytes()
    for _ in range(3):
        trainer.step()
    if options.device == "cuda":
        peak = torch.cuda.max_memory_allocated() - before
    return trainer, saved, peak


def measure(recipe: str, baseline: Baseline, options: Any) -> Row:
    plain, plain_saved, plain_peak = baseline.measured
    trainer, saved, peak = baseline.measured if recipe == "bf16" else prepared(recipe, options)
    times = in_turns({"bf16": plain.step, recipe: trainer.step}, options.rounds, options.device)
    seconds, flops = median(times[recipe]), trainer.flops
    device_name = torch.cuda.get_device_name() if options.device == "cuda" else ""
    return {
        "ms a step": seconds * 1e3,
        "tokens/s": round(trainer.tokens / seconds),
        "x time of bf16": ratio(times, recipe, "bf16"),
        "peak GB": peak and peak / 1e9,
        "x memory of bf16": peak and plain_peak and peak / plain_peak,
        "saved B a token": round(saved),
        "x saved of bf16": saved / plain_saved,
        "TFLOP/s": sum(flops.values()) / seconds / 1e12,
        **shares(flops),
        **utilisation(flops, seconds, device_name),
    }


def cases(options: Any) -> Iterator[Case]:
    """bf16, then the other recipes."""
    baseline = Baseline(options)
    for recipe in dict.fromkeys(["bf16", *options.recipes.split(",")]):
        yield recipe, partial(measure, recipe, baseline, options)


def title_of(options: Any) -> tuple[str, str]:
    """The name of the result's file, and its title."""
    shape = config_of("bf16", options).model
    tokens = options.batch * shape.seq_len
    compiled = ", compiled" if options.compile else ""
    title = f"training {shape.name}, {shape.n_layers} layers, {tokens} tokens a step{compiled}"
    return f"training-{shape.name}-{shape.n_layers}x{tokens}{'-compiled' if options.compile else ''}", title


def main() -> int:
    options = arguments(
        __doc__, model="mini", layers=0, seq_len=0, vocabulary=257, recipes=RECIPES, batch=8, compile=0, rounds=5,
        gemm="auto",
    )  # fmt: skip
    return run(*title_of(options), "recipe", cases(options), options)


if __name__ == "__main__":
    sys.exit(main())
