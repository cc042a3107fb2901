"""Corpora of files that hold tokens already: they are mapped as they lie, and nothing is copied.

    <cache_dir>/<name>-<fingerprint>.json   what reading them once has found

Every document has to end with the tokenizer's end-of-document token. The validation split is data.val_files, else the
end of the files: the last data.val_fraction of the tokens, from the document on that ends there.
"""

from __future__ import annotations

import hashlib
import json
import logging
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from pydantic import Field, ValidationError

from qtrain.config import TokenizerConfig
from qtrain.config.settings import Strict
from qtrain.data.bigram import bigram_cross_entropy
from qtrain.data.corpus import Corpus, stamp_of
from qtrain.data.files import TokenFile, TokenFiles, stat
from qtrain.data.tokenizer import ByteTokenizer, Tokenizer, load_pretrained, tokenizer_identity
from qtrain.errors import UserError, first_line
from qtrain.runs.files import read_json, write_atomically

BLOCK_DOCUMENTS = 1 << 16
BLOCK_TOKENS = 1 << 22
DECODED_TOKENS = 1 << 20  # of the validation split, from its start: UTF-8 bytes per token are counted on so many

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenStream:
    """Tokens [start, start + n_tokens) of files that are read one after the other. n_bytes: of the text, as far as it
    was decoded, carried on to all of it."""

    places: tuple[tuple[Path, str, int], ...]  # file, dtype, tokens
    start: int
    n_tokens: int
    n_documents: int
    n_bytes: int = 0

    def window(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) of the stream, (length,) int64. Reads those alone, across files."""
        if start < 0 or start + length > self.n_tokens:
            raise IndexError(f"tokens {start} to {start + length} of a split of {self.n_tokens}")
        start += self.start
        parts = []
        while length > 0:
            number = bisect_right(self._begins, start) - 1
            offset = start - self._begins[number]
            part = self._maps[number][offset : offset + length]
            parts.append(part)
            start, length = start + len(part), length - len(part)
        return np.concatenate(parts, dtype=np.int64) if parts else np.empty(0, np.int64)

    def digests(self) -> Iterator[bytes]:
        """None: the documents have no text."""
        return iter(())

    @cached_property
    def _begins(self) -> list[int]:
        return [0, *np.cumsum([tokens for _, _, tokens in self.places]).tolist()]

    @cached_property
    def _maps(self) -> list[np.ndarray]:
        return [np.memmap(path, dtype=dtype, mode="r") for path, dtype, tokens in self.places]

    def __getstate__(self) -> dict[str, Any]:
        """Without the maps: a loader process opens its own, where a pickled map would be a copy of the corpus."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_maps", "_begins")}


class _Facts(Strict):
    """What reading the files once has found. files: by name, the stamp of tokens and index at that time, and the sha256
    of both."""

    files: dict[str, tuple[list[int], str]]
    bytes_per_token: float = Field(gt=0)
    bigram_cross_entropy: float


@dataclass(frozen=True)
class TokenPlan:
    """Files of tokens that were asked for, the training split and the validation split. sources: of each file a name
    that is the same on every machine."""

    data: TokenFiles
    tokenizer: Tokenizer
    sources: dict[str, TokenFile]
    train: TokenStream
    val: TokenStream
    fingerprint: str
    name: str

    @property
    def _file(self) -> Path:
        return Path(self.data.cache_dir).expanduser() / f"{self.name}-{self.fingerprint}.json"

    def find(self) -> Corpus | None:
        """The corpus where its files were read, and nothing was written to them since."""
        try:
            facts = _Facts.model_validate(read_json(self._file)) if self._file.exists() else None
        except (UserError, ValidationError):
            log.warning("%s is damaged: the token files are read again", self._file)
            return None
        stamps = {name: _stamp(file) for name, file in self.sources.items()}
        if facts is None or {name: stamp for name, (stamp, _) in facts.files.items()} != stamps:
            return None
        return self._corpus(facts)

    def make(self, progress: bool) -> Corpus:
        """Reads all files, once a machine, and remembers what it found."""
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            told = f"data.cache_dir={self.data.cache_dir} cannot be made ({first_line(error)}); name another"
            raise UserError(told) from None
        with filelock.FileLock(self._file.with_name(f".{self._file.name}.lock")):
            if (corpus := self.find()) is not None:
                return corpus
            if progress:
                n_bytes = sum(file.path.stat().st_size for file in self.sources.values())
                log.info("reading %.1f GB of token files once, to check them", n_bytes / 1e9)
            facts = _Facts(
                files={name: (_stamp(file), _checked(file, self.tokenizer)) for name, file in self.sources.items()},
                bytes_per_token=_bytes_per_token(self.val, self.tokenizer),
                bigram_cross_entropy=bigram_cross_entropy(self.train, self.val, self.tokenizer.vocab_size),
            )
            write_atomically(self._file, facts.model_dump_json(indent=1))
        return self._corpus(facts)

    def _corpus(self, facts: _Facts) -> Corpus:
        sums = [facts.files[name][1] for name in self.sources]
        splits = [[split.start, split.n_tokens] for split in (self.train, self.val)]
        content = json.dumps([self.tokenizer.hash, sums, splits])
        train, val = (
            TokenStream(
                each.places, each.start, each.n_tokens, each.n_documents, round(each.n_tokens * facts.bytes_per_token)
            )
            for each in (self.train, self.val)
        )
        return Corpus(
            self._file.parent, {"source": self.name}, self.tokenizer, train, val,
            hashlib.sha256(content.encode()).hexdigest(), facts.bigram_cross_entropy, self.fingerprint,
            self.data.val_tokens, lambda: [_checked(file, self.tokenizer) for file in self.sources.values()],
        )  # fmt: skip


def plan_tokens(data: TokenFiles, tokenizer: TokenizerConfig, only_val: bool = False) -> TokenPlan:
    """The token files of these settings. only_val: data.val_files, else all of the files, are validated on, and nothing
    is trained on. UserError for files that are missing, cut or of another format."""
    if tokenizer.kind == "bpe":
        raise UserError(
            f"data.source={data} has the tokens of a tokenizer that was there before: name it with "
            "tokenizer=huggingface tokenizer.path=..."
        )
    found = {key: data.found(key) for key in ("files", "val_files")}
    if only_val and found["val_files"]:
        found["files"] = []
    facts, _ = stat([file for files in found.values() for file in files])
    files, val_files = ([data.token_file(file.path) for file in found[key]] for key in ("files", "val_files"))
    if only_val:
        val, train = _whole(val_files or files), _whole([])
    elif val_files:
        train, val = _whole(files), _whole(val_files)
    else:
        train, val = _cut(files, data.val_fraction)
    stamps = [(file.index.stat().st_size, file.index.stat().st_mtime_ns) for file in (*files, *val_files)]
    rule = "validation" if only_val else [len(files), data.val_fraction]
    identity = [str(data), facts, stamps, rule, tokenizer_identity(tokenizer)]
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    names = [f"{key}/{file.name}" for key, each in found.items() for file in each]
    sources = dict(zip(names, [*files, *val_files], strict=True))
    loaded = ByteTokenizer() if tokenizer.kind == "bytes" else load_pretrained(tokenizer)
    return TokenPlan(data, loaded, sources, train, val, fingerprint, f"{data}-{(val_files or files)[0].path.stem}")


def _whole(files: Sequence[TokenFile]) -> TokenStream:
    places = tuple((file.path, file.dtype, file.n_tokens) for file in files)
    return TokenStream(places, 0, sum(f.n_tokens for f in files), sum(f.n_documents for f in files))


def _cut(files: Sequence[TokenFile], fraction: float) -> tuple[TokenStream, TokenStream]:
    """The files in two, where the first document ends that reaches the wanted share; before it if it is the last."""
    whole = _whole(files)
    wanted = round(whole.n_tokens * (1 - fraction))
    documents = tokens = 0
    for file in files[:-1]:
        if tokens + file.n_tokens >= wanted:
            break
        documents, tokens = documents + file.n_documents, tokens + file.n_tokens
    else:
        file = files[-1]
    count, end = file.border(wanted - tokens)
    if tokens + end == whole.n_tokens:
        count -= 1
        end = file.end(count - 1) if count else 0
    documents, tokens = documents + count, tokens + end
    if tokens == 0:
        raise UserError(f"{file.path} has one document, and none to hold out; name token files in data.val_files")
    return (
        TokenStream(whole.places, 0, tokens, documents),
        TokenStream(whole.places, tokens, whole.n_tokens - tokens, whole.n_documents - documents),
    )


# ------------------------------------------------------------------------------------------------- what is in the files


def _stamp(file: TokenFile) -> list[int]:
    return [*stamp_of(file.path), *stamp_of(file.index)]


def _checked(file: TokenFile, tokenizer: Tokenizer) -> str:
    """One pass over a file and its index: the sha256 of both. UserError for an index that is damaged, an id that the
    tokenizer has not, and a document that does not end with its end-of-document token."""
    file.check()
    tokens, total, done = file.tokens(), hashlib.sha256(), 0
    for first in range(0, file.n_documents, BLOCK_DOCUMENTS):
        ends = np.asarray(file.ends(first, min(first + BLOCK_DOCUMENTS, file.n_documents)), dtype=np.uint64)
        starts = np.concatenate([np.array([done], np.uint64), ends[:-1]])
        if (starts > ends).any() or ends[-1] > file.n_tokens:
            raise UserError(f"{file.index} is damaged: its documents do not follow one another; copy it anew")
        for start in range(done, int(ends[-1]), BLOCK_TOKENS):
            block = tokens[start : min(start + BLOCK_TOKENS, int(ends[-1]))]
            _check_ids(file.path, block, start, tokenizer.vocab_size)
            total.update(block.data)
        whole = ends > starts
        wrong = np.flatnonzero(tokens[ends[whole] - np.uint64(1)] != tokenizer.eos_id)
        if len(wrong):
            number = int(np.flatnonzero(whole)[wrong[0]])
            last = tokens[ends[number] - np.uint64(1)]
            raise UserError(
                f"{file.path}: document {first + number} ends with the token {last}, and the "
                f"tokenizer's end of a document is {tokenizer.eos_id}; name the tokenizer of these files and its "
                "tokenizer.eos_token, or write them with an end after each document"
            )
        done = int(ends[-1])
    if done != file.n_tokens:
        raise UserError(f"{file.index} ends at {done} of {file.n_tokens} tokens; copy {file.path.name} and it anew")
    with file.index.open("rb") as index:
        while block := index.read(1 << 22):
            total.update(block)
    return total.hexdigest()


def _check_ids(path: Path, block: np.ndarray, start: int, vocab_size: int) -> None:
    for at in (int(block.argmin()), int(block.argmax())):
        if not 0 <= block[at] < vocab_size:
            raise UserError(
                f"{path} has the id {block[at]} as token {start + at}, and the tokenizer {vocab_size} ids; name the "
                "tokenizer that the file was made with"
            )


def _bytes_per_token(split: TokenStream, tokenizer: Tokenizer) -> float:
    head = split.window(0, min(split.n_tokens, DECODED_TOKENS))
    return max(1, len(tokenizer.decode(head).encode(errors="replace"))) / len(head)
