"""Attention within documents: equal to the documents run one by one, whatever else a run does."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_corpus
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import qtrain
from qtrain.config import config_hash, hashed_keys, parse_saved
from qtrain.config.settings import group_names
from qtrain.data.batches import TokenBatches
from qtrain.data.prepare import prepare
from qtrain.errors import UserError
from qtrain.models.decoder import Decoder
from qtrain.models.families.llama import Llama
from qtrain.plan import budget_tokens
from qtrain.quant import set_step
from qtrain.runs.directory import RunDirectory
from qtrain.train import compose
from qtrain.training import build
from qtrain.training.activations import checkpoint_activations
from qtrain.training.causal_lm import CausalLM
from qtrain.training.losses import documents_in, next_token_loss
from qtrain.training.parallel import blocks_of
from qtrain.training.session import run
from qtrain_kernels import attention, precision
from qtrain_kernels.precision import causal_attention

END = 0
VOCABULARY = 61
# Two rows of 64 tokens: documents of 20, 1 (an end alone), 1, 42; of 33 and 31, the last of which has no end.
ENDS = ([19, 20, 21, 63], [32])
BORDERS = [0, 20, 21, 22, 64, 64 + 33, 128]


def batch() -> Tensor:
    tokens = torch.randint(1, VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(1))
    for row, ends in enumerate(ENDS):
        tokens[row, ends] = END
    return tokens


def decoder(recipe: str = "bf16", **changes: Any) -> Decoder:
    """Weights are large enough that what a token sees shows in its logits."""
    sizes = {"name": "tiny", "dim": 256, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 256, "seq_len": 64}
    torch.manual_seed(0)
    model = Decoder(Llama.model_validate(sizes | changes), VOCABULARY)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    qtrain.convert(model, recipe=recipe, seed=0)
    return model


def documents() -> Iterator[tuple[int, slice]]:
    """The row and the tokens of each document."""
    for start, end in itertools.pairwise(BORDERS):
        yield start // 64, slice(start % 64, start % 64 + end - start)


def sqnr(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return 10 * math.log10(expected.square().sum() / (found - expected).square().sum())


# ---------------------------------------------------------------------------------------------------------- the borders


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[5, 6, 7, 8]], [0, 4]),
        ([[5, 0, 7, 8]], [0, 2, 4]),
        ([[5, 6, 7, 0], [5, 6, 7, 8]], [0, 4, 8]),
        ([[0, 0, 0, 8], [0, 6, 0, 0]], [0, 1, 2, 3, 4, 5, 7, 8]),
        ([[5, 6, 7, 8], [5, 6, 7, 8]], [0, 4, 8]),
    ],
    ids=["no end", "an end", "an end at the row's end", "ends alone", "rows are borders"],
)
def test_borders_are_rows_and_ends_of_documents(rows: list[list[int]], expected: list[int]) -> None:
    found = documents_in(torch.tensor(rows), end_of_document=0)["cu_seqlens"]
    assert found.dtype == torch.int32
    assert found.tolist() == expected


# -------------------------------------------------------------------------------------------------------- the attention


def operands(kv_heads: int = 4, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 64, 16), (2, kv_heads, 64, 16), (2, kv_heads, 64, 16)
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In float64, by a mask."""
    group = q.shape[1] // k.shape[1]
    scores = q.double() @ k.double().repeat_interleave(group, 1).transpose(-1, -2) / q.shape[-1] ** 0.5
    mask = torch.zeros(2, 1, 64, 64, dtype=torch.bool, device=q.device)
    for row, own in documents():
        mask[row, :, own, own] = True
    scores = scores.masked_fill(~mask.tril(), -torch.inf)
    return scores.softmax(-1) @ v.double().repeat_interleave(group, 1)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_and_its_gradients_are_those_of_float64(kv_heads: int) -> None:
    given = operands(kv_heads)
    found, expected = causal_attention(*given, torch.tensor(BORDERS)), exact_attention(*given)
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    pairs = [(found, expected)]
    pairs += zip(torch.autograd.grad(found, given, grad), torch.autograd.grad(expected, given, grad), strict=True)
    assert all(sqnr(ours.double(), exact) > 130 for ours, exact in pairs)
    once = torch.autograd.grad(causal_attention(*given, torch.tensor(BORDERS)).sum(), given)  # an expanded gradient
    exact = torch.autograd.grad(exact_attention(*given).sum(), given)
    assert sqnr(once[2].double(), exact[2].double()) > 130


@pytest.mark.parametrize("units", ["float32", "float32 for bfloat16", "bfloat16"])
def test_attention_of_a_document_has_the_bits_that_it_has_alone(units: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "BFLOAT16_UNITS_ON_CPU", units == "bfloat16")
    given = operands()
    with torch.autocast("cpu", torch.bfloat16, enabled=units != "float32"):
        found = causal_attention(*given, torch.tensor(BORDERS))
        assert found.dtype == (torch.float32 if units == "float32" else torch.bfloat16)
        grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found.dtype)
        grads = torch.autograd.grad(found, given, grad)
        for row, own in documents():
            at = (slice(row, row + 1), slice(None), own)
            alone = [x.detach()[at].requires_grad_() for x in given]
            expected = causal_attention(*alone)
            assert torch.equal(found[at], expected)
            of_alone = torch.autograd.grad(expected, alone, grad[at])
            assert all(torch.equal(ours[at], own) for ours, own in zip(grads, of_alone, strict=True))


def test_the_operators_of_documents_are_what_torch_asks_of_one() -> None:
    given = (*operands(), torch.tensor(BORDERS, dtype=torch.int32))
    asked = ("test_schema", "test_autograd_registration", "test_faketensor")
    found = torch.library.opcheck(attention._document_attention, given, test_utils=asked)
    assert found == dict.fromkeys(asked, "SUCCESS")


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_on_a_gpu(kv_heads: int) -> None:
    given = operands(kv_heads, torch.bfloat16, "cuda")
    found = causal_attention(*given, torch.tensor(BORDERS, dtype=torch.int32, device="cuda"))
    expected = exact_attention(*given)
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found)
    pairs = [(found, expected)]
    pairs += zip(torch.autograd.grad(found, given, grad), torch.autograd.grad(expected, given, grad), strict=True)
    assert all(sqnr(ours.double(), exact.double()) > 35 for ours, exact in pairs)
    with pytest.raises(ValueError, match="bfloat16 or float16 on cuda, found torch"):
        causal_attention(*operands(device="cuda"), torch.tensor(BORDERS, dtype=torch.int32, device="cuda"))


# ------------------------------------------------------------------------------------------------------------ the model


def masked(model: Decoder, tokens: Tensor) -> Tensor:
    return model(tokens, **documents_in(tokens, END))


@pytest.mark.parametrize("recipe", ["bf16", "quest"])
def test_a_model_sees_documents_as_if_they_were_run_one_by_one(recipe: str) -> None:
    """Logits and every gradient, in float32. quest quantises row by row: rounding alone is left, that of rotary
    positions which count from the row's beginning or from the document's, and that of sums. A value that it moves
    across the border between two codes of quest moves by a step, which is rare."""
    model, tokens = decoder(recipe), batch()
    grad = torch.randn(2, 64, VOCABULARY, generator=torch.Generator().manual_seed(2))
    logits = masked(model, tokens)
    logits.backward(grad)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    alone = torch.empty_like(logits)
    for row, own in documents():
        of_document = model(tokens[row, own][None])
        of_document.backward(grad[row, own][None])
        alone[row, own] = of_document.detach()[0]
    least = {"bf16": 110, "quest": 60}[recipe]
    assert sqnr(logits, alone) > least
    for name, parameter in model.named_parameters():
        assert sqnr(gradients[name], parameter.grad) > least, name
    assert sqnr(model(tokens), alone) < 20, "the borders show"


# What sees more of a batch than the row of a token: a scale of the whole tensor, a tile of several rows, a rotation of
# tokens. Of these recipes the forward (logits) or the input's gradient depends, by rounding, on the other documents of
# a batch, with the mask as without. Weight gradients are sums over tokens, whose operands wgrad may quantise together.
MIXES = {
    **dict.fromkeys(
        ("quartet_ii", "quartet_ii_128", "quartet_ii_no46", "tetrajet_v2_baseline"), "both"
    ),  # tensor scale
    **dict.fromkeys(("nvidia_nvfp4", "fp4_all_the_way", "ue5m3_fp4"), "both"),  # tensor scale
    **dict.fromkeys(("fp8_tensorwise", "mxfp4_backward_fp8"), "both"),  # tensor scale
    **dict.fromkeys(("luq_fp4_e2m1", "luq_fp4_e3m0", "luq_int4"), "both"),  # tensor scale
    **dict.fromkeys(("halo_0", "halo_1", "halo_2"), "both"),  # tensor scale, rotated tokens
    **dict.fromkeys(("jetfire", "jetfire_fp4", "mxfp4_2d"), "both"),  # tiles of 32 tokens
    "mxfp8_fwd_nvfp4_bwd": "gradients",  # tensor scale
}
FEW = ("bf16", "quest", "quartet", "lsq", "quartet_ii", "jetfire", "mxfp8_fwd_nvfp4_bwd")


@pytest.mark.parametrize(
    "recipe", [pytest.param(each, marks=() if each in FEW else pytest.mark.slow) for each in group_names("recipe")]
)
def test_no_bit_of_a_document_depends_on_the_others_unless_the_recipe_mixes_tokens(recipe: str) -> None:
    model, tokens = decoder(recipe, n_layers=1), batch()
    if recipe == "lsq":
        qtrain.calibrate(model, tokens, **documents_in(tokens, END))
    others = torch.ones_like(tokens, dtype=torch.bool)
    others[0, 22:64] = False  # a document
    changed = torch.where(others & (tokens != END), tokens % (VOCABULARY - 1) + 1, tokens)
    grad = torch.randn(2, 64, VOCABULARY, generator=torch.Generator().manual_seed(2))
    (logits, gradients), found = (forward_and_backward(model, each, grad) for each in (tokens, changed))
    assert not torch.equal(found[0][others], logits[others])
    equal = [torch.equal(found[0][~others], logits[~others]), torch.equal(found[1][~others], gradients[~others])]
    assert equal == {"both": [False, False], "gradients": [True, False], None: [True, True]}[MIXES.get(recipe)]


def forward_and_backward(model: Decoder, tokens: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The logits, and the gradient of what the first block reads."""
    set_step(model, 0)
    embedded: list[Tensor] = []
    hook = model.embed.register_forward_hook(lambda *given: (given[2].retain_grad(), embedded.append(given[2]))[0])
    logits = masked(model, tokens)
    hook.remove()
    logits.backward(grad)
    assert embedded[0].grad is not None
    return logits.detach(), embedded[0].grad


def test_the_loss_by_chunks_is_masked_too() -> None:
    model, tokens = decoder(), batch()
    whole, chunked = (next_token_loss(model, tokens, chunked=each, end_of_document=END) for each in (False, True))
    assert whole.item() == pytest.approx(chunked.item(), rel=1e-6)
    assert abs(whole.item() - next_token_loss(model, tokens).item()) > 1e-2


def test_checkpointed_activations_give_the_same_bits_and_selective_keeps_the_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(attention, "_documents", lambda *given: calls.append(0) or iter(documents_of(*given)))
    documents_of, gradients, counts = ORIGINAL_DOCUMENTS, {}, {}
    for kept in ("none", "selective", "full"):
        model = decoder("quest")
        checkpoint_activations(blocks_of(model), kept)
        calls.clear()
        tokens = batch()
        next_token_loss(model, tokens, end_of_document=END).backward()
        gradients[kept], counts[kept] = [parameter.grad for parameter in model.parameters()], len(calls)
    assert counts == {"none": 2 * 2, "selective": 2 * 2, "full": 2 * 3}
    for kept in ("selective", "full"):
        assert all(torch.equal(*pair) for pair in zip(gradients[kept], gradients["none"], strict=True))


ORIGINAL_DOCUMENTS = attention._documents


def test_a_compiled_model_is_one_graph_for_any_number_of_documents() -> None:
    model, tokens, counter = decoder(n_layers=1), batch(), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for end in (END, 7, 8, VOCABULARY):  # other numbers of documents, the last without any end
        seen = []
        for each in (compiled, model):
            next_token_loss(each, tokens, end_of_document=end).backward()
            seen.append([parameter.grad for parameter in model.parameters()])
            model.zero_grad()
        assert all(torch.equal(*pair) for pair in zip(*seen, strict=True))
    assert counter.frame_count <= 2, "the second graph is for any number"


# -------------------------------------------------------------------------------------------------------------- the run


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_corpus(corpus, ["one", "two", "three", "four"], 30)
    return [
        "data=text", f"data.files={corpus}/*.txt", f"data.cache_dir={tmp_path}/cache", "data.val_tokens=2_000",
        "data.prepare_workers=1", "model.n_layers=1", "model.dim=128", "model.n_heads=2", "model.ffn_dim=128",
        "model.seq_len=1500", "trainer.tokens=6_000", "trainer.batch_tokens=6_000", "trainer.micro_batch_size=2",
        "trainer.device=cpu", "trainer.precision=32-true", "callbacks.progress_bar=false", f"run_root={tmp_path}/runs",
        "data.val_fraction=0.3", "recipe=quest",
    ]  # fmt: skip


def test_a_run_trains_and_validates_within_documents(settings: list[str], tmp_path: Path) -> None:
    """Its first training loss and its validation loss, which is that of documents run one by one."""
    config = compose([*settings, "data.document_mask=true"])
    loss = run(config)
    corpus = prepare(config.data, config.tokenizer, budget_tokens=budget_tokens(config))
    batches = TokenBatches(corpus, seq_len=1500, seed=0, micro_batch_size=2, num_workers=0)
    model = build.build_model(config, 257)
    first = [next_token_loss(model, each, end_of_document=256).item() for each in batches.train(0, 4)]
    assert [line["loss"] for line in RunDirectory.of(config).lines("loss")] == [pytest.approx(sum(first) / 2, abs=1e-6)]
    model = qtrain.load_run(RunDirectory.of(config).path)
    tokens = torch.from_numpy(corpus.val.window(0, 1501)).long()[None]
    ends = [i + 1 for i, token in enumerate(tokens[0, :-1].tolist()) if token == 256 and i < 1499]
    assert ends, "a border in the only window"
    with torch.no_grad():
        parts = [model(tokens[:, start:end])[0] for start, end in itertools.pairwise([0, *ends, 1500])]
        expected, unmasked = F.cross_entropy(torch.cat(parts), tokens[0, 1:]), next_token_loss(model, tokens)
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    assert abs(loss - unmasked.item()) > 1e-4


def test_the_mask_is_in_the_name_of_a_run_and_older_runs_had_none(settings: list[str]) -> None:
    plain, masks = compose(settings), compose([*settings, "data.document_mask=true"])
    assert config_hash(plain) != config_hash(masks)
    assert "document_mask" not in hashed_keys(plain)["data"], "names of runs without a mask stay"
    tree = plain.model_dump(mode="json")
    del tree["data"]["document_mask"]
    assert config_hash(parse_saved(tree)) == config_hash(plain)


def test_what_the_mask_needs_is_refused_by_name(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose([*settings, "data.document_mask=true", "trainer.device=cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"has no float32, and trainer\.precision is 32-true; set trainer\.precision="):
        build.pick_device(config)
    with pytest.raises(ValueError, match="needs the token that ends a document, found None"):
        CausalLM(config, build.make_plan(config, 257), nn.Linear(1, 1))
