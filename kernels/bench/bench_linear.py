"""A linear layer forward and backward: time over torch's in bfloat16, error, and what it keeps for its backward.

    python kernels/bench/bench_linear.py
    python kernels/bench/bench_linear.py --tokens 16384 --features 4096 --out-features 14336 --out linear.json

Input, output gradient and products in bfloat16 under autocast, weight in float32; a new step's keys each time, so that
the weight is quantised anew. Operations: 6 tokens * in * out. Kept: bytes a token that a forward saves for its
backward.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from harness import arguments, gemm_for, in_turns, ratio, report, sqnr
from torch import Tensor, nn

import qtrain

RECIPES = ("quartet", "quartet_v1", "quartet_ii", "nvidia_nvfp4", "quest", "fp8_rowwise", "mxfp8")


def layer(recipe: str | None, size: tuple[int, int], device: str, backend: str, gemm: str = "auto") -> nn.Sequential:
    """recipe None: torch's own. gemm "auto" for a recipe that has no product of the kind that is asked for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*size, bias=False, device=device))
    if recipe is not None:
        gemm = gemm_for(recipe, gemm)
        qtrain.convert(model, recipe, backend=backend, gemm=gemm)  # pyright: ignore[reportArgumentType]
    return model


def trainer(model: nn.Sequential, x: Tensor, dy: Tensor) -> Callable[[], Tensor]:
    """Runs forward and backward, gives the output."""
    steps = iter(range(2**31))

    def step() -> Tensor:
        qtrain.set_step(model, next(steps))
        model.zero_grad(set_to_none=True)
        x.grad = None
        with torch.autocast(x.device.type, torch.bfloat16):
            y = model(x)
        y.backward(dy)
        return y.detach()

    return step


def kept_bytes(model: nn.Sequential, x: Tensor) -> int:
    """What autograd keeps of one forward, each storage once; weights and what belongs to them aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.shape[:1] == x.shape[:1]:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast(x.device.type, torch.bfloat16):
            y = model(x)
        del y
    return sum(found.values())


def main() -> None:
    options = arguments(__doc__, tokens=2048, features=1024, out_features=1024, rounds=5, gemm="auto")
    size, device = (options.features, options.out_features), options.device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.tokens, size[0], generator=generator).to(device, torch.bfloat16).requires_grad_()
    dy = torch.randn(options.tokens, size[1], generator=generator).to(device, torch.bfloat16)
    backend = "triton" if device == "cuda" else "auto"
    plain = layer(None, size, device, backend)
    models = {recipe: layer(recipe, size, device, backend, options.gemm) for recipe in RECIPES}
    unfused = {f"{recipe} reference": layer(recipe, size, device, "reference", options.gemm) for recipe in RECIPES}
    functions = {name: trainer(model, x, dy) for name, model in {"bfloat16": plain, **models, **unfused}.items()}
    times = in_turns(functions, options.rounds, device)
    (weight,) = plain.parameters()
    exact = x.detach().float() @ weight.detach().float().T
    flops = 6 * options.tokens * size[0] * size[1]

    def row(name: str) -> dict[str, Any]:
        seconds = median(times[name])
        model = plain if name == "bfloat16" else models[name]
        found = {
            "recipe": name,
            "gemms": "" if name == "bfloat16" else str(model[0]).rpartition("gemms ")[2].rstrip(")"),
            "ms": seconds * 1e3,
            "TFLOP/s": flops / seconds / 1e12,
            "of bfloat16 speed": ratio(times, "bfloat16", name),
            "x reference": None if name == "bfloat16" else ratio(times, f"{name} reference", name),
            "SQNR dB": sqnr(functions[name](), exact),
            "kept B/token": kept_bytes(model, x) / options.tokens,
        }
        if name != "bfloat16":
            found["equal"] = _equal(models[name], unfused[f"{name} reference"], x, dy)
        return found

    rows = [row(name) for name in ("bfloat16", *RECIPES)]
    report(f"linear {options.tokens} tokens x {size[0]} -> {size[1]}, forward and backward", rows, options)


def _equal(model: nn.Sequential, reference: nn.Sequential, x: Tensor, dy: Tensor) -> bool:
    """Whether outputs and weight gradients of the same step are the same bits."""
    found = []
    for one in (model, reference):
        y = trainer(one, x, dy)()
        found.append((y, one[0].weight.grad))
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


if __name__ == "__main__":
    main()
