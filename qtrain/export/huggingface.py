"""A run as a Hugging Face checkpoint: bfloat16 weights, config.json and the tokenizer, as transformers reads them."""

from __future__ import annotations

from pathlib import Path

from qtrain.data.tokenizer import tokenizer_files
from qtrain.export.trained import Exported, new_folder, open_run
from qtrain.models import hf
from qtrain.runs.files import write_synced


def export(run: Path, out: Path) -> Exported:
    """Write the newest good checkpoint of a run directory into the new folder `out`. One tensor at a time is
    in memory. Learned scales of a recipe have no place there and are left out. UserError when the run has no
    checkpoint, its model no class in transformers, or when `out` exists; then nothing is written."""
    trained = open_run(run)
    theirs = hf.config_of(trained.model, trained.vocab_size, trained.tokenizer.eos_id)
    with new_folder(out) as partial:
        weight_bytes = hf.save(partial, theirs, trained.sizes, trained.weight)
        for name, text in tokenizer_files(trained.tokenizer).items():
            write_synced(partial / name, text)
    notes = ()
    if trained.merged is not None:
        notes = ("what was tuned is merged into the base" + (", dequantised" if trained.recipe else ""),)
    elif trained.is_packed:
        beside = " and of what lies beside them in 16 bits" if trained.with_more else ""
        notes = (f"these are the values of the codes of recipe {trained.recipe}{beside}, rounded to bfloat16",)
    elif trained.recipe:
        notes = (
            f"these are the weights before recipe {trained.recipe} quantises them: other products than in training",
        )
    return Exported(out, trained.step, trained.parameters, weight_bytes, trained.recipe, notes=notes)
