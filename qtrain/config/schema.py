"""Every setting of a run: typed, frozen, strict. All validation of a run's settings lives here.

The YAML files under configs/ hold the values, the classes here hold the meaning.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from qtrain.config.recipe import LinearRecipe
from qtrain.config.settings import (
    BFLOAT16_GEMMS,
    Backend,
    Checkpointing,
    GemmKind,
    Names,
    Strict,
    family,
    fields_at,
    is_mapping_at,
    nearest,
)
from qtrain.errors import UserError

if TYPE_CHECKING:
    from qtrain.data.base import DataSettings
    from qtrain.data.base import DataSettings as Source
    from qtrain.models.base import ModelSettings
    from qtrain.optim.base import OptimizerSettings, Schedule
else:
    ModelSettings, DataSettings = family("qtrain.models.families"), family("qtrain.data.sources")
    Source = family("qtrain.data.sources", without="mixture")
    OptimizerSettings, Schedule = family("qtrain.optim.optimizers"), family("qtrain.optim.schedules")


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")  # peft's names


class TokenizerConfig(Strict):
    """How text becomes tokens.

    kind: bytes (256 values and an end-of-document token) | bpe (trained on the corpus) | huggingface.
    vocab_size: tokens that bpe makes, at most.
    path: of huggingface: a name on the hub, a folder, or a tokenizer.json.
    eos_token: of huggingface: the token that ends a document, where the tokenizer's own files do not name it.
    """

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

    tokens: the budget of the run, or null where tokens_per_parameter says it.
    tokens_per_parameter: the budget as a multiple of the parameters outside the embeddings.
    batch_tokens: tokens per optimiser step.
    micro_batch_size: sequences per device and forward.
    grad_clip: the largest norm of the gradient, which a larger one is scaled down to; None clips nothing.
    device: auto (cuda where there is one) | cpu | cuda.
    devices: devices of each node.
    num_nodes: nodes.
    strategy: auto (one device alone, several by ddp) | ddp (each device holds the whole model) | fsdp2 (parameters,
        gradients and optimiser state are sharded over the devices).
    sharding_groups: fsdp2 within each of so many groups of devices, which hold a whole model each (hybrid sharding).
    all_gather: what fsdp2 sends of a weight before it is used: full (float32) | quantized (its packed codes and scales:
        the same weights after every step, or a refusal of a recipe whose codes cannot be made of shards).
    device_tflops: what a device computes, in 10^12 model FLOP per second that it reaches in training, not its peak.
        dry_run takes its hours from it; nothing else reads it.
    device_gigabytes_per_second: what a device sends to others, in 10^9 bytes per second. dry_run takes its hours from
        it; nothing else reads it.
    timeout_minutes: how long a rank waits for another in a collective before the job ends with exit code 75. What one
        rank does alone must fit into it, as reading a whole checkpoint when the run goes on does.
    checkpoint_activations: none | selective (each block keeps its matrix products and attention, and computes the rest
        again in the backward) | full (each block keeps its input alone). Without trainer.compile the gradients
        are the same, bit for bit.
    chunked_loss: take the head's cross-entropy by chunks of tokens, so that the logits, the largest tensor of a small
        model with a large vocabulary, never exist as a whole. The result differs by rounding.
    on_divergence: what to do when a loss or gradient norm is not finite: stop | skip the update | rewind to the last
        checkpoint and go on with the data that comes next. All but stop wait for the device at each step.
    on_spike: what to do when a loss or gradient norm lies more than six standard deviations above its last 128:
        ignore | log | skip | rewind. All but ignore wait for the device at each step.
    precision: bf16-mixed | 32-true | auto, which is bf16-mixed where the device has units for bfloat16, or where
        gemm=fp8 needs it, and 32-true elsewhere. The settings of a run hold what auto came to: see
        `qtrain.plan.resolve_precision`.
    compile: compile the model with torch.compile, which changes the result by rounding.
    early_stop: end the run, as finished, after so many validations in a row of which none was better than the best
        before; None trains the whole budget. The learning rate is then what the schedule had there.
    share_trunk: let wsd runs that differ in their budget alone compute what they have in common once. Each leaves its
        state before its decay in run_root/trunks, and starts from the longest that another left there: the same result,
        bit for bit.
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
    all_gather: Literal["full", "quantized"] = "full"
    device_tflops: float | None = Field(None, gt=0)
    device_gigabytes_per_second: float | None = Field(None, gt=0)
    timeout_minutes: float = Field(10.0, gt=0)
    checkpoint_activations: Checkpointing = "none"
    chunked_loss: bool = False
    on_divergence: Literal["stop", "skip", "rewind"] = "stop"
    on_spike: Literal["ignore", "log", "skip", "rewind"] = "ignore"
    precision: Literal["auto", "bf16-mixed", "32-true"] = "auto"
    compile: bool = False
    early_stop: int | None = Field(None, gt=0)
    share_trunk: bool = False

    @property
    def world_size(self) -> int:
        """Devices of all nodes together, each of which has a process."""
        return self.devices * self.num_nodes

    @property
    def shards(self) -> int:
        """Over how many devices the state of a model is split."""
        return self.world_size // self.sharding_groups if self.strategy == "fsdp2" else 1

    @model_validator(mode="after")
    def _one_budget(self) -> TrainerConfig:
        if (self.tokens is None) == (self.tokens_per_parameter is None):
            raise ValueError(
                f"give exactly one of trainer.tokens (found {self.tokens}) and trainer.tokens_per_parameter "
                f"(found {self.tokens_per_parameter}); set the other to null"
            )
        return self


class CallbacksConfig(Strict):
    """What is watched, in optimiser steps.

    log_every_steps: how often loss, gradient norm and speed are written.
    val_every_steps: how often the validation loss is taken; None is a tenth of the run.
    checkpoint_every_steps: how often a checkpoint is written; None is a tenth of the run.
    checkpoint_every_minutes: a checkpoint also each time that so many minutes have passed since the last.
    telemetry_every_steps: how often the quantisers' health is taken, layer by layer; None is a twentieth of the run but
        no fewer than 40 steps, which costs at most 3% of its time; 0 is never.
    telemetry_gradients: compare weight gradients with those without quantisers there, for one more forward and
        backward.
    keep_checkpoints: how many of the newest checkpoints stay.
    keep_best: write the weights of the lowest validation loss to run_dir/best.safetensors, beside the checkpoints.
    profile_steps: record so many steps by torch's profiler, soon after the start: run_dir/profile holds a trace of each
        rank, for ui.perfetto.dev.
    tasks: task files of lm-evaluation-harness (extra `eval`): the model's scores on them are taken at the end of the
        run. Rank 0 takes them alone, within trainer.timeout_minutes, and other ranks wait. trainer.strategy=fsdp2
        refuses them.
    tasks_every_steps: how often they are taken before the end; None is never.
    tasks_limit: documents of each task; None is all.
    progress_bar: show one, where the output is a terminal.
    """

    log_every_steps: int = Field(gt=0)
    val_every_steps: int | None = Field(None, gt=0)
    checkpoint_every_steps: int | None = Field(None, gt=0)
    checkpoint_every_minutes: float = Field(15.0, gt=0)
    telemetry_every_steps: int | None = Field(None, ge=0)
    telemetry_gradients: bool = False
    profile_steps: int = Field(0, ge=0)
    keep_checkpoints: int = Field(2, ge=1)
    keep_best: bool = False
    tasks: Names = ()
    tasks_every_steps: int | None = Field(None, gt=0)
    tasks_limit: int | None = Field(None, gt=0)
    progress_bar: bool = True

    @model_validator(mode="after")
    def _of_tasks(self) -> CallbacksConfig:
        for name in ("tasks_every_steps", "tasks_limit"):
            if (value := getattr(self, name)) is not None and not self.tasks:
                raise ValueError(
                    f"callbacks.{name}={value} is about the files of callbacks.tasks, which names none; set "
                    f"callbacks.tasks=[FILE.yaml], or callbacks.{name}=null"
                )
        return self


class LoggerConfig(Strict):
    """metrics.jsonl is always written; a logger mirrors it.

    kind: none | wandb | tensorboard.
    project: of W&B: the project that runs are put into.
    entity: of W&B: the user or team that has the project; None is the one of the API key.
    group: of W&B: a name that several runs share, to be shown together.
    offline: of W&B: write below the run directory alone, for `wandb sync`; None does so where no API key is found.
    per_layer: mirror the telemetry of each layer, hundreds of series; else mean and worst over the layers, as
        quant_mean/<operand>/<metric> and quant_worst/<operand>/<metric>. metrics.jsonl has that of each layer.
    """

    kind: Literal["none", "wandb", "tensorboard"] = "none"
    project: str = "qtrain"
    entity: str | None = None
    group: str | None = None
    offline: bool | None = None
    per_layer: bool = False


class AdapterConfig(Strict):
    """LoRA (arXiv 2106.09685): a product of two small matrices beside a frozen linear layer.

    y = base(x) + alpha / rank * B A dropout(x), A (rank, in), B (out, rank). B starts at zero, A from kaiming_uniform
    with a = sqrt(5), as peft does it.

    rank: of the product.
    alpha: the product counts alpha / rank times.
    dropout: the share of inputs of the product that is left out in training.
    layers: linear layers by full name, last component or pattern, as in recipe.skip; () takes all but lm_head.
    pack: keep the base as the codes of the recipe's forward, without the weights that they were made of (QLoRA, arXiv
        2305.14314, with recipe=nf4).
    double_quantization: also store the scales of a packed base's blocks in 8 bits, as QLoRA does.
    init_from: a folder with an adapter in peft's format to start from.
    init_hash: hash of that adapter; found out when it is read, not to be set.
    """

    rank: int = Field(16, gt=0)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    layers: Names = ()
    pack: bool = False
    double_quantization: bool = False
    init_from: str | None = None
    init_hash: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_adapter(cls, tree: Any) -> Any:
        """Settings that were read once have the hash, and need the adapter no more. One that is not there is told when
        it is loaded."""
        if not isinstance(tree, Mapping) or not tree.get("init_from") or tree.get("init_hash") is not None:
            return tree
        folder = Path(os.path.expanduser(str(tree["init_from"])))  # noqa: PTH111 (Path raises for a user that is not there)
        files = [folder / name for name in ADAPTER_FILES]
        if not all(map(os.path.isfile, files)):
            return tree
        return {**tree, "init_hash": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()}

    @model_validator(mode="after")
    def _of_packed(self) -> AdapterConfig:
        if self.double_quantization and not self.pack:
            raise ValueError(
                "tune.adapter.double_quantization=true stores scales of a packed base; set tune.adapter.pack=true"
            )
        return self


class MovesConfig(Strict):
    """PV-Tuning (arXiv 2405.14852): integer codes move with the scales, and all that is no code trains beside them.

    In each step, Adam without a mean of gradients moves a virtual weight, which is rounded under the scales. Of the
    codes that would change, those whose virtual weight moved furthest do.

    lr: the learning rate of the virtual weight, which the schedule scales as it does optimizer.lr.
    beta2: how much of its mean squared gradient the virtual weight keeps.
    largest_change: of a layer in one step, the norm of the change over the norm of the weight.
    """

    lr: float = Field(1e-2, gt=0)
    beta2: float = Field(0.95, ge=0, lt=1)
    largest_change: float = Field(1e-2, gt=0)


class ScalesConfig(Strict):
    """PEQA (arXiv 2305.14152): each linear layer but lm_head becomes frozen integer codes, whose scales alone train.

    bits: of a code.
    group: weights along the inputs that share a scale and a zero point; None is a whole row.
    moves: how the codes move as well (PV-Tuning); {} takes the defaults of its settings, None freezes the codes, and
        all else but the scales.
    """

    bits: int = Field(4, ge=2, le=8)
    group: int | None = Field(None, gt=0)
    moves: MovesConfig | None = None


class RowsConfig(Strict):
    """EfQAT (arXiv 2411.11038): of each quantised layer's weight only the most important rows (output channels) train,
    those of the largest mean magnitude; the weight's gradient is computed for these alone. What a recipe quantises
    otherwise, and what is no quantised layer (embeddings, norms), trains as ever.

    fraction: of the rows, rounded up.
    refresh_samples: the rows are chosen anew after so many sequences.
    """

    fraction: float = Field(0.25, gt=0, lt=1)
    refresh_samples: int = Field(4096, gt=0)


class TeacherConfig(Strict):
    """Distillation from the pretrained model, which computes without quantisers (QAD).

    The loss is weight * temperature^2 * KL(teacher || student) + (1 - weight) * cross-entropy, both of the tokens that
    count, of which the KL divergence takes logits divided by the temperature. Validation stays the cross-entropy.

    temperature: by which logits are divided.
    weight: the share of the KL divergence in the loss.
    """

    temperature: float = Field(1.0, gt=0)
    weight: float = Field(1.0, gt=0, le=1)


class TuneConfig(Strict):
    """What of a pretrained model trains, and by which loss; None: all weights, by the cross-entropy.

    adapter: adapters beside the linear layers, and nothing else.
    scales: those of integer codes, and nothing else; with scales.moves the codes and all else too.
    rows: the most important rows of each quantised weight.
    teacher: the loss of a student of the pretrained model.
    """

    adapter: AdapterConfig | None = None
    scales: ScalesConfig | None = None
    rows: RowsConfig | None = None
    teacher: TeacherConfig | None = None

    @property
    def freezes(self) -> bool:
        """Whether what trains is something else than the weights."""
        return self.adapter is not None or self.scales is not None

    @model_validator(mode="after")
    def _one_kind(self) -> TuneConfig:
        kinds = [name for name in ("adapter", "scales", "rows") if getattr(self, name) is not None]
        if len(kinds) > 1:
            raise ValueError(f"tune.{kinds[0]} and tune.{kinds[1]} each say what trains; set one of them to null")
        return self


class DebugConfig(Strict):
    """For finding mistakes.

    max_steps: end the run, and its schedule, after so many steps.
    overfit: train on the first batch only.
    detect_anomaly: torch's autograd anomaly mode.
    """

    max_steps: int | None = Field(None, gt=0)
    overfit: bool = False
    detect_anomaly: bool = False


class Config(Strict):
    """One run. Keys that cannot change the result (`qtrain.config.identity.NOT_IN_HASH`) are not in the run's hash.

    name: how the run is called in directories, tables and figures; the recipe's name where none is given.
    seed: weights, order of the data and rounding noise are functions of it.
    run_root: the folder that run directories are made in.
    run_dir: the run directory itself; None is run_root/<name>-<hash of the settings that determine the result>.
    force: move an existing run directory aside, and start anew.
    dry_run: print the plan, and stop.
    backend: what quantises: auto | reference | compiled | triton. All give the same numbers, at different speed.
    gemm: what multiplies: auto (integer codes on INT8 units, exactly) | float | fp8 (MXFP4 and FP8 on FP8 units
        besides) | fp8_fast (with their own, shorter sums) | fp4 (on FP4 units).
    validation: further sources of text to validate on, by name, each with a loss of its own: on the validation split
        that the source names, else on all of its text. val_loss stays that of `data`.
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
    model: ModelSettings
    data: DataSettings
    validation: dict[str, Source] = Field(default_factory=dict)
    tokenizer: TokenizerConfig
    recipe: LinearRecipe
    tune: TuneConfig | None = None
    optimizer: OptimizerSettings
    scheduler: Schedule
    trainer: TrainerConfig
    callbacks: CallbacksConfig
    logger: LoggerConfig
    debug: DebugConfig

    @model_validator(mode="after")
    def _further_sources(self) -> Config:
        for name, source in self.validation.items():
            source.check_beside(f"validation.{name}")
            if name in self.data.names:
                raise ValueError(
                    f"validation.{name} is a part of data too, which is validated on; give it another name"
                )
        return self

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
        if self.trainer.share_trunk and self.data.reads_to_the_budget:
            raise ValueError(
                "trainer.share_trunk=true needs the same data for every budget, but a streamed source is read to the "
                "budget's end; set data.max_tokens to the largest one"
            )
        if self.trainer.share_trunk and self.trainer.early_stop and self.callbacks.val_every_steps is None:
            raise ValueError(
                f"trainer.share_trunk=true needs validations at the same steps for every budget, since "
                f"trainer.early_stop={self.trainer.early_stop} counts them, and without callbacks.val_every_steps each "
                "budget has ten; set callbacks.val_every_steps"
            )
        return self


def check_key(key: str) -> None:
    """UserError when no setting has this dotted name, with the nearest one that exists."""
    parts = key.split(".")
    for depth, name in enumerate(parts):
        parents = parts[:depth]
        valid = fields_at(Config, parents)
        if name in valid or is_mapping_at(Config, parents):
            continue
        if not valid:
            raise UserError(f"unknown key {key!r}: {'.'.join(parents)} is a value, it has no keys")
        groups = [each for each in valid if fields_at(Config, [*parents, each])]
        exact = _nearest_leaf(name, 1.0) if len(parts) == 1 else ""
        hint = exact or nearest(name, valid if depth + 1 == len(parts) else groups, parents) or _nearest_leaf(name)
        where = f"keys of {'.'.join(parents)}" if parents else "keys"
        raise UserError(f"unknown key {key!r}{hint}; {where}: {', '.join(valid)}")


def _nearest_leaf(name: str, cutoff: float = 0.6) -> str:
    """A hint at a key of any group: lrr -> optimizer.lr."""
    leaves = {leaf: f"{group}.{leaf}" for group in Config.model_fields for leaf in fields_at(Config, [group])}
    match = difflib.get_close_matches(name, leaves, n=1, cutoff=cutoff)
    return f"; did you mean {leaves[match[0]]!r}?" if match else ""
