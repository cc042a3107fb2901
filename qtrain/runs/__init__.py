"""What a run leaves on disk: its directory, its metrics, its row in a table of runs."""
