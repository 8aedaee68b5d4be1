"""Differentiable augmentation of what a discriminator sees (Zhao et al. 2020), real and reconstructed images alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from . import AUGMENTATIONS

TRANSLATION = 0.125  # of the side, in both directions
CUTOUT = 0.2  # of the side


class Augmentation:
    """Changes each image of a batch by random numbers of its own, from torch's global generator of the CPU.

    Args:
        names: of `AUGMENTATIONS`, in the order in which they are applied; none: images stay as they are.

    Raises ValueError for an unknown name.
    """

    def __init__(self, names: Sequence[str] = ("none",)) -> None:
        for name in names:
            if name not in AUGMENTATIONS:
                raise ValueError(f"`names` must be of {', '.join(AUGMENTATIONS)}, got {name!r}")
        self.names = tuple(name for name in names if name != "none")

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] -> the same shape; gradients pass."""
        for name in self.names:
            images = CHANGES[name](images)
        return images


def _color(images: torch.Tensor) -> torch.Tensor:
    """Brightness by up to 1/2, saturation by 0 to 2, contrast by 1/2 to 3/2."""
    brightness, saturation, contrast = torch.rand(3, len(images), 1, 1, 1).to(images.device)
    images = images + brightness - 0.5
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * 2 * saturation
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (contrast + 0.5)


def _translation(images: torch.Tensor) -> torch.Tensor:
    """Moved by up to an eighth of each side; 0 comes in from outside."""
    height, width = images.shape[-2:]
    down, across = round(height * TRANSLATION), round(width * TRANSLATION)
    tops, lefts = (torch.randint(2 * most + 1, (len(images),)).tolist() for most in (down, across))
    padded = F.pad(images, (across, across, down, down))
    places = zip(padded, tops, lefts, strict=True)
    return torch.stack([image[:, top : top + height, left : left + width] for image, top, left in places])


def _cutout(images: torch.Tensor) -> torch.Tensor:
    """A rectangle of a fifth of each side is 0; its middle may lie anywhere."""
    kept = torch.ones_like(images[:, :1])
    for number in range(len(images)):
        slices = []
        for side in images.shape[-2:]:
            hole = round(side * CUTOUT)
            start = int(torch.randint(side, ())) - hole // 2
            slices.append(slice(max(start, 0), max(start + hole, 0)))
        kept[number, :, slices[0], slices[1]] = 0
    return images * kept


CHANGES = {"color": _color, "translation": _translation, "cutout": _cutout}
