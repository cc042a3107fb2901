"""A W&B workspace and a report of qtrain's runs: every metric that a run writes, in named panels over tokens.

python scripts/wandb_dashboard.py entity/project            # needs an API key and the extra dashboard
python scripts/wandb_dashboard.py entity/project --dry-run  # print what it would hold
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

from qtrain.errors import UserError, need
from qtrain.training.observers.loggers import has_wandb_key

X_AXIS = "tokens"
OF_LAYERS = "(_mean|_worst|/[^/]+)"  # mean and worst over the layers; with logger.per_layer=true, each of them instead
OPERANDS = ("fprop.x", "fprop.w", "dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x")


@dataclass(frozen=True)
class Panel:
    """A line plot over X_AXIS. metrics: their names; pattern: a regular expression of names, of every layer one."""

    title: str
    metrics: tuple[str, ...] = ()
    pattern: str | None = None
    log_y: bool = False


@dataclass(frozen=True)
class Section:
    name: str
    panels: tuple[Panel, ...]
    is_open: bool = False


def dashboard() -> tuple[Section, ...]:
    """What workspace and report show, as plain data."""
    loss = (
        Panel("validation loss (nats per token)", ("val_loss",)),
        Panel("validation loss (bits per byte)", ("val_bits_per_byte",)),
        Panel("training loss (nats per token)", ("loss",)),
        Panel("validation loss by source (nats per token)", pattern=r"val_loss/.*"),
        Panel("validation loss by source (bits per byte)", pattern=r"val_bits_per_byte/.*"),
        Panel("validation tokens by source", pattern=r"val_tokens/.*"),
    )
    optimisation = (
        Panel("gradient norm before clipping", ("grad_norm",), log_y=True),
        Panel("learning rate", ("lr",)),
        Panel("compute (FLOP)", ("flops",)),
    )
    machine = (
        Panel("tokens per second", ("tokens_per_second",)),
        Panel("share of time waiting for data", ("data_wait",)),
        Panel("peak memory (bytes)", ("memory_bytes",)),
    )
    gradients = (
        Panel("cosine of quantised and exact weight gradient", pattern=rf"grad{OF_LAYERS}/cosine"),
        Panel("projection of quantised on exact weight gradient", pattern=rf"grad{OF_LAYERS}/projection"),
    )
    return (
        Section("Loss", loss, is_open=True),
        Section("Optimisation", optimisation),
        Section("Speed and memory", machine),
        Section("Quantisers: error (dB)", _by_operand("sqnr_db")),
        Section("Quantisers: elements beyond the grid", _by_operand("clipped")),
        Section("Quantisers: blocks below the scales' range", _by_operand("scale_underflow")),
        Section("Quantisers: blocks above the scales' range", _by_operand("scale_overflow")),
        Section("Quantisers: elements that FP8 rounded", _by_operand("fp8_rounded")),
        Section("Quantisers: gradient masks", _by_operand("mask_density", ("fprop.x", "fprop.w"))),
        Section("Quantisers: kurtosis", _by_operand("kurtosis")),
        Section("Quantisers: largest over mean magnitude", _by_operand("max_to_mean")),
        Section("Weight gradients", gradients),
    )


def _by_operand(metric: str, operands: tuple[str, ...] = OPERANDS) -> tuple[Panel, ...]:
    """One panel an operand, with the lines of OF_LAYERS."""
    return tuple(
        Panel(f"{metric} of {operand}", pattern=rf"quant{OF_LAYERS}/{operand.replace('.', '[.]')}/{metric}")
        for operand in operands
    )


def describe(sections: tuple[Section, ...]) -> str:
    lines = []
    for section in sections:
        lines.append(f"{section.name}{' (open)' if section.is_open else ''}")
        for panel in section.panels:
            scale = ", logarithmic" if panel.log_y else ""
            lines.append(f"  {panel.title}: {panel.pattern or ', '.join(panel.metrics)} over {X_AXIS}{scale}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------ wandb's objects


def build_workspace(entity: str, project: str, sections: tuple[Section, ...]) -> Any:
    """A wandb_workspaces.workspaces.Workspace, not saved."""
    import wandb_workspaces.workspaces as ws

    return ws.Workspace(
        entity=entity,
        project=project,
        name="qtrain",
        sections=[
            ws.Section(name=section.name, panels=_panels(section), is_open=section.is_open) for section in sections
        ],
        settings=ws.WorkspaceSettings(x_axis=X_AXIS),
    )


def build_report(entity: str, project: str, sections: tuple[Section, ...]) -> Any:
    """A wandb_workspaces.reports.v2.Report, not saved: the table of runs, and a grid of panels a section."""
    import wandb_workspaces.reports.v2 as wr

    def grid(panels: list) -> wr.PanelGrid:
        return wr.PanelGrid(runsets=[wr.Runset(entity=entity, project=project)], panels=panels)

    blocks: list = [
        wr.P("Losses compare only at equal run.data_hash. Quantisers' panels have the mean and worst of the layers."),
        grid([wr.RunComparer(diff_only="split")]),
    ]
    for section in sections:
        blocks += [wr.H2(section.name), grid(_panels(section))]
    return wr.Report(entity=entity, project=project, title="qtrain: low-precision training", blocks=blocks)


def _panels(section: Section) -> list:
    import wandb_workspaces.reports.v2 as wr

    return [
        wr.LinePlot(
            title=panel.title,
            x=X_AXIS,
            y=list(panel.metrics),
            metric_regex=panel.pattern,
            log_y=panel.log_y or None,
            title_x=X_AXIS,
        )
        for panel in section.panels
    ]


def publish(entity: str, project: str, sections: tuple[Section, ...]) -> list[str]:
    """Both, saved; their addresses. UserError without the packages, without an API key, or when the server refuses."""
    need("wandb_workspaces", "writing to W&B", "--dry-run")
    if not has_wandb_key():
        raise UserError(
            f"found no API key of W&B to write to {entity}/{project} with; run `wandb login` or set WANDB_API_KEY, or "
            "add --dry-run"
        )
    from wandb.errors import CommError, UsageError

    try:
        return [build(entity, project, sections).save().url for build in (build_workspace, build_report)]
    except (CommError, UsageError, ValueError) as error:
        raise UserError(f"W&B does not take the dashboard of {entity}/{project}: {error}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", help="entity/project, where runs were logged with logger=wandb")
    parser.add_argument("--dry-run", action="store_true", help="print sections, panels and metrics, and stop")
    arguments = parser.parse_args()
    try:
        entity, slash, project = arguments.project.partition("/")
        if not (entity and slash and project) or "/" in project:
            raise UserError(f"{arguments.project!r} names no W&B project; give entity/project")
        if arguments.dry_run:
            print(describe(dashboard()))
            return
        print(*publish(entity, project, dashboard()), sep="\n")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
