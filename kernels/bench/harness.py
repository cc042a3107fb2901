"""What the benchmarks share: timing in turns, ratios within one run, the table and its JSON."""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from table import markdown
from torch import Tensor, nn

import qtrain
from qtrain.errors import UserError
from qtrain.quant.linear import QuantLinear
from qtrain.run_directory import environment

Times = Mapping[str, list[float]]
QUEUED_SECONDS = 0.02


def arguments(doc: str | None, **defaults: int | str) -> argparse.Namespace:
    """The options of every benchmark: --out, --device, --threads, --backend, and its own with their defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a folder; writes <benchmark>-<machine>.json into it too")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch, on CPU (default: all cores)")
    parser.add_argument("--backend", default="auto", help="of the quantisers (default: triton on cuda)")
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default {value}")
    options = parser.parse_args()
    if options.out and not options.out.is_dir():
        parser.error(f"--out {options.out}: there is no such folder; make it")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no CUDA device; use --device cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cuda" and options.backend == "auto":
        options.backend = "triton"
    return options


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
    for gemm in layer.numerics.gemms:
        kind = layer.numerics.kind(gemm, device).replace("float", "bfloat16")
        found[kind] = found.get(kind, 0.0) + each
    return found


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
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        result = function()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    del result  # freed outside the timed part
    return seconds / calls


def ratio(times: Times, of: str, over: str) -> float:
    """Median over the rounds of one function's time over another's of the same round."""
    return median(a / b for a, b in zip(times[of], times[over], strict=True))


def sqnr(found: Tensor, exact: Tensor) -> float:
    """Signal to quantisation noise, dB."""
    found, exact = found.double(), exact.double()
    return 10 * torch.log10(exact.square().sum() / (found - exact).square().sum()).item()


def share_equal(found: Tensor, wanted: Tensor) -> float:
    """Of the values, which are the same; a NaN equals a NaN."""
    return ((found == wanted) | ((found != found) & (wanted != wanted))).double().mean().item()


def checked(row: dict[str, Any], key: str, *kept: str) -> dict[str, Any]:
    """The row where all values equal the reference's; else only that they do not: a wrong kernel has no speed."""
    if row["equal"] == 1:
        return row
    return {key: f"{row[key]}: WRONG"} | {name: row[name] for name in (*kept, "equal")}


def report(name: str, title: str, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """The rows as a table, and with the machine as JSON. name: of the file, with the sizes."""
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    machine = environment() | {"device": describe(options.device)}
    result = {"name": title, "settings": settings, "rows": rows, "machine": machine}
    print(f"\n{markdown(result)}")
    if options.out:
        path = options.out / f"{name}-{slug(machine['device'])}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written to {path}")


def describe(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads of {environment()['processor']}"


def slug(text: str) -> str:
    """As part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
