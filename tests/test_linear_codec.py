"""The linear codec that every quality table holds beside the model."""

import pytest
import torch

from dualcodebook_hf.backbone import pad_to_multiple
from dualcodebook_hf.evaluation.linear_codec import PatchLinearCodec, kmeans
from dualcodebook_hf.metrics.images import psnr


def drawn_images(count=12, height=64, width=64):
    """Smooth random colour fields with an edge, (3, H, W) in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        field = torch.rand(1, 3, 5, 5, generator=generator) * 2 - 1
        image = torch.nn.functional.interpolate(field, size=(height, width), mode="bicubic")[0].clamp(-1, 1)
        row, column = torch.randint(0, height, (2,), generator=generator).tolist()
        image[:, row:, column % width :] *= -1
        yield image


@pytest.fixture(scope="module")
def codec():
    return PatchLinearCodec((16, 16), components=12, patch_size=8).fit(drawn_images())


def mean_psnr(codec):
    x = torch.stack(list(drawn_images()))
    return psnr((codec.autoencode(x).sample + 1) / 2, (x + 1) / 2).mean().item()


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (13, 30), (64, 3)])
def test_any_size_goes_through_tokens_and_comes_back(codec, size):
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = codec.tokenize(x)
    assert tokens.shape == (2, 2, -(-size[0] // 8), -(-size[1] // 8)) and tokens.dtype == torch.int64
    assert codec.detokenize(tokens, size).shape == x.shape
    assert codec.detokenize(tokens).shape == pad_to_multiple(x, 8).shape
    torch.testing.assert_close(codec.detokenize(tokens, size), codec.autoencode(x).sample)


def test_all_components_without_quantization_give_the_image_back():
    """The projection is orthonormal and patches return to their places."""
    codec = PatchLinearCodec((4,), components=48, patch_size=4).fit(drawn_images(4))
    x = torch.rand(2, 3, 9, 14, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(codec.decode(codec.encode(x), (9, 14)), x, atol=1e-4, rtol=0)


def test_components_are_orthonormal_and_sorted_by_variance(codec):
    torch.testing.assert_close(codec.basis @ codec.basis.T, torch.eye(12), atol=1e-5, rtol=0)
    latents = codec.encode(torch.stack(list(drawn_images())))
    variances = latents.var(dim=(0, 2, 3), correction=0)
    assert (variances.diff() <= 1e-6).all()


def test_tokens_are_the_nearest_codes_stage_by_stage(codec):
    out = codec.autoencode(torch.stack(list(drawn_images(2))))
    residual = out.latents.movedim(1, -1)
    for stage, codes in enumerate((codec.codes_0, codec.codes_1)):
        nearest = torch.cdist(residual.flatten(0, 2), codes).argmin(1).view(residual.shape[:3])
        assert torch.equal(out.tokens[:, stage], nearest)
        residual = residual - codes[nearest]
    torch.testing.assert_close(out.quantized.movedim(1, -1), out.latents.movedim(1, -1) - residual)


def test_more_codes_and_a_second_stage_lose_less():
    few, many, two_stages = (
        PatchLinearCodec(sizes, components=12, patch_size=8).fit(drawn_images()) for sizes in ((4,), (16,), (16, 16))
    )
    assert mean_psnr(few) < mean_psnr(many) < mean_psnr(two_stages)


def test_fitting_is_deterministic_and_the_seed_matters(codec):
    again = PatchLinearCodec((16, 16), components=12, patch_size=8).fit(drawn_images())
    other = PatchLinearCodec((16, 16), components=12, patch_size=8).fit(drawn_images(), seed=1)
    for name, tensor in codec.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(codec.codes_0, other.codes_0)


def test_a_saved_codec_is_the_same_codec(codec, tmp_path):
    codec.save(tmp_path / "codec.safetensors")
    loaded = PatchLinearCodec.load(tmp_path / "codec.safetensors")
    assert loaded.codebook_sizes == codec.codebook_sizes and loaded.patch_size == 8
    x = torch.stack(list(drawn_images(2)))
    assert torch.equal(loaded.tokenize(x), codec.tokenize(x))
    assert torch.equal(loaded.autoencode(x).sample, codec.autoencode(x).sample)


def test_another_safetensors_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"mean": torch.zeros(3)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match=r"written by PatchLinearCodec\.save"):
        PatchLinearCodec.load(tmp_path / "other.safetensors")


def test_bits_a_position_are_those_of_the_sizes():
    codec = PatchLinearCodec()
    assert codec.bits_per_position == 18
    assert codec.codebook_sizes == {"stage_1": 512, "stage_2": 512}


def test_at_most_so_many_patches_of_a_image_are_used():
    """4 images of 64 patches, 3 of each: too few for 16 codes."""
    with pytest.raises(ValueError, match="at least 16 patches, got 12"):
        PatchLinearCodec((16,), components=4, patch_size=8).fit(drawn_images(4), patches_per_image=3)


@pytest.mark.parametrize(
    "arguments, message",
    [({"sizes": ()}, "`sizes`"), ({"sizes": (0, 4)}, "`sizes`"), ({"components": 769}, "`components`")],
)
def test_impossible_shapes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PatchLinearCodec(**arguments)


def test_wrong_pixels_and_tokens_are_refused(codec):
    with pytest.raises(ValueError, match="`x`"):
        codec.tokenize(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="`tokens`"):
        codec.detokenize(torch.zeros(1, 3, 2, 2, dtype=torch.long))


def test_kmeans_finds_clusters_that_lie_apart():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    points = (centres[:, None] + 0.1 * torch.randn(4, 50, 2, generator=generator)).flatten(0, 1)
    found = kmeans(points, 4, generator)
    means = points.view(4, 50, 2).mean(1)
    torch.testing.assert_close(found[torch.cdist(means, found).argmin(1)], means, atol=1e-4, rtol=0)


def test_kmeans_leaves_no_centre_without_points():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(300, 2, generator=generator).exp()
    found = kmeans(points, 64, generator)
    assert len(torch.cdist(points, found).argmin(1).unique()) == 64


def test_kmeans_needs_a_point_for_each_centre():
    with pytest.raises(ValueError, match="at least 5"):
        kmeans(torch.zeros(4, 2), 5, torch.Generator())
