"""Images in tiles: the whole image's tokens and pixels where the network is local, no seams where it is not."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TINY, spread_codes
from PIL import Image

from dualcodebook_hf import DualCodebookConfig, DualCodebookModel, DualCodebookVQModel, reconstruction
from dualcodebook_hf.image_processing_dualcodebook import to_pixels
from dualcodebook_hf.metrics.images import StripQuality, image_quality
from dualcodebook_hf.reconstruction import count_tiles, decode_tokens, reconstruct_image, tokenize_image
from dualcodebook_hf.tiling import joined_strips, plan_side, receptive_radius

# f is 4; the levels differ in depth, one has no block, as the embedded checkpoint's first.
LOCAL = {**TINY, "backbone": "dcae", "block_out_channels": [8, 8, 16], "layers_per_level": [0, 2, 1]}
SHORTCUT = {"linear_shortcut": True, "overlapping_shortcut": True, "decoder_layers_per_level": [1, 1, 1]}
KNOBS = {"tile_sample_min_height": 112, "tile_sample_min_width": 128}


@pytest.fixture
def local_model() -> DualCodebookVQModel:
    torch.manual_seed(0)
    return spread_codes(DualCodebookVQModel(**LOCAL, **SHORTCUT)).eval()


@pytest.fixture
def image() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((301, 222), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("seed", range(30))
def test_what_tiles_give_adds_up_to_one_everywhere(seed: int) -> None:
    rng = random.Random(seed)
    tile = rng.randint(2, 40)
    stride, length = rng.randint((tile + 1) // 2, tile), rng.randint(1, 300)
    spans = plan_side(length, tile, stride, rng.randint(0, tile - stride))
    total = torch.zeros(length * 2)
    for span in spans:
        assert 0 <= span.start <= span.fade_in[0] and span.fade_out[1] <= span.stop <= length
        assert span.stop - span.start == spans[0].stop <= tile
        total[span.place(2)] += span.weights(2, total)
    torch.testing.assert_close(total, torch.ones_like(total))
    gaps = [after.start - before.start for before, after in itertools.pairwise(spans)]
    assert all(0 < gap <= stride for gap in gaps)
    assert all(before.stop - after.start >= tile - stride for before, after in itertools.pairwise(spans))
    assert sum(span.stop - span.start for span in spans) < length + len(gaps) * (tile - stride) + len(spans)


def test_strips_of_what_is_already_whole_are_the_whole() -> None:
    whole = torch.rand(2, 3, 46, 60, dtype=torch.float64)
    rows, columns = plan_side(23, 10, 6, 2), plan_side(30, 11, 7, 2)
    strips = joined_strips(
        lambda row, column: whole[..., 2 * row.start : 2 * row.stop, 2 * column.start : 2 * column.stop],
        rows,
        columns,
        2,
    )
    torch.testing.assert_close(torch.cat(list(strips), dim=-2), whole)


def test_two_tiles_that_disagree_are_faded_into_each_other() -> None:
    """Without a fade the step between two tiles would be 1."""
    rows, columns = plan_side(4, 4, 4, 0), plan_side(30, 20, 12, 8)
    step = {columns[0].start: 0.0, columns[1].start: 1.0}
    (strip,) = joined_strips(
        lambda row, column: torch.full((1, 1, 4, column.stop - column.start), step[column.start]), rows, columns, 1
    )
    assert strip[..., 0].eq(0).all() and strip[..., -1].eq(1).all()
    assert strip.diff(dim=-1).max() <= 1 / 8 + 1e-6


@pytest.mark.parametrize("layers", [[0, 2, 1], [1, 1, 2]])
def test_the_networks_see_no_further_than_their_radius(layers: list[int]) -> None:
    torch.manual_seed(0)
    model = DualCodebookVQModel(**{**LOCAL, "layers_per_level": layers}).double().eval()
    width, middle = 256, 128
    for network, shape, place in (
        (model.encoder, (1, 3, 4, width), middle),
        (model.decoder, (1, model.config.latent_channels, 1, width // 4), middle // 4),
    ):
        x = torch.randn(shape, dtype=torch.float64)
        changed = x.clone()
        changed[..., place] += 1
        with torch.no_grad():
            difference = (network(x) - network(changed)).abs().amax(dim=(0, 1, 2))
        scale = width // len(difference)
        seen = difference.nonzero()[:, 0] * scale
        reach = max(middle - int(seen.min()), int(seen.max()) - middle)
        radius = receptive_radius(network, 4)
        assert radius / 2 < reach <= radius + 4, (reach, radius)


@torch.no_grad()
def test_a_local_network_gives_the_whole_images_tokens_and_pixels(local_model, image) -> None:
    pixels = to_pixels(image)[None]
    tokens, latents = local_model.tokenize(pixels), local_model.encode(pixels).latents
    decoded, out = local_model.detokenize(tokens, size=(222, 301)), local_model(pixels)
    local_model.enable_tiling(**KNOBS)
    rows, columns = local_model.plan_tiles(*tokens.shape[-2:])
    assert len(rows) > 2 and len(columns) > 2
    torch.testing.assert_close(local_model.encode(pixels).latents, latents)
    assert local_model.tokenize(pixels).equal(tokens)
    torch.testing.assert_close(local_model.detokenize(tokens, size=(222, 301)), decoded)
    torch.testing.assert_close(local_model(pixels).sample, out.sample)
    local_model.disable_tiling()
    assert local_model.detokenize(tokens, size=(222, 301)).equal(decoded)


@torch.no_grad()
def test_a_network_that_sees_everything_gives_one_grid_that_decodes_as_usual(image) -> None:
    torch.manual_seed(0)
    model = spread_codes(DualCodebookVQModel(**TINY)).eval()
    pixels = to_pixels(image)[None]
    whole = model.tokenize(pixels)
    model.enable_tiling(**KNOBS)
    tokens = model.tokenize(pixels)
    assert tokens.shape == whole.shape and tokens.dtype == torch.int64
    tiled = model.detokenize(tokens, size=(222, 301))
    model.disable_tiling()
    assert model.detokenize(tokens, size=(222, 301)).shape == tiled.shape == pixels.shape


@pytest.mark.parametrize("on", ["tensors", "images"])
def test_a_large_image_is_the_same_in_tiles(local_model, image, on, monkeypatch) -> None:
    expected = reconstruct_image(local_model, image)
    half = decode_tokens(local_model, expected.tokens, (222, 301), only="local")
    monkeypatch.setattr(reconstruction, "LARGEST_WHOLE", 1000)
    local_model.enable_tiling(**KNOBS)
    if on == "images":  # the knobs hold; the switch is the whole model's, for tensors
        local_model.disable_tiling()
    ticks = []
    result = reconstruct_image(local_model, image, lambda: ticks.append(1))
    assert len(ticks) == 2 * count_tiles(local_model, (222, 301)) > 8
    assert result.tokens.equal(expected.tokens) and tokenize_image(local_model, image).equal(expected.tokens)
    assert np.abs(np.subtract(result.image, expected.image, dtype=np.int16)).max() <= 1
    assert result.psnr == pytest.approx(expected.psnr, abs=1e-4)
    assert result.ssim == pytest.approx(expected.ssim, abs=1e-6)
    in_tiles = decode_tokens(local_model, expected.tokens, (222, 301), only="local")
    assert np.abs(np.subtract(in_tiles, half, dtype=np.int16)).max() <= 1


def test_tokens_that_do_not_fit_are_refused_before_the_first_tile(local_model, image, monkeypatch) -> None:
    monkeypatch.setattr(reconstruction, "LARGEST_WHOLE", 1000)
    tokens = tokenize_image(local_model, image)
    with pytest.raises(ValueError, match="`size`"):
        decode_tokens(local_model, tokens, (100, 301))


@pytest.mark.parametrize("size", [(7, 40), (11, 11), (64, 33), (23, 5)])
@pytest.mark.parametrize("rows", [1, 9, 30])
def test_quality_by_strips_is_the_quality(size: tuple[int, int], rows: int) -> None:
    pair = torch.rand(2, 1, 3, *size) * 2.2 - 1.1
    quality = StripQuality()
    for parts in zip(*(pixels.split(rows, dim=-2) for pixels in pair), strict=True):
        quality.update(*parts)
    assert quality.compute() == pytest.approx(image_quality(*pair), abs=1e-5)


def test_both_faces_have_the_knobs(tiny_model, images) -> None:
    face = DualCodebookModel(DualCodebookConfig(**TINY)).eval()
    face.load_state_dict(tiny_model.state_dict())
    for model in (tiny_model, face):
        model.enable_tiling(tile_sample_min_height=16, tile_sample_min_width=16, tile_sample_stride_height=12)
        assert (model.use_tiling, model.tile_sample_min_width, model.tile_sample_stride_height) == (True, 16, 12)
        model.enable_slicing()
    assert face.tokenize(images).equal(tiny_model.tokenize(images))
    tiny_model.disable_slicing()
    assert face.tokenize(images).equal(tiny_model.tokenize(images))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile_sample_min_height": 97}, "`tile_sample_min_height` must be a positive multiple of f=4, got 97"),
        ({"tile_sample_min_width": 0}, "`tile_sample_min_width`"),
        ({"tile_sample_min_width": 64, "tile_sample_stride_width": 16}, "`tile_sample_stride_width` must .* half"),
        ({"tile_sample_min_width": 64, "tile_sample_stride_width": 68}, "got 68"),
        ({"tile_sample_stride_height": True}, "`tile_sample_stride_height`"),
    ],
)
def test_wrong_knobs_are_refused_and_change_nothing(local_model, options, message) -> None:
    before = local_model.tile_sample_min_height, local_model.tile_sample_min_width
    with pytest.raises(ValueError, match=message):
        local_model.enable_tiling(**options)
    assert not local_model.use_tiling
    assert before == (local_model.tile_sample_min_height, local_model.tile_sample_min_width)


MEMORY = """
import resource, sys
from PIL import Image
from dualcodebook_hf import DualCodebookVQModel
from dualcodebook_hf.reconstruction import reconstruct_image
model = DualCodebookVQModel(**{options}).eval()
model.enable_tiling(tile_sample_min_height=512, tile_sample_min_width=512)
def peak(height):
    reconstruct_image(model, Image.new("RGB", (1100, height), "red"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
print(peak(1100), peak(17600))
"""


@pytest.mark.slow
def test_memory_grows_by_the_images_bytes_alone() -> None:
    code = MEMORY.replace("{options}", repr({**LOCAL, **SHORTCUT}))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    small, large = map(int, result.stdout.split())
    # 18 million pixels more: 138 MB of two images at Pillow's 4 bytes. One copy in floating point would be 207 MB.
    assert large - small < 280


PEAK = """
import resource
from PIL import Image
from dualcodebook_hf.loading import load_tokenizer
from dualcodebook_hf.reconstruction import reconstruct_image
result = reconstruct_image(load_tokenizer(device="cpu"), Image.linear_gradient("L").resize({size}).convert("RGB"))
assert result.image.size == {size}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_8192_by_8192_pixels_stay_below_4_gigabytes() -> None:
    """Measured by the operating system on a part of them, by the embedded checkpoint in its own tiles."""
    side, tile = 3840, 2048  # two rows of two tiles, as large as tiles can be
    code = PEAK.replace("{size}", repr((side, side)))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak = int(result.stdout)
    pictures = 2 * 4 * (8192**2 - side**2)  # original and reconstruction; Pillow takes 4 bytes a pixel
    strips = 4 * 12 * tile * (8192 - side)  # four of them at a time: float32, three channels
    assert peak + pictures + strips < 4e9, peak
