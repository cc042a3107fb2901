"""Plan, run and watch a sweep: any number of runs, of which those that are done are not run again.

qtrain sweep plan   +sweep=ladder recipe=bf16,quartet     what there is to do, and its cost; starts nothing
qtrain sweep launch +sweep=ladder recipe=bf16,quartet     do it; the same command continues after any stop
qtrain sweep status +sweep=ladder recipe=bf16,quartet     done, running, failed, stopped, missing
qtrain sweep launch experiments/recipes --only quartet    a study

Settings are those of `qtrain train -m`. A study is a folder whose points.yaml has `settings`, those that all its points
share, and `points`: name -> {seeds, settings}, seeds how many; its rows go into results.csv there, and a point that has
a row is done, wherever it was trained. One point that fails ends nothing: it is reported with its reason, and run again
with --retry.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qtrain.cli import command_parser
from qtrain.errors import UserError, first_line

if TYPE_CHECKING:
    from rich.console import Console

    from qtrain.sweep import Point, Tally

# -P: a module of the folder where one works does not hide ours.
TRAIN = sys.executable, "-P", "-m", "qtrain.cli.train"
ENDED = (0, 2)  # of train.py: it has tried each point; those that it could not do it has named, with the reason
SECONDS_BETWEEN_LOOKS = 2.0
NOT_DONE = ("running", "failed", "stopped", "missing")
Line = list[str]  # the arguments of one `train.py -m`


# ------------------------------------------------------------------------------------------------- studies


def study_lines(study: Path, only: list[str] | None) -> list[Line]:
    """A line for each point of a study. UserError for a file that is none, naming what is wrong in it."""
    path = study / "points.yaml"
    tree = _mapping(_read_yaml(path), str(path), required={"settings", "points"})
    shared = _settings(tree["settings"], f"{path}: settings")
    if not isinstance(tree["points"], dict) or not tree["points"]:
        raise UserError(f"{path}: points is {_shown(tree['points'])}; give name: {{seeds: 3, settings: [...]}}")
    for name in only or ():
        if name not in tree["points"]:
            raise UserError(f"{study} has no point {name!r}; it has {', '.join(sorted(map(str, tree['points'])))}")
    own = [f"results={study / 'results.csv'}", f"run_root={default_runs(study)}"]
    return [
        [f"name={name}", *own, *shared, *_point_settings(name, entry, path)]
        for name, entry in tree["points"].items()
        if not only or name in only
    ]


def _point_settings(name: Any, entry: Any, path: Path) -> Line:
    if not isinstance(name, str):
        raise UserError(f"{path}: the point's name {name!r} is no text; quote it")
    where = f"{path}: point {name}"
    entry = _mapping(entry, where, required={"seeds"}, optional={"settings"})
    seeds = entry["seeds"]
    if type(seeds) is not int or seeds < 1:
        raise UserError(f"{where}: seeds is {_shown(seeds)}; give how many, a positive integer")
    return [f"seed={','.join(map(str, range(seeds)))}", *_settings(entry.get("settings", []), f"{where}: settings")]


def _read_yaml(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path.parent} is no study: it has no points.yaml")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        line = f", line {place.line + 1}" if place else ""
        raise UserError(f"{path}{line} is no YAML: {getattr(error, 'problem', None) or first_line(error)}") from None


def _mapping(tree: Any, where: str, required: set[str], optional: frozenset[str] | set[str] = frozenset()) -> dict:
    """tree, if it is a mapping with these keys and no others."""
    expected = " and ".join([*sorted(required, reverse=True), *(f"perhaps {key}" for key in sorted(optional))])
    if not isinstance(tree, dict):
        raise UserError(f"{where} is {_shown(tree)}; give a mapping with {expected}")
    if not required <= set(tree) <= required | optional:
        raise UserError(f"{where} has {', '.join(map(str, tree)) or 'nothing'}; give {expected}")
    return tree


def _settings(value: Any, where: str) -> Line:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(
            f"{where} is {_shown(value)}; give a list of overrides as `qtrain train` takes them: [model=nano]"
        )
    return value


def _shown(value: Any) -> str:
    return "empty" if value is None else repr(value)


def default_runs(study: Path) -> Path:
    """runs/<the study's path from here>, so that no two studies share a folder; of one elsewhere, its whole path."""
    study = study.resolve()
    here = Path.cwd()
    return Path("runs", *(study.relative_to(here).parts if study.is_relative_to(here) else study.parts[1:]))


# ------------------------------------------------------------------------------------------------- launch


def points_of(lines: list[Line]) -> list[Point]:
    from qtrain.sweep import find_points
    from qtrain.train import compose_all, jobs_of

    return find_points(compose_all([job for line in lines for job in jobs_of(line)]))


def launch(line: Line, jobs: int, retry: bool) -> None:
    """Run what a line lacks. A process that dies takes the sweep down with it, so the sweep is started again, until
    nothing is left; a point that was started twice and ended by neither counts as failed. KeyboardInterrupt when asked
    to stop."""
    from qtrain.sweep import Tally, mark_killed

    points = points_of([line])
    first = before = starts_of(points)
    while any(point.state in open_states(retry) or not point.is_certain for point in points):
        status = _run(line, jobs, retry, Tally(points))
        points = points_of([line])
        starts = starts_of(points)
        if status in ENDED:
            return
        print(f"train.py ended with {status}", file=sys.stderr)
        if starts == before:  # it died before any point began, and would again
            return
        for point in points:
            if point.state == "stopped" and starts[point.directory] - first[point.directory] > 1:
                mark_killed(point)
        points = points_of([line])
        jobs, retry, before = 1, False, starts  # beside each other, one may die of the other's memory
        print("going on with what is left, one at a time", file=sys.stderr)


def starts_of(points: list[Point]) -> dict[Path, int]:
    from qtrain.runs.directory import RunDirectory

    return {point.directory: RunDirectory(point.directory).starts for point in points}


def open_states(retry: bool) -> tuple[str, ...]:
    return ("missing", "stopped", "failed") if retry else ("missing", "stopped")


def _run(line: Line, jobs: int, retry: bool, tally: Tally) -> int:
    launcher = [] if jobs == 1 else ["hydra/launcher=local", f"hydra.launcher.n_jobs={jobs}"]
    own = [f"retry_failed={str(retry).lower()}", "callbacks.progress_bar=false", *launcher]
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    process = subprocess.Popen([*TRAIN, "-m", *own, *line], env=environment)
    terminated = threading.Event()

    def hand_on(*_: object) -> None:
        terminated.set()
        process.terminate()

    before = signal.signal(signal.SIGTERM, hand_on)
    try:
        status = _told_until_its_end(process, tally)
    except KeyboardInterrupt:
        process.wait()  # Ctrl-C has asked it to stop too, and it saves first
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if status == 130 or terminated.is_set():
        raise KeyboardInterrupt
    return status


def _told_until_its_end(process: subprocess.Popen[bytes], tally: Tally) -> int:
    """Its exit status; meanwhile says how many points are done."""
    while True:
        try:
            status = process.wait(SECONDS_BETWEEN_LOOKS)
        except subprocess.TimeoutExpired:
            status = None
        if (told := tally.told()) is not None:
            print(told, flush=True)
        if status is not None:
            return status


# ------------------------------------------------------------------------------------------------- main


def main() -> int:
    parser = command_parser("sweep", __doc__)
    parser.add_argument("action", choices=("plan", "launch", "status"))
    parser.add_argument(
        "sweep", nargs="+", help="settings as `qtrain train` takes them, or a study and perhaps settings"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these points of a study alone")
    parser.add_argument("--jobs", type=int, default=1, help="processes beside each other (default: 1)")
    parser.add_argument("--retry", action="store_true", help="run failed points again")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        raise UserError(f"--jobs {arguments.jobs}: give at least 1")
    from rich.console import Console

    from qtrain.sweep import add_rows, plan_table

    lines = lines_of(arguments.sweep, arguments.only)
    points = points_of(lines)
    console = Console(highlight=False, markup=False)
    if arguments.action == "plan":
        console.print(plan_table(points, arguments.jobs))
        return 0
    if arguments.action == "launch":
        for number, line in enumerate(lines, start=1):
            if len(lines) > 1:
                print(f"\npoint {number} of {len(lines)}: {line[0]}", flush=True)
            launch(line, arguments.jobs, arguments.retry)
        points = points_of(lines)
        add_rows(points)
        if len(lines) > 1 and (results := points[0].config.results):  # of one line, the multirun has shown its losses
            show_losses(Path(results))
    return show_status(points, console, ("failed",) if arguments.action == "status" else NOT_DONE)


def lines_of(arguments: list[str], only: list[str] | None) -> list[Line]:
    """UserError where it is not clear what is asked for."""
    settings = [argument for argument in arguments if "=" in argument]
    studies = [argument for argument in arguments if "=" not in argument]
    if len(studies) > 1:
        raise UserError(f"{' and '.join(studies)} are several studies; give one, or settings like +sweep=ladder")
    if studies:
        return [[*line, *settings] for line in study_lines(Path(studies[0]), only)]
    if only:
        raise UserError("--only chooses points of a study; without one, choose by settings: recipe=quartet")
    return [settings]


def show_losses(results: Path) -> None:
    """Of a study, as `qtrain compare` does it with bf16, or why that cannot."""
    from qtrain.report.summaries import comparison_table, read_summaries

    try:
        print(comparison_table(read_summaries(results), "bf16"))
    except UserError as error:
        print(f"the losses are in {results}; they have no one table: {error}")


def show_status(points: list[Point], console: Console, bad: tuple[str, ...]) -> int:
    """The exit status: 1 when any point is in a state that is bad."""
    from qtrain.sweep import describe, status_table

    console.print(status_table(points))
    for point in points:
        if point.state != "done":
            console.print(describe(point), soft_wrap=True)
    return 1 if any(point.state in bad for point in points) else 0
