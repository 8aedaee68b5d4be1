"""Figures show the right pixels in the right places, at any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dualcodebook_hf import figures
from dualcodebook_hf.figures import code_colours, comparison, comparison_sheet, error_map, grid, token_map
from dualcodebook_hf.image_processing_dualcodebook import to_image

CODEBOOKS = {"global": 512, "local": 300}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def tokens(width: int, height: int, factor: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 300, (2, -(-height // factor), -(-width // factor)), generator=generator)


def find(inner: Image.Image, outer: Image.Image) -> list[int]:
    """Left edges at which `inner` lies in `outer`, above the bottom margin that every figure has."""
    inner, outer = np.asarray(inner, dtype=np.int16), np.asarray(outer, dtype=np.int16)
    height, width = inner.shape[:2]
    for margin in range(40):
        bottom = outer.shape[0] - margin
        strip = outer[bottom - height : bottom]
        places = range(outer.shape[1] - width + 1)
        hits = [x for x in places if (strip[0, x] == inner[0, 0]).all() and (strip[:, x : x + width] == inner).all()]
        if hits:
            return hits
    return []


def test_the_five_panels_stand_side_by_side_in_order_pixel_by_pixel() -> None:
    original, reconstruction, ids = noise(300, 200), noise(300, 200, 1), tokens(300, 200)
    figure = comparison(original, reconstruction, ids, CODEBOOKS)
    panels = [original, reconstruction, error_map(original, reconstruction)]
    panels += [token_map(codebook, original.size) for codebook in ids]
    edges = [find(panel, figure) for panel in panels]
    assert all(len(found) == 1 for found in edges)
    assert edges == sorted(edges) and edges[1][0] - edges[0][0] >= 300


def test_small_images_are_enlarged_by_whole_factors_and_large_ones_shrunk() -> None:
    small = noise(32, 20)
    figure = comparison(small, small, tokens(32, 20), CODEBOOKS)
    assert len(find(small.resize((256, 160), Image.Resampling.NEAREST), figure)) == 2
    large = noise(2048, 1024)
    figure = comparison(large, large, tokens(2048, 1024), CODEBOOKS)
    assert len(find(large.resize((512, 256), Image.Resampling.LANCZOS), figure)) == 2


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (2000, 3), (17, 16)])
def test_every_size_can_be_shown(size: tuple[int, int]) -> None:
    figure = comparison(
        noise(*size), noise(*size, 1), tokens(*size), CODEBOOKS, title="a title that is longer than that"
    )
    assert figure.mode == "RGB" and figure.width < 3000 and figure.height < 1000


def test_a_single_codebook_makes_a_single_token_map() -> None:
    image = noise(300, 300)
    two = comparison(image, image, tokens(300, 300), CODEBOOKS)
    one = comparison(image, image, tokens(300, 300)[:1], {"codebook": 512})
    assert two.width - one.width >= 300 and one.height == two.height


def test_the_error_map_is_linear_up_to_its_scale_and_then_saturates() -> None:
    black = Image.new("RGB", (1, 1))
    at = [error_map(black, Image.new("RGB", (1, 1), (round(255 * error),) * 3)) for error in (0, 0.125, 0.25, 0.9)]
    colours = [image.getpixel((0, 0)) for image in at]
    assert colours[0] == figures.ERROR_COLOURS[0]
    assert np.allclose(colours[1], figures.ERROR_COLOURS[3], atol=4)
    assert np.allclose(colours[2], figures.ERROR_COLOURS[-1], atol=4)
    assert colours[3] == figures.ERROR_COLOURS[-1]


def test_the_error_colours_get_lighter_all_the_way() -> None:
    ramp = np.asarray(figures._error_colours(np.linspace(0, 1, 100)[None]).convert("L"), dtype=int)[0]
    assert (np.diff(ramp) >= 0).all() and ramp[-1] - ramp[0] > 200


def test_each_token_covers_f_by_f_pixels_from_the_top_left() -> None:
    ids = torch.arange(6).reshape(2, 3)
    image = np.asarray(token_map(ids, (33, 20)))
    assert image.shape == (20, 33, 3)
    for row in range(2):
        for column in range(3):
            block = image[row * 16 : (row + 1) * 16, column * 16 : (column + 1) * 16].reshape(-1, 3)
            assert len(np.unique(block, axis=0)) == 1
    assert len(np.unique(image.reshape(-1, 3), axis=0)) == 6


def test_colours_of_512_tokens_are_fixed_and_all_different() -> None:
    ids = torch.arange(512).reshape(16, 32)
    first, again = (np.asarray(token_map(ids, (512, 256))) for _ in range(2))
    assert np.array_equal(first, again)
    assert len(np.unique(first.reshape(-1, 3), axis=0)) > 505
    assert token_map(torch.tensor([[65535]]), (1, 1)).size == (1, 1)


def test_codes_that_are_near_have_colours_that_are_near_every_time() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(200, 3, generator=generator) * torch.tensor([3.0, 1.0, 0.2])
    colours = code_colours(codes).astype(int)
    assert np.array_equal(colours, code_colours(codes.clone()))
    assert np.abs(colours - code_colours(codes.flip(0))[::-1]).max() <= 1  # whatever their ids are
    twins = code_colours(torch.cat([codes, codes + 0.002 * torch.randn(200, 3, generator=generator)])).astype(int)
    assert np.abs(twins[:200] - twins[200:]).max() <= 8
    distances = torch.cdist(codes / codes.std(0), codes / codes.std(0)).flatten().numpy()
    seen = np.linalg.norm(colours[:, None] - colours[None], axis=-1).flatten()
    assert np.corrcoef(distances, seen)[0, 1] > 0.6
    assert len(np.unique(colours, axis=0)) > 195
    wide = torch.nn.functional.pad(codes, (0, 40)) @ torch.linalg.qr(torch.randn(43, 43, generator=generator))[0]
    assert len(np.unique(code_colours(wide), axis=0)) > 195


def test_codes_of_one_number_differ_in_lightness_and_equal_codes_are_grey() -> None:
    ramp = code_colours(torch.linspace(-1, 1, 9)[:, None]).astype(int)
    assert (np.diff(ramp.sum(1)) > 0).all() or (np.diff(ramp.sum(1)) < 0).all()
    for colours in (
        ramp,
        code_colours(torch.full((5, 8), 0.3)).astype(int),
        code_colours(torch.ones(1, 4)).astype(int),
    ):
        assert (np.ptp(colours, axis=1) <= 2).all()


def test_a_token_map_takes_its_colours_from_the_codes() -> None:
    colours = np.arange(18, dtype=np.uint8).reshape(6, 3)
    image = np.asarray(token_map(torch.tensor([[5, 0], [2, 2]]), (8, 8), colours))
    assert [image[y, x].tolist() for y, x in ((0, 0), (3, 7), (4, 3), (7, 7))] == colours[[5, 0, 2, 2]].tolist()


def test_a_sheet_stacks_its_rows() -> None:
    rows = [noise(30, 10), noise(20, 15)]
    sheet = np.asarray(comparison_sheet(rows))
    assert sheet.shape == (25, 30, 3)
    assert np.array_equal(sheet[:10], rows[0]) and np.array_equal(sheet[10:, :20], rows[1])
    assert (sheet[10:, 20:] == 255).all()
    one_by_one = comparison_sheet(iter(rows), [row.size for row in rows])
    assert np.array_equal(one_by_one, sheet)


@pytest.mark.parametrize("count, rows", [(1, 1), (3, 1), (4, 2), (7, 3)])
def test_the_grid_has_each_original_above_its_reconstruction(count: int, rows: int) -> None:
    originals = torch.rand(count, 3, 5, 7) * 2 - 1
    reconstructions = torch.randn(count, 3, 5, 7)
    sheet = np.asarray(grid(originals, reconstructions, columns=3))
    assert sheet.shape == (rows * 12 + (rows - 1) * 6, min(3, count) * 9 - 2, 3)
    for index in range(count):
        left, top = index % 3 * 9, index // 3 * 18
        assert np.array_equal(sheet[top : top + 5, left : left + 7], to_image(originals[index]))
        assert np.array_equal(sheet[top + 7 : top + 12, left : left + 7], to_image(reconstructions[index]))


def test_sizes_that_do_not_fit_are_value_errors_that_name_the_argument() -> None:
    image = noise(32, 32)
    with pytest.raises(ValueError, match=r"`reconstruction`.*\(32, 32\).*\(32, 16\)"):
        comparison(image, noise(32, 16), tokens(32, 32), CODEBOOKS)
    with pytest.raises(ValueError, match=r"`tokens`.*\(2, h, w\).*\(3, 2, 2\)"):
        comparison(image, image, torch.zeros(3, 2, 2, dtype=int), CODEBOOKS)
    with pytest.raises(ValueError, match=r"`ids`.*\(3, 2\).*32x32"):
        comparison(image, image, torch.zeros(2, 3, 2, dtype=int), CODEBOOKS)
    with pytest.raises(ValueError, match=r"`originals` and `reconstructions`"):
        grid(torch.zeros(1, 3, 2, 2), torch.zeros(2, 3, 2, 2))
    with pytest.raises(ValueError, match=r"`rows`"):
        comparison_sheet([])
