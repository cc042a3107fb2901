"""Sources: which documents, in which order, and what is said of input that is not what it should be."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import data_settings

from qtrain.data.base import DataSettings
from qtrain.errors import UserError


def config(**changes: object) -> DataSettings:
    return data_settings(**({"source": "text", "val_tokens": 100} | changes))


def texts(data: DataSettings) -> list[str]:
    return [document.text for document in data.open()[0].documents()]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    if path.suffix == ".jsonl":
        return write(path, "".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_stdlib_is_python_code_in_sorted_order() -> None:
    source, val = config(source="stdlib").open()
    documents = list(source.documents())
    names = [document.name for document in documents]
    assert val is None
    assert names == sorted(names)
    assert {"json/decoder.py", "textwrap.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "idlelib", "site-packages"}
    assert not any(name.startswith(("/", "_sysconfigdata")) for name in names)
    text = next(document.text for document in documents if document.name == "textwrap.py")
    assert "def dedent(text):" in text
    assert 5e6 < sum(len(document.text) for document in documents) < 50e6


def test_python_env_names_files_by_package() -> None:
    source, _ = config(source="python_env", packages=("rich", "Einops", "rich")).open()
    names = [name for name, *_ in source.identity]
    assert names == sorted(set(names))
    assert "einops/einops/einops.py" in names
    assert {name.split("/")[0] for name in names} == {"einops", "rich"} and not any("/../" in name for name in names)
    with pytest.raises(UserError, match=r"not installed: no-such; install them, or leave them out of data\.packages"):
        config(source="python_env", packages=("einops", "no-such")).open()


def test_globs_are_sorted_files_named_once_and_home_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("b", "a", "sub/c"):
        write(tmp_path / f"{name}.txt", name)
    assert texts(config(files=("~/*.txt",))) == ["a", "b"]
    assert texts(config(files=("~/**/*.txt",))) == ["a", "b", "sub/c"]
    assert texts(config(files=("~/b.txt", "~/*.txt"))) == ["b", "a"]
    write(tmp_path / "odd[1].txt", "odd")
    assert texts(config(files=("~/odd[1].txt",))) == ["odd"]
    write(tmp_path / "a [b]" / "sub" / "here.txt", "here")
    monkeypatch.chdir(tmp_path / "a [b]")
    assert texts(config(files=("sub/*.txt",))) == texts(config(files=("**/*.txt",))) == ["here"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_are_documents(tmp_path: Path, kind: str) -> None:
    rows = [{"body": "one\nline"}, {"body": ""}, {"body": "zwei ☕"}]
    file = write_rows(tmp_path / f"x.{kind}", rows)
    assert texts(config(source=kind, files=str(file), text_field="body")) == ["one\nline", "zwei ☕"]


@pytest.mark.parametrize("streaming", [False, True])
def test_local_dataset_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write_rows(folder / "train.jsonl", [{"text": "a"}, {"text": "b"}])
    write_rows(folder / "validation.jsonl", [{"text": "c"}])
    data = config(source="huggingface", path=str(folder), val_split="validation", streaming=streaming)
    train, val = data.open()
    assert val is not None
    assert [document.text for document in train.documents()] == ["a", "b"]
    assert [document.text for document in val.documents()] == ["c"]
    with pytest.raises(UserError, match=r"split dev, could not be read"):
        texts(config(source="huggingface", path=str(folder), split="dev", streaming=streaming))
    with pytest.raises(UserError, match=r"row 0: no column 'body'; it has text; set data.text_field"):
        texts(config(source="huggingface", path=str(folder), text_field="body", streaming=streaming))


def test_unreachable_dataset_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"dataset nobody/nothing \(en\), split train, could not be read(.|\n)*HF_HOME"):
        texts(config(source="huggingface", path="nobody/nothing", subset="en", streaming=True))


def test_identity_notices_a_changed_file_but_not_another_place(tmp_path: Path) -> None:
    def identity(folder: str) -> object:
        return config(files=(str(tmp_path / folder / "*.txt"),)).open()[0].identity

    for folder in ("here", "there"):
        for name in ("a", "b"):
            write(tmp_path / folder / f"{name}.txt", name)
    stamps = [(tmp_path / "here" / f"{name}.txt").stat().st_mtime_ns for name in ("a", "b")]
    for name, stamp in zip(("a", "b"), stamps, strict=True):
        set_time(tmp_path / "there" / f"{name}.txt", stamp)
    before = identity("here")
    assert identity("there") == before
    set_time(tmp_path / "here" / "a.txt", stamps[0] + 1)
    assert identity("here") != before


def set_time(path: Path, stamp: int) -> None:
    import os

    os.utime(path, ns=(stamp, stamp))


def bad(kind: str, content: str | bytes, told: str, **changes: object) -> object:
    return pytest.param(kind, lambda folder: write(folder / f"bad.{kind}", content), told, changes)


@pytest.mark.parametrize(
    ("kind", "make", "told", "changes"),
    [
        bad("text", "", r"bad.text \(of data.files\) is empty"),
        bad("text", b"abc\0def", r"bad.text looks binary \(a zero byte at offset 3\)"),
        bad("text", b"caf\xe9", r"bad.text is not UTF-8 text \(byte 0xe9 at offset 3\); convert it"),
        bad("jsonl", '{"text": "a"}\n{"text": \n', r"bad.jsonl:2: not valid JSON \(.* at column"),
        bad("jsonl", '{"text": "a"}\n[1]\n', r"bad.jsonl:2: expected an object with a field 'text', found list"),
        bad("jsonl", '\n{"b": 1, "a": 2}\n', r"bad.jsonl:2: no field 'text'; it has a, b; set data.text_field"),
        bad("jsonl", '{"text": "a"}\n{"text": null}\n', r"bad.jsonl:2: field 'text' is null; give the line a text, or"),
        bad("jsonl", '{"text": 5}\n', r"bad.jsonl:1: field 'text' is not a string \(found int\)"),
        bad("jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"bad.jsonl:2 is not UTF-8 text \(byte 0xff at offset 24\)"),
        bad("jsonl", '{"text": "\\ud800"}\n', r"bad.jsonl:1: field 'text' holds half a surrogate pair at character 0"),
        bad("parquet", "PAR1 not really", r"bad.parquet is not a Parquet file"),
    ],
)
def test_bad_files_are_told_by_place(
    tmp_path: Path, kind: str, make: Callable[[Path], Path], told: str, changes: dict[str, object]
) -> None:
    file = make(tmp_path)
    with pytest.raises(UserError, match=told):
        texts(config(source=kind, files=str(file), **changes))


def test_parquet_columns_are_told(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "x.parquet", [{"body": "a", "year": 3}])
    with pytest.raises(UserError, match=r"x.parquet: no column 'text'; it has body, year; set data.text_field"):
        texts(config(source="parquet", files=str(file)))
    with pytest.raises(UserError, match=r"x.parquet, row 0: column 'year' is not text \(found int\)"):
        texts(config(source="parquet", files=str(file), text_field="year"))


def test_files_that_are_not_there_are_told_with_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "corpus" / "train.txt", "a")
    with pytest.raises(UserError, match=r"data.files=.*trian.txt matches no file; did you mean .*corpus/train.txt\?"):
        texts(config(files=str(tmp_path / "corpus" / "trian.txt")))
    with pytest.raises(UserError, match=r"matches no file; did you mean .*/corpus\?"):
        texts(config(files=str(tmp_path / "corpse" / "deep" / "train.txt")))
    with pytest.raises(UserError, match=r"data.val_files=.*\*\.md matches no file; .*corpus holds train.txt"):
        config(files=str(tmp_path / "corpus/*.txt"), val_files=str(tmp_path / "corpus/*.md")).open()
    with pytest.raises(UserError, match=r"corpus is a folder; name its files, for example data.files='.*corpus/\*'"):
        texts(config(files=str(tmp_path / "corpus")))
