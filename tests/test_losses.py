"""The loss terms against the paper's formulas in numpy and against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from dualcodebook_hf.metrics.images import ms_ssim
from dualcodebook_hf.perceptual.vgg import LPIPS
from dualcodebook_hf.training.losses import (
    MSSSIMLoss,
    ReconstructionLoss,
    adaptive_weight,
    generator_loss,
    grid_pattern,
    hinge_discriminator_loss,
    seams,
    take_gradient,
    weighted_sum,
)


@pytest.fixture
def images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_hat, x = (torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1 for _ in range(2))
    return x_hat, x


def test_hinge_loss_by_hand():
    real, fake = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 1 + 2) / 3 + (0 + 1 + 2) / 3))


def test_hinge_loss_equals_numpy():
    real, fake = torch.randn(2, 1, 5, 5), torch.randn(2, 1, 5, 5)
    expected = 0.5 * (np.maximum(0, 1 - real.numpy()).mean() + np.maximum(0, 1 + fake.numpy()).mean())
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(expected, rel=1e-5)


def test_generator_loss_is_the_negative_mean_logit():
    assert generator_loss(torch.tensor([[1.0, 2.0], [3.0, 6.0]])).item() == -3


def test_adaptive_weight_by_hand():
    # d rec / d last = (3, 4), of norm 5; d g / d last = (0, 2).
    last = torch.tensor([1.0, 1.0], requires_grad=True)
    rec, g = 3 * last[0] + 4 * last[1], 2 * last[1]
    weight = adaptive_weight(rec, g, last)
    assert weight.item() == pytest.approx(5 / (2 + 1e-4), rel=1e-6)
    assert not weight.requires_grad
    (rec + weight * g).backward()  # the graphs are still there
    torch.testing.assert_close(last.grad, torch.tensor([3.0, 4 + 2 * weight.item()]))


def test_a_gradient_taken_once_is_the_plain_one_through_every_later_pass():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1))
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    measure = ReconstructionLoss(l2_weight=0.5, perceptual=MSSSIMLoss())
    found = {}
    for taken in (False, True):
        layers.zero_grad()
        x_hat = layers(x)
        leaf = x_hat.detach().requires_grad_() if taken else x_hat
        rec, g = measure.rec(measure(leaf, x)), (leaf[:, :1] * x[:, :1]).mean()
        if taken:
            rec = take_gradient(rec, leaf, x_hat)
            leaf = x_hat.detach().requires_grad_()
            g = take_gradient((leaf[:, :1] * x[:, :1]).mean(), leaf, x_hat)
        weight = adaptive_weight(rec, g, layers[2].weight)
        (rec + 0.8 * weight * g).backward()
        found[taken] = [rec.detach(), weight, *(parameter.grad.clone() for parameter in layers.parameters())]
    for plain, once in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(once, plain, rtol=1e-5, atol=1e-8)


def test_adaptive_weight_is_clamped_and_finite_where_the_generators_gradient_vanishes():
    last = torch.ones(2, requires_grad=True)
    assert adaptive_weight(3 * last.sum(), 0 * last.sum(), last).item() == pytest.approx(1e4)
    assert adaptive_weight(0 * last.sum(), last.sum(), last).item() == 0


def test_weighted_sum_needs_a_weight_for_each_term_and_a_term_for_each_weight():
    terms = {"a": torch.tensor(2.0), "b": torch.tensor(3.0)}
    assert weighted_sum(terms, {"a": 0.5, "b": 2.0}).item() == 7
    for weights in ({"a": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 1.0, "c": 1.0}):
        with pytest.raises(ValueError, match="`terms` and `weights` must have the same names"):
            weighted_sum(terms, weights)
    with pytest.raises(ValueError, match="same names"):
        weighted_sum({}, {})


def test_the_papers_reconstruction_loss(images):
    """rec = mean |x - x_hat| + 1.25 mean LPIPS."""
    torch.manual_seed(0)
    lpips = LPIPS()
    distance = lpips(*images).mean().item()
    loss = ReconstructionLoss(perceptual=lpips)
    terms = loss(*images)
    assert loss.weights == {"l1": 1.0, "perceptual": 1.25}
    l1 = np.abs(images[1].numpy() - images[0].numpy()).mean()
    assert terms["l1"].item() == pytest.approx(l1, rel=1e-5)
    assert terms["perceptual"].item() == pytest.approx(distance, rel=1e-5)
    assert loss.rec(terms).item() == pytest.approx(l1 + 1.25 * distance, rel=1e-5)


def test_l2_and_ms_ssim_terms(images):
    loss = ReconstructionLoss(l1_weight=1.0, l2_weight=2.0, perceptual=MSSSIMLoss(), perceptual_weight=0.5)
    terms = loss(*images)
    assert set(terms) == {"l1", "l2", "perceptual"}
    difference = images[1].numpy() - images[0].numpy()
    assert terms["l2"].item() == pytest.approx((difference**2).mean(), rel=1e-5)
    similarity = ms_ssim((images[0] + 1) / 2, (images[1] + 1) / 2).mean().item()
    assert terms["perceptual"].item() == pytest.approx(1 - similarity, rel=1e-5)
    expected = np.abs(difference).mean() + 2 * (difference**2).mean() + 0.5 * (1 - similarity)
    assert loss.rec(terms).item() == pytest.approx(expected, rel=1e-5)


def test_the_perceptual_module_is_any_distance_of_two_batches(images):
    class PerImage(torch.nn.Module):
        def forward(self, x_hat, x):
            return (x_hat - x).abs().amax(dim=(1, 2, 3))

    loss = ReconstructionLoss(l1_weight=0.0, perceptual=PerImage(), perceptual_weight=3.0)
    expected = 3 * (images[0] - images[1]).abs().amax(dim=(1, 2, 3)).mean()
    torch.testing.assert_close(loss.rec(loss(*images)), expected)


def test_rec_ignores_terms_of_others(images):
    loss = ReconstructionLoss()
    terms = loss(*images)
    assert loss.rec({**terms, "global_codebook": torch.tensor(100.0)}) == terms["l1"]


def test_terms_of_weight_0_are_not_computed(images):
    assert set(ReconstructionLoss(l1_weight=0.0, l2_weight=1.0)(*images)) == {"l2"}
    assert set(ReconstructionLoss(perceptual=MSSSIMLoss(), perceptual_weight=0.0)(*images)) == {"l1"}


def test_equal_images_cost_nothing(images):
    loss = ReconstructionLoss(l2_weight=1.0, perceptual=MSSSIMLoss())
    terms = loss(images[0], images[0])
    assert all(abs(term.item()) < 1e-6 for term in terms.values())


def test_pixels_far_outside_the_range_still_have_a_gradient_from_ms_ssim(images):
    x_hat = (images[1] * 0.5 + 3).requires_grad_()
    loss = ReconstructionLoss(l1_weight=0.0, perceptual=MSSSIMLoss())
    loss.rec(loss(x_hat, images[1])).backward()
    assert x_hat.grad.isfinite().all()
    assert x_hat.grad.abs().sum() > 0


def test_under_autocast_terms_are_float32_and_close(images):
    loss = ReconstructionLoss(l2_weight=1.0, perceptual=MSSSIMLoss())
    expected = loss(*images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = loss(*images)
    for name, term in terms.items():
        assert term.dtype == torch.float32
        torch.testing.assert_close(term, expected[name])


def test_wrong_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="not all 0"):
        ReconstructionLoss(l1_weight=0.0)
    with pytest.raises(ValueError, match="not all 0"):
        ReconstructionLoss(l1_weight=0.0, perceptual=MSSSIMLoss(), perceptual_weight=0.0)
    with pytest.raises(ValueError, match="must be >= 0"):
        ReconstructionLoss(l1_weight=-1.0, l2_weight=2.0)


def test_log_l2_by_hand_is_one_number_per_image_then_the_mean():
    x = torch.zeros(2, 3, 4, 4)
    x_hat = torch.stack([torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.5)])
    loss = ReconstructionLoss(l1_weight=0.0, log_l2_weight=2.0)
    terms = loss(x_hat, x)
    expected = (math.log(0.01 + 0.004) + math.log(0.25 + 0.004)) / 2
    torch.testing.assert_close(terms["log_l2"], torch.tensor(expected))
    torch.testing.assert_close(loss.rec(terms), torch.tensor(2 * expected))


def test_a_pattern_that_every_block_has_counts_whole_and_what_blocks_have_by_chance_counts_little():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 40, 37, generator=generator) * 2 - 1  # 10 x 9 blocks of 4, and a pixel over
    pattern = torch.randn(3, 4, 4, generator=generator).repeat(1, 10, 9)
    errors = torch.nn.functional.pad(pattern, (0, 1)).expand(4, -1, -1, -1)
    torch.testing.assert_close(grid_pattern(errors, x, 4), pattern.square().mean())
    colours = torch.nn.functional.avg_pool2d(x[..., :36], 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    by_colour = torch.nn.functional.pad(pattern * colours, (0, 1))  # stronger where a block is bright
    torch.testing.assert_close(grid_pattern(by_colour, x, 4), by_colour[..., :36].square().mean())
    noise = torch.randn(4, 3, 40, 37, generator=generator)
    assert grid_pattern(noise, x, 4).item() == pytest.approx(4 / 360, rel=0.3)  # 4 numbers are fitted to 360 blocks


def test_seams_by_hand_and_none_where_errors_are_smooth_or_one_block_is_all():
    blocks = torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, -1.0]])  # errors of 2 x 3 blocks of 4 pixels
    errors = blocks.repeat_interleave(4, 0).repeat_interleave(4, 1).expand(2, 3, -1, -1)
    down, across = (blocks[1] - blocks[0]).square(), (blocks[:, 1:] - blocks[:, :-1]).square()
    expected = (4 * down.sum() + 4 * across.sum()) / (4 * down.numel() + 4 * across.numel())
    torch.testing.assert_close(seams(errors, 4), expected)
    cut = torch.nn.functional.pad(errors, (0, 2, 0, 3), mode="replicate")  # rows and columns of blocks cut short
    assert seams(cut, 4) > 0
    assert seams(errors[..., :4, :4], 4) == 0
    ramp = torch.arange(12.0).expand(1, 1, 8, 12)  # a step of 1 between all columns, at edges or not, and none of rows
    torch.testing.assert_close(seams(ramp, 4), torch.tensor(2 * 8 / (2 * 8 + 12)))


def test_the_benchmark_of_seams_divides_steps_at_the_edges_by_those_within_blocks():
    from benchmarks.seams import Seams

    along = torch.arange(12) * 0.01 + torch.arange(12) // 4 * 0.05  # steps of .01, of .06 at the edges of blocks of 4
    images = (along[:, None] + 2 * along).expand(3, 3, 12, 12).clone()
    blocks = Seams(4)
    for batch in images.split(2):
        blocks.update(batch)
    assert blocks.compute() == pytest.approx(6)
    other = Seams(3)  # edges after 2, 5, 8 instead of 3, 7: none of the steps of .06
    other.update(images)
    assert other.compute() == pytest.approx(8 * 0.01 / (6 * 0.01 + 2 * 0.06))


def test_the_seam_term_joins_blocks_that_the_original_joins():
    x = torch.zeros(1, 3, 8, 8)
    x_hat = torch.zeros(1, 3, 8, 8)
    x_hat[..., 4:] = 0.5
    x_hat.requires_grad_()
    loss = ReconstructionLoss(l1_weight=0.0, l2_weight=1.0, seam_weight=3.0, grid=4)
    terms = loss(x_hat, x)
    assert loss.rec(terms) == terms["l2"] + 3 * seams(x - x_hat, 4)
    (gradient,) = torch.autograd.grad(terms["seams"], x_hat)
    assert (gradient[..., 3] < 0).all() and (gradient[..., 4] > 0).all()  # a step downhill closes the gap
    assert not gradient[..., :3].any() and not gradient[..., 5:].any()


def test_the_grid_term_is_about_errors_and_has_a_gradient_in_the_reconstruction_alone():
    generator = torch.Generator().manual_seed(0)
    x_hat, x = (torch.rand(1, 3, 32, 32, generator=generator).requires_grad_() for _ in range(2))
    loss = ReconstructionLoss(l1_weight=0.0, l2_weight=1.0, grid_weight=2.0, grid=8)
    terms = loss(x_hat, x)
    assert loss.rec(terms) == terms["l2"] + 2 * grid_pattern(x - x_hat, x, 8)
    assert loss(x, x)["grid"] == 0
    (gradient,) = torch.autograd.grad(terms["grid"], x_hat)
    step = x_hat - 1e-2 * 32 * 32 * gradient
    assert grid_pattern(x - step, x, 8) < terms["grid"]
