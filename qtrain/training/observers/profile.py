"""Where the time of a step goes, as torch's profiler sees it."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from qtrain.training.observers.observer import Observer

log = logging.getLogger("qtrain")

UNSEEN = 3  # first steps of a start, in which code is compiled and memory is taken


class Profile(Observer):
    """Records `count` optimiser steps after the first ones, with shapes and memory, as trace-rank<rank>.json.gz in
    `folder`. ui.perfetto.dev opens it. Nothing is recorded where the run ends before."""

    def __init__(self, folder: Path, rank: int, device: torch.device, count: int):
        self.path, self.count = folder / f"trace-rank{rank}.json.gz", count
        self.activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self.activities.append(ProfilerActivity.CUDA)
        self.first = 0
        self.profiler: profile | None = None

    def on_start(self, step: int) -> None:
        self.first = step + UNSEEN

    def on_step_start(self, step: int) -> None:
        if step == self.first:
            self.profiler = profile(activities=self.activities, record_shapes=True, profile_memory=True)
            self.profiler.start()

    def on_step_end(self, step: int) -> None:
        if step == self.first + self.count:
            self._write(step)

    def on_end(self) -> None:
        self._write(None)

    def _write(self, step: int | None) -> None:
        profiler, self.profiler = self.profiler, None
        if profiler is None:
            return
        profiler.stop()
        if step is None:
            log.warning("the run ended while steps were profiled: there is no trace")
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.path))
        log.info("steps %d to %d are profiled in %s: open it at ui.perfetto.dev", self.first + 1, step, self.path)
