"""What tests read of a run's last checkpoint, with safetensors alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from qtrain.training.checkpoint import list_checkpoints


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint that one rank wrote: model.<name>, optimizer.<name>.<state>."""
    files = folder.glob("*.safetensors")  # which are mapped: what happens to them must not happen to the tensors
    return {name: tensor.clone() for file in files for name, tensor in load_file(file).items()}


def last_tensors(run_dir: Path) -> dict[str, Tensor]:
    return tensors_in(list_checkpoints(run_dir / "checkpoints")[-1][1])


def last_weights(run_dir: Path) -> dict[str, Tensor]:
    prefix = "model."
    found = last_tensors(run_dir).items()
    return {name.removeprefix(prefix): tensor for name, tensor in found if name.startswith(prefix)}


def last_values(run_dir: Path) -> dict[str, Any]:
    return json.loads((list_checkpoints(run_dir / "checkpoints")[-1][1] / "values.json").read_text())
