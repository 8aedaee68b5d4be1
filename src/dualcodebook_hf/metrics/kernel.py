"""Kernel distance between the features of two sets of images: unbiased, and so fit for a few hundred of them."""

from __future__ import annotations

import torch

from .frechet import FeatureExtractor
from .images import checked_images

NORMAL_95 = 1.959964  # of the standard normal distribution: 95% lie within
BLOCK = 1024  # rows of a kernel matrix at a time


def kernel_distance(x: torch.Tensor, y: torch.Tensor) -> tuple[float, float | None]:
    """Unbiased squared MMD of two sets under k(a, b) = (a.b / D + 1)^3 (Binkowski et al. 2018), with its uncertainty.

    sum over i != j of k(x_i, x_j) / (N (N - 1)), the same of y, minus twice the mean of all k(x_i, y_j); no subsets, so
    no random numbers. It may be negative: its expectation is 0 for two samples of one distribution.

    Args:
        x: features (N, D).
        y: features (N, D); y_i belongs to x_i.

    Returns the distance, and the standard error by the jackknife, which leaves out one pair (x_i, y_i) after the other;
    None for two rows. Raises ValueError for other shapes and for fewer than 2 rows.
    """
    if x.shape != y.shape or x.ndim != 2 or len(x) < 2:
        raise ValueError(f"`x` and `y` must be of one shape (N, D), N >= 2, got {tuple(x.shape)} and {tuple(y.shape)}")
    x, y, count = x.double(), y.double(), len(x)
    own = _row_sums(x, x) - _kernel_of_pairs(x, x) + _row_sums(y, y) - _kernel_of_pairs(y, y)
    rows, columns, pairs = _row_sums(x, y), _row_sums(y, x), _kernel_of_pairs(x, y)
    cross = rows.sum()

    def estimate(own_sum: torch.Tensor, cross_sum: torch.Tensor, n: int) -> torch.Tensor:
        return own_sum / (n * (n - 1)) - 2 * cross_sum / n**2

    distance = estimate(own.sum(), cross, count).item()
    if count == 2:
        return distance, None
    left_out = estimate(own.sum() - 2 * own, cross - rows - columns + pairs, count - 1)
    error = ((count - 1) / count * (left_out - left_out.mean()).square().sum()).sqrt()
    return distance, error.item()


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
