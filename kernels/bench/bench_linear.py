"""A linear layer, forward alone and with its backward: time over torch's in bfloat16, error, what it keeps.

    python kernels/bench/bench_linear.py
    python kernels/bench/bench_linear.py --tokens 16384 --features 4096 --out-features 14336 --out kernels/bench/results

Input, output gradient and products in bfloat16 under autocast, weight in float32; a new step's keys each time, so that
the weight is quantised anew, also in the forward alone. Operations: 6 tokens * in * out. x: speed over bfloat16's, or
over the same recipe by the reference in eager, our own unfused path. Kept: bytes a token that a forward saves for its
backward. Equal: the share of output, input gradient and weight gradient that is the reference's, bit for bit; where a
value is not, no time is shown. On CUDA also: host time, launches and the longest kernels of a forward and backward.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from statistics import median

import torch
from harness import Case, Row, arguments, equality, gemm_flops, gemm_for, in_turns, launched, ratio, run, sqnr
from peaks import utilisation
from torch import Tensor, nn

import qtrain

RECIPES = ("quartet", "quartet_v1", "quartet_ii", "nvidia_nvfp4", "quest", "fp8_rowwise", "fp8_blockwise", "mxfp8")
Step = Callable[[], Tensor]


def layer(recipe: str | None, size: tuple[int, int], device: str, backend: str, gemm: str = "auto") -> nn.Sequential:
    """recipe None: torch's own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*size, bias=False, device=device))
    if recipe is not None:
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


def results(model: nn.Sequential, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Output, input gradient and weight gradient of step 0."""
    _, both = passes(model, x, dy)
    y = both()
    found = [y, x.grad, model.get_parameter("0.weight").grad]
    return [each for each in found if each is not None]


class Linear:
    """What is measured: layers of one size on the same tokens and output gradients."""

    def __init__(self, tokens: int, features: int, out_features: int, options: argparse.Namespace):
        self.size, self.options = (features, out_features), options
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(tokens, features, generator=generator).to(options.device, torch.bfloat16).requires_grad_()
        self.dy = torch.randn(tokens, out_features, generator=generator).to(options.device, torch.bfloat16)

    def layer(self, recipe: str | None, gemm: str, backend: str | None = None) -> nn.Sequential:
        return layer(recipe, self.size, self.options.device, backend or self.options.backend, gemm)

    def measure(self, recipe: str | None, gemm: str) -> Row:
        """recipe None: torch's own layer in bfloat16."""
        x, dy, device = self.x, self.dy, self.options.device
        plain = self.layer(None, gemm)
        model = plain if recipe is None else self.layer(recipe, gemm)
        functions = {"bfloat16": passes(plain, x, dy), "ours": passes(model, x, dy)}
        exact = x.detach().float() @ plain.get_parameter("0.weight").detach().float().T
        quality: Row = {"SQNR dB": sqnr(functions["ours"][1](), exact), "equal": 1.0}
        if recipe is not None:
            unfused = self.layer(recipe, gemm, "reference")
            functions["reference"] = passes(unfused, x, dy)
            pairs = zip(results(model, x, dy), results(unfused, x, dy), strict=True)
            quality |= equality(pairs, self.options)
            if quality["equal"] not in (1, None):
                return quality
        forward_times = in_turns(
            {name: forward for name, (forward, _) in functions.items() if name != "reference"},
            self.options.rounds,
            device,
        )
        both_passes = {name: both for name, (_, both) in functions.items()}
        times = in_turns(both_passes, self.options.rounds, device)
        seconds, flops = median(times["ours"]), gemm_flops(model[0], len(x), device)
        device_name = torch.cuda.get_device_name() if device == "cuda" else ""
        return {
            "gemms": "" if recipe is None else str(model[0]).rpartition("gemms ")[2].rstrip(")"),
            "forward ms": median(forward_times["ours"]) * 1e3,
            "forward x bfloat16": ratio(forward_times, "bfloat16", "ours"),
            "ms": seconds * 1e3,
            "x bfloat16": ratio(times, "bfloat16", "ours"),
            "x reference": ratio(times, "reference", "ours") if "reference" in times else None,
            "TFLOP/s": sum(flops.values()) / seconds / 1e12,
            **utilisation(flops, seconds, device_name),
            "kept B/token": kept_bytes(model, x),
            **launched(both_passes["ours"], device),
            **quality,
        }


def cases(
    tokens: int, features: int, out_features: int, gemms: tuple[str, ...], options: argparse.Namespace
) -> Iterator[Case]:
    """bfloat16, then each recipe by each of the kinds of products that it has."""
    inputs = cache(partial(Linear, tokens, features, out_features, options))  # made by the first case that is measured

    def measure(recipe: str | None, gemm: str) -> Row:
        return inputs().measure(recipe, gemm)

    yield "bfloat16", partial(measure, None, "auto")
    for recipe in RECIPES:
        for gemm in dict.fromkeys(gemm_for(recipe, gemm) for gemm in gemms):
            yield recipe if gemm == "auto" else f"{recipe}, {gemm}", partial(measure, recipe, gemm)


def main() -> int:
    options = arguments(__doc__, tokens=2048, features=1024, out_features=1024, rounds=5, gemm="auto")
    size = options.tokens, options.features, options.out_features
    kind = "" if options.gemm == "auto" else f", gemm {options.gemm}"
    title = f"linear, {size[0]} tokens, {size[1]} -> {size[2]}{kind}"
    name = f"linear-{'x'.join(map(str, size))}{kind.replace(', gemm ', '-')}"
    return run(name, title, "recipe", cases(*size, (options.gemm,), options), options)


if __name__ == "__main__":
    sys.exit(main())
