"""Observers of a run: plain objects that the loop calls, in the order of their list."""

from qtrain.training.observers.best import Best
from qtrain.training.observers.measure import Measure, Recorder, Validate
from qtrain.training.observers.observer import Observer
from qtrain.training.observers.profile import Profile
from qtrain.training.observers.progress import Progress
from qtrain.training.observers.tasks import Tasks
from qtrain.training.observers.telemetry import Telemetry

__all__ = ["Best", "Measure", "Observer", "Profile", "Progress", "Recorder", "Tasks", "Telemetry", "Validate"]
