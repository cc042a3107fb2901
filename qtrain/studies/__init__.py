"""Studies over whole runs."""
