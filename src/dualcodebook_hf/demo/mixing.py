"""A region of a picture's token grid, and other tokens put there: another picture's, or one token again and again."""

from __future__ import annotations

import re
from collections.abc import Collection

import numpy as np
import torch
from PIL import Image, ImageOps

from ..autoencoder_dualcodebook import DualCodebookVQModel
from ..reconstruction import Reconstruction, decode_tokens, tokenize_image

_RUN = re.compile(r"(\d{1,9})\+(\d{1,9})")


def first_region(rows: int, columns: int) -> torch.Tensor:
    """bool (rows, columns): the ellipse in the middle that a new picture begins with."""
    y, x = (torch.linspace(-1, 1, 2 * side + 1)[1::2] for side in (rows, columns))
    return y[:, None] ** 2 + x[None, :] ** 2 <= 0.4


def region_text(region: torch.Tensor) -> str:
    """A region in words of the page: "3+2 9+1" is the squares 3, 4 and 9, counted row by row from 0."""
    steps = np.diff(np.concatenate([[0], region.flatten().numpy().astype(np.int8), [0]]))
    starts, ends = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
    return " ".join(f"{start}+{end - start}" for start, end in zip(starts, ends, strict=True))


def read_region(text: str, rows: int, columns: int) -> torch.Tensor:
    """The inverse of `region_text`. Raises ValueError for another text, or squares outside the grid."""
    region = torch.zeros(rows * columns, dtype=torch.bool)
    for run in text.split():
        match = _RUN.fullmatch(run)
        start, end = (int(match[1]), int(match[1]) + int(match[2])) if match else (0, -1)
        if not 0 <= start < end <= len(region):
            raise ValueError(f"`region` must be runs of squares within {rows} x {columns}, got '{run[:40]}'")
        region[start:end] = True
    return region.view(rows, columns)


def fitted_tokens(model: DualCodebookVQModel, result: Reconstruction, other: Image.Image) -> torch.Tensor:
    """Tokens (codebooks, h, w) of another image, resized and cut to the size of a result's."""
    return tokenize_image(model, ImageOps.fit(other, result.original.size, Image.Resampling.LANCZOS))


def replace_tokens(
    tokens: torch.Tensor, others: torch.Tensor, region: torch.Tensor, codebooks: Collection[int]
) -> torch.Tensor:
    """Puts other tokens into a region.

    Args:
        tokens: (codebooks, h, w).
        others: likewise, or (codebooks, 1, 1): the same token everywhere.
        region: bool (h, w).
        codebooks: places of the codebooks whose tokens are replaced, in the order of the tokens.
    """
    chosen = torch.tensor([index in codebooks for index in range(len(tokens))])
    return torch.where(chosen[:, None, None] & region, others, tokens)


def swap(model: DualCodebookVQModel, result: Reconstruction, others: torch.Tensor) -> list[Image.Image]:
    """Decodes the first codebook's tokens of one image with the second's of another, and the other way round.

    Args:
        model: it made all the tokens.
        result: the one image.
        others: tokens of the other, see `fitted_tokens`.
    """
    everywhere = torch.ones(result.tokens.shape[1:], dtype=torch.bool)
    mixed = [replace_tokens(result.tokens, others, everywhere, [index]) for index in (1, 0)]
    return [decode_tokens(model, tokens, result.original.size[::-1]) for tokens in mixed]
