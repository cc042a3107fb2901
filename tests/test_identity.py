"""What a run is known by: settings that matter, in one way of writing, with defaults that are frozen; and its text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from conftest import data_settings
from pydantic import Field

from qtrain.config import Config, TokenizerConfig, config_hash, differences, parse_saved
from qtrain.config.identity import INTRODUCED, NOT_IN_HASH, introduced
from qtrain.config.recipe import QuantSpec
from qtrain.config.settings import Strict, classes_of, is_mapping, parse
from qtrain.data.prepare import prepare, same_text
from qtrain.data.sources.parquet import Parquet
from qtrain.errors import UserError
from qtrain.models.families.llama import Llama
from qtrain.plan import make_plan
from qtrain.train import compose
from qtrain.training.trunk import trunk_key

PRECISION = "trainer.precision=bf16-mixed"


@pytest.fixture(scope="module")
def base() -> Config:
    return compose([PRECISION])


def changed(config: Config, **groups: Any) -> Config:
    """Settings with other values: changed(config, model={"norm_eps": 1e-2})."""
    tree = config.model_dump(mode="json")
    for group, values in groups.items():
        tree[group] = tree[group] | values if isinstance(values, dict) else values
    return parse(Config, tree)


def settings_of(kind: type[Strict], at: str = "") -> dict[type[Strict], set[str]]:
    """class -> its settings that have a default and are in the hash, of this class and those below it."""
    found: dict[type[Strict], set[str]] = {}
    for name, field in kind.model_fields.items():
        if f"{at}{name}" in NOT_IN_HASH:
            continue
        if not field.is_required():
            found.setdefault(kind, set()).add(name)
        for part in classes_of(kind, name):
            if part is not kind:
                below = "data." if is_mapping(kind, name) else f"{at}{name}."
                for each, names in settings_of(part, below).items():
                    found.setdefault(each, set()).update(names)
    return found


def defined_by(kind: type[Strict], name: str) -> type:
    return next(each for each in kind.__mro__ if name in vars(each).get("__annotations__", {}))


def test_every_setting_says_what_it_was_when_it_was_introduced() -> None:
    """Else every run would get a new name when a setting comes to a class that runs have already."""
    found = settings_of(Config)
    assert {QuantSpec, Llama, Parquet} <= set(found)
    missing = {
        f"{kind.__name__}.{name}"
        for kind, names in found.items()
        for name in names
        if name not in introduced(kind) and defined_by(kind, name).__name__ in INTRODUCED
    }
    assert missing == set(), "add them to qtrain/config/identity.py, INTRODUCED, with the value that runs had before"


def test_an_introduction_is_of_a_setting_that_exists() -> None:
    kinds = {base.__name__: base for kind in settings_of(Config) for base in kind.__mro__ if issubclass(base, Strict)}
    assert {name: set(values) - set(kinds[name].model_fields) for name, values in INTRODUCED.items()} == {
        name: set() for name in INTRODUCED
    }


@pytest.mark.parametrize(("group", "key", "default"), [("model", "norm_eps", 1e-2), ("optimizer", "beta2", 0.99)])
def test_a_default_that_changes_in_code_names_other_runs(
    base: Config, monkeypatch: pytest.MonkeyPatch, group: str, key: str, default: float
) -> None:
    """A row, a directory or a trunk of the old default must not be taken for one of the new."""
    tree = base.model_dump(mode="json")
    del tree[group][key]  # the files leave it to the default
    before = parse(Config, tree)
    kind = type(getattr(before, group))
    assert config_hash(before) == config_hash(base)
    trunks = [trunk_key(before, make_plan(before), "data")]
    field = kind.model_fields[key]
    monkeypatch.setattr(field, "default", default)
    kind.model_rebuild(force=True)
    Config.model_rebuild(force=True)
    try:
        after = parse(Config, tree)
        assert getattr(getattr(after, group), key) == default
        assert config_hash(after) != config_hash(before)
        assert trunk_key(after, make_plan(after), "data") not in trunks
        assert getattr(getattr(parse_saved(tree), group), key) != default, "a run from before goes on as it began"
    finally:
        monkeypatch.undo()
        kind.model_rebuild(force=True)
        Config.model_rebuild(force=True)


def test_a_run_of_the_version_before_is_read(base: Config) -> None:
    """Its members of a family had the settings of the others, which did nothing; its models had no family."""
    tree = base.model_dump(mode="json")
    tree["scheduler"]["decay_fraction"] = 0.2
    tree["data"] |= {"packages": [], "files": ["x.txt"], "path": "allenai/c4", "subset": "en", "text_field": "body"}
    del tree["model"]["family"]
    assert config_hash(parse_saved(tree)) == config_hash(base)
    with pytest.raises(UserError, match=r"unknown key 'data\.no_such'"):
        parse_saved(tree | {"data": tree["data"] | {"no_such": 1}})


def test_a_class_without_an_introduction_has_all_its_settings_in_the_hash(base: Config) -> None:
    """So that an optimiser in a file of its own is safe without an entry, whatever becomes of its defaults."""

    class Relative(Llama):
        window: int = Field(8, gt=0)

    other = base.model_copy(update={"model": Relative(**base.model.model_dump())})
    assert config_hash(other) != config_hash(base)
    assert introduced(Relative) == introduced(Llama)


SAME = [
    ({"scheduler": {"warmup_steps": 7}}, {"scheduler": {"warmup_steps": 7, "warmup_fraction": 0.3}}),
    ({}, {"tokenizer": {"path": "somewhere", "vocab_size": 4096}}),  # bytes
    ({"trainer": {"tokens": 1_048_576}}, {"trainer": {"tokens": 1_048_577}}),  # the same steps
    ({}, {"callbacks": {"val_every_steps": 7}}),
]
OTHER = [
    ({"scheduler": {"name": "wsd"}}, {"scheduler": {"name": "wsd", "decay_fraction": 0.5}}),
    ({}, {"optimizer": {"eps": 1e-6}}),
    ({}, {"scheduler": {"warmup_fraction": 0.3}}),
    ({"trainer": {"tokens": 1_048_576}}, {"trainer": {"tokens": 1_048_576 + 4096}}),
    ({"data": {"source": "text", "files": ["a.txt"]}}, {"data": {"source": "text", "files": ["b.txt"]}}),
    ({"trainer": {"early_stop": 2}}, {"trainer": {"early_stop": 2}, "callbacks": {"val_every_steps": 7}}),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_what_cannot_matter_changes_no_name(base: Config, one: dict, other: dict) -> None:
    assert config_hash(changed(base, **one)) == config_hash(changed(base, **other))
    assert differences(changed(base, **one), changed(base, **other)) == []


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_what_matters_changes_the_name(base: Config, one: dict, other: dict) -> None:
    assert config_hash(changed(base, **one)) != config_hash(changed(base, **other))
    (said,) = differences(changed(base, **one), changed(base, **other))
    assert " was " in said and ", now " in said


def test_the_budget_of_a_streamed_source_counts_to_the_token(base: Config) -> None:
    """It says how much text is prepared."""
    data = {"source": "huggingface", "path": "x/y", "streaming": True}
    one, other = (changed(base, data=data, trainer={"tokens": n}) for n in (1_048_576, 1_048_577))
    assert config_hash(one) != config_hash(other)


def test_a_file_has_one_name_however_it_is_written(
    base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places = ["corpus/*.txt", "./corpus/*.txt", f"{tmp_path}/corpus/*.txt", "corpus/../corpus/*.txt"]
    assert len({config_hash(changed(base, data={"source": "text", "files": [place]})) for place in places}) == 1


# ------------------------------------------------------------------------------------------------- the text


@pytest.fixture
def text(tmp_path: Path) -> dict[str, Any]:
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(f"document {number} " * 50)
    tree = {"source": "text", "files": [f"{tmp_path}/*.txt"], "val_tokens": 64, "cache_dir": f"{tmp_path}/cache"}
    return {"data": data_settings(**tree), "tokenizer": TokenizerConfig(kind="bytes")}


def test_a_rewritten_corpus_is_another_text(text: dict[str, Any], tmp_path: Path) -> None:
    corpus = prepare(**text, progress=False)
    ended = {"data_fingerprint": corpus.fingerprint, "data_hash": corpus.data_hash}
    assert same_text(**text, recorded=ended, may_prepare=False) is True
    (tmp_path / "3.txt").write_text("document 3 " * 49 + "DOCUMENT 3 ")  # of the same size
    assert same_text(**text, recorded=ended, may_prepare=False) is None, "not prepared, so nobody knows"
    assert same_text(**text, recorded=ended) is False
    assert same_text(**text, recorded=ended, may_prepare=False) is False


def test_a_text_that_was_only_touched_or_lies_elsewhere_is_the_same(text: dict[str, Any], tmp_path: Path) -> None:
    """A row from another machine has another fingerprint: the content decides."""
    corpus = prepare(**text, progress=False)
    ended = {"data_fingerprint": corpus.fingerprint, "data_hash": corpus.data_hash}
    os.utime(tmp_path / "3.txt", (0, 0))
    assert same_text(**text, recorded=ended) is True
    assert prepare(**text, progress=False).fingerprint != corpus.fingerprint
    assert same_text(**text, recorded={"data_hash": corpus.data_hash}) is True, "of a version without fingerprints"
