"""Strict settings: what every config and recipe file is read into, and the folder that those files lie in.

A tree of plain data becomes a class through `parse`; an unknown key, a wrong type or a value out of range raises
`UserError` naming the key, what was found and the nearest valid name.
"""

from __future__ import annotations

import difflib
import importlib
import math
import pkgutil
import re
import reprlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Tag, ValidationError

from qtrain.errors import UserError

Backend = Literal["auto", "reference", "compiled", "triton"]
GemmKind = Literal["auto", "float", "fp8", "fp8_fast", "fp4"]
BFLOAT16_GEMMS = ("fp8", "fp8_fast", "fp4")  # whose products are bfloat16
Checkpointing = Literal["none", "selective", "full"]
Redraw = Literal["micro_batch", "step"]
T = TypeVar("T", bound="Strict")
# Several names, or one alone as it is: recipe.skip=lm_head, recipe.skip=[lm_head,down]
Names = Annotated[tuple[str, ...], BeforeValidator(lambda names: (names,) if isinstance(names, str) else names)]

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 200, 200, 200


class Strict(BaseModel):
    """Base of all settings: immutable, and no key that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class Member(Strict):
    """Settings of one of a family. CHOSEN_BY names the setting that chooses it, a `Literal` of one word that each
    member has for itself; see `family`."""

    CHOSEN_BY: ClassVar[str] = "name"

    @classmethod
    def choice(cls) -> str:
        """The word that chooses this member."""
        return get_args(cls.model_fields[cls.CHOSEN_BY].annotation)[0]

    @classmethod
    def is_chosen(cls, tree: Mapping[str, Any]) -> bool:
        """Whether plain settings are this member's. A member whose word is a default is chosen where none is said."""
        return tree.get(cls.CHOSEN_BY, cls.model_fields[cls.CHOSEN_BY].default) == cls.choice()

    def __str__(self) -> str:
        return self.choice()


def family(package: str, without: str = "") -> Any:
    """The type of a setting that is one of a package's Members: one in each module, so that a module that is added is
    one more choice. without: a module whose own settings hold members of its package."""
    folder = importlib.import_module(package).__path__
    names = [found.name for found in pkgutil.iter_modules(folder) if found.name != without]
    modules = [importlib.import_module(f"{package}.{name}") for name in names]
    members = [
        kind
        for module in modules
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Member) and kind.__module__ == module.__name__
    ]
    if len(members) == 1:  # no choice for pydantic
        return members[0]

    def chosen(settings: Any) -> str | None:
        if isinstance(settings, Member):
            return settings.choice()
        found = settings if isinstance(settings, Mapping) else {}
        return next((each.choice() for each in members if each.is_chosen(found)), None)

    return Annotated[reduce(or_, (Annotated[each, Tag(each.choice())] for each in members)), Discriminator(chosen)]


def parse(kind: type[T], tree: Mapping[str, Any]) -> T:
    """tree -> kind, strictly. UserError lists every problem: the key, what was found, what to do."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(kind, problem) for problem in error.errors()]
        raise UserError("\n".join(lines)) from None


def _explain(kind: type[Strict], problem: Any) -> str:
    *parents, leaf = _keys(kind, problem["loc"]) or ("",)
    path = ".".join([*parents, leaf])
    found = problem["input"]
    if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
        members = _members_at(kind, [*parents, leaf])
        key, names = members[0].CHOSEN_BY, [each.choice() for each in members]
        name = found.get(key) if isinstance(found, Mapping) else found
        what = leaf if key == "name" else key
        hint = nearest(str(name), names)
        return f"{path}.{key}={shown(name)}: there is no such {what}{hint}; use {', '.join(names)}"
    if problem["type"] == "extra_forbidden":
        valid = list(fields_at(kind, parents, chosen=problem["loc"]))
        where = ".".join(parents) or "the config"
        hint = nearest(leaf, valid, parents)
        return f"unknown key {path!r} (found {shown(found)}){hint}; keys of {where}: {', '.join(valid)}"
    if problem["type"] == "missing":
        return f"missing key {path!r}; set it in a config file or as {path}=..."
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(found, Mapping) or not path:
        return message
    return f"{path}={shown(found)}: {message}"


def _keys(kind: type[BaseModel], place: Sequence[int | str]) -> list[str]:
    """The keys to a place in the settings, of pydantic's own, which names the members of families in between."""
    keys: list[str] = []
    for part in map(str, place):
        if part not in {each.choice() for each in _members_at(kind, keys)}:
            keys.append(part)
    return keys


def _classes_at(kind: type[BaseModel], parents: Sequence[str]) -> list[type[BaseModel]]:
    """The class of the settings there; several of a family."""
    kinds: list[type[BaseModel]] = [kind]
    names = iter(parents)
    for name in names:
        holders = [each for each in kinds if name in each.model_fields]
        kinds = [found for each in holders for found in classes_of(each, name)]
        if any(is_mapping(each, name) for each in holders) and next(names, None) is None:
            return []  # the names in a mapping are the user's own
    return kinds


def _members_at(kind: type[BaseModel], parents: Sequence[str]) -> list[type[Member]]:
    """The members of the family there, of which one is chosen; none where there is no choice."""
    members = [each for each in _classes_at(kind, parents) if issubclass(each, Member)]
    return members if len(members) > 1 else []


def fields_at(kind: type[BaseModel], parents: Sequence[str], chosen: Sequence[int | str] = ()) -> list[str]:
    """The keys of the settings there; of a family those of all its members, or of those that are named in `chosen`."""
    kinds = _classes_at(kind, parents)
    kinds = [each for each in _members_at(kind, parents) if each.choice() in chosen] or kinds
    return list(dict.fromkeys(name for each in kinds for name in each.model_fields))


def proportions(weights: Mapping[str, float]) -> dict[str, int]:
    """Positive weights as the smallest whole numbers of the same proportion, by name in order: 0.75 and 0.25 are 3 and
    1. A float counts as the decimal number that it is written as."""
    exact = {name: Fraction(str(weights[name])) for name in sorted(weights)}
    unit = Fraction(
        math.gcd(*(each.numerator for each in exact.values())), math.lcm(*(each.denominator for each in exact.values()))
    )
    return {name: int(each / unit) for name, each in exact.items()}


def shown(value: Any) -> str:
    """A value in a message: a foreign file may hold one of any size or depth."""
    try:
        return _SHORT.repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        return f"a value of type {type(value).__name__}"


def classes_of(kind: type[BaseModel], name: str, value: Any = None) -> list[type[Strict]]:
    """The classes of settings that a field may hold, or each value of a mapping from names to members of a family; of
    a family's those that the value chooses."""
    annotation = kind.model_fields[name].annotation
    if is_mapping(kind, name):
        annotation = get_args(get_args(annotation)[1])[0]
    options = [annotation] if get_origin(annotation) is dict else [annotation, *get_args(annotation)]
    options = [get_args(option)[0] if get_origin(option) is Annotated else option for option in options]
    classes = [option for option in options if isinstance(option, type) and issubclass(option, Strict)]
    if len(classes) < 2 or not isinstance(value, Mapping):
        return classes
    return [each for each in classes if issubclass(each, Member) and each.is_chosen(value)]


def is_mapping_at(kind: type[BaseModel], place: Sequence[str]) -> bool:
    """Whether the names below a place in the settings are the user's own."""
    holders = _classes_at(kind, place[:-1]) if place else []
    fields = [each.model_fields[place[-1]] for each in holders if place[-1] in each.model_fields]
    return any(get_origin(field.annotation) is dict for field in fields)


def is_mapping(kind: type[BaseModel], name: str) -> bool:
    """Whether a field maps names of the user's own to members of a family."""
    annotation = kind.model_fields[name].annotation
    values = get_args(annotation)[1] if get_origin(annotation) is dict else None
    return any(isinstance(each, Discriminator) for each in getattr(values, "__metadata__", ()))


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
    """UserError when configs/<group>/ has no such option, with the nearest one that it has. Of a recipe that is called
    as a number format, with the recipes in that format instead: the nearest name may be of another precision."""
    known = group_names(group)
    if option in known:
        return
    number_format = _number_format(option) if group == "recipe" else None
    if number_format is None:
        raise UserError(f"unknown {group} {shown(option)}{nearest(option, known)}; there are: {', '.join(known)}")
    those = _recipes_in(number_format)
    also = "" if option == number_format else f", {number_format}"
    listed = (
        f"recipes in it: {', '.join(those)}"
        if those
        else f"no recipe is in it by itself; there are: {', '.join(known)}"
    )
    raise UserError(f"unknown recipe {shown(option)}: that is a number format{also}; {listed}")


def _number_format(name: str) -> str | None:
    """The number format that a name is one of; None where it is none."""
    from qtrain_kernels.formats import CALLED_OTHERWISE, get_format

    name = CALLED_OTHERWISE.get(name.lower(), name.lower())
    try:
        return get_format(name).name
    except ValueError:
        return None


def _recipes_in(number_format: str) -> list[str]:
    """The recipes whose files name a format for an operand, by itself or with a block and a scale of its own."""
    named = re.compile(rf"\bformat: {re.escape(number_format)}(?![\w.])")
    root = configs_dir() / "recipe"
    return [name for name in group_names("recipe") if named.search((root / f"{name}.yaml").read_text(encoding="utf-8"))]
