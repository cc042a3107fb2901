"""Steps that go wrong: losses that are not finite, and spikes of loss and gradient norm."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any

from qtrain.training.causal_lm import CausalLM
from qtrain.training.parallel import Ranks

log = logging.getLogger("qtrain")

WINDOW, SIGMAS = 128, 6.0
MOST_IN_A_ROW = 10  # steps without an update, or returns to one and the same checkpoint, before the run has diverged


class RewindError(Exception):
    """Go back to the last checkpoint, with the data moved on. step: the one (from 0) that went wrong."""

    def __init__(self, step: int, reason: str):
        super().__init__(reason)
        self.step = step


class Spikes:
    """Whether a value lies more than six standard deviations above the mean of the last 128 values; no verdict before
    half of these are there. Window and factor are those of OLMo-core's SkipStepOptimizer, which also skips steps whose
    values lie as far below."""

    def __init__(self, window: int = WINDOW, sigmas: float = SIGMAS):
        self.values: deque[float] = deque(maxlen=window)
        self.window, self.sigmas = window, sigmas

    def sees(self, value: float) -> bool:
        before = list(self.values)
        self.values.append(value)
        if len(before) < max(2, self.window // 2):
            return False
        return value - fmean(before) > self.sigmas * stdev(before)


class Guard:
    """Decides before each update, for all ranks alike, whether it is made. With on_divergence=stop and on_spike=ignore
    nothing is looked at here, and no device waited for: a loss that is not finite then ends the run at the next line of
    metrics or checkpoint."""

    def __init__(self, module: CausalLM, ranks: Ranks):
        trainer = module.config.trainer
        self.module, self.ranks = module, ranks
        self.on_divergence, self.on_spike = trainer.on_divergence, trainer.on_spike
        self.loss, self.norm = Spikes(), Spikes()
        self.skipped = 0  # steps in a row
        self._last = module.step_loss, module.grad_norm  # of a step that was accepted

    @property
    def idle(self) -> bool:
        """Whether nothing is looked at."""
        return self.on_divergence == "stop" and self.on_spike == "ignore"

    def state(self) -> dict[str, Any]:
        """What later decisions follow from, as plain data for a checkpoint: a run that goes on makes those that it
        would have made."""
        return {"losses": [*self.loss.values], "norms": [*self.norm.values], "skipped": self.skipped}

    def restore(self, state: Mapping[str, Any]) -> None:
        """state: of `state`; of a checkpoint without it, empty."""
        self.loss.values.extend(state.get("losses", ()))
        self.norm.values.extend(state.get("norms", ()))
        self.skipped = state.get("skipped", 0)

    def accepts(self, step: int) -> bool:
        """Whether optimiser step `step` (from 0) is made. RewindError where the run is to go back."""
        if self.idle:
            return True
        found = self._look()
        if found is None:
            self.skipped = 0
            return True
        reason, action = found
        if action == "log":
            log.warning("step %d: %s", step + 1, reason)
            return True
        if action == "stop" or self.skipped >= MOST_IN_A_ROW:
            return True  # Measure sees what is not finite, and ends the run
        self.skipped += 1
        if action == "rewind":
            raise RewindError(step, reason)
        log.warning("step %d: %s: no update", step + 1, reason)
        self.module.step_loss, self.module.grad_norm = self._last
        return False

    def _look(self) -> tuple[str, str] | None:
        """(what is wrong, what to do); waits for the device."""
        loss, norm = self.ranks.total(float(self.module.step_loss) / self.ranks.size, float(self.module.grad_norm))
        norm /= self.ranks.size
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"not finite: loss {loss}, gradient norm {norm}", self.on_divergence
        spiked = [name for name, spikes, value in (("loss", self.loss, loss), ("gradient norm", self.norm, norm))
                  if self.on_spike != "ignore" and spikes.sees(value)]  # fmt: skip
        self._last = self.module.step_loss, self.module.grad_norm
        return (
            (f"a spike of {' and '.join(spiked)}: loss {loss:.4g}, norm {norm:.4g}", self.on_spike) if spiked else None
        )
