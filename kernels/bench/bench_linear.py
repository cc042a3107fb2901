"""A linear layer, forward alone and with its backward: time over torch's in bfloat16, error, what it keeps.

    python kernels/bench/bench_linear.py
    python kernels/bench/bench_linear.py --tokens 16384 --features 4096 --out-features 14336 --out kernels/bench/results

Input, output gradient and products in bfloat16 under autocast, weight in float32; a new step's keys each time, so that
the weight is quantised anew, also in the forward alone. Operations: 6 tokens * in * out. x: speed over bfloat16's, or
over the same recipe by the reference in eager, our own unfused path. Kept: bytes a token that a forward saves for its
backward. Equal: the share of output and weight gradient that is the reference's, bit for bit; where a value is not, no
time is shown.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from harness import arguments, checked, gemm_flops, gemm_for, in_turns, ratio, report, share_equal, sqnr
from peaks import utilisation
from torch import Tensor, nn

import qtrain

RECIPES = ("quartet", "quartet_v1", "quartet_ii", "nvidia_nvfp4", "quest", "fp8_rowwise", "mxfp8")
Step = Callable[[], Tensor]


def layer(recipe: str | None, size: tuple[int, int], device: str, backend: str, gemm: str = "auto") -> nn.Sequential:
    """recipe None: torch's own. gemm "auto" for a recipe that has no product of the kind that is asked for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*size, bias=False, device=device))
    if recipe is not None:
        gemm = gemm_for(recipe, gemm)
        qtrain.convert(model, recipe, backend=backend, gemm=gemm)  # pyright: ignore[reportArgumentType]
    return model


def passes(model: nn.Sequential, x: Tensor, dy: Tensor) -> tuple[Step, Step]:
    """Runs a forward, or forward and backward, of a new step each time; gives the output."""
    steps = iter(range(2**31))

    def forward() -> Tensor:
        qtrain.set_step(model, next(steps))
        with torch.autocast(x.device.type, torch.bfloat16):
            return model(x)

    def forward_alone() -> Tensor:
        with torch.no_grad():
            return forward()

    def both() -> Tensor:
        model.zero_grad(set_to_none=True)
        x.grad = None
        y = forward()
        y.backward(dy)
        return y.detach()

    return forward_alone, both


def kept_bytes(model: nn.Sequential, x: Tensor) -> float:
    """What autograd keeps of a forward, bytes a token: of all tokens less that of half of them, in which what belongs
    to the weight cancels."""
    half = len(x) // 2
    return (_kept_bytes(model, x) - _kept_bytes(model, x[:half])) / (len(x) - half)


def _kept_bytes(model: nn.Sequential, x: Tensor) -> int:
    """Each storage once."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast(x.device.type, torch.bfloat16):
            y = model(x)
        del y
    return sum(found.values())


def share_of_reference(model: nn.Sequential, unfused: nn.Sequential, x: Tensor, dy: Tensor) -> float:
    """Of output and weight gradient of the same step."""
    found = []
    for one in (model, unfused):
        _, both = passes(one, x, dy)
        y = both()
        found.append((y, one.get_parameter("0.weight").grad))
    return min(share_equal(a, b) for a, b in zip(*found, strict=True))


def main() -> None:
    options = arguments(__doc__, tokens=2048, features=1024, out_features=1024, rounds=5, gemm="auto")
    size, device, backend = (options.features, options.out_features), options.device, options.backend
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.tokens, size[0], generator=generator).to(device, torch.bfloat16).requires_grad_()
    dy = torch.randn(options.tokens, size[1], generator=generator).to(device, torch.bfloat16)
    models = {"bfloat16": layer(None, size, device, backend)}
    models |= {recipe: layer(recipe, size, device, backend, options.gemm) for recipe in RECIPES}
    unfused = {recipe: layer(recipe, size, device, "reference", options.gemm) for recipe in RECIPES}
    forwards, boths = {}, {}
    for name, model in (models | {f"{recipe} reference": model for recipe, model in unfused.items()}).items():
        forwards[name], boths[name] = passes(model, x, dy)
    forward_times = in_turns({name: forwards[name] for name in models}, options.rounds, device)
    times = in_turns(boths, options.rounds, device)
    exact = x.detach().float() @ models["bfloat16"].get_parameter("0.weight").detach().float().T
    device_name = torch.cuda.get_device_name() if device == "cuda" else ""

    def row(name: str) -> dict[str, Any]:
        seconds, plain = median(times[name]), name == "bfloat16"
        flops = gemm_flops(models[name][0], options.tokens, device)
        return {
            "recipe": name,
            "gemms": "" if plain else str(models[name][0]).rpartition("gemms ")[2].rstrip(")"),
            "forward ms": median(forward_times[name]) * 1e3,
            "forward x bfloat16": ratio(forward_times, "bfloat16", name),
            "ms": seconds * 1e3,
            "x bfloat16": ratio(times, "bfloat16", name),
            "x reference": None if plain else ratio(times, f"{name} reference", name),
            "TFLOP/s": sum(flops.values()) / seconds / 1e12,
            **utilisation(flops, seconds, device_name),
            "kept B/token": kept_bytes(models[name], x),
            "SQNR dB": sqnr(boths[name](), exact),
            "equal": 1.0 if plain else share_of_reference(models[name], unfused[name], x, dy),
        }

    rows = [checked(row(name), "recipe", "gemms", "SQNR dB") for name in models]
    sizes = f"{options.tokens}x{size[0]}x{size[1]}"
    kind = "" if options.gemm == "auto" else f", gemm {options.gemm}"
    title = f"linear, {options.tokens} tokens, {size[0]} -> {size[1]}{kind}"
    report(f"linear-{sizes}{kind.replace(', gemm ', '-')}", title, rows, options)


if __name__ == "__main__":
    main()
