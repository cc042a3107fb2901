"""Text from a model, token by token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qtrain.errors import UserError
from qtrain.models.decoder import Decoder


@torch.no_grad()
def generate(
    model: Decoder,
    prompt_ids: Sequence[int],
    n_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
) -> list[int]:
    """prompt_ids and n_tokens sampled after them, in eval mode (the mode of each module is restored).

    temperature 0 takes the likeliest token; top_k keeps only so many candidates. The model sees the last
    config.seq_len tokens. The same seed draws the same tokens, whatever the global random state.
    UserError for an empty prompt, an id beyond the vocabulary, or a negative temperature.
    """
    if not prompt_ids:
        raise UserError("generate needs at least one prompt token, found none; give a non-empty prompt")
    beyond = [i for i in prompt_ids if not 0 <= i < model.vocab_size]
    if beyond:
        raise UserError(
            f"prompt token {beyond[0]} is outside the vocabulary of {model.vocab_size}; check the tokenizer"
        )
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise UserError(f"temperature must be >= 0 and top_k >= 1 or None, found {temperature} and {top_k}")
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt_ids)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for _ in range(n_tokens):
            window = torch.tensor([ids[-model.config.seq_len :]], device=model.embed.weight.device)
            ids.append(_pick(model(window)[0, -1], temperature, top_k, generator))
    finally:
        for module, training in modes.items():
            module.training = training
    return ids


def _pick(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """One token from logits (V,); on the CPU in float64, so that a draw does not depend on the device's sampler."""
    logits = logits.to("cpu", torch.float64)
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
