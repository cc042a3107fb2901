"""The runs a law is fitted to: read from tables, and everything that must not be used in silence is named."""

from __future__ import annotations

import csv
import math
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qtrain.errors import UserError

REQUIRED = ("recipe", "non_embedding_parameters", "tokens", "val_loss")
PRECISION = ("exponent_bits", "mantissa_bits", "block_size")
COMPARED = {"data_hash": "corpora", "tokenizer": "tokenizers", "val_tokens": "amounts of validation text"}
COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le, "=": operator.eq}


@dataclass(frozen=True)
class Run:
    """N: non-embedding parameters. D: training tokens. loss: nats per token. forward, backward: what the two passes
    run in, where the table says so. precision: exponent bits, mantissa bits, block size, where it says so."""

    recipe: str
    seed: str
    N: float
    D: float
    loss: float
    forward: str = ""
    backward: str = ""
    precision: tuple[float, float, float] | None = None

    def __str__(self) -> str:
        seed = f", seed {self.seed}" if self.seed else ""
        return f"{self.recipe}, N {self.N:.4g}, D {self.D:.4g}{seed}"


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV or Parquet file. UserError where it is none or lacks a column that every law needs."""
    try:
        rows = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    missing = [column for column in REQUIRED if rows and column not in rows[0]]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; a table of runs has {', '.join(REQUIRED)}")
    return rows


def _read_csv(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as parquet

    return parquet.read_table(path).to_pylist()


def runs_of(rows: Iterable[Mapping[str, Any]], where: str) -> tuple[list[Run], list[str]]:
    """(usable runs in an order of their own, what was left out and why: unfinished and diverged runs).

    UserError where there is none, where runs of different data, tokenizers or validation are mixed (their losses do not
    compare), where two are of one recipe (of one name, where a recipe has runs of several), N, D and seed, where only
    some have a forward and a backward, or where a number is none.
    """
    every = list(rows)
    if not every:
        raise UserError(f"{where} holds no run: there is nothing to fit")
    places = [str(row.get("directory") or f"{where}, row {number}") for number, row in enumerate(every, 2)]
    begun = [row.get("status") not in (None, "", "finished") for row in every]
    left_out = [
        f"{place}: not used, its status is {row['status']}"
        for row, place, out in zip(every, places, begun, strict=True) if out
    ]  # fmt: skip
    places = [place for place, out in zip(places, begun, strict=True) if not out]
    rows = _by_name([row for row, out in zip(every, begun, strict=True) if not out], where)
    if not rows:
        raise UserError(f"{where} holds {len(every)} runs, none of them finished")
    for column, what in COMPARED.items():
        found = sorted({str(row.get(column) or "unnamed") for row in rows})
        if len(found) > 1:
            shown = ", ".join(value[:12] for value in found)
            raise UserError(f"the runs in {where} are of {len(found)} different {what} ({shown}); fit them apart")
    runs = []
    for row, place in zip(rows, places, strict=True):
        run = _run(row, place)
        if not math.isfinite(run.loss):
            left_out.append(f"{run}: not used, it has no finite loss (diverged)")
        else:
            runs.append(run)
    told = sum(bool(run.forward and run.backward) for run in runs)
    if 0 < told < len(runs):
        raise UserError(
            f"{where}: {told} of {len(runs)} runs say what forward and backward run in; let all or none say it"
        )
    twice = [key for key, count in Counter((run.recipe, run.N, run.D, run.seed) for run in runs).items() if count > 1]
    if twice:
        recipe, N, D, seed = twice[0]
        raise UserError(
            f"{where} has several runs of recipe {recipe!r}, N {N:.6g}, D {D:.6g}, seed {seed or 'none'}; keep one, or "
            "give them their own seed or recipe"
        )
    return sorted(runs, key=lambda run: (run.recipe, run.N, run.D, run.seed)), left_out


def _by_name(rows: list[Mapping[str, Any]], where: str) -> list[Mapping[str, Any]]:
    """A recipe that runs of several names have (quest at 4 bits and at 2) is as many recipes, called by these names;
    not where a name has runs of several recipes, and so tells other things apart."""
    names: dict[str, set[str]] = defaultdict(set)
    owners: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        recipe, name = str(row.get("recipe")), str(row.get("name") or "")
        names[recipe].add(name)
        owners[name].add(recipe)
    several = {recipe for recipe, found in names.items() if len(found) > 1 and all(len(owners[n]) == 1 for n in found)}
    for recipe in sorted(several):
        if "" in names[recipe]:
            others = ", ".join(sorted(names[recipe] - {""}))
            raise UserError(f"{where}: of recipe {recipe!r} there are runs named {others} and runs without a name")
    return [{**row, "recipe": row["name"]} if str(row.get("recipe")) in several else row for row in rows]


def _run(row: Mapping[str, Any], where: str) -> Run:
    N, D = (_number(row, name, where) for name in REQUIRED[1:3])
    for name, value in zip(REQUIRED[1:3], (N, D), strict=True):
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{where}: {name} is {row.get(name)!r}, not a positive number")
    loss = _number(row, "val_loss", where)
    if loss <= 0:
        raise UserError(f"{where}: val_loss is {loss}; a cross-entropy is above zero")
    if not row.get("recipe"):
        raise UserError(f"{where} names no recipe")
    seed = "" if row.get("seed") is None else str(row["seed"])
    forward, backward = (str(row.get(name) or "") for name in ("forward", "backward"))
    return Run(str(row["recipe"]), seed, N, D, loss, forward, backward, _precision(row, where))


def _precision(row: Mapping[str, Any], where: str) -> tuple[float, float, float] | None:
    """(exponent bits, mantissa bits, block size); None where the row has none of them: full precision."""
    missing = [name for name in PRECISION if row.get(name) in (None, "")]
    if len(missing) == len(PRECISION):
        return None
    if missing:
        raise UserError(f"{where}: {', '.join(missing)} is empty; give all of {', '.join(PRECISION)}, or none")
    exponent, mantissa, block = (_number(row, name, where) for name in PRECISION)
    if not (math.isfinite(exponent + mantissa) and exponent >= 0 and mantissa >= 0):
        raise UserError(f"{where}: {exponent:g} exponent and {mantissa:g} mantissa bits are no format")
    if not (math.isfinite(block) and block > 1):
        raise UserError(f"{where}: block_size is {block:g}; a block has two elements or more, and an end")
    return exponent, mantissa, block


def _number(row: Mapping[str, Any], column: str, where: str) -> float:
    """NaN where the field is empty."""
    value = row.get(column)
    if value is None or value == "":
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: {column} is {value!r}, not a number") from None


def held_out(runs: list[Run], rule: str | None) -> np.ndarray:
    """(n,) bool: the runs that a rule keeps from the fit. Rules: "largest N", "largest D", or a comparison of N, D or
    D/N with a number, as "N > 1e8"."""
    N, D = (np.array([getattr(run, name) for run in runs]) for name in ("N", "D"))
    if rule is None:
        return np.zeros(len(runs), dtype=bool)
    largest = re.fullmatch(r"\s*largest\s+([ND])\s*", rule)
    if largest:
        values = N if largest[1] == "N" else D
        return values == values.max()
    comparison = re.fullmatch(r"\s*(N|D|D/N)\s*(>=|<=|>|<|=)\s*(\d+\.?\d*(?:[eE][+-]?\d+)?)\s*", rule)
    if not comparison:
        raise UserError(f'cannot hold out {rule!r}; say "largest N", "largest D" or a comparison as "D/N > 400"')
    values = {"N": N, "D": D, "D/N": D / N}[comparison[1]]
    return COMPARISONS[comparison[2]](values, float(comparison[3]))
