"""One image through a tokenizer: to tokens, from tokens, and both with what it costs and what it loses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from .backbone import pad_to_multiple
from .image_processing_dualcodebook import DEFAULT_MAX_PIXELS, to_image, to_pixels
from .metrics.images import StripQuality, image_quality
from .metrics.tokens import bits_per_pixel
from .tiling import TilingMixin
from .tokenizer import Tokenizer
from .tokens.file import token_bytes

LARGEST_WHOLE = DEFAULT_MAX_PIXELS  # pixels; larger images are done in tiles, by the knobs of `enable_tiling`
ROWS = 256  # of pixels that are rounded and measured at a time; each step of that keeps a copy in floating point


@dataclass(frozen=True)
class Reconstruction:
    """An image beside what its tokens give back.

    Attributes:
        original: the RGB image that was tokenized.
        tokens: int64 (codebooks, h, w), on the CPU.
        image: what the tokens decode to, of the original's size, rounded to 8 bits.
        psnr: in dB, of the values before rounding.
        ssim: likewise; 1 for equal images.
        num_bytes: of the tokens, densely packed.
        bits_per_pixel: of the tokens, not rounded up to bytes.
    """

    original: Image.Image
    tokens: torch.Tensor
    image: Image.Image
    psnr: float
    ssim: float
    num_bytes: int
    bits_per_pixel: float


def count_tiles(tokenizer: Tokenizer, size: tuple[int, int]) -> int:
    """Tiles in which the functions here tokenize, or decode, an image of this (H, W); 0: it is done as a whole."""
    if not isinstance(tokenizer, TilingMixin) or size[0] * size[1] <= LARGEST_WHOLE:
        return 0
    rows, columns = tokenizer.plan_tiles(*_grid(tokenizer, size))
    return len(rows) * len(columns)


def tokenize_image(
    tokenizer: Tokenizer, image: Image.Image, on_tile: Callable[[], object] | None = None
) -> torch.Tensor:
    """An RGB image (W x H) -> int64 tokens (codebooks, ceil(H/f), ceil(W/f)) on the CPU.

    Args:
        tokenizer: see `Tokenizer`.
        image: of any size; above `LARGEST_WHOLE` pixels it is done in tiles.
        on_tile: called for each of `count_tiles`.

    Raises ValueError for an image of another mode (see `read_image`).
    """
    if not count_tiles(tokenizer, (image.height, image.width)):
        return tokenize_images(tokenizer, [image])[0]

    def read_tile(rows: slice, columns: slice) -> torch.Tensor:
        box = (columns.start, rows.start, min(columns.stop, image.width), min(rows.stop, image.height))
        pixels = to_pixels(image.crop(box))[None].to(tokenizer.device, tokenizer.dtype)
        return pad_to_multiple(pixels, tokenizer.downsample_factor)

    with torch.no_grad():
        strips = tokenizer.encode_strips(_counted(read_tile, on_tile), *_grid(tokenizer, (image.height, image.width)))
        tokens = [tokenizer.quantize(latents, return_dict=True).tokens[0].cpu() for latents in strips]
    return torch.cat(tokens, dim=1)


def tokenize_images(
    tokenizer: Tokenizer, images: Sequence[Image.Image], on_tile: Callable[[], object] | None = None
) -> torch.Tensor:
    """B RGB images of one size W x H -> int64 tokens (B, codebooks, ceil(H/f), ceil(W/f)) on the CPU, in one pass.

    The tokens are those of `tokenize_image` up to the rounding of floating-point sums, whose order may depend on B: a
    latent midway between two codes may take the other one. Images that are done in tiles are done one by one.

    Raises ValueError for an image of another mode (see `read_image`).
    """
    if images and count_tiles(tokenizer, (images[0].height, images[0].width)):
        return torch.stack([tokenize_image(tokenizer, image, on_tile) for image in images])
    pixels = torch.stack([to_pixels(image) for image in images]).to(tokenizer.device, tokenizer.dtype)
    return tokenizer.tokenize(pixels).cpu()


def decode_tokens(
    tokenizer: Tokenizer,
    tokens: torch.Tensor,
    size: tuple[int, int],
    on_tile: Callable[[], object] | None = None,
    **options: Any,
) -> Image.Image:
    """Tokens of one image -> RGB image, clamped and rounded to 8 bits.

    Args:
        tokenizer: it made the tokens.
        tokens: integers (codebooks, h, w), on any device.
        size: (H, W) of the original, as in token files; PIL's `image.size` is (W, H).
        on_tile: called for each of `count_tiles`.
        options: further ones of the tokenizer's `detokenize`, such as `only`, the one codebook to decode.
    """
    if not count_tiles(tokenizer, size):
        return to_image(tokenizer.detokenize(tokens[None].to(tokenizer.device), size=size, **options)[0])
    image = Image.new("RGB", (size[1], size[0]))
    for top, pixels in _decoded_strips(tokenizer, tokens, size, on_tile, **options):
        image.paste(to_image(pixels[0]), (0, top))
    return image


def decode_token_batch(
    tokenizer: Tokenizer,
    tokens: Sequence[torch.Tensor],
    sizes: Sequence[tuple[int, int]],
    on_tile: Callable[[], object] | None = None,
) -> list[Image.Image]:
    """`decode_tokens` of B images of one grid, in one pass; a colour may differ by 1 of 255, by rounding.

    Args:
        tokenizer: it made the tokens.
        tokens: integers (codebooks, h, w) of each image.
        sizes: (H, W) of each original; they may differ as long as the grids are equal.
        on_tile: called for each of `count_tiles` of each image; these are decoded one by one.
    """
    if any(count_tiles(tokenizer, size) for size in sizes):
        return [decode_tokens(tokenizer, *each, on_tile) for each in zip(tokens, sizes, strict=True)]
    pixels = tokenizer.detokenize(torch.stack(list(tokens)).to(tokenizer.device))
    return [to_image(image[:, :height, :width]) for image, (height, width) in zip(pixels, sizes, strict=True)]


def reconstruct_image(
    tokenizer: Tokenizer, image: Image.Image, on_tile: Callable[[], object] | None = None
) -> Reconstruction:
    """Tokenizes, decodes and measures an RGB image. Raises ValueError for an image of another mode.

    `on_tile`: called for each of `count_tiles`, when it is tokenized and again when it is decoded.
    """
    size = image.height, image.width
    if not count_tiles(tokenizer, size):
        return reconstruct_images(tokenizer, [image])[0]
    tokens, quality = tokenize_image(tokenizer, image, on_tile), StripQuality()
    decoded = Image.new("RGB", image.size)
    for top, pixels in _decoded_strips(tokenizer, tokens, size, on_tile):
        decoded.paste(to_image(pixels[0]), (0, top))
        quality.update(pixels, to_pixels(image.crop((0, top, image.width, top + pixels.shape[-2])))[None])
    return _measured(tokenizer, image, tokens, decoded, quality.compute())


def reconstruct_images(
    tokenizer: Tokenizer, images: Sequence[Image.Image], on_tile: Callable[[], object] | None = None
) -> list[Reconstruction]:
    """`reconstruct_image` of B images of one size, in one pass; equal to it as far as `tokenize_images` is."""
    size = images[0].height, images[0].width
    if count_tiles(tokenizer, size):
        return [reconstruct_image(tokenizer, image, on_tile) for image in images]
    tokens = tokenize_images(tokenizer, images)
    decoded = tokenizer.detokenize(tokens.to(tokenizer.device), size=size)
    return [
        _measured(tokenizer, image, ids, to_image(pixels), image_quality(pixels[None], to_pixels(image)[None]))
        for image, ids, pixels in zip(images, tokens, decoded, strict=True)
    ]


def _measured(
    tokenizer: Tokenizer,
    image: Image.Image,
    tokens: torch.Tensor,
    decoded: Image.Image,
    quality: tuple[float, float],
) -> Reconstruction:
    """An image beside its tokens (codebooks, h, w), what they decode to, and the PSNR and SSIM of that."""
    grid = tuple(tokens.shape[1:])
    return Reconstruction(
        original=image,
        tokens=tokens,
        image=decoded,
        psnr=quality[0],
        ssim=quality[1],
        num_bytes=token_bytes(grid, tokenizer.bits_per_position),
        bits_per_pixel=bits_per_pixel(grid[0] * grid[1], tokenizer.bits_per_position, image.height, image.width),
    )


@torch.no_grad()
def _decoded_strips(
    tokenizer: Any,
    tokens: torch.Tensor,
    size: tuple[int, int],
    on_tile: Callable[[], object] | None,
    only: str | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Tokens of one image (codebooks, h, w) -> its top rows first: their number from the top, (1, 3, n, W)."""
    tokens, top = tokens[None].to(tokenizer.device), 0
    tokenizer._check_tokens(tokens, size, only)

    def read_tile(rows: slice, columns: slice) -> torch.Tensor:
        return tokenizer.quantize.lookup(tokens[..., rows, columns].long(), only).to(tokenizer.dtype)

    for pixels in tokenizer.decode_strips(_counted(read_tile, on_tile), *tokens.shape[-2:]):
        for rows in pixels[..., : size[0] - top, : size[1]].split(ROWS, dim=-2):
            yield top, rows
            top += rows.shape[-2]


def _counted(read_tile: Callable[..., torch.Tensor], on_tile: Callable[[], object] | None) -> Callable[..., Any]:
    def read_and_count(rows: slice, columns: slice) -> torch.Tensor:
        if on_tile is not None:
            on_tile()
        return read_tile(rows, columns)

    return read_and_count


def _grid(tokenizer: Tokenizer, size: tuple[int, int]) -> tuple[int, int]:
    """Positions of an image of this (H, W)."""
    return tuple(-(-side // tokenizer.downsample_factor) for side in size)
