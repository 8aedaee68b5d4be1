"""Pretrained weights of the networks in this folder."""

from __future__ import annotations


class MissingWeightsError(ValueError):
    """A network's pretrained weights are not available, or a file holds something else. The message says which."""
