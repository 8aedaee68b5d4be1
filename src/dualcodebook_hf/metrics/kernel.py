"""Kernel distance between the features of two sets of images: unbiased, and so fit for a few hundred of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .frechet import FeatureExtractor
from .images import checked_images

NORMAL_95 = 1.959964  # of the standard normal distribution: 95% lie within
BLOCK = 1024  # rows of a kernel matrix at a time


def kernel_distance(x: torch.Tensor, y: torch.Tensor, paired: bool = True) -> tuple[float, float | None]:
    """Unbiased squared MMD of two sets under k(a, b) = (a.b / D + 1)^3 (Binkowski et al. 2018), with its uncertainty.

    sum over i != j of k(x_i, x_j) / (M (M - 1)), the same of y, minus twice the mean of all k(x_i, y_j); no subsets, so
    no random numbers. It may be negative: its expectation is 0 for two samples of one distribution.

    Args:
        x: features (M, D).
        y: features (N, D).
        paired: y_i belongs to x_i, such as a reconstruction to its original; M = N.

    Returns the distance, and the standard error by the jackknife: of pairs, it leaves out one (x_i, y_i) after the
    other; of independent sets it is done for each, and the variances are added. None for two rows.
    Raises ValueError for other shapes and for fewer than 2 rows.
    """
    fit = x.ndim == y.ndim == 2 and (x.shape == y.shape if paired else x.shape[1] == y.shape[1])
    if not fit or min(len(x), len(y)) < 2:
        shape = "of one shape (N, D)" if paired else "of shapes (M, D) and (N, D), M >= 2"
        raise ValueError(f"`x` and `y` must be {shape}, N >= 2, got {tuple(x.shape)} and {tuple(y.shape)}")
    x, y = x.double(), y.double()
    sums = _Sums(
        own_x=_row_sums(x, x) - _kernel_of_pairs(x, x),
        own_y=_row_sums(y, y) - _kernel_of_pairs(y, y),
        rows=_row_sums(x, y),
        columns=_row_sums(y, x),
    )
    distance = sums.estimate(0, 0, 0, len(x), len(y)).item()
    if min(len(x), len(y)) == 2:
        return distance, None
    m, n = len(x), len(y)
    if paired:
        crossed = sums.rows + sums.columns - _kernel_of_pairs(x, y)
        left_out = [sums.estimate(sums.own_x, sums.own_y, crossed, m - 1, n - 1)]
    else:
        left_out = [
            sums.estimate(sums.own_x, 0, sums.rows, m - 1, n),
            sums.estimate(0, sums.own_y, sums.columns, m, n - 1),
        ]
    variance = sum((len(part) - 1) / len(part) * (part - part.mean()).square().sum() for part in left_out)
    return distance, variance.sqrt().item()


@dataclass(frozen=True)
class _Sums:
    """Sums of kernels for each row: of x with the other x, of y with the other y, of x with all y, of y with all x."""

    own_x: torch.Tensor
    own_y: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor

    def estimate(self, less_x: Any, less_y: Any, less_crossed: Any, m: int, n: int) -> torch.Tensor:
        """Without rows whose sums are `less_...` (0: none); m and n remain. A row is in two sums of its own set."""
        own = (self.own_x.sum() - 2 * less_x) / (m * (m - 1)) + (self.own_y.sum() - 2 * less_y) / (n * (n - 1))
        return own - 2 * (self.rows.sum() - less_crossed) / (m * n)


def _row_sums(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of the kernel matrix, without keeping it whole: (N,)."""
    return torch.cat([((part @ y.T / x.shape[1] + 1) ** 3).sum(1) for part in x.split(BLOCK)])


def _kernel_of_pairs(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return ((x * y).sum(1) / x.shape[1] + 1) ** 3


class KernelDistance:
    """Kernel distance between the features of reconstructions and those of their originals, x 1000.

    Args:
        extractor: images (B, 3, H, W) float32 in [0, 1] -> features (B, D), with a `description` in words.
        name: its key in metrics.json.
    """

    def __init__(self, extractor: FeatureExtractor, name: str) -> None:
        self.extractor, self.name = extractor, name
        self.definition = (
            "kernel distance of features of reconstructions and originals, x 1000: unbiased squared MMD, kernel "
            "(x.y / D + 1)^3, all images once; may be negative; interval: 95%, by a jackknife over pairs; features: "
            f"{extractor.description}"
        )
        self._features: list[tuple[torch.Tensor, torch.Tensor]] = []

    @torch.no_grad()
    def update(self, reconstruction: torch.Tensor, original: torch.Tensor) -> None:
        """Adds images, both (B, 3, H, W) in [0, 1], clamped. Raises ValueError when a shape or type is wrong."""
        pair = checked_images(reconstruction, original)
        self._features.append(tuple(self.extractor(images).cpu() for images in pair))

    def compute(self) -> dict[str, float | list[float] | None]:
        """{name: the distance of all images so far, name_interval: [low, high]}, x 1000; of two images no interval.

        Raises ValueError for fewer than two images.
        """
        first, second = (torch.cat(column) for column in zip(*self._features, strict=True))
        distance, error = kernel_distance(first, second)
        interval = None
        if error is not None:
            interval = [1000 * (distance + sign * NORMAL_95 * error) for sign in (-1, 1)]
        return {self.name: 1000 * distance, f"{self.name}_interval": interval}
