import pytest
import torch
from conftest import TINY

from dualcodebook_hf import DualCodebookVQModel
from dualcodebook_hf.clustering import principal_components
from dualcodebook_hf.training.initialization import _starting_codes, initialize_from_images

MODEL = {
    **TINY,
    "backbone": "dcae",
    "block_out_channels": [8, 16, 16],
    "linear_shortcut": True,
    "global_transformer_layers": 0,
    "global_dim": 6,
    "local_dim": 10,
}


def smooth_images():
    """Low-frequency noise: a few principal components carry nearly everything."""
    coarse = torch.rand(12, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=32, mode="bilinear", align_corners=True)


def test_principal_components_are_those_of_the_svd():
    vectors = torch.randn(200, 6) * torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.1])
    components, variances = principal_components(torch.cov(vectors.T), 3)
    _, scales, directions = torch.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    torch.testing.assert_close(variances, scales[:3] ** 2 / 199, rtol=1e-4, atol=0)
    torch.testing.assert_close((components @ directions[:3].T).abs(), torch.eye(3), rtol=0, atol=1e-3)


def test_the_model_starts_as_a_linear_codec():
    """Without quantization the start is the projection on the components that it carries."""
    torch.manual_seed(0)
    model = DualCodebookVQModel(**MODEL).eval()
    images = smooth_images()
    initialize_from_images(model, images)
    with torch.no_grad():
        z = model.encode(images).latents
        linear = model.decode(z, force_not_quantize=True).sample
        patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3)
        kernels = model.linear_encoder.weight.flatten(1)
        carried = kernels[kernels.norm(dim=1) > 0]
        torch.testing.assert_close(carried @ carried.T, torch.eye(len(carried)), rtol=0, atol=1e-4)
        projected = patches @ carried.T @ carried
        expected = projected.unflatten(3, (3, 4, 4)).permute(0, 3, 1, 4, 2, 5).reshape(images.shape)
        torch.testing.assert_close(linear, expected, rtol=0, atol=1e-4)
        assert (linear - images).square().mean() < 1e-3
        quantized = model(images).sample
    assert (quantized - images).square().mean() < 0.5 * images.var()


def test_the_strongest_components_go_to_the_first_codebook():
    model = DualCodebookVQModel(**MODEL)
    images = smooth_images()
    initialize_from_images(model, images)
    with torch.no_grad():
        variances = model.linear_encoder(images).var(dim=(0, 2, 3))
    used_global, used_local = (part[part > 1e-9] for part in variances.split([6, 10]))
    assert 0 < len(used_global) < 6
    assert used_global.min() >= used_local.max()


def test_the_codebooks_survive_the_first_batch_of_training():
    torch.manual_seed(0)
    model = DualCodebookVQModel(**{**MODEL, "global_update": "ema", "local_update": "ema"})
    images = smooth_images()
    initialize_from_images(model, images)
    errors = []
    for _ in range(3):
        errors.append((model.eval()(images).sample - images).square().mean().item())
        model.train()(images)
    assert max(errors) <= 1.05 * errors[0]


def test_the_same_images_and_seed_give_the_same_start():
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        model = DualCodebookVQModel(**MODEL)
        torch.rand(len(states) + 1)
        initialize_from_images(model, smooth_images(), seed=3)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_codebook_of_more_codes_than_patches_starts_as_the_product_of_two():
    """768 patches, 1,024 codes: quantized jointly or half by half, the vectors land on the same codes."""
    torch.manual_seed(0)
    single = {"quantizer": "single", "global_codebook_size": 0, "global_dim": 0, "local_update": "ema"}
    model = DualCodebookVQModel(**{**MODEL, **single, "local_codebook_size": 1024, "local_dim": 16})
    images = smooth_images()
    initialize_from_images(model, images)
    codebook = model.quantize.codebooks["codebook"]
    codes = codebook.weight
    with torch.no_grad():
        vectors = model.linear_encoder(images).permute(0, 2, 3, 1).flatten(0, 2)
    split = int((codes[:32] == codes[0]).all(0).sum())
    assert 0 < split < 16
    halves = ((vectors[:, :split], codes[::32, :split]), (vectors[:, split:], codes[:32, split:]))
    first, second = (torch.cdist(part, centres).argmin(1) for part, centres in halves)
    joint = torch.cdist(vectors, codes).argmin(1)
    assert (joint == first * 32 + second).float().mean() > 0.99  # the rest are ties in float32
    assert len(codes.unique(dim=0)) == 1024
    drawn = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[:32]
    for part, centres in halves:  # the centres are k-means', not any patches
        errors = [torch.cdist(part, points).min(1).values.square().sum() for points in (centres, part[drawn])]
        assert errors[0] < 0.8 * errors[1]
    shares = torch.bincount(joint, minlength=1024) / len(vectors)
    floor = 2 * codebook.revival_threshold / 1024
    torch.testing.assert_close(codebook.cluster_size.data, shares.clamp_min(floor), rtol=0, atol=2 / len(vectors))


@pytest.mark.parametrize(
    ("size", "deviations", "parts"),
    [(64, [1, 1, 1, 1], (8, 2)), (64, [16, 1, 1, 1], (8, 1)), (48, [4, 4, 1, 1], (6, 1))],
)
def test_the_two_codebooks_of_a_product_have_half_of_the_bits_each(size, deviations, parts):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(40, 4, generator=generator) * torch.tensor(deviations)
    codes = _starting_codes(vectors, size, generator)
    count, dims = parts
    assert codes.shape == (size, 4)
    assert len(codes[:, :dims].unique(dim=0)) == count
    assert len(codes[:, dims:].unique(dim=0)) == size // count
