"""The ladder's losses as a table: a row for each size and budget, bf16's loss and what the recipes lose against it,
then each recipe's mean gap. The budgets of one size share their trunk, so what counts as independent are the sizes'
means: the interval is Student's t over these.

python experiments/ladder_cpu/table.py
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import t

from qtrain.report.summaries import compare
from qtrain.runs.table import read_csv

RECIPES = ("quest", "quartet", "quartet_ii")


def main() -> None:
    points = defaultdict(list)
    by_size: dict[tuple[str, bool], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read_csv(Path(__file__).parent / "results.csv"):
        points[row["non_embedding_parameters"], row["tokens"]].append(row)
    print("| parameters | tokens | per parameter | seeds | bf16 | " + " | ".join(RECIPES) + " |")
    print("|" + "---|" * (5 + len(RECIPES)))
    for (parameters, tokens), rows in sorted(points.items()):
        found = {comparison.name: comparison for comparison in compare(rows, "bf16")}
        losses = found["bf16"].losses
        gaps = []
        for name in RECIPES:
            gap = found[name]
            spread = f" ± {gap.half_width:.4f}" if len(gap.losses) > 1 else ""
            gaps.append(f"{gap.gap:+.4f}{spread}")
            by_size[name, tokens / parameters > 7][parameters].append(gap.gap)
        cells = [f"{parameters:,}", f"{tokens:,}", f"{tokens / parameters:.0f}", str(len(losses))]
        print("| " + " | ".join([*cells, f"{mean(losses.values()):.4f}", *gaps]) + " |")
    for what, which in (("all budgets", (False, True)), ("10 and 20 tokens per parameter", (True,))):
        means = [mean_over_sizes([by_size[name, long] for long in which]) for name in RECIPES]
        print(f"| mean over the sizes, {what} | | | | | {' | '.join(means)} |")


def mean_over_sizes(parts: list[dict[int, list[float]]]) -> str:
    sizes = [mean(gap for part in parts for gap in part[parameters]) for parameters in parts[0]]
    half_width = t.ppf(0.975, len(sizes) - 1) * stdev(sizes) / len(sizes) ** 0.5
    return f"{mean(sizes):+.4f} ± {half_width:.4f}"


if __name__ == "__main__":
    main()
