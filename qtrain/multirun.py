"""How the runs of one command ended: a table, what failed and why, and what to look at next. Reads files alone."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.table import Table

from qtrain.config import Config, config_hash
from qtrain.config.settings import configs_dir
from qtrain.errors import UserError
from qtrain.runs.directory import RunDirectory
from qtrain.runs.status import FAILED, Status
from qtrain.runs.table import read_run, recorded

BASELINE = "bf16"
OF_THE_RECIPE = ("recipe", "experiment")  # the groups in which a run and its baseline differ
LABELS = "QTRAIN_JOBS"  # the environment variable through which processes know the labels of all jobs, one a line
MOST_NAMED = 6  # run directories that the next command names; of more it names their folder

Job = frozenset[str]  # its overrides, as they were typed


@dataclass(frozen=True)
class Outcome:
    """label: the settings in which this job differs from others; beside: its settings but those of the recipe.
    loss: in nats per token, where it is finished; reason: in one line, where it is not."""

    label: str
    beside: Job
    recipe: str = ""
    loss: float | None = None
    directory: Path | None = None
    reason: str | None = None


def outcomes(
    jobs: Sequence[Sequence[str]], configs: Sequence[Config | UserError], failures: Mapping[Job, str]
) -> list[Outcome]:
    """configs: of each job, or what is wrong with its settings. failures: what this process saw fail, in one line."""
    found = []
    for label, job, config in zip(labels(jobs), jobs, configs, strict=True):
        overrides = typed_job(job)
        beside = Job(override for override in overrides if override.split("=")[0] not in OF_THE_RECIPE)
        named = {"label": label, "beside": beside}
        reason = failures.get(overrides)
        if isinstance(config, UserError):
            found.append(Outcome(**named, reason=reason or str(config)))
        else:
            found.append(_outcome(config, named, reason))
    return found


def labels(jobs: Sequence[Sequence[str]]) -> list[str]:
    """Of each job, the settings in which it differs from others; all of them where there is one alone."""
    common = Job.intersection(*map(typed_job, jobs)) if len(jobs) > 1 else Job()
    return [" ".join(override for override in map(_typed, job) if override not in common) for job in jobs]


def announce(jobs: Sequence[Sequence[str]]) -> None:
    """Let this process and those that it starts know what each job is."""
    os.environ[LABELS] = "\n".join(labels(jobs))


def heading(number: int) -> str | None:
    """Of a job, counted from 0: "job 3 of 18: recipe=quartet seed=1"; None where no process has announced the jobs."""
    known = os.environ.get(LABELS, "").split("\n")
    return f"job {number + 1} of {len(known)}: {known[number]}" if LABELS in os.environ else None


def typed_job(overrides: Sequence[str]) -> Job:
    return Job(map(_typed, overrides))


def _typed(override: str) -> str:
    return override.lstrip("+")


def _outcome(config: Config, named: dict[str, Any], reason: str | None) -> Outcome:
    directory, recipe = RunDirectory.of(config), config.recipe.name
    summary = directory.summary
    if directory.finished and reason is None:
        return Outcome(**named, recipe=recipe, loss=read_run(directory.path)["val_loss"], directory=directory.path)
    if reason is None and config.results:
        rows = recorded(Path(config.results)).get((config.name, config_hash(config)), [])
        if rows:
            return Outcome(**named, recipe=recipe, loss=rows[-1]["val_loss"], directory=Path(config.results))
    if reason is None and summary.get("status") in FAILED:
        reason = str(summary.get("reason") or summary["status"])
    if reason is None:
        reason = "not finished" if summary.get("status") in (Status.RUNNING, Status.INTERRUPTED) else "see above"
    return Outcome(**named, recipe=recipe, directory=directory.path if summary else None, reason=reason)


def outcome_table(found: Sequence[Outcome]) -> Table:
    """A line for each job. A gap is that to the job of BASELINE whose settings are otherwise the same."""
    base = {one.beside: one.loss for one in found if one.recipe == BASELINE and one.loss is not None}
    table = Table(box=None, pad_edge=False, header_style="cyan")
    table.add_column("run", overflow="fold")
    table.add_column("loss", justify="right", no_wrap=True)
    if base:
        table.add_column(f"gap to {BASELINE}", justify="right", no_wrap=True)
    table.add_column("directory", overflow="fold")
    for one in found:
        loss = "failed" if one.loss is None else f"{one.loss:.4f}"
        known = one.loss is not None and one.beside in base and one.recipe != BASELINE
        gap = [f"{one.loss - base[one.beside]:+.4f}" if known else ""] if base else []  # pyright: ignore
        table.add_row(one.label, loss, *gap, str(one.directory or ""))
    return table


def closing_lines(found: Sequence[Outcome]) -> list[str]:
    """What failed, each with the first line of its reason, and the command that shows the rest."""
    failed = [one for one in found if one.loss is None]
    lines = [f"{len(failed)} of {len(found)} failed:"] if failed else []
    lines += [f"  {one.label}: {next(iter((one.reason or '').splitlines()), '')}" for one in failed]
    places = list(dict.fromkeys(str(one.directory) for one in found if one.loss is not None and one.directory))
    if len(places) > MOST_NAMED:
        places = list(dict.fromkeys(place if place.endswith(".csv") else str(Path(place).parent) for place in places))
    if places:
        lines += ["next:", f"  {report_command(places)}   these runs on one page: losses, gaps, layers, speed"]
    return lines


def report_command(places: Sequence[str]) -> str:
    """As it is started from where this process was."""
    return shlex.join([*command_words("report"), *places, "--out", "report.html"])


def command_words(name: str) -> list[str]:
    """How to start a sub-command from the current folder: by its script where this process was started by one too."""
    return ["python", f"scripts/{name}.py"] if in_repository() else ["qtrain", name]


def in_repository() -> bool:
    """Whether a script of the repository started this process, and from the repository's root: from elsewhere,
    scripts/report.py would not be found, and `make` would read another Makefile."""
    if Path(sys.argv[0]).name not in ("train.py", "sweep.py"):
        return False
    script, ours = Path("scripts/report.py"), configs_dir().parent / "scripts" / "report.py"
    return script.is_file() and script.resolve() == ours.resolve()


# ------------------------------------------------------------------------------------------------- side by side


class Labelled:
    """A stream that begins each line with a label: several processes write to one terminal."""

    def __init__(self, stream: TextIO, label: str):
        self.stream, self.label = stream, label
        self.rest = ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        if lines:  # in one piece, so that no other process writes between
            self.stream.write("".join(f"{self.label} {line}".rstrip() + "\n" for line in lines))
            self.stream.flush()
        return len(text)

    def end(self) -> None:
        """Write what has no newline."""
        if self.rest:
            self.write("\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def labelled(label: str) -> Iterator[None]:
    """Within it, each line of this process has the label before it."""
    before = sys.stdout, sys.stderr
    streams = [Labelled(stream, f"[{label}]") for stream in before]
    sys.stdout, sys.stderr = streams  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        for stream in streams:
            stream.end()
        sys.stdout, sys.stderr = before
