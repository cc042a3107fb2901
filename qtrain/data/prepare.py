"""Text to token shards, once: read, split, tokenise in parallel, write, rename.

The validation split, by one of four rules, each a function of the documents' content alone:
- data.val_files or data.val_split: those documents; a training document equal to one of them is dropped and counted.
- a source that is read whole: in the order of their content hash, documents are held out as long as they fit into
  data.val_fraction of the bytes; at least one is, and at least one is left.
- a source that is read whole and is one text: the text is cut in two documents, of which the second is held out. It is
  the last data.val_fraction of the characters, from the first line that begins in the first half of these; where no
  line does, it begins in the middle of one.
- a streamed source: documents whose content hash falls below data.val_fraction of the hash range.
Equal documents share a hash, so they never stand on both sides.

A streamed source is read until the training split holds more than data.max_tokens (else the run's budget) and the
validation split more than data.val_tokens. Documents stay whole. A corpus prepared with a larger limit serves a
smaller one as a view that equals, hash included, what the smaller preparation would have made.

The folder is built beside its final place under a file lock and renamed when everything is on disk, so what has the
final name is whole; what a killed preparation left is removed by the next one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock

from qtrain.config import TokenizerConfig
from qtrain.data.base import DataSettings, Document, Source
from qtrain.data.bigram import MAX_TRAIN_TOKENS, MAX_VAL_TOKENS, bigram_cross_entropy
from qtrain.data.corpus import FORMAT_VERSION, Corpus, Split, data_hash, open_corpus, read_manifest
from qtrain.data.encode import Chunk, encode_all
from qtrain.data.progress import Progress
from qtrain.data.shards import SplitWriter
from qtrain.data.tokenizer import (
    ByteTokenizer,
    FileTokenizer,
    Tokenizer,
    load_pretrained,
    tokenizer_identity,
    train_bpe,
)
from qtrain.errors import UserError, first_line
from qtrain.runs.files import naming, sync_folder, write_synced

CHUNK_CHARACTERS = 1 << 18
BPE_TEXT_BYTES = 64 << 20  # BPE is trained on this much text, from the first training documents on

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A preparation that was asked for: sources, limits in tokens (None: everything), and its place in the cache."""

    data: DataSettings
    tokenizer: TokenizerConfig
    train: Source
    val: Source | None
    train_limit: int | None
    val_limit: int | None
    fingerprint: str

    @property
    def name(self) -> str:
        readable = re.sub(r"[^A-Za-z0-9._]+", "-", f"{self.train.name}-{self.tokenizer.kind}").strip("-.")
        return f"{readable}-{self.fingerprint}"

    @property
    def folder(self) -> Path:
        suffix = "" if self.train_limit is None else f"-{self.train_limit}"
        return Path(self.data.cache_dir).expanduser() / f"{self.name}{suffix}"


def prepare(
    data: DataSettings, tokenizer: TokenizerConfig, *, budget_tokens: int | None = None, progress: bool = True
) -> Corpus:
    """The corpus of these settings: opened from data.cache_dir where it lies prepared, else made there.

    budget_tokens: training tokens that the run will read; the limit of a streamed source without data.max_tokens.
    progress: show a bar where there is a terminal; else a line at the start and one at the end.
    Raises UserError for bad input, naming file and place, before anything of an earlier preparation is touched.
    """
    plan = _plan(data, tokenizer, budget_tokens)
    corpus = _find(plan) or _made(plan, progress)
    if corpus.is_cut:
        log.info("%s", describe_cut(corpus))
    wanted = tokenizer.vocab_size if tokenizer.kind == "bpe" else None
    if wanted is not None and corpus.vocab_size < wanted:
        log.warning(
            "the vocabulary has %d tokens, not tokenizer.vocab_size=%d: the training text has no more pairs to merge",
            corpus.vocab_size, wanted,
        )  # fmt: skip
    return corpus


def _made(plan: Plan, progress: bool) -> Corpus:
    """The corpus, made under the lock, unless another process makes it while this one waits for it."""
    cache = plan.folder.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        told = f"data.cache_dir={plan.data.cache_dir} cannot be made ({first_line(error)}); name another"
        raise UserError(told) from None
    with filelock.FileLock(cache / f".{plan.folder.name}.lock"):
        if (corpus := _find(plan)) is not None:
            return corpus
        with naming(plan.folder):
            _build_and_rename(plan, progress)
        return replace(open_corpus(plan.folder, plan.train_limit), fingerprint=plan.fingerprint)


def describe_cut(corpus: Corpus) -> str:
    """What to say of a corpus whose validation split is the end of its only text."""
    share = corpus.val.n_bytes / (corpus.train.n_bytes + corpus.val.n_bytes)
    return f"the data is one text: its last {share:.1%} is the validation split, and no training step reads it"


def fingerprint(data: DataSettings, tokenizer: TokenizerConfig, *, budget_tokens: int | None = None) -> str:
    """Twelve hex digits of the sources, what is held out of them, and the tokenizer, without reading any text: name,
    size and modification time of each file, or the name of a dataset on the hub. UserError as `prepare`."""
    return _plan(data, tokenizer, budget_tokens).fingerprint


def same_text(
    data: DataSettings,
    tokenizer: TokenizerConfig,
    recorded: Mapping[str, Any],
    *,
    budget_tokens: int | None = None,
    may_prepare: bool = True,
) -> bool | None:
    """Whether a run that is over read the text that these settings name now.

    recorded: its summary.json or its row of a results file, with data_fingerprint and data_hash. Equal fingerprints say
    yes at once: name, size and modification time of each file, or the name of a dataset on the hub. Else the hashes of
    the content are compared, for which the corpus is prepared, as the run would have to; with may_prepare=False the
    answer is None where it lies not prepared yet, or where its files are not on this machine. UserError as `prepare`.
    """
    try:
        plan = _plan(data, tokenizer, budget_tokens)
        if recorded.get("data_fingerprint") == plan.fingerprint:
            return True
        corpus = _find(plan)
    except UserError:
        if may_prepare:
            raise
        return None
    if corpus is None and not may_prepare:
        return None
    corpus = corpus or prepare(data, tokenizer, budget_tokens=budget_tokens)
    return corpus.data_hash == recorded.get("data_hash")


def _plan(data: DataSettings, tokenizer: TokenizerConfig, budget_tokens: int | None) -> Plan:
    train, val = data.open()
    train_limit = data.max_tokens
    if data.streaming and train_limit is None:
        train_limit = budget_tokens
        if train_limit is None:
            raise UserError("a streamed source has no end of its own: set data.max_tokens (training tokens to prepare)")
    val_limit = data.val_tokens if data.streaming else None
    identity = [
        FORMAT_VERSION,
        train.identity,
        [data.val_fraction] if val is None else val.identity,
        val_limit,
        tokenizer_identity(tokenizer),
    ]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    return Plan(data, tokenizer, train, val, train_limit, val_limit, key)


def _find(plan: Plan) -> Corpus | None:
    """A whole preparation of the same source and settings that covers the limit. A damaged one is reported, passed over
    and, if its place is needed, replaced."""
    for folder in sorted(plan.folder.parent.glob(f"{plan.name}*")):
        try:
            manifest = read_manifest(folder)
            limited = not manifest["train_complete"]
            if not limited or (plan.train_limit is not None and manifest["train_limit"] >= plan.train_limit):
                return replace(open_corpus(folder, plan.train_limit), fingerprint=plan.fingerprint)
        except UserError as error:
            log.warning("%s", error)
    return None


def _build_and_rename(plan: Plan, progress: bool) -> None:
    building = plan.folder.with_name(f".{plan.folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    with Progress(plan.train.name, plan.folder, plan.train.n_bytes, plan.train_limit, shown=progress) as bar:
        try:
            _build(building, plan, bar)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
    sync_folder(building)
    if plan.folder.exists():  # damaged, or _find would have returned it
        shutil.rmtree(plan.folder)
    building.rename(plan.folder)
    sync_folder(plan.folder.parent)


# ------------------------------------------------------------------------------------------------------------ the split


@dataclass(frozen=True)
class Item:
    """A document on its way: its side, and the digest that decided it."""

    split: str
    text: str
    digest: bytes


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]


def _rank(digest: bytes) -> int:
    """The content hash as a number below 2**64."""
    return int.from_bytes(digest[:8], "little")


def _sizes(source: Source) -> dict[int, int]:
    """Rank of each distinct document -> UTF-8 bytes of all its copies."""
    sizes: dict[int, int] = {}
    for document in source.documents():
        rank = _rank(_digest(document.text))
        sizes[rank] = sizes.get(rank, 0) + len(document.text.encode())
    return sizes


def _held_out(sizes: dict[int, int], fraction: float) -> set[int]:
    """Ranks of the documents to hold out of a source that is read whole; see the module's text."""
    room = fraction * sum(sizes.values())
    fitting = sorted(rank for rank, size in sizes.items() if size <= room)
    held_out: set[int] = set()
    for rank in fitting:
        room -= sizes[rank]
        if room < 0:
            break
        held_out.add(rank)
    return held_out or {min(sizes, key=lambda rank: (sizes[rank], rank))}


def _cut(document: Document, fraction: float) -> tuple[Document, Document]:
    """The part to train on and the last `fraction` of the characters, which is held out; see the module's text."""
    name, text = document
    if len(text) < 2:
        raise UserError(f"{name} holds all the text there is, one character, which cannot be cut; name more files")
    start = min(max(1, round(len(text) * (1 - fraction))), len(text) - 1)
    start = text.find("\n", start - 1, (start + len(text)) // 2) + 1 or start
    return Document(name, text[:start]), Document(name, text[start:])


class Assignment:
    """Gives documents of the training source their side: held out by rank, by rank range, or not at all.

    is_cut: the source is one text, cut in two documents.
    """

    def __init__(self, plan: Plan) -> None:
        self._documents = plan.train.documents
        self._held_out = None
        self.is_cut = False
        fraction = plan.data.val_fraction
        self._limit = 0.0 if plan.val is not None else fraction * 2.0**64
        if plan.val is not None or plan.data.streaming:
            return
        sizes = _sizes(plan.train)
        if not sizes:
            raise UserError(f"{plan.train.name} has no text; name a source that has some")
        self.is_cut = len(sizes) == 1
        if self.is_cut:
            self._documents = lambda: (part for text in plan.train.documents() for part in _cut(text, fraction))
            _, held_out, *_ = self._documents()
            self._held_out = {_rank(_digest(held_out.text))}
        else:
            self._held_out = _held_out(sizes, fraction)

    def items(self) -> Iterator[Item]:
        """A pass over the documents, in the order of their source."""
        for document in self._documents():
            digest = _digest(document.text)
            rank = _rank(digest)
            held_out = rank in self._held_out if self._held_out is not None else rank < self._limit
            yield Item("val" if held_out else "train", document.text, digest)


# --------------------------------------------------------------------------------------------------------- the building


def _build(folder: Path, plan: Plan, bar: Progress) -> None:
    """Writes every file of the corpus into an existing empty folder."""
    bar.phase("reading")
    assign = Assignment(plan)
    tokenizer = _tokenizer(plan, assign, bar)
    if isinstance(tokenizer, FileTokenizer):
        tokenizer.save(folder / "tokenizer.json")
    limits = {"train": plan.train_limit, "val": plan.val_limit}
    writers = {name: SplitWriter(folder, name, tokenizer.vocab_size, limit) for name, limit in limits.items()}
    bar.phase("tokenising")
    workers = plan.data.prepare_workers or (1 if isinstance(tokenizer, ByteTokenizer) else os.cpu_count() or 1)
    excluded: set[bytes] = set()
    if plan.val is not None:
        items = (Item("val", document.text, _digest(document.text)) for document in plan.val.documents())
        _write(_unfilled(items, [writers["val"]]), writers, tokenizer, workers, bar)
        excluded = writers["val"].digests()
    dropped = _Counter()
    items = dropped.without(assign.items(), excluded)
    fed = [writers["train"]] if plan.val else list(writers.values())
    _write(_unfilled(items, fed), writers, tokenizer, workers, bar)
    complete = not writers["train"].full
    splits = {name: writer.close() for name, writer in writers.items()}
    _check_not_empty(plan, splits)
    bar.phase("counting bigrams")
    manifest = _manifest(plan, tokenizer, writers, splits)
    manifest |= {"train_complete": complete, "dropped_from_train": dropped.n, "is_cut": assign.is_cut}
    write_synced(folder / "manifest.json", json.dumps(manifest, indent=1))


class _Counter:
    """Counts the training documents that are dropped because the validation split has them."""

    def __init__(self) -> None:
        self.n = 0

    def without(self, items: Iterable[Item], excluded: set[bytes]) -> Iterator[Item]:
        for item in items:
            if item.digest in excluded:
                self.n += 1
            else:
                yield item


def _write(
    items: Iterable[Item], writers: dict[str, SplitWriter], tokenizer: Tokenizer, workers: int, bar: Progress
) -> None:
    for encoded in encode_all(_chunks(items), tokenizer, workers):
        writers[encoded.split].add(encoded)
        bar.advance(encoded, writers["train"].n_tokens)


def _unfilled(items: Iterable[Item], fed: list[SplitWriter]) -> Iterator[Item]:
    """The items whose split is not full yet, until all the splits that this source feeds are."""
    by_name = {writer.name: writer for writer in fed}
    for item in items:
        if not by_name[item.split].full:
            yield item
        elif all(writer.full for writer in fed):
            return


def _chunks(items: Iterable[Item]) -> Iterator[Chunk]:
    """Documents of one side, about CHUNK_CHARACTERS of them, in order within each side."""
    open_chunks: dict[str, Chunk] = {}
    for item in items:
        chunk = open_chunks.setdefault(item.split, Chunk(item.split, [], []))
        chunk.texts.append(item.text)
        chunk.digests.append(item.digest)
        chunk.n_characters += len(item.text)
        if chunk.n_characters >= CHUNK_CHARACTERS:
            yield open_chunks.pop(item.split)
    yield from open_chunks.values()


def _tokenizer(plan: Plan, assign: Assignment, bar: Progress) -> Tokenizer:
    if plan.tokenizer.kind == "bytes":
        return ByteTokenizer()
    if plan.tokenizer.kind == "huggingface":
        return load_pretrained(plan.tokenizer)
    assert plan.tokenizer.vocab_size is not None, "TokenizerConfig requires it for bpe"
    bar.phase("training the tokenizer")
    return train_bpe(_training_text(assign), plan.tokenizer.vocab_size)


def _training_text(assign: Assignment) -> Iterator[str]:
    n_bytes = 0
    for item in assign.items():
        if n_bytes >= BPE_TEXT_BYTES:
            return
        if item.split == "train":
            n_bytes += len(item.text.encode())
            yield item.text


def _check_not_empty(plan: Plan, splits: dict[str, Split]) -> None:
    for name, split in splits.items():
        if split.n_documents == 0:
            source = plan.val if name == "val" and plan.val else plan.train
            raise UserError(
                f"{source.name} leaves no document for {name}; "
                + ("give it text" if source is plan.val else "give it more documents, or others for data.val_files")
                + ("; with data.streaming=false a single text is cut in two" if plan.data.streaming else "")
            )


# --------------------------------------------------------------------------------------------------------- the manifest


def _manifest(
    plan: Plan, tokenizer: Tokenizer, writers: dict[str, SplitWriter], splits: dict[str, Split]
) -> dict[str, Any]:
    train, val = splits["train"], splits["val"]
    counts = {
        name: {key: getattr(split, key) for key in ("n_tokens", "n_documents", "n_bytes")}
        for name, split in splits.items()
    }
    files = writers["train"].files | writers["val"].files
    if isinstance(tokenizer, FileTokenizer):
        content = (train.folder / "tokenizer.json").read_bytes()
        files["tokenizer.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return {
        "format_version": FORMAT_VERSION,
        "source": plan.train.name,
        "options": plan.data.model_dump(
            mode="json", exclude={"cache_dir", "num_workers", "prepare_workers", "document_mask"}
        ),
        "tokenizer": {
            **plan.tokenizer.model_dump(mode="json"),
            "hash": tokenizer.hash,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "file": isinstance(tokenizer, FileTokenizer),
        },
        "dtype": train.dtype,
        "shard_tokens": train.shard_tokens,
        "train_limit": plan.train_limit,
        "splits": counts,
        "data_hash": data_hash(tokenizer.hash, train.head(0) if plan.data.streaming else train, val),
        "bigram_cross_entropy": bigram_cross_entropy(train, val, tokenizer.vocab_size),
        "bigram_tokens": {"train": min(train.n_tokens, MAX_TRAIN_TOKENS), "val": min(val.n_tokens, MAX_VAL_TOKENS)},
        "files": files,
        "versions": {"python": platform.python_version()}
        | {n: version(n) for n in ("numpy", "tokenizers", "datasets")},
    }
