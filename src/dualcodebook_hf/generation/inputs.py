"""What the pipeline begins from: images, masks and tokens in all the shapes that diffusers' pipelines take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..image_processing_dualcodebook import DualCodebookImageProcessor
from ..pil_images import read_image
from .masking import hidden_tokens

IMAGE_STRENGTH = 0.5  # of image-to-image, where none is named
WHITE = 0.5  # of [0, 1], from which on a mask is white


@dataclass(frozen=True)
class Start:
    """What is known before the first step, for n images.

    Attributes:
        size: (H, W) of the images.
        grid: (h, w) of their tokens.
        pixels: (n, 3, H, W) in [-1, 1]; None: no image was given.
        tokens: int64 (n, codebooks, h, w), mask tokens among them; None: none were given.
        mask: boolean (1 or n, H, W), what is painted anew; None: no mask was given.
        positions: boolean (1 or n, h, w), where tokens may be hidden.
        strength: share of these positions that is hidden, in (0, 1].
    """

    size: tuple[int, int]
    grid: tuple[int, int]
    pixels: torch.Tensor | None
    tokens: torch.Tensor | None
    mask: torch.Tensor | None
    positions: torch.Tensor
    strength: float

    @property
    def is_empty(self) -> bool:
        """Whether nothing is known."""
        return self.pixels is None and self.tokens is None

    def __len__(self) -> int:
        given = self.tokens if self.pixels is None else self.pixels
        return 1 if given is None else len(given)

    def hidden_counts(self) -> torch.Tensor:
        """How many positions are to be hidden in each image, (1 or n,)."""
        return (self.positions.flatten(1).sum(1) * self.strength).round().long()


def read_start(
    codebook_sizes: Sequence[int],
    factor: int,
    trained_size: tuple[int, int],
    image: Any = None,
    mask_image: Any = None,
    tokens: torch.Tensor | None = None,
    size: tuple[int | None, int | None] = (None, None),
    strength: float | None = None,
) -> Start:
    """The beginning that the arguments of the pipeline's call describe.

    Args:
        codebook_sizes: of the tokens.
        factor: f of the tokenizer.
        trained_size: (H, W) of images without another size.
        image: see the pipeline's call, as all that follows.
        mask_image: likewise.
        tokens: likewise.
        size: (`height`, `width`).
        strength: likewise.

    Raises ValueError, by the call's names, for what is wrong or does not fit together.
    """
    wanted = check_size(size)
    if image is not None and tokens is not None:
        raise ValueError("`tokens` must be None beside an `image`: begin from one of them")
    for name, value in (("mask_image", mask_image), ("strength", strength)):
        if value is not None and image is None and tokens is None:
            raise ValueError(f"`{name}` must come with an `image` or `tokens` to begin from")
    if strength is not None and not 0 < strength <= 1:
        raise ValueError(f"`strength` must lie in (0, 1], got {strength}")
    pixels = None if image is None else read_pixels(image, wanted)
    if tokens is not None:
        check_tokens(tokens, codebook_sizes)
        found = wanted or tuple(factor * side for side in tokens.shape[2:])
    else:
        found = wanted or trained_size if pixels is None else tuple(pixels.shape[2:])
    grid = tuple(-(-side // factor) for side in found)
    if tokens is not None and tuple(tokens.shape[2:]) != grid:
        raise ValueError(
            f"`height` and `width` must be of an image of the tokens' grid {tuple(tokens.shape[2:])}, got {found}"
        )
    mask = None if mask_image is None else read_mask(mask_image, found, resize=wanted is not None)
    some_hidden = tokens is not None and bool(hidden_tokens(tokens, codebook_sizes).any())
    if mask is not None:
        positions = F.max_pool2d(mask[:, None].float(), factor, ceil_mode=True)[:, 0] > 0
    else:  # hidden tokens alone say what is painted, unless there shall be more
        positions = torch.full((1, *grid), strength is not None or not some_hidden)
    if strength is None:
        image_to_image = mask is None and not some_hidden and (image is not None or tokens is not None)
        strength = IMAGE_STRENGTH if image_to_image else 1.0
    start = Start(found, grid, pixels, None if tokens is None else tokens.long(), mask, positions, strength)
    check_start(start, codebook_sizes)
    return start


def check_size(size: tuple[int | None, int | None]) -> tuple[int, int] | None:
    """(H, W), or None where neither is given. Raises ValueError for one without the other, and below 1."""
    given = [(name, side) for name, side in zip(("height", "width"), size, strict=True) if side is not None]
    for name, side in given:
        if not isinstance(side, int) or side < 1:
            raise ValueError(f"`{name}` must be a whole number of at least 1, got {side!r}")
    if len(given) == 1:
        raise ValueError(f"`height` and `width` must be given together, got {given[0][0]}={given[0][1]} alone")
    return tuple(side for _, side in given) or None


def check_start(start: Start, codebook_sizes: Sequence[int]) -> None:
    """Raises ValueError unless masks and images are as many, and something is painted in each."""
    if len(start.positions) not in (1, len(start)):
        raise ValueError(
            f"`mask_image` must be one, or one for each of {len(start)} images, got {len(start.positions)}"
        )
    some = start.hidden_counts() > 0
    if start.tokens is not None:
        some = some | hidden_tokens(start.tokens, codebook_sizes).flatten(1).any(1).cpu()
    if not (start.is_empty or some.all()):
        name = "strength" if start.mask is None or start.positions.flatten(1).any(1).all() else "mask_image"
        raise ValueError(f"`{name}` must leave something to paint in every image, and leaves nothing")


def check_tokens(tokens: torch.Tensor, codebook_sizes: Sequence[int]) -> None:
    """Raises ValueError unless tokens are those of the codebooks, or mask tokens."""
    shape = f"(B, {len(codebook_sizes)}, h, w)"
    if not isinstance(tokens, torch.Tensor) or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(
            f"`tokens` must be a tensor of integers of shape {shape}, got {getattr(tokens, 'dtype', type(tokens))}"
        )
    if tokens.ndim != 4 or tokens.shape[1] != len(codebook_sizes) or 0 in tokens.shape:
        raise ValueError(f"`tokens` must be of shape {shape}, got {tuple(tokens.shape)}")
    for index, size in enumerate(codebook_sizes):
        low, high = tokens[:, index].long().aminmax()
        if low < 0 or high > size:
            raise ValueError(
                f"`tokens` of codebook {index} must lie in [0, {size}), or be {size}, hidden; got [{low}, {high}]"
            )


def read_pixels(image: Any, size: tuple[int, int] | None) -> torch.Tensor:
    """Images -> (n, 3, H, W) in [-1, 1], of (H, W) `size`; None: of their own.

    Raises ValueError for what `DualCodebookImageProcessor` does not take.
    """
    first = image[0] if isinstance(image, (list, tuple)) and image else image
    integers = isinstance(first, np.ndarray) and first.dtype == np.uint8
    integers |= isinstance(first, torch.Tensor) and first.dtype == torch.uint8
    options: dict[str, Any] = {"do_rescale": integers or not isinstance(first, (np.ndarray, torch.Tensor))}
    if size is not None:
        options |= {"do_resize": True, "size": dict(zip(("height", "width"), size, strict=True))}
    try:
        return DualCodebookImageProcessor(max_pixels=None)(image, return_tensors="pt", **options)["pixel_values"]
    except ValueError as error:
        raise ValueError(f"`image`: {str(error).replace('`images`', 'images')}") from error


def read_mask(mask_image: Any, size: tuple[int, int], resize: bool) -> torch.Tensor:
    """Masks -> boolean (n, H, W), true where they are white.

    Args:
        mask_image: a PIL image or a path, grey or in colour; an array or tensor, boolean, uint8, or floating in [0, 1],
            (H, W), (1, H, W), (n, 1, H, W), (H, W, 1) or (n, H, W, 1); or a list of them.
        size: (H, W) of the images.
        resize: bring it to this size, white wherever it was white in part; otherwise it must have it.

    Raises ValueError for another one.
    """
    given = mask_image if isinstance(mask_image, (list, tuple)) else [mask_image]
    masks = [mask for each in given for mask in _white(each)]
    if len({mask.shape for mask in masks}) != 1:
        raise ValueError(f"`mask_image` must hold masks of one size, got {sorted(tuple(mask.shape) for mask in masks)}")
    found = torch.stack(masks)
    if resize:
        return F.adaptive_max_pool2d(found[:, None].float(), size)[:, 0] > 0
    if tuple(found.shape[1:]) != size:
        raise ValueError(
            f"`mask_image` must have the size of the images, (H, W) = {size}, got {tuple(found.shape[1:])}"
        )
    return found


def _white(mask: Any) -> torch.Tensor:
    """A mask, or several in one array -> boolean (n, H, W)."""
    if isinstance(mask, np.ndarray):
        mask = torch.from_numpy(mask[..., 0] if mask.ndim > 2 and mask.shape[-1] == 1 else mask)
    if not isinstance(mask, torch.Tensor):
        mask = torch.from_numpy(np.array(read_image(mask).convert("L")))
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if mask.ndim not in (2, 3) or 0 in mask.shape:
        raise ValueError(f"`mask_image` must be of shape (H, W) or (n, 1, H, W), got {tuple(mask.shape)}")
    values = mask.float() / (255 if mask.dtype == torch.uint8 else 1)
    if not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(f"`mask_image` must lie in [0, 1], got [{values.min():g}, {values.max():g}]")
    return (values >= WHITE).view(-1, *values.shape[-2:]).cpu()
