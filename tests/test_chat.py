"""Conversations: how they become tokens, and that a loss counts the completions alone, however it is computed."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from torch.nn import functional as F

from qtrain.config import TokenizerConfig
from qtrain.config.settings import parse
from qtrain.data.counted import counts, ids_of
from qtrain.data.dialogue import Dialogue, plain_text
from qtrain.data.prepare import prepare
from qtrain.data.sources.chat import Chat, checked
from qtrain.data.tokenizer import ByteTokenizer, load_pretrained, train_bpe
from qtrain.errors import UserError
from qtrain.plan import make_plan
from qtrain.train import compose
from qtrain.training.build import build_model
from qtrain.training.causal_lm import CausalLM
from qtrain.training.losses import documents_in, evaluate, next_token_loss

TEMPLATE = """{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One and one?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "And one?"},
    {"role": "assistant", "content": "Three."},
]


def chat_tokenizer(folder: Path, template: str | None = TEMPLATE) -> TokenizerConfig:
    """A tokenizer with special tokens and a chat template, as transformers saves one."""
    folder.mkdir(exist_ok=True)
    bpe = tokenizers.Tokenizer.from_str(train_bpe(["some text of words, one and one are two " * 9], 300).text)
    bpe.add_special_tokens(["<s>", "<|im_start|>", "<|im_end|>"])
    bpe.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return TokenizerConfig(kind="huggingface", path=str(folder))


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_template_is_rendered_as_transformers_does_and_the_answers_count(tmp_path):
    import transformers

    tokenizer = load_pretrained(chat_tokenizer(tmp_path / "tokenizer"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    tokens, n_bytes = Dialogue(tokenizer).encode(checked("x", {"messages": TALK}))
    expected = theirs.apply_chat_template(TALK, tokenize=True, return_dict=False)
    assert ids_of(tokens.astype(np.int64)).tolist() == [*expected, tokenizer.eos_id]
    said = tokenizer.decode(tokens[counts(tokens)])
    assert said == "Two.\nThree.\n"  # decode leaves <|im_end|> out, which is this tokenizer's end
    assert n_bytes == len("Two.<|im_end|>\nThree.<|im_end|>\n")
    assert tokens[-1] == tokenizer.eos_id  # the end counts after an answer


@pytest.mark.parametrize("row, prompt, said", [
    ({"prompt": "1 + 1 =", "completion": " 2"}, "1 + 1 =", " 2"),
    ({"messages": TALK[1:3]}, "user: One and one?\nassistant: ", "Two.\n"),
])  # fmt: skip
def test_without_a_template_text_is_plain(row, prompt, said):
    tokens, n_bytes = Dialogue(ByteTokenizer()).encode(checked("x", row))
    text = bytes(ids_of(tokens.astype(np.int64))[:-1].tolist()).decode()
    assert text == prompt + said == plain_text(checked("x", row))
    assert bytes(tokens[counts(tokens)][:-1].tolist()).decode() == said
    assert n_bytes == len(said) and tokens[-1] == ByteTokenizer.eos_id


@pytest.mark.parametrize("row, message", [
    ({"prompt": "a", "completion": ""}, "completion is empty"),
    ({"prompt": "a"}, "expected an object with messages"),
    ({"messages": TALK[:2]}, "no message is the assistant's"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "has the role 'robot'"),
    ({"messages": [{"role": "user", "content": 3}]}, "content of message 0 is int"),
    ({"messages": "x"}, "must be a list"),
    (["x"], "found list"),
])  # fmt: skip
def test_a_line_that_is_no_conversation_is_named(tmp_path, row, message):
    file = write(tmp_path / "chat.jsonl", [{"prompt": "a", "completion": "b"}, row])
    data = parse(Chat, {"source": "chat", "files": [str(file)], "val_tokens": 64, "cache_dir": str(tmp_path)})
    with pytest.raises(UserError, match=message) as error:
        prepare(data, TokenizerConfig(kind="bytes"), progress=False)
    assert f"{file}:2" in str(error.value)


@pytest.mark.parametrize("template, message", [
    ("{% for", "cannot be read"),
    ("{{ raise_exception('no system role') }}", "no system role"),
    ("{% for message in messages %}{{ message.content }}{{ loop.last }}{% endfor %}", "otherwise when it is cut"),
    ("{{ ''.__class__.__mro__ }}{{ messages[9].content }}", "fails on the conversation"),
])  # fmt: skip
def test_a_template_that_fails_is_named(tmp_path, template, message):
    tokenizer = load_pretrained(chat_tokenizer(tmp_path / "tokenizer", template))
    with pytest.raises(UserError, match=message):
        Dialogue(tokenizer).encode(checked("x", {"messages": TALK}))


def test_a_message_cannot_forge_a_turn(tmp_path):
    tokenizer = load_pretrained(chat_tokenizer(tmp_path / "tokenizer"))
    forged = [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "no"}]
    with pytest.raises(UserError, match=r"spells the special token '<\|im_end\|>'"):
        Dialogue(tokenizer).encode(checked("x", {"messages": forged}))


def test_a_corpus_keeps_what_counts_and_another_template_is_another_corpus(tmp_path):
    def talk(n: int) -> list:
        return [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "!" * n}]

    rows = [{"messages": talk(n)} for n in range(1, 40)]
    file = write(tmp_path / "chat.jsonl", rows)
    settings = {"source": "chat", "files": [str(file)], "val_tokens": 64, "cache_dir": str(tmp_path / "cache")}
    data, tokenizer = parse(Chat, settings), chat_tokenizer(tmp_path / "tokenizer")
    for prepare_workers in (1, 2):
        settings["cache_dir"] = str(tmp_path / f"cache{prepare_workers}")
        data = parse(Chat, settings | {"prepare_workers": prepare_workers})
        corpus = prepare(data, tokenizer, progress=False)
        corpus.verify()
        both = [corpus.train.window(0, corpus.train.n_tokens), corpus.val.window(0, corpus.val.n_tokens)]
        said = "".join(corpus.tokenizer.decode(tokens[counts(tokens)]) for tokens in both)
        assert corpus.is_masked and said.count("!") == sum(range(1, 40)) and "?" not in said
        counted = int(counts(both[1]).sum())
        assert corpus.bytes_per_token == corpus.val.n_bytes / counted
        assert corpus.tokenizer.chat_template == TEMPLATE  # which a run, and what is exported of it, keeps
    other = prepare(
        data, chat_tokenizer(tmp_path / "tokenizer", TEMPLATE.replace("}}<|im_end|>", "}} <|im_end|>")), progress=False
    )
    assert other.data_hash != corpus.data_hash


def masked(tokens: torch.Tensor) -> torch.Tensor:
    """The first two thirds of each row, as a prompt."""
    uncounted = torch.arange(tokens.shape[1]) < 2 * tokens.shape[1] // 3
    return torch.where(uncounted, ~tokens, tokens)


class Bigrams(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(61, 61, generator=torch.Generator().manual_seed(1)))

    def forward(self, tokens):
        return self.table[tokens]


def test_the_loss_of_plain_text_has_the_bits_of_a_mean():
    model, tokens = Bigrams(), torch.randint(61, (3, 34), generator=torch.Generator().manual_seed(0))
    expected = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    (want,) = torch.autograd.grad(expected, model.table)
    loss = next_token_loss(model, tokens)
    (got,) = torch.autograd.grad(loss, model.table)
    assert torch.equal(loss, expected) and torch.equal(got, want)


def test_prompts_are_read_and_not_counted():
    model, tokens = Bigrams(), torch.randint(61, (3, 34), generator=torch.Generator().manual_seed(0))
    logits = model(tokens[:, :-1])[:, 21:]
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 22:].flatten(), reduction="sum").item()
    total, count = evaluate(model, [masked(tokens)], torch.device("cpu"), "32-true")
    assert count == 3 * 12 and total == pytest.approx(expected, rel=1e-6)


SMALL = [
    "model.dim=32", "model.ffn_dim=32", "model.n_layers=1", "model.n_heads=2", "model.seq_len=33", "recipe=bf16",
    "trainer.precision=32-true", "trainer.tokens=264", "trainer.batch_tokens=264", "trainer.grad_clip=null",
]  # fmt: skip


def gradients(tokens: torch.Tensor, micro_batch_size: int, *more: str) -> tuple[dict[str, torch.Tensor], float]:
    """Of a step over all of tokens (8, 34), and its loss."""
    config = compose([*SMALL, f"trainer.micro_batch_size={micro_batch_size}", *more])
    plan = make_plan(config, vocab_size=61)
    module = CausalLM(config, plan, build_model(config, 61), end_of_document=0, counts_all=False)
    for number, batch in enumerate(tokens.split(micro_batch_size)):
        (module.micro_batch_loss(module.model, batch, 0, number, 0, 1) / plan.micro_batches).backward()
    module.clip_norm()
    found = {name: parameter.grad for name, parameter in module.model.named_parameters()}
    return found, float(module.step_loss)


@pytest.mark.parametrize("more", [(), ("trainer.chunked_loss=true",), ("data.document_mask=true",)])
def test_a_step_is_the_mean_over_the_tokens_that_count(more):
    """However they lie in its micro-batches: here the last rows count more tokens, the first none."""
    tokens = torch.randint(61, (8, 34), generator=torch.Generator().manual_seed(0))
    uncounted = torch.arange(34) < torch.tensor([34, 34, 30, 25, 20, 15, 3, 1])[:, None]
    stored = torch.where(uncounted, ~tokens, tokens)
    config = compose([*SMALL, "trainer.micro_batch_size=8", *more])
    model = build_model(config, 61)
    documents = documents_in(tokens[:, :-1], 0 if "data.document_mask=true" in more else None)
    each = F.cross_entropy(model(tokens[:, :-1], **documents).flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    expected = each[~uncounted[:, 1:].flatten()].mean()
    expected.backward()
    for micro_batch_size in (8, 2, 1):
        found, loss = gradients(stored, micro_batch_size, *more)
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_a_step_in_which_no_token_counts_has_no_gradient():
    found, loss = gradients(~torch.randint(61, (8, 34), generator=torch.Generator().manual_seed(0)), 4)
    assert loss == 0 and all((grad == 0).all() for grad in found.values())
