"""What rotations and MR-GPTQ do for MXFP4 and NVFP4, weights and inputs, on a run that was trained without a recipe.

python experiments/ptq_vs_qat/formats.py runs/bf16-1a2b3c4d > experiments/ptq_vs_qat/formats.csv
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from qtrain.post_training import quantize

FORMATS = {
    "mxfp4": ("floor_three_quarters", ("null", "hadamard32", "hadamard128")),
    "nvfp4": ("absmax", ("null", "hadamard16", "hadamard128")),
}
OFF = [
    f"recipe.{operand}.{key}={value}"
    for operand in ("dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x")
    for key, value in (("format", "none"), ("scale", "null"), ("rotation", "null"), ("signs", "none"))
]


def main() -> None:
    print("format,rotation,method,loss_gap")
    for format, (scale, rotations) in FORMATS.items():
        for rotation in rotations:
            for method in ("rtn", "gptq", "mr_gptq"):
                print(
                    f"{format},{rotation},{method},{gap(sys.argv[1], format, scale, rotation, method):.5f}", flush=True
                )


def gap(source: str, format: str, scale: str, rotation: str, method: str) -> float:
    """Nats per token above the loss of the run."""
    settings = {"format": format, "scale": scale, "rotation": rotation, "estimator": "ste"}
    own = [f"recipe.fprop.{side}.{key}={value}" for side in "xw" for key, value in settings.items()]
    with tempfile.TemporaryDirectory() as folder:
        done = quantize(source, Path(folder) / "out", ["recipe=quartet", *own, *OFF], method, 65_536)
    return done.val_loss - done.val_loss_before


if __name__ == "__main__":
    main()
