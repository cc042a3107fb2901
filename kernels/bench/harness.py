"""What the benchmarks share: their options, timing in turns, ratios within one run, and rows kept as they come."""

from __future__ import annotations

import argparse
import faulthandler
import json
import math
import os
import re
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from table import markdown
from torch import Tensor, nn

import qtrain
from qtrain.errors import UserError
from qtrain.quant.linear import QuantLinear
from qtrain.runs.directory import environment, write_atomically

Times = Mapping[str, list[float]]
Row = dict[str, Any]
Case = tuple[str, Callable[[], Row]]  # a name, and what measures its row
QUEUED_SECONDS = 0.02
GRACE_SECONDS = 45.0  # beyond the budget, for the case in progress
LONGEST_ERROR = 1500


def parser(doc: str | None, **defaults: int | str) -> argparse.ArgumentParser:
    """The options of every benchmark, and its own with their defaults."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, help="a folder; writes <benchmark>-<machine>.json into it too")
    found.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--threads", type=int, help="of torch, on CPU (default: all cores)")
    found.add_argument("--backend", default="auto", help="of the quantisers (default: triton on cuda)")
    found.add_argument("--only", default="", help="a regular expression: measure the cases whose names it finds")
    found.add_argument("--budget", type=float, help="seconds after which no further case begins (default: no limit)")
    found.add_argument(
        "--rehearse", action="store_true", help="without a GPU: compile the kernels for sm_90 and launch none"
    )
    for name, value in defaults.items():
        found.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default {value}")
    return found


def arguments(doc: str | None, **defaults: int | str) -> argparse.Namespace:
    """The options of a benchmark, read and checked. defaults: of its own options."""
    return checked_options(parser(doc, **defaults))


def checked_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, or the end of the process with what is wrong. Sets torch's threads, and the fake driver where the
    run is a rehearsal."""
    options = parser.parse_args()
    if options.out and not options.out.is_dir():
        parser.error(f"--out {options.out}: there is no such folder; make it")
    if options.rehearse:
        import fake_driver

        options.device, options.backend = "cpu", "triton"
        fake_driver.install()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no CUDA device; use --device cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cuda" and options.backend == "auto":
        options.backend = "triton"
    return options


# --------------------------------------------------------------------------------------------------------------- rows


def run(name: str, title: str, column: str, cases: Iterable[Case], options: argparse.Namespace) -> int:
    """Measures each case and keeps its row at once, on the screen and with options.out in <name>-<machine>.json, which
    is whole at any moment. Returns the exit code: 0, or 1 if any case failed, was wrong, or was left out for lack of
    time. name: of the file, with the sizes; column: the heading of the cases' names.

    A case that fails costs its own row, which says why. If the device no longer answers after it, nothing else is
    measured: a CUDA error may leave the whole process without a device.
    """
    report = Report(name, title, column, options)
    for case, measure in cases:
        if re.search(options.only, case) and not report.take(case, measure):
            break
    return report.close()


class Report:
    """The rows of one benchmark, and the file that holds them."""

    def __init__(self, name: str, title: str, column: str, options: argparse.Namespace):
        settings = {key: value for key, value in vars(options).items() if key != "out"}
        machine = environment() | {"device": describe(options)}
        self.result = {"name": title, "settings": settings, "rows": [], "machine": machine}
        self.path = options.out and options.out / f"{name}-{slug(machine['device'])}.json"
        self.column, self.options, self.start = column, options, time.monotonic()
        if options.budget:
            faulthandler.dump_traceback_later(options.budget + GRACE_SECONDS, exit=True)

    @property
    def rows(self) -> list[Row]:
        return self.result["rows"]

    def take(self, case: str, measure: Callable[[], Row]) -> bool:
        """Keeps the row of a case. Returns whether the device can go on."""
        if self.options.budget and time.monotonic() - self.start > self.options.budget:
            self._add({self.column: case, "error": f"not measured: {self.options.budget:g} s are over"})
            return True
        try:
            row = checked({self.column: case} | measure(), self.column, "SQNR dB", "unequal")
        except Exception as error:
            row = {self.column: case} | failure(error)
        self._add(row)
        if "error" in row and not answers(self.options.device):
            self._add({self.column: "the rest", "error": "not measured: the device no longer answers"})
            return False
        return True

    def close(self) -> int:
        """The table, and the exit code."""
        faulthandler.cancel_dump_traceback_later()
        print(f"\n{markdown(self.result)}" if self.rows else f"no case matches --only {self.options.only!r}")
        if self.options.rehearse:
            import fake_driver

            compiled, launches = fake_driver.compiled.total(), fake_driver.launches.total()
            print(f"rehearsed: {compiled} kernels compiled for sm_90, which {launches} launches would have run")
        if self.path and self.rows:
            print(f"written to {self.path}")
        return int(not self.rows or any("error" in row or row.get("equal", 1) not in (1, None) for row in self.rows))

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        print(f"[{time.monotonic() - self.start:6.1f} s] {json.dumps(row)}", flush=True)
        if self.path:
            write_atomically(self.path, json.dumps(self.result, indent=2) + "\n")


def failure(error: Exception) -> Row:
    """The error with its causes on one line, and the innermost place."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    place = traceback.extract_tb(causes[-1].__traceback__)[-1]
    text = " <- ".join(f"{type(cause).__name__}: {' '.join(str(cause).split())}" for cause in causes)
    return {"error": text[:LONGEST_ERROR], "at": f"{Path(place.filename).name}:{place.lineno}"}


def answers(device: str) -> bool:
    """Whether the device still works after an error."""
    try:
        _wait(device)
    except RuntimeError:
        return False
    return True


# ------------------------------------------------------------------------------------------------------------- layers


def gemm_for(recipe: str, asked: str) -> str:
    """asked, or "auto" for a recipe that has no product of that kind."""
    model = nn.Sequential(nn.Linear(256, 256, device="meta"))
    try:
        qtrain.convert(model, recipe, gemm=asked, backend="reference")  # pyright: ignore[reportArgumentType]
    except UserError:
        return "auto"
    return asked


def gemm_flops(layer: nn.Module, tokens: int, device: str) -> dict[str, float]:
    """FLOPs of fprop, dgrad and wgrad of a linear layer, by the precision that multiplies them; nothing of others."""
    if not isinstance(layer, nn.Linear):
        return {}
    each = 2.0 * tokens * layer.in_features * layer.out_features
    if not isinstance(layer, QuantLinear):
        return {"bfloat16": 3 * each}
    found: dict[str, float] = {}
    for gemm in ("fprop", "dgrad", "wgrad"):
        kind = layer.numerics.product(gemm, device).name.replace("float", "bfloat16").removesuffix("_block")
        found[kind] = found.get(kind, 0.0) + each
    return found


# --------------------------------------------------------------------------------------------------------------- time


def in_turns(functions: Mapping[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each function in each round; all of them run in each round, after two runs that are not counted.

    On CUDA a function runs as often in a row as fills 20 ms: launches wait in the queue, as in training, and the
    device is timed, not the way to it.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        _seconds(function, device)
    calls = {name: _calls(_seconds(function, device), device) for name, function in functions.items()}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(_seconds(function, device, calls[name]))
    return times


def _calls(seconds: float, device: str) -> int:
    """How often in a row."""
    return 1 if device == "cpu" else min(100, math.ceil(QUEUED_SECONDS / seconds))


def _seconds(function: Callable[[], Any], device: str, calls: int = 1) -> float:
    """Of one call, of so many in a row."""
    result = None
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        result = function()
    _wait(device)
    seconds = time.perf_counter() - start
    del result  # freed outside the timed part
    return seconds / calls


def _wait(device: str) -> None:
    """For all that was launched."""
    if device == "cuda":
        torch.cuda.synchronize()


def ratio(times: Times, of: str, over: str) -> float:
    """Median over the rounds of one function's time over another's of the same round."""
    return median(a / b for a, b in zip(times[of], times[over], strict=True))


def launched(function: Callable[[], Any], device: str) -> Row:
    """What one call costs the host, and what it launches on the device; nothing on CPU. host ms: until the call
    returns; device ms: sum of its kernels; launches: their count, with copies and fills; longest: the six kernels that
    take most of the time."""
    if device == "cpu":
        return {}
    from torch.profiler import ProfilerActivity, profile

    function()
    _wait(device)
    start = time.perf_counter()
    function()
    host = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        function()
        _wait(device)
    kernels = sorted(profiled.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
    longest = (f"{each.key[:60]} x {each.count}: {each.self_device_time_total:.0f} us" for each in kernels[:6])
    return {
        "host ms": host * 1e3,
        "device ms": sum(kernel.self_device_time_total for kernel in kernels) / 1e3,
        "launches": sum(kernel.count for kernel in kernels),
        "longest": "; ".join(longest),
    }


# ------------------------------------------------------------------------------------------------------------ quality


def sqnr(found: Tensor, exact: Tensor) -> float:
    """Signal to quantisation noise, dB."""
    found, exact = found.double(), exact.double()
    return 10 * torch.log10(exact.square().sum() / (found - exact).square().sum()).item()


def equality(pairs: Iterable[tuple[Tensor, Tensor]], options: argparse.Namespace) -> Row:
    """equal: the least share of equal values over pairs of a result and the reference's; None in a rehearsal, which
    computes nothing. unequal: the results that differ, by their places."""
    shares = [share_equal(found, wanted) for found, wanted in pairs]
    if options.rehearse:
        return {"equal": None}
    unequal = [f"result {place} of {len(shares)}: {share:.6g}" for place, share in enumerate(shares, 1) if share < 1]
    return {"equal": min(shares)} | ({"unequal": "; ".join(unequal)} if unequal else {})


def share_equal(found: Tensor, wanted: Tensor) -> float:
    """The share of values that have the same bits; a NaN equals a NaN. ValueError for another dtype or shape."""
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        got, asked = (f"{tuple(each.shape)} {each.dtype}" for each in (found, wanted))
        raise ValueError(f"the result is {got}; the reference gives {asked}")
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[found.element_size()]
    same = found.contiguous().view(bits) == wanted.contiguous().view(bits)
    if found.is_floating_point():
        same |= found.isnan() & wanted.isnan()
    return same.count_nonzero().item() / same.numel() if same.numel() else 1.0


def checked(row: Row, key: str, *kept: str) -> Row:
    """The row where all values equal the reference's, or where none was compared; else only that they do not: a wrong
    kernel has no speed."""
    if row.get("equal") in (1, None):
        return row
    return {key: f"{row[key]}: WRONG"} | {name: row[name] for name in (*kept, "equal") if name in row}


# ------------------------------------------------------------------------------------------------------------ machine


def describe(options: argparse.Namespace) -> str:
    """What the kernels run on."""
    if options.device == "cuda":
        return torch.cuda.get_device_name()
    if options.rehearse:
        import fake_driver

        return fake_driver.DEVICE
    threads = f"{torch.get_num_threads()} threads of {environment()['processor']}"
    interpreted = options.backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return f"Triton's interpreter on {threads}" if interpreted else threads


def slug(text: str) -> str:
    """As part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
