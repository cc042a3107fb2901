from __future__ import annotations

from typing import Literal

from qtrain.optim.base import Schedule, half_cosine


class Cosine(Schedule):
    """After the warm-up half a cosine down to final_factor: torch's OneCycleLR, which the code released with QuEST and
    Quartet uses."""

    name: Literal["cosine"]

    def after_warmup(self, step: int, peak: int, total_steps: int) -> float:
        return half_cosine(1.0, self.final_factor, (step - peak) / (total_steps - 1 - peak))
