"""The list of settings in --help: all there are, each with its meaning, as the command line sets it."""

import re
from typing import Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from qtrain.config import check_key
from qtrain.config.listing import listing, meanings_of, settings
from qtrain.config.settings import Strict
from qtrain.train import compose, help_text


def kinds(kind: type[BaseModel] = Strict) -> list[type[BaseModel]]:
    """Every class of settings that qtrain has."""
    below = [each for child in kind.__subclasses__() for each in kinds(child)]
    return [kind, *below] if kind.__module__.startswith("qtrain.") else below


OF_RUNS = ("config", "models", "optim", "data.base", "data.files", "data.sources")  # others are of files on disk
OWN = [
    kind
    for kind in dict.fromkeys(kinds())
    if kind.model_fields and kind.__module__.removeprefix("qtrain.").startswith(OF_RUNS)
]


def test_every_setting_is_listed_once() -> None:
    keys = [setting.key for setting in settings()]
    assert len(keys) == len(set(keys))
    parts = {part for key in keys for part in key.split(".")}
    for kind in OWN:
        assert kind.model_fields.keys() <= parts, kind
    for key in keys:
        check_key(key.removesuffix(".*"))


def test_every_setting_has_its_meaning() -> None:
    assert [setting.key for setting in settings() if not setting.meaning] == []


@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.__name__)
def test_meanings_name_all_choices(kind: type[BaseModel]) -> None:
    for name, field in kind.model_fields.items():
        options = [field.annotation, *get_args(field.annotation)]
        choices = [word for option in options if get_origin(option) is Literal for word in get_args(option)]
        for choice in choices if len(choices) > 1 else ():  # one alone chooses a member of a family
            assert re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", meanings_of(kind)[name]), (name, choice)


def test_help_shows_settings_as_the_command_line_has_them() -> None:
    shown = help_text(["seed=7", "recipe=quest", "recipe.bits=2"]).splitlines()
    start = shown.index(next(line for line in shown if line.startswith("Every setting")))
    rows = [line.split("  ")[1] for line in shown[start + 2 :] if line.startswith("  ") and line[2] != " "]
    assert {"seed=7", "recipe.bits=2", "recipe.name=quest", "trainer.grad_clip=1.0", "data.num_workers=0"} <= set(rows)
    assert "model.init_std=0.02" in rows  # no file of configs/ names it: its default
    assert max(map(len, shown)) <= 120
    assert [row.split("=")[0] for row in rows] == [setting.key for setting in settings()]


def test_settings_of_one_member_of_a_family_say_whose_they_are() -> None:
    told = " ".join(listing(compose().model_dump(mode="json")).split())
    assert "data.packages=[] names of the distributions (of python_env)" in told
    assert "optimizer.beta1=0.9 how much of its mean gradient a step keeps optimizer.beta2" in told
