"""LPIPS (Zhang et al. 2018, version 0.1) on our own 13-convolution VGG16, without torchvision."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from . import LPIPS_SMALLEST_SIDE
from .distances import check_image_pair, unit_length
from .weights import MissingWeightsError, check_finite, weights_file

VGG16 = "timm/vgg16.tv_in1k"
HEADS_PATH = Path("functional", "image", "lpips_models", "vgg.pth")
# VGG16's configuration D, one tuple of widths for each of the five slices that LPIPS compares.
SLICES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# LPIPS' own constants: its images in [-1, 1] to the ImageNet normalisation that VGG16 was trained under.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
NORM_EPSILON = 1e-8


class VGG16Features(nn.Module):
    """The convolutions of VGG16: (B, 3, H, W) -> features after relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3.

    Layer N is called `features.N`, as in timm and torchvision.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.taps: list[int] = []  # where each slice ends
        width = 3
        for number, widths in enumerate(SLICES):
            if number:
                layers.append(nn.MaxPool2d(2))
            for next_width in widths:
                layers += [nn.Conv2d(width, next_width, 3, padding=1), nn.ReLU(inplace=True)]
                width = next_width
            self.taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Five features, (B, 64, H, W) to (B, 512, H/16, W/16)."""
        slices = []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self.taps:
                slices.append(x)
        return slices


class LPIPS(nn.Module):
    """Perceptual distance of images. Frozen: gradients reach the images only.

    Built with random weights; `from_pretrained` gives the real thing. Convolutions run in the surrounding autocast's
    type, everything after them in float32; the parameters themselves must stay float32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.vgg = VGG16Features()
        self.heads = nn.ModuleList(nn.Conv2d(widths[-1], 1, 1, bias=False) for widths in SLICES)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, vgg: str | Path = VGG16) -> LPIPS:
        """VGG16's weights from the Hub and the linear heads that ship inside torchmetrics' wheel.

        Args:
            vgg: Hub id, folder or file of safetensors with timm's names (`features.0.weight`, ...).

        Raises MissingWeightsError when VGG16's weights or the heads are not available.
        """
        heads = _heads_file()
        lpips = cls()
        _load_vgg(lpips.vgg, weights_file(vgg, "VGG16"))
        # The file was saved on a GPU.
        state = torch.load(heads, weights_only=True, map_location="cpu")
        for number, head in enumerate(lpips.heads):
            head.weight.copy_(state[f"lin{number}.model.1.weight"])
        return lpips

    def forward(self, x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Two batches (B, 3, H, W) in [-1, 1] -> distances (B,) float32. Symmetric; 0 for equal images.

        Raises ValueError for shapes that differ or are not (B, 3, H, W) with H, W >= 16.
        """
        check_image_pair(x_hat, x, LPIPS_SMALLEST_SIDE)
        distance = torch.zeros(len(x), device=x.device)
        features = zip(self._features(x_hat), self._features(x), self.heads, strict=True)
        with torch.autocast(x.device.type, enabled=False):
            for first, second, head in features:
                difference = (unit_length(first, NORM_EPSILON) - unit_length(second, NORM_EPSILON)).square()
                distance = distance + head(difference).mean(dim=(1, 2, 3))
        return distance

    def _features(self, x: torch.Tensor) -> list[torch.Tensor]:
        return self.vgg((x - self.shift) / self.scale)


def _heads_file() -> Path:
    # Looked for, not imported: torchmetrics imports torchvision where it finds it.
    spec = importlib.util.find_spec("torchmetrics")
    path = Path(spec.origin).parent / HEADS_PATH if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise MissingWeightsError(
            "LPIPS needs the linear heads that ship inside torchmetrics, which is not installed "
            "(pip install torchmetrics)"
        )
    return path


def _load_vgg(vgg: VGG16Features, path: Path) -> None:
    # Read by name: the file's fully connected layers, three quarters of it, stay on the disk.
    try:
        with safe_open(path, framework="pt") as file:
            for name, parameter in vgg.named_parameters():
                weight = file.get_tensor(name)
                if weight.shape != parameter.shape:
                    raise MissingWeightsError(
                        f"'{path}' does not hold VGG16's weights: {name} must be of shape {tuple(parameter.shape)}, "
                        f"got {tuple(weight.shape)}"
                    )
                check_finite({name: weight}, path)
                parameter.copy_(weight)
    except SafetensorError as error:
        raise MissingWeightsError(f"'{path}' does not hold VGG16's weights: {error}") from error
