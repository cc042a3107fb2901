"""What every optimiser and every learning-rate schedule has. Importing it, or one of them, imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from qtrain.config.settings import Member

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class OptimizerSettings(Member):
    """Settings of an optimiser.

    lr: the peak learning rate, which the schedule scales.
    weight_decay: decoupled decay of the linear layers of the blocks; the rest has none.
    """

    lr: float = Field(gt=0, allow_inf_nan=False)
    weight_decay: float = Field(0.1, ge=0)

    def state_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of the state that it keeps for a float32 parameter of this shape."""
        raise NotImplementedError

    def build(self, decay: Mapping[str, nn.Parameter], no_decay: Mapping[str, nn.Parameter]) -> Optimizer:
        """At the full learning rate, which the schedule scales; parameters by name, with weight decay and without."""
        raise NotImplementedError


class Schedule(Member):
    """A learning rate over the run, as a factor of optimizer.lr.

    It rises to 1 at the last of the warm-up's steps, along half a cosine.

    warmup_fraction: the part of the steps that the warm-up takes, rounded down, where warmup_steps is not given.
    warmup_steps: steps of the warm-up; None takes warmup_fraction.
    start_factor: the factor at step 0.
    final_factor: the factor at the last step of the run and beyond.
    """

    warmup_fraction: float = Field(0.1, ge=0, lt=1)
    warmup_steps: int | None = Field(None, ge=0)
    start_factor: float = Field(0.01, ge=0, le=1)
    final_factor: float = Field(0.1, ge=0, le=1)

    def warmup(self, total_steps: int) -> int:
        """Steps of warm-up; never more than there are."""
        if self.warmup_steps is not None:
            return min(self.warmup_steps, total_steps)
        return whole(self.warmup_fraction * total_steps)

    def peak(self, total_steps: int) -> int:
        """The first step, counted from 0, with the full learning rate."""
        return max(self.warmup(total_steps) - 1, 0)

    def factor(self, step: int, total_steps: int) -> float:
        """The factor at a step, counted from 0; step total_steps - 1 is the last."""
        peak = self.peak(total_steps)
        if step >= total_steps - 1:
            return self.final_factor
        if step <= peak:
            return half_cosine(self.start_factor, 1.0, step / peak) if peak else 1.0
        return self.after_warmup(step, peak, total_steps)

    def after_warmup(self, step: int, peak: int, total_steps: int) -> float:
        """The factor at a step between `peak` and the last one."""
        raise NotImplementedError

    def shared_until(self, total_steps: int) -> int | None:
        """The last step of the full learning rate that longer schedules with as long a warm-up share; None of a
        schedule that depends on its length from the start."""
        return None


def half_cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) * (1.0 + math.cos(math.pi * fraction)) / 2.0


def whole(steps: float) -> int:
    """Rounds down, but a product such as 0.29 * 100 = 28.999999999999996 to the integer that it stands for."""
    return math.floor(steps + 1e-6)
