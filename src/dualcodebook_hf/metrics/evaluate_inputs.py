"""What the folders under `metrics/` take, in the terms of `evaluate` and `datasets`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ..image_processing_dualcodebook import read_image, to_pixels

if TYPE_CHECKING:
    from datasets import Features

# Rounding of a resize, not another range.
RANGE_TOLERANCE = 1e-3


def image_pair_features() -> list[Features]:
    """`predictions` and `references`: PIL images, files or uint8 arrays (H, W, C); or floats (C, H, W) in [0, 1]."""
    from datasets import Features, Image, List, Value

    kinds = Image(), List(List(List(Value("float32"))))
    return [Features({"predictions": first, "references": second}) for first in kinds for second in kinds]


def token_features() -> Features:
    """`predictions`: token grids (codebooks, h, w), as floats: `datasets` would cut 1.7 to an integer unasked."""
    from datasets import Features, List, Value

    return Features({"predictions": List(List(List(Value("float64"))))})


def token_grid(prediction: Any) -> torch.Tensor:
    """One row of `token_features` -> tokens (codebooks, h, w) int64. Raises ValueError for a fraction."""
    tokens = torch.tensor(prediction, dtype=torch.float64)
    if not torch.equal(tokens, tokens.round()):
        raise ValueError(
            f"`predictions` must be integer tokens (codebooks, h, w), got {tokens[tokens != tokens.round()][0]}"
        )
    return tokens.long()


def image_pair(prediction: Any, reference: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """One row of `image_pair_features` -> two tensors (C, H, W) float32, references in [0, 1].

    Images of 8 bits are divided by 255; predictions in floating point may leave the range, they are clamped later.
    Raises ValueError when the shapes differ or are not (1, H, W) or (3, H, W), or when a reference leaves [0, 1].
    """
    pixels = {"predictions": _pixels(prediction, "predictions"), "references": _pixels(reference, "references")}
    shapes = [tuple(part.shape) for part in pixels.values()]
    if shapes[0] != shapes[1]:
        raise ValueError(f"`predictions` and `references` must have the same shapes, got {shapes[0]} and {shapes[1]}")
    low, high = pixels["references"].aminmax()
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
        raise ValueError(f"`references` must lie in [0, 1] or be uint8 images, got [{low:.4g}, {high:.4g}]")
    return pixels["predictions"], pixels["references"]


def _pixels(image: Any, name: str) -> torch.Tensor:
    if isinstance(image, Image.Image):
        if image.mode == "F":
            raise ValueError(f"`{name}` in floating point must be of shape (C, H, W), got {image.size[::-1]}")
        return (to_pixels(read_image(image)) + 1) / 2
    pixels = torch.tensor(image, dtype=torch.float32)
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3) or 0 in pixels.shape:
        raise ValueError(f"`{name}` in floating point must be of shape (C, H, W), C 1 or 3, got {tuple(pixels.shape)}")
    return pixels
