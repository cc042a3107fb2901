"""Swap nn.Linear by name for QuantLinear, in place, and say what was converted, what was not, and why."""

from __future__ import annotations

import difflib
import logging
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, get_args

import torch
from torch import nn

from qtrain.config.recipe import LinearRecipe, read_recipe
from qtrain.config.settings import Backend, GemmKind, group_names
from qtrain.errors import UserError
from qtrain.quant.functional import OPERANDS, Numerics
from qtrain.quant.linear import QuantLinear, has_hooks, quant_linears
from qtrain.quant.quantizer import Quantizer
from qtrain.quant.random import checked_seed
from qtrain.quant.rotation import base
from qtrain_kernels import dispatch
from qtrain_kernels.gemm import check_setting
from qtrain_kernels.precision import Linear

log = logging.getLogger("qtrain")

MIN_ROTATION = 16  # elements of a block, below which a rotation spreads too little to be offered
_FP8 = (9, 0), "MXFP4, MXFP6, MXFP8 or FP8"
# The compute capability that has all products of a setting, and what it multiplies.
NEEDS = {"fp8": _FP8, "fp8_fast": _FP8, "fp4": ((10, 0), "MXFP4, NVFP4 or MXFP8")}


@dataclass
class Report:
    """What convert did. converted: qualified names; skipped: name -> reason; numerics: converted name -> its GEMMs in
    full, of which `print(model)` shows the number formats; provenance: where the recipe comes from, and where it
    differs from that source."""

    recipe: str
    converted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    numerics: dict[str, str] = field(default_factory=dict)
    provenance: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        total = len(self.converted) + len(self.skipped)
        lines = [f"recipe {self.recipe}: {len(self.converted)} of {total} linear layers converted"]
        kinds = list(dict.fromkeys(self.numerics.values()))
        for numerics in kinds:
            if len(kinds) > 1:
                lines.append(f"{_listed(_with(self.numerics, numerics))}:")
            lines += re.split(r" (?=dgrad|wgrad)", numerics)
        whys = dict.fromkeys(self.skipped.values())
        lines += [f"skipped {_listed(_with(self.skipped, why))}: {why}" for why in whys]
        lines += self.provenance
        return "\n  ".join(lines)


def _with(kinds: Mapping[str, str], kind: str) -> list[str]:
    return [name for name, other in kinds.items() if other == kind]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def convert(
    model: nn.Module,
    recipe: str | os.PathLike[str] | Mapping[str, Any] | LinearRecipe,
    *,
    skip: Sequence[str] | None = None,
    seed: int = 0,
    backend: Backend = "auto",
    gemm: GemmKind = "auto",
) -> Report:
    """Replace every nn.Linear inside model by a QuantLinear that shares its parameters.

    recipe: a name ({name: quest, bits: 2} for its options), the path of a YAML file, a mapping, or a LinearRecipe.
    skip: layers that stay as they are, by full name, last component or pattern ("layers.0.*"); None takes the recipe's
    own. seed keys random bits, together with each layer's qualified name. backend, which quantises: auto | reference |
    compiled | triton. gemm, which multiplies: auto (integer codes as INT8, exactly, all else in the compute dtype) |
    float (all in the compute dtype) | fp8 (as auto, and MXFP4, FP8 and the like on FP8 units; fp8_fast: summed in
    fewer bits) | fp4 (as auto, and MXFP4, NVFP4 and MXFP8 on the units of Blackwell).
    UserError, with the model untouched, for a width that the recipe's blocks do not divide, a skip name that matches
    nothing (lm_head in the recipe's own may), a pattern of recipe.overrides that does, a model that has no linear layer
    or is already converted, or a recipe that quantises but would convert none of the model's linear layers.
    nn.TransformerEncoderLayer loses its fast path for inference, which reads the weights without calling the layers.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"convert takes a torch.nn.Module; got {type(model).__name__}")
    recipe, seed = read_recipe(recipe), checked_seed(seed)
    if backend not in get_args(Backend):
        raise UserError(f"unknown backend {backend!r}; backends: {', '.join(get_args(Backend))}")
    if gemm not in get_args(GemmKind):
        raise UserError(f"unknown gemm {gemm!r}; gemms: {', '.join(get_args(GemmKind))}")
    linears = {name: module for name, module in model.named_modules(remove_duplicate=False) if _is_linear(module)}
    if any(isinstance(module, QuantLinear) for module in linears.values()):
        raise UserError("the model is converted already; build it afresh to convert it with another recipe")
    names = recipe.skip if skip is None else ((skip,) if isinstance(skip, str) else tuple(skip))
    if not linears:
        raise UserError(f"the model ({type(model).__name__}) holds no nn.Linear, so there is nothing to convert")
    _check_names("skip", [entry for entry in names if skip is not None or entry != "lm_head"], linears)
    _check_names("recipe.overrides", recipe.overrides, linears)
    blocks = _high_precision_blocks(recipe, linears)
    report = Report(recipe.name, provenance=recipe.provenance)
    recipes_of: dict[str, LinearRecipe] = {}
    for name, module in linears.items():
        own = next((other for entry, other in recipe.overrides.items() if matches(entry, name)), recipe)
        kept = names if own is recipe or skip is not None else ()  # an override comes before the recipe's own skip
        reason = _reason_to_skip(name, own, kept) or blocks.get(name) or _other_use(module)
        if reason is None:
            recipes_of[name] = own.model_copy(update={"redraw": recipe.redraw})
        else:
            report.skipped[name] = reason
    report.converted = list(recipes_of)
    if not recipes_of and any(each.fprop is not None for each in (recipe, *recipe.overrides.values())):
        raise UserError(_nothing_converted(model, report))
    _swap(model, linears, recipes_of, seed, backend, gemm, report)
    _leave_fast_paths(model)
    log.debug("%s", report)
    return report


def set_high_precision(model: nn.Module, high_precision: bool = True) -> None:
    """Let every QuantLinear in model compute in the compute dtype, without its quantisers, or with them again."""
    for layer in quant_linears(model):
        layer.high_precision = high_precision


def check_backend(backend: Backend, gemm: GemmKind, device_type: str) -> None:
    """UserError when one of them cannot work on a device ("cpu", "cuda"): at once, not at the first forward."""
    try:
        dispatch.resolve(backend, device_type)
        check_setting(gemm, device_type)
    except ValueError as error:
        raise UserError(str(error)) from None


def recipes() -> dict[str, str]:
    """The recipes that `convert` knows by name, each with a line that says its number formats and its source."""
    return {name: read_recipe(name).summary for name in group_names("recipe")}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _reason_to_skip(name: str, recipe: LinearRecipe, skip: Sequence[str]) -> str | None:
    if not name:
        return "it is a bare nn.Linear, and layers are replaced inside a module; wrap it: torch.nn.Sequential(model)"
    if recipe.fprop is None:
        return f"recipe {recipe.name} quantises nothing"
    entry = next((entry for entry in skip if matches(entry, name)), None)
    if entry is not None:
        return f"named by skip ({entry})"
    return None


def _other_use(module: nn.Module) -> str | None:
    """Why a linear layer is more than its weight and bias; None for a plain one."""
    if type(module) not in (nn.Linear, Linear):
        return f"a {type(module).__name__}, which may use its weight in its own way"
    if not isinstance(module.weight, nn.Parameter):
        return "its weight is computed from other parameters (weight_norm, spectral_norm)"
    if "forward" in vars(module):
        return "its forward was replaced, as accelerate does for device_map; convert the model before that"
    if has_hooks(module):
        return "it carries hooks; remove them, or register them after the conversion"
    return None


def _nothing_converted(model: nn.Module, report: Report) -> str:
    reasons = [f"{name or 'the model itself'}: {why}" for name, why in report.skipped.items()]
    more = [f"and {len(reasons) - 8} more"] if len(reasons) > 8 else []
    listed = "\n  ".join([*reasons[:8], *more])
    return (
        f"recipe {report.recipe} would convert none of the {len(reasons)} linear layers of the model "
        f"({type(model).__name__}):\n  {listed}\nname in skip only what is to stay (skip=[]: nothing), or use recipe "
        "bf16, which converts nothing"
    )


def _leave_fast_paths(model: nn.Module) -> None:
    """In evaluation, torch's encoder layers read linear1.weight and linear2.weight without calling linear1 and linear2,
    but only for the activations that a flag names, which has no other use. Its encoder makes nested tensors for them,
    by a flag of its own."""
    encoders = [
        module for module in model.modules() if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer))
    ]
    for encoder in encoders:
        if not any(isinstance(child, QuantLinear) for child in encoder.modules()):
            continue
        if isinstance(encoder, nn.TransformerEncoderLayer):
            encoder.activation_relu_or_gelu = 0
        else:
            encoder.use_nested_tensor = False


def matches(entry: str, name: str) -> bool:
    """Whether an entry names a layer: by its full name, its last component, or a pattern of either."""
    return fnmatchcase(name, entry) or fnmatchcase(name.rpartition(".")[2], entry)


def _check_names(where: str, entries: Iterable[str], linears: Mapping[str, nn.Module]) -> None:
    for entry in entries:
        if any(matches(entry, name) for name in linears):
            continue
        known = sorted({*linears, *(name.rpartition(".")[2] for name in linears)})
        near = difflib.get_close_matches(entry, known, n=3, cutoff=0.5) or known[:3]
        raise UserError(f"{where} names {entry!r}, which matches no linear layer; the nearest are {', '.join(near)}")


def _high_precision_blocks(recipe: LinearRecipe, linears: Iterable[str]) -> dict[str, str]:
    """name -> why it stays in high precision: it is in the recipe's first or last blocks. A block's number is the first
    in its layers' names (layers.11.mlp.up)."""
    if not recipe.first_blocks and not recipe.last_blocks:
        return {}
    found = {name: re.search(r"(?:^|\.)(\d+)\.", name) for name in linears}
    numbers = {name: int(match[1]) for name, match in found.items() if match}
    count = max(numbers.values(), default=-1) + 1
    kept = [int(n if n >= 1 else n * count + 0.5) for n in (recipe.first_blocks, recipe.last_blocks)]
    if sum(kept) >= max(count, 1):
        raise UserError(
            f"recipe {recipe.name} keeps the first {kept[0]} and the last {kept[1]} blocks in high precision; the "
            f"model has {count} numbered blocks, so nothing would be converted; lower recipe.first_blocks or "
            "recipe.last_blocks"
        )
    first = {name: f"in the first {_blocks(kept[0])}" for name, number in numbers.items() if number < kept[0]}
    last = {name: f"in the last {_blocks(kept[1])}" for name, n in numbers.items() if n >= count - kept[1]}
    return first | last


def _blocks(count: int) -> str:
    return "block" if count == 1 else f"{count} blocks"


def _swap(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    recipes_of: Mapping[str, LinearRecipe],
    seed: int,
    backend: Backend,
    gemm: GemmKind,
    report: Report,
) -> None:
    found: list[Numerics] = []
    problems: dict[str, list[str]] = defaultdict(list)
    for name, recipe in recipes_of.items():
        numerics = Numerics.build(recipe, backend, gemm)
        report.numerics[name] = str(numerics)
        found.append(numerics)
        module = linears[name]
        assert isinstance(module, nn.Linear)
        if (problem := _misfit(module, recipe, numerics)) is not None:
            problems[problem].append(name)
    if problems:
        raise UserError("\n".join(f"{_listed(names)}: {problem}" for problem, names in problems.items()))
    if gemm in NEEDS and found and not any(multiplies(numerics, gemm) for numerics in found):
        raise UserError(
            f"gemm {gemm!r} needs {NEEDS[gemm][1]} codes on both sides of a GEMM, and recipe {report.recipe} has none "
            "such; ask for gemm 'auto'"
        )
    made: dict[nn.Module, QuantLinear] = {}  # a layer used under two names stays one layer
    for name, recipe in recipes_of.items():
        module = linears[name]
        assert isinstance(module, nn.Linear)
        if module not in made:
            made[module] = QuantLinear(module, recipe, name, seed, backend, gemm)
    for name in recipes_of:  # all are built: nothing raises from here on
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[linears[name]])


def multiplies(numerics: Numerics, gemm: GemmKind) -> bool:
    """Whether the setting changes how one of the GEMMs is multiplied, on a device that has all of its products."""
    products = (numerics.product(name, "cuda", NEEDS[gemm][0]).name for name in OPERANDS)
    return not {"int8", "float"} >= set(products)


def _misfit(module: nn.Linear, recipe: LinearRecipe, numerics: Numerics) -> str | None:
    """Why a layer's widths do not fit the recipe's blocks, and what to do; None if they do."""
    for operand, quantizer in sorted(numerics.operands.items(), key=lambda item: -item[1].multiple):
        gemm_name = operand.split(".")[0]
        if gemm_name == "wgrad":  # of blocks alone, to which its tokens are filled with zeros
            continue
        multiple, size = quantizer.multiple, module.in_features
        if gemm_name == "dgrad":
            size = module.out_features + -module.out_features % numerics.dgrad.multiple
        elif size % multiple:
            return (
                f"recipe {recipe.name} needs in_features % {multiple} == 0 for {operand} ({quantizer}), and finds "
                f"{size}; {_shorter_rotation(quantizer, size)}choose a width that is a multiple of {multiple}, or "
                "leave these layers out by recipe.skip"
            )
        if quantizer.spec.rotation == "hadamard":
            try:
                base(size, torch.device("cpu"))
            except ValueError as error:
                return f"recipe {recipe.name}, {operand}: {error}"
    return None


def _shorter_rotation(quantizer: Quantizer, size: int) -> str:
    """The settings of a rotation whose blocks divide a width, where the rotation alone does not; else nothing."""
    block = size & -size  # the largest power of two that divides it
    if not quantizer.rotation_block or size % math.lcm(quantizer.tile[1], block) or block < MIN_ROTATION:
        return ""
    return f"set recipe.fprop.x.rotation=hadamard{block} recipe.fprop.w.rotation=hadamard{block}, "
