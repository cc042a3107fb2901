"""Text to token ids and back. Three kinds, one small protocol."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers

from qtrain.config import TokenizerConfig
from qtrain.errors import UserError, first_line
from qtrain.runs.files import read_json, write_synced

END = "<|endoftext|>"
CHAT_TEMPLATE = "chat_template.jinja"  # transformers' name of the file
# Tried in this order when nothing names the end-of-document token of a tokenizer.json.
KNOWN_ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>")


class Tokenizer(Protocol):
    """encode: the ids of a text, without the end-of-document token; (n,) in `token_dtype(vocab_size)`.
    decode: the text of ids, end-of-document tokens left out. hash: hex digits; equal hashes encode equally."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def hash(self) -> str: ...
    def encode(self, text: str) -> np.ndarray: ...
    def decode(self, ids: Sequence[int] | np.ndarray) -> str: ...


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits, else uint32; little-endian, as in the shards."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of UTF-8, 256 ends a document."""

    vocab_size = 257
    eos_id = 256
    hash = hashlib.sha256(b"bytes 257").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(token_dtype(self.vocab_size))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        values = np.asarray(ids, dtype=np.int64)
        return values[values < 256].astype(np.uint8).tobytes().decode(errors="replace")


class FileTokenizer:
    """A tokenizer.json of the `tokenizers` library. Text that spells a special token is encoded as plain text, so that
    a document cannot forge its own end."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        eos_id: int,
        chat_template: str | None = None,
        named_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """chat_template: Jinja, as transformers has it; named_tokens: what it knows special tokens by (bos_token)."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self.eos_id = eos_id
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.hash = hashlib.sha256(f"{tokenizer.to_str()} {eos_id}".encode()).hexdigest()
        self._tokenizer = tokenizer
        self.chat_template = chat_template
        self.named_tokens = dict(named_tokens or {}) | {"eos_token": self.eos_token}

    def encode(self, text: str) -> np.ndarray:
        (encoding,) = self._tokenizer.encode_batch_fast(
            [text], add_special_tokens=False
        )  # 1.4 times encode: no offsets
        return np.array(encoding.ids, dtype=token_dtype(self.vocab_size))

    def encode_rendered(self, text: str) -> np.ndarray:
        """The ids of text that a chat template wrote: what spells a special token is that token."""
        self._tokenizer.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._tokenizer.encode_special_tokens = True

    @property
    def special_tokens(self) -> list[str]:
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode([int(i) for i in ids if i != self.eos_id], skip_special_tokens=False)

    def save(self, path: Path) -> None:
        """On disk when this returns. The library's own `save` raises no OSError."""
        write_synced(path, self.text)

    @property
    def text(self) -> str:
        """What tokenizer.json holds."""
        return self._tokenizer.to_str(pretty=True)

    @property
    def eos_token(self) -> str:
        return str(self._tokenizer.id_to_token(self.eos_id))


def train_bpe(texts: Iterable[str], vocab_size: int) -> FileTokenizer:
    """Byte-level BPE of at most vocab_size tokens (fewer if the text runs out of pairs); the end token has id 0.

    Any text round-trips: the 256 byte symbols are always in. Deterministic in the texts and their order.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return FileTokenizer(tokenizer, eos_id=0)


def load_pretrained(config: TokenizerConfig) -> FileTokenizer:
    """The tokenizer of tokenizer.path: a tokenizer.json, a folder that holds one, or a name on the Hugging Face hub.

    UserError if it cannot be found, reached or read, or if its end-of-document token is not known.
    """
    file = _tokenizer_file(str(config.path))
    tokenizer = _read(file)
    vocab = tokenizer.get_vocab()
    if config.eos_token is not None and config.eos_token not in vocab:
        raise UserError(f"tokenizer.eos_token={config.eos_token!r} is not a token of {file}")
    named = config.eos_token or _named_end(file.with_name("tokenizer_config.json"))
    end = next((token for token in (named, *KNOWN_ENDS) if token in vocab), None)
    if end is None:
        raise UserError(
            f"{file} does not say which token ends a document; set tokenizer.eos_token to one of its tokens"
        )
    template, named_tokens = _about_chats(file.parent)
    return FileTokenizer(tokenizer, vocab[end], template, named_tokens)


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """Name -> text of the files by which the Hugging Face libraries read a tokenizer: tokenizer.json,
    tokenizer_config.json with the token that ends a document, and its chat template, if it has one."""
    if not isinstance(tokenizer, FileTokenizer):
        tokenizer = _bytes_in_a_file()
    about = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.named_tokens}
    template = {} if tokenizer.chat_template is None else {CHAT_TEMPLATE: tokenizer.chat_template}
    return {"tokenizer.json": tokenizer.text, "tokenizer_config.json": json.dumps(about, indent=2) + "\n"} | template


def _bytes_in_a_file() -> FileTokenizer:
    """ByteTokenizer in the terms of the `tokenizers` library: byte-level BPE without a merge, whose symbols have the
    ids of their bytes."""
    symbol = {byte: _byte_symbol(byte) for byte in range(256)}
    bpe = tokenizers.models.BPE({text: byte for byte, text in symbol.items()}, [])
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return FileTokenizer(tokenizer, ByteTokenizer.eos_id)


def _byte_symbol(byte: int) -> str:
    """The character that byte-level BPE writes for a byte: itself where it can be seen in Latin-1, else one of those
    from U+0100 on, in the order of the bytes. Source: the encoder of GPT-2."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [value for value in range(256) if value not in visible]
    return chr(byte if byte in visible else 0x100 + hidden.index(byte))


def load_kept(config: TokenizerConfig, folder: Path) -> Tokenizer:
    """The tokenizer of these settings, of which a folder has the files. UserError where it has none."""
    if config.kind == "bytes":
        return ByteTokenizer()
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} holds no tokenizer.json: the run is of a version that kept none, or has just begun")
    return load_pretrained(TokenizerConfig(kind="huggingface", vocab_size=None, path=str(folder)))


def load_saved(path: Path | None, eos_id: int) -> Tokenizer:
    """The tokenizer of a prepared corpus: bytes where no file was kept."""
    if path is None:
        return ByteTokenizer()
    return FileTokenizer(_read(path), eos_id, *_about_chats(path.parent))


def chat_template_identity(config: TokenizerConfig) -> Any:
    """Plain data that names the chat template of a tokenizer in a cache key, as `tokenizer_identity`."""
    if config.kind != "huggingface" or not Path(config.path or "").expanduser().exists():
        return None
    return _about_chats(_tokenizer_file(str(config.path)).parent)[0]


def tokenizer_identity(config: TokenizerConfig) -> Any:
    """Plain data that names the tokenizer in a cache key: a local file by its content, a hub name by itself, so that a
    prepared corpus opens without a network."""
    path = Path(config.path or "").expanduser()
    if config.kind == "huggingface" and path.exists():
        file = _tokenizer_file(str(path))
        side = file.with_name("tokenizer_config.json")
        content = file.read_bytes() + (side.read_bytes() if side.is_file() else b"")
        return [config.kind, hashlib.sha256(content).hexdigest(), config.eos_token]
    return [config.kind, config.vocab_size if config.kind == "bpe" else None, config.path, config.eos_token]


def _tokenizer_file(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"tokenizer.path={name} holds no tokenizer.json; save one there with save_pretrained")
    if path.is_file():
        return path
    if name.endswith(".json") or name.startswith((".", "/", "~")):
        raise UserError(f"tokenizer.path={name}: no such file or folder")
    return _download(name)


def _download(name: str) -> Path:
    import huggingface_hub
    import huggingface_hub.errors

    try:
        file = huggingface_hub.hf_hub_download(name, "tokenizer.json")
    except Exception as error:  # network, hub, permission and cache errors share no base class
        raise UserError(
            f"tokenizer.path={name} is no local file, and the Hugging Face hub did not give its tokenizer.json "
            f"({first_line(error)}); give the path of a tokenizer.json, or fill HF_HOME where there is a network"
        ) from error
    with contextlib.suppress(huggingface_hub.errors.EntryNotFoundError, OSError):
        huggingface_hub.hf_hub_download(name, CHAT_TEMPLATE)
    # it only names the end token, which without it is one of the usual ones, or an error
    with contextlib.suppress(huggingface_hub.errors.EntryNotFoundError, OSError):
        huggingface_hub.hf_hub_download(name, "tokenizer_config.json")
    return Path(file)


def _read(file: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{file} is not a readable tokenizer.json ({error})") from None


def _about_chats(folder: Path) -> tuple[str | None, dict[str, str]]:
    """(the chat template, or None; special tokens by the names that templates know) of a tokenizer's folder."""
    found, named = None, {}
    if (config := folder / "tokenizer_config.json").is_file():
        settings = read_json(config)
        found = settings.get("chat_template")
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            token = settings.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            named |= {name: token} if isinstance(token, str) else {}
    if isinstance(found, list):  # several, by name
        found = next((each.get("template") for each in found if each.get("name") == "default"), None)
    if (file := folder / CHAT_TEMPLATE).is_file():
        found = file.read_text(encoding="utf-8")
    return (found if isinstance(found, str) else None), named


def _named_end(file: Path) -> str | None:
    if not file.is_file():
        return None
    try:
        token = json.loads(file.read_text()).get("eos_token")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise UserError(f"{file} is not readable JSON ({error})") from None
    return token.get("content") if isinstance(token, dict) else token
