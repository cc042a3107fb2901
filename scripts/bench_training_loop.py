"""Tokens/s of the training loop over those of a bare PyTorch loop: same model, batches, optimiser, machine and run.

    python scripts/bench_training_loop.py                       # the quick start's model and recipe
    python scripts/bench_training_loop.py +experiment=bf16      # any settings of train.py
    python scripts/bench_training_loop.py --steps 100 --rounds 5 --out result.json
    python scripts/bench_training_loop.py --telemetry           # what taking the quantisers' health costs

Each round times the bare loop and the training loop, in turns which goes first, both over the same steps after the
same warm-up steps, with the observers of a real run (metrics every 10 steps; no validation or checkpoint falls into the
timed steps). One more round before them, which compiles, is not counted. Also
measured: the share of step time spent waiting for data, and the speed of tokenising bytes.

--telemetry: one run in which every other step takes the quantisers' health; the medians of both kinds of steps, and the
share of a run's time that it makes up at the default interval.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import qtrain  # noqa: F401  before torch: it sets how long torch's threads spin

# isort: split

import torch
from rich.console import Console
from torch import Tensor, nn

from qtrain.config import Config
from qtrain.data.prepare import prepare
from qtrain.optim.groups import build_optimizer
from qtrain.plan import make_plan
from qtrain.quant import set_step
from qtrain.runs.directory import environment
from qtrain.train import compose
from qtrain.training.losses import next_token_loss
from qtrain.training.observers import Observer
from qtrain.training.session import Session, open_session, speak_through

WARM_UP = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="timed optimiser steps of each loop and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--telemetry", action="store_true", help="time steps with and without telemetry instead")
    parser.add_argument("--out", type=Path, help="write the result as JSON too")
    arguments, overrides = parser.parse_known_args()
    speak_through(Console(stderr=True))
    overrides = overrides or ["+experiment=quartet"]
    if arguments.telemetry:
        result = telemetry_cost(overrides, arguments.steps)
    else:
        result = measure(overrides, arguments.steps, arguments.rounds)
    for name, value in result.items():
        if name != "machine":
            print(f"{name:28} {value}")
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


def measure(overrides: list[str], steps: int, rounds: int) -> dict[str, Any]:
    bare, loop, waiting = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(rounds + 1):
            config = timed_config(overrides, scratch, number, steps)
            for loops_turn in (False, True) if number % 2 else (True, False):
                with open_session(config) as session:
                    if loops_turn:
                        speed, waited = training_loop(session, steps)
                        loop.append(speed)
                        waiting.append(waited)
                    else:
                        bare.append(bare_loop(session, steps))
    bare, loop, waiting = bare[1:], loop[1:], waiting[1:]
    ratios = [ours / theirs for ours, theirs in zip(loop, bare, strict=True)]
    return {
        "settings": " ".join(overrides),
        "bare_tokens_per_second": [round(speed) for speed in bare],
        "loop_tokens_per_second": [round(speed) for speed in loop],
        "ratios": [round(ratio, 4) for ratio in ratios],
        "median_ratio": round(median(ratios), 4),
        "data_wait_share": round(median(waiting), 5),
        "tokenise_bytes_mb_per_s": round(tokenising_speed(overrides), 1),
        "machine": environment(),
    }


def telemetry_cost(overrides: list[str], steps: int) -> dict[str, Any]:
    """Steps with telemetry and without, in turns, in one run; over the interval that a whole run of it has."""
    with tempfile.TemporaryDirectory() as scratch:
        config = timed_config([*overrides, "callbacks.telemetry_every_steps=2"], scratch, 0, steps)
        with open_session(config) as session:
            ends = clocked(session).ends
    seconds = {step: ends[step - 1] - ends[step - 2] for step in range(WARM_UP + 1, WARM_UP + steps + 1)}
    watched, plain = (median(seconds[step] for step in seconds if step % 2 == odd) for odd in (0, 1))
    interval = make_plan(compose(overrides)).telemetry_every_steps
    return {
        "settings": " ".join(overrides),
        "seconds_per_step": round(plain, 5),
        "seconds_per_watched_step": round(watched, 5),
        "every_steps": interval,
        "share_of_time": round((watched - plain) / (interval * plain), 4),
        "machine": environment(),
    }


def timed_config(overrides: list[str], scratch: str, number: int, steps: int) -> Config:
    total = WARM_UP + steps + 1  # the last step validates and saves; it is not timed
    often = 10 * total
    return compose(
        [
            *overrides,
            f"run_dir={scratch}/run-{number}",
            f"seed={number}",
            f"debug.max_steps={total}",
            f"callbacks.val_every_steps={often}",
            f"callbacks.checkpoint_every_steps={often}",
            "callbacks.progress_bar=false",
            "force=true",
        ]
    )


def bare_loop(session: Session, steps: int) -> float:
    """Tokens/s of the shortest loop that does the same work."""
    config, plan, device = session.config, session.plan, session.device
    model = session.model.to(device).train()
    optimizer = build_optimizer(model, config.optimizer)
    batches = iter(session.data.train(0, (WARM_UP + steps) * plan.micro_batches * session.data.per_batch))
    started = 0.0
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            started = now(device)
        for micro_batch in range(plan.micro_batches):
            set_step(model, step, micro_batch)
            tokens = next(batches).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.trainer.precision == "bf16-mixed"):
                loss = next_token_loss(model, tokens)
            (loss / plan.micro_batches).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.trainer.grad_clip or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.lr * config.scheduler.factor(step, plan.steps)
        optimizer.step()
        optimizer.zero_grad()
    return steps * plan.batch_tokens / (now(device) - started)


class Clock(Observer):
    """The time at the end of each micro-batch and of each step, after all other observers, and the waits for the next
    micro-batch."""

    def __init__(self, device: torch.device):
        self.device = device
        self.ends: list[float] = []  # of steps
        self.waits: list[float] = []
        self.ready = 0.0

    def on_micro_batch_start(self, step: int, micro_batch: int, batch: Tensor) -> None:
        if self.ready:
            self.waits.append(time.perf_counter() - self.ready)

    def on_backward_end(self) -> None:
        self.ready = now(self.device)

    def on_step_end(self, step: int) -> None:
        self.ready = now(self.device)
        self.ends.append(self.ready)


def training_loop(session: Session, steps: int) -> tuple[float, float]:
    """(tokens/s, share of the time between the end of one micro-batch and the start of the next: waiting for data and
    the loop's own bookkeeping together, so an upper bound on waiting)."""
    clock = clocked(session)
    micro_batches = session.plan.micro_batches
    seconds = clock.ends[WARM_UP + steps - 1] - clock.ends[WARM_UP - 1]
    waits = clock.waits[WARM_UP * micro_batches - 1 : (WARM_UP + steps) * micro_batches - 1]
    return steps * session.plan.batch_tokens / seconds, sum(waits) / seconds


def clocked(session: Session) -> Clock:
    """The clock of a session's whole training."""
    clock = Clock(session.device)
    build = session.observers
    session.observers = lambda: [*build(), clock]  # pyright: ignore[reportAttributeAccessIssue]
    session.train()
    return clock


def tokenising_speed(overrides: list[str]) -> float:
    """MB/s of preparing the corpus from nothing with the byte tokenizer, on one core."""
    with tempfile.TemporaryDirectory() as scratch:
        config = compose([*overrides, f"data.cache_dir={scratch}", "data.prepare_workers=1", "tokenizer=bytes"])
        started = time.perf_counter()
        corpus = prepare(config.data, config.tokenizer, budget_tokens=config.trainer.tokens, progress=False)
        return (corpus.train.n_bytes + corpus.val.n_bytes) / 1e6 / (time.perf_counter() - started)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
