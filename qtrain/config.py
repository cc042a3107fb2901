"""Every setting of a run: typed, frozen, strict. All validation of settings lives here.

A config file or a command line becomes a `Config` through `parse`; an unknown key, a wrong type or a value out of
range raises `UserError` naming the key, what was found and the nearest valid name. The YAML files under configs/ hold
the values, the classes here hold the meaning. `LinearRecipe` and `QuantSpec` are data: a recipe YAML reads into them
without Hydra, so that `qtrain.convert(model, recipe="quartet")` works in any program.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qtrain.errors import UserError
from qtrain_kernels.formats import Format, check_scale, get_format

Backend = Literal["auto", "reference", "compiled"]
T = TypeVar("T", bound="Strict")


class Strict(BaseModel):
    """Base of all settings: immutable, and no key that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


# ------------------------------------------------------------------------------------------------------ recipe


class QuantSpec(Strict):
    """How one operand of one GEMM is quantised, along the contraction dim: rotate -> scale -> prune -> round.

    format: a number format, by name or as element/block/scale (`qtrain_kernels.formats`); None takes the recipe's own
        `format`; "none" leaves the operand in the compute dtype.
    scale: a scale rule (`qtrain_kernels.formats.SCALE_RULES`); None is the format's default. learned: a parameter, LSQ.
    rounding: nearest (ties to even), stochastic, or eden (nearest, then a stochastically rounded scale correction).
    correction: elements that share an EDEN correction; None is the format's block.
    rotation: "hadamard<n>" rotates blocks of n along the contraction dim, "hadamard" the whole dim; both operands of a
        GEMM must agree.
    signs: random signs applied before the rotation: none, fixed (one vector for the run, the same in every layer), step
        (redrawn every step; of wgrad every micro-batch).
    row_rotation: "hadamard<n>" rotates blocks of n rows (tokens), undone on the product; for dgrad.dy (HALO-2).
    sparsity: 2:4 or 4:8 (in pairs), by magnitude after the rotation: what is pruned becomes zero.
    estimator: how the gradient passes the quantiser, for operands of fprop: ste, clip or trust.
    clip_scale: where clip begins, in largest codes.
    source: for operands of dgrad and wgrad: the master value, or the quantised (and rotated) value of the forward.
    """

    format: str | None = None
    scale: str | None = None
    rounding: Literal["nearest", "stochastic", "eden"] = "nearest"
    correction: int | None = Field(None, gt=0)
    rotation: str | None = Field(None, pattern=r"^hadamard([1-9][0-9]*)?$")
    signs: Literal["none", "fixed", "step"] = "none"
    row_rotation: str | None = Field(None, pattern=r"^hadamard[1-9][0-9]*$")
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


OF_THE_WHOLE_MODEL = ("skip", "overrides", "first_blocks", "last_blocks", "high_precision_after")


class LinearRecipe(Strict):
    """The numerics of a linear layer: three GEMMs of two operands each, and the layers that stay in high precision.

    format: of every operand that names none itself; `bits: b` is short for int<b>, and where given stands for it.
    skip: layers left as they are, by full name, last component or pattern. overrides: pattern -> another recipe, by
    name or written out, of which the GEMMs count; the first that matches a layer holds, before skip. first_blocks,
    last_blocks: so many transformer blocks at either end stay as they are; below 1, that fraction of them, rounded.
    high_precision_after: the fraction of the run's steps after which every layer computes in the compute dtype, for
    train.py to act on. A recipe without GEMMs (bf16) converts nothing but what its overrides name.
    """

    name: str
    source: str = ""
    bits: int | None = Field(None, ge=1, le=8)
    format: str | None = None
    skip: tuple[str, ...] = ("lm_head",)
    overrides: dict[str, LinearRecipe] = Field(default_factory=dict)
    first_blocks: float = Field(0, ge=0)
    last_blocks: float = Field(0, ge=0)
    high_precision_after: float | None = Field(None, ge=0, lt=1)
    fprop: Fprop | None = None
    dgrad: Dgrad | None = None
    wgrad: Wgrad | None = None

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
    if gemm != "fprop" and (spec.estimator != "ste" or spec.scale == "learned"):
        raise ValueError(f"{where}: estimator and scale: learned belong to the operands of fprop")
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
    rule = check_scale(fmt, spec.scale)
    if spec.correction and spec.rounding != "eden":
        raise ValueError(f"correction is of rounding eden; the rounding is {spec.rounding}")
    if spec.rounding == "eden" and (fmt.scale_kind != "minifloat" or fmt.rows > 1):
        raise ValueError(f"rounding eden corrects minifloat block scales (nvfp4); {fmt.name} has {fmt.scale} scales")
    if spec.rounding == "eden" and spec.correction and spec.correction % (fmt.block_size or 1):
        raise ValueError(f"correction={spec.correction} must be a multiple of the block of {fmt.name}, {fmt.block}")
    if rule == "learned" and spec.rounding != "nearest":
        raise ValueError(f"scale learned (LSQ) rounds to nearest; got {spec.rounding}")
    if spec.sparsity and (fmt.rows > 1 or (fmt.block_size or 8) % 8):
        raise ValueError(f"sparsity {spec.sparsity} needs blocks of a multiple of 8 along one dim; {fmt.name} has not")
    return rule


# ------------------------------------------------------------------------------------------ model, data, budget


class ModelConfig(Strict):
    """A Llama: RMSNorm, RoPE, SwiGLU, grouped-query attention. nominal_parameters is the paper's name for the size
    (30M -> 30e6): a token budget per parameter counts it where it is given, else the non-embedding parameters."""

    name: str
    dim: int = Field(gt=0)
    n_layers: int = Field(gt=0)
    n_heads: int = Field(gt=0)
    n_kv_heads: int | None = Field(None, gt=0)
    ffn_dim: int = Field(gt=0)
    seq_len: int = Field(gt=1)
    tie_embeddings: bool = False
    vocab_size: int | None = Field(None, gt=0)
    rope_theta: float = Field(10000.0, gt=0)
    norm_eps: float = Field(1e-5, gt=0)
    init_std: float = Field(0.02, gt=0)
    nominal_parameters: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _divides(self) -> ModelConfig:
        if self.dim % self.n_heads or (self.dim // self.n_heads) % 2:
            raise ValueError(
                f"model.dim={self.dim} must split into n_heads={self.n_heads} heads of even size: RoPE pairs elements"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(f"model.n_heads={self.n_heads} must be a multiple of n_kv_heads={self.kv_heads}")
        return self

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


class DataConfig(Strict):
    """Where the text comes from.

    source: stdlib | python_env | text | jsonl | parquet | huggingface.
    packages: the installed distributions whose .py files are read (python_env).
    files, val_files: paths or globs (text, jsonl, parquet). Without val_files (or val_split) whole documents are held
        out by their content hash until about val_fraction of them are.
    text_field: the column that holds the text (jsonl, parquet, huggingface).
    path, subset, split, val_split, streaming: of `datasets.load_dataset`.
    max_tokens: stop the training split there; None takes the whole source, or, when streaming, the run's budget.
    cache_dir: where token shards are kept, one folder per (source, tokenizer).
    """

    source: Literal["stdlib", "python_env", "text", "jsonl", "parquet", "huggingface"]
    packages: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    val_files: tuple[str, ...] = ()
    text_field: str = "text"
    path: str | None = None
    subset: str | None = None
    split: str = "train"
    val_split: str | None = None
    streaming: bool = False
    max_tokens: int | None = Field(None, gt=0)
    val_fraction: float = Field(0.05, gt=0, lt=1)
    val_tokens: int = Field(gt=0, description="validation reads at most this many tokens, spread over its split")
    cache_dir: str = ".cache/qtrain"
    num_workers: int = Field(0, ge=0, description="loader processes; 0 loads in the training process")
    prepare_workers: int | None = Field(None, gt=0, description="tokenising processes; None: one per core")

    @field_validator("packages", "files", "val_files", mode="before")
    @classmethod
    def _one_or_many(cls, files: Any) -> Any:
        return (files,) if isinstance(files, str) else files

    @model_validator(mode="after")
    def _complete(self) -> DataConfig:
        if self.source in ("text", "jsonl", "parquet") and not self.files:
            raise ValueError(f"data.source={self.source} needs data.files, a path or a glob: data.files='corpus/*.txt'")
        if self.source == "python_env" and not self.packages:
            raise ValueError("data.source=python_env needs data.packages, for example data.packages=[torch,numpy]")
        if self.source == "huggingface" and not self.path:
            raise ValueError("data.source=huggingface needs data.path, the dataset's name or a local folder")
        return self


class TokenizerConfig(Strict):
    """kind: bytes (256 values and an end-of-document token) | bpe (trained on the corpus, vocab_size tokens) |
    huggingface (path: a name on the hub, a folder, or a tokenizer.json; eos_token: the token that ends a document,
    where the tokenizer's own files do not name it)."""

    kind: Literal["bytes", "bpe", "huggingface"]
    vocab_size: int | None = Field(None, gt=256)
    path: str | None = None
    eos_token: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> TokenizerConfig:
        if self.kind == "bpe" and self.vocab_size is None:
            raise ValueError("tokenizer.kind=bpe needs tokenizer.vocab_size, for example 4096")
        if self.kind == "huggingface" and not self.path:
            raise ValueError("tokenizer.kind=huggingface needs tokenizer.path: a name, a folder or a tokenizer.json")
        return self


class OptimizerConfig(Strict):
    """AdamW as the papers run it: decay on the block linears, none on embeddings, lm_head and norms."""

    name: Literal["adamw"]
    lr: float = Field(gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)


class SchedulerConfig(Strict):
    """Learning rate over the run, as a factor of optimizer.lr: warm-up from start_factor to 1 over warmup_fraction of
    the steps, then cosine to final_factor, or constant until the last decay_fraction of the steps (wsd)."""

    name: Literal["cosine", "wsd"]
    warmup_fraction: float = Field(0.1, ge=0, lt=1)
    decay_fraction: float = Field(0.2, gt=0, le=1)
    start_factor: float = Field(0.01, ge=0, le=1)
    final_factor: float = Field(0.1, ge=0, le=1)


class TrainerConfig(Strict):
    """The budget (exactly one of tokens, tokens_per_parameter), the batch, and the machine.

    batch_tokens: tokens per optimiser step; micro_batch_size: sequences per device and forward.
    device: auto | cpu | cuda; devices: how many of them, per node.
    """

    tokens: int | None = Field(None, gt=0)
    tokens_per_parameter: float | None = Field(None, gt=0)
    batch_tokens: int = Field(gt=0)
    micro_batch_size: int = Field(gt=0)
    grad_clip: float | None = Field(1.0, gt=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = Field(1, gt=0)
    precision: Literal["bf16-mixed", "32-true"] = "bf16-mixed"
    compile: bool = False

    @model_validator(mode="after")
    def _one_budget(self) -> TrainerConfig:
        if (self.tokens is None) == (self.tokens_per_parameter is None):
            raise ValueError(
                f"give exactly one of trainer.tokens (found {self.tokens}) and trainer.tokens_per_parameter "
                f"(found {self.tokens_per_parameter}); set the other to null"
            )
        return self


class CallbacksConfig(Strict):
    """What is watched, in optimiser steps. val_every_steps and checkpoint_every_steps: None is a tenth of the run."""

    log_every_steps: int = Field(gt=0)
    val_every_steps: int | None = Field(None, gt=0)
    checkpoint_every_steps: int | None = Field(None, gt=0)
    keep_checkpoints: int = Field(2, ge=1)
    progress_bar: bool = True
    sample_tokens: int = Field(ge=0)
    sample_prompt: str = Field("\n", min_length=1)


class LoggerConfig(Strict):
    """metrics.jsonl is always written; kind adds a mirror of it: none | wandb | tensorboard."""

    kind: Literal["none", "wandb", "tensorboard"] = "none"
    project: str = "qtrain"
    entity: str | None = None
    group: str | None = None
    offline: bool | None = Field(None, description="wandb: None is offline unless an API key is found")


class DebugConfig(Strict):
    """max_steps: stop after so many (the schedule ends there); overfit: train on the first batch only;
    detect_anomaly: torch's autograd anomaly mode."""

    max_steps: int | None = Field(None, gt=0)
    overfit: bool = False
    detect_anomaly: bool = False


class Config(Strict):
    """One run. Keys that cannot change the result (`NOT_IN_HASH`) are left out of the run's hash."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0, lt=2**31)
    run_root: str = "runs"
    run_dir: str | None = None
    force: bool = False
    dry_run: bool = False
    backend: Backend = "auto"
    model: ModelConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    recipe: LinearRecipe
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    trainer: TrainerConfig
    callbacks: CallbacksConfig
    logger: LoggerConfig
    debug: DebugConfig


NOT_IN_HASH = (
    "name",  # stands beside the hash
    "run_root",
    "run_dir",
    "force",
    "dry_run",
    "backend",  # every backend equals the reference
    "data.cache_dir",
    "data.num_workers",
    "data.prepare_workers",
    "trainer.device",
    "trainer.devices",
    "trainer.compile",
    "callbacks",
    "logger",
    "debug.detect_anomaly",
    "recipe.source",
)


def result_keys(config: Config, exclude_defaults: bool = False) -> dict[str, Any]:
    """The settings that determine the result, as plain nested data."""
    tree = config.model_dump(mode="json", exclude_defaults=exclude_defaults)
    for key in NOT_IN_HASH:
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.get(parent, {})
        node.pop(leaf, None)
    return tree


def config_hash(config: Config) -> str:
    """Eight hex digits of the settings that determine the result. Those that equal the default of their class are left
    out: a setting that comes later, with what was done before as its default, keeps every run's name."""
    tree = result_keys(config, exclude_defaults=True)
    overrides = tree.get("recipe", {}).get("overrides", {})  # the first match holds: their order counts
    if overrides:
        pairs = ((pattern, {k: v for k, v in other.items() if k != "source"}) for pattern, other in overrides.items())
        tree["recipe"]["overrides"] = list(pairs)
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


# ----------------------------------------------------------------------------------------------------- reading


def configs_dir() -> Path:
    """The folder of config groups: inside the installed package, or at the root of a checkout."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "configs"


def group_names(group: str) -> list[str]:
    """The names that a config group offers: `group_names("recipe")` -> ["bf16", "quartet", ...]. A file whose name
    begins with _ is a part that others share."""
    root = configs_dir() / group
    files = [path for path in root.rglob("*.yaml") if not path.name.startswith("_")]
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in files)


def read_recipe(recipe: str | Mapping[str, Any] | LinearRecipe) -> LinearRecipe:
    """A recipe by name ("quartet"), as a mapping, or as itself. UserError for an unknown name or key.

    A mapping {"name": "quest", "bits": 2} whose name is a shipped recipe and that brings no GEMMs overrides it.
    """
    if isinstance(recipe, LinearRecipe):
        return recipe
    if isinstance(recipe, str):
        recipe = {"name": recipe}
    if not isinstance(recipe, Mapping):
        raise UserError(f"a recipe is a name, a mapping or a LinearRecipe; got {type(recipe).__name__} {recipe!r}")
    tree = dict(recipe)
    if not {"fprop", "dgrad", "wgrad"} & set(tree):
        if "name" not in tree:
            raise UserError("a recipe needs a name ({name: quest, bits: 2}), or fprop, dgrad and wgrad written out")
        name = str(tree["name"])
        known = group_names("recipe")
        if name not in known:
            raise UserError(f"unknown recipe {name!r}{_nearest(name, known)}; recipes: {', '.join(known)}")
        tree = yaml.safe_load((configs_dir() / "recipe" / f"{name}.yaml").read_text()) | tree
    return parse(LinearRecipe, tree)


def parse(kind: type[T], tree: Mapping[str, Any]) -> T:
    """tree -> kind, strictly. UserError lists every problem: the key, what was found, what to do."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(kind, problem) for problem in error.errors()]
        raise UserError("\n".join(lines)) from None


def check_key(key: str) -> None:
    """UserError when no setting has this dotted name, with the nearest one that exists."""
    parts = key.split(".")
    for depth, name in enumerate(parts):
        parents = parts[:depth]
        valid = _fields_at(Config, parents)
        if name in valid:
            continue
        if not valid:
            raise UserError(f"unknown key {key!r}: {'.'.join(parents)} is a value, it has no keys")
        hint = _nearest(name, valid, parents) or _nearest_leaf(name)
        where = f"keys of {'.'.join(parents)}" if parents else "keys"
        raise UserError(f"unknown key {key!r}{hint}; {where}: {', '.join(valid)}")


def _nearest_leaf(name: str) -> str:
    """A hint at a key of any group: lrr -> optimizer.lr."""
    leaves = {leaf: f"{group}.{leaf}" for group in Config.model_fields for leaf in _fields_at(Config, [group])}
    match = difflib.get_close_matches(name, leaves, n=1, cutoff=0.6)
    return f"; did you mean {leaves[match[0]]!r}?" if match else ""


def check_group_option(group: str, option: str) -> None:
    """UserError when configs/<group>/ has no such option, with the nearest one that it has."""
    known = group_names(group)
    if option not in known:
        raise UserError(f"unknown {group} {option!r}{_nearest(option, known)}; there are: {', '.join(known)}")


def _explain(kind: type[Strict], problem: Any) -> str:
    *parents, leaf = (str(part) for part in problem["loc"]) if problem["loc"] else ("",)
    path = ".".join([*parents, leaf])
    found = problem["input"]
    if problem["type"] == "extra_forbidden":
        valid = list(_fields_at(kind, parents))
        where = ".".join(parents) or "the config"
        hint = _nearest(leaf, valid, parents)
        return f"unknown key {path!r} (found {found!r}){hint}; keys of {where}: {', '.join(valid)}"
    if problem["type"] == "missing":
        return f"missing key {path!r}; set it in a config file or as {path}=..."
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(found, Mapping) or not path:
        return message
    return f"{path}={found!r}: {message}"


def _fields_at(kind: type[BaseModel], parents: list[str]) -> list[str]:
    for name in parents:
        field = kind.model_fields.get(name)
        options = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        nested = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        if not nested:
            return []
        kind = nested[0]
    return list(kind.model_fields)


def _nearest(name: str, valid: list[str], parents: list[str] | None = None) -> str:
    match = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {'.'.join([*(parents or []), match[0]])!r}?" if match else ""
