"""What compares reconstructed images with their originals, batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class ImageMetric(Protocol):
    """Filled by `update`, asked by `compute`.

    Attributes:
        name: its key in metrics.json.
        definition: in words, exact enough to repeat it; it stands beside the number.
    """

    name: str
    definition: str

    def update(self, reconstruction: torch.Tensor, original: torch.Tensor) -> None:
        """Adds images, both (B, 3, H, W) floating point in [0, 1]; reconstructions may leave the range."""

    def compute(self) -> dict[str, Any]:
        """The value of all images so far under `name`, and what else belongs to it; JSON-ready."""


class MeanOverImages:
    """The mean of a distance that is one number per image.

    Args:
        name: its key in metrics.json.
        definition: in words.
        distance: reconstructions and originals (B, 3, H, W) in [0, 1] -> (B,).
    """

    def __init__(
        self, name: str, definition: str, distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> None:
        self.name, self.definition, self.distance = name, definition, distance
        self._values: list[torch.Tensor] = []

    def update(self, reconstruction: torch.Tensor, original: torch.Tensor) -> None:
        """Adds images, both (B, 3, H, W) in [0, 1]."""
        self._values.append(self.distance(reconstruction, original).cpu())

    def compute(self) -> dict[str, float]:
        """{name: mean over images}."""
        import torch

        return {self.name: torch.cat(self._values).double().mean().item()}
