"""The PatchGAN discriminator (Isola et al. 2017) in the paper's form."""

from __future__ import annotations

import torch
from torch import nn

from .norms import build_norm

WIDEST = 8  # times `channels`


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches of an image: (B, in_channels, H, W) in [-1, 1] -> logits (B, 1, h, w).

    4x4 convolutions with padding 1: `layers` of stride 2, one of stride 1, then one of stride 1 to a single channel.
    Widths double from `channels` on, up to 8 times; LeakyReLU 0.2; BatchNorm, with no bias before it, from the second
    convolution on, not at the output. With 3 layers: strides 2, 2, 2, 1, 1, widths 64-128-256-512-1, patches of 70
    pixels (paper: the loss). Weights from N(0, 0.02), BatchNorm's from N(1, 0.02) and its biases 0; the biases of the
    first and the last convolution keep torch's initialisation.

    Args:
        channels: width of the first convolution.
        layers: convolutions of stride 2.
        in_channels: of the images.
        norm: `batch`, as in the paper, or `group`.

    Raises ValueError for sizes below 1, and in `forward` for images too small for one logit (24 pixels, 3 layers).
    """

    def __init__(self, channels: int = 64, layers: int = 3, in_channels: int = 3, norm: str = "batch") -> None:
        super().__init__()
        for name, value in (("channels", channels), ("layers", layers), ("in_channels", in_channels)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        self.smallest_side = 3 * 2**layers
        widths = [channels * min(2**number, WIDEST) for number in range(layers + 1)]
        modules: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for number in range(1, layers + 1):
            stride = 2 if number < layers else 1
            modules += [
                nn.Conv2d(widths[number - 1], widths[number], 4, stride, 1, bias=False),
                build_norm(norm, widths[number]),
                nn.LeakyReLU(0.2),
            ]
        modules.append(nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.model = nn.Sequential(*modules)
        self.apply(_initialize)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, high for images taken for real: (B, in_channels, H, W) -> (B, 1, h, w)."""
        if min(x.shape[-2:]) < self.smallest_side:
            raise ValueError(f"`x` must have sides of at least {self.smallest_side} pixels, got {tuple(x.shape)}")
        return self.model(x)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
