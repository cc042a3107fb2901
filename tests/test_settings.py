"""Families of settings: what is one of several classes, each in a module of its own."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import create_model

from qtrain.config.settings import Strict, family, fields_at, parse
from qtrain.errors import UserError

MODULE = """
from typing import Literal
from qtrain.config.settings import Member

class {name}(Member):
    name: Literal["{name}"]
    shared: int = 1
    {key}: float = 2.0
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "shapes"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "shapes"]:
        del sys.modules[name]


def settings(package: Path, **modules: str) -> Any:
    for name, key in modules.items():
        (package / f"{name}.py").write_text(MODULE.format(name=name, key=key))
    return create_model("Settings", __base__=Strict, shape=(family("shapes"), ...))


def test_a_module_is_a_choice(package: Path) -> None:
    kind = settings(package, circle="radius", square="side")
    found = parse(kind, {"shape": {"name": "square", "side": 3.0}})
    assert found.model_dump() == {"shape": {"name": "square", "shared": 1, "side": 3.0}}
    assert str(found.shape) == "square"
    assert fields_at(kind, ["shape"]) == ["name", "shared", "radius", "side"]


def test_a_family_of_one(package: Path) -> None:
    kind = settings(package, circle="radius")
    assert str(parse(kind, {"shape": {"name": "circle"}}).shape) == "circle"
    with pytest.raises(UserError, match=r"shape\.name='square': Input should be 'circle'"):
        parse(kind, {"shape": {"name": "square"}})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"name": "squre"},
            r"^shape\.name='squre': there is no such shape; did you mean 'square'\?; use circle",
        ),
        ({}, r"^shape\.name=None: there is no such shape; use circle, square$"),
        (
            {"name": "square", "radius": 1.0},
            r"^unknown key 'shape\.radius' \(found 1\.0\); keys of shape: name, shared, side$",
        ),
        ({"name": "circle", "radius": "wide"}, r"^shape\.radius='wide': Input should be a valid number"),
    ],
)
def test_mistakes_name_the_key_and_the_choices(package: Path, tree: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(settings(package, circle="radius", square="side"), {"shape": tree})
