"""What a model is called where people read it: its name alone says too much where its settings are others."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import yaml

from qtrain.config.schema import Config
from qtrain.config.settings import classes_of, configs_dir

MOST_NAMED = 3  # settings that a title names


def model_title(settings: Mapping[str, Any]) -> str:
    """ "nano", or "nano (n_layers=3)" where a setting is another than in configs/model/nano.yaml.

    settings: those of a model, all or the known ones, `name` among them. A name without such a file stands as it is.
    """
    name = str(settings["name"])
    standard = _standard(name)
    other = [key for key in settings if key in standard and settings[key] not in (None, standard[key])]
    shown = [f"{key}={settings[key]}" for key in other[:MOST_NAMED]]
    more = [f"{len(other) - MOST_NAMED} more"] if len(other) > MOST_NAMED else []
    return f"{name} ({', '.join(shown + more)})" if other else name


@cache
def _standard(name: str) -> dict[str, Any]:
    """The settings of a model's file; none without a file."""
    path = configs_dir() / "model" / f"{name}.yaml"
    if not path.is_file():
        return {}
    named = yaml.safe_load(path.read_text(encoding="utf-8"))
    (kind,) = classes_of(Config, "model", named)
    defaults = {key: field.default for key, field in kind.model_fields.items() if not field.is_required()}
    return {key: value for key, value in {**defaults, **named}.items() if key != "name"}
