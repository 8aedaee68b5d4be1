"""The features that three metrics take from EfficientNet-Lite2, computed once for each batch of images."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

from ..perceptual.distances import stage_distance
from ..perceptual.efficientnet_lite import EfficientNetLite
from .images import checked_images

REMEMBERED = 2  # batches: originals and reconstructions


class EfficientNetFeatures:
    """Images -> pooled features of a classifier, as an extractor of `FrechetDistance` and `KernelDistance`.

    Images are rounded to 8 bits, as a PNG would hold them, and resized to the size that the network was trained on,
    bicubic with antialias, clamped. The features of the last two batches are kept: each metric asks for the same ones.

    Args:
        network: pretrained.

    Attributes:
        protocol: weights and input, in words; a part of every definition.
        description: that, and which features.
    """

    def __init__(self, network: EfficientNetLite) -> None:
        self.network = network
        side = network.image_size
        self.protocol = (
            f"EfficientNet-{network.variant.capitalize()} (weights' sha256 {network.sha256}) on images rounded "
            f"to 8 bits and resized to {side} x {side}, bicubic with antialias, in [-1, 1]"
        )
        self.description = f"1280 pooled of {self.protocol}; paired sets of equal size; not comparable with FID"
        self._remembered: list[tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]] = []

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1] -> features (B, 1280) float32."""
        return self._measure(images)[1]

    def distance(self, reconstruction: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
        """Two batches (B, 3, H, W) in [0, 1], clamped -> `stage_distance` of their features (B,) float32."""
        first, second = (self._measure(images)[0] for images in checked_images(reconstruction, original))
        return stage_distance(first, second)

    @torch.no_grad()
    def _measure(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        for seen, stages, pooled in self._remembered:
            if seen.shape == images.shape and seen.device == images.device and torch.equal(seen, images):
                return stages, pooled
        rounded = (images * 255).round() / 255
        resized = F.interpolate(rounded, size=(self.network.image_size,) * 2, mode="bicubic", antialias=True)
        stages = self.network.stages(resized.clamp(0, 1) * 2 - 1)
        pooled = self.network.head(stages[-1])
        self._remembered = [*self._remembered[1 - REMEMBERED :], (images, stages, pooled)]
        return stages, pooled


@lru_cache(maxsize=1)
def effnetlite2_features(device: str | torch.device) -> EfficientNetFeatures:
    """The one network behind all metrics named `..._effnetlite2`, loaded once. Raises MissingWeightsError."""
    return EfficientNetFeatures(EfficientNetLite.from_pretrained("lite2").to(device))
