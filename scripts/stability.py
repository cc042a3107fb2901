"""How stable recipes train: the sharpness of each checkpoint, and how the loss depends on the learning rate.

python train.py -m +experiment=bf16,quartet optimizer.lr=1e-3,4e-3,16e-3 seed=0,1 run_root=runs/rates
python scripts/stability.py runs/rates
python scripts/stability.py runs/quartet-1a2b3c4d --epsilon 5e-4 --json sharpness.json

Sharpness is the largest relative rise of the last token's loss, in percent, when each logit moves by at most
epsilon (|logit| + 1). The sensitivity is the mean loss over the learning rates less the best, where a run that diverged
counts with the loss that it began with. Both are the measures of arXiv 2405.18710; see qtrain/studies/stability.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import qtrain  # noqa: F401  before torch: it sets how long torch's threads spin

# isort: split

from qtrain.errors import UserError
from qtrain.runs.directory import RunDirectory
from qtrain.runs.files import write_atomically
from qtrain.runs.table import run_directories
from qtrain.studies.stability import LearningRates, Sharpness, learning_rates, sharpness_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run directories, or folders of them")
    parser.add_argument("--epsilon", type=float, default=1e-3, help="how far a logit moves (default: 1e-3)")
    parser.add_argument("--sequences", type=int, default=256, help="of the validation split (default: 256)")
    parser.add_argument("--json", type=Path, help="write both tables to this file")
    arguments = parser.parse_args()
    try:
        check(arguments)
        runs = [run for place in arguments.runs for run in run_directories(place)]
        if not runs:
            raise UserError(f"there is no run in {', '.join(map(str, arguments.runs))}")
        rates = learning_rates(runs)
        print(rates_table(rates) if rates else "No recipe here was trained with several learning rates.")
        found = {str(run): sharpness_of(run, arguments.epsilon, arguments.sequences) for run in runs}
        print("", sharpness_table(found), sep="\n")
        if arguments.json:
            rows = {run: [asdict(row) for row in rows] for run, rows in found.items()}
            about = {"epsilon": arguments.epsilon, "sequences": arguments.sequences}
            text = {**about, "learning_rates": [asdict(row) for row in rates], "sharpness": rows}
            write_atomically(arguments.json, json.dumps(text, indent=1))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def check(arguments: argparse.Namespace) -> None:
    """UserError before anything is computed."""
    if not arguments.epsilon > 0:
        raise UserError(f"--epsilon {arguments.epsilon:g} moves no logit; give a number above 0, such as 1e-3")
    if arguments.sequences < 1:
        raise UserError(f"--sequences {arguments.sequences}: at least one is needed")
    if arguments.json and not arguments.json.parent.is_dir():
        raise UserError(f"cannot write {arguments.json}: there is no folder {arguments.json.parent}; make it")


def rates_table(rates: list[LearningRates]) -> str:
    lines = [
        "| recipe | runs | learning rates | diverged | best | its loss | sensitivity |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rates:
        low, high = row.diverged_interval
        spread = f" ± {row.half_width:.4f}" if row.half_width == row.half_width else ""
        listed = ", ".join(f"{rate:g}" for rate in row.rates)
        lines.append(
            f"| {row.name} | {row.runs} | {listed} | {row.diverged:.0%} ({low:.0%} to {high:.0%}) | {row.best:g} "
            f"| {row.loss:.4f} | {row.sensitivity:.4f}{spread} |"
        )
    return "\n".join(lines)


def sharpness_table(found: dict[str, list[Sharpness]]) -> str:
    lines = [
        "| recipe | lr | seed | step | loss of the last token | sharpness in % | 95% interval | run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run, rows in found.items():
        config = RunDirectory(Path(run)).read_config()
        about = f"{config.name} | {config.optimizer.lr:g} | {config.seed}"
        lines += [
            f"| {about} | {row.step} | {row.loss:.4f} | {row.value:.3f} | {row.low:.3f} to {row.high:.3f} | {run} |"
            for row in rows
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
