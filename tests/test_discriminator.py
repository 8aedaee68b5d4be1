"""PatchGAN: the layers that the paper names, their initialisation, and what each logit sees."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dualcodebook_hf.training.discriminators.patch import PatchDiscriminator


def convolutions(network: nn.Module) -> list[nn.Conv2d]:
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)]


def test_the_default_has_the_papers_convolutions():
    layers = convolutions(PatchDiscriminator())
    assert [layer.out_channels for layer in layers] == [64, 128, 256, 512, 1]
    assert [layer.in_channels for layer in layers] == [3, 64, 128, 256, 512]
    assert [layer.stride for layer in layers] == [(s, s) for s in (2, 2, 2, 1, 1)]
    assert all(layer.kernel_size == (4, 4) and layer.padding == (1, 1) for layer in layers)


def test_batch_norm_follows_every_convolution_but_the_first_and_last_which_alone_have_biases():
    kinds = [type(module).__name__ for module in PatchDiscriminator().model]
    middle = ["Conv2d", "BatchNorm2d", "LeakyReLU"]
    assert kinds == ["Conv2d", "LeakyReLU", *middle * 3, "Conv2d"]
    layers = convolutions(PatchDiscriminator())
    assert [layer.bias is not None for layer in layers] == [True, False, False, False, True]
    slopes = {module.negative_slope for module in PatchDiscriminator().modules() if isinstance(module, nn.LeakyReLU)}
    assert slopes == {0.2}


def test_weights_are_drawn_as_the_paper_says():
    torch.manual_seed(0)
    network = PatchDiscriminator()
    for layer in convolutions(network):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(layer.weight.mean().item()) < 1e-3
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    scales = torch.cat([norm.weight for norm in norms])
    assert scales.mean().item() == pytest.approx(1, abs=0.005)
    assert scales.std().item() == pytest.approx(0.02, rel=0.1)
    assert all(not norm.bias.any() for norm in norms)


@pytest.mark.parametrize(("size", "grid"), [((256, 256), (30, 30)), ((64, 48), (6, 4)), ((24, 24), (1, 1))])
def test_logits_form_a_grid(size, grid):
    assert PatchDiscriminator(channels=4)(torch.zeros(2, 3, *size)).shape == (2, 1, *grid)


def test_a_logit_of_three_layers_sees_70_pixels():
    network = PatchDiscriminator(channels=4).eval()
    x = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = network(x)
    logits[0, 0, 7, 7].backward()
    seen = x.grad.abs().sum((0, 1))
    assert (seen.sum(0) > 0).sum() == 70
    assert (seen.sum(1) > 0).sum() == 70


def test_channels_layers_and_input_channels_are_arguments():
    layers = convolutions(PatchDiscriminator(channels=8, layers=5, in_channels=1))
    assert [layer.out_channels for layer in layers] == [8, 16, 32, 64, 64, 64, 1]
    assert [layer.stride[0] for layer in layers] == [2, 2, 2, 2, 2, 1, 1]
    assert layers[0].in_channels == 1


def test_wrong_sizes_are_refused_by_name():
    with pytest.raises(ValueError, match="`channels` must be at least 1, got 0"):
        PatchDiscriminator(channels=0)
    with pytest.raises(ValueError, match="`layers` must be at least 1, got 0"):
        PatchDiscriminator(layers=0)
    with pytest.raises(ValueError, match="at least 24 pixels"):
        PatchDiscriminator(channels=4)(torch.zeros(1, 3, 23, 64))
