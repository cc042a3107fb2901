"""Strict settings: what every config and recipe file is read into, and the folder that those files lie in.

A tree of plain data becomes a class through `parse`; an unknown key, a wrong type or a value out of range raises
`UserError` naming the key, what was found and the nearest valid name.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from qtrain.errors import UserError

Backend = Literal["auto", "reference", "compiled", "triton"]
GemmKind = Literal["auto", "float", "fp8", "fp8_fast", "fp4"]
BFLOAT16_GEMMS = ("fp8", "fp8_fast", "fp4")  # whose products are bfloat16
Redraw = Literal["micro_batch", "step"]
T = TypeVar("T", bound="Strict")

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 200, 200, 200


class Strict(BaseModel):
    """Base of all settings: immutable, and no key that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def parse(kind: type[T], tree: Mapping[str, Any]) -> T:
    """tree -> kind, strictly. UserError lists every problem: the key, what was found, what to do."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(kind, problem) for problem in error.errors()]
        raise UserError("\n".join(lines)) from None


def _explain(kind: type[Strict], problem: Any) -> str:
    *parents, leaf = (str(part) for part in problem["loc"]) if problem["loc"] else ("",)
    path = ".".join([*parents, leaf])
    found = problem["input"]
    if problem["type"] == "extra_forbidden":
        valid = list(fields_at(kind, parents))
        where = ".".join(parents) or "the config"
        hint = nearest(leaf, valid, parents)
        return f"unknown key {path!r} (found {shown(found)}){hint}; keys of {where}: {', '.join(valid)}"
    if problem["type"] == "missing":
        return f"missing key {path!r}; set it in a config file or as {path}=..."
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(found, Mapping) or not path:
        return message
    return f"{path}={shown(found)}: {message}"


def fields_at(kind: type[BaseModel], parents: list[str]) -> list[str]:
    for name in parents:
        field = kind.model_fields.get(name)
        options = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        nested = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        if not nested:
            return []
        kind = nested[0]
    return list(kind.model_fields)


def shown(value: Any) -> str:
    """A value in a message: a foreign file may hold one of any size or depth."""
    try:
        return _SHORT.repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        return f"a value of type {type(value).__name__}"


def classes_of(kind: type[BaseModel], name: str, value: Any) -> list[type[Strict]]:
    """The classes of settings that a field may hold; of several those whose own `name` can be that of the value."""
    annotation = kind.model_fields[name].annotation
    options = [annotation] if get_origin(annotation) is dict else [annotation, *get_args(annotation)]
    classes = [option for option in options if isinstance(option, type) and issubclass(option, Strict)]
    if len(classes) < 2 or not isinstance(value, Mapping):
        return classes
    return [each for each in classes if value.get("name") in get_args(each.model_fields["name"].annotation)]


def nearest(name: str, valid: list[str], parents: list[str] | None = None) -> str:
    match = difflib.get_close_matches(name.lower(), valid, n=1, cutoff=0.5)
    return f"; did you mean {'.'.join([*(parents or []), match[0]])!r}?" if match else ""


def configs_dir() -> Path:
    """The folder of config groups: inside the installed package, or at the root of a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def group_names(group: str) -> list[str]:
    """The names that a config group offers: `group_names("recipe")` -> ["bf16", "quartet", ...]. A file whose name
    begins with _ is a part that others share."""
    root = configs_dir() / group
    files = [path for path in root.rglob("*.yaml") if not path.name.startswith("_")]
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in files)


def check_group_option(group: str, option: str) -> None:
    """UserError when configs/<group>/ has no such option, with the nearest one that it has."""
    known = group_names(group)
    if option not in known:
        raise UserError(f"unknown {group} {option!r}{nearest(option, known)}; there are: {', '.join(known)}")
