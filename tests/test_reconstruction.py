"""One image through any tokenizer: what its tokens are, what they give back, and what that costs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from dualcodebook_hf.evaluation.linear_codec import PatchLinearCodec
from dualcodebook_hf.image_processing_dualcodebook import to_image, to_pixels
from dualcodebook_hf.metrics.images import psnr, ssim
from dualcodebook_hf.reconstruction import decode_tokens, reconstruct_image, tokenize_image

SIZES = [(32, 48), (31, 45), (1, 1)]


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


@pytest.fixture(params=["dual", "linear"])
def tokenizer(request, tiny_model):
    """Both keep the contract of `Tokenizer`; f is 2 and 4."""
    if request.param == "dual":
        return tiny_model
    return PatchLinearCodec((8, 12), components=6, patch_size=4).fit([to_pixels(noise(64, 64))])


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_tokens_and_image_are_the_tokenizers_own(tokenizer, width: int, height: int) -> None:
    image = noise(width, height)
    tokens = tokenizer.tokenize(to_pixels(image)[None])
    result = reconstruct_image(tokenizer, image)
    assert result.original is image
    assert torch.equal(result.tokens, tokens[0]) and torch.equal(tokenize_image(tokenizer, image), tokens[0])
    assert result.tokens.dtype == torch.int64 and result.tokens.device.type == "cpu"
    expected = to_image(tokenizer.detokenize(tokens, size=(height, width))[0])
    assert result.image.size == (width, height) and np.array_equal(result.image, expected)
    assert np.array_equal(decode_tokens(tokenizer, result.tokens, (height, width)), expected)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_measures_are_those_of_the_values_before_rounding(tokenizer, width: int, height: int) -> None:
    image = noise(width, height)
    result = reconstruct_image(tokenizer, image)
    pixels = tokenizer.detokenize(result.tokens[None], size=(height, width))
    x, y = (pixels + 1) / 2, (to_pixels(image)[None] + 1) / 2
    assert (result.psnr, result.ssim) == (psnr(x, y).item(), ssim(x, y).item())
    bits = result.tokens[0].numel() * math.log2(math.prod(tokenizer.codebook_sizes.values()))
    assert result.num_bytes == math.ceil(bits / 8)
    assert result.bits_per_pixel == pytest.approx(bits / (width * height))


def test_one_codebook_alone_can_be_decoded(tiny_model) -> None:
    image = noise(30, 21)
    tokens = tokenize_image(tiny_model, image)
    for name in ("global", "local"):
        expected = tiny_model.detokenize(tokens[None], size=(21, 30), only=name)
        assert np.array_equal(decode_tokens(tiny_model, tokens, (21, 30), only=name), to_image(expected[0]))


def test_half_precision_measures_the_image_and_not_its_rounded_copy(tiny_model) -> None:
    image = noise(32, 32)
    tiny_model.cast_backbone(torch.bfloat16)
    result = reconstruct_image(tiny_model, image)
    pixels = tiny_model.detokenize(result.tokens[None], size=(32, 32)).float()
    assert result.psnr == psnr((pixels + 1) / 2, (to_pixels(image)[None] + 1) / 2).item()


def test_an_image_of_another_mode_is_refused(tokenizer) -> None:
    for function in (tokenize_image, reconstruct_image):
        with pytest.raises(ValueError, match=r"`image` must be of mode RGB.*got L"):
            function(tokenizer, noise(8, 8, "L"))
