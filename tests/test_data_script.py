"""`qtrain data` prints what it made, verifies on request, and explains a mistake without a traceback."""

import json
import sys
from pathlib import Path

import pytest

from qtrain.cli import start


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch):
    def call(arguments: list[str]) -> int:
        monkeypatch.setattr(sys, "argv", ["qtrain data", *arguments])
        return start("data")

    return call


def test_prepares_shows_and_verifies(
    main, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(50)))
    arguments = ["data=jsonl", f"data.files={tmp_path}/x.jsonl", f"data.cache_dir={tmp_path}/cache"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    (folder,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert f"{manifest['splits']['train']['n_tokens']:,} tokens" in shown
    assert manifest["data_hash"][:16] in shown and str(folder) in shown
    assert main([*arguments, "verify=true"]) == 0
    assert "checksums verified" in capsys.readouterr().out

    further = ["+data@validation.again=jsonl", f"validation.again.files={tmp_path}/x.jsonl"]
    assert main([*arguments, *further]) == 0
    assert "\nvalidation.again:\nval  " in capsys.readouterr().out

    shard = folder / "val-00000.bin"
    whole = shard.read_bytes()
    shard.write_bytes(bytes(shard.stat().st_size))
    assert main([*arguments, "verify=true"]) == 0
    assert "val-00000.bin: content differs" in caplog.text, "told, and prepared again"
    assert shard.read_bytes() == whole


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["data=jsonl", "data.files=/nowhere/x.jsonl"], "matches no file"),
        (["data=jsonll"], "jsonl"),
        (["data.val_frac=0.1"], "val_fraction"),
        (["tokenizer=huggingface"], "tokenizer.path"),
        (["verify=True"], "verify=True: give verify=true"),
    ],
)
def test_mistakes_are_explained(main, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error


def test_help_names_the_groups(main, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "c4" in shown and "bpe" in shown and "verify=true" in shown
