"""What rotations and MR-GPTQ do for MXFP4 and NVFP4, weights and inputs, on runs that were trained without a recipe.

python experiments/ptq_vs_qat/formats.py runs/ptq_vs_qat/16_bits-trained-*    # goes on after a stop
python experiments/ptq_vs_qat/formats.py --table                              # of formats.csv
"""

from __future__ import annotations

import csv
import sys
import tempfile
from pathlib import Path

from run import mean

from qtrain.post_training import quantize

RESULTS = Path(__file__).with_suffix(".csv")
COLUMNS = ("run", "format", "rotation", "method", "loss_gap")
FORMATS = {
    "mxfp4": ("floor_three_quarters", ("null", "hadamard32", "hadamard128")),
    "nvfp4": ("absmax", ("null", "hadamard16", "hadamard128")),
}
METHODS = ("rtn", "mr_gptq")
OFF = [
    f"recipe.{operand}.{key}={value}"
    for operand in ("dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x")
    for key, value in (("format", "none"), ("scale", "null"), ("rotation", "null"), ("signs", "none"))
]
LINES = [
    (format, rotation, method)
    for format, (_, rotations) in FORMATS.items()
    for rotation in rotations
    for method in METHODS
]


def main() -> None:
    if "--table" in sys.argv:
        print(table())
        return
    if not RESULTS.exists():
        RESULTS.write_text(",".join(COLUMNS) + "\n")
    for source in map(Path, sys.argv[1:]):
        for line in LINES:
            if (source.name, *line) not in rows():
                with RESULTS.open("a") as file:
                    file.write(f"{source.name},{','.join(line)},{gap(source, *line):.5f}\n")


def gap(source: Path, format: str, rotation: str, method: str) -> float:
    """Nats per token above the loss of the run."""
    settings = {"format": format, "scale": FORMATS[format][0], "rotation": rotation, "estimator": "ste"}
    own = [f"recipe.fprop.{side}.{key}={value}" for side in "xw" for key, value in settings.items()]
    with tempfile.TemporaryDirectory() as folder:
        done = quantize(str(source), Path(folder) / "out", ["recipe=quartet", *own, *OFF], method, 65_536)
    return done.val_loss - done.val_loss_before


def rows() -> dict[tuple[str, ...], float]:
    with RESULTS.open() as file:
        return {tuple(row[name] for name in COLUMNS[:-1]): float(row["loss_gap"]) for row in csv.DictReader(file)}


def table() -> str:
    """Gaps and what MR-GPTQ takes from that of rounding to nearest, over the runs."""
    found = rows()
    runs = sorted({run for run, *_ in found})
    lines = ["| format | rotation | to nearest | MR-GPTQ | lifted by |", "|---|---|---|---|---|"]
    for format, rotation in dict.fromkeys((format, rotation) for format, rotation, _ in LINES):
        nearest, best = ([found[run, format, rotation, method] for run in runs] for method in METHODS)
        lifted = [before - after for before, after in zip(nearest, best, strict=True)]
        cells = format, rotation.replace("null", "none"), mean(nearest), mean(best), mean(lifted)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
