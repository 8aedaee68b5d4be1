"""k-means, principal components and patches: what the linear codec and an initialization from images both need."""

from __future__ import annotations

import math

import torch

from .codebooks import nearest_codes

# Points that the first centres are drawn from, one after the other.
SEEDING_POINTS = 20_000
KMEANS_ITERATIONS = 30


def patchify(images: torch.Tensor, side: int) -> torch.Tensor:
    """Images (B, C, H, W), H and W multiples of `side`, to their patches (B, H/side, W/side, C * side * side)."""
    patches = images.unflatten(3, (-1, side)).unflatten(2, (-1, side))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3)


def unpatchify(patches: torch.Tensor, side: int) -> torch.Tensor:
    """The inverse of `patchify`."""
    patches = patches.unflatten(-1, (-1, side, side))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def principal_components(covariance: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` directions of largest variance, the largest first.

    Args:
        covariance: (D, D), or any positive multiple of it; decomposed in float64.
        count: at most D.

    Returns orthonormal directions (count, D) and variances (count,), not negative, both float32.
    """
    variances, directions = torch.linalg.eigh(covariance.double())  # sorted upwards
    return directions.flip(1).T[:count].float(), variances.flip(0)[:count].clamp_min(0).float()


def kmeans(
    points: torch.Tensor, size: int, generator: torch.Generator, iterations: int = KMEANS_ITERATIONS
) -> torch.Tensor:
    """Lloyd's algorithm from k-means++ centres.

    A centre that loses all its points moves to the point that is farthest from its own centre. Ends early when an
    iteration lowers the error by less than 1e-4 of itself.

    Args:
        points: (M, D), M >= size.
        size: number of centres.
        generator: draws the first centres.
        iterations: at most.

    Returns the centres (size, D). Raises ValueError when there are fewer points than centres.
    """
    if len(points) < size:
        raise ValueError(f"`points` must be at least {size}, one per centre, got {len(points)}")
    centres = _spread_centres(points, size, generator)
    last = math.inf
    for _ in range(iterations):
        ids = nearest_codes(points, centres)
        distances = (points - centres[ids]).square().sum(1)
        counts = torch.bincount(ids, minlength=size)
        centres = torch.zeros_like(centres).index_add_(0, ids, points) / counts.clamp_min(1)[:, None]
        dead = (counts == 0).nonzero()[:, 0]
        centres[dead] = points[distances.topk(len(dead)).indices]
        error = distances.sum().item()
        if not len(dead) and last - error <= 1e-4 * error:
            break
        last = error
    return centres


def _spread_centres(points: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """k-means++: each next centre is a point drawn with probability ~ squared distance to the nearest one so far."""
    sample = points[torch.randperm(len(points), generator=generator)[: max(SEEDING_POINTS, size)].to(points.device)]
    centres = [sample[0]]
    distances = (sample - sample[0]).square().sum(1)
    for _ in range(size - 1):
        # Drawn by hand on the CPU, in float64: the same seed gives the same centres on every device.
        cumulative = distances.double().cpu().cumsum(0)
        draw = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
        chosen = sample[min(int(torch.searchsorted(cumulative, draw)), len(sample) - 1)]
        centres.append(chosen)
        distances = torch.minimum(distances, (sample - chosen).square().sum(1))
    return torch.stack(centres)
