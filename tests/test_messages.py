"""What once ended in a traceback is a message: what was asked, what was found, what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pyarrow
import pytest
import torch
from conftest import data_settings
from pyarrow import parquet

import qtrain
import qtrain.train
from qtrain.config.identity import config_hash
from qtrain.config.settings import shown
from qtrain.errors import UserError, explain, first_line, visible
from qtrain.report.page import read_law
from qtrain.train import compose, main


@pytest.mark.parametrize(("override", "told"), [
    ("model=30", r"model=30: model is 30, not the name of a file; give one of configs/model: .*nano"),
    ("recipe=4", "recipe is 4, not the name of a file; give one of configs/recipe: .*quartet"),
    ("scheduler=null", "scheduler is None, not the name of a file; give one of configs/scheduler: cosine, wsd"),
    ("logger=null", "give one of configs/logger: none"),
    ("debug=null", "give one of configs/debug: .*none"),
    ("model=true", "model is True, not the name"),
    ("~optimizer=1", "a run needs its optimizer; give one of configs/optimizer: adamw"),
    ("~optimizer", "a run needs its optimizer; give one of configs/optimizer: adamw"),
    ("~optimizer.lr", "~optimizer.lr: set another value: optimizer.lr=...$"),
    ("b.txt", "'b.txt' is no setting: write key=value$"),
    ("quartet", r"'quartet' is no setting: write key=value, as \+experiment=quartet$"),
    ("data=jsonl", r"needs data.files, a path or a glob: data.files='corpus/\*.jsonl'$"),
    ("optimizer=[null]", "optimizer is .*None.*, not the name of a file"),
    ("seed=" + "9" * 5000, "cannot read 'seed=9"),
    ("data.files=" + "[" * 5000, "cannot read 'data.files="),
    ("optimizer.lr=inf", "optimizer.lr=inf: .*finite"),
    ("optimizer.lr=nan", "optimizer.lr=nan: "),
    ("model.n_layers=1_000_000_000", "model.n_layers=1000000000: .*1000"),  # a dry run of it did not end
    ("model.dim=1_000_000_000_000_000_000", "model.dim=1000000000000000000: .*1048576"),
    ("hydra=7", "Config group override must be a string"),
    ("~hydra=1", "Config group override deletion value must be a string"),
    ("=3", "cannot read '=3': there is no key"),
    ("@x=3", "cannot read '@x=3': there is no key"),
    ("scheduler.final_factor=-inf", "scheduler.final_factor=-inf: "),
    ("recipe.bits=1.5", r"recipe.bits=1.5: give a whole number; three levels \(ternary\) are recipe.format=int1.585"),
    ("recipe.format=mxfp8", "recipe.format='mxfp8': .* 'mxfp8_e4m3' or 'mxfp8_e5m2'"),
    ("data.files=/x/ünï*.txt", r"""; if the value is text, quote it: "data.files='/x/ünï\*.txt'"$"""),
    ("trainer.tokens =5", "write key=value, without spaces around the =$"),
    ("=", "cannot read '=': there is no key before the =; write key=value, without spaces around the =$"),
    ("seed=0,1", r"""several runs, .*: add -m; one list is seed=\[0,1\], one text "seed='0,1'"$"""),
    ("+experiment=bf16,quest", r"bf16,quest: several values are several runs, and one is asked for: add -m$"),
])  # fmt: skip
def test_overrides(override: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        compose([override])
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize("value", ["ünï*.txt", "a(1).txt", "it's.txt", "a=b", "{a}.txt", 'say "!".txt', "$HOME,x"])
def test_the_advice_to_quote_can_be_copied(value: str) -> None:
    with pytest.raises(UserError) as error:
        compose(["data=text", f"data.files={value}"])
    copied = str(error.value).rsplit(": " if "quote it" in str(error.value) else "one text ", 1)[1]
    argument = subprocess.run(["bash", "-c", f"printf %s {copied}"], capture_output=True, text=True, check=True).stdout
    assert compose(["data=text", argument]).data.model_dump()["files"] == (value,)


@pytest.mark.parametrize(("arguments", "told"), [
    (["-m"], "-m makes a run of each combination of the values that settings list, and none are listed: add some"),
    (["-m", "hydra/launcher=slurm", "recipe=bf16"], "submits jobs by sbatch, and there is none here"),
    (["data=text", "data.files=a", "b.txt"], "one text is \"data.files='a b.txt'\", and a list data.files=[a,b.txt]"),
])  # fmt: skip
def test_commands_that_start_nothing(
    arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="2"):
        main()
    assert told in capsys.readouterr().err


def test_what_a_scheduler_refuses_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from submitit.core.utils import FailedJobError

    def refused() -> None:
        raise FailedJobError("sbatch: error: Invalid partition\n")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(qtrain.train, "_hydra_main", refused)
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err == "error: the jobs were not submitted: sbatch: error: Invalid partition\n"


def test_one_name_is_a_list_of_one() -> None:
    assert compose(["recipe=quartet", "recipe.skip=down"]).recipe.skip == ("down",)
    alone, listed = (compose(["recipe=quartet", f"recipe.skip={skip}"]) for skip in ("down", "[down]"))
    assert config_hash(alone) == config_hash(listed)


def test_the_version_is_qtrains(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--version"])
    main()
    assert capsys.readouterr().out == f"qtrain {version('qtrain')}\n"
    assert qtrain.__version__ == version("qtrain")


def test_a_flag_that_hydra_refuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "--resolve"])
    with pytest.raises(SystemExit) as ended:
        qtrain.train.main()
    assert ended.value.code == 2 and "--resolve flag can only be used" in capsys.readouterr().err


def documents(source: str, *files: object, **more: object) -> list[str]:
    data = data_settings(source=source, files=tuple(map(str, files)), val_tokens=64, **more)
    return [document.text for document in data.open()[0].documents()]


@pytest.mark.parametrize("line", ["[" * 100_000, '{"text": ' + "9" * 5000 + "}", '{"text": ' + "[" * 100_000])
def test_a_line_that_no_parser_takes(tmp_path: Path, line: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": "good"}) + "\n" + line + "\n")
    with pytest.raises(UserError, match=rf"{path}:2: "):
        documents("jsonl", path)


def test_damaged_parquet_files_are_named(tmp_path: Path) -> None:
    """Each damage that is noticed at all names the file."""
    whole = tmp_path / "whole.parquet"
    parquet.write_table(pyarrow.table({"text": [f"document {i}" * 9 for i in range(300)]}), whole, row_group_size=50)
    content, refused = whole.read_bytes(), 0
    for number in range(120):
        path = tmp_path / "x.parquet"
        damaged = bytearray(content)
        if number % 3 == 2:
            damaged = damaged[: number * len(content) // 120]
        else:
            for place in range(number, len(content), 400 + number):
                damaged[place] ^= 1 << number % 8
        path.write_bytes(damaged or b"x")
        try:
            documents("parquet", path)
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 60


def test_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    for name, told in {
        "pipe": "is a pipe, a socket or a device", "dangling": "is a link to nothing", "folder": "is a folder",
        "loop": "is a link to nothing, or to itself|cannot be read: Too many levels", "x" * 5000: "File name too long",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=told):
            documents("text", tmp_path / name)
    with pytest.raises(UserError, match="is a pipe, a socket or a device"):
        documents("text", "/dev/null")


def test_folders_that_hold_themselves_are_read_once(tmp_path: Path) -> None:
    """Two such links never ended, one made each document 41-fold."""
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(tmp_path)
    for name in ("x.txt", "deep/er/y.txt", ".hidden/z.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "elsewhere").symlink_to(tmp_path / "deep")
    assert documents("text", f"{tmp_path}/**/*.txt") == ["deep/er/y.txt", "x.txt"]
    assert documents("text", f"{tmp_path}/**/er/**/*.txt") == ["deep/er/y.txt"]
    assert documents("text", f"{tmp_path}/deep/**") == ["deep/er/y.txt"]


@pytest.mark.parametrize(
    "values", [{"constants": "text"}, {"points": ["text"]}, {"efficiencies": {"a": 1}}, {"law": 3}]
)
def test_a_law_of_other_kinds(tmp_path: Path, values: dict) -> None:
    law = {"law": "x", "baseline": "b", "constants": {}, "efficiencies": {}, "fit": {}, "points": [], "command": "c"}
    path = tmp_path / "law.json"
    path.write_text(json.dumps(law))
    assert read_law(path) == law
    path.write_text(json.dumps(law | values))
    with pytest.raises(UserError, match=r"law\.json has values of other kinds"):
        read_law(path)


def test_the_mark_of_an_encoding_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbftext")
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "line"}\n')
    assert documents("text", tmp_path / "x.txt") == ["text"]
    assert documents("jsonl", tmp_path / "x.jsonl") == ["line"]


def test_errors_of_the_file_system_say_what_happened() -> None:
    full = str(explain(OSError(28, "No space left on device", "/x/summary.json")))
    assert "/x/summary.json: No space left on device; free space there" in full
    assert "run_root" not in str(explain(FileNotFoundError(2, "No such file or directory", "corpus.txt")))


def test_what_a_file_says_does_not_command_the_terminal() -> None:
    text = "\x1b[31mred\x07\u202e\ttab\nline"
    assert visible(text) == "\\x1b[31mred\\x07\\u202e\ttab\nline"
    assert "\x1b" not in str(UserError(text)) and "\x1b" not in first_line(ValueError(text))


def test_a_value_in_a_message_is_short() -> None:
    bomb: object = ["x"] * 9
    for _ in range(9):
        bomb = [bomb] * 9
    assert len(shown(bomb)) < 2000 and len(shown("x" * 10**6)) < 300
    assert "int" in shown(int("9" * 4000) ** 2)


def test_fake_quantize_tells_users_what_does_not_fit() -> None:
    with pytest.raises(UserError, match="112"):
        qtrain.fake_quantize(torch.ones(2, 112), "int4", rotation="hadamard")
    with pytest.raises(UserError, match="unknown backend 'nope'"):
        qtrain.fake_quantize(torch.ones(2, 64), "int4", backend="nope")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="takes a dense tensor"):
        qtrain.fake_quantize(torch.eye(32).to_sparse(), "int4")
