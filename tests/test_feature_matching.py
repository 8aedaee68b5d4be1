"""Feature matching: its averages and its value by hand, its gradient, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from dualcodebook_hf.perceptual.efficientnet_lite import HEAD_WIDTH, EfficientNetLite
from dualcodebook_hf.perceptual.feature_matching import FeatureAverages, FeatureMatching


@pytest.fixture(scope="module")
def network() -> EfficientNetLite:
    torch.manual_seed(0)
    return EfficientNetLite("lite1")


@pytest.fixture
def images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.rand(3, 3, 40, 48, generator=generator) * 2 - 1 for _ in range(2))


def test_averages_by_hand_of_one_batch_and_of_two():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(2, 4, HEAD_WIDTH, generator=generator) for _ in range(2))  # reconstructions, originals
    averages = FeatureAverages()
    averages.update(*first)
    difference, variance = averages()
    torch.testing.assert_close(difference, (first[0] - first[1]).mean(0))
    torch.testing.assert_close(variance, first[1].var(0, unbiased=False))
    averages.update(*second)
    difference, variance = averages()
    expected = (0.98 * (first[0] - first[1]).mean(0) + (second[0] - second[1]).mean(0)) / 1.98
    torch.testing.assert_close(difference, expected)
    mean, square = ((0.99 * a + b) / 1.99 for a, b in zip(moments(first[1]), moments(second[1]), strict=True))
    torch.testing.assert_close(variance, square - mean**2)


def moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return features.mean(0), features.square().mean(0)


def test_two_processes_average_what_one_would_of_both_batches(tmp_path):
    torch.multiprocessing.spawn(average_a_half, args=(str(tmp_path),), nprocs=2)
    whole = FeatureAverages()
    whole.update(*halves().transpose(0, 1).flatten(1, 2))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(found[name], value)


def halves() -> torch.Tensor:
    """Of two processes features of three reconstructions and of three originals."""
    return torch.rand(2, 2, 3, HEAD_WIDTH, generator=torch.Generator().manual_seed(0))


def average_a_half(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    averages = FeatureAverages()
    averages.update(*halves()[rank])
    torch.save(averages.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_value_and_gradient_by_hand(network, images):
    x_hat, x = images[0].requires_grad_(), images[1]
    value = FeatureMatching(network, shifts=1)(x_hat, x)
    (gradient,) = torch.autograd.grad(value, x_hat)
    features, originals = (network.pooled(batch) for batch in (x_hat, x))
    scale = originals.var(0, unbiased=False) + 1e-3
    expected = ((features - originals).mean(0).square() / scale).mean()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, x_hat)[0], rtol=1e-3, atol=1e-9)


def test_the_gradient_follows_the_average_of_batches_and_not_this_one(network, images):
    """A batch without a fault of its own is still pushed by what the others lack."""
    x_hat, x = images[0], images[1]
    matching = FeatureMatching(network)
    for _ in range(5):
        matching(x_hat, x)
    leaf = x.clone().requires_grad_()
    matching(leaf, x).backward()
    assert leaf.grad.abs().sum() > 0
    fresh = FeatureMatching(network)
    leaf.grad = None
    value = fresh(leaf, x)
    value.backward()
    assert value == 0
    assert not leaf.grad.any()


def test_evaluation_moves_nothing(network, images):
    matching = FeatureMatching(network)
    matching(*images)
    before = {name: value.clone() for name, value in matching.averages.state_dict().items()}
    matching.eval()(images[1], images[0])
    assert all(torch.equal(value, before[name]) for name, value in matching.averages.state_dict().items())
    assert before["batches"] == 1


def test_gradients_reach_reconstructions_alone(network, images):
    x_hat, x = (batch.clone().requires_grad_() for batch in images)
    FeatureMatching(network)(x_hat, x).backward()
    assert x_hat.grad.isfinite().all()
    assert x_hat.grad.any()
    assert x.grad is None
    assert not any(parameter.grad is not None for parameter in network.parameters())


def test_in_bfloat16_the_value_is_float32_and_near(network, images):
    torch.manual_seed(0)
    expected = FeatureMatching(network)(*images)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        value = FeatureMatching(network)(*images)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("shape", [(3, 3, 40, 47), (2, 3, 40, 48), (3, 3, 40)])
def test_other_shapes_are_refused(network, images, shape):
    with pytest.raises(ValueError, match="`x_hat` and `x` must be of one shape"):
        FeatureMatching(network)(torch.zeros(shape), images[1])
