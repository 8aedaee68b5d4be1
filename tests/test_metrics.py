"""Metrics against hand-computed numbers, scikit-image and torchmetrics."""

import math

import pytest
import torch

from dualcodebook_hf.metrics.images import l1, ms_ssim, psnr, ssim
from dualcodebook_hf.metrics.tokens import QuantizationError, TokenStatistics, bits_per_pixel
from dualcodebook_hf.metrics.wasserstein import SlicedWasserstein, laplacian_pyramid


def photograph_pair(height=192, width=180):
    """A photograph and a coarse, noisy version of it, (1, 3, H, W) in [0, 1]."""
    data = pytest.importorskip("skimage.data")
    original = torch.from_numpy(data.astronaut()[:height, 100 : 100 + width].copy()).permute(2, 0, 1)[None] / 255
    coarse = torch.nn.functional.interpolate(
        torch.nn.functional.avg_pool2d(original, 4), size=(height, width), mode="bilinear"
    )
    noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(0))
    return (coarse + 0.03 * noise).clamp(0, 1), original


def random_images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_psnr_and_l1_of_a_constant_error_are_known():
    """An error of 0.1 everywhere: MSE 0.01, 20 dB, L1 0.1; each image of the batch by itself."""
    original = torch.full((2, 3, 8, 8), 0.5)
    reconstruction = original.clone()
    reconstruction[0] += 0.1
    torch.testing.assert_close(psnr(reconstruction, original), torch.tensor([20.0, 100.0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(l1(reconstruction, original), torch.tensor([0.1, 0.0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("metric", [psnr, ssim, ms_ssim, l1])
def test_values_are_clamped_to_the_unit_range_before_they_are_compared(metric):
    original = torch.ones(1, 3, 32, 32)
    expected = metric(original, original)
    torch.testing.assert_close(metric(original * 3, original), expected)


def test_psnr_does_not_round_to_8_bits():
    original = torch.full((1, 3, 4, 4), 0.5)
    assert psnr(original + 1e-4, original).item() == pytest.approx(80, abs=0.05)


def test_psnr_and_ssim_agree_with_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    reconstruction, original = photograph_pair()
    arrays = reconstruction[0].double().numpy(), original[0].double().numpy()
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
    expected = metrics.structural_similarity(*arrays, channel_axis=0, **options)
    assert ssim(reconstruction, original).item() == pytest.approx(expected, abs=1e-5)
    expected = metrics.peak_signal_noise_ratio(arrays[1], arrays[0], data_range=1)
    assert psnr(reconstruction, original).item() == pytest.approx(expected, abs=1e-4)


def test_ssim_and_ms_ssim_agree_with_torchmetrics():
    """torchmetrics counts windows over a reflected border too; inside the image its map is the same."""
    functional = pytest.importorskip("torchmetrics.functional.image")
    reconstruction, original = photograph_pair()
    mean, full = functional.structural_similarity_index_measure(
        reconstruction, original, data_range=1.0, return_full_image=True
    )
    ours = ssim(reconstruction, original).item()
    assert ours == pytest.approx(full[..., 5:-5, 5:-5].mean().item(), abs=1e-5)
    assert ours == pytest.approx(mean.item(), abs=0.01)
    expected = functional.multiscale_structural_similarity_index_measure(reconstruction, original, data_range=1.0)
    assert ms_ssim(reconstruction, original).item() == pytest.approx(expected.item(), abs=0.002)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (2, 7), (10, 10), (11, 11), (12, 5)])
def test_ssim_and_ms_ssim_of_tiny_images_are_numbers_and_1_for_equal_ones(size):
    original, other = random_images(2, 3, *size), random_images(2, 3, *size, seed=1)
    for metric in (ssim, ms_ssim):
        torch.testing.assert_close(metric(original, original), torch.ones(2))
        assert metric(other, original).isfinite().all()


def test_ms_ssim_below_22_pixels_is_ssim():
    original = random_images(2, 3, 21, 21)
    blurred = torch.nn.functional.avg_pool2d(original, 3, 1, 1)
    torch.testing.assert_close(ms_ssim(blurred, original), ssim(blurred, original))


@pytest.mark.parametrize("size, scales", [(43, 2), (44, 3), (88, 4)])
def test_ms_ssim_of_a_small_image_uses_the_scales_that_fit_and_normalizes_their_weights(size, scales):
    functional = pytest.importorskip("torchmetrics.functional.image")
    reconstruction, original = photograph_pair(size, size)
    weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)[:scales]
    product, x, y = 1.0, reconstruction, original
    for scale, weight in enumerate(weights):
        if scale:
            x, y = torch.nn.functional.avg_pool2d(x, 2), torch.nn.functional.avg_pool2d(y, 2)
        _, contrast = functional.structural_similarity_index_measure(
            x, y, data_range=1.0, return_contrast_sensitivity=True, reduction="none"
        )
        term = ssim(x, y) if scale == scales - 1 else contrast
        product = product * term ** (weight / sum(weights))
    torch.testing.assert_close(ms_ssim(reconstruction, original), product, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["equal", "inverted", "constant", "outside"])
def test_the_gradient_of_ms_ssim_is_finite_everywhere(kind):
    original = random_images(1, 3, 64, 64)
    start = {"equal": original, "inverted": 1 - original, "constant": original * 0, "outside": original * 4 - 2}[kind]
    reconstruction = start.clone().requires_grad_()
    ms_ssim(reconstruction, original, clamp=False).sum().backward()
    assert reconstruction.grad.isfinite().all()


def test_ms_ssim_as_a_loss_pulls_a_image_to_the_original():
    reconstruction, original = photograph_pair(64, 64)
    reconstruction.requires_grad_()
    before = ms_ssim(reconstruction, original, clamp=False).sum()
    (gradient,) = torch.autograd.grad(before, reconstruction)
    after = ms_ssim(reconstruction + 0.05 * gradient / gradient.norm(), original, clamp=False).sum()
    assert after > before


def test_half_precision_and_autocast_give_float32_numbers():
    reconstruction, original = photograph_pair(48, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(ssim(reconstruction, original), _ssim_without_autocast(reconstruction, original))
    assert psnr(reconstruction.bfloat16(), original.bfloat16()).dtype == torch.float32


def _ssim_without_autocast(reconstruction, original):
    with torch.autocast("cpu", enabled=False):
        return ssim(reconstruction, original)


@pytest.mark.parametrize("metric", [psnr, ssim, ms_ssim, l1])
def test_images_of_another_shape_or_type_are_refused(metric):
    image = torch.zeros(1, 3, 8, 8)
    for wrong in (torch.zeros(1, 3, 8, 9), torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="`reconstruction` and `original`"):
            metric(wrong, image if wrong.shape != (3, 8, 8) else wrong)


def test_bits_per_pixel_of_the_paper():
    """paper: 256 positions of 18 bits on 256 x 256 pixels: 4608 bits, 0.070 bits per pixel."""
    assert bits_per_pixel(256, 18, 256, 256) == pytest.approx(4608 / 65536)


def tokens_of(*columns):
    """Token columns -> (1, codebooks, 1, positions)."""
    return torch.tensor(columns)[None, :, None]


def test_statistics_of_known_histograms():
    """Codebook a: 2 of 4 codes, equally often. Codebook b: uniform over 4. Pairs: (0,0) (0,1) (1,2) (1,3), 2 bits."""
    statistics = TokenStatistics({"a": 4, "b": 4})
    statistics.update(tokens_of([0, 0, 1, 1], [0, 1, 2, 3]))
    codebooks = statistics.codebooks()
    assert codebooks["a"] == {
        "size": 4,
        "usage": 0.5,
        "perplexity": pytest.approx(2),
        "normalized_entropy": pytest.approx(0.5),
    }
    assert codebooks["b"] == {
        "size": 4,
        "usage": 1.0,
        "perplexity": pytest.approx(4),
        "normalized_entropy": pytest.approx(1),
    }
    assert statistics.pair_entropy == pytest.approx(2)
    assert statistics.histograms["a"].tolist() == [2, 2, 0, 0]
    assert statistics.positions == 4


def test_entropy_of_a_skewed_histogram():
    """Shares 1/2, 1/4, 1/8, 1/8: 1.75 bits, with one codebook as well as in a pair."""
    statistics = TokenStatistics({"codebook": 8})
    statistics.update(tokens_of([0, 0, 0, 0, 1, 1, 2, 3]))
    assert statistics.pair_entropy == pytest.approx(1.75)
    assert statistics.codebooks()["codebook"]["perplexity"] == pytest.approx(2**1.75)
    assert statistics.codebooks()["codebook"]["normalized_entropy"] == pytest.approx(1.75 / 3)


def test_a_single_token_has_no_entropy_and_its_codebook_perplexity_1():
    statistics = TokenStatistics({"global": 512, "local": 512})
    statistics.update(tokens_of([3], [511]))
    assert statistics.pair_entropy == 0
    assert statistics.codebooks()["local"]["perplexity"] == 1


def test_entropy_of_the_pair_is_exact_over_the_joint_counts():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.stack([torch.randint(0, size, (6, 16, 16), generator=generator) for size in (30, 70)], dim=1)
    statistics = TokenStatistics({"global": 30, "local": 70})
    statistics.update(tokens)
    table = torch.bincount((tokens[:, 0] * 70 + tokens[:, 1]).flatten()).double()
    share = table[table > 0] / table.sum()
    assert statistics.pair_entropy == pytest.approx(-(share * share.log2()).sum().item(), abs=1e-9)


def test_statistics_in_batches_equal_those_of_all_tokens_at_once():
    tokens = torch.randint(0, 20, (7, 2, 5, 3), generator=torch.Generator().manual_seed(0))
    whole, parts = (TokenStatistics({"global": 20, "local": 25}) for _ in range(2))
    whole.update(tokens)
    for part in tokens.split(2):
        parts.update(part)
    assert parts.codebooks() == whole.codebooks()
    assert parts.pair_entropy == whole.pair_entropy


@pytest.mark.parametrize(
    "tokens, message",
    [
        (torch.zeros(1, 2, 2, 2), "must be integers"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.long), r"shape \(B, 2, h, w\)"),
        (torch.full((1, 2, 2, 2), 4), r"global codebook must lie in \[0, 4\), got \[4, 4\]"),
        (torch.full((1, 2, 2, 2), -1), "global codebook must lie in"),
    ],
)
def test_tokens_that_do_not_fit_the_codebooks_are_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        TokenStatistics({"global": 4, "local": 8}).update(tokens)


def test_quantization_error_of_known_latents():
    """Channel a: values 0, 2 (variance 1), error 0.5 each. Channel b: 0, 4 (variance 4), no error."""
    z = torch.tensor([[0.0, 2.0], [0.0, 4.0]]).view(1, 2, 1, 2)
    z_q = torch.tensor([[0.5, 1.5], [0.0, 4.0]]).view(1, 2, 1, 2)
    error = QuantizationError({"global": 1, "local": 1})
    error.update(z, z_q)
    assert error.compute() == {"all": pytest.approx(0.25 / 5), "global": pytest.approx(0.25), "local": 0.0}


def test_quantization_error_of_the_mean_is_1_and_of_equal_latents_0():
    z = random_images(4, 6, 3, 3)
    for quantized, expected in ((z, 0.0), (z.mean(dim=(0, 2, 3), keepdim=True).expand_as(z), 1.0)):
        error = QuantizationError({"codebook": 6})
        error.update(z, quantized)
        assert error.compute()["all"] == pytest.approx(expected, abs=1e-6)


def test_quantization_error_in_batches_equals_that_of_all_latents_at_once():
    """Also where the mean is large against the spread, in float64."""
    z = random_images(9, 4, 3, 5).double() + 1000 * torch.arange(4.0).view(1, 4, 1, 1)
    z_q = z + 0.1 * random_images(9, 4, 3, 5, seed=1)
    whole, parts = (QuantizationError({"global": 1, "local": 3}) for _ in range(2))
    whole.update(z, z_q)
    for latents, quantized in zip(z.split(2), z_q.split(2), strict=True):
        parts.update(latents, quantized)
    assert parts.compute() == pytest.approx(whole.compute(), rel=1e-9)
    spread = z.var(dim=(0, 2, 3), correction=0).sum()
    expected = (z - z_q).square().mean(dim=(0, 2, 3)).sum() / spread
    assert whole.compute()["all"] == pytest.approx(expected.item(), rel=1e-9)


def test_quantization_error_refuses_other_shapes_and_is_nan_before_any_latents():
    error = QuantizationError({"global": 2, "local": 2})
    assert math.isnan(error.compute()["all"])
    with pytest.raises(ValueError, match=r"must both be \(B, 4, h, w\)"):
        error.update(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2))


def distances(reconstruction, original, **options):
    metric = SlicedWasserstein(**options)
    metric.update(reconstruction, original)
    return metric.compute()


def test_the_laplacian_pyramid_adds_up_to_the_image_again():
    """Each level is the image less the enlarged next one: enlarging and adding from the coarsest on restores it."""
    images = random_images(2, 3, 70, 64)
    levels = laplacian_pyramid(images)
    assert [tuple(level.shape[-2:]) for level in levels] == [(70, 64), (35, 32), (18, 16)]
    restored = levels[-1]
    binomial = torch.tensor([1.0, 4, 6, 4, 1]) / 16
    for level in levels[-2::-1]:
        spread = torch.zeros_like(level)
        spread[..., ::2, ::2] = restored
        padded = torch.nn.functional.pad(spread, (2, 2, 2, 2), mode="reflect")
        kernel = torch.outer(binomial, binomial).expand(3, 1, 5, 5)
        restored = level + 4 * torch.nn.functional.conv2d(padded, kernel, groups=3)
    torch.testing.assert_close(restored, images)


def test_sliced_wasserstein_of_equal_images_is_0_and_grows_with_blur():
    original = photograph_pair(64, 64)[1]
    blurred = [torch.nn.functional.avg_pool2d(original, side, 1, side // 2) for side in (1, 3, 5)]
    found = [distances(image, original)["swd"] for image in blurred]
    assert found[0] == 0 and 0 < found[1] < found[2]


def test_sliced_wasserstein_of_a_level_by_brute_force():
    """One level (below 32 pixels), every position drawn: sorted projections of patches normalised by the originals."""
    original = random_images(2, 3, 20, 20)
    reconstruction = (0.5 * original + 0.1).clamp(0, 1)
    found = distances(reconstruction, original, patches=50, directions=8, repeats=1)
    generator = torch.Generator().manual_seed(0)
    places = [[torch.randint(14, (50,), generator=generator) for _ in range(2)] for _ in range(2)]
    sets = []
    for images in (original, reconstruction):
        rows = [
            image[:, top : top + 7, left : left + 7]
            for image, (tops, lefts) in zip(images, places, strict=True)
            for top, left in zip(tops, lefts, strict=True)
        ]
        sets.append(torch.stack(rows))
    mean, std = sets[0].mean((0, 2, 3)), sets[0].std((0, 2, 3), correction=0)
    points = [((part - mean.view(3, 1, 1)) / std.view(3, 1, 1)).flatten(1) for part in sets]
    directions = torch.randn(147, 8, generator=torch.Generator().manual_seed(0))
    directions = directions / directions.norm(dim=0)
    first, second = ((part @ directions).sort(dim=0).values for part in points)
    assert found["swd"] == pytest.approx(1000 * (first - second).abs().mean().item(), rel=1e-4)
    assert found["swd_levels"] == {"20": found["swd"]}


def test_sliced_wasserstein_sees_a_loss_of_contrast_which_own_normalisation_would_hide():
    original = random_images(2, 3, 20, 20)
    halved = 0.5 + 0.5 * (original - 0.5)
    # Directions of unit length, channels of unit variance: half of each projection is lost, E|N(0, 1)| / 2 = 0.4.
    assert distances(halved, original)["swd"] == pytest.approx(400, rel=0.1)


def test_sliced_wasserstein_does_not_depend_on_batches_and_counts_the_first_images_only():
    original, reconstruction = random_images(5, 3, 40, 36), random_images(5, 3, 40, 36, seed=1)
    whole = distances(reconstruction, original)
    parts, first = SlicedWasserstein(), SlicedWasserstein(images=2)
    for one, other in zip(reconstruction.split(2), original.split(2), strict=True):
        parts.update(one, other)
        first.update(one, other)
    assert parts.compute() == whole
    assert first.compute() == distances(reconstruction[:2], original[:2])


def test_sliced_wasserstein_has_no_value_below_a_patch_and_refuses_other_shapes():
    assert distances(torch.zeros(1, 3, 6, 20), torch.zeros(1, 3, 6, 20)) == {"swd": None, "swd_levels": {}}
    with pytest.raises(ValueError, match="`reconstruction` and `original`"):
        distances(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9))
    with pytest.raises(ValueError, match="`patches`"):
        SlicedWasserstein(patches=0)
