"""Kernels of qtrain: number formats, the reference of every operation, and its faster twins."""
