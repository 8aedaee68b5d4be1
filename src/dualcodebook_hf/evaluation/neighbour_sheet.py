"""Samples beside the training images that are nearest to them, to be looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from ..figures import captioned_row, comparison_sheet


def neighbour_sheet(
    samples: Sequence[tuple[str, Image.Image]],
    neighbours: Sequence[Mapping[str, Any]],
    train: Mapping[int, Image.Image],
) -> Image.Image:
    """A row for each sample: itself, the training image that is nearest in features, and that in tokens.

    Args:
        samples: (name, RGB image).
        neighbours: of each, see `GeneratorEvaluator.neighbours`.
        train: {number: RGB image} of every training image that they name.
    """
    return comparison_sheet([_row(*each, train) for each in zip(samples, neighbours, strict=True)])


def _row(sample: tuple[str, Image.Image], found: Mapping[str, Any], train: Mapping[int, Image.Image]) -> Image.Image:
    features, tokens = found["features"], found.get("tokens")
    note = f"distance {features['distance']:.2f}; of test images {features['test_share']:.0%} are nearer"
    panels = [
        ("sample", *sample),
        (f"nearest in features: {features['train_image']}", note, train[features["train_image"]]),
    ]
    if tokens is not None:
        note = f"{tokens['equal']:.1%} equal; of test images {tokens['test_share']:.0%} share more"
        panels.append((f"nearest in tokens: {tokens['train_image']}", note, train[tokens["train_image"]]))
    return captioned_row(panels)
