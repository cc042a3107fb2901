"""A preparation that was stopped goes on where it was, to the same files, without reading or tokenising anew."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import data_settings

import qtrain.data.tokenise
from qtrain.config import TokenizerConfig
from qtrain.data import shards
from qtrain.data.corpus import Corpus, verify
from qtrain.data.prepare import prepare
from qtrain.errors import UserError

N = 160
BYTES = TokenizerConfig(kind="bytes", vocab_size=None)
BPE = TokenizerConfig(kind="bpe", vocab_size=300)
SOURCES = ["stream", "stream with a validation split", "whole dataset", "jsonl", "streamed jsonl", "text"]


@pytest.fixture
def small_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qtrain.data.tokenise, "MARK_CHARACTERS", 120)
    monkeypatch.setattr(qtrain.data.tokenise, "CHUNK_CHARACTERS", 50)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 700)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "set").mkdir()
    rows = [{"text": f"{i * 7919 % 1000} " * (1 + i % 5)} if i % 11 else {"text": ""} for i in range(N)]
    for number in range(4):  # several files, of which a stream opens one after the other
        part = rows[number * N // 4 : (number + 1) * N // 4]
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / "set" / f"train-{number}.jsonl").write_text(text)
        for line, row in enumerate(part):
            (folder / f"{number}-{line:02}.txt").write_text(row["text"] or "none")
    (folder / "set" / "validation.jsonl").write_text(json.dumps(rows[5]) + "\n" + json.dumps({"text": "other"}) + "\n")
    return folder


def settings(folder: Path, source: str, cache: Path) -> Any:
    if "stream" in source or "dataset" in source:
        more: dict[str, Any] = {
            "source": "huggingface",
            "path": f"{folder}/set",
            "streaming": source != "whole dataset",
        }
        if "validation" in source:
            more["val_split"] = "validation"
    if "jsonl" in source:
        more = {"source": "jsonl", "files": f"{folder}/set/train-*.jsonl", "streaming": "streamed" in source}
    if source == "text":
        more = {"source": "text", "files": f"{folder}/*.txt"}
    if more.get("streaming"):
        more["max_tokens"] = 2600
    return data_settings(**more, val_tokens=150, val_fraction=0.1, cache_dir=str(cache), prepare_workers=1)


def prepared(data: Any, tokenizer: TokenizerConfig) -> Corpus:
    found = prepare(data, tokenizer, progress=False)
    assert isinstance(found, Corpus)
    return found


def content(corpus: Corpus) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in corpus.folder.iterdir() if path.name != "verified.json"}


def stopping(monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException) -> list[int]:
    """The preparation ends with the error after so many chunks. Returns a list that counts what is tokenised."""
    counted = [0]
    encode_all = qtrain.data.tokenise.encode_all

    def stopped(*arguments: Any) -> Iterator[Any]:
        for encoded in encode_all(*arguments):
            counted[0] += len(getattr(encoded, "lengths", ()))
            if counted[0] > after:
                raise error
            yield encoded

    monkeypatch.setattr(qtrain.data.tokenise, "encode_all", stopped)
    return counted


@pytest.mark.usefixtures("small_marks")
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_it_ends_as_if_it_had_not_been_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    source: str, tokenizer: TokenizerConfig,
) -> None:  # fmt: skip
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    whole = prepared(settings(folder, source, tmp_path / "whole"), tokenizer)
    data = settings(folder, source, tmp_path / "stopped")
    for after in (30, 25, 1, 10**9):
        with monkeypatch.context() as patch:
            counted = stopping(patch, after, KeyboardInterrupt())
            if after == 10**9:
                corpus = prepared(data, tokenizer)
            else:
                with pytest.raises(KeyboardInterrupt):
                    prepare(data, tokenizer, progress=False)
    assert "the same command goes on from there" in caplog.text
    assert counted[0] < 0.8 * (whole.train.n_documents + whole.val.n_documents), "it began at the last mark"
    assert content(corpus) == content(whole)
    verify(corpus.folder)
    assert [path.name for path in (tmp_path / "stopped").iterdir() if path.is_dir()] == [corpus.folder.name]


@pytest.mark.usefixtures("small_marks")
def test_a_stream_opens_no_file_that_it_is_done_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = settings(folder, "streamed jsonl", tmp_path / "cache")
    read: list[str] = []
    reader = type(data).read

    def noted(self: Any, path: Path) -> Any:
        read.append(path.name)
        return reader(self, path)

    monkeypatch.setattr(type(data), "read", noted)
    with monkeypatch.context() as patch, pytest.raises(UserError):
        stopping(patch, 100, UserError("the network is gone"))
        prepare(data, BYTES, progress=False)
    assert read == [f"train-{number}.jsonl" for number in range(3)]
    read.clear()
    prepare(data, BYTES, progress=False)
    assert read == ["train-2.jsonl", "train-3.jsonl"]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda building: (building / "train-documents.bin").write_bytes(b""),
    "gone": lambda building: (building / "train-00000.bin").unlink(),
    "other bits": lambda building: (building / "val-documents.bin").write_bytes(
        bytes(len((building / "val-documents.bin").read_bytes()))
    ),
    "no json": lambda building: (building / "progress.json").write_text("{"),
    "other versions": lambda building: (building / "progress.json").write_text('{"versions": {}}'),
}


@pytest.mark.usefixtures("small_marks")
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_as_it_was_left_is_made_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    whole = prepared(settings(folder, "jsonl", tmp_path / "whole"), BYTES)
    data = settings(folder, "jsonl", tmp_path / "stopped")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopping(patch, 100, KeyboardInterrupt())
        prepare(data, BYTES, progress=False)
    (building,) = (tmp_path / "stopped").glob(".*.building")
    DAMAGES[damage](building)
    with caplog.at_level(logging.WARNING):
        corpus = prepared(data, BYTES)
    assert "the preparation begins anew" in caplog.text
    assert content(corpus) == content(whole)
