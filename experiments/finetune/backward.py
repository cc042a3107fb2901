"""How long a backward takes when but some rows of the weight train (EfQAT): python experiments/finetune/backward.py"""

from __future__ import annotations

import time

import torch
from torch import nn

import qtrain

SIZE, TOKENS, REPEATS = 1024, 1024, 6


def main() -> None:
    torch.set_num_threads(1)
    for recipe in ("quest", "quartet"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False))
        qtrain.convert(model, recipe)
        qtrain.set_step(model, 0)
        x, dy = torch.randn(TOKENS, SIZE, requires_grad=True), torch.randn(TOKENS, SIZE)
        found = {}
        for share in (1.0, 0.25, 0.1):
            model[0].rows = None if share == 1.0 else torch.arange(round(share * SIZE))
            times = []
            for _ in range(REPEATS):
                y = model(x)
                start = time.perf_counter()
                y.backward(dy)
                times.append(time.perf_counter() - start)
                model.zero_grad()
            found[f"{share:.0%}"] = f"{1e3 * min(times):.1f} ms"
        print(recipe, found)


if __name__ == "__main__":
    main()
