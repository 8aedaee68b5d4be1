"""What a measurement reads: a split of a data set, and how each image becomes a square crop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import public_name
from ..image_datasets import ON_BAD_IMAGE, ImageReader, ImageSplit, load_images
from ..pil_images import BadImageError, center_crop, cut_for_enlargement, resampling_filter, resize_shorter_side

if TYPE_CHECKING:
    import torch
    from datasets import Dataset, IterableDataset
    from PIL import Image

CROP = "shorter side resized to `size`, up or down, by PIL's filter `resample`; then the centre, size x size"


@dataclass(frozen=True, kw_only=True)
class EvaluationData:
    """The images of a measurement; a named `Protocol` is one of them.

    Attributes:
        dataset: Hub id, folder or parquet file, see `load_images`.
        config: configuration of a Hub data set that has several.
        split: the split that is measured.
        image_column: the column of the images.
        streaming: read rows as they arrive, without storing the data set.
        size: side of the crop in pixels; the shorter side is resized to it, up or down.
        resample: PIL's filter of that resize, by name.
        limit: measure the first N images only; None: all.
        on_bad_image: what an image that cannot be read does: "error", or "skip" to measure the others and record it.

    Raises ValueError for a `size` or `limit` below 1 and an unknown `resample` or `on_bad_image`.
    """

    dataset: str
    config: str | None = None
    split: str = "test"
    image_column: str = "image"
    streaming: bool = False
    size: int = 256
    resample: str = "lanczos"
    limit: int | None = None
    on_bad_image: str = "error"

    def __post_init__(self) -> None:
        resampling_filter(self.resample)
        if self.on_bad_image not in ON_BAD_IMAGE:
            raise ValueError(f"`on_bad_image` must be one of {', '.join(ON_BAD_IMAGE)}, got {self.on_bad_image!r}")
        for name in ("size", "limit"):
            value = getattr(self, name)
            if not (value is None and name == "limit") and (not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}")

    def open(self) -> EvaluationImages:
        """Opens the split; no image is read yet. Raises ValueError as `load_images` does."""
        rows = load_images(self.dataset, self.config, self.split, self.image_column, self.streaming)
        return EvaluationImages(self, rows)

    def crop(self, image: Image.Image) -> torch.Tensor:
        """What is measured of an RGB image, (3, size, size) float32 in [-1, 1]: resized, then the centre."""
        from ..image_processing_dualcodebook import to_pixels

        resized = resize_shorter_side(cut_for_enlargement(image, self.size), self.size, self.resample)
        return to_pixels(center_crop(resized, self.size))

    def record(self, count: int) -> dict[str, Any]:
        """For metrics.json, without this machine's folders.

        Args:
            count: images that were measured.
        """
        return {
            "dataset": public_name(self.dataset),
            "config": self.config,
            "split": self.split,
            "image_column": self.image_column,
            "pictures": count,
            "limit": self.limit,
            "size": self.size,
            "resample": self.resample,
        }


@dataclass(frozen=True)
class EvaluationImages:
    """The opened split: iterating gives its crops (3, size, size) float32 in [-1, 1], as often as it is asked.

    Attributes:
        data: what was opened.
        rows: of the split, not decoded.
        in_order: whether they come as in the split, so that a message can give a row's index.
        skipped: images that cannot be read, as the latest iteration left them out where `on_bad_image` is "skip".

    Raises BadImageError, while iterating, that says which image cannot be read; where these are skipped, for more than
    10 and 1% of the images read.
    """

    data: EvaluationData
    rows: Dataset | IterableDataset
    in_order: bool = True
    skipped: list[BadImageError] = field(default_factory=list, compare=False)

    def __iter__(self) -> Iterator[torch.Tensor]:
        data = self.data
        split = ImageSplit(self.rows, data.dataset, data.split, data.image_column)
        reader = ImageReader(data.on_bad_image)
        for index, row in enumerate(islice(self.rows, data.limit)):
            image = reader.read(split, row, index if self.in_order else None)
            self.skipped[:] = reader.skipped
            if image is not None:
                yield data.crop(image)

    def skipped_record(self) -> list[dict[str, Any]]:
        """For metrics.json: row, file's name and reason of each image that was left out."""
        return [
            {"row": error.row, "file": error.file and Path(error.file).name, "reason": error.reason}
            for error in self.skipped
        ]

    @property
    def count(self) -> int | None:
        """How many images there are; None where only reading a stream tells."""
        if not hasattr(self.rows, "__len__"):
            return self.data.limit
        return min(len(self.rows), self.data.limit or len(self.rows))

    def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """The crops as (B, 3, size, size); the last batch may be smaller."""
        import torch

        crops = iter(self)
        while batch := list(islice(crops, batch_size)):
            yield torch.stack(batch)

    def first(self, count: int) -> Iterator[torch.Tensor]:
        """The first `count` crops. Raises ValueError for a `count` below 1."""
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"`count` must be a whole number of at least 1, got {count!r}")
        return islice(self, count)

    def shuffled(self, seed: int) -> EvaluationImages:
        """The same images in a random order; of a stream, as far as its buffer reaches."""
        return EvaluationImages(self.data, self.rows.shuffle(seed=seed), in_order=False)
