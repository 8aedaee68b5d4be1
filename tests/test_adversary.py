"""The adversary: idle before its start, then the paper's formulas; frozen where it must be; equal across ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dualcodebook_hf.training.adversary import Adversary
from dualcodebook_hf.training.discriminators.augment import Augmentation
from dualcodebook_hf.training.discriminators.patch import PatchDiscriminator
from dualcodebook_hf.training.losses import adaptive_weight

START = 5


def make_adversary(**arguments) -> Adversary:
    torch.manual_seed(0)
    defaults = {"learning_rate": 1e-3, "start_step": START}
    return Adversary(PatchDiscriminator(channels=4), **defaults | arguments)


@pytest.fixture
def generator() -> nn.Conv2d:
    torch.manual_seed(1)
    return nn.Conv2d(3, 3, 3, padding=1)


def reconstruct(generator: nn.Module, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, x_hat, rec."""
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    x_hat = generator(x)
    return x, x_hat, (x - x_hat).abs().mean()


def test_before_the_start_the_discriminator_is_never_run(generator):
    adversary = make_adversary()
    calls = []
    adversary.discriminator.register_forward_hook(lambda *_: calls.append(1))
    x, x_hat, rec = reconstruct(generator)
    term = adversary.generator_term(x_hat, rec, generator.weight, START - 1)
    assert term.item() == 0
    assert not term.requires_grad
    assert adversary.discriminator_loss(x, x_hat, START - 1) is None
    assert not adversary.started(START - 1)
    assert not calls


def test_from_the_start_step_on_it_takes_part(generator):
    adversary = make_adversary()
    x, x_hat, rec = reconstruct(generator)
    assert adversary.started(START)
    assert adversary.generator_term(x_hat, rec, generator.weight, START).item() != 0
    assert adversary.discriminator_loss(x, x_hat, START).item() > 0


def test_the_generators_term_is_lambda_times_weight_times_the_negative_mean_logit(generator):
    adversary = make_adversary(weight=0.8)
    _, x_hat, rec = reconstruct(generator)
    term = adversary.generator_term(x_hat, rec, generator.weight, START)
    g = -adversary.discriminator(x_hat).mean()
    expected = adaptive_weight(rec, g, generator.weight) * 0.8 * g
    torch.testing.assert_close(term, expected)
    half = make_adversary(weight=0.4).generator_term(x_hat, rec, generator.weight, START)
    torch.testing.assert_close(half * 2, term)


def test_the_generators_term_moves_the_generator_and_leaves_the_discriminator_alone(generator):
    adversary = make_adversary()
    _, x_hat, rec = reconstruct(generator)
    adversary.generator_term(x_hat, rec, generator.weight, START).backward()
    assert generator.weight.grad.abs().sum() > 0
    parameters = list(adversary.discriminator.parameters())
    assert all(parameter.grad is None for parameter in parameters)
    assert all(parameter.requires_grad for parameter in parameters)


def test_the_discriminators_loss_is_the_hinge_and_does_not_reach_the_generator(generator):
    adversary = make_adversary()
    x, x_hat, _ = reconstruct(generator)
    loss = adversary.discriminator_loss(x, x_hat, START)
    real, fake = adversary.discriminator(x), adversary.discriminator(x_hat)
    torch.testing.assert_close(loss, 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean()))
    loss.backward()
    assert generator.weight.grad is None
    assert all(parameter.grad is not None for parameter in adversary.discriminator.parameters())


def test_both_losses_may_be_computed_before_either_backward(generator):
    adversary = make_adversary()
    x, x_hat, rec = reconstruct(generator)
    term = adversary.generator_term(x_hat, rec, generator.weight, START)
    loss = adversary.discriminator_loss(x, x_hat, START)
    (rec + term).backward()
    loss.backward()
    assert generator.weight.grad.isfinite().all()


def test_training_the_discriminator_lowers_its_loss(generator):
    adversary = make_adversary()
    x, x_hat, _ = reconstruct(generator)
    losses = []
    for _ in range(20):
        loss = adversary.discriminator_loss(x, x_hat, START)
        adversary.optimizer.zero_grad()
        loss.backward()
        adversary.optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_the_optimizer_is_adam_with_the_papers_betas():
    (group,) = make_adversary(learning_rate=2e-4).optimizer.param_groups
    assert (group["lr"], group["betas"]) == (2e-4, (0.5, 0.9))
    (group,) = make_adversary(betas=(0.5, 0.99)).optimizer.param_groups
    assert group["betas"] == (0.5, 0.99)


def test_under_autocast_both_losses_are_float32_and_finite(generator):
    adversary = make_adversary()
    x, _, _ = reconstruct(generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_hat = generator(x)
        rec = (x - x_hat).abs().mean()
        term = adversary.generator_term(x_hat, rec, generator.weight, START)
        loss = adversary.discriminator_loss(x, x_hat, START)
    assert term.dtype == loss.dtype == torch.float32
    (rec + term).backward()
    loss.backward()
    assert generator.weight.grad.isfinite().all()


def test_accelerate_prepares_network_and_optimizer(generator):
    accelerate = pytest.importorskip("accelerate")
    adversary = make_adversary()
    accelerator = accelerate.Accelerator(cpu=True)
    adversary.prepare(accelerator)
    first_weight = next(adversary.discriminator.parameters())
    before = first_weight.clone()
    x, x_hat, _ = reconstruct(generator)
    with accelerator.accumulate(generator, adversary.discriminator):
        accelerator.backward(adversary.discriminator_loss(x, x_hat, START))
        adversary.optimizer.step()
    assert not torch.equal(first_weight, before)


def test_any_network_may_be_the_discriminator_and_its_frozen_part_stays(generator):
    torch.manual_seed(0)
    frozen = nn.Conv2d(3, 4, 3).requires_grad_(False)
    head = nn.Sequential(nn.GroupNorm(2, 4), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 1))
    adversary = Adversary(nn.Sequential(frozen, head), learning_rate=1e-2, start_step=0)
    before = [parameter.clone() for parameter in adversary.discriminator.parameters()]
    x, x_hat, rec = reconstruct(generator)
    (rec + adversary.generator_term(x_hat, rec, generator.weight, 0)).backward()
    adversary.discriminator_loss(x, x_hat, 0).backward()
    adversary.optimizer.step()
    assert generator.weight.grad.isfinite().all()
    moved = [not torch.equal(a, b) for a, b in zip(adversary.discriminator.parameters(), before, strict=True)]
    assert moved[:2] == [False, False]
    assert any(moved[2:])
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_the_weight_rises_over_the_ramp(generator):
    adversary, plain = make_adversary(ramp=4), make_adversary()
    _, x_hat, rec = reconstruct(generator)
    full = plain.generator_term(x_hat, rec, generator.weight, START)
    for step, share in ((START, 0.25), (START + 1, 0.5), (START + 3, 1.0), (START + 50, 1.0)):
        torch.testing.assert_close(adversary.generator_term(x_hat, rec, generator.weight, step), share * full)
    assert adversary.generator_term(x_hat, rec, generator.weight, START - 1).item() == 0
    assert adversary.discriminator_loss(x_hat, x_hat, START) is not None


def test_without_the_adaptive_weight_the_weight_alone_counts(generator):
    adversary = make_adversary(adaptive=False, weight=0.03)
    _, x_hat, rec = reconstruct(generator)
    term = adversary.generator_term(x_hat, rec, generator.weight, START)
    torch.testing.assert_close(term, -0.03 * adversary.discriminator(x_hat).mean())


def test_the_discriminator_sees_augmented_images_only(generator):
    adversary = make_adversary(augmentation=Augmentation(["color"]))
    seen = []
    adversary.discriminator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x, x_hat, rec = reconstruct(generator)
    adversary.generator_term(x_hat, rec, generator.weight, START).backward()
    adversary.discriminator_loss(x, x_hat, START)
    assert len(seen) == 3 and generator.weight.grad.abs().sum() > 0
    assert not any(torch.equal(images, given) for images in seen for given in (x, x_hat))


def test_wrong_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="`ramp` must be at least 0, got -1"):
        make_adversary(ramp=-1)
    with pytest.raises(ValueError, match="`weight` must be at least 0, got -1"):
        make_adversary(weight=-1)
    with pytest.raises(ValueError, match="`start_step` must be at least 0, got -1"):
        make_adversary(start_step=-1)


def train_as_one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(1)
    generator = DistributedDataParallel(nn.Conv2d(3, 3, 3, padding=1), broadcast_buffers=False)
    optimizer = torch.optim.SGD(generator.parameters(), lr=0.1)
    adversary = make_adversary(start_step=1)
    adversary.discriminator = DistributedDataParallel(adversary.discriminator, broadcast_buffers=False)
    for step in range(3):
        x, x_hat, rec = reconstruct(generator, seed=10 * step + rank)  # other images on each rank
        (rec + adversary.generator_term(x_hat, rec, generator.module.weight, step)).backward()
        loss = adversary.discriminator_loss(x, x_hat, step)
        if loss is not None:
            loss.backward()
            adversary.optimizer.step()
        optimizer.step()
        optimizer.zero_grad()
        adversary.optimizer.zero_grad()
    state = {"g": generator.state_dict(), "d": adversary.discriminator.state_dict()}
    torch.save(state, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_different_images_stay_equal_buffers_included(tmp_path):
    torch.multiprocessing.spawn(train_as_one_of_two, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for network in ("g", "d"):
        for name, value in first[network].items():
            assert torch.equal(value, second[network][name]), name
    fresh = make_adversary().discriminator.state_dict()
    moved = {name for name, value in fresh.items() if not torch.equal(value, first["d"][f"module.{name}"])}
    # The hinge's two halves cancel for the bias of the logits as long as all of them lie in (-1, 1).
    assert moved | {"model.11.bias"} == set(fresh)
