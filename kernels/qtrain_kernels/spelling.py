"""Plans as text: how they travel through torch.library operators, whose arguments are tensors, numbers and strings.

A text spells all of a plan (a registry's number would mean another plan in the next process, and compiled graphs are
kept on disk across processes).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

import torch

from qtrain_kernels.formats import Element
from qtrain_kernels.reference import Mask, Plan


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
