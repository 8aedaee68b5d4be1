import copy

import pytest
import torch
from conftest import TINY, spread_codes
from diffusers import AutoencoderDC, VQModel

from dualcodebook_hf import DualCodebookVQModel
from dualcodebook_hf.backbone import pad_to_multiple

DCAE = {
    **TINY,
    "backbone": "dcae",
    "block_out_channels": [8, 16, 16],
    "layers_per_level": [0, 1, 1],
    "linear_shortcut": True,
}


OWN_DECODER = {
    **DCAE,
    "decoder_block_out_channels": [8, 32, 16],
    "decoder_layers_per_level": [1, 2, 1],
    "overlapping_shortcut": True,
}


@pytest.fixture(params=[TINY, DCAE, OWN_DECODER], ids=["vqgan", "dcae", "own decoder"])
def model(request):
    torch.manual_seed(0)
    return spread_codes(DualCodebookVQModel(**request.param)).eval()


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 2), (16, 16), (13, 18)])
def test_any_size_comes_back_and_tokens_are_enough(model, size):
    x = torch.rand(2, 3, *size) * 2 - 1
    with torch.no_grad():
        out = model(x)
    f = model.downsample_factor
    assert out.sample.shape == x.shape
    assert out.tokens.shape == (2, 2, -(-size[0] // f), -(-size[1] // f))
    tokens = model.tokenize(x)
    assert torch.equal(tokens, out.tokens)
    torch.testing.assert_close(model.detokenize(tokens, size=size), out.sample)
    assert torch.equal(model.detokenize(tokens)[..., : size[0], : size[1]], model.detokenize(tokens, size=size))


def test_vqmodels_encode_and_decode(model, images):
    with torch.no_grad():
        z = model.encode(images).latents
        out = model(images)
        assert torch.equal(z, out.latents)
        height, width = images.shape[-2:]
        torch.testing.assert_close(model.decode(z).sample[..., :height, :width], out.sample)
        torch.testing.assert_close(
            model.decode(out.quantized, force_not_quantize=True).sample[..., :height, :width], out.sample
        )
        ids = model.quantize(z)[2][2]
        b, c, h, w = z.shape
        from_ids = model.decode(ids, force_not_quantize=True, shape=(b, h, w, c)).sample
        torch.testing.assert_close(from_ids[..., :height, :width], out.sample)
        torch.testing.assert_close(model.decode(ids.view(b, h, w)).sample, from_ids)
        assert model.decode(z, return_dict=False)[1] == model.quantize(z)[1]
        assert model.encode(images, return_dict=False)[0].equal(z)


def test_the_tuple_is_the_dict(model, images):
    with torch.no_grad():
        out, tup = model(images), model(images, return_dict=False)
    assert torch.equal(out.sample, tup[0])
    assert torch.equal(out.tokens, tup[1])
    assert out.losses == tup[2]


def test_slices_give_the_same(model, images):
    whole = model.detokenize(model.tokenize(images))
    model.enable_slicing()
    torch.testing.assert_close(model.detokenize(model.tokenize(images)), whole)


def test_save_and_load_is_equal_bit_for_bit(model, images, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = DualCodebookVQModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    with torch.no_grad():
        assert torch.equal(loaded(images).sample, model(images).sample)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_low_precision_keeps_the_codebooks(model, images, tmp_path, dtype):
    model.save_pretrained(tmp_path)
    low = DualCodebookVQModel.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in low.encoder.parameters()} == {dtype}
    for codebook, same in zip(low.quantize.codebooks.values(), model.quantize.codebooks.values(), strict=True):
        assert torch.equal(codebook.codes(), same.codes())
    z = low.encode(images.to(dtype)).latents
    assert z.dtype == dtype
    assert torch.equal(low.quantize(z)[2][2], model.quantize(z.float())[2][2])
    assert low.detokenize(low.tokenize(images.to(dtype))).dtype == dtype


def test_codes_rounded_by_to_are_searched_in_float32(model):
    z = torch.randn(2, 12, 4, 4)
    low = copy.deepcopy(model).to(torch.bfloat16)
    codes = [codebook.codes() for codebook in low.quantize.codebooks.values()]
    for index, (part, table) in enumerate(zip(z.split([8, 4], 1), codes, strict=True)):
        distances = (part.movedim(1, -1)[..., None, :] - table).double().square().sum(-1)
        assert torch.equal(low.quantize.quantize_latents(z).tokens[:, index], distances.argmin(-1))


def test_autocast_gives_the_tokens_of_its_own_latents(model, images):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(images)
    assert torch.equal(out.tokens, model.quantize.quantize_latents(out.latents.float()).tokens)


def test_compiled_model_equals_eager(model, images):
    with torch.no_grad():
        expected = model(images)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(images)
    assert torch.equal(compiled.tokens, expected.tokens)
    torch.testing.assert_close(compiled.sample, expected.sample)


def test_the_vqgan_backbone_is_diffusers_vqmodels(images):
    ours = DualCodebookVQModel(**{**TINY, "attention": True}).eval()
    theirs = VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        layers_per_block=1,
        latent_channels=12,
        norm_num_groups=4,
    ).eval()
    state = {name: value for name, value in ours.state_dict().items() if not name.startswith("quantize")}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == ["quantize.embedding.weight"]
    x = images[..., :12, :18]
    with torch.no_grad():
        assert torch.equal(theirs.encode(x).latents, ours.encode(x).latents)


def test_the_dcae_backbone_is_diffusers_autoencoderdc(images):
    ours = DualCodebookVQModel(**{**DCAE, "linear_shortcut": False, "layers_per_level": [1, 1, 1]}).eval()
    theirs = AutoencoderDC(
        latent_channels=12,
        encoder_block_out_channels=(8, 16, 16),
        decoder_block_out_channels=(8, 16, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((),) * 3,
        decoder_qkv_multiscales=((),) * 3,
        encoder_out_shortcut=False,
        decoder_in_shortcut=False,
    ).eval()
    theirs.encoder.load_state_dict(ours.encoder.state_dict())
    theirs.decoder.load_state_dict(ours.decoder.state_dict())
    x = images[..., :12, :16]
    with torch.no_grad():
        assert torch.equal(theirs.encoder(x), ours.encoder(x))
        assert torch.equal(theirs.decoder(theirs.encoder(x)), ours.decoder(ours.encoder(x)))


@pytest.mark.parametrize(
    ("tensor", "expected", "got"),
    [
        (torch.zeros(3, 8, 8), r"shape \(B, 3, H, W\)", r"\(3, 8, 8\)"),
        (torch.zeros(1, 4, 8, 8), r"shape \(B, 3, H, W\)", r"\(1, 4, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "floating point", "uint8"),
        (torch.full((1, 3, 8, 8), 255.0), r"lie in \[-1, 1\]", r"\[255, 255\]"),
        (torch.full((1, 3, 8, 8), float("nan")), r"lie in \[-1, 1\]", "nan"),
    ],
)
def test_wrong_pixels_are_named(tiny_model, tensor, expected, got):
    with pytest.raises(ValueError, match=f"`pixel_values` must .*{expected}.*got.*{got}"):
        tiny_model.tokenize(tensor)


@pytest.mark.parametrize(
    ("tokens", "keywords", "message"),
    [
        (torch.zeros(1, 2, 3, 3), {}, "`tokens` must be integers, got torch.float32"),
        (torch.zeros(2, 3, 3).long(), {}, r"`tokens` must be of shape \(B, 2, h, w\), got \(2, 3, 3\)"),
        (torch.full((1, 2, 3, 3), 16), {}, r"`tokens` of the local codebook must lie in \[0, 16\), got \[16, 16\]"),
        (torch.full((1, 2, 3, 3), -1), {}, r"`tokens` of the global codebook must lie in \[0, 32\), got \[-1, -1\]"),
        (torch.zeros(1, 2, 3, 3).long(), {"size": (9, 6)}, r"`size` must be .*grid \(3, 3\), got \(9, 6\)"),
        (torch.zeros(1, 2, 3, 3).long(), {"size": 6}, "`size` must be .* got 6"),
        (torch.zeros(1, 2, 3, 3).long(), {"only": "both"}, "`only` must be one of global, local or None, got 'both'"),
    ],
)
def test_wrong_tokens_are_named(tiny_model, tokens, keywords, message):
    with pytest.raises(ValueError, match=message):
        tiny_model.detokenize(tokens, **keywords)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32])
def test_any_integer_type_of_tokens_decodes(tiny_model, images, dtype):
    tokens = tiny_model.tokenize(images)
    assert torch.equal(tiny_model.detokenize(tokens.to(dtype)), tiny_model.detokenize(tokens))


def test_padding_reflects_again_and_again_and_repeats_a_single_pixel():
    row = torch.tensor([[0.0, 1.0, 2.0]])
    assert pad_to_multiple(row, 8)[0].tolist() == [0, 1, 2, 1, 0, 1, 2, 1]
    assert pad_to_multiple(torch.tensor([[5.0]]), 4).tolist() == [[5.0] * 4] * 4
    x = torch.randn(2, 3, 16, 20)
    padded = pad_to_multiple(x, 16)
    assert torch.equal(padded, torch.nn.functional.pad(x, (0, 12, 0, 0), mode="reflect"))


def test_layerwise_casting_stores_in_float8_and_computes_in_float32(model, images):
    with torch.no_grad():
        expected = model(images)
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        out = model(images)
    assert out.sample.dtype == torch.float32
    assert (out.sample - expected.sample).square().mean() < 0.2 * expected.sample.square().mean() + 0.1
    codes = [codebook.codes() for codebook in model.quantize.codebooks.values()]
    assert all(code.dtype == torch.float32 for code in codes)


def test_a_decoder_has_its_own_widths_and_layers():
    decoder = DualCodebookVQModel(**OWN_DECODER).decoder
    levels = [[block.norm.weight.numel() for block in level if hasattr(block, "norm")] for level in decoder.up_blocks]
    assert levels == [[8], [32, 32], [16]]
    widths = {**TINY, "decoder_block_out_channels": [2 * width for width in TINY["block_out_channels"]]}
    model = DualCodebookVQModel(**widths)
    assert model.decoder.conv_norm_out.num_channels == 2 * model.encoder.down_blocks[0].resnets[0].out_channels


def test_patches_of_the_shortcut_overlap_by_half():
    model = DualCodebookVQModel(**OWN_DECODER)
    f = model.downsample_factor
    latents = torch.zeros(1, model.config.vq_embed_dim, 3, 3)
    latents[:, :, 1, 1] = 1
    patch = model.linear_decoder(latents) - model.linear_decoder.bias[:, None, None]
    rows = patch.abs().sum((0, 1, 3)).nonzero().flatten()
    assert patch.shape[-2:] == (3 * f, 3 * f)
    assert (rows.min().item(), rows.max().item()) == (f // 2, 3 * f - f // 2 - 1)


@torch.no_grad()
def test_a_grown_decoder_computes_the_same_images(images):
    from benchmarks.grow_decoder import grow

    torch.manual_seed(0)
    model = spread_codes(DualCodebookVQModel(**DCAE)).eval()
    for parameter in model.decoder.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    grown = grow(model, [8, 32, 32], [0, 2, 3], overlapping=True)
    assert grown.num_parameters() > model.num_parameters()
    assert torch.equal(grown.tokenize(images), model.tokenize(images))
    torch.testing.assert_close(grown(images).sample, model(images).sample, rtol=1e-3, atol=1e-4)
    with torch.enable_grad():
        optimizer = torch.optim.SGD(grown.parameters(), lr=0.01)
        for _ in range(2):  # what is new is behind zeros: these move first
            grown(images).sample.square().mean().backward()
            optimizer.step()
    new = grown.decoder.up_blocks[1][1]
    assert all(row.abs().sum() > 0 for row in new.conv2.weight.grad[16:])
