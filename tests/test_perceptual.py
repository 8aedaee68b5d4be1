"""LPIPS: the network's shape, its formula, its weights, and what it says when they are not available."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from dualcodebook_hf.perceptual.vgg import HEADS_PATH, LPIPS
from dualcodebook_hf.perceptual.weights import MissingWeightsError

CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # torchvision's numbers of VGG16's convolutions


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    torch.manual_seed(0)
    network = LPIPS()
    for head in network.heads:  # trained heads are not negative
        head.weight.abs_()
    return network


@pytest.fixture
def images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.rand(2, 3, 16, 32, generator=generator) * 2 - 1 for _ in range(2))


def heads_file() -> str:
    pytest.importorskip("torchmetrics")
    return str(Path(importlib.util.find_spec("torchmetrics").origin).parent / HEADS_PATH)


def test_it_has_vgg16s_13_convolutions_under_their_usual_names(lpips):
    names = [name for name, _ in lpips.vgg.named_parameters()]
    assert names == [f"features.{number}.{kind}" for number in CONVOLUTIONS for kind in ("weight", "bias")]
    assert sum(parameter.numel() for parameter in lpips.vgg.parameters()) == 14_714_688  # VGG16 less its classifier


def test_the_five_features_are_relus_of_halving_size(lpips, images):
    features = lpips.vgg(images[0])
    shapes = [(64, 16, 32), (128, 8, 16), (256, 4, 8), (512, 2, 4), (512, 1, 2)]
    assert [tuple(feature.shape[1:]) for feature in features] == shapes
    assert all(feature.min() == 0 for feature in features)


def test_it_equals_a_functional_recomputation_from_the_same_weights(lpips, images):
    weights = dict(lpips.vgg.named_parameters())

    def slices(x):
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(
            3, 1, 1
        )
        found = []
        for number in CONVOLUTIONS:
            if number in (5, 10, 17, 24):
                x = F.max_pool2d(x, 2)
            x = F.conv2d(x, weights[f"features.{number}.weight"], weights[f"features.{number}.bias"], padding=1).relu()
            if number in (2, 7, 14, 21, 28):
                found.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
        return found

    expected = torch.zeros(2)
    for first, second, head in zip(*map(slices, images), lpips.heads, strict=True):
        expected += torch.einsum("bchw,c->bhw", (first - second) ** 2, head.weight.flatten()).mean((1, 2))
    torch.testing.assert_close(lpips(*images), expected, rtol=1e-4, atol=1e-6)


def test_it_equals_torchmetrics_lpips(lpips, images):
    pytest.importorskip("torchvision")
    from torchmetrics.functional.image.lpips import _LPIPS

    reference = _LPIPS(pretrained=True, net="vgg", pnet_rand=True)
    theirs = [parameter for name, parameter in reference.net.named_parameters()]
    with torch.no_grad():
        for parameter, own in zip(theirs, lpips.vgg.parameters(), strict=True):
            parameter.copy_(own)
        for number, head in enumerate(lpips.heads):
            getattr(reference, f"lin{number}").model[-1].weight.copy_(head.weight)
    torch.testing.assert_close(lpips(*images), reference(*images).flatten(), rtol=1e-4, atol=1e-6)


def test_equal_images_have_distance_0_and_others_more(lpips, images):
    x, other = images
    assert lpips(x, x).tolist() == [0, 0]
    assert (lpips(x, other) > 0).all()
    assert lpips(x, other).shape == (2,)
    torch.testing.assert_close(lpips(x, other), lpips(other, x))


def test_gradients_reach_the_image_and_no_weight(lpips, images):
    x_hat = images[0].clone().requires_grad_()
    lpips(x_hat, images[1]).mean().backward()
    assert x_hat.grad.isfinite().all()
    assert x_hat.grad.abs().sum() > 0
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in lpips.parameters())


def test_gradients_stay_finite_where_all_features_are_0(lpips):
    dead = LPIPS()
    for parameter in dead.vgg.parameters():
        parameter.zero_()
    x_hat = torch.rand(1, 3, 16, 16).requires_grad_()
    dead(x_hat, torch.rand(1, 3, 16, 16)).mean().backward()
    assert x_hat.grad.isfinite().all()


def test_under_bfloat16_autocast_the_distance_is_float32_and_close(lpips, images):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distance = lpips(*images)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, lpips(*images), rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (3, 16, 32), (2, 1, 16, 32), (2, 3, 8, 32)])
def test_shapes_it_cannot_compare_are_refused(lpips, images, shape):
    with pytest.raises(ValueError, match=r"`x_hat` and `x` must be of one shape \(B, 3, H, W\)"):
        lpips(torch.zeros(shape), images[0] if shape == (2, 3, 32, 32) else torch.zeros(shape))


@pytest.mark.parametrize("form", ["folder", "file"])
def test_weights_load_from_a_local_file_and_heads_from_torchmetrics_wheel(lpips, tmp_path, form):
    heads = torch.load(heads_file(), weights_only=True, map_location="cpu")
    path = tmp_path / "model.safetensors"
    # The real file holds the classifier too.
    save_file({**lpips.vgg.state_dict(), "head.fc.weight": torch.zeros(2, 2)}, path)
    loaded = LPIPS.from_pretrained(tmp_path if form == "folder" else str(path))
    for name, parameter in lpips.vgg.state_dict().items():
        assert torch.equal(loaded.vgg.state_dict()[name], parameter)
    for number, head in enumerate(loaded.heads):
        assert torch.equal(head.weight, heads[f"lin{number}.model.1.weight"])
        assert head.weight.min() >= 0
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_weights_that_are_not_available_are_named(monkeypatch, tmp_path):
    heads_file()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingWeightsError, match=r"'nobody/nothing' is neither a file .*, nor available from the Hub"):
        LPIPS.from_pretrained("nobody/nothing")
    with pytest.raises(MissingWeightsError, match=f"'{tmp_path}' is neither"):
        LPIPS.from_pretrained(tmp_path)


def test_a_file_that_holds_another_network_is_refused(lpips, tmp_path):
    heads_file()
    path = tmp_path / "model.safetensors"
    save_file({"conv.weight": torch.zeros(1)}, path)
    with pytest.raises(MissingWeightsError, match="does not hold VGG16's weights"):
        LPIPS.from_pretrained(path)
    save_file(lpips.vgg.state_dict() | {"features.0.weight": torch.zeros(64, 1, 3, 3)}, path)
    with pytest.raises(
        MissingWeightsError, match=r"features.0.weight must be of shape \(64, 3, 3, 3\), got \(64, 1, 3, 3\)"
    ):
        LPIPS.from_pretrained(path)
    save_file(lpips.vgg.state_dict() | {"features.0.bias": torch.full((64,), torch.inf)}, path)
    with pytest.raises(MissingWeightsError, match=r"is damaged: NaN or infinity in features\.0\.bias"):
        LPIPS.from_pretrained(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(MissingWeightsError, match="does not hold VGG16's weights"):
        LPIPS.from_pretrained(path)
