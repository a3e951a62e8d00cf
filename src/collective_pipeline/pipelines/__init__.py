"""Pipelines: thin nodes over the core, and how they are joined."""
