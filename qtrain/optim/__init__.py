"""Optimisers and learning-rate schedules, one file each in `optimizers` and `schedules`; a file that is added there is
a value of optimizer.name or scheduler.name."""
