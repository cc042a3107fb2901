"""A run as a Hugging Face checkpoint: bfloat16 weights, config.json and the tokenizer, as transformers reads them."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qtrain.data.tokenizer import tokenizer_files
from qtrain.errors import UserError, first_line
from qtrain.models import hf
from qtrain.models.base import Transformer
from qtrain.runs.directory import RunDirectory
from qtrain.runs.files import sync_folder, write_synced
from qtrain.training.build import load_tokenizer
from qtrain.training.checkpoint import newest, shapes, values_of, weight, whole_number


@dataclass(frozen=True)
class Exported:
    """step: of the checkpoint. recipe: of the run; None where it quantised nothing. parameters: that are stored."""

    folder: Path
    step: int
    parameters: int
    weight_bytes: int
    recipe: str | None


def export(run: Path, out: Path) -> Exported:
    """Write the newest good checkpoint of a run directory into the new folder `out`. One file of weights at a time is
    in memory. Learned scales of a recipe have no place there and are left out. UserError when the run has no
    checkpoint, its model no class in transformers, or when `out` exists; then nothing is written."""
    directory = RunDirectory(run)
    config = directory.read_config()
    if not isinstance(config.model, Transformer):
        raise UserError(f"{run}: transformers has no class for models of family {config.model.choice()}")
    found = newest(directory.checkpoints)
    if found is None:
        raise UserError(f"{run} has no checkpoint yet")
    step, folder = found
    vocab_size = whole_number(folder, values_of(folder), "vocab_size")
    tokenizer = load_tokenizer(run)
    theirs = hf.config_of(config.model, vocab_size, tokenizer.eos_id)
    sizes = {name: size for name, size in shapes(folder).items() if hf.their_name(name)}
    with _new_folder(out) as partial:
        weight_bytes = hf.save(partial, theirs, sizes, lambda name: weight(folder, name))
        for name, text in tokenizer_files(tokenizer).items():
            write_synced(partial / name, text)
    quantises = config.recipe.name if config.recipe.operands() else None
    return Exported(out, step, sum(size.numel() for size in sizes.values()), weight_bytes, quantises)


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that takes its name when it is whole. UserError when the name is taken or cannot be written."""
    if out.exists():
        raise UserError(f"{out} exists; give a new folder")
    partial = out.with_name(f".{out.name}.{secrets.token_hex(6)}")
    try:
        partial.mkdir(parents=True)
        yield partial
        sync_folder(partial)
        partial.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        raise UserError(f"cannot write {out}: {first_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
