"""What a run will do, worked out from its settings before anything is built: sizes, steps, intervals, cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from rich.table import Table

from qtrain.config import Config, TokenizerConfig
from qtrain.config.naming import model_title
from qtrain.config.recipe import LinearRecipe, QuantSpec
from qtrain.config.settings import BFLOAT16_GEMMS
from qtrain.errors import UserError
from qtrain.metrics import flops_per_token
from qtrain.models.decoder import count_parameters
from qtrain_kernels.precision import has_bfloat16_units

MIN_TELEMETRY_STEPS = 40  # taking the quantisers' health once costs most of a step of a small model
BYTES_VOCABULARY = 257  # 256 values and the end-of-document token


@dataclass(frozen=True)
class RunPlan:
    """steps counts optimiser steps, each of batch_tokens tokens in micro_batches forwards per device; tokens and flops
    are the whole run's."""

    vocab_size: int
    parameters: int
    non_embedding_parameters: int
    steps: int
    batch_tokens: int
    micro_batches: int
    flops_per_token: int
    warmup_steps: int
    log_every_steps: int
    val_every_steps: int
    checkpoint_every_steps: int
    telemetry_every_steps: int

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_tokens

    @property
    def flops(self) -> int:
        return self.tokens * self.flops_per_token

    def table(self, config: Config, **more: str) -> Table:
        """The plan for a terminal. Each of `more` is a row of its own: table(config, run_directory="runs/...")."""
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for label, value in (self._rows(config) | more).items():
            table.add_row(label.replace("_", " "), value)
        return table

    def _rows(self, config: Config) -> dict[str, str]:
        model, optimizer, trainer = config.model, config.optimizer, config.trainer
        tied = "; tied embeddings" if model.tie_embeddings else ""
        kind = "nominal" if model.nominal_parameters else "non-embedding"
        masked = "; attention within documents" if config.data.document_mask else ""
        ratio = self.tokens / (model.nominal_parameters or self.non_embedding_parameters)
        schedule = f"{config.scheduler} after {self.warmup_steps:,} steps of warm-up"
        decay = f"weight decay {optimizer.weight_decay:g}, clip {trainer.grad_clip or 'off'}"
        return {
            "model": f"{model_title(model.model_dump())}: {model}, {model.shape()}",
            "parameters": f"{self.parameters:,} ({self.non_embedding_parameters:,} non-embedding{tied})",
            "recipe": describe_recipe(config.recipe),
            "tokens": f"{self.tokens:,} of {config.data}, {ratio:.3g} per {kind} parameter{masked}",
            "steps": f"{self.steps:,} of {self.batch_tokens:,} tokens ({self._split(config)})",
            "optimizer": f"{optimizer}, lr {optimizer.lr:g}, {schedule}, {decay}",
            "compute": f"{self.flops:.3g} FLOP",
            "precision": _describe_precision(config),
            "devices": _describe_devices(config),
            "every": f"log {self.log_every_steps:,}, validate {self.val_every_steps:,}, checkpoint "
            f"{self.checkpoint_every_steps:,} steps and {config.callbacks.checkpoint_every_minutes:g} minutes",
        }

    def _split(self, config: Config) -> str:
        size, length = config.trainer.micro_batch_size, config.model.seq_len
        devices = self.batch_tokens // (self.micro_batches * size * length)
        on_devices = f" on {devices} devices" if devices > 1 else ""
        return f"{self.micro_batches} x {size} sequences of {length}{on_devices}"


def resolve_precision(config: Config) -> Config:
    """config with trainer.precision=auto replaced by what it is on this machine; any other config as it is."""
    if config.trainer.precision != "auto":
        return config
    mixed = config.gemm in BFLOAT16_GEMMS or has_bfloat16_units(_device_type(config))
    trainer = config.trainer.model_copy(update={"precision": "bf16-mixed" if mixed else "32-true"})
    return config.model_copy(update={"trainer": trainer})


def _device_type(config: Config) -> str:
    """cuda | cpu: where the run would train."""
    device = config.trainer.device
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _describe_precision(config: Config) -> str:
    """The precision of a run and what it means on its device: the same words whether it was asked for or is auto's."""
    precision, device = config.trainer.precision, _device_type(config)
    units, mixed = has_bfloat16_units(device), precision == "bf16-mixed"
    found = f"{precision}: the {device} device has {'' if units else 'no '}bfloat16 units"
    if units == mixed:
        return found
    if units:
        return f"{found}, which bf16-mixed would use"
    why = f"gemm={config.gemm} needs bf16-mixed" if config.gemm in BFLOAT16_GEMMS else "32-true is faster"
    return f"{found} and takes bfloat16 products in float32; {why}"


def _describe_devices(config: Config) -> str:
    """How many devices train, and what each holds."""
    trainer = config.trainer
    count = trainer.world_size
    nodes = f" on {trainer.num_nodes} nodes" if trainer.num_nodes > 1 else ""
    if trainer.strategy == "fsdp2":
        quantized = trainer.all_gather == "quantized"
        travel = "weights travel as codes, gradients in float32" if quantized else "all travel in float32"
        groups = f" within each of {trainer.sharding_groups} groups" if trainer.sharding_groups > 1 else ""
        return f"{count}{nodes}: parameters, gradients and optimizer state sharded{groups}; {travel}"
    return f"{count}{nodes}" + (": each holds the whole model; gradients travel in float32" if count > 1 else "")


def make_plan(config: Config, vocab_size: int | None = None) -> RunPlan:
    """The plan of a run on the devices that the settings say.

    The vocabulary is model.vocab_size, else vocab_size (the prepared corpus's), else the tokenizer's. UserError when
    none of them says how large it is, or when batch_tokens is not whole micro-batches on every device.
    """
    trainer, callbacks = config.trainer, config.callbacks
    world_size = trainer.world_size
    vocab_size = config.model.vocab_size or vocab_size or _vocabulary(config.tokenizer)
    parameters, non_embedding = count_parameters(config.model, vocab_size)
    steps = max(1, budget_tokens(config) // trainer.batch_tokens)
    steps = min(steps, config.debug.max_steps or steps)
    tenth, health = math.ceil(steps / 10), callbacks.telemetry_every_steps
    return RunPlan(
        vocab_size=vocab_size,
        parameters=parameters,
        non_embedding_parameters=non_embedding,
        steps=steps,
        batch_tokens=trainer.batch_tokens,
        micro_batches=_micro_batches(config, world_size),
        flops_per_token=flops_per_token(config.model, vocab_size),
        warmup_steps=config.scheduler.warmup(steps),
        log_every_steps=callbacks.log_every_steps,
        val_every_steps=callbacks.val_every_steps or tenth,
        checkpoint_every_steps=callbacks.checkpoint_every_steps or tenth,
        telemetry_every_steps=max(MIN_TELEMETRY_STEPS, math.ceil(steps / 20)) if health is None else health,
    )


def budget_tokens(config: Config) -> int:
    """The tokens that the settings ask to train on: trainer.tokens, or tokens_per_parameter times the nominal (else the
    non-embedding) parameters. Known before the tokenizer is."""
    trainer = config.trainer
    if trainer.tokens is not None:
        return trainer.tokens
    assert trainer.tokens_per_parameter is not None
    _, non_embedding = count_parameters(config.model, 1)
    return math.floor(trainer.tokens_per_parameter * (config.model.nominal_parameters or non_embedding))


def describe_recipe(recipe: LinearRecipe) -> str:
    """One line: the formats of both operands of each GEMM, and where the recipe does not hold. Which layers its blocks
    are is the report's to say: it has seen the model."""
    operands = recipe.operands()
    gemms = [f"{gemm} " + " x ".join(map(_operand_format, pair, pair.values())) for gemm, pair in operands.items()]
    parts = [f"{recipe.name}: {', '.join(gemms) or 'every linear in the compute dtype'}"]
    parts += [f"not in {', '.join(recipe.skip)}"] if operands and recipe.skip else []
    parts += [f"{other.name} in {pattern}" for pattern, other in recipe.overrides.items()]
    after = recipe.high_precision_after
    parts += [] if after is None else [f"high precision after {after:.0%} of the steps"]
    return "; ".join(parts)


def _operand_format(operand: str, spec: QuantSpec) -> str:
    if spec.format != "none":
        return str(spec.format)
    return f"forward's {operand}" if spec.source == "forward" else "high precision"


def _vocabulary(tokenizer: TokenizerConfig) -> int:
    if tokenizer.kind == "bytes":
        return BYTES_VOCABULARY
    if tokenizer.vocab_size is None:
        raise UserError(
            f"the vocabulary of tokenizer.path={tokenizer.path} is not known before it is loaded; set model.vocab_size"
        )
    return tokenizer.vocab_size


def _micro_batches(config: Config, world_size: int) -> int:
    """Forwards per device and optimiser step."""
    batch, size = config.trainer.batch_tokens, config.trainer.micro_batch_size
    unit = size * config.model.seq_len * world_size
    if batch % unit == 0:
        return batch // unit
    below, above = batch // unit * unit, (batch // unit + 1) * unit
    nearest = f"{below} or {above}" if below else f"{above}"
    sequences = batch // (config.model.seq_len * world_size)
    fits = (n for n in range(1, min(size, sequences + 1)) if batch % (n * config.model.seq_len * world_size) == 0)
    smaller = max(fits, default=None)
    same_batch = f"trainer.micro_batch_size={smaller}, which keeps the batch, or " if smaller else ""
    raise UserError(
        f"trainer.batch_tokens={batch:,} must be a multiple of {unit:,} = trainer.micro_batch_size={size} x "
        f"model.seq_len={config.model.seq_len} x {world_size} device{'s' if world_size > 1 else ''}; "
        f"use {same_batch}trainer.batch_tokens={nearest}"
    )


def computes_in_high_precision(config: Config, plan: RunPlan, step: int) -> bool:
    """Whether optimiser step `step` (from 0) lies in the last part of the run, which the recipe gives to the compute
    dtype."""
    after = config.recipe.high_precision_after
    return after is not None and step >= after * plan.steps - 1e-6  # 0.28 * 25 is 7.000000000000001
