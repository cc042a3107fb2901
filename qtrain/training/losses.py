"""What a language model is trained on and judged by: the cross-entropy of each next token."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# B sequences, T tokens


def next_token_loss(model: nn.Module, tokens: Tensor, reduction: str = "mean", *, chunked: bool = False) -> Tensor:
    """Cross-entropy in nats of each next token. tokens: (B, T+1) int64; the loss is float32 whatever the logits are.
    chunked: see `qtrain.models.chunked_loss`."""
    if chunked:
        return model(tokens[:, :-1], tokens[:, 1:], reduction)
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Tensor], device: torch.device, precision: str, *, chunked: bool = False
) -> tuple[float, int]:
    """(summed loss in nats, predicted tokens) over batches of (B, T+1) int64 tokens. The model's mode is restored."""
    training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    count = 0
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        for tokens in batches:
            total += next_token_loss(model, tokens.to(device), reduction="sum", chunked=chunked).double()
            count += tokens[:, 1:].numel()
    model.train(training)
    return total.item(), count
