"""What of a pretrained model trains: adapters beside its layers (`TuneConfig`), and their files in peft's format."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qtrain.config import Config
from qtrain.config.schema import ADAPTER_FILES
from qtrain.errors import UserError, first_line
from qtrain.models import hf
from qtrain.models.decoder import Decoder
from qtrain.quant import PackedLinear, QuantLinear, pack, quant_linears
from qtrain.quant.adapter import Adapter, adapters, attach
from qtrain.quant.doubled import DoubledLinear
from qtrain.quant.packed import unsettled
from qtrain.quant.scaled import ScaledLinear, train_scales
from qtrain.runs.files import read_json, write_synced
from qtrain.training import rows
from qtrain.training.moves import move_codes
from qtrain.training.rows import Rows

log = logging.getLogger("qtrain")

PEFT_CONFIG, PEFT_WEIGHTS = ADAPTER_FILES
BASE = "qtrain_base.json"  # beside them: which checkpoint the adapter belongs to
_PEFT = "base_model.model."  # what peft calls the model that it wraps


def apply(model: Decoder, config: Config) -> None:
    """Makes a converted model train what config.tune says, in place. A packed base keeps the codes of the weights that
    the model has now; without values on the meta device. UserError for a base that has no codes yet."""
    tune = config.tune
    if tune is not None and tune.scales is not None:
        train_scales(model, tune.scales.bits, tune.scales.group, moves=tune.scales.moves is not None)
    if tune is not None and tune.rows is not None:
        rows.reserve(model, tune.rows.fraction)
    if tune is None or tune.adapter is None:
        return
    settings = tune.adapter
    if settings.pack:
        if not config.recipe.operands():
            raise UserError(
                f"tune.adapter.pack=true packs the base in the codes of a recipe, and recipe {config.recipe.name} "
                "quantises nothing; take one that quantises weights, as recipe=nf4"
            )
        for layer in quant_linears(model):
            if layer.numerics.learns:
                raise UserError(
                    "tune.adapter.pack=true packs the base before anything is trained, and recipe "
                    f"{config.recipe.name} learns a scale of {layer.name} in training; take one whose scales are "
                    "computed, as recipe=nf4"
                )
        pack(model, DoubledLinear if settings.double_quantization else PackedLinear)
    attach(model, settings.layers, rank=settings.rank, alpha=settings.alpha, dropout=settings.dropout, seed=config.seed)


def check_tune(config: Config) -> None:
    """UserError where what a run tunes does not fit its other settings."""
    if config.tune is None:
        return
    if config.trainer.strategy == "fsdp2":
        raise UserError("tune does not shard its model; use trainer.strategy=ddp, or set tune=null")
    if config.tune.scales is not None and config.recipe.operands():
        raise UserError(
            f"tune.scales makes integer codes of the weights itself, and recipe {config.recipe.name} would quantise "
            "them again; set recipe=bf16"
        )
    if config.tune.scales is not None and config.tune.scales.moves and config.optimizer.choice() != "adamw":
        raise UserError(
            f"tune.scales.moves is a virtual step of AdamW, and optimizer is {config.optimizer.choice()}; set "
            "optimizer=adamw"
        )
    if config.tune.rows is not None:
        _check_rows(config)
    if config.tune.teacher is not None and not config.model.init_from:
        raise UserError("tune.teacher distils from a pretrained model; name one by model=hf:FOLDER")
    if config.tune.teacher is not None and config.trainer.chunked_loss:
        raise UserError("tune.teacher compares whole logits; set trainer.chunked_loss=false")
    if config.trainer.share_trunk:
        raise UserError("trainer.share_trunk=true is for pretraining; set it to false, or tune=null")
    if not config.model.init_from:
        log.warning("tune changes a model whose weights are at random; model=hf:FOLDER starts from a pretrained one")


def _check_rows(config: Config) -> None:
    if not config.recipe.operands():
        raise UserError(
            f"tune.rows chooses rows of quantised weights, and recipe {config.recipe.name} quantises nothing; take "
            "another"
        )
    if config.optimizer.choice() != "adamw" or config.optimizer.weight_decay:
        raise UserError(
            "tune.rows leaves rows as they are by a state of zero, which AdamW without weight decay keeps; set "
            "optimizer=adamw optimizer.weight_decay=0"
        )


def row_choice(model: Decoder, optimizer: Optimizer, config: Config) -> Rows | None:
    """What chooses the rows that train; None where all do."""
    if config.tune is None or config.tune.rows is None:
        return None
    samples = config.trainer.batch_tokens // config.model.seq_len
    return Rows(model, optimizer, max(1, config.tune.rows.refresh_samples // max(1, samples)))


def prepare_optimizer(model: Decoder, optimizer: Optimizer, config: Config) -> None:
    """What a run tunes beside the parameters, in every step of the optimiser."""
    moves = config.tune and config.tune.scales and config.tune.scales.moves
    if moves:
        move_codes(model, optimizer, moves.lr / config.optimizer.lr, moves.beta2, moves.largest_change)


def describe(model: nn.Module) -> str:
    """What trains, and what a packed base takes."""
    trains = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    packed = [layer for layer in model.modules() if isinstance(layer, PackedLinear | ScaledLinear)]
    weights = sum(layer.in_features * layer.out_features for layer in packed)
    moves = sum(layer.moves.numel() for layer in packed if isinstance(layer, ScaledLinear) and layer.moves is not None)
    told = f"{trains - moves:,} parameters train beside a base {'whose codes move' if moves else 'that is frozen'}"
    if not packed:
        return told
    size = sum(buffer.nbytes for layer in packed for buffer in layer.buffers())
    return f"{told}: {weights:,} weights of it are packed in {size:,} bytes, {8 * size / weights:.4g} bits a weight"


def state_bytes(model: nn.Module) -> tuple[int, int]:
    """(bytes of all that a checkpoint has of a model, bytes of what trains of it)."""
    held = {id(tensor): tensor.nbytes for tensor in model.state_dict(keep_vars=True).values()}
    return sum(held.values()), sum(each.nbytes for each in model.parameters() if each.requires_grad)


# ------------------------------------------------------------------------------------------------------ merged weights


@torch.no_grad()
def merged(model: Decoder) -> dict[str, Tensor]:
    """The weights of a tuned model as one without adapters or packed layers has them, by their names in a qtrain state
    dict, in float32. Where the base is quantised, its weight is the dequantised one, which the adapter was trained
    beside."""
    beside, found = adapters(model), {}
    tied = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            if isinstance(module, Adapter) or tied[id(parameter)] != f"{name}.{kind}":
                continue
            found[f"{name}.{kind}"] = parameter.detach().float()
        if isinstance(module, ScaledLinear):
            found[f"{name}.weight"] = module.dequantize()
        if isinstance(module, QuantLinear | PackedLinear):
            found[f"{name}.weight"] = _dequantized(module)
        if name in beside:
            found[f"{name}.weight"] = found[f"{name}.weight"] + beside[name].product()
    return {name: tensor for name, tensor in found.items() if hf.their_name(name) is not None}


def _dequantized(layer: QuantLinear | PackedLinear) -> Tensor:
    """The weight that a forward multiplies by, out of its rotation; the master where a recipe has none that stays."""
    if isinstance(layer, QuantLinear):
        if unsettled(layer.numerics) is not None:
            return layer.weight.detach().float()
        layer = PackedLinear.of(layer)
    return layer.dequantize()


# -------------------------------------------------------------------------------------------------------- peft's format


def save_adapter(model: Decoder, config: Config, folder: Path) -> int:
    """Write the adapters of a model into an existing folder as peft does; their bytes."""
    assert config.tune is not None and config.tune.adapter is not None
    settings, tensors = config.tune.adapter, {}
    for name, adapter in adapters(model).items():
        tensors[_their_name(name, "A")] = adapter.A.detach().float().cpu().contiguous()
        tensors[_their_name(name, "B")] = adapter.B.detach().float().cpu().contiguous()
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.model.init_from,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": _targets(model),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    safetensors.torch.save_file(tensors, folder / PEFT_WEIGHTS, metadata={"format": "pt"})
    write_synced(folder / PEFT_CONFIG, json.dumps(about, indent=2) + "\n")
    write_synced(folder / BASE, json.dumps({"init_hash": config.model.init_hash}) + "\n")
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _their_name(name: str, side: str) -> str:
    theirs = hf.their_name(f"{name}.weight")
    assert theirs is not None
    return f"{_PEFT}{theirs.removesuffix('.weight')}.lora_{side}.weight"


def _targets(model: Decoder) -> list[str]:
    """peft's target_modules: last components where these name the adapted layers alone, else full names."""
    names = list(adapters(model))
    all_linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | PackedLinear)]
    theirs = {name: str(hf.their_name(f"{name}.weight")).removesuffix(".weight") for name in all_linears}
    leaves = {theirs[name].rpartition(".")[2] for name in names}
    by_leaf = {name for name in all_linears if theirs[name].rpartition(".")[2] in leaves}
    return sorted(leaves) if by_leaf == set(names) else sorted(theirs[name] for name in names)


@torch.no_grad()
def load_adapter(model: Decoder, config: Config, folder: str | Path) -> None:
    """Read an adapter in peft's format into the adapters of a model, in place. UserError for one of another base, of
    another rank or scale, or of other layers."""
    path = Path(folder).expanduser()
    about, tensors = _read_peft(path)
    _check_base(path, about, config)
    assert config.tune is not None and config.tune.adapter is not None
    settings = config.tune.adapter
    for key, here in (("r", settings.rank), ("lora_alpha", settings.alpha)):
        if about.get(key) != here:
            setting = "rank" if key == "r" else "alpha"
            raise UserError(f"{path} has {key}={about.get(key)}; set tune.adapter.{setting} to it (found {here})")
    wanted = {}
    for name, adapter in adapters(model).items():
        wanted |= {_their_name(name, "A"): adapter.A, _their_name(name, "B"): adapter.B}
    if odd := sorted(wanted.keys() ^ tensors.keys()):
        which = "has no" if odd[0] in wanted else "has"
        raise UserError(f"{path} {which} {odd[0]}: it adapts other layers; set tune.adapter.layers to those")
    for name, parameter in wanted.items():
        if tensors[name].shape != parameter.shape:
            raise UserError(
                f"{path} is an adapter of another base: {name} is {tuple(tensors[name].shape)}, and the model "
                f"{config.model.name} asks for {tuple(parameter.shape)}"
            )
        parameter.copy_(tensors[name])


def _read_peft(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not (path / PEFT_CONFIG).is_file() or not (path / PEFT_WEIGHTS).is_file():
        raise UserError(f"{path} holds no {PEFT_CONFIG} and {PEFT_WEIGHTS}; give the folder of an adapter")
    about = read_json(path / PEFT_CONFIG)
    odd = [key for key in ("use_dora", "use_rslora", "fan_in_fan_out", "modules_to_save") if about.get(key)]
    if about.get("peft_type") != "LORA" or odd:
        raise UserError(f"{path} is no plain LoRA adapter ({odd[0] if odd else about.get('peft_type')})")
    try:
        return about, safetensors.torch.load_file(path / PEFT_WEIGHTS)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read {path / PEFT_WEIGHTS}: {first_line(error)}") from None


def _check_base(path: Path, about: dict[str, Any], config: Config) -> None:
    known = read_json(path / BASE).get("init_hash")
    if known is not None and known != config.model.init_hash:
        raise UserError(
            f"{path} is an adapter of another base: it was trained beside {about.get('base_model_name_or_path')} "
            f"({known[:12]}), and model={config.model.init_from or config.model.name} is "
            f"{str(config.model.init_hash)[:12]}; load it beside its own base"
        )
