"""What the training loop costs beside the training itself, measured in one run, in turns with what it is compared to.

    python scripts/bench_training_loop.py                       # the loop against a bare PyTorch loop
    python scripts/bench_training_loop.py +experiment=bf16      # any settings of train.py
    python scripts/bench_training_loop.py --saves --steps 20 --blocks 12 +experiment=quartet model=mini
    python scripts/bench_training_loop.py --communication trainer.devices=2
    python scripts/bench_training_loop.py --telemetry           # what taking the quantisers' health costs
    python scripts/bench_training_loop.py --mask --steps 1 model=mini model.seq_len=512    # what document masks cost

The default: after each step of the loop, with the observers of a real run (metrics every 10 steps), a bare loop does
the same step on a copy of the model. Time goes by blocks of --steps steps, and the figure is the median over --blocks
blocks of (time of the bare loop / time of the training loop): a machine that grows slow for a second slows both.
Also measured: the share of step time spent waiting for data, and the speed of tokenising bytes.

--saves: blocks that begin with a checkpoint, in turns with blocks that do not; the extra time of one checkpoint as a
share of a minute. --communication: blocks in which the ranks exchange gradients and agree, in turns with blocks in
which they do not. --telemetry: steps that take the quantisers' health, in turns with steps that do not, and the share
of a run's time that it makes up at the default interval. --mask: blocks whose attention is within documents, in turns
with blocks of plain causal attention, and the mean of (time of a plain block / time of the masked one before it).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import qtrain  # noqa: F401  before torch: it sets how long torch's threads spin

# isort: split

import torch
from rich.console import Console
from torch import Tensor, nn

from qtrain.config import Config
from qtrain.data.corpus import Corpus
from qtrain.data.prepare import prepare
from qtrain.optim.groups import build_optimizer
from qtrain.plan import make_plan
from qtrain.quant import set_step
from qtrain.runs.directory import environment
from qtrain.train import compose
from qtrain.training.losses import documents_in, next_token_loss
from qtrain.training.observers import Observer
from qtrain.training.session import Session, open_session, speak_through

SCRATCH = "QTRAIN_BENCH_SCRATCH"
WARM_UP = 5  # steps, in which compiled code is made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="optimiser steps of a block (default: 10)")
    parser.add_argument("--blocks", type=int, default=30, help="how many (default: 30)")
    parser.add_argument("--out", type=Path, help="write the result as JSON too")
    what = parser.add_mutually_exclusive_group()
    for name, measure in MEASURES.items():
        what.add_argument(f"--{name}", dest="measure", action="store_const", const=measure, help=measure.__doc__)
    arguments, overrides = parser.parse_known_args()
    if arguments.blocks < 4 or arguments.steps < 1:
        parser.error(f"needs at least 4 blocks of 1 step, found {arguments.blocks} of {arguments.steps}")
    speak_through(Console(stderr=True))
    if not any(override.startswith("+experiment=") for override in overrides):
        overrides = ["+experiment=quartet", *overrides]
    measure = arguments.measure or loop_against_bare
    first = SCRATCH not in os.environ  # the process that starts those of other ranks, which inherit the name
    scratch = os.environ.setdefault(SCRATCH, tempfile.mkdtemp())
    try:
        result = measure(overrides, scratch, arguments.steps, arguments.blocks)
    finally:
        if first:
            shutil.rmtree(scratch)
    if result is None:
        return
    result = {"settings": " ".join(overrides), "steps": arguments.steps, "blocks": arguments.blocks, **result}
    for name, value in result.items():
        print(f"{name:28} {value}")
    if arguments.out:
        arguments.out.write_text(json.dumps(result | {"machine": environment()}, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------------------- measures


def loop_against_bare(overrides: list[str], scratch: str, steps: int, blocks: int) -> dict[str, Any]:
    """the training loop against a bare PyTorch loop (default)"""
    with open_session(timed_config(overrides, scratch, steps * blocks)) as session:
        bare = BareLoop(session)
        clock = Clock(session.device, bare.step)
        train(session, clock)
        loop_seconds, bare_seconds = in_blocks(clock.seconds, steps), in_blocks(bare.seconds, steps)
        ratios = [theirs / ours for theirs, ours in zip(bare_seconds, loop_seconds, strict=True)]
        tokens = steps * session.plan.batch_tokens
        return {
            "bare_tokens_per_second": round(tokens / median(bare_seconds)),
            "loop_tokens_per_second": round(tokens / median(loop_seconds)),
            "loop_over_bare": round(median(ratios), 4),
            "quartiles": quartiles(ratios),
            "data_wait_share": round(sum(clock.waits) / sum(clock.seconds), 5),
            "tokenise_bytes_mb_per_s": round(tokenising_speed(overrides), 1),
        }


def cost_of_saves(overrides: list[str], scratch: str, steps: int, blocks: int) -> dict[str, Any]:
    """what a checkpoint each minute costs"""
    config = timed_config(
        [*overrides, f"callbacks.checkpoint_every_steps={2 * steps}"], scratch, steps * blocks, 2 * steps
    )
    with open_session(config) as session:
        clock = Clock(session.device)
        train(session, clock)
        extra = differences(in_blocks(clock.seconds, steps, skip=2 * steps))
        return {
            "seconds_per_step": round(median(clock.seconds), 4),
            "parameters": session.plan.parameters,
            "extra_seconds_per_save": [round(seconds, 3) for seconds in extra],
            "share_of_a_minute": round(mean(extra) / 60, 5),
            "standard_error": round(stdev(extra) / len(extra) ** 0.5 / 60, 5),
        }


def cost_of_communication(overrides: list[str], scratch: str, steps: int, blocks: int) -> dict[str, Any] | None:
    """what gradients and agreements between ranks cost"""
    config = timed_config(overrides, scratch, steps * blocks)
    if config.trainer.world_size < 2:
        raise SystemExit("error: --communication compares several processes; set trainer.devices=2")
    with open_session(config) as session:
        clock = Clock(session.device, Silence(session, steps))
        train(session, clock)
        seconds = in_blocks(clock.seconds, steps)
        ratios = [silent / speaking for speaking, silent in zip(seconds[::2], seconds[1::2], strict=False)]
        if not session.ranks.is_zero:
            return None
        return {
            "ranks": session.ranks.size,
            "seconds_per_step": round(median(seconds[::2]) / steps, 4),
            "seconds_per_silent_step": round(median(seconds[1::2]) / steps, 4),
            "over_no_communication": round(median(ratios), 4),
            "quartiles": quartiles(ratios),
        }


def cost_of_telemetry(overrides: list[str], scratch: str, steps: int, blocks: int) -> dict[str, Any]:
    """what taking the quantisers' health costs"""
    config = timed_config([*overrides, "callbacks.telemetry_every_steps=2"], scratch, steps * blocks)
    with open_session(config) as session:
        clock = Clock(session.device)
        train(session, clock)
    plain, watched = (median(clock.seconds[first::2]) for first in (WARM_UP - 1, WARM_UP))  # every second step is
    interval = make_plan(compose(overrides)).telemetry_every_steps
    return {
        "seconds_per_step": round(plain, 5),
        "seconds_per_watched_step": round(watched, 5),
        "every_steps": interval,
        "share_of_time": round((watched - plain) / (interval * plain), 4),
    }


def cost_of_mask(overrides: list[str], scratch: str, steps: int, blocks: int) -> dict[str, Any]:
    """what attention within documents costs, against plain causal attention"""
    config = timed_config([*overrides, "data.document_mask=true"], scratch, steps * blocks)
    with open_session(config) as session:
        assert isinstance(session.corpus, Corpus)
        documents = Documents(session, steps)
        clock = Clock(session.device, documents)
        train(session, clock)
        seconds = in_blocks(clock.seconds, steps)
        ratios = [plain / masked for masked, plain in zip(seconds[::2], seconds[1::2], strict=False)]
        error = stdev(ratios) / len(ratios) ** 0.5
        return {
            "tokens_per_document": round(session.corpus.train.n_tokens / session.corpus.train.n_documents, 1),
            "tokens_attended_together": round(documents.tokens / documents.count, 1),
            "masked_tokens_per_second": round(steps * session.plan.batch_tokens / median(seconds[::2])),
            "causal_tokens_per_second": round(steps * session.plan.batch_tokens / median(seconds[1::2])),
            "masked_over_causal": round(mean(ratios), 4),
            "interval_95": [round(mean(ratios) + side * 1.96 * error, 4) for side in (-1, 1)],
            "quartiles": quartiles(ratios),
        }


MEASURES: dict[str, Callable[[list[str], str, int, int], dict[str, Any] | None]] = {
    "saves": cost_of_saves,
    "communication": cost_of_communication,
    "telemetry": cost_of_telemetry,
    "mask": cost_of_mask,
}


# ------------------------------------------------------------------------------------------------------------ one run


def timed_config(overrides: list[str], scratch: str, timed: int, warm_up: int = WARM_UP) -> Config:
    """Settings of a run of so many timed steps after the first ones. Its last step validates and saves, untimed."""
    total = warm_up + timed + 1
    rare = 10 * total
    return compose(
        [
            f"callbacks.checkpoint_every_steps={rare}",
            *overrides,
            f"run_dir={scratch}/run",
            f"debug.max_steps={total}",
            f"callbacks.val_every_steps={rare}",
            "callbacks.checkpoint_every_minutes=1e6",
            "callbacks.progress_bar=false",
        ]
    )


class Clock(Observer):
    """The seconds of each step, and those of it that went by between the end of a micro-batch and the start of the
    next. `beside` is called between the steps, and is no part of them. Last in the list of observers."""

    def __init__(self, device: torch.device, beside: Callable[[int], None] | None = None):
        self.device, self.beside = device, beside
        self.seconds: list[float] = []
        self.waits: list[float] = []
        self.began = self.ready = now(device)

    def on_start(self, step: int) -> None:
        self.began = self.ready = now(self.device)

    def on_micro_batch_start(self, step: int, micro_batch: int, batch: Tensor) -> None:
        self.waits.append(time.perf_counter() - self.ready)

    def on_backward_end(self) -> None:
        self.ready = now(self.device)

    def on_step_end(self, step: int) -> None:
        self.seconds.append(now(self.device) - self.began)
        if self.beside:
            self.beside(step)
        self.began = self.ready = now(self.device)


class BareLoop:
    """The shortest loop that does the same work, on a copy of the model, a step for each of the training loop's."""

    def __init__(self, session: Session):
        self.session = session
        self.model = copy.deepcopy(session.model).to(session.device).train()
        self.optimizer = build_optimizer(self.model, session.config.optimizer)
        samples = session.plan.steps * session.plan.micro_batches * session.data.per_batch
        self.batches = iter(session.data.train(0, samples))
        self.seconds: list[float] = []

    def step(self, step: int) -> None:
        config, plan, device, model = self.session.config, self.session.plan, self.session.device, self.model
        began = now(device)
        for micro_batch in range(plan.micro_batches):
            set_step(model, step, micro_batch)
            tokens = next(self.batches).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.trainer.precision == "bf16-mixed"):
                loss = next_token_loss(model, tokens)
            (loss / plan.micro_batches).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.trainer.grad_clip or float("inf"))
        for group in self.optimizer.param_groups:
            group["lr"] = config.optimizer.lr * config.scheduler.factor(step - 1, plan.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(now(device) - began)


class Silence:
    """Turns the exchange between ranks off for every other block of steps: gradients, and what the loop agrees on."""

    def __init__(self, session: Session, steps: int):
        self.session, self.steps = session, steps
        self.fabric, self.ranks = session.fabric, session.ranks
        self.no_backward_sync, self.maximum = self.fabric.no_backward_sync, self.ranks.maximum

    def __call__(self, step: int) -> None:
        timed = step - WARM_UP
        silent = timed >= 0 and timed // self.steps % 2 == 1 and step < self.session.plan.steps - 1
        if silent:
            self.fabric.no_backward_sync = lambda module, enabled=True: self.no_backward_sync(module)
            self.ranks.maximum = lambda *values: list(values)
        else:
            self.fabric.no_backward_sync, self.ranks.maximum = self.no_backward_sync, self.maximum


class Documents:
    """Turns the mask of documents off for every other block of steps. tokens, count: of the first micro-batch of each
    masked block, its tokens and the documents that they are attended to in."""

    def __init__(self, session: Session, steps: int):
        self.session, self.steps = session, steps
        self.end = session.module.loss_options["end_of_document"]
        self.tokens = self.count = 0

    def __call__(self, step: int) -> None:
        timed = step - WARM_UP
        masked = timed < 0 or timed // self.steps % 2 == 0
        self.session.module.loss_options["end_of_document"] = self.end if masked else None
        if masked and timed % self.steps == 0:
            each = self.session.data.per_batch
            (batch,) = self.session.data.train(step * each, (step + 1) * each)
            self.tokens += batch[:, :-1].numel()
            self.count += len(documents_in(batch[:, :-1], self.end)["cu_seqlens"]) - 1


def train(session: Session, clock: Clock) -> None:
    """The whole training of a session, watched by the clock after all other observers."""
    build = session.observers
    session.observers = lambda: [*build(), clock]  # pyright: ignore[reportAttributeAccessIssue]
    session.train()


def in_blocks(seconds: list[float], steps: int, skip: int = WARM_UP) -> list[float]:
    """The seconds of each block of so many steps after the first ones. A part of a block at the end is left out."""
    timed = seconds[skip:]
    return [sum(timed[start : start + steps]) for start in range(0, len(timed) - steps + 1, steps)]


def differences(seconds: list[float]) -> list[float]:
    """Of each two blocks, by how much the first takes longer."""
    return [first - second for first, second in zip(seconds[::2], seconds[1::2], strict=False)]


def quartiles(values: list[float]) -> list[float]:
    ordered = sorted(values)
    return [round(ordered[len(ordered) * quarter // 4], 4) for quarter in (1, 3)]


def tokenising_speed(overrides: list[str]) -> float:
    """MB/s of preparing the corpus from nothing with the byte tokenizer, on one core."""
    with tempfile.TemporaryDirectory() as scratch:
        config = compose([*overrides, f"data.cache_dir={scratch}", "data.prepare_workers=1", "tokenizer=bytes"])
        started = time.perf_counter()
        corpus = prepare(config.data, config.tokenizer, budget_tokens=config.trainer.tokens, progress=False)
        (part,) = corpus.parts
        return (part.corpus.train.n_bytes + part.corpus.val.n_bytes) / 1e6 / (time.perf_counter() - started)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
