"""Every metric of reconstructed images by its name: how tables show it, and how it is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ..perceptual import LPIPS_SMALLEST_SIDE
from .image_metric import ImageMetric, MeanOverImages

# Titles and needs are read by settings and by `--help`, so what computes is imported when it is built.
if TYPE_CHECKING:
    import torch

    from ..perceptual.vgg import LPIPS
    from .efficientnet import EfficientNetFeatures
    from .frechet import FeatureExtractor


@dataclass(frozen=True)
class MetricSpec:
    """One metric.

    Attributes:
        title: what tables call it.
        digits: after the point, where it is printed.
        build: makes a fresh metric; given the network where there is one.
        unit: of the value, empty where it has none.
        load_network: device -> the pretrained network that it measures by. Such a metric is measured on demand only.
        needs: what the network needs, for the help of its flag.
        smallest_side: of the images, in pixels.
        higher_is_better: false for distances.
    """

    title: str
    digits: int
    build: Callable[..., ImageMetric]
    unit: str = ""
    load_network: Callable[[str | torch.device], Any] | None = None
    needs: str = ""
    smallest_side: int = 1
    higher_is_better: bool = False


def _mean(name: str, definition: str) -> Callable[[], ImageMetric]:
    """The mean of the function of that name in images.py."""

    def build() -> ImageMetric:
        from . import images

        return MeanOverImages(name, definition, getattr(images, name))

    return build


def _sliced_wasserstein() -> ImageMetric:
    from .wasserstein import SlicedWasserstein

    return SlicedWasserstein()


def _frechet_distance(features: FeatureExtractor, name: str) -> ImageMetric:
    from .frechet import FrechetDistance

    return FrechetDistance(features, name)


def _kernel_distance(features: FeatureExtractor, name: str) -> ImageMetric:
    from .kernel import KernelDistance

    return KernelDistance(features, name)


def _lpips(network: LPIPS) -> ImageMetric:
    definition = "VGG16, version 0.1 (Zhang et al. 2018), on values clamped to [0, 1] and then scaled to [-1, 1]"
    return MeanOverImages("lpips", definition, lambda x_hat, x: network(x_hat.clamp(0, 1) * 2 - 1, x * 2 - 1))


def _perceptual_distance(features: EfficientNetFeatures) -> ImageMetric:
    definition = (
        "squared differences of unit-length features of stages 0, 1, 2 and 4, summed over channels and stages, mean "
        f"over positions; {features.protocol}"
    )
    return MeanOverImages("pd_effnetlite2", definition, features.distance)


def _load_lpips(device: str | torch.device) -> LPIPS:
    from ..perceptual.vgg import LPIPS

    return LPIPS.from_pretrained().to(device)


def _load_inception(device: str | torch.device) -> FeatureExtractor:
    from .frechet import inception_extractor

    return inception_extractor(device)


def _load_effnetlite2(device: str | torch.device) -> EfficientNetFeatures:
    from .efficientnet import effnetlite2_features

    return effnetlite2_features(device)


EFFNETLITE2 = {
    "load_network": _load_effnetlite2,
    "needs": "EfficientNet-Lite2's weights (the extra `perceptual`, or the Hub)",
}
IMAGE_METRICS: dict[str, MetricSpec] = {
    "psnr": MetricSpec(
        "PSNR",
        2,
        _mean("psnr", "dB, -10 log10(MSE over channels and pixels), MSE at least 1e-10"),
        unit="dB",
        higher_is_better=True,
    ),
    "ssim": MetricSpec(
        "SSIM",
        4,
        _mean(
            "ssim",
            "Gaussian window 11, sigma 1.5, population covariance, data_range 1, windows inside the image only",
        ),
        higher_is_better=True,
    ),
    "ms_ssim": MetricSpec(
        "MS-SSIM",
        4,
        _mean(
            "ms_ssim",
            "5 scales, weights .0448 .2856 .3001 .2363 .1333 (fewer scales below 176 pixels), SSIM as above",
        ),
        higher_is_better=True,
    ),
    "l1": MetricSpec("L1", 4, _mean("l1", "mean absolute error")),
    "swd": MetricSpec("SWD", 1, _sliced_wasserstein),
    "lpips": MetricSpec(
        "LPIPS",
        4,
        _lpips,
        load_network=_load_lpips,
        needs="VGG16's weights and torchmetrics",
        smallest_side=LPIPS_SMALLEST_SIDE,
    ),
    "rfid": MetricSpec(
        "rFID",
        2,
        partial(_frechet_distance, name="rfid"),
        load_network=_load_inception,
        needs="torchmetrics and torch-fidelity",
    ),
    "kd_effnetlite2": MetricSpec("KD lite2", 1, partial(_kernel_distance, name="kd_effnetlite2"), **EFFNETLITE2),
    "fd_effnetlite2": MetricSpec("FD lite2", 1, partial(_frechet_distance, name="fd_effnetlite2"), **EFFNETLITE2),
    "pd_effnetlite2": MetricSpec("PD lite2", 4, _perceptual_distance, **EFFNETLITE2),
}
# Measured wherever nothing else is asked for: they need no network.
DEFAULT_METRICS = tuple(name for name, spec in IMAGE_METRICS.items() if spec.load_network is None)
NETWORK_METRICS = tuple(name for name, spec in IMAGE_METRICS.items() if spec.load_network is not None)
EFFNETLITE2_METRICS = tuple(name for name in NETWORK_METRICS if name.endswith("_effnetlite2"))


def image_metrics(
    names: Iterable[str] = DEFAULT_METRICS, networks: Mapping[str, Any] | None = None
) -> list[ImageMetric]:
    """Fresh metrics, in the order of the names.

    Args:
        names: keys of `IMAGE_METRICS`.
        networks: {name: network} of those that measure by one; for "rfid" any function from images (B, 3, H, W) in
            [0, 1] to features (B, D).

    Raises ValueError for an unknown name and for a missing network.
    """
    networks, metrics = networks or {}, []
    for name in names:
        if name not in IMAGE_METRICS:
            raise ValueError(f"`metrics` must be of {', '.join(IMAGE_METRICS)}, got {name!r}")
        spec = IMAGE_METRICS[name]
        if spec.load_network is not None and name not in networks:
            raise ValueError(f"`networks` must hold the one of {name!r}, see `load_metric_network`; got none")
        metrics.append(spec.build() if spec.load_network is None else spec.build(networks[name]))
    return metrics


def load_metric_network(name: str, size: int, device: str | torch.device = "cpu") -> Any:
    """The pretrained network of one metric.

    Args:
        name: of `NETWORK_METRICS`.
        size: shorter side of the images that will be measured, in pixels.
        device: where it runs.

    Raises ValueError for images that are too small, and, with the reason, when a package or the weights are missing.
    """
    spec = IMAGE_METRICS[name]
    if size < spec.smallest_side:
        raise ValueError(f"`size` must be at least {spec.smallest_side} for `{name}`, got {size}")
    try:
        return spec.load_network(device)
    # A missing package, or whatever the download of the weights raises.
    except Exception as error:
        raise ValueError(f"`{name}` cannot be measured: {error}") from error
