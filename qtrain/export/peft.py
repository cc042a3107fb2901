"""The adapter of a run in peft's format: adapter_model.safetensors and adapter_config.json."""

from __future__ import annotations

from pathlib import Path

from qtrain.errors import UserError
from qtrain.export.trained import Exported, new_folder, open_run
from qtrain.models.decoder import Decoder
from qtrain.quant.adapter import adapters
from qtrain.training.build import load_run
from qtrain.training.tune import save_adapter


def export(run: Path, out: Path) -> Exported:
    """Write the adapter of a run's newest good checkpoint into the new folder `out`. UserError when the run has no
    checkpoint or no adapter, or when `out` exists; then nothing is written."""
    trained = open_run(run)
    if trained.config.tune is None or trained.config.tune.adapter is None:
        merges = ", which merges what lies beside its codes" if trained.with_more else ""
        raise UserError(f"{run} trained no adapter (+tune=lora); export all of its weights with --to hf{merges}")
    model = load_run(run, trained.step)
    assert isinstance(model, Decoder)
    parameters = sum(each.A.numel() + each.B.numel() for each in adapters(model).values())
    with new_folder(out) as partial:
        weight_bytes = save_adapter(model, trained.config, partial)
    base = trained.config.model.init_from
    notes = (f"it is read beside its base, {base or 'which began at random weights: only this run has it'}",)
    return Exported(out, trained.step, parameters, weight_bytes, trained.recipe, bits_per_weight=32.0, notes=notes)
