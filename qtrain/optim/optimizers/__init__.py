"""Settings of optimisers, each of which builds its optimiser. A module here has one class of settings."""
