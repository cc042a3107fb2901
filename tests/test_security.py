"""Tries to break each promise of SECURITY.md."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import data_settings

import qtrain
from qtrain.config import Config, parse_saved
from qtrain.config.settings import parse
from qtrain.data.corpus import open_corpus
from qtrain.data.prepare import prepare
from qtrain.errors import UserError
from qtrain.runs.directory import RunDirectory
from qtrain.runs.files import read_json, read_yaml
from qtrain.runs.table import read_csv, read_settings
from qtrain.train import compose
from qtrain.training.build import build_model
from qtrain.training.checkpoint import save, tensors_of
from qtrain_kernels import kernel_cache

ROOT = Path(__file__).parents[1]
PACKAGES = [*(ROOT / "qtrain").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]


def test_each_promise_is_numbered_here() -> None:
    promises = re.findall(r"^(\d)\. \*\*", (ROOT / "SECURITY.md").read_text(), re.MULTILINE)
    assert promises == list("12345678")


# ------------------------------------------------------------------------------------------------- 1: no code

UNPICKLE = ("pickle", "marshal", "shelve", "dill", "cloudpickle")
PAYLOADS = [
    "!!python/object/apply:os.system ['touch {}']",
    "!!python/object/new:os.system [touch {}]",
    "name: !!python/name:os.system\nx: 1",
    "!!python/module:antigravity",
]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_settings_run_no_code(tmp_path: Path, payload: str) -> None:
    pwned = tmp_path / "pwned"
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(payload.format(pwned))
    for read in (lambda: RunDirectory(run).read_config(), lambda: read_settings(run)):
        with pytest.raises(UserError, match=r"config\.yaml"):
            read()
    assert not pwned.exists()


def test_a_target_is_a_key_like_any_other(tmp_path: Path) -> None:
    tree = compose().model_dump(mode="json") | {"_target_": "os.system"}
    with pytest.raises(UserError, match="unknown key '_target_'"):
        parse_saved(tree)


def test_nothing_unpickles_or_evaluates() -> None:
    """Checkpoints are safetensors and JSON; what is left of torch.load takes tensors and plain values alone."""
    found = []
    for path in PACKAGES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None)]
                found += [
                    f"{path}:{node.lineno}: {name}" for name in names if name in ("pickle", "marshal", "shelve", "dill")
                ]
            if not isinstance(node, ast.Call):
                continue
            call = ast.unparse(node.func)
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            if call in ("eval", "exec", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "joblib.load"):
                found.append(f"{path}:{node.lineno}: {call}")
            if call == "torch.load" and options.get("weights_only") != "True":
                found.append(f"{path}:{node.lineno}: torch.load without weights_only=True")
            if call in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False":
                found.append(f"{path}:{node.lineno}: {call} with pickles")
            if options.get("shell", "False") != "False" or "trust_remote_code" in options:
                found.append(f"{path}:{node.lineno}: {call} with shell or trust_remote_code")
    assert found == []


# ------------------------------------------------------------------------------------------------- 2: kernels


def test_a_planted_kernel_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who knows the name of a library (it follows from public source) makes the folder first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    planted = tmp_path / "qtrain" / "kernels"
    planted.mkdir(parents=True, mode=0o777)
    planted.chmod(0o777)
    (planted / f"key-{'0' * 64}.so").write_bytes(b"code of somebody else")
    with pytest.raises(RuntimeError, match="others can write to it"):
        kernel_cache.find_or_make("key", lambda: b"own")
    planted.chmod(0o700)
    assert kernel_cache.find_or_make("key", lambda: b"own").read_bytes() == b"own"
    if os.geteuid() == 0:
        path = kernel_cache.keep("key", b"theirs")
        os.chown(path, 4001, 4001)
        assert kernel_cache.find("key") != path


# ------------------------------------------------------------------------------------------------- 3, 4: places


@pytest.fixture
def corpus(tmp_path: Path):
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(f"document {number} " * 40)
    base = compose()
    tree = {"source": "text", "files": [f"{tmp_path}/*.txt"], "val_tokens": 64, "cache_dir": f"{tmp_path}/cache"}
    return prepare(data_settings(**tree), base.tokenizer, progress=False)


def test_a_manifest_does_not_lead_out_of_its_folder(corpus, tmp_path: Path) -> None:
    path = corpus.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in ("../../0.txt", "/etc/passwd", ".x", "a/b"):
        path.write_text(json.dumps(manifest | {"files": manifest["files"] | {name: {"bytes": 1, "sha256": "0" * 64}}}))
        with pytest.raises(UserError, match=r"manifest\.json is damaged"):
            open_corpus(corpus.folder)


@pytest.mark.parametrize("name", ["../../x", "a/b", "x\ny", ".", "..", "-x", "", "x\x1b[31m", "x" * 3 + "/"])
def test_a_run_is_not_named_by_a_path(name: str) -> None:
    tree = compose().model_dump(mode="json") | {"name": name}
    with pytest.raises(UserError, match="name="):
        parse(Config, tree)


# ------------------------------------------------------------------------------------------------- 5: memory and time


def bomb(levels: int = 40) -> str:
    first = "a0: &a0 [x, x]\n"
    return first + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, levels))


@pytest.mark.parametrize("content", [bomb(), f"unknown: {'[' * 5000}{']' * 5000}", "a: &a {b: *a}", "[" * 200_000])
def test_a_small_file_of_settings_is_refused_at_once(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    started = time.process_time()
    for read in (lambda: RunDirectory(tmp_path).read_config(), lambda: read_settings(tmp_path)):
        with pytest.raises(UserError) as told:
            read()
        assert len(str(told.value)) < 2000
    assert time.process_time() - started < 20


def test_an_alias_that_stands_for_little_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: &a [1, 2]\nb: *a\n")
    assert read_yaml(tmp_path / "x.yaml") == {"a": [1, 2], "b": [1, 2]}


def test_deep_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"a":' * 100_000)
    with pytest.raises(UserError, match=r"summary\.json"):
        read_json(tmp_path / "summary.json")


def test_settings_that_ask_for_more_than_the_checkpoint_holds_take_no_memory(tmp_path: Path) -> None:
    """4 TB for each matrix, of a checkpoint of 500 KB."""
    config = compose(["model=micro", "model.dim=64", "model.ffn_dim=64", "model.n_layers=1", "recipe=bf16"])
    save(tmp_path / "checkpoints", 1, tensors_of(build_model(config, 257)), {"vocab_size": 257})
    tree = config.model_dump(mode="json")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    assert qtrain.load_run(tmp_path) is not None
    tree["model"] |= {"dim": 1 << 20, "ffn_dim": 1 << 20}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=r"step-00000001 holds another state: model\.embed\.weight is .*257, 64"):
        qtrain.load_run(tmp_path)
    for values, found in (({"vocab_size": "y"}, "'y'"), ({}, "None"), ({"vocab_size": -1}, "-1")):
        shutil.rmtree(tmp_path / "checkpoints")
        save(tmp_path / "checkpoints", 1, tensors_of(build_model(config, 257)), values)
        with pytest.raises(UserError, match=f"step-00000001 is no checkpoint of a run: its vocab_size is {found}"):
            qtrain.load_run(tmp_path)


# ------------------------------------------------------------------------------------------------- 6: the terminal


def test_messages_hold_no_escape_sequences(tmp_path: Path) -> None:
    escape = "\x1b]0;owned\x07\x1b[2J"
    (tmp_path / "results.csv").write_text(f"{escape},b\n1,2\n")
    tree = compose().model_dump(mode="json")
    attempts = [
        lambda: compose([f"model.{escape}=1"]),
        lambda: compose([f"recipe={escape}"]),
        lambda: parse(Config, tree | {"name": escape}),
        lambda: parse(Config, tree | {escape: 1}),
        lambda: read_csv(tmp_path / "results.csv"),
        lambda: read_csv(tmp_path / f"{escape}.csv"),
    ]
    for attempt in attempts:
        with pytest.raises(UserError) as told:
            attempt()
        assert "\x1b" not in str(told.value) and "\x07" not in str(told.value)


# ------------------------------------------------------------------------------------------------- 7, 8


def test_a_report_loads_nothing() -> None:
    page = (ROOT / "qtrain" / "report" / "page.html").read_text()
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)=[\"']?https?:", page)


def test_file_names_reach_no_shell(tmp_path: Path) -> None:
    """What runs other programs gets lists of arguments (see also `test_nothing_unpickles_or_evaluates`)."""
    name = "$(touch pwned).txt"
    for number in range(3):
        (tmp_path / f"{number}{name}").write_text(f"text {number} " * 30)
    base = compose()
    tree = {"source": "text", "files": [f"{tmp_path}/*.txt"], "val_tokens": 64, "cache_dir": f"{tmp_path}/cache"}
    prepare(data_settings(**tree), base.tokenizer, progress=False)
    assert not list(tmp_path.rglob("pwned")) and not Path("pwned").exists()
    assert shlex.split(shlex.join([sys.executable, name]))[1] == name
