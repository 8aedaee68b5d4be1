"""How much of what is generated looks real, and how much of what is real is generated: balls of nearest neighbours."""

from __future__ import annotations

import torch

from .neighbours import BLOCK, check_features, distance_blocks, neighbour_distances

PRECISION_K, DENSITY_K = 3, 5  # the papers' own
DEFINITION = (
    f"balls around each image up to its {PRECISION_K}rd nearest other image of its set, Euclidean, of pooled features "
    "(Kynkaanniemi et al. 2019): precision is the share of samples within a ball of a test image, recall the share of "
    f"test images within a ball of a sample; with the {DENSITY_K}th neighbour (Naeem et al. 2020): density is the "
    f"number of test images' balls that a sample lies in, over {DENSITY_K}, and coverage the share of test images with "
    "a sample in their ball; all depend on the numbers of images"
)


def precision_recall(samples: torch.Tensor, real: torch.Tensor) -> dict[str, float]:
    """Improved precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797).

    A ball includes its border, so that equal sets have 1 in all but the density, even where images repeat.

    Args:
        samples: features (M, D) of what was generated.
        real: features (N, D).

    Returns {"precision", "recall", "density", "coverage"}: all in [0, 1] but the density, which is about 1 for samples
    of one distribution and may be larger. Raises ValueError for other shapes, fewer than 6 rows, and values that are
    not finite.
    """
    check_features(samples=samples, real=real)
    for name, features in (("samples", samples), ("real", real)):
        if len(features) <= DENSITY_K:
            raise ValueError(f"`{name}` must hold at least {DENSITY_K + 1} images, got {len(features)}")
    of_real = neighbour_distances(real, DENSITY_K)
    of_samples = neighbour_distances(samples, PRECISION_K)[:, -1]
    precise = within = 0
    recalled = torch.zeros(len(real), dtype=torch.bool)
    covered = torch.zeros(len(real), dtype=torch.bool)
    for distances, radii in zip(distance_blocks(samples, real), of_samples.split(BLOCK), strict=True):
        in_ball = distances <= of_real[:, -1]
        within += in_ball.sum().item()
        covered |= in_ball.any(0)
        precise += (distances <= of_real[:, PRECISION_K - 1]).any(1).sum().item()
        recalled |= (distances <= radii[:, None]).any(0)
    return {
        "precision": precise / len(samples),
        "recall": recalled.double().mean().item(),
        "density": within / (DENSITY_K * len(samples)),
        "coverage": covered.double().mean().item(),
    }
