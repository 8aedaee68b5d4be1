"""The data sets of a run, opened; nothing here needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..image_datasets import KEY_COLUMN, ImageSplit, load_images

if TYPE_CHECKING:
    from .arguments import DataArguments


def open_splits(
    args: DataArguments, split: str | list[str | None] | None, columns: Sequence[str] = ()
) -> list[ImageSplit]:
    """The split of each data set, not decoded, with no other columns than the images' (and a webdataset's keys).

    Args:
        args: which data sets.
        split: their `train_split` or `validation_split`; a data set without one is left out.
        columns: further ones that are kept, where a data set has them.

    Raises ValueError as `load_images` does.
    """
    found = []
    sources = zip(*map(args.of_each, (args.dataset, args.dataset_config, split, args.image_column)), strict=True)
    for dataset, config, name, column in sources:
        if name is not None:
            rows = load_images(dataset, config, name, column, args.streaming)
            rows = rows.select_columns([key for key in (column, KEY_COLUMN, *columns) if key in rows.features])
            found.append(ImageSplit(rows, dataset, name, column))
    return found
