import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtrain.errors import UserError
from qtrain.models.decoder import Decoder, count_parameters
from qtrain.models.families.llama import Llama
from qtrain.models.generate import generate
from qtrain.models.layers import KVCache, rope_tables, rotate

VOCABULARY = 97


def config(**changes: Any) -> Llama:
    base = {"name": "tiny", "dim": 64, "n_layers": 3, "n_heads": 4, "ffn_dim": 96, "seq_len": 32}
    return Llama.model_validate(base | changes)


def llama(seed: int = 0, std: float = 0.2, **changes: Any) -> Decoder:
    """A model whose weights are large enough that every part of it shows in the logits, norms included."""
    torch.manual_seed(seed)
    model = Decoder(config(**changes), VOCABULARY)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=std)
    return model


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize(
    "changes",
    [{}, {"n_kv_heads": 2}, {"n_kv_heads": 1, "tie_embeddings": True}, {"rope_theta": 500.0, "norm_eps": 1e-2}],
    ids=["multi-head", "grouped", "multi-query, tied", "theta and eps"],
)
def test_logits_equal_those_of_transformers(changes: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    ours = llama(**changes)
    theirs = transformers.LlamaForCausalLM(_transformers_config(transformers, ours.config)).eval()
    weights = {_transformers_name(name): value for name, value in ours.state_dict().items()}
    theirs.load_state_dict(weights, strict=True)
    batch = tokens(2, 32)
    with torch.no_grad():
        expected, found = theirs(batch).logits, ours(batch)
    assert expected.std() > 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def _transformers_config(transformers: Any, ours: Llama) -> Any:
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=ours.dim,
        intermediate_size=ours.ffn_dim,
        num_hidden_layers=ours.n_layers,
        num_attention_heads=ours.n_heads,
        num_key_value_heads=ours.kv_heads,
        max_position_embeddings=ours.seq_len,
        rms_norm_eps=ours.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": ours.rope_theta},
        tie_word_embeddings=ours.tie_embeddings,
        attn_implementation="eager",
    )


def _transformers_name(name: str) -> str:
    parts = {
        "embed": "model.embed_tokens",
        "norm": "model.norm",
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "lm_head": "lm_head",
    }
    stem = name.removesuffix(".weight")
    if not stem.startswith("layers."):
        return f"{parts[stem]}.weight"
    _, layer, *rest = stem.split(".")
    module = parts.get(rest[0]) or f"{rest[0].replace('attention', 'self_attn')}.{rest[1]}_proj"
    return f"model.layers.{layer}.{module}.weight"


def test_names_that_recipes_and_checkpoints_rely_on() -> None:
    linears = [name for name, module in Decoder(config(n_layers=1), 7).named_modules() if isinstance(module, nn.Linear)]
    block = [f"layers.0.attention.{x}" for x in "qkvo"] + [f"layers.0.mlp.{x}" for x in ("gate", "up", "down")]
    assert linears == [*block, "lm_head"]
    assert not {"cos", "sin"} & set(Decoder(config(), 7).state_dict())


def test_a_token_changes_no_logits_before_it() -> None:
    model, batch = llama(), tokens(1, 20)
    changed = batch.clone()
    changed[0, 11] = (batch[0, 11] + 1) % VOCABULARY
    with torch.no_grad():
        difference = (model(batch) - model(changed)).abs().amax(-1)[0]
    torch.testing.assert_close(difference[:11], torch.zeros(11), rtol=0, atol=1e-4)
    assert (difference[11:] > 1e-2).all()


def test_a_shorter_sequence_has_the_logits_of_its_place_in_a_longer_one() -> None:
    model, batch = llama(), tokens(2, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(batch[:, :5]), model(batch)[:, :5], rtol=1e-4, atol=1e-4)


def test_rotation_is_a_complex_product_by_position() -> None:
    x = torch.randn(1, 1, 8, 6, generator=torch.Generator().manual_seed(0))
    rotated = rotate(x, *rope_tables(8, 6, 100.0))[0, 0]
    for position in range(8):
        for i in range(3):
            angle = position * 100.0 ** (-2 * i / 6)
            expected = complex(x[0, 0, position, i], x[0, 0, position, i + 3]) * complex(
                math.cos(angle), math.sin(angle)
            )
            found = complex(rotated[position, i], rotated[position, i + 3])
            assert abs(found - expected) < 1e-5


def test_rotation_is_computed_in_float32_under_autocast() -> None:
    x = torch.randn(1, 2, 512, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    cos, sin = rope_tables(512, 8, 10000.0)
    assert torch.equal(rotate(x, cos, sin), rotate(x.float(), cos, sin).bfloat16())


def test_bfloat16_autocast_stays_near_float32() -> None:
    model, batch = llama(std=0.1), tokens(2, 32)
    with torch.no_grad():
        exact = model(batch)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(batch)
    assert rounded.dtype == torch.bfloat16
    error = (rounded.float() - exact).pow(2).mean() / exact.pow(2).mean()
    assert 1e-6 < error < 1e-3


def test_too_long_a_sequence_is_refused() -> None:
    with pytest.raises(UserError, match=r"tiny reads at most model\.seq_len=32 tokens at once, found sequences of 33"):
        llama()(tokens(1, 33))


# --------------------------------------------------------------------------------------------- weights and their number


def test_weights_start_as_the_papers_start_them() -> None:
    torch.manual_seed(0)
    model = Decoder(config(dim=256, ffn_dim=512, n_layers=8, init_std=0.03), 1000)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter))
            continue
        to_residual = name.endswith(("attention.o.weight", "mlp.down.weight"))
        expected = 0.03 / 4 if to_residual else 0.03
        assert parameter.std().item() == pytest.approx(expected, rel=0.02), name
        assert abs(parameter.mean().item()) < expected * 0.02, name


def test_tied_embeddings_are_one_tensor() -> None:
    tied, untied = llama(tie_embeddings=True), llama()
    assert tied.lm_head.weight is tied.embed.weight
    assert untied.lm_head.weight is not untied.embed.weight


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2}, {"tie_embeddings": True}, {"n_layers": 1, "ffn_dim": 100}])
def test_count_parameters(changes: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = Decoder(config(**changes), 1234)
    total = sum(parameter.numel() for parameter in model.parameters())
    embeddings = {model.embed.weight, model.lm_head.weight}
    assert count_parameters(model.config, 1234) == (total, total - sum(weight.numel() for weight in embeddings))


# ----------------------------------------------------------------------------------------------------------- generation


def test_generation_depends_on_its_seed_alone() -> None:
    model = llama(std=0.05)
    torch.manual_seed(5)
    first, state = [*generate(model, [1, 2, 3], 20, seed=7)], torch.get_rng_state()
    torch.manual_seed(6)
    assert [*generate(model, [1, 2, 3], 20, seed=7)] == first
    assert [*generate(model, [1, 2, 3], 20, seed=8)] != first
    assert len(first) == 20
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state), "the global random state was touched"


def test_generation_without_temperature_takes_the_likeliest_token() -> None:
    model = llama()
    expected = [4, 9]
    with torch.no_grad():
        for _ in range(40):  # beyond seq_len: the window moves
            expected.append(int(model(torch.tensor([expected[-32:]]))[0, -1].argmax()))
    assert [4, 9, *generate(model, [4, 9], 40, temperature=0)] == expected
    assert [4, 9, *generate(model, [4, 9], 40, top_k=1, seed=3)] == expected


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2, "qk_norm": True, "head_dim": 24, "qkv_bias": True}], ids=str)
def test_generation_with_a_cache_computes_each_token_once_and_is_the_same(changes: dict[str, Any]) -> None:
    model, lengths = llama(**changes), []
    model.embed.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    cached = [*generate(model, [4, 9, 3], 40, temperature=0)]
    assert lengths == [3] + [1] * 29 + [32] * 10
    lengths.clear()
    assert [*generate(model, [4, 9, 3], 40, temperature=0, cached=False)] == cached
    assert lengths == [*range(3, 32), *[32] * 11]


def test_a_cache_gives_the_logits_of_the_whole_sequence() -> None:
    model, batch = llama(n_kv_heads=2), tokens(2, 20)
    for layer in model.layers:
        layer.attention.caches = [KVCache(2, 32, 16) for _ in range(2)]
    with torch.no_grad():
        parts = [model(batch[:, :7])] + [model(batch[:, i : i + 1], start=i) for i in range(7, 20)]
        for layer in model.layers:
            layer.attention.caches = ()
        torch.testing.assert_close(torch.cat(parts, dim=1), model(batch), rtol=1e-4, atol=1e-4)


def test_generation_draws_in_proportion_among_the_top_k() -> None:
    model = llama()
    model.layers = nn.ModuleList()  # 2000 forwards of a model with blocks take minutes on a busy machine
    nn.init.zeros_(model.norm.weight)
    model.lm_head = nn.Linear(64, VOCABULARY)  # the logits are its bias, whatever the tokens
    logits = torch.full((VOCABULARY,), -1.0)
    logits[10], logits[20], logits[30] = 2.0, 1.0, 0.0
    with torch.no_grad():
        model.lm_head.bias.copy_(logits)
    drawn = [*generate(model, [0], 2000, temperature=0.5, top_k=2, seed=1)]
    assert set(drawn) == {10, 20}
    probability = 1 / (1 + math.exp(-(2.0 - 1.0) / 0.5))
    assert drawn.count(10) / 2000 == pytest.approx(
        probability, abs=4 * math.sqrt(probability * (1 - probability) / 2000)
    )


def test_generation_runs_in_eval_mode_and_restores_each_module() -> None:
    model = llama().train()
    model.layers[1].eval()
    seen = []
    model.layers[0].register_forward_hook(lambda module, *_: seen.append(module.training))
    modes = [module.training for module in model.modules()]
    assert len([*generate(model, [1], 2)]) == 2
    assert seen == [False, False]
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "at least one prompt token"),
        ([5, 97], {}, "prompt token 97 is outside the vocabulary of 97"),
        ([-1], {}, "prompt token -1 is outside"),
        ([1], {"temperature": -0.5}, "temperature must be >= 0"),
        ([1], {"temperature": math.nan}, "temperature must be >= 0 and finite.* found nan"),
        ([1], {"n_tokens": -3}, "n_tokens must be >= 0.* found -3 and 0"),
        ([1], {"seed": 2**64}, r"seed >= 0 and below 2\^31"),
        ([1], {"top_k": 0}, "top_k >= 1"),
        ([1] * 33, {}, "the prompt has 33 tokens, and the model .* reads at most model.seq_len=32"),
    ],
)
def test_generation_refuses(prompt: list[int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(llama(), prompt, **{"n_tokens": 1, **options})
