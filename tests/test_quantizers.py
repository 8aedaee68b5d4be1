import numpy as np
import pytest
import torch

from dualcodebook_hf.configuration_dualcodebook import DualCodebookConfig
from dualcodebook_hf.quantizers import build_quantizer


def build(tiny_config, **changes):
    torch.manual_seed(0)
    quantizer = build_quantizer(DualCodebookConfig(**{**tiny_config, **changes}))
    for codebook in quantizer.codebooks.values():
        torch.nn.init.normal_(codebook.weight)
    return quantizer.eval()


@pytest.fixture
def quantizer(tiny_config):
    return build(tiny_config)


@pytest.fixture
def z():
    return torch.randn(2, 12, 3, 5, generator=torch.Generator().manual_seed(3))


def test_each_half_takes_its_own_nearest_code(quantizer, z):
    out = quantizer.quantize_latents(z)
    for codebook, part, tokens in zip(
        quantizer.codebooks.values(), z.split([8, 4], 1), out.tokens.unbind(1), strict=True
    ):
        codes = codebook.codes().detach().numpy()
        for position in np.ndindex(2, 3, 5):
            vector = part[position[0], :, position[1], position[2]].numpy()
            assert tokens[position] == ((codes - vector) ** 2).sum(1).argmin()
    assert torch.equal(quantizer.lookup(out.tokens), out.quantized)


def test_losses_by_the_papers_formula(quantizer, z):
    losses = quantizer.quantize_latents(z).losses
    quantized = quantizer.quantize_latents(z).quantized
    for name, part in (("global", slice(0, 8)), ("local", slice(8, 12))):
        error = np.mean((z[:, part].numpy() - quantized[:, part].numpy()) ** 2)
        np.testing.assert_allclose(losses[f"{name}_codebook"].item(), 1.25 * error, rtol=1e-5)


def test_beta_weighs_the_term_that_moves_the_latents(quantizer, z):
    """d/dz of 0.25 |z - sg(e)|^2 = 0.5 (z - e) / count; the codebook term gives z nothing and the codes the rest."""
    quantizer.train()
    z.requires_grad_()
    out = quantizer.quantize_latents(z)
    out.losses["local_codebook"].backward()
    error = z[:, 8:] - out.quantized[:, 8:]
    torch.testing.assert_close(z.grad[:, 8:], 0.5 * error.detach() / error.numel())
    codebook = quantizer.local_codebook
    expected = torch.zeros_like(codebook.weight)
    expected.index_add_(
        0, out.tokens[:, 1].flatten(), (-2 * error / error.numel()).movedim(1, -1).reshape(-1, 4).detach()
    )
    torch.testing.assert_close(codebook.weight.grad, expected)


def test_the_straight_through_gradient_is_exactly_one(quantizer, z):
    z.requires_grad_()
    upstream = torch.randn(2, 12, 3, 5)
    quantizer.quantize_latents(z).quantized.backward(upstream)
    assert torch.equal(z.grad, upstream)


def test_an_ema_codebook_has_the_commitment_term_alone(tiny_config, z):
    quantizer = build(tiny_config, local_update="ema")
    out = quantizer.quantize_latents(z)
    error = (z[:, 8:] - out.quantized[:, 8:]).square().mean()
    torch.testing.assert_close(out.losses["local_codebook"], 0.25 * error)


def test_vqmodels_contract(quantizer, z):
    out = quantizer.quantize_latents(z)
    quantized, loss, (perplexity, encodings, ids) = quantizer(z)
    assert torch.equal(quantized, out.quantized)
    torch.testing.assert_close(loss, out.losses["global_codebook"] + out.losses["local_codebook"])
    assert perplexity is None
    assert encodings is None
    assert ids.shape == (2 * 3 * 5,)
    assert ids.dtype == torch.int64
    assert torch.equal(ids.view(2, 3, 5), out.tokens[:, 0] * 16 + out.tokens[:, 1])
    assert torch.equal(quantizer.get_codebook_entry(ids, (2, 3, 5, 12)), out.quantized)


def test_product_ids_split_and_join(quantizer):
    ids = torch.arange(32 * 16).view(2, 16, 16)
    tokens = quantizer.from_product_ids(ids)
    assert torch.equal(quantizer.to_product_ids(tokens), ids)
    assert tokens[:, 0].max() == 31
    assert tokens[:, 1].max() == 15


@pytest.mark.parametrize("wrong", [-1, 512])
def test_a_product_id_out_of_range_is_an_error(quantizer, wrong):
    with pytest.raises(IndexError):
        quantizer.get_codebook_entry(torch.full((1, 2, 2), wrong), (1, 2, 2, 12))


def test_only_one_codebook_leaves_the_mean_of_the_other(quantizer, z):
    tokens = quantizer.quantize_latents(z).tokens
    half = quantizer.lookup(tokens, only="global")
    assert torch.equal(half[:, :8], quantizer.lookup(tokens)[:, :8])
    mean = quantizer.local_codebook.codes().mean(0)
    torch.testing.assert_close(half[:, 8:], mean[None, :, None, None].expand(2, 4, 3, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_latents_get_the_ids_of_their_float32_values(quantizer, z, dtype):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = quantizer.quantize_latents(z.to(dtype))
    assert torch.equal(out.tokens, quantizer.quantize_latents(z.to(dtype).float()).tokens)
    assert out.quantized.dtype == dtype
    assert all(loss.dtype == torch.float32 for loss in out.losses.values())


def test_the_single_codebook_is_a_configuration(tiny_config, z):
    quantizer = build(
        tiny_config, quantizer="single", global_codebook_size=0, global_dim=0, local_dim=12, local_codebook_size=64
    )
    out = quantizer.quantize_latents(z)
    assert out.tokens.shape == (2, 1, 3, 5)
    assert list(out.losses) == ["codebook"]
    assert quantizer.bits_per_position == 6
    assert torch.equal(quantizer(z)[2][2].view(2, 3, 5), out.tokens[:, 0])


def test_linear_codes_are_a_fixed_table_times_a_learned_matrix(tiny_config, z):
    """SimVQ: a gradient to any one used code moves all codes of its codebook, and only the matrix learns."""
    plain = {"global_transformer_layers": 0, "global_update": "linear", "local_update": "linear"}
    quantizer = build(tiny_config, **plain).train()
    codebook = quantizer.local_codebook
    expected = codebook.weight.detach().numpy() @ codebook.projection.weight.detach().numpy().T
    np.testing.assert_allclose(codebook.codes().detach().numpy(), expected, atol=1e-6)
    learned = {name for name, parameter in quantizer.named_parameters() if parameter.requires_grad}
    assert learned == {"global_codebook.projection.weight", "local_codebook.projection.weight"}
    out = quantizer.quantize_latents(z)
    error = (z[:, 8:] - out.quantized[:, 8:]).square().mean()
    torch.testing.assert_close(out.losses["local_codebook"], 1.25 * error)
    out.losses["local_codebook"].backward()
    before = codebook.codes().detach()
    with torch.no_grad():
        codebook.projection.weight -= 0.1 * codebook.projection.weight.grad
    assert ((codebook.codes() - before).abs().amax(1) > 0).all()
    moved = quantizer.eval().quantize_latents(z)
    assert torch.equal(quantizer.lookup(moved.tokens), moved.quantized)


def test_a_quantizer_leaves_the_global_generator_where_it_was(tiny_config):
    """And is not drawn from the numbers that the layers after it get."""
    torch.manual_seed(0)
    following = torch.rand(32, 8)
    torch.manual_seed(0)
    plain = {"global_transformer_layers": 0, "global_codebook_size": 32}
    first = build_quantizer(DualCodebookConfig(**{**tiny_config, **plain}))
    assert torch.equal(torch.rand(32, 8), following)
    torch.manual_seed(0)
    same = build_quantizer(DualCodebookConfig(**{**tiny_config, **plain}))
    assert torch.equal(first.global_codebook.weight, same.global_codebook.weight)
    uniform = (first.global_codebook.weight.detach() * 32 + 1) / 2
    assert not torch.allclose(uniform, following, atol=0.05)


@pytest.mark.parametrize("bad", [torch.zeros(2, 11, 3, 5), torch.zeros(12, 3, 5), torch.zeros(2, 12, 3, 5).long()])
def test_wrong_latents_are_named(quantizer, bad):
    with pytest.raises(ValueError, match=r"`z` must be floating point of shape \(B, 12, h, w\), got"):
        quantizer.quantize_latents(bad)
