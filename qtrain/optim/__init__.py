"""Optimisers and learning-rate schedules, one file each in `optimizers` and `schedules`; a file that is added there is
a value of optimizer.name or scheduler.name."""

from importlib import import_module

import_module("qtrain.config")  # first: its classes of settings look for those of this package, by name
