"""Families of models: settings of each, and what its blocks are. A module here has one class of settings."""
