"""Where diffusers' VaeImageProcessor and ours both apply, they give the same bits."""

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from dualcodebook_hf import DualCodebookImageProcessor


def draw(width, height, seed=0, mode="RGB"):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def pixels(images, **options):
    return DualCodebookImageProcessor(**options)(images, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("size", [(37, 53), (96, 64), (64, 20), (64, 96)])
@pytest.mark.parametrize("resample", ["lanczos", "bicubic", "bilinear"])
def test_resizing_to_a_height_and_a_width(size, resample):
    theirs = VaeImageProcessor(vae_scale_factor=16, resample=resample).preprocess(draw(*size), height=64, width=96)
    options = {} if resample == "lanczos" else {"resample": Image.Resampling[resample.upper()]}
    ours = pixels(draw(*size), do_resize=True, size={"height": 64, "width": 96}, **options)
    assert ours.shape == (1, 3, 64, 96) and ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)


def test_a_batch_of_sizes_and_a_size_given_to_the_call():
    images = [draw(30, 40), draw(64, 32, 1), draw(48, 48, 2)]
    theirs = VaeImageProcessor(vae_scale_factor=8).preprocess(images, height=48, width=48)
    processor, size = DualCodebookImageProcessor(), {"height": 48, "width": 48}
    assert torch.equal(processor(images, do_resize=True, size=size, return_tensors="pt")["pixel_values"], theirs)


def test_without_resizing_and_without_normalizing():
    image = draw(33, 17)
    assert torch.equal(pixels(image), VaeImageProcessor(do_resize=False).preprocess(image))
    theirs = VaeImageProcessor(do_resize=False, do_normalize=False).preprocess(image)
    assert torch.equal(pixels(image, do_normalize=False), theirs)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1"])
def test_opaque_images_of_other_modes(mode):
    image = draw(21, 16, mode=mode)
    assert torch.equal(pixels(image), VaeImageProcessor(do_resize=False, do_convert_rgb=True).preprocess(image))


@pytest.mark.parametrize("size", [(71, 40), (40, 71), (50, 50), (20, 90)])
def test_filling_a_square_and_cropping_its_middle(size):
    theirs = VaeImageProcessor(vae_scale_factor=8).preprocess(draw(*size), 32, 32, resize_mode="crop")
    square = {"height": 32, "width": 32}
    ours = pixels(draw(*size), do_resize=True, size={"shortest_edge": 32}, do_center_crop=True, crop_size=square)
    assert torch.equal(ours, theirs)


def test_postprocess_of_every_8_bit_value_of_ties_and_of_what_leaves_the_range():
    steps = torch.arange(0, 255.25, 0.25) / 127.5 - 1  # every value, and what lies half-way between two
    noise = torch.randn(200_000 - len(steps), generator=torch.Generator().manual_seed(0))
    sample = torch.cat([steps, noise])[: 2 * 3 * 180 * 180].reshape(2, 3, 180, 180)
    theirs = VaeImageProcessor().postprocess(sample, output_type="pil")
    ours = DualCodebookImageProcessor().postprocess(sample)
    assert len(ours) == len(theirs) == 2
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.mode == other.mode and np.array_equal(mine, other)


def test_there_and_back_through_either_is_the_image():
    image = draw(24, 32)
    ours, theirs = DualCodebookImageProcessor(), VaeImageProcessor(do_resize=False)
    assert np.array_equal(theirs.postprocess(pixels(image))[0], image)
    assert np.array_equal(ours.postprocess(theirs.preprocess(image))[0], image)
