"""Fast inference: the same tokens and pictures to rounding, the same keys, and what it keeps and lets go."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from dualcodebook_hf import DualCodebookModel, DualCodebookVQModel, default_checkpoint
from dualcodebook_hf.inference import (
    BFloat16Conv2d,
    InferenceResnetBlock,
    fastest_dtype,
    optimize_for_inference,
)
from dualcodebook_hf.winograd import WinogradConv2d, use_winograd

FLOAT32 = {"dtype": torch.float32, "compile": False}


def outputs(model, images):
    """Tokens and reconstruction by the public calls."""
    tokens = model.tokenize(images)
    return tokens, model.detokenize(tokens, size=images.shape[-2:])


@pytest.mark.parametrize("backbone", ["vqgan", "dcae"])
def test_float32_changes_rounding_and_nothing_else(backbone, tiny_config, images):
    torch.manual_seed(0)
    plain = DualCodebookVQModel(**{**tiny_config, "backbone": backbone, "attention": backbone == "vqgan"}).eval()
    fast = copy.deepcopy(plain)
    assert optimize_for_inference(fast, **FLOAT32) is fast
    assert list(fast.state_dict()) == list(plain.state_dict())
    tokens, restored = outputs(plain, images)
    found, pixels = outputs(fast, images)
    assert torch.equal(found, tokens)
    torch.testing.assert_close(pixels, restored, atol=1e-5, rtol=0)
    assert fast.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in fast.parameters())


def test_both_faces_of_the_embedded_checkpoint(images):
    pixels = images.repeat(1, 1, 4, 4)
    plain = DualCodebookVQModel.from_pretrained(default_checkpoint(), dtype=torch.float32)
    tokens, restored = outputs(plain, pixels)
    for face in (DualCodebookVQModel, DualCodebookModel):
        fast = optimize_for_inference(face.from_pretrained(default_checkpoint(), dtype=torch.float32), **FLOAT32)
        found, sample = outputs(fast, pixels)
        assert torch.equal(found, tokens)
        torch.testing.assert_close(sample, restored, atol=1e-4, rtol=0)


@pytest.mark.skipif(not torch.backends.nnpack.is_available(), reason="torch without NNPACK")
def test_the_papers_blocks_run_by_winograd_whatever_the_batch(tiny_config):
    config = {**tiny_config, "block_out_channels": [64, 64], "norm_num_groups": 32}
    torch.manual_seed(0)
    plain = DualCodebookVQModel(**config).eval()
    fast = optimize_for_inference(copy.deepcopy(plain), **FLOAT32)
    assert any(isinstance(module, WinogradConv2d) for module in fast.modules())
    assert any(isinstance(module, InferenceResnetBlock) for module in fast.modules())
    images = torch.rand(2, 3, 96, 100) * 2 - 1
    tokens, restored = outputs(plain, images)
    found, pixels = outputs(fast, images)
    assert (found == tokens).float().mean() >= 0.99
    torch.testing.assert_close(pixels, restored, atol=2e-3 * restored.std().item(), rtol=0)
    assert torch.equal(fast.tokenize(images[:1]), found[:1])  # an image's tokens do not depend on its batch


@pytest.mark.skipif(not torch.backends.nnpack.is_available(), reason="torch without NNPACK")
@pytest.mark.parametrize("trained", [True, False])
def test_winograd_gives_the_convolution_and_its_gradients(trained):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(64, 96, 3, padding=1), nn.Conv2d(96, 8, 3, padding=1)).requires_grad_(trained)
    fast = copy.deepcopy(plain)
    use_winograd(fast)
    assert [type(layer) for layer in fast] == [WinogradConv2d, nn.Conv2d]  # 8 channels are too few
    x = torch.randn(2, 64, 50, 47)
    found = {}
    for network in (plain, fast):
        leaf = x.clone().requires_grad_()
        out = network(leaf)
        out.square().mean().backward()
        found[network is fast] = [out.detach(), leaf.grad, *(p.grad for p in network.parameters() if trained)]
    assert len(found[True]) == (6 if trained else 2)
    assert all(parameter.grad is None for parameter in fast.parameters()) is not trained
    for one, other in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-3 * one.std().item())
    small = x[..., :20, :20]
    assert torch.equal(fast(small), plain(small))


@pytest.mark.skipif(not torch.backends.nnpack.is_available(), reason="torch without NNPACK")
def test_a_network_with_winograds_convolutions_runs_in_another_process_and_on_nothing(tmp_path):
    network = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1))
    use_winograd(network)
    x = torch.randn(1, 64, 50, 50)
    assert network(x[:0]).shape == (0, 64, 50, 50)
    torch.save((network, x, network(x)), tmp_path / "network.pt")
    load = "import sys, torch; network, x, y = torch.load(sys.argv[1], weights_only=False)"
    code = f"{load}; assert torch.equal(network(x), y)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "network.pt")], check=True)
    assert network.to("meta")(x.to("meta")).shape == x.shape


@pytest.mark.parametrize("backbone", ["vqgan", "dcae"])
def test_bfloat16_keeps_the_ends_and_the_interface_in_float32(backbone, tiny_config, images):
    torch.manual_seed(0)
    plain = DualCodebookVQModel(**{**tiny_config, "backbone": backbone}).eval()
    fast = optimize_for_inference(copy.deepcopy(plain), dtype=torch.bfloat16, compile=False)
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert fast.dtype == torch.float32
    assert any(isinstance(module, BFloat16Conv2d) for module in fast.encoder.modules())
    kept = [module.weight.dtype for module in fast.encoder.conv_out.modules() if isinstance(module, nn.Conv2d)]
    assert kept == [torch.float32]
    assert {parameter.dtype for parameter in fast.decoder.parameters()} == {torch.bfloat16}
    latents, pixels = fast.encode(images).latents, fast.detokenize(plain.tokenize(images), size=(13, 18))
    assert latents.dtype == pixels.dtype == torch.float32
    expected = plain.encode(images).latents
    assert (latents - expected).abs().max() < 0.1 * expected.std()
    assert (pixels - outputs(plain, images)[1]).abs().max() < 0.05


def test_bfloat16_gives_99_of_100_tokens_of_the_embedded_checkpoint():
    from test_golden import drawn

    from dualcodebook_hf.image_processing_dualcodebook import to_pixels

    pixels = torch.stack([to_pixels(drawn(256, 256, seed)) for seed in range(3)])
    plain = DualCodebookVQModel.from_pretrained(default_checkpoint(), dtype=torch.float32)
    tokens = plain.tokenize(pixels)
    fast = optimize_for_inference(plain, dtype=torch.bfloat16, compile=False)
    assert (fast.tokenize(pixels) == tokens).float().mean() >= 0.99


def test_another_type_of_the_weights_is_kept(images, tiny_model):
    tiny_model.cast_backbone(torch.bfloat16)
    expected = outputs(tiny_model, images.bfloat16())[1]
    fast = optimize_for_inference(tiny_model, compile=False)
    assert fast.dtype == torch.bfloat16
    assert outputs(fast, images.bfloat16())[1].dtype == expected.dtype


def test_frozen_codes_are_kept_until_the_model_is_trained_or_moved(tiny_model):
    codebook = tiny_model.quantize.global_codebook
    before = codebook.codes()
    optimize_for_inference(tiny_model, **FLOAT32)
    assert torch.equal(codebook.codes(), before)
    assert codebook.codes() is codebook.codes()
    assert copy.deepcopy(codebook)._frozen is None
    codebook.weight.data.mul_(2)
    assert torch.equal(codebook.codes(), before)
    codebook.to(torch.float32)
    changed = codebook.codes()
    assert not torch.equal(changed, before)
    codebook.freeze()
    assert not torch.equal(codebook.train().codes(), before)
    assert codebook._frozen is None


def test_the_type_is_measured_once():
    assert fastest_dtype("cpu") in (torch.float32, torch.bfloat16)
    assert fastest_dtype.cache_info().currsize == 1
    fastest_dtype("cpu")
    assert fastest_dtype.cache_info().misses == 1


def test_another_dtype_is_refused_before_anything_changes(tiny_model):
    with pytest.raises(ValueError, match=r"`dtype` must be .* got torch.float16"):
        optimize_for_inference(tiny_model, dtype=torch.float16)
    assert not any(isinstance(module, InferenceResnetBlock) for module in tiny_model.modules())
