"""The points of a sweep: what each is, how far it is, and what is left to pay. Reads files; starts nothing."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from qtrain.config import Config, TokenizerConfig, config_hash
from qtrain.data.base import DataSettings
from qtrain.data.prepare import same_text
from qtrain.errors import UserError
from qtrain.plan import RunPlan, budget_tokens, make_plan
from qtrain.runs.directory import RunDirectory
from qtrain.runs.status import FAILED
from qtrain.runs.table import Row, read_run, record, recorded
from qtrain.training.build import check_model
from qtrain.training.checkpoint import folder_of, list_checkpoints
from qtrain.training.speed import trial
from qtrain.training.trunk import Trunk, common_steps, trunk_key
from qtrain.units import describe_time, readable

State = Literal["done", "running", "failed", "stopped", "missing"]
STATES: tuple[State, ...] = ("done", "running", "failed", "stopped", "missing")


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    steps_done: how far its own checkpoints reach. steps_shared: those that an earlier point of this sweep leaves it, or
    has left it. rate: tokens per second that it trained at, where it did. note: validation loss, progress or reason.
    is_certain: false of a point that is done, where nobody has compared the text that it read with the one that its
    settings name here: that text is not prepared yet. Launching the sweep compares them.
    """

    config: Config
    plan: RunPlan
    state: State
    steps_done: int = 0
    steps_shared: int = 0
    rate: float | None = None
    note: str = ""
    is_certain: bool = True

    @property
    def directory(self) -> Path:
        return RunDirectory.of(self.config).path

    @property
    def tokens_left(self) -> int:
        """To be computed. A run that has a checkpoint of its own goes on from there, else from a trunk."""
        if self.state == "done":
            return 0
        return (self.plan.steps - (self.steps_done or self.steps_shared)) * self.plan.batch_tokens

    @property
    def flops_left(self) -> int:
        return self.tokens_left * self.plan.flops_per_token


def find_points(configs: Iterable[Config]) -> list[Point]:
    """The points of these settings, each once, with their state on disk. UserError for a point that cannot run, naming
    it, and for files that cannot be read."""
    points: dict[Path, Point] = {}
    agree = cache(_same_text)  # most points of a sweep name one text, of perhaps thousands of files
    results: dict[str | None, dict[tuple[str, str], list[Row]]] = {None: {}}
    for config in configs:
        if config.results not in results:
            results[config.results] = recorded(Path(str(config.results)))
        point = _point(config, results[config.results], agree)
        same = points.setdefault(point.directory, point)
        if config_hash(same.config) != config_hash(config):
            raise UserError(f"run_dir={point.directory} names one directory for several runs; set run_root instead")
    return _with_trunks(list(points.values()))


def _point(config: Config, rows: Mapping[tuple[str, str], list[Row]], agree: Callable[..., bool | None]) -> Point:
    try:
        plan = make_plan(config)
        check_model(config)
    except UserError as error:
        raise UserError(f"{config.name}, seed {config.seed}: {error}") from None
    directory = RunDirectory.of(config)
    summary = directory.summary
    ended = [summary] if directory.finished else rows.get((config.name, config_hash(config)), [])
    for found in ended:
        budget = budget_tokens(config) if config.data.reads_to_the_budget else None
        agrees = agree(config.data, config.tokenizer, budget, found.get("data_fingerprint"), found.get("data_hash"))
        if agrees is not False:
            note = f"loss {found['val_loss']:.4f}" + ("" if agrees else ", its text not compared with the one here")
            return Point(config, plan, "done", rate=found["tokens_per_second"], note=note, is_certain=bool(agrees))
    if directory.finished:
        return Point(config, plan, "failed", note="finished on another text; restore the text, or set force=true")
    if not summary:
        return Point(config, plan, "missing")
    saved = list_checkpoints(directory.checkpoints)
    step = saved[-1][0] if saved else 0
    if directory.busy:
        return Point(config, plan, "running", step, note=_progress(directory, plan))
    if summary["status"] in FAILED:
        return Point(config, plan, "failed", step, note=f"{summary['status']}: {summary.get('reason')}")
    return Point(config, plan, "stopped", step, note=f"at step {step} of {plan.steps}")


def _same_text(
    data: DataSettings, tokenizer: TokenizerConfig, budget: int | None, fingerprint: str | None, data_hash: str | None
) -> bool | None:
    ended = {"data_fingerprint": fingerprint, "data_hash": data_hash}
    return same_text(data, tokenizer, ended, budget_tokens=budget, may_prepare=False)


def _progress(directory: RunDirectory, plan: RunPlan) -> str:
    lines = directory.lines("loss")
    return f"step {lines[-1]['step']} of {plan.steps}, loss {lines[-1]['loss']:.3f}" if lines else "starting"


def _with_trunks(points: list[Point]) -> list[Point]:
    """Each point with the steps that it will find done: those of points before it, which leave a trunk or have one."""
    left: dict[str, set[int]] = defaultdict(set)
    found = []
    for point in points:
        if not point.config.trainer.share_trunk:
            found.append(point)
            continue
        common = common_steps(point.config, point.plan)
        key = f"{point.config.run_root} {trunk_key(point.config, point.plan, data_hash='')}"
        shared = max((steps for steps in left[key] if steps <= common), default=0)
        if point.state != "done" or _has_left_trunk(point):
            left[key].add(common)
        found.append(replace(point, steps_shared=shared))
    return found


def _has_left_trunk(point: Point) -> bool:
    """Not where only its row is here, nor where it ran without share_trunk."""
    data_hash = RunDirectory(point.directory).summary.get("data_hash", "")
    trunk = Trunk(point.config, point.plan, data_hash)
    return folder_of(trunk.directory, trunk.steps).exists()


# ------------------------------------------------------------------------------------------------- cost


def seconds_left(points: Sequence[Point]) -> dict[tuple[str, str], float | None]:
    """(recipe, size) -> seconds of computing left on one process. The FLOP per second are those that the sweep's runs
    of the same recipe reached, else those of a trial; None where a trial would take too long."""
    rates = {name: _flops_per_second(members) for name, members in _grouped(points, lambda p: p.config.recipe.name)}
    return {
        key: _seconds(sum(point.flops_left for point in members), rates[key[0]])
        for key, members in _grouped(points, recipe_and_size)
    }


def _grouped(points: Sequence[Point], key: Callable[[Point], Any]) -> Iterable[tuple[Any, list[Point]]]:
    groups: dict[Any, list[Point]] = defaultdict(list)
    for point in points:
        groups[key(point)].append(point)
    return groups.items()


def _seconds(flops: int, rate: float | None) -> float | None:
    return 0.0 if flops == 0 else flops / rate if rate else None


def _flops_per_second(points: list[Point]) -> float | None:
    if all(point.state == "done" for point in points):
        return None
    known = [point.rate * point.plan.flops_per_token for point in points if point.rate]
    if known:
        return sum(known) / len(known)
    return trial(points[0].config, points[0].plan)


def recipe_and_size(point: Point) -> tuple[str, str]:
    return point.config.recipe.name, f"{point.plan.non_embedding_parameters / 1e6:.3g}M"


# ------------------------------------------------------------------------------------------------- tables


def plan_table(points: Sequence[Point], processes: int = 1) -> Table:
    """What is left to do, a row for each recipe and size, and the sum."""
    seconds = seconds_left(points)
    table = Table(box=None, pad_edge=False, header_style="cyan")
    for name in ("recipe", "parameters", "points", "to do", "tokens", "saved by trunks", "FLOP", "time"):
        table.add_column(name, justify="left" if name == "recipe" else "right")
    for key in sorted(seconds, key=lambda key: (key[0], float(key[1][:-1]))):
        members = [point for point in points if recipe_and_size(point) == key]
        table.add_row(*key, *_sums(members), _time(seconds[key]))
    known = [value for value in seconds.values() if value is not None]
    table.caption, table.caption_justify = what_times_rest_on(points), "left"
    total = _time(sum(known) / processes) if len(known) == len(seconds) else "unknown"
    table.add_section()
    table.add_row("all", "", *_sums(points), total + (f" on {processes} processes" if processes > 1 else ""))
    return table


def _sums(points: Sequence[Point]) -> tuple[str, ...]:
    todo = [point for point in points if point.state != "done"]
    left = sum(point.tokens_left for point in points)
    shared = sum(point.plan.batch_tokens * point.steps_shared for point in todo if not point.steps_done)
    flops = sum(point.flops_left for point in points)
    return str(len(points)), str(len(todo)), readable(left), readable(shared), f"{flops:.3g}"


def _time(seconds: float | None) -> str:
    return "unknown" if seconds is None else describe_time(seconds)


def what_times_rest_on(points: Sequence[Point]) -> str:
    """In words, for each recipe that has something left to do."""
    told: dict[str, list[str]] = defaultdict(list)
    for name, members in _grouped(points, lambda point: point.config.recipe.name):
        if any(point.state != "done" for point in members):
            runs = sum(bool(point.rate) for point in members)
            told[f"the speed of finished runs ({runs})" if runs else "a trial of three micro-batches here"].append(name)
    parts = [f"{basis}: {', '.join(names)}" for basis, names in told.items()]
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if any("trial" in basis for basis in told) and load > cores:
        parts.append(f"other work slows a trial: the load is {load:.1f} on {cores} cores")
    return f"Times are FLOP left over FLOP per second, by {'; '.join(parts)}." if parts else ""


class Tally:
    """How many of these points are finished, told when that has changed."""

    def __init__(self, points: Sequence[Point]):
        self.total, self.open = len(points), [point for point in points if point.state != "done"]

    def told(self) -> str | None:
        left = [point for point in self.open if not _is_finished(point)]
        if len(left) == len(self.open):
            return None
        self.open = left
        return f"{self.total - len(left)} of {self.total} done"


def _is_finished(point: Point) -> bool:
    try:
        return RunDirectory(point.directory).finished
    except UserError:  # damaged: the sweep tells of it at its end
        return False


def status_table(points: Sequence[Point]) -> Table:
    """How many points of each recipe are in which state."""
    table = Table(box=None, pad_edge=False, header_style="cyan")
    table.add_column("name")
    for state in STATES:
        table.add_column(state, justify="right")
    for name in sorted({point.config.name for point in points}):
        members = [point.state for point in points if point.config.name == name]
        table.add_row(name, *(str(members.count(state)) for state in STATES))
    table.add_section()
    states = [point.state for point in points]
    table.add_row("all", *(str(states.count(state)) for state in STATES))
    return table


def add_rows(points: Iterable[Point]) -> None:
    """The rows of finished runs that did not add theirs: they ran without `results`, or were killed just before."""
    for point in points:
        directory = RunDirectory(point.directory)
        if point.config.results and directory.finished:
            record(Path(point.config.results), read_run(directory.path))


def mark_killed(point: Point) -> None:
    """Write down that a point's process ended without a word, more than once."""
    directory = RunDirectory(point.directory)
    reason = "its process was killed twice (out of memory?)"
    directory.write_summary({**directory.summary, "status": "failed", "reason": reason})


def describe(point: Point) -> str:
    """One line: state, what it is, how far."""
    config = point.config
    size = recipe_and_size(point)[1]
    return (
        f"{point.state:8} {config.name}, seed {config.seed}, {size} parameters, {point.plan.tokens:,} tokens"
        + (f": {point.note}" if point.note else "")
        + (f" ({json.dumps(str(point.directory))})" if point.state == "failed" else "")
    )
