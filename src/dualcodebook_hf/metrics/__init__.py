"""Metrics: objects with `update` and `compute`, below everything that measures."""
