from __future__ import annotations

from typing import Literal

from pydantic import Field

from qtrain.optim.base import Schedule, whole


class WSD(Schedule):
    """Warm-up, stable, decay: after the warm-up the full learning rate until the decay, in which it falls in a straight
    line. The default of the code released with QuEST and Quartet.

    decay_fraction: the part of the steps that the decay takes, rounded down but at least one.
    """

    name: Literal["wsd"]
    decay_fraction: float = Field(0.2, gt=0, le=1)

    def decay(self, total_steps: int) -> int:
        """Steps of the decay."""
        return max(1, whole(self.decay_fraction * total_steps))

    def after_warmup(self, step: int, peak: int, total_steps: int) -> float:
        start, last = self.shared_until(total_steps), total_steps - 1
        return 1.0 + (self.final_factor - 1.0) * max(step - start, 0) / (last - start)

    def shared_until(self, total_steps: int) -> int:
        return max(total_steps - 1 - self.decay(total_steps), self.peak(total_steps))
