"""One image through a tokenizer: to tokens, from tokens, and both with what it costs and what it loses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from .image_processing_dualcodebook import to_image, to_pixels
from .metrics.images import image_quality
from .metrics.tokens import bits_per_pixel
from .tokenizer import Tokenizer
from .tokens.file import token_bytes


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


def tokenize_image(tokenizer: Tokenizer, image: Image.Image) -> torch.Tensor:
    """An RGB image (W x H) -> int64 tokens (codebooks, ceil(H/f), ceil(W/f)) on the CPU.

    Raises ValueError for an image of another mode (see `read_image`).
    """
    return tokenize_images(tokenizer, [image])[0]


def tokenize_images(tokenizer: Tokenizer, images: Sequence[Image.Image]) -> torch.Tensor:
    """B RGB images of one size W x H -> int64 tokens (B, codebooks, ceil(H/f), ceil(W/f)) on the CPU, in one pass.

    The tokens are those of `tokenize_image` up to the rounding of floating-point sums, whose order may depend on B: a
    latent midway between two codes may take the other one.

    Raises ValueError for an image of another mode (see `read_image`).
    """
    pixels = torch.stack([to_pixels(image) for image in images]).to(tokenizer.device, tokenizer.dtype)
    return tokenizer.tokenize(pixels).cpu()


def decode_tokens(tokenizer: Tokenizer, tokens: torch.Tensor, size: tuple[int, int], **options: Any) -> Image.Image:
    """Tokens of one image -> RGB image, clamped and rounded to 8 bits.

    Args:
        tokenizer: it made the tokens.
        tokens: integers (codebooks, h, w), on any device.
        size: (H, W) of the original, as in token files; PIL's `image.size` is (W, H).
        options: further ones of the tokenizer's `detokenize`, such as `only`, the one codebook to decode.
    """
    return to_image(_decode_pixels(tokenizer, tokens, size, **options)[0])


def decode_token_batch(
    tokenizer: Tokenizer, tokens: Sequence[torch.Tensor], sizes: Sequence[tuple[int, int]]
) -> list[Image.Image]:
    """`decode_tokens` of B images of one grid, in one pass; a colour may differ by 1 of 255, by rounding.

    Args:
        tokenizer: it made the tokens.
        tokens: integers (codebooks, h, w) of each image.
        sizes: (H, W) of each original; they may differ as long as the grids are equal.
    """
    pixels = tokenizer.detokenize(torch.stack(list(tokens)).to(tokenizer.device))
    return [to_image(image[:, :height, :width]) for image, (height, width) in zip(pixels, sizes, strict=True)]


def reconstruct_image(tokenizer: Tokenizer, image: Image.Image) -> Reconstruction:
    """Tokenizes, decodes and measures an RGB image. Raises ValueError for an image of another mode."""
    return reconstruct_images(tokenizer, [image])[0]


def reconstruct_images(tokenizer: Tokenizer, images: Sequence[Image.Image]) -> list[Reconstruction]:
    """`reconstruct_image` of B images of one size, in one pass; equal to it as far as `tokenize_images` is."""
    tokens, size = tokenize_images(tokenizer, images), (images[0].height, images[0].width)
    decoded = tokenizer.detokenize(tokens.to(tokenizer.device), size=size)
    return [_measured(tokenizer, *each) for each in zip(images, tokens, decoded, strict=True)]


def _measured(tokenizer: Tokenizer, image: Image.Image, tokens: torch.Tensor, pixels: torch.Tensor) -> Reconstruction:
    """An image beside its tokens (codebooks, h, w) and what they decode to, (3, H, W)."""
    grid, size = tuple(tokens.shape[1:]), (image.height, image.width)
    psnr, ssim = image_quality(pixels[None], to_pixels(image)[None])
    return Reconstruction(
        original=image,
        tokens=tokens,
        image=to_image(pixels),
        psnr=psnr,
        ssim=ssim,
        num_bytes=token_bytes(grid, tokenizer.bits_per_position),
        bits_per_pixel=bits_per_pixel(grid[0] * grid[1], tokenizer.bits_per_position, *size),
    )


def _decode_pixels(tokenizer: Tokenizer, tokens: torch.Tensor, size: tuple[int, int], **options: Any) -> torch.Tensor:
    """(1, 3, H, W), about [-1, 1], not clamped."""
    return tokenizer.detokenize(tokens[None].to(tokenizer.device), size=size, **options)
