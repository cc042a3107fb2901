"""Scaling laws: the published forms, their fit with intervals, and which precision is best at equal compute."""
