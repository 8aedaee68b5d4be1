"""Fréchet distance between the features of two sets of images: rFID, with Inception's features or any others."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec

import torch

from ..packages import how_to_install
from .images import checked_images

# Images (B, 3, H, W) float32 in [0, 1] -> features (B, D).
FeatureExtractor = Callable[[torch.Tensor], torch.Tensor]


INCEPTION = "2048 of torch-fidelity's TensorFlow Inception, images rounded to 8 bits, resized to 299 x 299 as by it"


class FeatureMoments:
    """Mean and unbiased covariance of features, float64, batch by batch: memory does not grow with their number."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)

    def update(self, features: torch.Tensor) -> None:
        """Adds features (B, D). Raises ValueError when they are of another shape or width, or not all finite."""
        width = len(self.mean) if self.count else "D"
        if features.ndim != 2 or 0 in features.shape or (self.count and features.shape[1] != width):
            raise ValueError(f"`features` must be of shape (B, {width}), got {tuple(features.shape)}")
        features = features.detach().cpu().double()
        if not torch.isfinite(features).all():
            raise ValueError("`features` must be finite, got NaN or infinity")
        count, mean = len(features), features.mean(0)
        centred = features - mean
        scatter = centred.T @ centred
        if self.count:
            # Two samples joined (Chan et al.): exact where the mean is large against the spread.
            shift = mean - self.mean
            scatter += self._scatter + torch.outer(shift, shift) * (self.count * count / (self.count + count))
            mean = self.mean + shift * (count / (self.count + count))
        self.count, self.mean, self._scatter = self.count + count, mean, scatter

    @property
    def covariance(self) -> torch.Tensor:
        """(D, D), divided by N - 1. Raises ValueError for fewer than two images."""
        if self.count < 2:
            raise ValueError(f"a covariance needs features of at least 2 images, got {self.count}")
        return self._scatter / (self.count - 1)


def frechet_distance(
    mean_a: torch.Tensor, covariance_a: torch.Tensor, mean_b: torch.Tensor, covariance_b: torch.Tensor
) -> float:
    """Squared Fréchet distance of two Gaussians: |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)), at least 0.

    Means (D,), covariances (D, D), symmetric and positive semi-definite; singular ones (fewer samples than D) are fine.
    With A = F F^T and B = G G^T, tr (A B)^(1/2) is the sum of the singular values of F^T G: unlike the square root of
    A B, which is not symmetric, it is real, and it does not blow up rounding where eigenvalues are 0.
    Raises ValueError when the shapes do not agree.
    """
    width = len(mean_a)
    shapes = [tuple(part.shape) for part in (mean_a, covariance_a, mean_b, covariance_b)]
    if shapes != [(width,), (width, width)] * 2:
        raise ValueError(f"means and covariances must be of shape (D,), (D, D), (D,), (D, D), got {shapes}")
    mean_a, covariance_a, mean_b, covariance_b = (
        part.double() for part in (mean_a, covariance_a, mean_b, covariance_b)
    )
    overlap = torch.linalg.svdvals(_factor(covariance_a).T @ _factor(covariance_b)).sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * overlap
    return max(distance.item(), 0.0)


def _factor(covariance: torch.Tensor) -> torch.Tensor:
    """F (D, rank) with F F^T = covariance."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    # What rounding leaves of a zero eigenvalue, by LAPACK's usual measure of rank.
    kept = values > values.max().clamp_min(0) * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


class FrechetDistance:
    """rFID: squared Fréchet distance between the features of reconstructions and those of their originals.

    Args:
        extractor: images (B, 3, H, W) float32 in [0, 1] -> features (B, D); `inception_extractor()` makes it FID.
    """

    name = "rfid"

    def __init__(self, extractor: FeatureExtractor) -> None:
        self.extractor = extractor
        features = getattr(extractor, "description", getattr(extractor, "__name__", type(extractor).__name__))
        self.definition = (
            "squared Frechet distance of features of reconstructions and originals, unbiased covariances, of all "
            f"images; features: {features}"
        )
        self.reconstructions, self.originals = FeatureMoments(), FeatureMoments()

    @torch.no_grad()
    def update(self, reconstruction: torch.Tensor, original: torch.Tensor) -> None:
        """Adds images, both (B, 3, H, W) in [0, 1], clamped. Raises ValueError when a shape or type is wrong."""
        reconstruction, original = checked_images(reconstruction, original)
        for moments, images in ((self.reconstructions, reconstruction), (self.originals, original)):
            features = self.extractor(images)
            if len(features) != len(images):
                raise ValueError(f"`extractor` must give {len(images)} rows, got features {tuple(features.shape)}")
            moments.update(features)

    def compute(self) -> dict[str, float]:
        """{"rfid": the distance so far}. Raises ValueError for fewer than two images.

        Warns when there are no more images than features: the covariances are then singular. The distance is biased
        upwards by few images in any case, so it compares only between equal numbers of them.
        """
        count, width = self.originals.count, len(self.originals.mean)
        covariances = self.reconstructions.covariance, self.originals.covariance
        if count <= width:
            warnings.warn(
                f"Fréchet distance of {count} images with {width} features each: the covariances are singular and "
                "the distance is far too uncertain to compare; take more images than features",
                stacklevel=2,
            )
        means = self.reconstructions.mean, self.originals.mean
        return {self.name: frechet_distance(means[0], covariances[0], means[1], covariances[1])}


def inception_extractor(device: str | torch.device | None = None) -> FeatureExtractor:
    """FID's features: 2048 of the pooled layer of the TensorFlow Inception, as torch-fidelity keeps it.

    Images are rounded to 8 bits and resized to 299 x 299 as the original FID does. Downloads the weights at the first
    call. Raises ImportError that says what to install.
    """
    missing = [name for name in ("torchmetrics", "torch_fidelity", "torchvision") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"FID needs {how_to_install('fid', *missing)}; torchvision must match your torch; or give a feature "
            "extractor of your own"
        )
    from torchmetrics.image.fid import NoTrainInceptionV3

    network = NoTrainInceptionV3("inception-v3-compat", ["2048"], antialias=False).to(device)

    def extract(images: torch.Tensor) -> torch.Tensor:
        return network((images.clamp(0, 1) * 255).round().to(device, torch.uint8))

    extract.description = INCEPTION
    return extract
