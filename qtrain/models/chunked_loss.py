"""The cross-entropy of a model's head without the logits: they exist for a chunk of tokens at a time.

torch's own `F.linear_cross_entropy` gives its loss in the dtype of the products, where bfloat16 has three digits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtrain_kernels.precision import matmul

# M tokens, D model dim, V vocabulary
UNCOUNTED = -100  # a target that no loss counts, as for F.cross_entropy
CHUNKS = 8
MIN_ROWS, MAX_ROWS = 128, 4096  # tokens of a chunk: fewer leave a GPU idle, more are as fast


def chunked_cross_entropy(x: Tensor, head: nn.Linear, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats, () float32, of a head that has no bias. x (..., D), targets (...) int64.

    As F.cross_entropy(head(x).float(), targets), but that weight gradients add up over the chunks in float32. The
    gradients are made in the forward, so that no logits wait for the backward. A negative target does not count.
    reduction: sum | mean, which is the sum over all targets, whether they count or not.
    """
    x, targets = x.flatten(0, -2), targets.flatten()
    scale = 1 / len(targets) if reduction == "mean" else 1.0
    return _ChunkedCrossEntropy.apply(x, head.weight, targets, scale, torch.is_grad_enabled())  # pyright: ignore[reportReturnType]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, scale: float, differentiate: bool) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        needs_x, needs_weight = (differentiate and needs for needs in ctx.needs_input_grad[:2])
        dx = torch.empty_like(x) if needs_x else None
        dw = torch.zeros_like(weight) if needs_weight else None
        w = weight.to(dtype)
        with torch.autocast(device, enabled=False):
            rows = min(max(len(x) // CHUNKS, MIN_ROWS), MAX_ROWS)
            for start in range(0, len(x), rows):
                part = slice(start, start + rows)
                own = x[part].to(dtype)
                logits = matmul(own, w.T).float()
                loss += F.cross_entropy(logits, targets[part], ignore_index=UNCOUNTED, reduction="sum")
                if dx is None and dw is None:
                    continue
                slope = logits.softmax(-1)
                del logits
                counted = targets[part] >= 0
                slope[torch.arange(len(own), device=x.device), targets[part].clamp(min=0)] -= 1
                slope *= counted[:, None]
                slope = slope.mul_(scale).to(dtype)
                if dx is not None:
                    dx[part] = matmul(slope, w)
                if dw is not None:
                    dw += matmul(slope.T, own)
        ctx.save_for_backward(dx, dw)
        return loss * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        return (*(None if each is None else each * grads[0] for each in (dx, dw)), None, None, None)
