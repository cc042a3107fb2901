"""Generation with kept keys and values: in fewer bits, of several prompts, from packed weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import qtrain
from qtrain.config.settings import parse
from qtrain.errors import UserError
from qtrain.models.decoder import Decoder
from qtrain.models.families.llama import Llama
from qtrain.models.generate import generate, generate_batch, round_weights
from qtrain.models.layers import KVCache
from qtrain.quant.kv_cache import kv_codec

VOCABULARY = 61
PROMPTS = [[4, 9, 3], [7], [8, 1, 1, 30, 5, 2, 60]]


def llama(std: float = 0.2, **changes: Any) -> Decoder:
    torch.manual_seed(0)
    sizes = {"name": "nano", "dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 128, "seq_len": 32}
    model = Decoder(parse(Llama, {"family": "llama", **sizes, **changes}), VOCABULARY)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
    nn.init.normal_(model.embed.weight)
    return model.eval()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_each_of_several_prompts_goes_on_as_alone(temperature: float) -> None:
    """Beyond seq_len too: the longest leaves the cache first."""
    model, lengths = llama(), []
    model.embed.register_forward_hook(lambda _, inputs, __: lengths.append(tuple(inputs[0].shape)))
    together = [*generate_batch(model, PROMPTS, 28, temperature=temperature, seed=3)]
    assert lengths[:3] == [(1, 3), (1, 1), (1, 7)] and set(lengths[3:28]) == {(3, 1)}
    assert (2, 1) in lengths and (1, 32) in lengths
    for i, prompt in enumerate(PROMPTS):
        alone = [*generate(model, prompt, 28, temperature=temperature, seed=3 + i)]
        assert [tokens[i] for tokens in together] == alone
    assert len(set(zip(*together, strict=True))) == 3


@pytest.mark.parametrize(
    ("name", "bits", "error"),
    [
        ("bf16", 16, 2**-8),
        ("int8", 8 + 32 / 64, 1 / 127),
        ("int4", 4 + 32 / 64, 1 / 15),
        ("mxfp4", 4 + 8 / 32, 0.26),
        ("int4_sym/32/float16", 4 + 16 / 32, 1 / 14),
        ("int4_asym/64/bfloat16", 4 + (16 + 8) / 64, 1 / 14),  # a zero point in a byte of its own
    ],
)
def test_a_cache_takes_the_bits_of_its_format(name: str, bits: float, error: float) -> None:
    codec = kv_codec(name)
    cache = KVCache(2, 20, 64, codec)
    k, v = torch.randn(2, 1, 2, 13, 64).unbind()
    cache.append(k[:, :, :7], v[:, :, :7])
    for i in range(7, 13):
        keys, values = cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
    assert 8 * cache.nbytes() / (2 * k.numel()) == bits
    for kept, given in ((keys, k), (values, v)):
        largest = given.abs().amax(-1, keepdim=True)
        assert ((kept - given).abs() <= error * largest * 1.001).all()
        assert kept.shape == given.shape and (kept - given).abs().max() > 0


def test_generation_with_a_cache_in_16_bits_is_that_without() -> None:
    model = llama()
    wanted = [*generate(model, PROMPTS[0], 20, temperature=0, cached=False)]
    assert [*generate(model, PROMPTS[0], 20, temperature=0, codec=kv_codec("bf16"))] == wanted


@torch.no_grad()
def test_logits_err_with_the_bits_of_the_cache() -> None:
    model = llama(std=0.08)
    text = torch.randint(VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(1))
    wanted, errors = model(text)[:, 8:], []
    for name in ("bf16", "int8", "int4"):
        for layer in model.layers:
            layer.attention.caches = [KVCache(2, 32, 32, kv_codec(name))]
        model(text[:, :8])
        found = torch.cat([model(text[:, i : i + 1], start=i) for i in range(8, 24)], 1)
        for layer in model.layers:
            layer.attention.caches = ()
        errors.append(float((found - wanted).norm() / wanted.norm()))
    assert 0 < errors[0] < 0.002 and errors[0] < errors[1] < 0.006 and 4 * errors[1] < errors[2] < 0.1


def test_what_no_cache_is_kept_in_is_told() -> None:
    for name, reason in (
        ("nvfp4", "it has a scale of the whole tensor"),
        ("int9x", "no cache in 'int9x'"),
    ):
        with pytest.raises(UserError, match=reason):
            kv_codec(name)
    model = llama(n_heads=8, n_kv_heads=8)
    with pytest.raises(UserError, match="do not fill the blocks of 32"):
        [*generate(model, [1], 2, codec=kv_codec("mxfp4"))]


@pytest.mark.parametrize("recipe", ["quest", "quest_weight_only", "quartet"])
def test_packed_weights_generate_as_the_layers_do(recipe: str) -> None:
    model = llama()
    qtrain.convert(model, recipe, seed=1)
    with torch.no_grad():
        wanted = [*generate(model, PROMPTS[2], 20, temperature=0, cached=False)]
        qtrain.pack(model)
        assert [*generate(model, PROMPTS[2], 20, temperature=0)] == wanted
        assert [tokens[2] for tokens in generate_batch(model, PROMPTS, 20, temperature=0)] == wanted


def test_weights_rounded_once_generate_as_under_autocast() -> None:
    model = llama(tie_embeddings=True)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = [*generate(model, PROMPTS[0], 12, temperature=0, cached=False)]
        round_weights(model)
        assert model.embed.weight.dtype == torch.float32 and model.lm_head.weight.dtype == torch.bfloat16
        assert [*generate(model, PROMPTS[0], 12, temperature=0)] == wanted
