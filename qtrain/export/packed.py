"""A run as a Hugging Face checkpoint whose quantised layers hold packed codes, whatever the format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qtrain.data.tokenizer import tokenizer_files
from qtrain.errors import UserError
from qtrain.export.trained import Exported, TrainedRun, new_folder
from qtrain.models import hf
from qtrain.quant import QuantLinear
from qtrain.runs.files import write_synced


def write_packed(
    trained: TrainedRun,
    out: Path,
    config: Mapping[str, Any],
    pack: Callable[[QuantLinear], Mapping[str, Tensor]],
    kinds: Mapping[str, int],
    notes: tuple[str, ...],
) -> Exported:
    """Write a run into the new folder `out`: of each quantised layer what `pack` makes of it, by the names that follow
    the layer's, and all else in bfloat16. config: what config.json says beside the model's settings. One layer at a
    time is in memory. UserError for a run that quantises nothing."""
    theirs = hf.config_of(trained.model, trained.vocab_size, trained.tokenizer.eos_id)
    if not trained.layers:
        raise UserError(
            f"{trained.path}: recipe {trained.config.recipe.name} quantises nothing; export it as a Hugging Face "
            "checkpoint"
        )
    with new_folder(out) as partial:
        weight_bytes = hf.write(partial, {**theirs, **config}, _tensors(trained, pack))
        for file, text in tokenizer_files(trained.tokenizer).items():
            write_synced(partial / file, text)
        elements = {module_of(name): layer.in_features * layer.out_features for name, layer in trained.layers.items()}
        bits = _bits_per_weight(partial, elements)
    return Exported(out, trained.step, trained.parameters, weight_bytes, trained.recipe, bits, kinds, notes)


def _tensors(trained: TrainedRun, pack: Callable[[QuantLinear], Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name in trained.sizes:
        layer, place = trained.layers.get(name.removesuffix(".weight")), _theirs(name)
        if layer is None:
            yield place, trained.weight(name).to(torch.bfloat16)
        else:
            yield from ((f"{place.removesuffix('weight')}{part}", value) for part, value in pack(layer).items())


def module_of(name: str) -> str:
    """layers.0.attention.q -> model.layers.0.self_attn.q_proj"""
    return _theirs(f"{name}.weight").removesuffix(".weight")


def left_out(layers: Mapping[str, QuantLinear], sizes: Mapping[str, torch.Size]) -> list[str]:
    """The linear layers that are not quantised, by their names there; lm_head too where its weight is the
    embedding's."""
    matrices = [
        name.removesuffix(".weight") for name, size in sizes.items() if name.endswith(".weight") and len(size) == 2
    ]
    linears = [*(name for name in matrices if name not in ("embed", "lm_head")), "lm_head"]
    return [module_of(name) for name in linears if name not in layers]


def _theirs(name: str) -> str:
    found = hf.their_name(name)
    assert found is not None
    return found


def _bits_per_weight(folder: Path, sizes: Mapping[str, int]) -> float:
    """What the files of a checkpoint spend on weights and their scales, over the elements that these stand for. sizes:
    of the modules that hold them, in elements."""
    spent = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  no mapping
                module, _, kind = name.rpartition(".")
                if module in sizes and kind != "bias":
                    spent += file.get_tensor(name).nbytes
    return 8 * spent / sum(sizes.values())
