"""Every setting of a run: typed, frozen, strict. All validation of a run's settings lives here.

The YAML files under configs/ hold the values, the classes here hold the meaning.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from qtrain.config.recipe import LinearRecipe
from qtrain.config.settings import BFLOAT16_GEMMS, Backend, Checkpointing, GemmKind, Strict, family, fields_at, nearest
from qtrain.errors import UserError

if TYPE_CHECKING:
    from qtrain.optim.base import OptimizerSettings, Schedule
else:
    OptimizerSettings, Schedule = family("qtrain.optim.optimizers"), family("qtrain.optim.schedules")


LARGEST = 1 << 24  # of a model's dimensions: beyond any memory, and still to be multiplied


class ModelConfig(Strict):
    """A Llama: RMSNorm, RoPE, SwiGLU, grouped-query attention. nominal_parameters is the paper's name for the size
    (30M -> 30e6): a token budget per parameter counts it where it is given, else the non-embedding parameters."""

    name: str
    dim: int = Field(gt=0, le=LARGEST)
    n_layers: int = Field(gt=0, le=1_000)
    n_heads: int = Field(gt=0, le=LARGEST)
    n_kv_heads: int | None = Field(None, gt=0)
    ffn_dim: int = Field(gt=0, le=LARGEST)
    seq_len: int = Field(gt=1, le=LARGEST)
    tie_embeddings: bool = False
    vocab_size: int | None = Field(None, gt=0, le=LARGEST)
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


class TrainerConfig(Strict):
    """The budget (exactly one of tokens, tokens_per_parameter), the batch, and the machine.

    batch_tokens: tokens per optimiser step; micro_batch_size: sequences per device and forward.
    device: auto | cpu | cuda; devices: how many of them, per node; num_nodes: how many nodes.
    strategy: auto (one device alone, several by ddp) | ddp (each device holds the whole model) | fsdp2 (parameters,
        gradients and optimiser state are sharded over the devices).
    sharding_groups: fsdp2 within each of so many groups of devices, which hold a whole model each (hybrid sharding).
    checkpoint_activations: none | selective (each block keeps its matrix products and attention, and computes the rest
        again in the backward) | full (each block keeps its input alone). Gradients are the same, bit for bit.
    chunked_loss: take the head's cross-entropy by chunks of tokens, so that the logits, the largest tensor of a small
        model with a large vocabulary, never exist as a whole. The result differs by rounding.
    on_divergence: what to do when a loss or gradient norm is not finite: stop | skip the update | rewind to the last
        checkpoint and go on with the data that comes next. on_spike: ignore | log | skip | rewind, when one lies more
        than six standard deviations above its last 128. All but stop and ignore wait for the device at each step.
    precision: bf16-mixed | 32-true | auto, which is bf16-mixed where the device has units for bfloat16, or where
        gemm=fp8 needs it, and 32-true elsewhere. The settings of a run hold what auto came to: see
        `qtrain.plan.resolve_precision`.
    share_trunk: wsd runs that differ in their budget alone compute what they have in common once. Each leaves its state
        before its decay in run_root/trunks, and starts from the longest that another left there: the same result, bit
        for bit.
    """

    tokens: int | None = Field(None, gt=0)
    tokens_per_parameter: float | None = Field(None, gt=0)
    batch_tokens: int = Field(gt=0)
    micro_batch_size: int = Field(gt=0)
    grad_clip: float | None = Field(1.0, gt=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = Field(1, gt=0)
    num_nodes: int = Field(1, gt=0)
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    sharding_groups: int = Field(1, gt=0)
    checkpoint_activations: Checkpointing = "none"
    chunked_loss: bool = False
    on_divergence: Literal["stop", "skip", "rewind"] = "stop"
    on_spike: Literal["ignore", "log", "skip", "rewind"] = "ignore"
    precision: Literal["auto", "bf16-mixed", "32-true"] = "auto"
    compile: bool = False
    share_trunk: bool = False

    @model_validator(mode="after")
    def _one_budget(self) -> TrainerConfig:
        if (self.tokens is None) == (self.tokens_per_parameter is None):
            raise ValueError(
                f"give exactly one of trainer.tokens (found {self.tokens}) and trainer.tokens_per_parameter "
                f"(found {self.tokens_per_parameter}); set the other to null"
            )
        return self


class CallbacksConfig(Strict):
    """What is watched, in optimiser steps. val_every_steps and checkpoint_every_steps: None is a tenth of the run.

    checkpoint_every_minutes: a checkpoint also each time that so many minutes have passed since the last.
    sample_tokens: how many to sample at the end of the run; None is 200 for a model of at most 10M parameters, else 0.
    telemetry_every_steps: how often the quantisers' health is taken, layer by layer; None is a twentieth of the run but
        no fewer than 40 steps, which costs at most 3% of its time; 0 is never.
    telemetry_gradients: compare weight gradients with those without quantisers there, for one more forward and
        backward.
    profile_steps: record so many steps by torch's profiler, soon after the start: run_dir/profile holds a trace of each
        rank, for ui.perfetto.dev.
    """

    log_every_steps: int = Field(gt=0)
    val_every_steps: int | None = Field(None, gt=0)
    checkpoint_every_steps: int | None = Field(None, gt=0)
    checkpoint_every_minutes: float = Field(15.0, gt=0)
    telemetry_every_steps: int | None = Field(None, ge=0)
    telemetry_gradients: bool = False
    profile_steps: int = Field(0, ge=0)
    keep_checkpoints: int = Field(2, ge=1)
    progress_bar: bool = True
    sample_tokens: int | None = Field(None, ge=0)
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
    """One run. Keys that cannot change the result (`qtrain.config.identity.NOT_IN_HASH`) are not in the run's hash.

    results: a CSV file: a run whose row it has is done; a run that ends adds its row.
    retry_failed: false leaves runs alone that ended in an error or diverged.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0, lt=2**31)
    run_root: str = "runs"
    run_dir: str | None = None
    force: bool = False
    dry_run: bool = False
    results: str | None = None
    retry_failed: bool = True
    backend: Backend = "auto"
    gemm: GemmKind = "auto"
    model: ModelConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    recipe: LinearRecipe
    optimizer: OptimizerSettings
    scheduler: Schedule
    trainer: TrainerConfig
    callbacks: CallbacksConfig
    logger: LoggerConfig
    debug: DebugConfig

    @model_validator(mode="after")
    def _fp8_gives_bfloat16(self) -> Config:
        if self.gemm in BFLOAT16_GEMMS and self.trainer.precision == "32-true":
            raise ValueError(
                f"gemm={self.gemm} gives products in bfloat16, and trainer.precision is {self.trainer.precision}; set "
                "trainer.precision=bf16-mixed or gemm=auto"
            )
        return self

    @model_validator(mode="after")
    def _what_a_trunk_needs(self) -> Config:
        if self.trainer.share_trunk and self.scheduler.shared_until(1) is None:
            raise ValueError(
                f"trainer.share_trunk=true needs scheduler=wsd, whose learning rate is the same for every budget until "
                f"its decay; scheduler is {self.scheduler}"
            )
        if self.trainer.share_trunk and self.data.streaming and self.data.max_tokens is None:
            raise ValueError(
                "trainer.share_trunk=true needs the same data for every budget, but a streamed source is read to the "
                "budget's end; set data.max_tokens to the largest one"
            )
        return self


def check_key(key: str) -> None:
    """UserError when no setting has this dotted name, with the nearest one that exists."""
    parts = key.split(".")
    for depth, name in enumerate(parts):
        parents = parts[:depth]
        valid = fields_at(Config, parents)
        if name in valid:
            continue
        if not valid:
            raise UserError(f"unknown key {key!r}: {'.'.join(parents)} is a value, it has no keys")
        hint = nearest(name, valid, parents) or _nearest_leaf(name)
        where = f"keys of {'.'.join(parents)}" if parents else "keys"
        raise UserError(f"unknown key {key!r}{hint}; {where}: {', '.join(valid)}")


def _nearest_leaf(name: str) -> str:
    """A hint at a key of any group: lrr -> optimizer.lr."""
    leaves = {leaf: f"{group}.{leaf}" for group in Config.model_fields for leaf in fields_at(Config, [group])}
    match = difflib.get_close_matches(name, leaves, n=1, cutoff=0.6)
    return f"; did you mean {leaves[match[0]]!r}?" if match else ""
