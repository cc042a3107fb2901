"""Observers of a run, all in optimiser steps. Their order in the trainer's list is their order at the end of a step:
metrics, telemetry, validation, progress, checkpoint, stop: every line of a step is written before its checkpoint is."""

from qtrain.callbacks.checkpoints import Checkpoints, StopRequest
from qtrain.callbacks.measure import DivergedError, Measure, Validate
from qtrain.callbacks.progress import Progress
from qtrain.callbacks.step import StepCallback
from qtrain.callbacks.telemetry import Telemetry
from qtrain.callbacks.trunk import LeaveTrunk

__all__ = [
    "Checkpoints",
    "DivergedError",
    "LeaveTrunk",
    "Measure",
    "Progress",
    "StepCallback",
    "StopRequest",
    "Telemetry",
    "Validate",
]
