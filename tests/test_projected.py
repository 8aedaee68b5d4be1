"""The projected discriminator: its shape, what is frozen in it, spectral norms; and the augmentation before it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dualcodebook_hf.perceptual.efficientnet_lite import EfficientNetLite
from dualcodebook_hf.training.discriminators import AUGMENTATIONS
from dualcodebook_hf.training.discriminators.augment import Augmentation
from dualcodebook_hf.training.discriminators.norms import build_norm
from dualcodebook_hf.training.discriminators.patch import PatchDiscriminator
from dualcodebook_hf.training.discriminators.projected import ProjectedDiscriminator, SpectralConv2d


@pytest.fixture(scope="module")
def network() -> EfficientNetLite:
    torch.manual_seed(0)
    return EfficientNetLite("lite0")


def small(network: EfficientNetLite, **arguments) -> ProjectedDiscriminator:
    torch.manual_seed(1)
    return ProjectedDiscriminator(network, channels=4, **arguments)


def images(side: int = 128, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_default_has_four_heads_of_4_3_2_and_1_blocks_up_to_512_channels(network):
    heads = ProjectedDiscriminator(network).heads
    convolutions = [[layer for layer in head if isinstance(layer, SpectralConv2d)] for head in heads]
    widths = [[layer.in_channels for layer in layers] for layers in convolutions]
    assert widths == [[64, 64, 128, 256, 512], [64, 128, 256, 512], [128, 256, 512], [256, 512]]
    assert all([layer.stride[0] for layer in layers] == [2] * (len(layers) - 1) + [1] for layers in convolutions)
    trained = sum(parameter.numel() for parameter in heads.parameters())
    assert trained == pytest.approx(10.3e6, rel=0.01)


@pytest.mark.parametrize(("side", "logits"), [(128, 4), (160, 16), (256, 100), (144, 4)])
def test_every_head_gives_as_many_logits(network, side, logits):
    assert small(network)(images(side)).shape == (2, logits)


def test_the_classifier_and_the_random_projections_are_frozen_and_saved(network):
    discriminator = small(network).train()
    frozen = {name for name, parameter in discriminator.named_parameters() if not parameter.requires_grad}
    rest = {name for name, _ in discriminator.named_parameters()} - frozen
    assert {name.split(".")[0] for name in frozen} == {"network", "projections", "mixers"}
    assert {name.split(".")[0] for name in rest} == {"heads"}
    assert frozen <= set(discriminator.state_dict())
    assert not any(module.training for module in discriminator.network.modules())
    other = ProjectedDiscriminator(EfficientNetLite("lite0"), channels=4)
    other.load_state_dict(discriminator.state_dict())
    x = images()
    assert torch.equal(discriminator.eval()(x), other.eval()(x))


def test_gradients_reach_the_image_and_every_head(network):
    discriminator, x = small(network, norm="group"), images().requires_grad_()
    discriminator(x).square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in discriminator.heads.parameters())
    assert all(parameter.grad is None for parameter in discriminator.network.parameters())


def test_mixtures_go_from_the_deepest_tap_to_the_shallowest(network):
    discriminator, x = small(network), images()
    stages = network.stages(x)
    mixture, expected = 0.0, []
    for number, side in ((3, 8), (2, 16), (1, 32), (0, 64)):
        tap = discriminator.projections[number](stages[(1, 2, 4, 6)[number]])
        larger = F.interpolate(tap + mixture, scale_factor=2, mode="bilinear", align_corners=True)
        mixture = discriminator.mixers[number](larger)
        assert mixture.shape[-1] == side
        expected.insert(0, mixture)
    for found, wanted in zip(discriminator._mixtures(x), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_spectral_convolution_has_norm_1_whatever_its_weight_and_its_gradient_is_that_of_the_exact_norm():
    torch.manual_seed(0)
    layer = SpectralConv2d(3, 8, 4).train()
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        layer.weight.mul_(30)
        for _ in range(200):
            layer(x)
    exact = layer.weight / torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
    torch.testing.assert_close(layer(x), F.conv2d(x, exact), rtol=1e-4, atol=1e-5)
    (found,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    (wanted,) = torch.autograd.grad(F.conv2d(x, exact).square().sum(), layer.weight)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_the_power_iteration_goes_on_in_training_mode_alone():
    torch.manual_seed(0)
    layer, x = SpectralConv2d(3, 8, 4), torch.randn(1, 3, 6, 6)
    with torch.no_grad():
        layer.weight.normal_()
    before = layer.direction.clone()
    layer.eval()(x)
    assert torch.equal(layer.direction, before)
    layer.train()(x)
    assert not torch.equal(layer.direction, before)


def test_under_autocast_the_norm_is_computed_in_float32():
    torch.manual_seed(0)
    layer, x = SpectralConv2d(3, 8, 4).eval(), torch.randn(1, 3, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16 and layer.direction.dtype == torch.float32
    torch.testing.assert_close(found.float(), layer(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("kind", ["projected", "patch"])
def test_only_batch_norm_mixes_the_images_of_a_batch(network, kind, norm):
    torch.manual_seed(0)
    discriminator = small(network, norm=norm) if kind == "projected" else PatchDiscriminator(4, norm=norm)
    discriminator.train()
    state = {name: value.clone() for name, value in discriminator.state_dict().items()}
    x = images(count=3)
    together = discriminator(x)[:1]
    discriminator.load_state_dict(state)
    alone = discriminator(x[:1])
    assert torch.allclose(together, alone, atol=1e-4) == (norm == "group")


def test_wrong_arguments_are_refused_by_name(network):
    with pytest.raises(ValueError, match="sides of at least 128 pixels, got"):
        small(network)(images(127))
    with pytest.raises(ValueError, match="`channels` must be at least 1, got 0"):
        ProjectedDiscriminator(network, channels=0)
    with pytest.raises(ValueError, match="`norm` must be one of batch, group, got 'layer'"):
        build_norm("layer", 4)
    with pytest.raises(ValueError, match=r"`names` must be of none, .*, got 'noise'"):
        Augmentation(["noise"])


def test_without_augmentation_images_are_the_same_and_no_number_is_drawn():
    x, state = images(8), torch.get_rng_state()
    assert Augmentation()(x) is x
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", sorted(set(AUGMENTATIONS) - {"none"}))
def test_each_image_is_changed_differently_by_torchs_generator_and_gradients_pass(name):
    x = images(40, count=1).expand(6, -1, -1, -1).clone().requires_grad_()
    torch.manual_seed(0)
    changed = Augmentation([name])(x)
    torch.manual_seed(0)
    assert torch.equal(changed, Augmentation([name])(x))
    assert changed.shape == x.shape
    assert len({tuple(image.flatten().tolist()) for image in changed}) > 3
    changed.sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_translation_moves_by_an_eighth_and_cutout_clears_a_fifth_at_most():
    x = torch.ones(200, 3, 40, 40)
    torch.manual_seed(0)
    moved = Augmentation(["translation"])(x)
    kept = moved[:, 0].sum((1, 2))
    assert kept.min() >= 35 * 35 and kept.max() <= 40 * 40 and len(kept.unique()) > 10
    holes = (Augmentation(["cutout"])(x)[:, 0] == 0).sum((1, 2))
    assert holes.max() == 8 * 8 and holes.min() > 0


def test_colour_keeps_the_form():
    x = images(16, count=1)
    torch.manual_seed(0)
    changed = Augmentation(["color"])(x)
    grey, before = (part.mean(1).flatten() for part in (changed, x))
    assert torch.corrcoef(torch.stack([grey, before]))[0, 1] == pytest.approx(1, abs=1e-4)
    assert nn.functional.l1_loss(changed, x) > 0.01
