"""What a language model is trained on and judged by: the cross-entropy of each next token that counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtrain.data.batches import ValidationSet
from qtrain.data.counted import counts, ids_of
from qtrain.errors import UserError
from qtrain.metrics import bits_per_byte
from qtrain.models.chunked_loss import UNCOUNTED

# B sequences, T tokens, N documents


def next_token_loss(
    model: nn.Module,
    tokens: Tensor,
    reduction: str = "mean",
    *,
    chunked: bool = False,
    end_of_document: int | None = None,
) -> Tensor:
    """Cross-entropy in nats of each next token. tokens: (B, T+1) int64; the loss is float32 whatever the logits are.

    A token that is stored as ~id (`qtrain.data.counted`) is read as others are, and its own prediction does not count.
    reduction: sum | mean, which is the sum over B T, however many tokens count.
    chunked: see `qtrain.models.chunked_loss`. end_of_document: the token after which another document begins, for a
    model whose tokens see their own document alone. The first token of a document is predicted by the end of the one
    before all the same: with and without it the loss is a mean over the same tokens.
    """
    inputs, targets = inputs_and_targets(tokens)
    documents = documents_in(inputs, end_of_document)
    if chunked:
        return model(inputs, targets, reduction, **documents)
    logits = model(inputs, **documents)
    return cross_entropy(logits, targets, reduction)


def distillation_loss(
    model: nn.Module,
    teacher: nn.Module,
    tokens: Tensor,
    *,
    temperature: float,
    weight: float,
    end_of_document: int | None = None,
) -> Tensor:
    """weight * temperature^2 * KL(teacher || model) + (1 - weight) * cross-entropy, () float32, each the sum over the
    tokens that count, divided by B T. tokens: (B, T+1), as for `next_token_loss`. teacher: a model of the same
    vocabulary, which gets no gradient. Source: Hinton et al., arXiv 1503.02531."""
    inputs, targets = inputs_and_targets(tokens)
    documents = documents_in(inputs, end_of_document)
    logits = model(inputs, **documents)
    with torch.no_grad():
        wanted = (teacher(inputs, **documents).float() / temperature).log_softmax(-1)
    found = (logits.float() / temperature).log_softmax(-1)
    each = F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
    divergence = (each * (targets != UNCOUNTED)).sum() / targets.numel()
    loss = weight * temperature**2 * divergence
    return loss if weight == 1.0 else loss + (1.0 - weight) * cross_entropy(logits, targets, "mean")


def inputs_and_targets(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(ids that the model reads, ids that it is to predict, UNCOUNTED where none counts), (B, T) each, of (B, T+1)."""
    return ids_of(tokens[:, :-1]), torch.where(counts(tokens[:, 1:]), tokens[:, 1:], UNCOUNTED)


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """logits (B, T, V), targets (B, T) of `inputs_and_targets` -> () float32, as `next_token_loss` reduces it."""
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=UNCOUNTED, reduction="sum")
    return total if reduction == "sum" else total / targets.numel()


def documents_in(tokens: Tensor, end_of_document: int | None) -> dict[str, Tensor]:
    """What tells a model the documents of ids (B, T): {"cu_seqlens": (N + 1,) int32}, where each begins among the
    B T tokens, and B T. Nothing where end_of_document is None.

    A document begins with every row and after every end_of_document, which belongs to the document that it ends. This
    waits for the device: how many documents there are is the size of a tensor.
    """
    if end_of_document is None:
        return {}
    begins = torch.ones_like(tokens, dtype=torch.bool)
    begins[:, 1:] = tokens[:, :-1] == end_of_document
    return {"cu_seqlens": F.pad(begins.flatten().nonzero().flatten(), (0, 1), value=tokens.numel()).int()}


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Tensor], device: torch.device, precision: str, **options: Any
) -> tuple[float, int]:
    """(summed loss in nats, predicted tokens that count) over batches of (B, T+1) int64 tokens. options: of
    `next_token_loss`. The model's mode is restored."""
    training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    count = 0
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        for tokens in batches:
            total += next_token_loss(model, tokens.to(device), reduction="sum", **options).double()
            count += int(counts(tokens[:, 1:]).sum())
    model.train(training)
    return total.item(), count


def validation_values(sets: Mapping[str, ValidationSet], sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """val_loss in nats per token and val_bits_per_byte of the run's own text, and of each set that has a name these
    with its name and val_tokens: how many were predicted. sums: (summed loss, tokens) of each set."""
    for name, (_, count) in sums.items():
        if not count:
            raise UserError(
                f"no token of the validation text{name and f' {name!r}'} counts: its windows hold prompts alone; give "
                "it more conversations, or shorter prompts"
            )
    losses = {name: total / count for name, (total, count) in sums.items()}
    loss = sum(each.share * losses[name] for name, each in sets.items() if each.share)
    bytes_per_token = sum(each.share * each.bytes_per_token for each in sets.values())
    values: dict[str, float] = {"val_loss": loss, "val_bits_per_byte": bits_per_byte(loss, 1, bytes_per_token)}
    for name in filter(None, sets):
        values[f"val_loss/{name}"] = losses[name]
        values[f"val_bits_per_byte/{name}"] = bits_per_byte(losses[name], 1, sets[name].bytes_per_token)
        values[f"val_tokens/{name}"] = int(sums[name][1])
    return values
