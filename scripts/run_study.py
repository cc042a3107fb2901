"""Run the points of a study that its results file lacks, one after the other, and append each as a row.

python scripts/run_study.py experiments/recipes [--only quartet] [--dry-run]

experiments/<study>/points.yaml has `settings`, what all points share, and `points`: name -> {seeds, settings}, all of
them settings of train.py. A point is done when <study>/results.csv has a row of its name and seed; the first seed of
every point comes before the second of any. A point that fails is reported, and the next one goes on. A study that is
stopped at any moment continues where it was: the point in work from its last checkpoint, if its run directory is there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import yaml

from qtrain.errors import UserError
from qtrain.report.summaries import read_csv, read_summaries, write_csv

TRAIN = Path(__file__).parents[1] / "train.py"


class Point(NamedTuple):
    name: str
    seed: int
    settings: list[str]


def points_of(study: Path) -> list[Point]:
    """All points of a study, the first seeds first. UserError for a file that is none, or an entry without settings."""
    path = study / "points.yaml"
    if not path.is_file():
        raise UserError(f"{study} is no study: it has no points.yaml")
    tree = yaml.safe_load(path.read_text())
    found = []
    for name, entry in tree["points"].items():
        unknown = set(entry) - {"seeds", "settings"}
        if unknown or "seeds" not in entry:
            raise UserError(f"{path}: point {name} has {', '.join(entry)}; give seeds (how many) and settings")
        settings = [*tree["settings"], *entry.get("settings", [])]
        found += [Point(name, seed, settings) for seed in range(entry["seeds"])]
    return sorted(found, key=lambda point: point.seed)


def run_point(point: Point, runs: Path, results: Path) -> bool:
    """Train one point and append its row; False when training failed."""
    own = [f"name={point.name}", f"seed={point.seed}", f"run_root={runs}", "callbacks.progress_bar=false"]
    if subprocess.run([sys.executable, str(TRAIN), *point.settings, *own], check=False).returncode:
        return False
    rows = [row for row in read_summaries(runs) if (row["name"], row["seed"]) == (point.name, point.seed)]
    write_csv(rows, results, append=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="a folder with points.yaml")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these points alone")
    parser.add_argument("--runs", type=Path, help="where run directories go (default: runs/<study>)")
    parser.add_argument("--dry-run", action="store_true", help="list what is done and what is missing")
    arguments = parser.parse_args()
    results = arguments.study / "results.csv"
    try:
        points = points_of(arguments.study)
        names = {point.name for point in points}
        for name in arguments.only or ():
            if name not in names:
                raise UserError(f"{arguments.study} has no point {name!r}; it has {', '.join(sorted(names))}")
        done = {(row["name"], row["seed"]) for row in (read_csv(results) if results.is_file() else [])}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    wanted = [point for point in points if not arguments.only or point.name in arguments.only]
    missing = [point for point in wanted if (point.name, point.seed) not in done]
    print(f"{arguments.study}: {len(wanted) - len(missing)} of {len(wanted)} points done", flush=True)
    if arguments.dry_run:
        for point in missing:
            print(f"missing: {point.name}, seed {point.seed}")
        return 0
    failed = []
    for number, point in enumerate(missing, 1):
        print(f"[{number}/{len(missing)}] {point.name}, seed {point.seed}", flush=True)
        if not run_point(point, arguments.runs or Path("runs") / arguments.study.name, results):
            failed.append(f"{point.name}, seed {point.seed}")
    for point in failed:
        print(f"failed: {point}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
