"""Token noise: what the decoder gets, what stays as it was, and when there is none."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import TINY, spread_codes

from dualcodebook_hf import DualCodebookVQModel
from dualcodebook_hf.training.arguments import TrainArguments
from dualcodebook_hf.training.token_noise import TokenNoise


def model(**changes) -> DualCodebookVQModel:
    torch.manual_seed(0)
    return spread_codes(DualCodebookVQModel(**{**TINY, "global_transformer_layers": 0, **changes})).train()


def latents(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 12, 6, 6, generator=torch.Generator().manual_seed(1))


def nearest(codebook, vectors: torch.Tensor) -> torch.Tensor:
    return torch.cdist(vectors, codebook.codes()).argmin(-1)


def test_noise_replaces_tokens_by_near_ones_and_keeps_tokens_losses_and_gradient():
    clean, noisy = model(), model()
    TokenNoise(noisy, share=0.5, images=1.0, neighbours=3)
    z = latents().requires_grad_()
    expected, found = (network.quantize(z, return_dict=True) for network in (clean, noisy))
    assert torch.equal(expected.tokens, found.tokens)
    assert expected.losses == found.losses
    start, changed = 0, []
    for number, codebook in enumerate(noisy.quantize.codebooks.values()):
        vectors = found.quantized[:, start : start + codebook.dim].movedim(1, -1)
        given, own = nearest(codebook, vectors), found.tokens[:, number]
        torch.testing.assert_close(vectors, codebook.codes()[given], atol=1e-5, rtol=0)  # codes, whole ones
        ranks = torch.cdist(codebook.codes(), codebook.codes()).argsort(-1).argsort(-1)
        assert set(ranks[own[given != own], given[given != own]].tolist()) == {1, 2, 3}
        changed.append((given != own).float().mean().item())
        start += codebook.dim
    assert changed == pytest.approx([0.5, 0.5], abs=0.1)
    weights = torch.randn(found.quantized.shape)
    (gradient,) = torch.autograd.grad((found.quantized * weights).sum(), z)
    torch.testing.assert_close(gradient, weights)  # straight-through, as without noise


def test_only_some_images_have_noise_and_none_does_in_eval_mode():
    network = model()
    TokenNoise(network, share=1.0, images=0.3, neighbours=100)
    torch.manual_seed(0)
    found = network.quantize(latents(64), return_dict=True)
    differs = (found.quantized - network.quantize.lookup(found.tokens)).abs().amax((1, 2, 3)) > 1e-4
    assert differs.float().mean().item() == pytest.approx(0.3, abs=0.15)
    network.eval()
    found = network.quantize(latents(64), return_dict=True)
    torch.testing.assert_close(found.quantized, network.quantize.lookup(found.tokens))
    network.train().quantize.eval()  # the decoder alone is trained: it has the noise too
    found = network.quantize(latents(64), return_dict=True)
    assert (found.quantized - network.quantize.lookup(found.tokens)).abs().max() > 1e-4


def test_a_share_of_0_changes_nothing_and_a_copy_for_export_has_the_same_keys():
    clean, noisy = model(), model()
    TokenNoise(noisy, share=0.0, images=1.0, neighbours=3)
    z = latents()
    assert torch.equal(clean.quantize(z, return_dict=True).quantized, noisy.quantize(z, return_dict=True).quantized)
    assert set(copy.deepcopy(noisy).state_dict()) == set(clean.state_dict())


@pytest.mark.parametrize("name", ["token_noise", "token_noise_images"])
def test_shares_outside_0_and_1_are_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"`{name}` must lie in \[0, 1\], got 1.5"):
        TrainArguments(output_dir="x", perceptual="none", **{name: 1.5}).check()
