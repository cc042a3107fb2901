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
        self.first: int | None = None  # of the steps to record, once it is known
        self.profiler: profile | None = None

    def on_start(self, step: int) -> None:
        if self.first is None or self.profiler is not None:  # of a run that goes back, the steps after that
            self._stop()
            self.first = step + UNSEEN

    def on_step_start(self, step: int) -> None:
        if step == self.first:
            self.profiler = profile(activities=self.activities, record_shapes=True, profile_memory=True)
            self.profiler.start()

    def on_step_end(self, step: int) -> None:
        if self.profiler is None or self.first is None or step < self.first + self.count:
            return
        profiler = self._stop()
        assert profiler is not None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self.path))
        except OSError as error:
            log.warning("the trace %s cannot be written: %s", self.path, error.strerror)
        else:
            log.info("steps %d to %d are profiled in %s: open it at ui.perfetto.dev", self.first + 1, step, self.path)

    def on_end(self) -> None:
        if self._stop() is not None:
            log.warning("the run ended while steps were profiled: there is no trace")

    def _stop(self) -> profile | None:
        profiler, self.profiler = self.profiler, None
        if profiler is not None:
            profiler.stop()
        return profiler
