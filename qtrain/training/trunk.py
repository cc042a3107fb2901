"""Runs of the wsd schedule that differ in their budget alone begin with the same steps. They share them on disk:

    <run_root>/trunks/<key>/step-<step>/                the checkpoint after that many steps, before any decay
    <run_root>/trunks/<key>/step-<step>.metrics.jsonl   the lines of metrics.jsonl up to there

A run starts from the longest trunk that it would have gone through itself. The key is a hash of all that determines
those steps, and noise and order of the data are functions of their position, so the result is the one that the run
would have had alone, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from qtrain.config import Config, differences, hashed_keys
from qtrain.errors import UserError
from qtrain.plan import RunPlan, computes_in_high_precision
from qtrain.runs.directory import RunDirectory
from qtrain.training.checkpoint import newest

log = logging.getLogger("qtrain")

MOST_LOOKED_AT = 30  # runs of one name: reading the settings of one takes a hundredth of a second

# What a run does with its budget. Warm-up counts as the number of steps that it comes to. What it validates on is not
# here: the lines of metrics.jsonl that come with a trunk tell of it.
AFTER_THE_TRUNK = {
    "trainer": ("tokens", "tokens_per_parameter"),
    "scheduler": ("warmup_fraction", "warmup_steps", "decay_fraction", "final_factor"),
    "recipe": ("high_precision_after",),
    "debug": ("max_steps",),
}


class Trunk:
    """The part of a run before its decay. steps: how many optimiser steps it has."""

    def __init__(self, config: Config, plan: RunPlan, data_hash: str):
        self.steps = common_steps(config, plan)
        self.directory = Path(config.run_root).expanduser() / "trunks" / trunk_key(config, plan, data_hash)

    def start(self) -> tuple[int, Path] | None:
        """(step, checkpoint) of the longest part of this trunk that a run left; None where none did."""
        return newest(self.directory, at_most=self.steps)


def metrics_beside(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.metrics.jsonl")


def tell_of_shorter(config: Config, directory: Path) -> None:
    """Say of a run that begins at step 0, where a finished one differs from it in the budget alone, why it does not go
    on from that one."""
    for path in sorted(directory.parent.glob(f"{config.name}-*/summary.json"))[:MOST_LOOKED_AT]:
        other = RunDirectory(path.parent)
        try:
            is_other = other.path != directory and other.finished
            differing = differences(other.read_config(), config) if is_other else []
        except UserError:  # its own command tells what is wrong with it
            continue
        if {line.split()[0] for line in differing} in ({"trainer.tokens"}, {"trainer.tokens_per_parameter"}):
            why = (
                "it left no trunk: with trainer.share_trunk=true longer runs go on from where its decay began"
                if config.scheduler.shared_until(1) is not None
                else f"under scheduler={config.scheduler} its learning rate was another at each step; a run of "
                "scheduler=wsd trainer.share_trunk=true can be extended"
            )
            told = "%s is this run on another budget (%s). This one does not go on from it, since %s"
            log.info(told, path.parent, differing[0], why)
            return


def common_steps(config: Config, plan: RunPlan) -> int:
    """The steps after which the state is that of every longer run of this schedule: those before the decay, less one,
    because the state holds the rate of the step to come, and those before the recipe switches to high precision. None
    of the last two, where there is hardly a decay: the last step has the final rate even if it is one of warm-up."""
    steps = max(0, min(config.scheduler.shared_until(plan.steps) or 0, plan.steps - 2))
    if config.recipe.high_precision_after is None:
        return steps
    return next((step for step in range(steps) if computes_in_high_precision(config, plan, step)), steps)


def trunk_key(config: Config, plan: RunPlan, data_hash: str) -> str:
    """Sixteen hex digits of all that determines the steps before the decay."""
    tree = hashed_keys(config)
    for group, keys in AFTER_THE_TRUNK.items():
        for key in keys:
            tree.get(group, {}).pop(key, None)
    tree |= {"warmup_steps": plan.warmup_steps, "data_hash": data_hash}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]
