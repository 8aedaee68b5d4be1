"""The Fréchet distance against its definition with scipy's matrix square root, and where its inputs are degenerate."""

import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from dualcodebook_hf.metrics.frechet import FeatureMoments, FrechetDistance, frechet_distance, inception_extractor


def features(count, width, seed=0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing + offset


def moments(*batches):
    result = FeatureMoments()
    for batch in batches:
        result.update(batch)
    return result


def distance(a, b):
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def by_definition(a, b):
    sqrtm = pytest.importorskip("scipy.linalg").sqrtm
    covariances = np.cov(a.T.numpy()), np.cov(b.T.numpy())
    root = sqrtm(covariances[0] @ covariances[1]).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(covariances[0] + covariances[1] - 2 * root)


def test_moments_are_numpys_whatever_the_batches_and_however_far_from_zero():
    samples = features(50, 6, offset=1e4)
    joined = moments(*samples.split([1, 20, 29]))
    assert joined.count == 50
    np.testing.assert_allclose(joined.mean, samples.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(joined.covariance, np.cov(samples.T.numpy()), rtol=1e-9, atol=1e-9)


def test_the_definition_with_scipys_square_root():
    a, b = features(300, 12, seed=1), features(200, 12, seed=2, offset=0.3)
    assert distance(moments(a), moments(b)) == pytest.approx(by_definition(a, b), rel=1e-9)


def test_gaussians_with_diagonal_covariances_by_hand():
    a, b = torch.tensor([4.0, 9.0, 0.0]), torch.tensor([1.0, 16.0, 25.0])
    shift = torch.tensor([3.0, 0.0, 4.0])
    expected = 25 + (2 - 1) ** 2 + (3 - 4) ** 2 + (0 - 5) ** 2
    assert frechet_distance(shift, a.diag(), torch.zeros(3), b.diag()) == pytest.approx(expected, rel=1e-12)


def test_a_rotation_of_the_features_changes_nothing_and_a_shift_adds_its_square():
    a, b = features(80, 5, seed=1), features(80, 5, seed=2)
    rotation = torch.linalg.qr(features(5, 5, seed=3)).Q
    expected = distance(moments(a), moments(b))
    assert distance(moments(a @ rotation), moments(b @ rotation)) == pytest.approx(expected, rel=1e-9)
    assert distance(moments(a), moments(a + 2)) == pytest.approx(4 * 5, rel=1e-9)
    assert distance(moments(b), moments(a)) == pytest.approx(expected, rel=1e-9)


def test_equal_sets_are_at_zero_also_with_fewer_samples_than_features():
    few = features(20, 200)
    scale = moments(few).covariance.trace().item()
    assert 0 <= distance(moments(few), moments(few)) < 1e-12 * scale
    constant = torch.full((4, 3), 0.7)
    assert distance(moments(constant), moments(constant)) == 0


def test_singular_covariances_agree_with_the_subspace_they_live_in():
    a, b = features(15, 4, seed=1), features(15, 4, seed=2, offset=1)
    inside = torch.linalg.qr(features(100, 100)).Q[:4]  # four orthonormal directions of a hundred
    expected = distance(moments(a), moments(b))
    assert distance(moments(a @ inside), moments(b @ inside)) == pytest.approx(expected, rel=1e-7)


def mean_and_spread(images):
    return torch.cat([images.mean(dim=(2, 3)), images.std(dim=(2, 3))], dim=1)


def test_images_are_clamped_and_measured_by_the_extractor():
    originals = torch.rand(30, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    reconstructions = originals * 1.5 - 0.2
    measured = FrechetDistance(mean_and_spread)
    for part in (slice(0, 11), slice(11, 30)):
        measured.update(reconstructions[part], originals[part])
    a, b = (mean_and_spread(images).double() for images in (reconstructions.clamp(0, 1), originals))
    assert measured.compute()["rfid"] == pytest.approx(by_definition(a, b), rel=1e-6)


def test_no_more_images_than_features_warns_and_one_image_is_an_error():
    images = torch.rand(6, 3, 4, 4)
    measured = FrechetDistance(mean_and_spread)
    measured.update(images[:1], images[:1])
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        measured.compute()
    measured.update(images[1:], images[1:])
    with pytest.warns(UserWarning, match="6 images with 6 features"):
        assert measured.compute()["rfid"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: moments(torch.zeros(3)), r"`features` must be of shape \(B, D\), got \(3,\)"),
        (lambda: moments(torch.zeros(2, 3), torch.zeros(2, 4)), r"\(B, 3\), got \(2, 4\)"),
        (lambda: moments(torch.full((2, 3), math.nan)), "finite"),
        (lambda: frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(3), torch.eye(3)), "means and cov"),
        (
            lambda: FrechetDistance(mean_and_spread).update(torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 4, 4)),
            "one shape",
        ),
        (lambda: FrechetDistance(mean_and_spread).update(*torch.zeros(2, 1, 3, 4, 4).byte()), "floating point"),
        (lambda: FrechetDistance(lambda x: x[:1].flatten(1)).update(*torch.zeros(2, 2, 3, 4, 4)), "must give 2 rows"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.skipif(find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")
def test_without_torch_fidelity_the_error_says_what_to_install():
    with pytest.raises(
        ImportError, match=r"torch-fidelity, torchvision: pip install 'torch-fidelity>=0\.3' 'torchvision'"
    ):
        inception_extractor()
