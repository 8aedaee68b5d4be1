"""Average features of reconstructions against those of their originals: feature matching."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from . import SMALLEST_VIEW
from .distances import SHIFTS, check_image_pair, shifted
from .efficientnet_lite import HEAD_WIDTH, EfficientNetLite

DECAY = 0.98  # of the averaged difference: about the last 50 batches
VARIANCE_DECAY = 0.99
VARIANCE_FLOOR = 1e-3


class FeatureMatching(nn.Module):
    """How far reconstructions are from originals in the mean of many, by the pooled features of EfficientNet-Lite.

    A distance of single images asks for the most probable details, and those are smooth; the mean of many images tells
    that the details are missing (Salimans et al. 2016, arXiv 1606.03498, section 3.1; with a fixed network and moving
    averages of the difference: GFMN, arXiv 1904.02762). Of each of the 1280 features f, m is the moving average over
    batches of mean(f(x_hat) - f(x)), decay .98, corrected for its start, and v the variance of f(x); the term is the
    mean over features of m^2 / (v + .001). Its gradient at each image is that of the mean of 2 m f(x_hat) / (v + .001).

    Images are `shifted`. In training mode a forward pass moves the averages; several processes have the same ones.

    Args:
        network: its weights stay as they are.
        shifts: 1: images stay whole, and no random number is drawn.

    Attributes:
        averages: the state, which checkpoints hold.
    """

    def __init__(self, network: EfficientNetLite, shifts: int = SHIFTS) -> None:
        super().__init__()
        self.network, self.shifts, self.averages = network, shifts, FeatureAverages()

    def forward(self, x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Two batches (B, 3, H, W) in [-1, 1] -> scalar, float32. Gradients reach `x_hat` alone.

        Raises ValueError for shapes that differ or are not (B, 3, H, W) with H, W >= 16.
        """
        check_image_pair(x_hat, x, SMALLEST_VIEW)
        if self.shifts > 1:
            x_hat, x = shifted(x_hat, x, self.shifts)
        with torch.no_grad():
            originals = self.network.pooled(x).float()
        features = self.network.pooled(x_hat).float()
        if self.training:
            self.averages.update(features.detach(), originals)
        difference, variance = self.averages()
        slope = difference / (variance + VARIANCE_FLOOR)
        return (slope * difference).mean() + 2 * (slope * (features - features.detach())).mean()


class FeatureAverages(nn.Module):
    """Moving averages over batches: of what reconstructions lack in each feature, and of the originals' moments."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("difference", "mean", "square"):
            self.register_buffer(name, torch.zeros(HEAD_WIDTH))
        self.register_buffer("batches", torch.zeros(()))

    @torch.no_grad()
    def update(self, features: torch.Tensor, originals: torch.Tensor) -> None:
        """Adds a batch of reconstructions' features and their originals', both (B, 1280) float32."""
        found = torch.stack([(features - originals).mean(0), originals.mean(0), originals.square().mean(0)])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(found)
            found /= dist.get_world_size()
        decays = (DECAY, VARIANCE_DECAY, VARIANCE_DECAY)
        for average, value, decay in zip((self.difference, self.mean, self.square), found, decays, strict=True):
            average.lerp_(value, 1 - decay)
        self.batches += 1

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean difference and the originals' variance, both (1280,), without the zeros that averages begin at."""
        weight, variance_weight = (1 - decay ** self.batches.clamp_min(1) for decay in (DECAY, VARIANCE_DECAY))
        mean, square = self.mean / variance_weight, self.square / variance_weight
        return self.difference / weight, (square - mean.square()).clamp_min(0)
