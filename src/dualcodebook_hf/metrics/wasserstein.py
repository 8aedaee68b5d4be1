"""Sliced Wasserstein distance between the patches of two sets of images (Karras et al. 2018), without any weights."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

PATCH = 7
SMALLEST_LEVEL = 16
BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


class SlicedWasserstein:
    """Distance between originals and reconstructions as sets of 7 x 7 patches, at each level of a Laplacian pyramid.

    Levels: full size, then halved (5 x 5 binomial filter, every second pixel) while both sides keep 16 pixels; a level
    is the image less the next one enlarged, the last one is the image itself. The same positions are drawn in both
    sets, so that equal sets have exactly 0. Each colour channel is shifted and divided by the mean and standard
    deviation of the *originals'* patches (Karras et al. take each set's own, which hides a loss of contrast: what a
    blurred reconstruction loses). Then directions are drawn uniformly on the unit sphere: mean absolute difference of
    the sorted projections, times 1000 (Karras et al., appendix on metrics).

    Args:
        patches: positions drawn per image and level.
        images: only the first N images count: 4096 need 1.5 GB at 256 x 256.
        directions: of one projection.
        repeats: projections that are averaged.
        seed: of positions and directions.

    Raises ValueError for a number below 1.
    """

    name = "swd"

    def __init__(
        self, patches: int = 64, images: int = 4096, directions: int = 128, repeats: int = 4, seed: int = 0
    ) -> None:
        sizes = {"patches": patches, "images": images, "directions": directions, "repeats": repeats}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        self.patches, self.directions, self.repeats, self.seed = patches, directions, repeats, seed
        self.definition = (
            "sliced Wasserstein distance of 7 x 7 patches, mean over the levels of a Laplacian pyramid, x 1000; "
            f"{patches} positions per image and level, the same in both sets, the first {images} images; channels "
            "normalised by the originals' mean and deviation (Karras et al. 2018: by each set's own); "
            f"{repeats} x {directions} directions, seed {seed}"
        )
        self._generator = torch.Generator().manual_seed(seed)
        self._left = images
        self._descriptors: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}

    def update(self, reconstruction: torch.Tensor, original: torch.Tensor) -> None:
        """Adds images (B, 3, H, W) in [0, 1], clamped; all of one size. Raises ValueError for other shapes."""
        if reconstruction.shape != original.shape or original.ndim != 4 or original.shape[1] != 3:
            shapes = f"{tuple(reconstruction.shape)} and {tuple(original.shape)}"
            raise ValueError(f"`reconstruction` and `original` must have one shape (B, 3, H, W), got {shapes}")
        pairs = torch.stack([original, reconstruction])[:, : self._left].float().clamp(0, 1)
        count = pairs.shape[1]
        self._left -= count
        if not count or min(original.shape[-2:]) < PATCH:
            return
        levels = [level.unflatten(0, (2, count)) for level in laplacian_pyramid(pairs.flatten(0, 1))]
        # Image by image, so that positions do not depend on how images are divided into batches.
        for index in range(count):
            for level in levels:
                originals, reconstructions = self._descriptors.setdefault(min(level.shape[-2:]), ([], []))
                first, second = self._draw(level[:, index]).cpu()
                originals.append(first)
                reconstructions.append(second)

    def _draw(self, pair: torch.Tensor) -> torch.Tensor:
        """(2, 3, H, W) -> the patches at `patches` random positions (2, patches, 3, 49)."""
        height, width = pair.shape[-2:]
        tops = torch.randint(height - PATCH + 1, (self.patches,), generator=self._generator)
        lefts = torch.randint(width - PATCH + 1, (self.patches,), generator=self._generator)
        offsets = torch.arange(PATCH)
        rows = (tops[:, None, None] + offsets[:, None]).to(pair.device)
        columns = (lefts[:, None, None] + offsets).to(pair.device)
        return pair[:, :, rows, columns].flatten(3).transpose(1, 2)

    def compute(self) -> dict[str, float | dict[str, float] | None]:
        """{"swd": mean over levels, "swd_levels": {side: distance}}, in 1/1000; None without images of 7 pixels."""
        generator = torch.Generator().manual_seed(self.seed)
        levels = {}
        for side, sets in self._descriptors.items():
            levels[str(side)] = self._distance(*map(torch.stack, sets), generator)
        mean = sum(levels.values()) / len(levels) if levels else None
        return {"swd": mean, "swd_levels": levels}

    def _distance(self, originals: torch.Tensor, reconstructions: torch.Tensor, generator: torch.Generator) -> float:
        mean = originals.mean((0, 1, 3), keepdim=True)
        # A level without any detail has no spread to divide by.
        std = originals.std((0, 1, 3), keepdim=True, correction=0).clamp_min(1e-6)
        first, second = (((points - mean) / std).flatten(2).flatten(0, 1) for points in (originals, reconstructions))
        distances = []
        for _ in range(self.repeats):
            directions = F.normalize(torch.randn(first.shape[1], self.directions, generator=generator), dim=0)
            # numpy sorts on a CPU five times as fast as torch.
            sorted_first, sorted_second = (np.sort((directions.T @ points.T).numpy()) for points in (first, second))
            distances.append(float(np.abs(sorted_first - sorted_second).mean(dtype=np.float64)))
        return 1000 * sum(distances) / len(distances)


def laplacian_pyramid(images: torch.Tensor) -> list[torch.Tensor]:
    """(B, C, H, W) -> levels from the finest on (Burt and Adelson 1983); they halve while both sides keep 16 pixels."""
    levels = []
    while min(images.shape[-2:]) >= 2 * SMALLEST_LEVEL:
        smaller = _filter(images, step=2)
        spread = torch.zeros_like(images)
        spread[..., ::2, ::2] = smaller
        levels.append(images - 4 * _filter(spread))
        images = smaller
    return [*levels, images]


def _filter(images: torch.Tensor, step: int = 1) -> torch.Tensor:
    """The binomial filter of 5 x 5, each channel for itself, the border mirrored, at every `step`-th pixel."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
    rows = sum(weight * padded[..., place : place + height : step, :] for place, weight in enumerate(BINOMIAL))
    return sum(weight * rows[..., place : place + width : step] for place, weight in enumerate(BINOMIAL))
