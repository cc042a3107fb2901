"""A thousand damaged data files: each is told, as a UserError, or is read to batches that a model can be trained on."""

import json
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import data_settings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_token_files import BYTES, documents, write_datatrove, write_megatron

from qtrain.data.batches import TokenBatches
from qtrain.data.corpus import open_corpus
from qtrain.data.prepare import prepare
from qtrain.errors import UserError

EXAMPLES, SECONDS = 1008, 30
ROWS = [{"text": f"{i * 7919 % 1000} ünïcode {'x' * (i % 13)}"} for i in range(40)]


def write_text(folder: Path) -> None:
    for number, row in enumerate(ROWS[:20]):
        (folder / f"{number:02}.txt").write_text(row["text"])


def write_jsonl(folder: Path) -> None:
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def write_array(folder: Path) -> None:
    """What is called JSON, and is no line for each document."""
    (folder / "x.jsonl").write_text(json.dumps(ROWS, indent=1))


def write_parquet(folder: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "x.parquet")


# Kind -> how good files of it are written, and the settings that read them.
KINDS: dict[str, tuple[Callable[[Path], object], dict[str, Any]]] = {
    "text": (write_text, {"source": "text", "files": "*.txt"}),
    "jsonl": (write_jsonl, {"source": "jsonl", "files": "*.jsonl"}),
    "json array": (write_array, {"source": "jsonl", "files": "*.jsonl"}),
    "parquet": (write_parquet, {"source": "parquet", "files": "*.parquet"}),
    "datatrove": (lambda at: write_datatrove(at / "x.ds", documents(40)), {"source": "datatrove", "files": "*.ds"}),
    "megatron": (lambda at: write_megatron(at / "x.bin", documents(40)), {"source": "megatron", "files": "*.bin"}),
    "prepared": (write_jsonl, {"source": "jsonl", "files": "*.jsonl"}),
}
ODD = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just([]) | st.just({})


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """One to four changes of a file's bytes."""
    steps = draw(st.lists(st.tuples(
        st.sampled_from(["cut", "flip", "overwrite", "insert", "delete", "repeat"]),
        st.floats(0, 1), st.binary(min_size=1, max_size=12), st.integers(0, 7),
    ), min_size=1, max_size=4))  # fmt: skip

    def damage(content: bytes) -> bytes:
        for kind, where, new, bit in steps:
            at = int(where * len(content))
            if kind == "cut":
                content = content[:at]
            elif kind == "flip" and at < len(content):
                content = content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]
            elif kind == "overwrite":
                content = content[:at] + new + content[at + len(new) :]
            elif kind == "insert":
                content = content[:at] + new + content[at:]
            elif kind == "delete":
                content = content[:at] + content[at + len(new) :]
            else:
                content = content[:at] + content[at : at + 40] * 3 + content[at + 40 :]
        return content

    return damage


def changed(draw: st.DataObject, tree: Any) -> Any:
    """JSON with one value replaced, wherever it is."""
    if isinstance(tree, dict) and tree and draw.draw(st.integers(0, 4)):
        key = draw.draw(st.sampled_from(sorted(tree)))
        return tree | {key: changed(draw, tree[key])}
    return draw.draw(ODD)


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def hangs(*_: object) -> None:
        raise TimeoutError(f"it hangs: no answer in {seconds} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read(folder: Path, options: dict[str, Any]) -> bool:
    """Whether the files are read to batches; not where a UserError says why."""
    data = data_settings(
        **(options | {"files": f"{folder}/{options['files']}"}), val_tokens=32, cache_dir=str(folder / "cache")
    )
    try:
        corpus = prepare(data, BYTES, progress=False)
        batches = TokenBatches(corpus, seq_len=8, seed=0, micro_batch_size=2, num_workers=0)
    except UserError as error:
        assert str(error).strip()
        return False
    tokens = [*batches.train(0, 8), *batches.validation[""].batches()]
    assert all(batch.min() >= 0 and batch.max() < corpus.vocab_size for batch in tokens)
    assert np.isfinite(corpus.bigram_cross_entropy) and corpus.parts[0].corpus.bytes_per_token > 0
    return True


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    for kind, (write, options) in KINDS.items():
        (folder / kind).mkdir()
        write(folder / kind)
        if kind == "prepared":
            assert read(folder / kind, options)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=EXAMPLES // len(KINDS), deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(draw=st.data())
def test_a_damaged_file_is_told_or_read(good: Path, kind: str, draw: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as place, at_most(SECONDS):
        folder = Path(place) / "data"
        shutil.copytree(good / kind, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
        if kind == "prepared":
            files = [path for path in files if path.parent.parent.name == "cache"]
        path = draw.draw(st.sampled_from(files))
        if path.suffix == ".json" and draw.draw(st.booleans()):
            path.write_text(json.dumps(changed(draw, json.loads(path.read_text()))))
        else:
            path.write_bytes(draw.draw(damages())(path.read_bytes()))
        if kind != "prepared":
            read(folder, KINDS[kind][1])
            return
        try:
            open_corpus(path.parent)
        except UserError as error:
            assert str(path.parent) in str(error)
        assert read(folder, KINDS[kind][1]), "what is damaged in the cache is made again"
