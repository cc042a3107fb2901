"""torch.library operators, and plans as text, which is how they travel through them.

An operator is one node to torch.compile, checkpointing and FSDP, which know its result's shape by its fake
implementation. Its arguments are tensors, numbers and strings; a text spells all of a plan (a registry's number would
mean another plan in the next process, and compiled graphs are kept on disk across processes).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

import torch

from qtrain_kernels.formats import Element
from qtrain_kernels.plans import Mask, Plan


class Namespace:
    """Of operators: `torch.ops.<name>`, implemented for one dispatch key.

    As torch.library.custom_op, without the two functions in Python that it puts around each call: 10 us of 30.
    """

    def __init__(self, name: str, key: str):
        self.name, self.key = name, key
        self.library = torch.library.Library(name, "DEF")

    def operator(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function with annotations, by its name without the underscore."""
        name = function.__name__.lstrip("_")
        schema = torch.library.infer_schema(function, mutates_args=())
        self.library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        self.library.impl(name, function, self.key)
        return getattr(getattr(torch.ops, self.name), name).default

    def fake(self, operator: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Registers what follows as the operator's fake implementation."""
        return torch.library.register_fake(operator.name(), lib=self.library)


def spell(value: Any) -> str:
    """JSON of all fields of a frozen dataclass: a Plan, or what holds one."""
    return _spell(value) if torch.compiler.is_compiling() else _remembered(value)


@cache
def read_plan(text: str) -> Plan:
    """The Plan of its spelling."""
    return plan_of(json.loads(text))


def plan_of(fields: Mapping[str, Any]) -> Plan:
    """The Plan of its spelled fields."""
    parts = {"element": Element, "scale_element": Element, "mask": Mask}
    made: dict[str, Any] = {name: fields[name] and kind(**fields[name]) for name, kind in parts.items()}
    return Plan(**(dict(fields) | made))


def _spell(value: Any) -> str:
    return _json(asdict(value))


_remembered = cache(_spell)  # 27 us for each call of an operator otherwise; torch.compile cannot trace a cache


def _json(value: Any) -> str:
    """json.dumps, which torch.compile cannot trace."""
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{name}": {_json(each)}' for name, each in value.items()) + "}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f'"{value}"' if isinstance(value, str) else repr(value)
