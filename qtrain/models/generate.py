"""Text from a model, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from qtrain.errors import UserError
from qtrain.models.decoder import Decoder
from qtrain.models.layers import Attention, KVCache


def generate(
    model: Decoder,
    prompt_ids: Sequence[int],
    n_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
    cached: bool = True,
) -> Iterator[int]:
    """n_tokens sampled after prompt_ids, one after the other, in eval mode (the mode of each module is restored).

    temperature 0 takes the likeliest token; top_k keeps only so many candidates. The same seed draws the same tokens,
    whatever the global random state.
    cached: keys and values are kept, so that each token is computed once, as long as the text fits into
    config.seq_len tokens. Beyond, and without it, the model sees the last config.seq_len tokens anew for each.
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
    return _tokens(
        model, list(prompt_ids), n_tokens, partial(_pick, temperature=temperature, top_k=top_k), seed, cached
    )


def _tokens(
    model: Decoder, ids: list[int], n_tokens: int, pick: Callable[..., int], seed: int, cached: bool
) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    longest, end = model.config.seq_len, len(ids) + n_tokens
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    with _evaluating(model):
        if cached and len(layers) == len(model.layers):  # nothing else sees other tokens
            with _caching(layers, longest):
                start = 0
                while len(ids) < min(end, longest + 1):
                    logits = _logits(model, ids[start:], start)
                    start = len(ids)
                    ids.append(pick(logits, generator=generator))
                    yield ids[-1]
        while len(ids) < end:
            ids.append(pick(_logits(model, ids[-longest:]), generator=generator))
            yield ids[-1]


def _logits(model: Decoder, ids: list[int], start: int = 0) -> Tensor:
    """(V,) of the token that follows."""
    with torch.no_grad():
        return model(torch.tensor([ids], device=model.embed.weight.device), start=start)[0, -1]


@contextmanager
def _evaluating(model: Decoder) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _caching(layers: Sequence[Attention], n_tokens: int) -> Iterator[None]:
    for layer in layers:
        layer.cache = KVCache(layer.kv_heads, n_tokens, layer.head_dim)
    try:
        yield
    finally:
        for layer in layers:
            layer.cache = None


def _pick(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """One token from logits (V,); on the CPU in float64, so that a draw does not depend on the device's sampler."""
    logits = logits.to("cpu", torch.float64)
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
