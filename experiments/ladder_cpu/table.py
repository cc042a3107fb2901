"""The ladder's losses as a table: a row for each size and budget, bf16's loss and what the recipes lose against it.

python experiments/ladder_cpu/table.py
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import mean

from qtrain.report.summaries import compare, read_csv

RECIPES = ("quest", "quartet", "quartet_ii")


def main() -> None:
    points = defaultdict(list)
    for row in read_csv(Path(__file__).parent / "results.csv"):
        points[row["non_embedding_parameters"], row["tokens"]].append(row)
    print("| parameters | tokens | per parameter | seeds | bf16 | " + " | ".join(RECIPES) + " |")
    print("|" + "---|" * (5 + len(RECIPES)))
    for (parameters, tokens), rows in sorted(points.items()):
        if not any(row["name"] == "bf16" for row in rows):
            continue
        found = {comparison.name: comparison for comparison in compare(rows, "bf16")}
        losses = found["bf16"].losses
        gaps = []
        for name in RECIPES:
            gap = found.get(name)
            spread = f" ± {gap.half_width:.4f}" if gap and len(gap.losses) > 1 else ""
            gaps.append(f"{gap.gap:+.4f}{spread}" if gap else "")
        cells = [f"{parameters:,}", f"{tokens:,}", f"{tokens / parameters:.0f}", str(len(losses))]
        print("| " + " | ".join([*cells, f"{mean(losses.values()):.4f}", *gaps]) + " |")


if __name__ == "__main__":
    main()
