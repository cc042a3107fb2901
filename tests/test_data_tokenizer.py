"""Tokenizers: text survives the round trip, documents cannot forge their end, training is repeatable."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from qtrain.config import TokenizerConfig
from qtrain.data.tokenizer import (
    END,
    ByteTokenizer,
    FileTokenizer,
    Tokenizer,
    load_pretrained,
    load_saved,
    token_dtype,
    tokenizer_identity,
    train_bpe,
)
from qtrain.errors import UserError

TEXTS = ["def add(a, b):\n    return a + b\n" * 3, "the cat sat on the mat, the cat ran\n" * 5, "naïve café ☕ 中文\n"]


@pytest.fixture(scope="module")
def bpe() -> FileTokenizer:
    return train_bpe(TEXTS, 300)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest, bpe: FileTokenizer) -> Tokenizer:
    return ByteTokenizer() if request.param == "bytes" else bpe


def test_bytes_are_utf8() -> None:
    ids = ByteTokenizer().encode("aé\0")
    assert ids.tolist() == [0x61, 0xC3, 0xA9, 0]
    assert ids.dtype == np.uint16


@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", [*TEXTS, "", " leading", "\t\r\n", "never seen: Ωmega 🦉 \x00\x7f"])
def test_bpe_round_trips(bpe: FileTokenizer, text: str) -> None:
    assert bpe.decode(bpe.encode(text)) == text


def test_bpe_compresses_what_it_was_trained_on(bpe: FileTokenizer) -> None:
    assert bpe.vocab_size == 300
    assert len(bpe.encode(TEXTS[1])) < len(TEXTS[1].encode()) / 2


def test_decode_leaves_end_tokens_out(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab")
    assert tokenizer.decode([*ids.tolist(), tokenizer.eos_id, *ids.tolist()]) == "abab"


def test_a_document_cannot_forge_its_end(tokenizer: Tokenizer) -> None:
    text = f"before {END} after"
    ids = tokenizer.encode(text)
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == text


def test_bpe_training_is_repeatable_and_sees_the_text(bpe: FileTokenizer) -> None:
    assert train_bpe(TEXTS, 300).hash == bpe.hash
    assert train_bpe([*TEXTS, "another text " * 9], 300).hash != bpe.hash


def test_saved_tokenizer_is_the_same(bpe: FileTokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path / "tokenizer.json")
    again = load_saved(tmp_path / "tokenizer.json", bpe.eos_id)
    assert again.hash == bpe.hash
    assert again.encode(TEXTS[0]).tolist() == bpe.encode(TEXTS[0]).tolist()
    assert load_saved(None, 256).hash == ByteTokenizer().hash


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_tokenizer_that_finds_no_room_is_an_error_of_the_file_system(bpe: FileTokenizer) -> None:
    with pytest.raises(OSError, match="No space left on device"):
        bpe.save(Path("/dev/full"))


def test_token_dtype_at_its_edge() -> None:
    assert token_dtype(1 << 16) == np.uint16
    assert token_dtype((1 << 16) + 1) == np.uint32


def pretrained(folder: Path, end: str, config: str | None = None) -> Path:
    """A word-level tokenizer.json whose end token is `end`, with padding and truncation left on as some files have."""
    vocab = {"hello": 0, "world": 1, "?": 2, end: 7}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(config)
    return folder


@pytest.mark.parametrize(
    ("end", "config", "eos_token"),
    [
        ("</s>", None, None),
        ("<stop>", '{"eos_token": "<stop>"}', None),
        ("<stop>", '{"eos_token": {"content": "<stop>"}}', None),
        ("<stop>", None, "<stop>"),
    ],
)
def test_pretrained_from_folder_and_file(tmp_path: Path, end: str, config: str | None, eos_token: str | None) -> None:
    folder = pretrained(tmp_path, end, config)
    for path in (folder, folder / "tokenizer.json"):
        tokenizer = load_pretrained(TokenizerConfig(kind="huggingface", path=str(path), eos_token=eos_token))
        assert tokenizer.encode("hello world hello you").tolist() == [0, 1, 0, 2]  # neither cut nor padded
        assert (tokenizer.eos_id, tokenizer.vocab_size) == (7, 8)  # ids have a gap: the largest decides


def test_identity_follows_the_content_of_a_local_tokenizer(tmp_path: Path) -> None:
    config = TokenizerConfig(kind="huggingface", path=str(pretrained(tmp_path, "</s>")))
    before = tokenizer_identity(config)
    pretrained(tmp_path, "<eos>")
    assert tokenizer_identity(config) != before


def test_unusable_tokenizers_are_told(tmp_path: Path) -> None:
    def load(path: Path | str, eos_token: str | None = None) -> None:
        load_pretrained(TokenizerConfig(kind="huggingface", path=str(path), eos_token=eos_token))

    with pytest.raises(UserError, match=r"holds no tokenizer.json"):
        load(tmp_path)
    with pytest.raises(UserError, match=r"missing/tokenizer.json: no such file"):
        load(tmp_path / "missing" / "tokenizer.json")
    with pytest.raises(UserError, match=r"nobody/nothing is no local file.*fill HF_HOME"):
        load("nobody/nothing")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer.json is not a readable tokenizer.json"):
        load(tmp_path)
    pretrained(tmp_path, "<odd>")
    with pytest.raises(UserError, match=r"does not say which token ends a document; set tokenizer.eos_token"):
        load(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer.eos_token='<gone>' is not a token of"):
        load(tmp_path, "<gone>")
