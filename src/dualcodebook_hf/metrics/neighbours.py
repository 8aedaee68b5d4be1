"""Nearest neighbours in features: exact, in float64, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

BLOCK = 256  # rows of a matrix of distances that are held at a time


def check_features(**sets: torch.Tensor) -> None:
    """Raises ValueError, naming the argument, unless all are finite, (N, D) with N >= 1 and one D."""
    width = None
    for name, features in sets.items():
        if features.ndim != 2 or 0 in features.shape or features.shape[1] != (width or features.shape[1]):
            raise ValueError(f"`{name}` must be of shape (N, {width or 'D'}), N >= 1, got {tuple(features.shape)}")
        if not torch.isfinite(features).all():
            raise ValueError(f"`{name}` must be finite, got NaN or infinity")
        width = features.shape[1]


def distance_blocks(x: torch.Tensor, y: torch.Tensor) -> Iterator[torch.Tensor]:
    """Euclidean distances of x (N, D) to y (M, D), float64 (rows, M) from the first rows on."""
    y = y.double()
    for part in x.double().split(BLOCK):
        # By differences, not by |x|^2 + |y|^2 - 2 x.y: equal rows are at 0 exactly, and d(x, y) is d(y, x) to the bit.
        yield torch.cdist(part, y, compute_mode="donot_use_mm_for_euclid_dist")


def nearest(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row of x (N, D) the distance to the nearest row of y (M, D), float64 (N,), and which one it is (N,)."""
    blocks = [block.min(1) for block in distance_blocks(x, y)]
    return torch.cat([block.values for block in blocks]), torch.cat([block.indices for block in blocks])


def neighbour_distances(x: torch.Tensor, k: int) -> torch.Tensor:
    """Of each row of x (N, D), N > k, the distances to the k nearest other rows, float64 (N, k), growing."""
    found, start = [], 0
    for block in distance_blocks(x, x):
        rows = torch.arange(len(block))
        block[rows, start + rows] = torch.inf
        found.append(block.topk(k, largest=False).values)
        start += len(block)
    return torch.cat(found)
