"""Text from a model, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.errors import UserError
from qtrain.models.decoder import Decoder
from qtrain.models.layers import Attention, Codec, KVCache
from qtrain_kernels.precision import Linear


def generate(model: Decoder, prompt_ids: Sequence[int], n_tokens: int, **options: Any) -> Iterator[int]:
    """n_tokens sampled after prompt_ids, one after the other: `generate_batch` of one prompt."""
    batch = generate_batch(model, [prompt_ids], n_tokens, **options)
    return (token for (token,) in batch)


def generate_batch(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
    cached: bool = True,
    codec: Codec | None = None,
) -> Iterator[list[int]]:
    """n_tokens sampled after each of the prompts, one of each at a time, in eval mode (the mode of each module is
    restored). Prompts may differ in length; each goes on as it does alone, to the rounding of products of more rows.

    temperature 0 takes the likeliest token; top_k keeps only so many candidates. Prompt i draws with seed + i: the same
    seed draws the same tokens, whatever the global random state.
    cached: keys and values are kept, so that each token is computed once, as long as the text fits into
    config.seq_len tokens. Beyond, and without it, the model sees the last config.seq_len tokens anew for each.
    codec: how they are kept (`qtrain.quant.kv_codec`); None keeps them as they are.
    UserError for an empty prompt, one longer than config.seq_len, an id beyond the vocabulary, and for numbers out of
    range.
    """
    for ids in prompts:
        _check(model, ids)
    if not 0 <= temperature < math.inf or (top_k is not None and top_k < 1):
        raise UserError(f"temperature must be >= 0 and finite, and top_k >= 1 or None, found {temperature} and {top_k}")
    if n_tokens < 0 or not 0 <= seed < 2**31:
        raise UserError(f"n_tokens must be >= 0, and seed >= 0 and below 2^31, found {n_tokens} and {seed}")
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    picks = [partial(_pick, temperature=temperature, top_k=top_k, generator=each) for each in generators]
    return _tokens(model, [list(ids) for ids in prompts], n_tokens, picks, cached, codec)


def _check(model: Decoder, ids: Sequence[int]) -> None:
    if not ids:
        raise UserError("generate needs at least one prompt token, found none; give a non-empty prompt")
    beyond = [i for i in ids if not 0 <= i < model.vocab_size]
    if beyond:
        raise UserError(
            f"prompt token {beyond[0]} is outside the vocabulary of {model.vocab_size}; check the tokenizer"
        )
    if len(ids) > model.config.seq_len:
        raise UserError(
            f"the prompt has {len(ids)} tokens, and the model {model.config.name} reads at most "
            f"model.seq_len={model.config.seq_len}; shorten it"
        )


def _tokens(
    model: Decoder,
    texts: list[list[int]],
    n_tokens: int,
    picks: Sequence[Callable[[Tensor], int]],
    cached: bool,
    codec: Codec | None,
) -> Iterator[list[int]]:
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    keeps = cached and len(layers) == len(model.layers)  # nothing else sees other tokens
    longest = model.config.seq_len
    caches = [
        [KVCache(layer.kv_heads, longest, layer.head_dim, codec) for layer in layers] if keeps else [] for _ in texts
    ]
    with _evaluating(model):
        for _ in range(n_tokens):
            found = [pick(logits) for pick, logits in zip(picks, _next(model, layers, texts, caches), strict=True)]
            for text, token in zip(texts, found, strict=True):
                text.append(token)
            yield found


@torch.no_grad()
def _next(
    model: Decoder, layers: Sequence[Attention], texts: Sequence[list[int]], caches: Sequence[Sequence[KVCache]]
) -> list[Tensor]:
    """(V,) of the token that follows each text. Texts of which all tokens but the last are kept go together."""
    longest, device = model.config.seq_len, model.embed.weight.device
    found: dict[int, Tensor] = {}
    together = []
    for i, (text, own) in enumerate(zip(texts, caches, strict=True)):
        if own and own[0].length == len(text) - 1 < longest and own[0].length:
            together.append(i)
        else:
            with _caching(layers, [own] if own and len(text) <= longest else []):
                found[i] = model(torch.tensor([text[-longest:]], device=device), last=True)[0, -1]
    if together:
        starts = [len(texts[i]) - 1 for i in together]
        start = starts[0] if len(starts) == 1 else torch.tensor(starts, device=device)
        tokens = torch.tensor([[texts[i][-1]] for i in together], device=device)
        with _caching(layers, [caches[i] for i in together]):
            found |= dict(zip(together, model(tokens, start=start, last=True)[:, -1], strict=True))
    return [found[i] for i in range(len(texts))]


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
def _caching(layers: Sequence[Attention], rows: Sequence[Sequence[KVCache]]) -> Iterator[None]:
    """rows: the caches of each sequence of a batch, one for each layer."""
    for number, layer in enumerate(layers):
        layer.caches = [row[number] for row in rows]
    try:
        yield
    finally:
        for layer in layers:
            layer.caches = ()


def round_weights(model: Decoder) -> None:
    """Keep the weights of plain linear layers in bfloat16, in place, for generation under bfloat16 autocast: products
    are what they were, since autocast rounds each weight so, and a token reads half the bytes. A head that shares its
    weight with the embedding gets one of its own."""
    for module in model.modules():
        if isinstance(module, Linear) and type(module) is Linear:
            module.weight = nn.Parameter(module.weight.detach().bfloat16(), requires_grad=False)


def _pick(logits: Tensor, *, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """One token from logits (V,); on the CPU in float64, so that a draw does not depend on the device's sampler."""
    logits = logits.to("cpu", torch.float64)
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
