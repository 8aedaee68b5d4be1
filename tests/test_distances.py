"""Distances in EfficientNet-Lite's features: each form by hand, shifts, gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dualcodebook_hf.perceptual import FORMS
from dualcodebook_hf.perceptual.distances import EfficientNetDistance
from dualcodebook_hf.perceptual.efficientnet_lite import EfficientNetLite

COMPARED = (0, 1, 2, 4)


@pytest.fixture(scope="module")
def network() -> EfficientNetLite:
    """Random weights, but features of the real ones' size."""
    torch.manual_seed(0)
    network = EfficientNetLite("lite0")
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.Module.train(module, True)
            module.momentum = 1.0
    network(images)
    return network.eval()


@pytest.fixture
def images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.rand(2, 3, 40, 57, generator=generator) * 2 - 1 for _ in range(2))


def stages(network: EfficientNetLite, pair: tuple[torch.Tensor, torch.Tensor]) -> list[list[np.ndarray]]:
    with torch.no_grad():
        return [[stage.double().numpy() for stage in network.stages(images)] for images in pair]


def unit(features: np.ndarray) -> np.ndarray:
    return features / np.sqrt((features**2).sum(1, keepdims=True) + 1e-10)


def by_stages(first: list[np.ndarray], second: list[np.ndarray]) -> np.ndarray:
    return sum(((unit(first[n]) - unit(second[n])) ** 2).sum(1).mean((1, 2)) for n in COMPARED)


def by_dists(first: list[np.ndarray], second: list[np.ndarray]) -> np.ndarray:
    agreements = []
    for n in COMPARED:
        x, y = first[n].reshape(*first[n].shape[:2], -1), second[n].reshape(*second[n].shape[:2], -1)
        means = (2 * x.mean(2) * y.mean(2) + 1e-6) / (x.mean(2) ** 2 + y.mean(2) ** 2 + 1e-6)
        covariance = (x * y).mean(2) - x.mean(2) * y.mean(2)
        structure = (2 * covariance + 1e-6) / (x.var(2) + y.var(2) + 1e-6)
        agreements.append((means.mean(1) + structure.mean(1)) / 2)
    return 1 - np.mean(agreements, axis=0)


def by_gram(first: list[np.ndarray], second: list[np.ndarray]) -> np.ndarray:
    total = 0
    for n in (1, 2):
        grams = [np.einsum("bchw,bdhw->bcd", unit(part[n]), unit(part[n])) for part in (first, second)]
        total = total + ((grams[0] - grams[1]) ** 2).sum((1, 2)) / np.prod(first[n].shape[-2:]) ** 2
    return total


@pytest.mark.parametrize("form", FORMS)
def test_each_form_by_hand(network, images, form):
    first, second = stages(network, images)
    logits = [network(part).detach().numpy() for part in images]
    expected = {
        "stages": by_stages(first, second),
        "stages-logits": by_stages(first, second) + 0.1 * ((logits[0] - logits[1]) ** 2).mean(1),
        "dists": by_dists(first, second),
        "stages-gram": by_stages(first, second) + 5 * by_gram(first, second),
    }[form]
    found = EfficientNetDistance(network, form, shifts=1)(*images)
    assert found.shape == (2,)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_equal_images_have_distance_0_and_gradients_reach_the_first_and_no_weight(network, images, form):
    distance = EfficientNetDistance(network, form)
    x_hat = images[0].clone().requires_grad_()
    distance(x_hat, images[1]).mean().backward()
    assert x_hat.grad.isfinite().all() and x_hat.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    assert distance(images[0], images[0]).abs().max() < 1e-5
    assert (distance(*images) > 1e-3).all()


def test_both_images_are_shifted_alike_by_torchs_generator(network, images):
    distance, whole = EfficientNetDistance(network), EfficientNetDistance(network, shifts=1)
    torch.manual_seed(3)
    down, across = torch.randint(16, (2,)).tolist()
    assert down and across
    torch.manual_seed(3)
    torch.testing.assert_close(distance(*images), whole(*(part[..., down:, across:] for part in images)))
    state = torch.get_rng_state()
    whole(*images)
    assert torch.equal(torch.get_rng_state(), state)
    drawn = {tuple(distance(*images).tolist()) for _ in range(8)}
    assert len(drawn) > 4


def test_under_bfloat16_autocast_the_distance_is_float32_and_close(network, images):
    distance = EfficientNetDistance(network, shifts=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = distance(*images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, distance(*images), rtol=0.1, atol=1e-2)


def test_wrong_arguments_are_refused_by_name(network, images):
    with pytest.raises(ValueError, match=r"`form` must be one of stages, .*, got 'vgg'"):
        EfficientNetDistance(network, "vgg")
    with pytest.raises(ValueError, match=r"must be of one shape \(B, 3, H, W\) with H, W >= 16"):
        EfficientNetDistance(network)(images[0], images[1][..., 1:])
    with pytest.raises(ValueError, match=r"H, W >= 16, got .*\(2, 3, 40, 15\)"):
        EfficientNetDistance(network)(*(part[..., :15] for part in images))
