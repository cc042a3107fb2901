"""Preparation: what is written, how it is split, and that nothing half-made or damaged passes for whole."""

import errno
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import data_settings

import qtrain.data.corpus
import qtrain.data.tokenise
from qtrain.config import TokenizerConfig
from qtrain.data import shards
from qtrain.data.base import DataSettings
from qtrain.data.corpus import Corpus, Split, check_vocab, open_corpus, verify
from qtrain.data.encode import Chunk, Text, encode_all
from qtrain.data.prepare import prepare
from qtrain.data.tokenizer import ByteTokenizer
from qtrain.errors import UserError, explain

BYTES = TokenizerConfig(kind="bytes")
BPE = TokenizerConfig(kind="bpe", vocab_size=300)
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def document(i: int) -> str:
    generator = np.random.default_rng(i)
    return f"{i}: " + " ".join(generator.choice(WORDS, size=5 + i % 20)) + " é\n"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """40 documents as text files."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text(document(i))
    return folder


def config(folder: Path, **changes: object) -> DataSettings:
    options = {"source": "text", "val_tokens": 100, "val_fraction": 0.2}
    options |= {"files": str(folder / "*.txt")} if changes.get("source", "text") == "text" else {}
    return data_settings(**(options | {"cache_dir": str(folder.parent / "cache"), "prepare_workers": 1} | changes))


def quiet(data: DataSettings, tokenizer: TokenizerConfig = BYTES, budget_tokens: int | None = None) -> Corpus:
    return prepare(data, tokenizer, budget_tokens=budget_tokens, progress=False)


def documents(split: Split) -> list[list[int]]:
    """The tokens of each document, without its end, cut by the stored boundaries."""
    stream = split.window(0, split.n_tokens).tolist()
    ends = [0, *split.documents["end"].tolist()]
    return [stream[a : b - 1] for a, b in pairwise(ends)]


def texts(corpus: Corpus, split: Split) -> list[str]:
    return [corpus.tokenizer.decode(ids) for ids in documents(split)]


def snapshot(folder: Path) -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.iterdir()
        if p.name not in ("manifest.json", "verified.json")
    }


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_every_document_is_there_once_with_its_end(files: Path, tokenizer: TokenizerConfig) -> None:
    corpus = quiet(config(files), tokenizer)
    train, val = texts(corpus, corpus.train), texts(corpus, corpus.val)
    assert sorted(train + val) == sorted(document(i) for i in range(40))
    assert not set(train) & set(val)
    assert train == [document(i) for i in range(40) if document(i) in train]  # source order is kept
    for split, split_texts in ((corpus.train, train), (corpus.val, val)):
        stream = split.window(0, split.n_tokens)
        assert np.count_nonzero(stream == corpus.tokenizer.eos_id) == split.n_documents == len(split_texts)
        assert np.array_equal(np.flatnonzero(stream == corpus.tokenizer.eos_id) + 1, split.documents["end"])
        assert split.n_bytes == sum(len(text.encode()) for text in split_texts)
    held_out = corpus.val.n_bytes / (corpus.val.n_bytes + corpus.train.n_bytes)
    assert 0.1 < held_out <= 0.2
    assert corpus.bytes_per_token == corpus.val.n_bytes / corpus.val.n_tokens
    verify(corpus.folder)


def test_result_does_not_depend_on_workers_or_place(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qtrain.data.tokenise, "CHUNK_CHARACTERS", 200)
    alone = quiet(config(files, cache_dir=str(tmp_path / "one")), BPE)
    many = quiet(config(files, cache_dir=str(tmp_path / "many"), prepare_workers=3), BPE)
    moved = files.rename(tmp_path / "elsewhere")
    elsewhere = quiet(config(moved, cache_dir=str(tmp_path / "moved")), BPE)
    assert snapshot(alone.folder) == snapshot(many.folder) == snapshot(elsewhere.folder)
    assert alone.data_hash == many.data_hash == elsewhere.data_hash
    assert alone.bigram_cross_entropy == many.bigram_cross_entropy


def test_data_hash_follows_content_split_and_tokenizer(files: Path) -> None:
    base = quiet(config(files))
    hashes = {base.data_hash, quiet(config(files), BPE).data_hash, quiet(config(files, val_fraction=0.4)).data_hash}
    (files / "07.txt").write_text("changed")
    hashes.add(quiet(config(files)).data_hash)
    assert len(hashes) == 4
    (files / "07.txt").write_text(document(7))  # the old content at a new time: another cache key, the same data
    assert quiet(config(files)).data_hash == base.data_hash


def test_equal_documents_stay_on_one_side(files: Path) -> None:
    for i in range(40):
        (files / f"copy{i:02d}.txt").write_text(document(i))
    corpus = quiet(config(files))
    train, val = texts(corpus, corpus.train), texts(corpus, corpus.val)
    assert not set(train) & set(val)
    assert all((train + val).count(text) == 2 for text in train + val)


def test_one_huge_document_does_not_become_the_validation_split(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.txt").write_text(str(i) * (100 if i else 100_000))
    corpus = quiet(config(folder, val_fraction=0.001))
    assert (corpus.val.n_documents, corpus.val.n_bytes) == (1, 100)


def test_given_validation_files_and_their_copies(files: Path) -> None:
    held_out = files.parent / "val.txt"
    held_out.write_text(document(3))
    corpus = quiet(config(files, val_files=str(held_out)))
    assert texts(corpus, corpus.val) == [document(3)]
    assert texts(corpus, corpus.train) == [document(i) for i in range(40) if i != 3]
    assert corpus.manifest["dropped_from_train"] == 1


def test_windows_cross_shards(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quiet(config(files))
    stream = whole.train.window(0, whole.train.n_tokens)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 64)
    corpus = quiet(config(files, cache_dir=str(files.parent / "small")))
    assert len(list(corpus.folder.glob("train-0*.bin"))) == -(-len(stream) // 64)
    assert corpus.data_hash == whole.data_hash
    for start, length in [(0, 1), (63, 2), (64, 64), (10, 300), (len(stream) - 5, 5), (len(stream), 0)]:
        assert np.array_equal(corpus.train.window(start, length), stream[start : start + length])
    assert corpus.train.window(0, 3).dtype == np.int64
    with pytest.raises(IndexError):
        corpus.train.window(len(stream) - 4, 5)


def test_exactly_full_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 8)
    (tmp_path / "a.txt").write_text("abcdefg")
    (tmp_path / "b.txt").write_text("h" * 15)
    data = config(tmp_path, files=str(tmp_path / "a.txt"), val_files=str(tmp_path / "b.txt"))
    corpus = quiet(data)
    assert sorted(p.name for p in corpus.folder.glob("*-0*.bin")) == [
        "train-00000.bin",
        "val-00000.bin",
        "val-00001.bin",
    ]
    assert corpus.val.window(0, 16).tolist() == [*b"h" * 15, 256]


def test_second_call_reads_no_text(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = quiet(config(files))
    monkeypatch.setattr("qtrain.data.sources.text.Text.read", None)
    again = quiet(config(files, num_workers=5, prepare_workers=2))
    assert (again.folder, again.data_hash, again.train.n_tokens) == (
        first.folder,
        first.data_hash,
        first.train.n_tokens,
    )


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_limited_view_equals_limited_preparation(files: Path, tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    whole = quiet(config(files, cache_dir=str(tmp_path / "whole")), tokenizer)
    for limit in (1, int(whole.train.documents["end"][4]), 1000, 10**9):
        fresh = quiet(config(files, max_tokens=limit, cache_dir=str(tmp_path / f"only{limit}")), tokenizer)
        view = quiet(config(files, max_tokens=limit, cache_dir=str(tmp_path / "whole")), tokenizer)
        assert view.folder == whole.folder
        assert texts(view, view.train) == texts(fresh, fresh.train)
        assert texts(view, view.val) == texts(fresh, fresh.val) == texts(whole, whole.val)
        assert view.data_hash == fresh.data_hash
        assert view.bigram_cross_entropy == pytest.approx(fresh.bigram_cross_entropy, rel=1e-12)
        if limit < whole.train.n_tokens:
            without_last = view.train.n_tokens - len(documents(view.train)[-1]) - 1
            assert without_last <= limit < view.train.n_tokens
            assert view.data_hash != whole.data_hash


def dataset(folder: Path, n: int = 200) -> Path:
    folder.mkdir()
    lines = (json.dumps({"text": document(i)}) + "\n" for i in range(n))
    (folder / "train.jsonl").write_text("".join(lines))
    (folder / "validation.jsonl").write_text(
        "".join(json.dumps({"text": document(i)}) + "\n" for i in range(5, 300, 20))
    )
    return folder


def test_streaming_stops_at_its_limits(tmp_path: Path) -> None:
    data = config(tmp_path, source="huggingface", path=str(dataset(tmp_path / "set")), streaming=True)
    with pytest.raises(UserError, match=r"set data.max_tokens"):
        quiet(data)
    large = quiet(data, budget_tokens=3000)
    small = quiet(data, budget_tokens=1000)
    assert small.folder == large.folder  # the larger one serves
    assert 1000 < small.train.n_tokens < 1200 and 3000 < large.train.n_tokens < 3200
    assert texts(small, small.val) == texts(large, large.val)
    assert 100 < small.val.n_tokens < 300
    assert not set(texts(large, large.train)) & set(texts(large, large.val))
    fresh = quiet(data.model_copy(update={"cache_dir": str(tmp_path / "fresh")}), budget_tokens=1000)
    assert fresh.data_hash == small.data_hash == large.data_hash, "budgets of one sweep are of the same data"


def test_another_streamed_source_with_the_same_validation_is_other_data(tmp_path: Path) -> None:
    hashes = set()
    for name, first in (("one", 0), ("other", 1)):
        folder = tmp_path / name
        folder.mkdir()
        for split, numbers in (("train", range(first, 60)), ("validation", range(70, 90))):
            lines = (json.dumps({"text": document(i)}) + "\n" for i in numbers)
            (folder / f"{split}.jsonl").write_text("".join(lines))
        update = {
            "source": "huggingface",
            "path": str(folder),
            "streaming": True,
            "val_split": "validation",
        }
        hashes.add(quiet(config(tmp_path, **update), budget_tokens=1000).data_hash)
    assert len(hashes) == 2


def test_streaming_with_a_validation_split(tmp_path: Path) -> None:
    data = config(tmp_path, source="huggingface", path=str(dataset(tmp_path / "set")), streaming=True)
    corpus = quiet(data.model_copy(update={"val_split": "validation", "max_tokens": 10**6}))
    val = texts(corpus, corpus.val)
    assert val == [document(5 + 20 * i) for i in range(len(val))]
    assert 100 < corpus.val.n_tokens < 300
    assert texts(corpus, corpus.train) == [document(i) for i in range(200) if document(i) not in val]


def damage_truncate(folder: Path) -> None:
    os.truncate(folder / "train-00000.bin", 10)


def damage_remove(folder: Path) -> None:
    (folder / "val-documents.bin").unlink()


def damage_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format_version": 1,')


def damage_flip(folder: Path) -> None:
    """One bit of the validation text: a run gave another loss for it, of the same data_hash."""
    content = bytearray((folder / "val-00000.bin").read_bytes())
    content[10] ^= 1
    (folder / "val-00000.bin").write_bytes(content)


def damaging(**values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "manifest.json"
        tree = json.loads(path.read_text())
        for key, value in values.items():
            *parents, leaf = key.split("__")
            node = tree
            for parent in parents:
                node = node[parent]
            node[leaf] = value
        path.write_text(json.dumps(tree))

    return damage


INCONSISTENT = [  # the second made a window that never ended
    {"files": {}}, {"splits__train__n_tokens": 10**6}, {"splits__val__n_tokens": -1},
    {"splits__val__n_documents": 10**9}, {"splits__train__n_tokens": 10**30}, {"dtype": "<u4"}, {"dtype": "O"},
    {"shard_tokens": 0}, {"shard_tokens": 7},
    {"tokenizer__eos_id": 10**6}, {"tokenizer__vocab_size": 9}, {"tokenizer__file": False}, {"splits": []},
    {"data_hash": None}, {"files__../x": {"bytes": 1, "sha256": "0" * 64}},
]  # fmt: skip


@pytest.mark.parametrize(
    "damage",
    [damage_truncate, damage_remove, damage_manifest, damage_flip, *(damaging(**values) for values in INCONSISTENT)],
)
def test_damaged_cache_is_told_and_made_again(files: Path, damage, caplog: pytest.LogCaptureFixture) -> None:
    corpus = quiet(config(files), BPE)
    before = snapshot(corpus.folder)
    damage(corpus.folder)
    again = quiet(config(files), BPE)
    assert "prepare the corpus again" in caplog.text
    assert snapshot(again.folder) == before
    verify(again.folder)


def test_verify_sees_one_flipped_bit(files: Path) -> None:
    corpus = quiet(config(files))
    shard = corpus.folder / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"train-00000.bin: content differs from the manifest"):
        verify(corpus.folder)


def test_bad_input_leaves_earlier_caches_alone(files: Path) -> None:
    good = quiet(config(files))
    before = {path: path.stat().st_mtime_ns for path in good.folder.iterdir()}
    (files / "99.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"99.txt is not UTF-8 text"):
        quiet(config(files))
    assert {path: path.stat().st_mtime_ns for path in good.folder.iterdir()} == before
    assert sorted(path.name for path in good.folder.parent.iterdir() if not path.name.endswith(".lock")) == [
        good.folder.name
    ]


def test_of_one_text_the_end_is_held_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "input.txt"
    text = "".join(f"{i:03}: ünïcode\n" for i in range(500))
    file.write_text(text)
    data = config(tmp_path, files=str(file), val_fraction=0.1)
    with caplog.at_level("INFO", "qtrain"):
        corpus = quiet(data, BPE)
    (train,), (val,) = texts(corpus, corpus.train), texts(corpus, corpus.val)
    assert train + val == text
    assert train.endswith("\n") and val.startswith("450: ")
    assert "the data is one text: its last 10.0% is the validation split" in caplog.text
    # the tokenizer is trained on what the model is trained on: the same as of two files, of which one is named for val
    (tmp_path / "head.txt").write_text(train)
    (tmp_path / "tail.txt").write_text(val)
    two = config(tmp_path, files=str(tmp_path / "head.txt"), val_files=str(tmp_path / "tail.txt"))
    assert quiet(two, BPE).data_hash == corpus.data_hash
    other_fraction = quiet(data.model_copy(update={"val_fraction": 0.2}), BPE)
    assert texts(other_fraction, other_fraction.val)[0].startswith("400: ")
    assert other_fraction.fingerprint != corpus.fingerprint
    caplog.clear()
    with caplog.at_level("INFO", "qtrain"):
        assert quiet(data, BPE).folder == corpus.folder  # opened, and said again
    assert "the data is one text" in caplog.text


@pytest.mark.parametrize(("text", "held_out"), [
    ("a\n" * 9 + "b\n", "a\nb\n"),
    ("0123456789" * 10, "0123456789" * 2),  # no line ends: in the middle of one
    ("0123456789" * 9 + "012345678\n", "0123456789012345678\n"),  # none begins in the first half of the held-out part
    ("é" * 80 + "日\n" + "本" * 18, "本" * 18),  # the next line, and never half a character
    ("a\n" * 40 + "b" * 20, "b" * 20),  # the place itself is the begin of a line
    ("xy", "y"),
    ("\n\n", None),  # both parts are equal
    ("x", None),
], ids=range(8))  # fmt: skip
def test_where_one_text_is_cut(tmp_path: Path, text: str, held_out: str | None) -> None:
    for name in ("only.txt", "copy.txt"):  # copies are cut alike
        (tmp_path / name).write_text(text)
    data = config(tmp_path)
    if held_out is None:
        with pytest.raises(UserError, match=r"leaves no document for train|one character, which cannot be cut"):
            quiet(data)
        return
    corpus = quiet(data)
    assert texts(corpus, corpus.val) == [held_out] * 2
    assert texts(corpus, corpus.train) == [text.removesuffix(held_out)] * 2


def test_without_text_there_is_nothing_to_hold_out(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match=r"jsonl-empty has no text; name a source that has some"):
        quiet(config(tmp_path, source="jsonl", files=str(tmp_path / "empty.jsonl")))
    (tmp_path / "only.txt").write_text("all there is")
    (tmp_path / "copy.txt").write_text("all there is")
    with pytest.raises(UserError, match=r"text-copy leaves no document for train"):
        quiet(config(tmp_path, val_files=str(tmp_path / "only.txt")))


def test_a_vocabulary_that_the_text_does_not_fill_is_told(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in ("made", "opened"):
        caplog.clear()
        corpus = quiet(config(files), TokenizerConfig(kind="bpe", vocab_size=4000))
        assert corpus.vocab_size < 4000
        assert f"the vocabulary has {corpus.vocab_size} tokens, not tokenizer.vocab_size=4000" in caplog.text
    caplog.clear()
    quiet(config(files), TokenizerConfig(kind="bpe", vocab_size=corpus.vocab_size))
    assert not caplog.text


def test_cache_folder_that_cannot_be_made(files: Path) -> None:
    with pytest.raises(UserError, match=r"data.cache_dir=.*00.txt/cache cannot be made"):
        quiet(config(files, cache_dir=str(files / "00.txt" / "cache")))


def test_a_full_disk_is_told_with_the_place(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as of an open file: without its name

    monkeypatch.setattr(qtrain.data.tokenise, "_build", no_room)
    with pytest.raises(OSError, match="No space left") as told:
        quiet(config(files))
    assert f"refused {files.parent}/cache/text-00-bytes-" in str(explain(told.value))
    assert [path for path in (files.parent / "cache").iterdir() if path.is_dir()] == []


def test_vocabulary_check(files: Path) -> None:
    corpus = quiet(config(files))
    check_vocab(corpus, 257)
    with pytest.raises(UserError, match=r"model.vocab_size=256 is smaller than the tokenizer's 257 ids"):
        check_vocab(corpus, 256)


STALLED = """
import sys, time
import qtrain.data.shards as shards
from qtrain.config import TokenizerConfig
from qtrain.data.prepare import prepare
from qtrain.data.sources.text import Text
close = shards.SplitWriter.close
def stall(self):
    split = close(self)
    print("written", flush=True)
    time.sleep(100)
    return split
shards.SplitWriter.close = stall
prepare(Text(**eval(sys.argv[1])), TokenizerConfig(kind="bytes"), progress=False)
"""


def test_killed_preparation_leaves_nothing_that_passes_for_whole(files: Path) -> None:
    data = config(files)
    command = [sys.executable, "-c", STALLED, repr(data.model_dump())]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "written\n"
        child.kill()
    cache = Path(data.cache_dir)
    (left,) = [path for path in cache.iterdir() if path.is_dir()]
    assert left.name.endswith(".building") and list(left.glob("train-*.bin"))
    corpus = quiet(data)
    verify(corpus.folder)
    assert [path for path in cache.iterdir() if path.is_dir()] == [corpus.folder]


def _prepare_at(start: float, data: DataSettings, results) -> None:
    time.sleep(max(0.0, start - time.time()))
    results.put(quiet(data).data_hash)


def test_processes_that_prepare_at_once_agree(files: Path) -> None:
    data = config(files)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    start = time.time() + 0.2
    children = [context.Process(target=_prepare_at, args=(start, data, results)) for _ in range(4)]
    for child in children:
        child.start()
    hashes = {results.get(timeout=600) for _ in children}
    for child in children:
        child.join()
    assert hashes == {quiet(data).data_hash}
    assert len([path for path in Path(data.cache_dir).iterdir() if path.is_dir()]) == 1


def test_content_is_read_once_and_again_when_it_was_written_to(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = quiet(config(files), BPE)
    read: list[str] = []
    check = qtrain.data.corpus._check_content
    monkeypatch.setattr("qtrain.data.corpus._check_content", lambda f, name, m: (read.append(name), check(f, name, m)))
    quiet(config(files), BPE)
    assert read == []
    damage_flip(corpus.folder)
    os.utime(corpus.folder / "val-00000.bin", (0, 0))
    with pytest.raises(UserError, match=r"val-00000.bin: content differs"):
        open_corpus(corpus.folder)
    assert read == ["val-00000.bin"]


def test_ids_that_the_tokenizer_has_not_are_told(files: Path) -> None:
    """Of checksums that fit: whoever made the shard made the manifest."""
    corpus = quiet(config(files))
    shard = corpus.folder / "train-00000.bin"
    tokens = np.fromfile(shard, "<u2")
    tokens[3] = 300
    shard.write_bytes(tokens.tobytes())
    manifest = json.loads((corpus.folder / "manifest.json").read_text())
    manifest["files"][shard.name]["sha256"] = hashlib.sha256(tokens.tobytes()).hexdigest()
    (corpus.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"train-00000.bin has the token 300, and the tokenizer 257 ids"):
        open_corpus(corpus.folder)


def tokenise_for_ever(pids: Path) -> None:
    def chunks() -> Iterator[Chunk]:
        while True:
            yield Chunk("train", ["text"], [b"0" * 16])

    for number, _ in enumerate(encode_all(chunks(), Text(ByteTokenizer()), workers=2)):
        if number == 3:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
            pids.with_suffix(".new").write_text(children)
            pids.with_suffix(".new").rename(pids)
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the children of a process")
def test_tokenising_processes_end_with_a_killed_parent(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    parent = multiprocessing.get_context("fork").Process(target=tokenise_for_ever, args=(pids,))
    parent.start()
    deadline = time.monotonic() + 60
    while not pids.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = [int(pid) for pid in pids.read_text().split()]
    assert len(workers) == 2
    os.kill(parent.pid or 0, signal.SIGKILL)
    parent.join()
    while any(Path(f"/proc/{pid}/exe").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [pid for pid in workers if Path(f"/proc/{pid}/exe").exists()]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []
