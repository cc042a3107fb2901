"""Run the points of a study that its results file lacks, one after the other, and append each as a row.

python scripts/run_study.py experiments/recipes [--only quartet] [--dry-run]

experiments/<study>/points.yaml has `settings`, what all points share, and `points`: name -> {seeds, settings}, seeds
how many, settings those of train.py, perhaps none. A point is done when <study>/results.csv has a row of its name and
seed: these two alone identify it, and nothing checks that the row had today's settings, so settings that change a
result need a new name. The first seed of every point comes before the second of any. A point that fails is reported,
and the next one goes on. A study that is stopped at any moment continues where it was: the point in work from its last
checkpoint, if its run directory is there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from qtrain.errors import UserError, first_line
from qtrain.report.summaries import Row, finished_runs, read_csv, write_csv

TRAIN = Path(__file__).parents[1] / "train.py"


class Point(NamedTuple):
    name: str
    seed: int
    settings: list[str]

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"


def points_of(study: Path) -> list[Point]:
    """All points of a study, the first seeds first. UserError for a file that is none, naming what is wrong in it."""
    path = study / "points.yaml"
    tree = _mapping(_read_yaml(path), str(path), required={"settings", "points"})
    shared = _settings(tree["settings"], f"{path}: settings")
    if not isinstance(tree["points"], dict) or not tree["points"]:
        raise UserError(f"{path}: points is {_shown(tree['points'])}; give name: {{seeds: 3, settings: [...]}}")
    found = []
    for name, entry in tree["points"].items():
        if not isinstance(name, str):
            raise UserError(f"{path}: the point's name {name!r} is no text; quote it")
        where = f"{path}: point {name}"
        entry = _mapping(entry, where, required={"seeds"}, optional={"settings"})
        seeds = entry["seeds"]
        if type(seeds) is not int or seeds < 1:
            raise UserError(f"{where}: seeds is {_shown(seeds)}; give how many, a positive integer")
        settings = [*shared, *_settings(entry.get("settings", []), f"{where}: settings")]
        found += [Point(name, seed, settings) for seed in range(seeds)]
    return sorted(found, key=lambda point: point.seed)


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


def _settings(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{where} is {_shown(value)}; give a list of overrides as train.py takes them: [model=nano]")
    return value


def _shown(value: Any) -> str:
    return "empty" if value is None else repr(value)


def run_point(point: Point, runs: Path, results: Path) -> None:
    """Train one point and append its row. UserError when training failed, or left no finished run."""
    own = [f"name={point.name}", f"seed={point.seed}", f"run_root={runs}", "callbacks.progress_bar=false"]
    status = subprocess.run([sys.executable, str(TRAIN), *point.settings, *own], check=False).returncode
    if status:
        raise UserError(f"train.py ended with {status}")
    write_csv([_row_of(point, runs)], results, append=True)


def _row_of(point: Point, runs: Path) -> Row:
    """Of the run directories in runs itself: those of a study within the study lie in folders below."""
    rows = [row for row in finished_runs(runs, "*") if (row["name"], row["seed"]) == (point.name, point.seed)]
    if len(rows) != 1:
        raise UserError(f"{runs} holds {len(rows)} finished runs of this name and seed, one expected")
    return rows[0]


def default_runs(study: Path) -> Path:
    """runs/<the study's path from here>, so that no two studies share a folder; of one elsewhere, its whole path."""
    study = study.resolve()
    here = Path.cwd()
    return Path("runs", *(study.relative_to(here).parts if study.is_relative_to(here) else study.parts[1:]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="a folder with points.yaml")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these points alone")
    parser.add_argument("--runs", type=Path, help="where run directories go (default: runs/<path of the study>)")
    parser.add_argument("--dry-run", action="store_true", help="list what is done and what is missing")
    arguments = parser.parse_args()
    results = arguments.study / "results.csv"
    try:
        wanted = chosen(points_of(arguments.study), arguments.only, arguments.study)
        done = {(row["name"], row["seed"]) for row in (read_csv(results) if results.is_file() else [])}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    missing = [point for point in wanted if (point.name, point.seed) not in done]
    print(f"{arguments.study}: {len(wanted) - len(missing)} of {len(wanted)} points done", flush=True)
    if arguments.dry_run:
        for point in missing:
            print(f"missing: {point}")
        return 0
    return run_points(missing, arguments.runs or default_runs(arguments.study), results)


def chosen(points: list[Point], only: list[str] | None, study: Path) -> list[Point]:
    """The points of these names, of any without names. UserError for a name that no point has."""
    names = {point.name for point in points}
    for name in only or ():
        if name not in names:
            raise UserError(f"{study} has no point {name!r}; it has {', '.join(sorted(names))}")
    return [point for point in points if not only or point.name in only]


def run_points(points: list[Point], runs: Path, results: Path) -> int:
    """The exit status: 1 when any failed."""
    failed = []
    for number, point in enumerate(points, 1):
        print(f"[{number}/{len(points)}] {point}", flush=True)
        try:
            run_point(point, runs, results)
        except UserError as error:
            print(f"error: {point}: {error}", file=sys.stderr, flush=True)
            failed.append(point)
    for point in failed:
        print(f"failed: {point}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
