"""Distances of images in the features of EfficientNet-Lite: what training minimises and what a metric reports."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from . import FORMS, SMALLEST_VIEW
from .efficientnet_lite import EfficientNetLite

STAGES = (0, 1, 2, 4)  # compared; of strides 2, 4, 8 and 16
GRAM_STAGES = (1, 2)
LOGITS_WEIGHT = 0.1
GRAM_WEIGHT = 5.0  # its gradient in the pixels is then about half of the first term's
NORM_EPSILON = 1e-10
DISTS_CONSTANT = 1e-6
SHIFTS = SMALLEST_VIEW  # pixels


class EfficientNetDistance(nn.Module):
    """Perceptual distance of images in the features of EfficientNet-Lite. Gradients reach the images only.

    Both images are `shifted`, else what training paints would settle on the grid of the network's strides.
    Convolutions run in the surrounding autocast's type, everything after them in float32.

    Args:
        network: its weights stay as they are.
        form: what is compared: `stages`, `stage_distance` (LPIPS' form without learned heads); `stages-logits`, that
            plus 0.1 x the mean squared difference of the 1000 logits; `dists`, `dists_distance`; `stages-gram`, the
            first plus 5 x `gram_distance`.
        shifts: 1: images stay whole, and no random number is drawn.

    Raises ValueError for an unknown form.
    """

    def __init__(self, network: EfficientNetLite, form: str = "stages", shifts: int = SHIFTS) -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"`form` must be one of {', '.join(FORMS)}, got {form!r}")
        self.network, self.form, self.shifts = network, form, shifts

    def forward(self, x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Two batches (B, 3, H, W) in [-1, 1] -> distances (B,) float32. Symmetric; 0 for equal images.

        Raises ValueError for shapes that differ or are not (B, 3, H, W) with H, W >= 16.
        """
        check_image_pair(x_hat, x, SMALLEST_VIEW)
        if self.shifts > 1:
            x_hat, x = shifted(x_hat, x, self.shifts)
        last = 6 if self.form == "stages-logits" else max(STAGES)
        first, second = self.network.stages(x_hat, last), self.network.stages(x, last)
        if self.form == "stages-logits":
            logits = [self.network.classifier(self.network.head(stages[-1])) for stages in (first, second)]
        with torch.autocast(x.device.type, enabled=False):
            if self.form == "dists":
                return dists_distance(first, second)
            distance = stage_distance(first, second)
            if self.form == "stages-logits":
                distance = distance + LOGITS_WEIGHT * (logits[0].float() - logits[1].float()).square().mean(1)
            elif self.form == "stages-gram":
                distance = distance + GRAM_WEIGHT * gram_distance(first, second)
        return distance


def shifted(x_hat: torch.Tensor, x: torch.Tensor, shifts: int = SHIFTS) -> tuple[torch.Tensor, torch.Tensor]:
    """Both batches without the same 0 to `shifts` - 1 rows at the top and columns at the left.

    They are drawn for each batch, by torch's global generator of the CPU.
    """
    down, across = torch.randint(shifts, (2,)).tolist()
    return x_hat[..., down:, across:], x[..., down:, across:]


def check_image_pair(x_hat: torch.Tensor, x: torch.Tensor, smallest: int) -> None:
    """Raises ValueError for shapes that differ or are not (B, 3, H, W) with H, W >= `smallest`."""
    if x_hat.shape != x.shape or x.ndim != 4 or x.shape[1] != 3 or min(x.shape[-2:]) < smallest:
        raise ValueError(
            f"`x_hat` and `x` must be of one shape (B, 3, H, W) with H, W >= {smallest}, "
            f"got {tuple(x_hat.shape)} and {tuple(x.shape)}"
        )


def unit_length(features: torch.Tensor, epsilon: float = NORM_EPSILON) -> torch.Tensor:
    """(B, C, h, w) -> float32, of length 1 over the channels at every position."""
    # The epsilon stands under the root, as in torchmetrics: a dead position has a gradient of 0 there, not NaN.
    features = features.float()
    return features / (features.square().sum(1, keepdim=True) + epsilon).sqrt()


def stage_distance(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> torch.Tensor:
    """Squared differences of unit-length features, summed over channels and `STAGES`, mean over positions.

    Two lists of the features (B, C, h, w) of all stages -> (B,) float32.
    """
    return sum(
        (unit_length(first[stage]) - unit_length(second[stage])).square().sum(1).mean((1, 2)) for stage in STAGES
    )


def dists_distance(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> torch.Tensor:
    """1 - the mean over `STAGES` and channels of the agreement of means and of structure (DISTS, Ding et al. 2020).

    Two lists of the features (B, C, h, w) of all stages -> (B,) float32. Of each channel, over positions: the means
    (2 m m' + c) / (m^2 + m'^2 + c) and the structure (2 cov + c) / (v + v' + c), c = 1e-6, each counting one half.
    """
    agreements = []
    for stage in STAGES:
        x, y = first[stage].float().flatten(2), second[stage].float().flatten(2)
        mean_x, mean_y = x.mean(2), y.mean(2)
        x, y = x - mean_x[..., None], y - mean_y[..., None]
        means = (2 * mean_x * mean_y + DISTS_CONSTANT) / (mean_x.square() + mean_y.square() + DISTS_CONSTANT)
        variances = x.square().mean(2) + y.square().mean(2)
        structure = (2 * (x * y).mean(2) + DISTS_CONSTANT) / (variances + DISTS_CONSTANT)
        agreements.append((means + structure).mean(1) / 2)
    return 1 - torch.stack(agreements).mean(0)


def gram_distance(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> torch.Tensor:
    """Squared differences of Gram matrices, summed over their entries and `GRAM_STAGES`.

    Two lists of the features (B, C, h, w) of all stages -> (B,) float32. Features have unit length, so that a Gram
    matrix, the mean over positions, has trace 1.
    """
    distance = 0.0
    for stage in GRAM_STAGES:
        grams = [_gram(unit_length(stages[stage]).flatten(2)) for stages in (first, second)]
        distance = distance + (grams[0] - grams[1]).square().sum((1, 2))
    return distance


def _gram(vectors: torch.Tensor) -> torch.Tensor:
    return vectors @ vectors.transpose(1, 2) / vectors.shape[2]
