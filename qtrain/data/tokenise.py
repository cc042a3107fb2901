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
final name is whole. Now and then PROGRESS says how far it is: up to which document of the source, and what the files
have. The next preparation of the same goes on from there, to the same tokens; what was left without it is removed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock

from qtrain.config import TokenizerConfig
from qtrain.data.base import OF_THE_RUN, Document, Source, TextSettings
from qtrain.data.bigram import MAX_TRAIN_TOKENS, MAX_VAL_TOKENS, bigram_cross_entropy
from qtrain.data.corpus import FORMAT_VERSION, Corpus, Split, data_hash, open_corpus, read_manifest
from qtrain.data.dialogue import Dialogue, plain_text
from qtrain.data.encode import Chunk, Encoded, Encoder, Mark, Text, encode_all
from qtrain.data.progress import Progress
from qtrain.data.shards import NotAsWrittenError, SplitWriter
from qtrain.data.tokenizer import (
    ByteTokenizer,
    FileTokenizer,
    Tokenizer,
    chat_template_identity,
    load_pretrained,
    load_saved,
    tokenizer_files,
    tokenizer_identity,
    train_bpe,
)
from qtrain.errors import UserError, first_line
from qtrain.runs.files import naming, read_json, sync_folder, write_atomically, write_synced

CHUNK_CHARACTERS = 1 << 18
MARK_CHARACTERS = 1 << 26  # PROGRESS is written after so much text: half a minute on a core, or less
PROGRESS = "progress.json"
BPE_TEXT_BYTES = 64 << 20  # BPE is trained on this much text, from the first training documents on

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextPlan:
    """A preparation that was asked for: sources, limits in tokens (None: everything), and its place in the cache.
    only_val: there is no training split; `val` is the source."""

    data: TextSettings
    tokenizer: TokenizerConfig
    train: Source
    val: Source | None
    train_limit: int | None
    val_limit: int | None
    fingerprint: str
    only_val: bool = False

    @property
    def name(self) -> str:
        readable = re.sub(r"[^A-Za-z0-9._]+", "-", f"{self.train.name}-{self.tokenizer.kind}").strip("-.")
        return f"{readable}-{self.fingerprint}"

    @property
    def folder(self) -> Path:
        suffix = "" if self.train_limit is None else f"-{self.train_limit}"
        return Path(self.data.cache_dir).expanduser() / f"{self.name}{suffix}"

    def find(self) -> Corpus | None:
        """A whole preparation of the same source and settings that covers the limit. A damaged one is reported, passed
        over and, if its place is needed, replaced."""
        for folder in sorted(self.folder.parent.glob(f"{self.name}*")):
            try:
                manifest = read_manifest(folder)
                limited = not manifest["train_complete"]
                if not limited or (self.train_limit is not None and manifest["train_limit"] >= self.train_limit):
                    return self._opened(folder)
            except UserError as error:
                log.warning("%s", error)
        return None

    def make(self, progress: bool) -> Corpus:
        """The corpus, made under the lock, unless another process makes it while this one waits for it."""
        cache = self.folder.parent
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            told = f"data.cache_dir={self.data.cache_dir} cannot be made ({first_line(error)}); name another"
            raise UserError(told) from None
        with filelock.FileLock(cache / f".{self.folder.name}.lock"):
            if (corpus := self.find()) is not None:
                return corpus
            with naming(self.folder):
                _build_and_rename(self, progress)
            return self._opened(self.folder)

    def _opened(self, folder: Path) -> Corpus:
        corpus = open_corpus(folder, self.train_limit)
        return replace(corpus, fingerprint=self.fingerprint, val_tokens=self.data.val_tokens)


def plan_text(
    data: TextSettings, tokenizer: TokenizerConfig, budget_tokens: int | None = None, only_val: bool = False
) -> TextPlan:
    """The preparation of text. budget_tokens: as `qtrain.data.prepare.prepare`. only_val: the validation split that the
    source names, else all of its text, is validated on, and nothing is trained on. UserError for what is missing."""
    train, val = data.open()
    train_limit = data.max_tokens
    if only_val:
        val, train_limit = val or train, None
        train = replace(val, documents=lambda *_: iter(()))
    elif data.streaming and train_limit is None:
        train_limit = budget_tokens
        if train_limit is None:
            raise UserError("a streamed source has no end of its own: set data.max_tokens (training tokens to prepare)")
    val_limit = data.val_tokens if data.streaming else None
    of_documents = [] if not data.conversations else ["dialogue", chat_template_identity(tokenizer)]
    identity = [
        FORMAT_VERSION,
        *of_documents,
        "validation" if only_val else train.identity,
        [data.val_fraction] if val is None else val.identity,
        val_limit,
        tokenizer_identity(tokenizer),
    ]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    return TextPlan(data, tokenizer, train, val, train_limit, val_limit, key, only_val)


def _build_and_rename(plan: TextPlan, progress: bool) -> None:
    building = plan.folder.with_name(f".{plan.folder.name}.building")
    if not (building / PROGRESS).exists():
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
    with Progress(plan.train.name, plan.folder, plan.train.n_bytes, plan.train_limit, shown=progress) as bar:
        try:
            _build(building, plan, bar)
        except BaseException:
            if (building / PROGRESS).exists():
                log.warning("%s has what was prepared; the same command goes on from there. Or delete it", building)
            else:
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
    """A document on its way: its side, the digest that decided it, and its place in the source."""

    split: str
    text: str
    digest: bytes
    place: Callable[[], Any] | None = None


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
    name, text = document.name, document.text
    if len(text) < 2:
        raise UserError(f"{name} holds all the text there is, one character, which cannot be cut; name more files")
    start = min(max(1, round(len(text) * (1 - fraction))), len(text) - 1)
    start = text.find("\n", start - 1, (start + len(text)) // 2) + 1 or start
    return Document(name, text[:start]), Document(name, text[start:])


class Assignment:
    """Gives documents of the training source their side: held out by rank, by rank range, or not at all.

    is_cut: the source is one text, cut in two documents.
    """

    def __init__(self, plan: TextPlan) -> None:
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
        if len(sizes) == 1 and plan.data.conversations:
            raise UserError(
                f"{plan.train.name} has one conversation, of which no part can be held out; add more, or name others "
                "by data.val_files"
            )
        self.is_cut = len(sizes) == 1
        if self.is_cut:
            self._documents = lambda: (part for text in plan.train.documents() for part in _cut(text, fraction))
            _, held_out, *_ = self._documents()
            self._held_out = {_rank(_digest(held_out.text))}
        else:
            self._held_out = _held_out(sizes, fraction)

    def items(self, *place: Any) -> Iterator[Item]:
        """A pass over the documents, in the order of their source; of those after a place, where one is given."""
        for document in self._documents(*place):
            digest = _digest(document.text)
            rank = _rank(digest)
            held_out = rank in self._held_out if self._held_out is not None else rank < self._limit
            yield Item("val" if held_out else "train", document.text, digest, document.place)


# --------------------------------------------------------------------------------------------------------- the building


def _build(folder: Path, plan: TextPlan, bar: Progress) -> None:
    """Writes every file of the corpus into an existing folder, which is empty or has PROGRESS of the same plan."""
    bar.phase("reading")
    assign = Assignment(plan)
    kept = _read_progress(folder)
    tokenizer = _tokenizer(plan, assign, bar, folder if kept else None)
    if isinstance(tokenizer, FileTokenizer) and not kept:
        for name in _tokenizer_names(tokenizer):
            write_synced(folder / name, tokenizer_files(tokenizer)[name])
    encoder = Dialogue(tokenizer) if plan.data.conversations else Text(tokenizer)
    limits = {"train": plan.train_limit, "val": plan.val_limit}
    writers: dict[str, SplitWriter] = {}
    try:
        for name, limit in limits.items():
            state = kept["writers"][name] if kept else None
            writers[name] = SplitWriter(folder, name, encoder.dtype, limit, state)
        _fill(folder, plan, bar, assign, encoder, writers, kept)
    except NotAsWrittenError as error:
        _begin_anew(folder, error)
        _build(folder, plan, bar)
    finally:
        for writer in writers.values():
            writer.abandon()


def _fill(
    folder: Path, plan: TextPlan, bar: Progress, assign: Assignment, encoder: Encoder,
    writers: dict[str, SplitWriter], kept: dict[str, Any] | None,
) -> None:  # fmt: skip
    """All documents to the writers, those after what is kept, and the manifest."""
    bar.phase("tokenising")
    tokenizer = encoder.tokenizer
    workers = plan.data.prepare_workers or (1 if isinstance(tokenizer, ByteTokenizer) else os.cpu_count() or 1)
    excluded: set[bytes] = set()
    if plan.val is not None and not kept:
        items = (Item("val", document.text, _digest(document.text)) for document in plan.val.documents())
        for encoded in encode_all(_chunks(_unfilled(items, [writers["val"]])), encoder, workers):
            assert isinstance(encoded, Encoded), "these items have no place"
            writers["val"].add(encoded)
            bar.advance(encoded, 0)
    if plan.val is not None:
        excluded = writers["val"].digests()
    dropped = _Counter(kept["dropped"] if kept else 0)
    items = dropped.without(assign.items(*([kept["place"]] if kept else [])), excluded)
    fed = [writers["train"]] if plan.val else list(writers.values())
    if kept:
        bar.resume(sum(writer.n_bytes for writer in writers.values()))
        log.info("going on after %s documents", f"{sum(writer.n_documents for writer in writers.values()):,}")
    for encoded in encode_all(_chunks(_unfilled(items, fed), dropped), encoder, workers):
        if isinstance(encoded, Mark):
            _write_progress(folder, encoded, writers, tokenizer)
        else:
            writers[encoded.split].add(encoded)
            bar.advance(encoded, writers["train"].n_tokens)
    complete = not writers["train"].full
    splits = {name: writer.close() for name, writer in writers.items()}
    _check_not_empty(plan, splits)
    bar.phase("counting bigrams")
    manifest = _manifest(plan, encoder, writers, splits)
    manifest |= {"train_complete": complete, "dropped_from_train": dropped.n, "is_cut": assign.is_cut}
    write_synced(folder / "manifest.json", json.dumps(manifest, indent=1))
    (folder / PROGRESS).unlink(missing_ok=True)


def _tokenizer_names(tokenizer: FileTokenizer) -> list[str]:
    """The files of a tokenizer that a corpus keeps: its chat template, where it has one, needs all of them."""
    return ["tokenizer.json"] if tokenizer.chat_template is None else list(tokenizer_files(tokenizer))


def _write_progress(folder: Path, mark: Mark, writers: Mapping[str, SplitWriter], tokenizer: Tokenizer) -> None:
    facts = {
        "versions": _versions(),
        "place": mark.place,
        "dropped": mark.dropped,
        "eos_id": tokenizer.eos_id,
        "writers": {name: writer.state() for name, writer in writers.items()},
    }
    write_atomically(folder / PROGRESS, json.dumps(facts))


def _read_progress(folder: Path) -> dict[str, Any] | None:
    """How far the preparation in a folder is; None where it begins. The folder is emptied where another version of the
    libraries was at work, or a file is not what was written."""
    path = folder / PROGRESS
    if not path.exists():
        return None
    try:
        facts = read_json(path)
        if facts["versions"] != _versions():
            raise UserError(f"{path} is of other versions of the libraries")
        for name, state in facts["writers"].items():
            shards = {shard: state["files"][shard] for shard in state["files"]}
            for file, kept in {**shards, f"{name}-documents.bin": state["documents"]}.items():
                if (folder / file).stat().st_size < kept["bytes"]:
                    raise UserError(f"{folder / file} is cut")
    except (UserError, OSError, KeyError, TypeError, AttributeError) as error:
        _begin_anew(folder, error)
        return None
    return facts


def _begin_anew(folder: Path, why: Exception) -> None:
    log.warning("%s; the preparation begins anew", why if isinstance(why, UserError) else first_line(why))
    shutil.rmtree(folder)
    folder.mkdir()


def _versions() -> dict[str, str]:
    return {"format": str(FORMAT_VERSION)} | {name: version(name) for name in ("tokenizers", "datasets")}


class _Counter:
    """Counts the training documents that are dropped because the validation split has them."""

    def __init__(self, n: int) -> None:
        self.n = n

    def without(self, items: Iterable[Item], excluded: set[bytes]) -> Iterator[Item]:
        for item in items:
            if item.digest in excluded:
                self.n += 1
            else:
                yield item


def _unfilled(items: Iterable[Item], fed: list[SplitWriter]) -> Iterator[Item]:
    """The items whose split is not full yet, until all the splits that this source feeds are."""
    by_name = {writer.name: writer for writer in fed}
    for item in items:
        if not by_name[item.split].full:
            yield item
        elif all(writer.full for writer in fed):
            return


def _chunks(items: Iterable[Item], dropped: _Counter | None = None) -> Iterator[Chunk | Mark]:
    """Documents of one side, about CHUNK_CHARACTERS of them, in order within each side; and a Mark after
    MARK_CHARACTERS, where the items have a place."""
    open_chunks: dict[str, Chunk] = {}
    unmarked = 0
    for item in items:
        chunk = open_chunks.setdefault(item.split, Chunk(item.split, [], []))
        chunk.texts.append(item.text)
        chunk.digests.append(item.digest)
        chunk.n_characters += len(item.text)
        if chunk.n_characters >= CHUNK_CHARACTERS:
            yield open_chunks.pop(item.split)
        unmarked += len(item.text)
        if unmarked >= MARK_CHARACTERS and item.place is not None and dropped is not None:
            mark = Mark(item.place(), dropped.n)
            yield from open_chunks.values()
            yield mark
            open_chunks.clear()
            unmarked = 0
    yield from open_chunks.values()


def _tokenizer(plan: TextPlan, assign: Assignment, bar: Progress, kept: Path | None) -> Tokenizer:
    """kept: the folder of a preparation that goes on."""
    if plan.tokenizer.kind == "bytes":
        return ByteTokenizer()
    if kept is not None:
        return load_saved(kept / "tokenizer.json", read_json(kept / PROGRESS)["eos_id"])
    if plan.tokenizer.kind == "huggingface":
        return load_pretrained(plan.tokenizer)
    assert plan.tokenizer.vocab_size is not None, "TokenizerConfig requires it for bpe"
    bar.phase("training the tokenizer")
    return train_bpe(_training_text(plan, assign, BPE_TEXT_BYTES), plan.tokenizer.vocab_size)


def training_text(plan: TextPlan, n_bytes: int) -> Iterator[str]:
    """The first training documents of a source, until they have so many bytes."""
    return _training_text(plan, Assignment(plan), n_bytes)


def _training_text(plan: TextPlan, assign: Assignment, n_bytes: int) -> Iterator[str]:
    for item in assign.items():
        if n_bytes <= 0:
            return
        if item.split == "train":
            text = plain_text(item.text) if plan.data.conversations else item.text
            n_bytes -= len(text.encode())
            yield text


def _check_not_empty(plan: TextPlan, splits: dict[str, Split]) -> None:
    for name, split in splits.items():
        if split.n_documents == 0 and not (name == "train" and plan.only_val):
            source = plan.val if name == "val" and plan.val else plan.train
            raise UserError(
                f"{source.name} leaves no document for {name}; "
                + ("give it text" if source is plan.val else "give it more documents, or others for data.val_files")
                + ("; with data.streaming=false a single text is cut in two" if plan.data.streaming else "")
            )


# --------------------------------------------------------------------------------------------------------- the manifest


def _manifest(
    plan: TextPlan, encoder: Encoder, writers: dict[str, SplitWriter], splits: dict[str, Split]
) -> dict[str, Any]:
    tokenizer = encoder.tokenizer
    train, val = splits["train"], splits["val"]
    counts = {
        name: {key: getattr(split, key) for key in ("n_tokens", "n_documents", "n_bytes")}
        for name, split in splits.items()
    }
    files = writers["train"].files | writers["val"].files
    if isinstance(tokenizer, FileTokenizer):
        for name in _tokenizer_names(tokenizer):
            content = (train.folder / name).read_bytes()
            files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return {
        "format_version": FORMAT_VERSION,
        "source": plan.train.name,
        "options": plan.data.model_dump(mode="json", exclude={*OF_THE_RUN}),
        "tokenizer": {
            **plan.tokenizer.model_dump(mode="json"),
            "hash": encoder.hash,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "file": isinstance(tokenizer, FileTokenizer),
        },
        "dtype": train.dtype,
        "shard_tokens": train.shard_tokens,
        "train_limit": plan.train_limit,
        "splits": counts,
        "data_hash": data_hash(encoder.hash, train.head(0) if plan.data.streaming else train, val),
        "bigram_cross_entropy": bigram_cross_entropy(train, val, tokenizer.vocab_size),
        "bigram_tokens": {"train": min(train.n_tokens, MAX_TRAIN_TOKENS), "val": min(val.n_tokens, MAX_VAL_TOKENS)},
        "files": files,
        "versions": {"python": platform.python_version()}
        | {n: version(n) for n in ("numpy", "tokenizers", "datasets")},
    }
