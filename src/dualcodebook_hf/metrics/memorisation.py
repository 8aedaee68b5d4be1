"""Whether a generator copies what it was trained on: the test C_T, and the nearest training neighbour in tokens."""

from __future__ import annotations

import math

import torch

from ..clustering import kmeans
from ..codebooks import nearest_codes
from .neighbours import check_features, nearest

LEAST_OF_CELL = 10  # generated and test images; below it a cell's score is not counted
IMAGES_PER_CELL = 50  # of the smaller set, for the number of cells
LARGEST_MATCH = 2**24  # tokens that are compared at a time
DEFINITION = (
    "C_T (Meehan, Chaudhuri, Dasgupta 2020): Mann-Whitney U, as a z-score with correction for ties, of the distances "
    "of generated images to their nearest training image against those of test images; within the cells of a k-means "
    f"of the training images, mean over cells with at least {LEAST_OF_CELL} generated and {LEAST_OF_CELL} test images, "
    "weighted by their test images; c_t_global: one cell. Far below 0: nearer to the training images than real new "
    "images are, so copied; far above 0: farther from them than real images are"
)
TOKENS_DEFINITION = (
    "equal_tokens: share of tokens, of all codebooks and positions, that equal those of the training image (any of its "
    "crops) that shares most; c_t_tokens: c_t_global of the share of tokens that differ"
)


def mann_whitney_z(x: torch.Tensor, y: torch.Tensor) -> float:
    """z-score of Mann and Whitney's U, the number of pairs with x_i > y_j (ties count half), under equal distributions.

    No correction for continuity; the variance is corrected for ties. Below 0: x tends to be smaller.

    Args:
        x: values (m,), m >= 1.
        y: values (n,), n >= 1.

    Returns 0 where all values are equal.
    """
    m, n = len(x), len(y)
    _, place, counts = torch.cat([x, y]).unique(return_inverse=True, return_counts=True)
    counts = counts.double()
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[place[:m]]  # from 1; tied values share their mean rank
    u = ranks.sum().item() - m * (m + 1) / 2
    total = m + n
    ties = (counts**3 - counts).sum().item() / (total * (total - 1))
    variance = m * n / 12 * (total + 1 - ties)
    return (u - m * n / 2) / math.sqrt(variance) if variance > 0 else 0.0


class CopyingTest:
    """C_T of generated images against one training and one test set (arXiv 2004.05675).

    Args:
        train: features (L, D).
        test: features (N, D).
        cells: of the k-means; None: one for each 50 test images, at least 1.
        seed: of the k-means.

    Attributes:
        train: as given.
        cells: of the k-means.
        test_distances: of each test image to its nearest training image (N,).

    Raises ValueError for other shapes, values that are not finite, and more cells than training images.
    """

    def __init__(self, train: torch.Tensor, test: torch.Tensor, cells: int | None = None, seed: int = 0) -> None:
        check_features(train=train, test=test)
        cells = cells or min(max(len(test) // IMAGES_PER_CELL, 1), len(train))
        if not 1 <= cells <= len(train):
            raise ValueError(f"`cells` must be at least 1 and at most {len(train)} training images, got {cells}")
        self.train, self.cells, self.test_distances = train, cells, nearest(test, train)[0]
        self._centres = kmeans(train.float(), cells, torch.Generator().manual_seed(seed))
        self._train_cells, self._test_cells = self._cells_of(train), self._cells_of(test)
        self._test_in_cells = self._distances_in_cells(test, self._test_cells)

    def __call__(self, generated: torch.Tensor) -> dict[str, float | int | None]:
        """Features (M, D) -> {"c_t": None where no cell counts; "c_t_global"; "c_t_cells": how many counted}."""
        check_features(train=self.train, generated=generated)
        own = self._cells_of(generated)
        distances = self._distances_in_cells(generated, own)
        score, weight, counted = 0.0, 0, 0
        for cell in range(len(self._centres)):
            x, y = distances[own == cell], self._test_in_cells[self._test_cells == cell]
            if min(len(x), len(y)) >= LEAST_OF_CELL:
                score += len(y) * mann_whitney_z(x, y)
                weight += len(y)
                counted += 1
        return {
            "c_t": score / weight if counted else None,
            "c_t_global": mann_whitney_z(nearest(generated, self.train)[0], self.test_distances),
            "c_t_cells": counted,
        }

    def _cells_of(self, features: torch.Tensor) -> torch.Tensor:
        return nearest_codes(features.float(), self._centres)

    def _distances_in_cells(self, features: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """To the nearest training image of the same cell (N,); infinite where it has none."""
        found = torch.full((len(features),), torch.inf, dtype=torch.float64)
        for cell in cells.unique():
            train = self.train[self._train_cells == cell]
            if len(train):
                found[cells == cell] = nearest(features[cells == cell], train)[0]
        return found


def nearest_tokens(
    tokens: torch.Tensor, train: torch.Tensor, images: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The training image that shares most tokens with each of some images: the nearest by Hamming distance.

    Args:
        tokens: integers (N, codebooks, h, w).
        train: integers (M, codebooks, h, w), M >= 1; several crops or mirror images of one image are several rows.
        images: the number of the image that each row of `train` is of (M,); None: each is its own.

    Returns the share of tokens that are equal, float64 (N,) in [0, 1], and the number of that image (N,). Raises
    ValueError for shapes that do not agree.
    """
    if tokens.ndim != 4 or tokens.shape[1:] != train.shape[1:] or not len(train):
        shapes = f"{tuple(tokens.shape)} and {tuple(train.shape)}"
        raise ValueError(f"`tokens` and `train` must be of shape (N, codebooks, h, w), one grid, got {shapes}")
    if images is not None and images.shape != (len(train),):
        raise ValueError(f"`images` must be of shape ({len(train)},), got {tuple(images.shape)}")
    train = train.flatten(1)
    step = max(LARGEST_MATCH // train.shape[1], 1)
    shares, rows = torch.zeros(len(tokens), dtype=torch.float64), torch.zeros(len(tokens), dtype=torch.int64)
    for number, own in enumerate(tokens.flatten(1).to(train.dtype)):
        equal = torch.cat([(part == own).sum(1) for part in train.split(step)])
        shares[number], rows[number] = equal.max().double() / len(own), equal.argmax()
    return shares, rows if images is None else images[rows]
