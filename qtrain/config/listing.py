"""Every setting of a run with its meaning, for --help. The meaning stands in the docstring of the class that has it."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from typing import Any

import yaml
from pydantic import BaseModel

from qtrain.config.schema import Config
from qtrain.config.settings import Member, Strict, classes_of, is_mapping

# A docstring tells of a setting, or of several, in a paragraph that begins with the names and whose other lines are
# indented: "clip, clip_scale: where clipping begins, ..."
PARAGRAPH = re.compile(r"^(\w+(?:, \w+)*): (.*(?:\n +.*)*)", re.MULTILINE)
WIDTH, COLUMN, LONGEST = 120, 44, 60


@dataclass(frozen=True)
class Setting:
    """key: dotted. default: None where it is null, MISSING where there is none. only: the members of a family
    that have it, where not all do."""

    key: str
    default: Any
    meaning: str
    only: tuple[str, ...] = ()


def settings(kind: type[BaseModel] = Config) -> list[Setting]:
    """All that `kind` has below it, in the order of its fields. What several places have alike is listed once."""
    return list(_below(kind, "", {}))


def _below(kind: type[BaseModel], prefix: str, listed: dict[type[BaseModel], str]) -> Iterator[Setting]:
    meanings = meanings_of(kind)
    for name, field in kind.model_fields.items():
        key, classes = f"{prefix}{name}", classes_of(kind, name)
        if not classes or is_mapping(kind, name) or kind in classes:
            default = MISSING if field.is_required() else field.get_default(call_default_factory=True)
            yield Setting(key, default, meanings.get(name, ""))
        elif classes[0] in listed:
            yield Setting(f"{key}.*", MISSING, f"the same settings as {listed[classes[0]]}.*")
        elif len(classes) == 1:
            listed[classes[0]] = key
            if field.default is None and name in meanings:
                yield Setting(key, None, meanings[name])
            yield from _below(classes[0], f"{key}.", listed)
        else:
            yield from _of_family([each for each in classes if issubclass(each, Member)], f"{key}.", listed)


def _of_family(members: list[type[Member]], prefix: str, listed: dict[type[BaseModel], str]) -> Iterator[Setting]:
    """Those of all its members first. The word that chooses a member is told with what each is."""
    found: dict[str, list[tuple[str, Setting]]] = {}
    for member in members:
        for setting in _below(member, prefix, listed):
            found.setdefault(setting.key, []).append((member.choice(), setting))
    chosen_by = f"{prefix}{members[0].CHOSEN_BY}"
    del found[chosen_by]
    yield Setting(chosen_by, MISSING, f"which one: {' | '.join(member.choice() for member in members)}.")
    for each in sorted(found.values(), key=lambda each: -len(each)):
        _, setting = each[0]
        only = tuple(choice for choice, _ in each) if len(each) < len(members) else ()
        yield Setting(setting.key, setting.default, setting.meaning, only)


def meanings_of(kind: type[BaseModel]) -> dict[str, str]:
    """Setting -> meaning, by the docstrings of a class of settings and of those that it is made of."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if issubclass(each, Strict) and each.__doc__:
            for names, told in PARAGRAPH.findall(inspect.cleandoc(each.__doc__)):
                found |= dict.fromkeys(names.split(", "), " ".join(told.split()))
    return found


def listing(tree: Mapping[str, Any]) -> str:
    """Each setting with its value in the plain settings of a run, else its default, and the first sentence of its
    meaning."""
    lines = []
    for setting in settings():
        first, *_ = setting.meaning.split(". ")
        told = re.sub(r"\bNone\b", "null", first).removesuffix(".")
        told = f"{told} (of {', '.join(setting.only)})" if setting.only else told
        head = f"  {setting.key}{_value(tree, setting)}"
        lines += [head] if len(head) >= COLUMN else []
        start = "" if len(head) >= COLUMN else head
        lines += textwrap.wrap(
            told, WIDTH, initial_indent=f"{start:<{COLUMN}}", subsequent_indent=" " * COLUMN, break_on_hyphens=False
        )
    return "\n".join(lines)


def _value(tree: Mapping[str, Any], setting: Setting) -> str:
    found: Any = tree
    for part in setting.key.split("."):
        found = found[part] if isinstance(found, Mapping) and part in found else MISSING
    value = setting.default if found is MISSING else found
    if value is MISSING:
        return ""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
    return f"={text}" if len(text) <= LONGEST else f"={text[: LONGEST - 3]}..."
