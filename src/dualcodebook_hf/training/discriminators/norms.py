"""The normalisations that a discriminator can have."""

from __future__ import annotations

import math

from torch import nn

from . import NORMS

GROUPS = 32


def build_norm(kind: str, channels: int) -> nn.Module:
    """BatchNorm, or GroupNorm with up to 32 groups, which does not depend on the batch. Raises ValueError else."""
    if kind not in NORMS:
        raise ValueError(f"`norm` must be one of {', '.join(NORMS)}, got {kind!r}")
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(math.gcd(GROUPS, channels), channels)
