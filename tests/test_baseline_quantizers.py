"""The baselines of other papers through vector-quantize-pytorch: same contract as our own quantizers."""

import copy
import math
import sys

import numpy as np
import pytest
import torch
from conftest import TINY
from transformers import AutoModel

from dualcodebook_hf import DualCodebookConfig, DualCodebookVQModel
from dualcodebook_hf.metrics.tokens import QuantizationError
from dualcodebook_hf.quantizers import build_quantizer

pytest.importorskip("vector_quantize_pytorch")

BASELINES = {
    "residual": {"quantizer": "residual", "global_codebook_size": 32, "local_codebook_size": 16},
    "fsq": {"quantizer": "fsq", "fsq_levels": [8, 5, 3, 4], "global_dim": 2, "local_dim": 2}
    | {"global_codebook_size": 40, "local_codebook_size": 12},
    "lfq": {"quantizer": "lfq", "global_dim": 5, "local_dim": 3, "global_codebook_size": 32, "local_codebook_size": 8},
}
by_name = pytest.mark.parametrize("name", list(BASELINES))


def build(name, **changes):
    torch.manual_seed(0)
    return build_quantizer(DualCodebookConfig(**{**TINY, **BASELINES[name], **changes}))


def latents(quantizer, batch=4):
    return torch.randn(batch, sum(quantizer.dims), 6, 5, generator=torch.Generator().manual_seed(1))


def trained(name):
    """In eval mode, after three batches: residual codebooks are where the latents are."""
    quantizer = build(name).train()
    for _ in range(3):
        quantizer.quantize_latents(latents(quantizer))
    return quantizer.eval()


@by_name
def test_tokens_give_exactly_the_codes_of_the_forward_pass(name):
    quantizer = trained(name)
    z = latents(quantizer)
    out = quantizer.quantize_latents(z)
    assert out.tokens.shape == (4, 2, 6, 5)
    assert out.tokens.dtype == torch.int64
    assert torch.equal(quantizer.lookup(out.tokens), out.quantized)
    sizes = [codebook.size for codebook in quantizer.codebooks.values()]
    assert sizes == quantizer.sizes == [out.codes().shape[0] for out in quantizer.codebooks.values()]
    assert quantizer.bits_per_position == pytest.approx(math.log2(math.prod(sizes)))
    ids = quantizer(z)[2][2]
    assert torch.equal(quantizer.from_product_ids(quantizer.to_product_ids(out.tokens)), out.tokens)
    assert torch.equal(quantizer.get_codebook_entry(ids, (4, 6, 5, z.shape[1])), out.quantized)


@by_name
def test_the_library_agrees(name):
    """Ids, values, losses and gradients are those of the library's own module, called directly."""
    import vector_quantize_pytorch as library

    quantizer = build(name).train()
    z = latents(quantizer).requires_grad_()
    flat = z.detach().movedim(1, -1).reshape(1, -1, z.shape[1])
    upstream = torch.randn(4, z.shape[1], 6, 5, generator=torch.Generator().manual_seed(2))
    if name == "residual":
        theirs = copy.deepcopy(quantizer.stages.residual)
        torch.manual_seed(5)
        values, ids, losses = theirs(flat)
    else:
        widths = quantizer.dims
        codebooks = [library.FSQ([8, 5]), library.FSQ([3, 4])]
        if name == "lfq":
            codebooks = [library.LFQ(codebook_size=size, commitment_loss_weight=0.25) for size in (32, 8)]
        flat.requires_grad_()
        parts = [codebook(part) for codebook, part in zip(codebooks, flat.split(widths, dim=-1), strict=True)]
        values, ids = (torch.cat([part[0] for part in parts], -1), torch.stack([part[1] for part in parts], -1))
        losses = torch.stack([part[2] for part in parts]) if name == "lfq" else torch.zeros(2)
        values.backward(upstream.movedim(1, -1).reshape(values.shape))
    torch.manual_seed(5)
    out = quantizer.quantize_latents(z)
    assert torch.equal(out.tokens.movedim(1, -1).reshape(-1, 2), ids[0].long())
    torch.testing.assert_close(out.quantized.movedim(1, -1).reshape(values.shape), values, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.stack(list(out.losses.values())), losses.flatten().detach(), atol=1e-6, rtol=1e-5)
    out.quantized.backward(upstream)
    expected = upstream if name == "residual" else flat.grad.view(4, 6, 5, -1).movedim(-1, 1)
    torch.testing.assert_close(z.grad, expected)


def test_fsq_rounds_each_channel_and_lfq_takes_signs():
    quantizer = build("fsq")
    z = torch.tensor([[-9.0, 9.0, -9.0, 9.0], [9.0, 0.0, 9.0, -9.0]]).view(2, 4, 1, 1)
    values = quantizer.quantize_latents(z).quantized.flatten(1)
    # an even number L of levels reaches from -1 to (L/2 - 1) / (L/2), an odd one from -1 to 1
    torch.testing.assert_close(values, torch.tensor([[-1.0, 1.0, -1.0, 0.5], [0.75, 0.0, 1.0, -1.0]]))
    quantizer = build("lfq").eval()
    z = latents(quantizer)
    assert torch.equal(quantizer.quantize_latents(z).quantized, torch.where(z > 0, 1.0, -1.0))


def test_residual_stages_by_brute_force():
    quantizer = trained("residual")
    z = latents(quantizer)
    tokens = quantizer.quantize_latents(z).tokens
    first, second = (codebook.codes().numpy() for codebook in quantizer.codebooks.values())
    for position in np.ndindex(4, 6, 5):
        vector = z[position[0], :, position[1], position[2]].numpy()
        coarse = ((first - vector) ** 2).sum(1).argmin()
        fine = ((second - (vector - first[coarse])) ** 2).sum(1).argmin()
        assert tokens[position[0], :, position[1], position[2]].tolist() == [coarse, fine]
    half = quantizer.lookup(tokens, only="first")
    expected = torch.from_numpy(first)[tokens[:, 0]].movedim(-1, 1) + torch.from_numpy(second).mean(0)[:, None, None]
    torch.testing.assert_close(half, expected)


def test_residual_codebooks_learn_where_the_latents_are():
    quantizer = build("residual").train()
    error = []
    for _ in range(6):
        z = latents(quantizer, batch=16)
        out = quantizer.quantize_latents(z)
        measure = QuantizationError(quantizer.slices)
        measure.update(z, out.quantized)
        error.append(measure.compute()["all"])
    assert error[-1] < 0.8
    assert len(out.tokens[:, 0].unique()) == 32


@by_name
def test_both_faces_load_what_one_saved(name, tmp_path):
    torch.manual_seed(0)
    model = DualCodebookVQModel(**{**TINY, **BASELINES[name]}).train()
    x = torch.rand(3, 3, 13, 18, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model(x)
    model.eval().save_pretrained(tmp_path)
    tokens = model.tokenize(x)
    pixels = model.detokenize(tokens, size=(13, 18))
    assert torch.equal(model(x).sample, pixels)
    for loaded in (DualCodebookVQModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert torch.equal(loaded.tokenize(x), tokens)
        assert torch.equal(loaded.detokenize(tokens, size=(13, 18)), pixels)
        losses = loaded.train().autoencode(x).losses
        assert all(torch.isfinite(loss) and loss.abs() < 10 for loss in losses.values())


@by_name
def test_low_precision_latents_get_the_ids_of_their_float32_values(name):
    quantizer = trained(name)
    z = latents(quantizer).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = quantizer.quantize_latents(z)
    assert torch.equal(out.tokens, quantizer.quantize_latents(z.float()).tokens)
    assert out.quantized.dtype == torch.bfloat16


@by_name
def test_a_missing_library_is_named_with_its_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    with pytest.raises(ValueError, match=r"vector-quantize-pytorch: pip install .*'\.\[benchmarks\]'"):
        build(name)


def test_the_rest_of_the_model_starts_with_the_same_weights_under_every_quantizer():
    def weights(**changes):
        torch.manual_seed(3)
        state = DualCodebookVQModel(**{**TINY, **changes}).state_dict()
        return {key: value for key, value in state.items() if not key.startswith("quantize.")}

    dual = weights()
    plain = {"global_transformer_layers": 0, "global_update": "ema"}
    for changes in (BASELINES["residual"], plain, {"local_update": "linear"}, {"local_codebook_size": 64}):
        other = weights(**changes)
        assert all(torch.equal(value, other[key]) for key, value in dual.items())
    narrow = weights(**BASELINES["fsq"])
    same = [key for key in dual if key.startswith("encoder.") and not key.startswith("encoder.conv_out")]
    assert all(torch.equal(dual[key], narrow[key]) for key in same)
