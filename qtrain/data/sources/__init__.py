"""Sources of text, each of which is its settings and how it is read. A module here has one class of settings."""
