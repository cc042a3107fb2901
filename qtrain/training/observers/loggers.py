"""Mirrors of metrics.jsonl: Weights & Biases and TensorBoard, through Lightning's own loggers."""

from __future__ import annotations

import netrc
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from qtrain.config import Config
from qtrain.errors import UserError, need
from qtrain.runs.directory import RunDirectory

LOWEST_IS_WORST = ("sqnr_db", "mask_density", "cosine", "projection")  # of the telemetry; of the rest the highest is
SUMMARY = "run"  # the entry of a W&B summary that holds summary.json: metrics have their own, of the last line


def check_logger(config: Config) -> None:
    """UserError when the package that logger.kind needs is not installed, and where W&B has no key but must be
    reached."""
    kind = config.logger.kind
    if kind != "none":
        need(kind, f"logger={kind}", "logger=none")
    if kind == "wandb" and config.logger.offline is False and not has_wandb_key():
        raise UserError(
            "logger.offline=false needs a W&B key, and none was found; run `wandb login` or set WANDB_API_KEY, or "
            "leave logger.offline at null, which writes offline until there is a key"
        )


def build_loggers(config: Config, directory: RunDirectory) -> list[Logger]:
    """The mirrors that logger.kind asks for."""
    kind = config.logger.kind
    if kind == "none":
        return []
    if kind == "tensorboard":
        return [TensorBoardLogger(directory.path, name="", version="tensorboard")]
    return [_wandb(config, directory)]


def mirrored(line: Mapping[str, Any], per_layer: bool) -> dict[str, Any]:
    """What a mirror gets of a line of metrics.jsonl. per_layer: all of it. Else, in place of quant/<layer>/<operand>/
    <metric> and grad/<layer>/<metric>, the mean and the worst over the layers: quant_mean/<operand>/<metric> and so on.
    """
    if per_layer:
        return dict(line)
    rest, layers = {}, defaultdict(list)
    for name, value in line.items():
        kind, *parts = name.split("/")
        if kind in ("quant", "grad"):
            layers[kind, "/".join(parts[1:])].append(value)
        else:
            rest[name] = value
    for (kind, name), values in layers.items():
        worst = min if name.rpartition("/")[2] in LOWEST_IS_WORST else max
        rest |= {f"{kind}_mean/{name}": fmean(values), f"{kind}_worst/{name}": worst(values)}
    return rest


def mirror_summary(loggers: Iterable[Logger], summary: Mapping[str, Any]) -> None:
    """summary.json in the W&B run's own summary: its table shows run.status, `qtrain.report.wandb_runs` reads it."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update({SUMMARY: dict(summary)})


def close_loggers(loggers: Iterable[Logger]) -> None:
    """Lightning leaves the W&B run open, and the next run of a multirun would write into it."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def _wandb(config: Config, directory: RunDirectory) -> WandbLogger:
    """The run's id was drawn when its directory was made, so that every start of it writes to the same W&B run."""
    settings = config.logger
    offline = not has_wandb_key() if settings.offline is None else settings.offline
    import wandb

    experiment = wandb.init(  # ours, since Lightning's own call has a setting of which wandb warns
        name=directory.path.name,
        dir=directory.path,
        id=directory.wandb_id,
        project=settings.project,
        entity=settings.entity,
        group=settings.group,
        mode="offline" if offline else None,
        resume="allow",
        config=config.model_dump(mode="json"),
    )
    logger = WandbLogger(experiment=experiment, save_dir=directory.path)
    logger.experiment.define_metric("tokens")
    logger.experiment.define_metric("*", step_metric="tokens")
    return logger


def has_wandb_key() -> bool:
    """Whether an API key is at hand: WANDB_API_KEY, or an entry for wandb.ai in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb.ai" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False
