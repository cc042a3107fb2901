"""Learning-rate schedules, each of which is its settings. A module here has one class of settings."""
