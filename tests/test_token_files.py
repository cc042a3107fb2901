"""Files that hold tokens already, written here as their formats are published: what is read is what was written, and
whatever is wrong with a file is told before anything is trained."""

import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import data_settings

import qtrain.data.token_files
from qtrain.config import Config, TokenizerConfig
from qtrain.data.batches import TokenBatches
from qtrain.data.corpus import Corpus
from qtrain.data.prepare import fingerprint, prepare, prepare_validation
from qtrain.data.tokenizer import END, train_bpe
from qtrain.errors import UserError
from qtrain.train import compose
from qtrain.training.build import load_run
from qtrain.training.session import run

BYTES = TokenizerConfig(kind="bytes", vocab_size=None)
CODES = {"<u1": 1, "<i1": 2, "<i2": 3, "<i4": 4, "<i8": 5, "<u2": 8}  # of Megatron's DType


def write_datatrove(path: Path, documents: Sequence[Sequence[int]], dtype: str = "<u2") -> Path:
    letter = {"<u2": "H", "<u4": "I"}[dtype]
    tokens = [token for document in documents for token in document]
    path.write_bytes(struct.pack(f"<{len(tokens)}{letter}", *tokens))
    ends = [sum(len(document) for document in documents[: n + 1]) for n in range(len(documents))]
    path.with_name(f"{path.name}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    return path


def write_megatron(path: Path, documents: Sequence[Sequence[int]], dtype: str = "<u2", split: bool = False) -> Path:
    """split: each document in two sequences, as Megatron writes sentences."""
    sequences, borders = [], [0]
    for document in documents:
        sequences += [document[:1], document[1:]] if split and len(document) > 1 else [document]
        borders.append(len(sequences))
    item = np.dtype(dtype).itemsize
    lengths = [len(sequence) for sequence in sequences]
    offsets = [item * sum(lengths[:n]) for n in range(len(lengths))]
    path.write_bytes(np.array([token for sequence in sequences for token in sequence], dtype).tobytes())
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", CODES[dtype])
    index += struct.pack("<Q", len(sequences)) + struct.pack("<Q", len(borders))
    index += struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(offsets)}q", *offsets)
    path.with_suffix(".idx").write_bytes(index + struct.pack(f"<{len(borders)}q", *borders))
    return path


WRITERS: dict[str, Callable[..., Path]] = {"datatrove": write_datatrove, "megatron": write_megatron}
SUFFIX = {"datatrove": ".ds", "megatron": ".bin"}


def documents(n: int, first: int = 0) -> list[list[int]]:
    return [[*f"{i * 7919 % 1000} ünïcode {'x' * (i % 13)}".encode(), 256] for i in range(first, first + n)]


def corpus_of(folder: Path, kind: str, tokenizer: TokenizerConfig = BYTES, **more: object) -> Corpus:
    options = {"files": f"{folder}/*{SUFFIX[kind]}", "val_tokens": 64, "cache_dir": str(folder / "cache")} | more
    found = prepare(data_settings(source=kind, **options), tokenizer, progress=False)
    assert isinstance(found, Corpus)
    return found


LAYOUTS = [
    ("datatrove", "<u2", {}), ("datatrove", "<u4", {}), ("megatron", "<u2", {}), ("megatron", "<i4", {}),
    ("megatron", "<u2", {"split": True}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "dtype", "more"), LAYOUTS)
def test_what_is_read_is_what_was_written(tmp_path: Path, kind: str, dtype: str, more: dict[str, bool]) -> None:
    parts = [documents(30), documents(1, 30), documents(25, 31)]
    for number, part in enumerate(parts):
        WRITERS[kind](tmp_path / f"{number}{SUFFIX[kind]}", part, dtype, **more)
    corpus = corpus_of(tmp_path, kind, val_fraction=0.3)
    everything = [document for part in parts for document in part]
    stream = np.array([token for document in everything for token in document])
    train, val = corpus.train, corpus.val
    assert np.array_equal(np.concatenate([s.window(0, s.n_tokens) for s in (train, val)]), stream)
    ends = np.cumsum([len(document) for document in everything])
    assert train.n_tokens in ends and train.n_documents == np.flatnonzero(ends == train.n_tokens)[0] + 1
    assert train.n_documents + val.n_documents == len(everything)
    assert val.n_tokens / len(stream) == pytest.approx(0.3, abs=0.03)
    for start in range(0, train.n_tokens - 17, 31):  # across the files too
        assert np.array_equal(train.window(start, 17), stream[start : start + 17])
    text = b"".join(bytes(token for token in document if token < 256) for document in everything[train.n_documents :])
    assert corpus.bytes_per_token == pytest.approx(len(text) / val.n_tokens, rel=1e-3)


@pytest.mark.parametrize("kind", ["datatrove", "megatron"])
def test_the_border_is_the_end_of_a_document_wherever_it_is_wanted(tmp_path: Path, kind: str) -> None:
    write = WRITERS[kind]
    write(tmp_path / f"a{SUFFIX[kind]}", [[1, 256], [2, 2, 256]])
    write(tmp_path / f"b{SUFFIX[kind]}", [[3] * 9 + [256], [4, 256]])
    found = {corpus_of(tmp_path, kind, val_fraction=each / 100).train.n_tokens for each in range(1, 100)}
    assert found == {2, 5, 15}
    for path in tmp_path.glob("b*"):
        path.unlink()
    write(tmp_path / f"a{SUFFIX[kind]}", [[3] * 9 + [256]])
    with pytest.raises(UserError, match=r"has one document, and none to hold out; name token files in data\.val_files"):
        corpus_of(tmp_path, kind)


SMALL = [
    "model.dim=32", "model.ffn_dim=64", "model.n_layers=1", "model.seq_len=16", "trainer.batch_tokens=64",
    "trainer.micro_batch_size=4", "trainer.tokens=640", "trainer.precision=32-true", "trainer.device=cpu",
    "callbacks.progress_bar=false",
]  # fmt: skip


def test_a_run_on_token_files_is_the_run_on_their_text(tmp_path: Path) -> None:
    for name, part in (("train", documents(40)), ("val", documents(5, 40))):
        (tmp_path / name).mkdir()
        for number, document in enumerate(part):
            (tmp_path / name / f"{number:02}.txt").write_bytes(bytes(document[:-1]))
        write_datatrove(tmp_path / f"{name}.ds", part)
        write_megatron(tmp_path / f"{name}.bin", part, "<i4")

    def trained(source: str, train: str, val: str) -> dict[str, torch.Tensor]:
        files = [
            f"data.files={tmp_path}/{train}",
            f"data.val_files={tmp_path}/{val}",
            f"data.cache_dir={tmp_path}/cache",
        ]
        config: Config = compose(
            [*SMALL, f"data={source}", *files, "data.val_tokens=64", f"run_dir={tmp_path}/{source}"]
        )
        losses.append(run(config))
        assert run(config) == losses[-1], "it is finished, on the same data"
        return load_run(tmp_path / source).state_dict()

    losses: list[float | None] = []
    text, *others = (
        trained("text", "train/*.txt", "val/*.txt"),
        trained("datatrove", "train.ds", "val.ds"),
        trained("megatron", "train.bin", "val.bin"),
    )
    for weights in others:
        assert all(torch.equal(weights[name], text[name]) for name in text)
    assert len(set(losses)) == 1


def test_token_files_are_validated_on_and_mixed(tmp_path: Path) -> None:
    write_datatrove(tmp_path / "a.ds", documents(40))
    write_megatron(tmp_path / "b.bin", documents(20, 40))
    parts = [
        "+data@data.parts.a=datatrove", f"data.parts.a.files={tmp_path}/a.ds", "data.parts.a.val_tokens=32",
        "data.parts.a.val_fraction=0.2", "data.parts.b.val_fraction=0.2",
        "+data@data.parts.b=megatron", f"data.parts.b.files={tmp_path}/b.bin", "data.parts.b.val_tokens=32",
        "+data@validation.all=megatron", f"validation.all.files={tmp_path}/b.bin", "data.weights={a: 3, b: 1}",
    ]  # fmt: skip
    config = compose([*SMALL, "data=mixture", *parts, f"data.cache_dir={tmp_path}/cache"])
    corpus = prepare(config.data, config.tokenizer, progress=False)
    further = prepare_validation(config.validation, config.data, config.tokenizer, corpus, progress=False)
    assert further["all"].val.n_documents == 20 and further["all"].train.n_tokens == 0
    data = TokenBatches(corpus, seq_len=16, seed=0, micro_batch_size=4, num_workers=0, validation=further)
    assert list(data.validation) == ["a", "b", "all"]
    workers = TokenBatches(corpus, seq_len=16, seed=0, micro_batch_size=4, num_workers=2)
    pairs = zip(workers.train(0, 64), data.train(0, 64), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    workers.close()


def test_a_tokenizer_of_their_own(tmp_path: Path) -> None:
    tokenizer = train_bpe(["red green blue"], 257)
    tokenizer.save(tmp_path / "tokenizer.json")
    part = [[*tokenizer.encode(f"red green {i}").tolist(), tokenizer.eos_id] for i in range(20)]
    write_datatrove(tmp_path / "x.ds", part)
    config = TokenizerConfig(kind="huggingface", vocab_size=None, path=str(tmp_path / "tokenizer.json"), eos_token=END)
    corpus = corpus_of(tmp_path, "datatrove", config)
    assert corpus.vocab_size == tokenizer.vocab_size and corpus.tokenizer.hash == tokenizer.hash
    count = len("".join(f"red green {i}" for i in range(20 - corpus.val.n_documents, 20)))
    assert corpus.bytes_per_token == pytest.approx(count / corpus.val.n_tokens, rel=1e-3)
    with pytest.raises(
        UserError, match=r"document 0 ends with the token 0, and the tokenizer's end of a document is 256"
    ):
        corpus_of(tmp_path, "datatrove")
    with pytest.raises(
        UserError, match=r"has the tokens of a tokenizer that was there before: name it with tokenizer=hu"
    ):
        corpus_of(tmp_path, "datatrove", TokenizerConfig(kind="bpe", vocab_size=300))


def test_the_files_are_read_once_and_again_when_they_were_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        write_datatrove(tmp_path / f"{name}.ds", documents(30))
    read: list[str] = []
    check = qtrain.data.token_files._checked
    monkeypatch.setattr("qtrain.data.token_files._checked", lambda f, t: (read.append(f.path.name), check(f, t))[1])
    first = corpus_of(tmp_path, "datatrove")
    assert read == ["a.ds", "b.ds"]
    again = corpus_of(tmp_path, "datatrove")
    assert read == ["a.ds", "b.ds"] and again.data_hash == first.data_hash
    content = bytearray((tmp_path / "b.ds").read_bytes())
    content[20] ^= 1
    stamp = (tmp_path / "b.ds").stat().st_mtime_ns
    (tmp_path / "b.ds").write_bytes(content)
    set_time(tmp_path / "b.ds", stamp)
    flipped = corpus_of(tmp_path, "datatrove")
    assert flipped.data_hash != first.data_hash, "a run that was begun refuses to go on"
    assert read[2:] == ["a.ds", "b.ds"]
    flipped.verify()
    assert len(read) == 6
    (facts,) = (tmp_path / "cache").glob("*.json")
    facts.write_text("{")
    assert corpus_of(tmp_path, "datatrove").data_hash == flipped.data_hash


def set_time(path: Path, stamp: int) -> None:
    import os

    os.utime(path, ns=(stamp, stamp))


def test_the_hash_is_of_the_content_and_the_fingerprint_of_the_files(tmp_path: Path) -> None:
    hashes, prints = set(), set()
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        write_megatron(tmp_path / folder / "x.bin", documents(30))
        for name in ("x.bin", "x.idx"):
            set_time(tmp_path / folder / name, 10**18)
        hashes.add(corpus_of(tmp_path / folder, "megatron").data_hash)
        data = data_settings(source="megatron", files=f"{tmp_path}/{folder}/*.bin", val_tokens=9)
        prints.add(fingerprint(data, BYTES))
    assert len(hashes) == len(prints) == 1
    hashes.add(corpus_of(tmp_path / "here", "megatron", val_fraction=0.5).data_hash)
    write_megatron(tmp_path / "here" / "x.bin", documents(31))
    hashes.add(corpus_of(tmp_path / "here", "megatron").data_hash)
    assert len(hashes) == 3


def patched(path: Path, at: int, content: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[at : at + len(content)] = content
    path.write_bytes(raw)


def cut(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def test_damage_is_told_by_its_file(tmp_path: Path) -> None:
    """An index of 30 sequences: lengths from byte 34, offsets from 154, borders from 394."""
    cases: list[tuple[str, Callable[[Path], None], str]] = [
        ("megatron", lambda f: patched(f / "x.idx", 0, b"MMIDIDY"), r"x\.idx does not begin with b'MMIDIDX"),
        ("megatron", lambda f: patched(f / "x.idx", 9, b"\2"), r"x\.idx has version 2, and 1 is read"),
        ("megatron", lambda f: patched(f / "x.idx", 17, b"\6"), r"tokens have the type of code 6; whole numbers"),
        ("megatron", lambda f: cut(f / "x.idx", 8), r"x\.idx has \d+ bytes, and its header counts \d+; it is cut"),
        ("megatron", lambda f: (f / "x.idx").write_bytes(b"MMIDIDX\0\0\1"), r"x\.idx ends in its header; copy it anew"),
        ("megatron", lambda f: patched(f / "x.idx", 18, b"\xff" * 8), r"its header counts \d+; it is cut or damaged"),
        ("megatron", lambda f: (f / "x.idx").write_bytes((f / "x.idx").read_bytes() + bytes(30)), r"modes of images"),
        ("megatron", lambda f: cut(f / "x.bin", 2), r"x\.bin has \d+ bytes, and its index ends at \d+; one of them is"),
        ("megatron", lambda f: cut(f / "x.bin", 1), r"x\.bin and its index hold no whole sequence"),
        ("megatron", lambda f: patched(f / "x.idx", 34, b"\1"), r"sequences do not lie one after the other in x\.bin"),
        ("megatron", lambda f: patched(f / "x.idx", 154 + 8, b"\4"), r"sequences do not lie one after the other"),
        ("megatron", lambda f: patched(f / "x.idx", 394, b"\1"), r"its documents do not hold its 30 sequences"),
        ("megatron", lambda f: patched(f / "x.idx", 394 + 40, b"\xff\xff"), r"a document ends at a sequence that"),
        ("megatron", lambda f: patched(f / "x.idx", 394 + 40, b"\1"), r"its documents do not follow one another"),
        ("megatron", lambda f: (f / "x.idx").unlink(), r"x\.bin has no x\.idx beside it, which says where"),
        ("megatron", lambda f: patched(f / "x.bin", 4, b"\1\1"), r"x\.bin has the id 257 as token 2, and the tok"),
        ("datatrove", lambda f: patched(f / "x.ds", 4, b"\1\1"), r"x\.ds has the id 257 as token 2, and the tok"),
        ("datatrove", lambda f: cut(f / "x.ds", 2), r"x\.ds has \d+ bytes, and its index \d+ tokens, which"),
        ("datatrove", lambda f: cut(f / "x.ds.index", 3), r"x\.ds\.index has 237 bytes, no whole number of doc"),
        ("datatrove", lambda f: cut(f / "x.ds.index", 8), r"x\.ds has \d+ bytes, and its index \d+ tokens, which"),
        ("datatrove", lambda f: patched(f / "x.ds.index", 80, b"\0\0"), r"its documents do not follow one another"),
        ("datatrove", lambda f: patched(f / "x.ds.index", 80, b"\xff" * 8), r"x\.ds\.index is damaged"),
        ("datatrove", lambda f: patched(f / "x.ds.index", 0, b"\2"), r"document 0 ends with the token \d+, and"),
        ("datatrove", lambda f: (f / "x.ds.index").unlink(), r"x\.ds has no x\.ds\.index beside it"),
    ]  # fmt: skip
    for number, (kind, damage, told) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        WRITERS[kind](folder / f"x{SUFFIX[kind]}", documents(30))
        damage(folder)
        with pytest.raises(UserError, match=told):
            corpus_of(folder, kind)
    negative = write_megatron(tmp_path / "n.bin", documents(30), "<i4")
    patched(negative, 8, b"\xff\xff\xff\xff")
    with pytest.raises(UserError, match=r"n\.bin has the id -1 as token 2"):
        corpus_of(tmp_path, "megatron")
    (tmp_path / "y.npy").write_bytes(b"x")
    with pytest.raises(UserError, match=r"y\.npy is no \.bin; name the token files in data\.files"):
        corpus_of(tmp_path, "megatron", files=f"{tmp_path}/y.npy")
    with pytest.raises(UserError, match=r"x\.ds\.index is an index; name the token files"):
        corpus_of(tmp_path, "datatrove", files=f"{tmp_path}/{len(cases) - 2}/x.ds.index")
