"""Fit a scaling law to finished runs: constants, efficiencies of each recipe, intervals, held-out points, figures.

qtrain fit runs/
qtrain fit experiments/published/quartet.csv --law quartet --out build/law
qtrain fit results.parquet --hold-out "largest N" --fix quest.eff_D=1 --speed speeds.json

INPUT is a folder of run directories, or a CSV or Parquet table with the columns recipe, non_embedding_parameters,
tokens and val_loss, and perhaps seed, data_hash, status, forward and backward (then eff_N belongs to the forward pass
and eff_D to the backward), exponent_bits, mantissa_bits and block_size (for the law floating_point). Written to --out:
law.json, and every figure as PDF and PNG.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtrain.cli import command_parser, this_command
from qtrain.errors import UserError
from qtrain.scaling.laws import LAWS

if TYPE_CHECKING:
    from qtrain.scaling.runs import Run


def arguments() -> argparse.Namespace:
    parser = command_parser("fit", __doc__)
    parser.add_argument("inputs", metavar="INPUT", type=Path, nargs="+", help="folders of run directories, or tables")
    parser.add_argument("--law", choices=LAWS, default="quartet", help="as `qtrain/scaling/laws.py` has them (quartet)")
    parser.add_argument("--out", type=Path, default=Path("build/law"), help="default: build/law")
    parser.add_argument("--baseline", default="bf16", help="the recipe with efficiency 1 (default: bf16)")
    parser.add_argument("--recipes", nargs="+", help="use these alone; the baseline always")
    parser.add_argument(
        "--hold-out", metavar="RULE", help='predict and do not fit: "largest N", "largest D", "D/N > 400"'
    )
    parser.add_argument("--fix", metavar="NAME=VALUE", nargs="+", default=[], help="hold gamma=1, quest.eff_D=1, ...")
    parser.add_argument("--huber-delta", type=float, help="on log loss (default: that of the law's source)")
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    parser.add_argument("--speed", type=Path, help="a speed model, for the map of the best recipe at equal compute")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    law = fit(options)
    from qtrain.report.law_figures import law_figures

    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "law.json").write_text(json.dumps(law, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for name, figure in law_figures(law).items():
        for suffix in ("pdf", "png"):
            figure.savefig(options.out / f"{name}.{suffix}", dpi=150)
    print(readable(law))
    print(f"\nwritten: {options.out}/law.json and its figures")


def fit(options: argparse.Namespace) -> dict[str, Any]:
    """The whole of law.json."""
    if options.draws < 0:
        raise UserError(f"--draws is {options.draws}; give how many, 0 for no intervals")
    if options.huber_delta is not None and not 0 < options.huber_delta < math.inf:
        raise UserError(f"--huber-delta is {options.huber_delta:g}; give a positive number")
    from qtrain.runs.environment import commit
    from qtrain.scaling.results import law_json
    from qtrain.scaling.runs import held_out
    from qtrain.scaling.speed import read_speeds, speed_map
    from qtrain.scaling.study import fit_law

    runs, left_out = read(options.inputs)
    runs = chosen(runs, options.recipes, options.baseline)
    held = held_out(runs, options.hold_out)
    found = fit_law(
        runs, LAWS[options.law], baseline=options.baseline, held=held, huber_delta=options.huber_delta,
        fixed=dict(map(_held_constant, options.fix)), draws=options.draws, seed=options.seed,
    )  # fmt: skip
    law = law_json(found)
    law["warnings"] = [*left_out, *law["warnings"]]
    if options.speed:
        law["map"] = speed_map(found, read_speeds(options.speed))
    law["inputs"] = [{"path": str(path), "sha256": sha256(path)} for path in options.inputs]
    return law | {"command": this_command(), "commit": commit()}


def read(places: list[Path]) -> tuple[list[Run], list[str]]:
    """(usable runs, what was left out and why). UserError as `runs_of`."""
    from qtrain.runs.table import read_run, run_directories
    from qtrain.scaling.runs import read_table, runs_of

    rows = []
    for place in places:
        if not place.exists():
            raise UserError(f"there is no {place}; give a folder of run directories, or a table of runs")
        rows += [read_run(path) for path in run_directories(place)] if place.is_dir() else read_table(place)
    return runs_of(rows, " and ".join(map(str, places)))


def chosen(runs: list[Run], recipes: list[str] | None, baseline: str) -> list[Run]:
    there = {run.recipe for run in runs}
    missing = sorted(set(recipes or ()) - there)
    if missing:
        raise UserError(f"there is no run of {', '.join(missing)}; there are: {', '.join(sorted(there))}")
    return runs if recipes is None else [run for run in runs if run.recipe in {*recipes, baseline}]


def _held_constant(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise UserError(f"--fix {text}: say NAME=VALUE, as gamma=1") from None


def sha256(path: Path) -> str:
    """Of a table's bytes; of a folder, of its summaries in the order of their paths."""
    files = sorted(path.rglob("summary.json")) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def readable(law: dict[str, Any]) -> str:
    fitted = law["fit"]
    lines = [
        f"{law['law']}: L = {law['formula']}",
        f"{fitted['points_of_constants']} runs for the constants, {fitted['points']} in all; Huber delta "
        f"{fitted['huber_delta']:g}, objective {fitted['objective']:.4g}; {fitted['starts_at_minimum']:.0%} of "
        f"{fitted['starts']} starts agree; rms of residuals {fitted['rmse']:.4f} nats",
    ]
    if fitted["held_out_points"]:
        lines.append(f"{fitted['held_out_points']} held-out runs predicted: rms {fitted['held_out_rmse']:.4f} nats")
    lines += ["", f"| constant | value | 95% interval ({fitted['bootstrap_draws']} draws) | |", "|---|---|---|---|"]
    for name, constant in law["constants"].items():
        note = "held" if not constant["fitted"] else "" if constant["identified"] else "not identified"
        interval = "" if note == "held" else _interval(constant)
        lines.append(f"| {name} | {_shown(constant['value'])} | {interval} | {note} |")
    names = list(next(iter(law["efficiencies"].values()), {}))
    if names:
        heads = [head for name in names for head in (name, "95% interval")]
        lines += ["", f"| recipe | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for recipe, found in law["efficiencies"].items():
        cells = [cell for name in names for cell in (_shown(found[name]["value"]), _interval(found[name]))]
        lines.append(f"| {recipe} | {' | '.join(cells)} |")
    if any("?" in line for line in lines[1:]):
        lines += ["", "? means no bound: the fitted runs do not limit the constant on that side."]
    return "\n".join([*lines, *(f"\nwarning: {warning}" for warning in law["warnings"])])


def _interval(estimate: dict[str, Any]) -> str:
    if estimate["low"] == estimate["high"]:
        return ""
    return f"{_shown(estimate['low'])} to {_shown(estimate['high'])}"


def _shown(value: float | None) -> str:
    return "?" if value is None else f"{value:.4g}"
