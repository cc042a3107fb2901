"""The table of the study, from results.csv: python experiments/finetune/table.py"""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import stats

COLUMNS = ("method", "recipe", "learning rate", "seeds", "loss, nats per token", "bits per byte", "tokens/s")


def main() -> None:
    with (Path(__file__).parent / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    runs: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        runs[row["name"]].append(row)
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for name, found in sorted(runs.items(), key=lambda item: np.mean([float(row["val_loss"]) for row in item[1]])):
        method, _, rate = name.partition("-")
        loss, bits, speed = (
            np.array([float(row[key]) for row in found])
            for key in ("val_loss", "val_bits_per_byte", "tokens_per_second")
        )
        told = f"{loss.mean():.4f}"
        if len(loss) > 1:
            told += f" ± {stats.t.ppf(0.975, len(loss) - 1) * stats.sem(loss):.4f}"
        seeds = ", ".join(sorted(row["seed"] for row in found))
        cells = method, found[0]["recipe"], rate, seeds, told, f"{bits.mean():.3f}", f"{speed.mean():,.0f}"
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
