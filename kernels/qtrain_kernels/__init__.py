"""Kernels of qtrain: number formats, the reference of every operation, and its faster twins."""

import os

# Torch's threads that wait for each other spin only briefly before they sleep: with OpenMP's default, a busy core was
# seen to cost quartet on nano more than nine tenths of its speed. OpenMP reads this once, when torch is imported: who
# imports torch first has chosen already, and it does nothing.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
