"""Metrics: objects with `update` and `compute`, below everything that measures."""

from .image_metric import ImageMetric, MeanOverImages
from .registry import (
    DEFAULT_METRICS,
    EFFNETLITE2_METRICS,
    IMAGE_METRICS,
    NETWORK_METRICS,
    image_metrics,
    load_metric_network,
)

__all__ = [
    "DEFAULT_METRICS",
    "EFFNETLITE2_METRICS",
    "IMAGE_METRICS",
    "NETWORK_METRICS",
    "ImageMetric",
    "MeanOverImages",
    "image_metrics",
    "load_metric_network",
]
