"""The recipe language: what each operand of a linear layer's three GEMMs goes through, and which layers keep out.

`LinearRecipe` and `QuantSpec` are data: a recipe YAML reads into them without Hydra, so that
`qtrain.convert(model, recipe="quartet")` works in any program.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationInfo, field_validator, model_validator

from qtrain.config.settings import Names, Redraw, Strict, check_group_option, configs_dir, nearest, parse
from qtrain.errors import UserError, first_line
from qtrain_kernels.formats import Format, get_format
from qtrain_kernels.plans import ROUNDINGS, RoundingName, check_scale


class QuantSpec(Strict):
    """How one operand of one GEMM is quantised, along the contraction dim: rotate -> scale -> prune -> round.

    format: a number format, by name or as element/block/scale (`qtrain_kernels.formats`); None takes the recipe's own
        `format`; "none" leaves the operand in the compute dtype.
    scale: a scale rule (`qtrain_kernels.plans.SCALE_RULES`); None is the format's default; learned is a parameter, LSQ,
        for each block that the format spells out: int4/tensor/float32, int4/row/float32 or int4/32/float32. An element
        alone (int4) has one for the whole tensor, and inputs have no other.
    rounding: nearest (ties to even), stochastic, or eden (nearest, then a stochastically rounded scale correction).
    correction: elements that share an EDEN correction; None is the format's block.
    rotation: "hadamard<n>" rotates blocks of n along the contraction dim, "hadamard" the whole dim; both operands of a
        GEMM must agree.
    signs: random signs applied before the rotation: none, fixed (one vector for the run, the same in every layer), step
        (redrawn every step, and in each of its micro-batches as recipe.redraw says).
    row_rotation: "hadamard<n>" rotates blocks of n rows (tokens), undone on the product; for dgrad.dy (HALO-2).
    sparsity: 2:4 or 4:8 (in pairs), by magnitude after the rotation: what is pruned becomes zero.
    estimator: how the gradient passes the quantiser, for operands of fprop: ste, clip or trust.
    clip_scale: where clip begins, in largest codes.
    source: for operands of dgrad and wgrad: the master value, or the quantised (and rotated) value of the forward.
    """

    format: str | None = None
    scale: str | None = None
    rounding: RoundingName = "nearest"
    correction: int | None = Field(None, gt=0)
    rotation: str | None = None
    signs: Literal["none", "fixed", "step"] = "none"
    row_rotation: str | None = None
    sparsity: Literal["2:4", "4:8"] | None = None
    estimator: Literal["ste", "clip", "trust"] = "ste"
    clip_scale: float = Field(1.0, gt=0)
    source: Literal["master", "forward"] = "master"

    @field_validator("format")
    @classmethod
    def _known_format(cls, name: str | None) -> str | None:
        if name not in (None, "none"):
            get_format(name)
        return name

    @field_validator("rotation", "row_rotation")
    @classmethod
    def _is_a_rotation(cls, rotation: str | None, info: ValidationInfo) -> str | None:
        if rotation is None or re.fullmatch("hadamard[1-9][0-9]*", rotation):
            return rotation
        if info.field_name == "row_rotation":
            raise ValueError("give hadamard<n>, which rotates blocks of n (hadamard32)")
        if rotation != "hadamard":
            raise ValueError("give hadamard<n>, which rotates blocks of n (hadamard32), or hadamard for the whole dim")
        return rotation

    @model_validator(mode="after")
    def _rotation_fits(self) -> QuantSpec:
        if self.signs != "none" and self.rotation is None:
            raise ValueError(
                f"signs: {self.signs} has no effect without a rotation; name one (hadamard32) or drop signs"
            )
        for field, n in (("rotation", self.rotation_block), ("row_rotation", self.row_rotation_block)):
            if n and n & (n - 1):
                below = f"hadamard{1 << n.bit_length() - 1}"
                raise ValueError(f"{field}: the block of hadamard{n} must be a power of two; use {below}")
        return self

    @property
    def quantised(self) -> bool:
        return self.format != "none"

    @property
    def number_format(self) -> Format | None:
        return get_format(self.format) if self.format not in (None, "none") else None

    @property
    def learns_whole(self) -> bool:
        """Whether a learned scale is one number for the whole tensor."""
        fmt = self.number_format
        return fmt is not None and (fmt.block == "tensor" or "/" not in fmt.name)

    @property
    def rotation_block(self) -> int | None:
        """0 for a rotation of the whole dim."""
        return int(self.rotation.removeprefix("hadamard") or 0) if self.rotation else None

    @property
    def row_rotation_block(self) -> int | None:
        return int(self.row_rotation.removeprefix("hadamard")) if self.row_rotation else None


class Fprop(Strict):
    """Y = X W^T, contraction over K (in features)."""

    x: QuantSpec
    w: QuantSpec


class Dgrad(Strict):
    """dX = dY W, contraction over N (out features)."""

    dy: QuantSpec
    w: QuantSpec


class Wgrad(Strict):
    """dW = dY^T X, contraction over the tokens."""

    dy: QuantSpec
    x: QuantSpec


OF_THE_WHOLE_MODEL = ("skip", "overrides", "first_blocks", "last_blocks", "high_precision_after", "redraw")


class LinearRecipe(Strict):
    """The numerics of a linear layer: three GEMMs of two operands each, and the layers that stay in high precision.

    A recipe without GEMMs (bf16) converts nothing but what its overrides name.

    name: what tables and figures call the recipe.
    source: the paper or code that the recipe follows.
    deviations: where it differs from that source, a sentence each.
    bits: short for format=int<bits>, and where given stands for it.
    format: the format of every operand that names none itself.
    skip: layers left as they are, by full name, last component or pattern.
    overrides: pattern -> another recipe, by name or written out, of which the GEMMs count. The first that matches a
        layer holds, before skip.
    first_blocks: so many transformer blocks at the start stay as they are; below 1, that fraction of them, rounded.
    last_blocks: so many transformer blocks at the end stay as they are; below 1, that fraction of them, rounded.
    high_precision_after: the fraction of the run's steps after which every layer computes in the compute dtype.
        A loop of one's own calls `qtrain.quant.convert.set_high_precision`.
    redraw: when to draw the random bits of the weight (its noise, and the signs of fprop and dgrad): in every
        micro_batch, as published code does in every backward, or once a step. With `step`, all micro-batches share that
        noise, which does not average out over them, and the weight is quantised once for all of them. wgrad draws in
        every micro-batch either way.
    fprop, dgrad, wgrad: the numerics of the two operands of a product; None in a recipe that quantises nothing.
    """

    name: str
    source: str = ""
    deviations: tuple[str, ...] = ()
    bits: int | None = Field(None, ge=1, le=8)
    format: str | None = None
    skip: Names = ("lm_head",)
    overrides: dict[str, LinearRecipe] = Field(default_factory=dict)
    first_blocks: float = Field(0, ge=0)
    last_blocks: float = Field(0, ge=0)
    high_precision_after: float | None = Field(None, ge=0, lt=1)
    redraw: Redraw = "micro_batch"
    fprop: Fprop | None = None
    dgrad: Dgrad | None = None
    wgrad: Wgrad | None = None

    @field_validator("bits", mode="before")
    @classmethod
    def _whole(cls, bits: Any) -> Any:
        if isinstance(bits, float) and bits % 1:
            raise ValueError("give a whole number; three levels (ternary) are recipe.format=int1.585 in its place")
        return bits

    @field_validator("overrides", mode="before")
    @classmethod
    def _named_recipes(cls, overrides: Any) -> Any:
        if not isinstance(overrides, Mapping):
            raise ValueError("give {pattern: recipe, ...}, {} for none")
        return {str(pattern): _for_some_layers(str(pattern), recipe) for pattern, recipe in overrides.items()}

    @field_validator("first_blocks", "last_blocks")
    @classmethod
    def _whole_or_fraction(cls, blocks: float) -> float:
        if blocks >= 1 and blocks % 1:
            raise ValueError("a number of blocks, or a fraction of them below 1")
        return blocks

    @model_validator(mode="after")
    def _consistent(self) -> LinearRecipe:
        gemms = {"fprop": self.fprop, "dgrad": self.dgrad, "wgrad": self.wgrad}
        missing = [name for name, gemm in gemms.items() if gemm is None]
        if missing and len(missing) != len(gemms):
            raise ValueError(f"recipe {self.name} lacks {', '.join(missing)}; give all three GEMMs, or none of them")
        if missing and (self.bits is not None or self.format is not None):
            raise ValueError(f"recipe {self.name} quantises nothing, so it has no bits or format; drop them")
        return self._check_gemms() if not missing else self

    def _check_gemms(self) -> LinearRecipe:
        gemms = [gemm for gemm in (self.fprop, self.dgrad, self.wgrad) if gemm is not None]
        given = [getattr(gemm, field).format for gemm in gemms for field in type(gemm).model_fields]
        if None not in given and self.default_format is not None:
            given = f"bits={self.bits}" if self.bits is not None else f"format={self.format}"
            raise ValueError(
                f"every operand of recipe {self.name} names its own format, so {given} would change nothing; drop it,"
                " or use a recipe that takes it (quest)"
            )
        for gemm, operands in self.operands().items():
            for operand, spec in operands.items():
                _check_operand(f"recipe {self.name}, {gemm}.{operand}", gemm, operand, spec)
            left, right = operands.values()
            if (left.rotation, left.signs) != (right.rotation, right.signs):
                names = " and ".join(operands)
                raise ValueError(
                    f"recipe {self.name}, {gemm}: {names} must share rotation and signs (found {left.rotation}/"
                    f"{left.signs} and {right.rotation}/{right.signs}), or their product changes"
                )
        return self

    def operands(self) -> dict[str, dict[str, QuantSpec]]:
        """{gemm: {operand: spec}}, formats filled in; empty for a recipe that quantises nothing."""
        gemms = {"fprop": self.fprop, "dgrad": self.dgrad, "wgrad": self.wgrad}
        default = {"format": self.default_format}
        return {
            name: {
                operand: spec.model_copy(update=default) if spec.format is None else spec
                for operand, spec in ((field, getattr(gemm, field)) for field in type(gemm).model_fields)
            }
            for name, gemm in gemms.items()
            if gemm is not None
        }

    @property
    def provenance(self) -> list[str]:
        """Lines for a reader: the source and the deviations of this recipe and of those in its overrides."""
        lines = []
        for recipe in (self, *self.overrides.values()):
            lines += [f"{recipe.name} is from: {recipe.source}"] if recipe.source else []
            lines += [f"{recipe.name} differs: {deviation}" for deviation in recipe.deviations]
        return list(dict.fromkeys(lines))

    @property
    def summary(self) -> str:
        """A line: the number formats of its GEMMs, and its source."""
        forward, *backward = (self._formats(name) for name in ("fprop", "dgrad", "wgrad"))
        parts = [
            f"{forward} forward",
            *(f"{text} {name}" for text, name in zip(backward, ("dgrad", "wgrad"), strict=True)),
        ]
        if backward[0] == backward[1]:
            parts = [f"{forward} forward", f"{backward[0]} backward"]
        if {forward} == set(backward):
            parts = [f"{forward} forward and backward"]
        return f"{', '.join(parts)}. {self.source}".strip()

    def _formats(self, gemm: str) -> str:
        """mxfp4, or int4 x 16-bit: of the two operands of one GEMM."""
        gemms = self.operands()
        if not gemms:
            return "16-bit"
        own = [
            gemms["fprop"][operand] if spec.source == "forward" and not spec.quantised else spec
            for operand, spec in gemms[gemm].items()
        ]
        names = [str(spec.format) if spec.quantised else "16-bit" for spec in own]
        return names[0] if names[0] == names[1] else " x ".join(names)

    @property
    def redraws(self) -> bool:
        """Whether `redraw` changes anything where a step has several micro-batches, here or in an override."""
        gemms = self.operands()
        of_the_weight = [gemms[name]["w"] for name in ("fprop", "dgrad") if name in gemms]
        own = any(spec.signs == "step" or (spec.quantised and ROUNDINGS[spec.rounding].draws) for spec in of_the_weight)
        return own or any(other.redraws for other in self.overrides.values())

    @property
    def default_format(self) -> str | None:
        """The format of operands that name none: int<bits> where bits is given, else `format`."""
        return f"int{self.bits}" if self.bits is not None else self.format

    @field_validator("format")
    @classmethod
    def _known_format(cls, name: str | None) -> str | None:
        if name is not None:
            get_format(name)
        return name


def _check_operand(where: str, gemm: str, operand: str, spec: QuantSpec) -> None:
    """ValueError where an operand asks for what its place or its format does not have."""
    if spec.format is None:
        raise ValueError(f"{where} names no format; name one there, or set bits or format for the recipe")
    if gemm == "fprop" and spec.source == "forward":
        raise ValueError(f"{where}: source: forward is for operands of dgrad and wgrad")
    if operand == "dy" and spec.source == "forward":
        raise ValueError(f"{where}: a gradient has no forward value; use source: master")
    if operand != "w" and spec.number_format is not None and spec.number_format.element.zero_point:
        raise ValueError(
            f"{where}: {spec.format} has zero points, which weights alone have; name a symmetric format "
            "(int4_sym/128/bfloat16)"
        )
    if gemm != "fprop" and (spec.estimator != "ste" or spec.scale == "learned"):
        raise ValueError(f"{where}: estimator and scale: learned belong to the operands of fprop")
    if operand == "x" and spec.scale == "learned" and spec.quantised and not spec.learns_whole:
        element = spec.format.partition("/")[0]
        raise ValueError(
            f"{where}: scale learned of inputs is one number for the whole tensor, and {spec.format} has scales of "
            f"each row, of which there are as many as tokens; write {element}/tensor/float32"
        )
    if spec.clip_scale != 1.0 and spec.estimator != "clip":
        raise ValueError(f"{where}: clip_scale is of estimator clip; the estimator is {spec.estimator}")
    if spec.row_rotation and (gemm, operand) != ("dgrad", "dy"):
        raise ValueError(f"{where}: row_rotation is for dgrad.dy, whose rows are undone on dX; drop it")
    if gemm == "wgrad" and spec.rotation == "hadamard":
        raise ValueError(f"{where}: wgrad contracts over tokens, however many; name a block (hadamard128)")
    given = [
        name
        for name in ("scale", "rounding", "correction", "sparsity", "estimator", "row_rotation")
        if getattr(spec, name) != QuantSpec.model_fields[name].default
    ]
    if spec.format == "none" and given:
        raise ValueError(f"{where}: format none quantises nothing, so {', '.join(given)} would do nothing; drop it")
    if spec.number_format is not None:
        try:
            check_spec(spec, spec.number_format)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def _for_some_layers(pattern: str, recipe: Any) -> LinearRecipe:
    """A recipe as an override takes it: its GEMMs. ValueError where one was given what belongs to a whole model."""
    parsed = read_recipe(recipe)
    default = {
        name: LinearRecipe.model_fields[name].get_default(call_default_factory=True) for name in OF_THE_WHOLE_MODEL
    }
    written = set(recipe) if isinstance(recipe, Mapping) else set()
    given = [name for name in default if name in written and getattr(parsed, name) != default[name]]
    if given:
        raise ValueError(
            f"overrides of {pattern!r}: {', '.join(given)} belong to the recipe of the whole model; drop them"
        )
    return parsed.model_copy(update=default)


def check_spec(spec: QuantSpec, fmt: Format) -> str:
    """The scale rule in force. ValueError where scale, rounding or sparsity do not fit the format."""
    rule, corrects = check_scale(fmt, spec.scale), ROUNDINGS[spec.rounding].corrects
    if spec.correction and not corrects:
        raise ValueError(f"correction is of rounding eden; the rounding is {spec.rounding}")
    if corrects and (fmt.scale_kind != "minifloat" or fmt.rows > 1):
        raise ValueError(
            f"rounding {spec.rounding} corrects minifloat block scales (nvfp4); {fmt.name} has {fmt.scale} scales"
        )
    if corrects and spec.correction and spec.correction % (fmt.block_size or 1):
        raise ValueError(f"correction={spec.correction} must be a multiple of the block of {fmt.name}, {fmt.block}")
    if rule == "learned" and spec.rounding != "nearest":
        raise ValueError(f"scale learned (LSQ) rounds to nearest; got {spec.rounding}")
    if fmt.element.table is not None and spec.rounding != "nearest":
        raise ValueError(f"codes of a table ({fmt.name}) are rounded to nearest; got {spec.rounding}")
    if fmt.element.zero_point and (spec.rounding, spec.estimator, spec.sparsity) != ("nearest", "ste", None):
        raise ValueError(
            f"codes with a zero point ({fmt.name}) take rounding nearest, estimator ste and no sparsity; got "
            f"{spec.rounding}, {spec.estimator} and {spec.sparsity or 'none'}"
        )
    if spec.sparsity and (fmt.rows > 1 or (fmt.block_size or 8) % 8):
        raise ValueError(f"sparsity {spec.sparsity} needs blocks of a multiple of 8 along one dim; {fmt.name} has not")
    return rule


def read_recipe(recipe: str | os.PathLike[str] | Mapping[str, Any] | LinearRecipe) -> LinearRecipe:
    """A recipe by name ("quartet"), by the path of a YAML file, as a mapping, or as itself. UserError for an unknown
    name or key, and for a file that cannot be read.

    A mapping {"name": "quest", "bits": 2} whose name is a shipped recipe and that brings no GEMMs overrides it.
    """
    if isinstance(recipe, LinearRecipe):
        return recipe
    if isinstance(recipe, os.PathLike) or (isinstance(recipe, str) and recipe.endswith((".yaml", ".yml"))):
        return _read_file(Path(recipe))
    if isinstance(recipe, str):
        recipe = {"name": recipe}
    if not isinstance(recipe, Mapping):
        raise UserError(f"a recipe is a name, a mapping or a LinearRecipe; got {type(recipe).__name__} {recipe!r}")
    tree = dict(recipe)
    if not {"fprop", "dgrad", "wgrad"} & set(tree):
        if "name" not in tree:
            raise UserError("a recipe needs a name ({name: quest, bits: 2}), or fprop, dgrad and wgrad written out")
        name = str(tree["name"])
        check_group_option("recipe", name)
        tree = yaml.safe_load((configs_dir() / "recipe" / f"{name}.yaml").read_text()) | tree
    return parse(LinearRecipe, tree)


def _read_file(path: Path) -> LinearRecipe:
    """A file as configs/recipe/ has them; one without a name is called as the file."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        there = sorted(each.name for suffix in ("yaml", "yml") for each in path.parent.glob(f"*.{suffix}"))
        raise UserError(f"there is no recipe file {path}{nearest(path.name, there)}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"cannot read the recipe file {path}{place}: {first_line(error)}") from None
    if not isinstance(tree, Mapping):
        raise UserError(
            f"the recipe file {path} holds {type(tree).__name__}, not a mapping of name, fprop, dgrad, wgrad"
        )
    try:
        return read_recipe({"name": path.stem, **tree})
    except UserError as error:
        raise UserError(f"recipe file {path}: {error}") from None
