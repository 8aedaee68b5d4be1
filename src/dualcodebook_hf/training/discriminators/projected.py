"""The projected discriminator (Sauer et al. 2021): judges features of a frozen classifier, mixed at random."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ...perceptual.efficientnet_lite import EfficientNetLite
from .norms import build_norm

TAPS = (1, 2, 4, 6)  # stages of the classifier, of strides 4, 8, 16 and 32
WIDEST = 8  # times `channels`
START_ITERATIONS = 15
NORM_EPSILON = 1e-12


class SpectralConv2d(nn.Conv2d):
    """A convolution without bias whose weight, as a matrix, is divided by its largest singular value (Miyato 2018).

    One power iteration each forward pass, kept in training mode; in float32 under any autocast.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.register_buffer("direction", F.normalize(torch.randn(out_channels), dim=0))
        for _ in range(START_ITERATIONS):
            self.direction.copy_(self._iterate(self.weight.flatten(1))[0])

    @torch.no_grad()
    def _iterate(self, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        right = F.normalize(matrix.T @ self.direction, dim=0, eps=NORM_EPSILON)
        return F.normalize(matrix @ right, dim=0, eps=NORM_EPSILON), right

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            matrix = self.weight.flatten(1)
            left, right = self._iterate(matrix)
            if self.training:
                self.direction.copy_(left)
            weight = self.weight / (left @ (matrix @ right))
        return self._conv_forward(x, weight, None)


class ProjectedDiscriminator(nn.Module):
    """Judges images by a classifier's features: (B, 3, H, W) in [-1, 1] -> logits (B, N) of four heads.

    The classifier is frozen. Random 1 x 1 convolutions, frozen too, mix the channels of its four taps, and then the
    taps from the deepest to the shallowest: added, enlarged, mixed. A head on each mixture has convolutions 4 x 4 of
    stride 2 down to 1/32 of the side, then one to a single channel. What is random is in the state dict, as the
    classifier is.

    Args:
        network: pretrained; it may serve a loss at the same time.
        channels: width of the shallowest projection; the others and the heads have up to 8 times as many.
        norm: of the heads, `batch` or `group`.

    Raises ValueError for sizes below 1 and an unknown norm, and in `forward` for images with a side below 128.
    """

    smallest_side = 128

    def __init__(self, network: EfficientNetLite, channels: int = 64, norm: str = "batch") -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"`channels` must be at least 1, got {channels}")
        self.network = network
        widths = [channels * 2**number for number in range(len(TAPS))]
        self.projections = nn.ModuleList(
            nn.Conv2d(network.widths[tap], width, 1) for tap, width in zip(TAPS, widths, strict=True)
        )
        mixed = [channels, *widths[:-1]]  # of the mixtures, from the shallowest
        self.mixers = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(widths, mixed, strict=True))
        for convolution in (*self.projections, *self.mixers):
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="linear")
            nn.init.zeros_(convolution.bias)
            convolution.requires_grad_(False)
        widest = channels * WIDEST
        self.heads = nn.ModuleList(
            _head(width, widest, blocks, norm) for width, blocks in zip(mixed, (4, 3, 2, 1), strict=True)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, high for images taken for real; those of the shallowest head come first."""
        if min(x.shape[-2:]) < self.smallest_side:
            raise ValueError(f"`x` must have sides of at least {self.smallest_side} pixels, got {tuple(x.shape)}")
        logits = [head(mixture) for head, mixture in zip(self.heads, self._mixtures(x), strict=True)]
        return torch.cat([found.flatten(1) for found in logits], dim=1)

    def _mixtures(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Of strides 2, 4, 8 and 16."""
        stages = self.network.stages(x)
        taps = [projection(stages[tap]) for tap, projection in zip(TAPS, self.projections, strict=True)]
        sizes = [stages[0].shape[-2:], *(tap.shape[-2:] for tap in taps[:-1])]
        mixtures, mixture = [], 0.0
        for tap, mixer, size in zip(reversed(taps), reversed(self.mixers), reversed(sizes), strict=True):
            enlarged = F.interpolate(tap + mixture, size=size, mode="bilinear", align_corners=True)
            mixture = mixer(enlarged)
            mixtures.append(mixture)
        return mixtures[::-1]


def _head(width: int, widest: int, blocks: int, norm: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for block in range(blocks):
        out = widest // 2 ** (blocks - 1 - block)
        layers += [SpectralConv2d(width, out, 4, 2, 1), build_norm(norm, out), nn.LeakyReLU(0.2)]
        width = out
    return nn.Sequential(*layers, SpectralConv2d(width, 1, 4))
