"""What the benchmarks share: timing in turns, ratios within one run, the table and its JSON."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

import qtrain
from qtrain.errors import UserError
from qtrain.run_directory import environment

Times = Mapping[str, list[float]]


def arguments(doc: str | None, **defaults: int | str) -> argparse.Namespace:
    """The options of every benchmark: --out, --device, --threads, and its own with their defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result as JSON too")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch, on CPU (default: all cores)")
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default {value}")
    options = parser.parse_args()
    if options.out and not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: there is no folder {options.out.parent}; make it")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no CUDA device; use --device cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


def gemm_for(recipe: str, asked: str) -> str:
    """asked, or "auto" for a recipe that has no product of that kind."""
    model = torch.nn.Sequential(torch.nn.Linear(256, 256, device="meta"))
    try:
        qtrain.convert(model, recipe, gemm=asked, backend="reference")  # pyright: ignore[reportArgumentType]
    except UserError:
        return "auto"
    return asked


def in_turns(functions: Mapping[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each function in each round; all of them run once in a round, after one run that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            seconds = _seconds(function, device)
            if number:
                times[name].append(seconds)
    return times


def _seconds(function: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    del result  # freed outside the timed part
    return seconds


def ratio(times: Times, of: str, over: str) -> float:
    """Median over the rounds of one function's time over another's of the same round."""
    return median(a / b for a, b in zip(times[of], times[over], strict=True))


def sqnr(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Signal to quantisation noise, dB."""
    found, exact = found.double(), exact.double()
    return 10 * torch.log10(exact.square().sum() / (found - exact).square().sum()).item()


def report(name: str, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """The rows as a table, and with the machine as JSON."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print(f"\n{name}, {describe(options.device)}\n")
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(_shown(row.get(column)) for column in columns) + " |")
    if options.out:
        settings = {key: value for key, value in vars(options).items() if key != "out"}
        machine = environment() | {"device": describe(options.device)}
        options.out.write_text(
            json.dumps({"name": name, "settings": settings, "rows": rows, "machine": machine}, indent=2) + "\n"
        )


def describe(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads of {environment()['processor']}"


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
