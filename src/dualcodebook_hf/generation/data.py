"""What a generator is trained on: token data sets, or images whose tokens are made on their way; both with classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from ..tokens.dataset import TokenDataset
from ..training.data import TrainingImages, ValidationImages
from ..training.sources import open_splits

if TYPE_CHECKING:
    import datasets

    from ..core import DualCodebookCore
    from .arguments import GeneratorDataArguments

Batch = dict[str, torch.Tensor]


class TokenSource(Protocol):
    """Where a generator's batches come from.

    A batch holds "tokens", int64 (B, codebooks, h, w), or the "pixel_values" that they are to be made of, float32
    (B, 3, H, W) in [-1, 1]; "index", int64 (B,); and "class_labels", int64 (B,), where there are classes.

    Attributes:
        classes: names of the classes; None: without.
        validates: whether there is something to validate on.
    """

    classes: list[str] | None
    validates: bool

    def grid(self, tokenizer: DualCodebookCore) -> tuple[int, int]:
        """(h, w), positions of a sample."""

    def training(self, batch_size: int, start: int, rank: int, world_size: int) -> Iterator[Batch]:
        """Batches without an end, a function of the seed and of the position alone; see `training.task.Task`."""

    def validation(self, batch_size: int) -> Iterator[Batch]:
        """All samples that are validated on, in one order."""

    def remarks(self) -> list[str]:
        """See `training.task.Task`."""


class TokenRows:
    """A token data set as `datasets` maps it into memory.

    Args:
        folder: that `tokenize-dataset` wrote.
        argument: what messages call it.
        class_column: column of the classes; None: without.

    Attributes:
        info: content of its tokens.json.
        classes: names of the classes; None: without.
        shape: of a row's tokens, (crops, codebooks, h, w).
        labels: int64 (rows,); None where there are no classes.

    Raises ValueError for a data set that is not whole, has no rows, has crops of different sizes, or whose class column
    is missing or no classes.
    """

    def __init__(self, folder: str, argument: str, class_column: str | None) -> None:
        import datasets

        tokens = TokenDataset(folder, argument)
        self.info = tokens.info
        grid = self.info.crops.grid(self.info.downsample_factor)
        if grid is None:
            raise ValueError(f"`{argument}`: '{folder}' must hold crops of one size, got `augmentation` none")
        self.classes = class_names(tokens.features, class_column, folder)
        self.shape = (self.info.crops.count, len(self.info.books), *grid)
        columns = ["tokens", *([class_column] if class_column else [])]
        rows = datasets.Dataset.from_parquet([str(path) for path in tokens.shards], columns=columns)
        if not len(rows):
            raise ValueError(f"`{argument}`: there are no images in '{folder}'")
        self._rows = rows.select_columns(["tokens"]).with_format("numpy")
        self.labels = np.asarray(rows[class_column], np.int64) if class_column else None
        if self.labels is not None:
            check_labels(self.labels, self.classes, class_column, folder)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, rows: np.ndarray, crops: np.ndarray) -> Batch:
        """Of each of some rows one crop."""
        found = self._rows[rows.tolist()]["tokens"]
        tokens = np.stack([tokens[crop] for tokens, crop in zip(found, crops, strict=True)])
        batch = {"tokens": torch.from_numpy(tokens.astype(np.int64)), "index": torch.from_numpy(rows)}
        if self.labels is not None:
            batch["class_labels"] = torch.from_numpy(self.labels[rows])
        return batch


class TokenDatasetSource:
    """Token data sets as a `TokenSource`: every epoch shows one crop of each image, drawn anew.

    Args:
        data: which ones.
        seed: of the order and of the crops.
        validation_samples: rows that are validated on, spread evenly; 0: all. Of each its first crop.

    Attributes:
        info: content of the tokens.json that is trained on.
        validates: whether there is something to validate on.

    Raises ValueError as `TokenRows` does, and where what is validated on was made by another tokenizer, or has other
    classes.
    """

    def __init__(self, data: GeneratorDataArguments, seed: int, validation_samples: int = 0) -> None:
        self.seed, self.samples = seed, validation_samples
        self.rows = TokenRows(data.tokens, "tokens", data.class_column)
        self.info, self.classes = self.rows.info, self.rows.classes
        self.validates = data.validation_tokens is not None
        if self.validates:
            self.validation_rows = TokenRows(data.validation_tokens, "validation_tokens", data.class_column)
            self._check_validation(data.validation_tokens)

    def _check_validation(self, folder: str) -> None:
        info = self.validation_rows.info
        for name in ("config_hash", "weights_sha256"):
            if getattr(info, name) != getattr(self.info, name):
                raise ValueError(
                    f"`validation_tokens` '{folder}' must be made by the tokenizer of `tokens`, with {name} "
                    f"{getattr(self.info, name)}, got {getattr(info, name)}"
                )
        if self.validation_rows.classes != self.classes:
            raise ValueError(
                f"`validation_tokens` '{folder}' must have the classes of `tokens`, {self.classes}, "
                f"got {self.validation_rows.classes}"
            )
        if self.validation_rows.shape[1:] != self.rows.shape[1:]:
            raise ValueError(
                f"`validation_tokens` '{folder}' must have tokens of shape {self.rows.shape[1:]}, as `tokens` has, "
                f"got {self.validation_rows.shape[1:]}"
            )

    def grid(self, tokenizer: DualCodebookCore) -> tuple[int, int]:
        """(h, w) of the crops."""
        return self.rows.shape[2], self.rows.shape[3]

    def training(self, batch_size: int, start: int, rank: int, world_size: int) -> Iterator[Batch]:
        """Row by the permutation of default_rng([seed, epoch]), crop by default_rng([seed, epoch, row])."""
        length, crops = len(self.rows), self.rows.shape[0]
        position, order, epoch = start + rank * batch_size, np.empty(0, np.int64), -1
        while True:
            rows, chosen = [], []
            for place in range(position, position + batch_size):
                if place // length != epoch:
                    epoch = place // length
                    order = np.random.default_rng([self.seed, epoch]).permutation(length)
                row = int(order[place % length])
                rows.append(row)
                chosen.append(int(np.random.default_rng([self.seed, epoch, row]).integers(crops)))
            yield self.rows.read(np.array(rows), np.array(chosen))
            position += batch_size * world_size

    def validation(self, batch_size: int) -> Iterator[Batch]:
        """The first crop of rows that are spread evenly."""
        length = len(self.validation_rows)
        count = min(self.samples or length, length)
        rows = np.arange(count) * length // count
        for first in range(0, count, batch_size):
            part = rows[first : first + batch_size]
            yield self.validation_rows.read(part, np.zeros(len(part), np.int64))

    def remarks(self) -> list[str]:
        """None: shards hold no image that cannot be read."""
        return []


class ImageSource:
    """Images as a `TokenSource`, by the trainer's own readers.

    Args:
        data: which ones, and how one becomes a crop.
        seed: of the order, the crops and the mirroring.
        validation_samples: images that are validated on; 0: all.

    Attributes:
        validates: whether there is something to validate on.

    Raises ValueError as those readers do, and where the class column is missing or no classes.
    """

    def __init__(self, data: GeneratorDataArguments, seed: int, validation_samples: int = 0) -> None:
        self.data = data
        self.images = TrainingImages(data, seed)
        self.validates = bool(data.validation_split)
        self.classes, self._labels = self._read_classes(data.train_split)
        self._validation_labels: np.ndarray | None = None
        if self.validates:
            self.validation_images = ValidationImages(data, validation_samples, seed)
            classes, self._validation_labels = self._read_classes(data.validation_split)
            if classes != self.classes:
                raise ValueError(
                    f"`validation_split` must have the classes of `train_split`, {self.classes}, got {classes}"
                )

    def _read_classes(self, split: Any) -> tuple[list[str] | None, np.ndarray | None]:
        """Names of the classes and the label of every row; None and None without classes."""
        column = self.data.class_column
        if column is None:
            return None, None
        names, labels = None, []
        for source in open_splits(self.data, split, [column]):
            found = class_names(source.rows.features, column, source.dataset)
            if names not in (None, found):
                raise ValueError(f"`class_column` {column!r} must have the same classes in every `dataset`")
            names = found
            rows = source.rows
            if self.data.max_train_samples and split == self.data.train_split:
                rows = rows.select(range(min(self.data.max_train_samples, len(rows))))
            labels.append(np.asarray(rows[column], np.int64))
            check_labels(labels[-1], names, column, source.dataset)
        return names, np.concatenate(labels)

    def grid(self, tokenizer: DualCodebookCore) -> tuple[int, int]:
        """(h, w) of the crops."""
        side = -(-self.data.resolution // tokenizer.downsample_factor)
        return side, side

    def training(self, batch_size: int, start: int, rank: int, world_size: int) -> Iterator[Batch]:
        """The trainer's batches, with classes."""
        self._loader = self.images.loader(batch_size, start=start, rank=rank, world_size=world_size)
        return map(self._labelled(self._labels), self._loader)

    def remarks(self) -> list[str]:
        """How many images were left out."""
        return self._loader.remarks()

    def validation(self, batch_size: int) -> Iterator[Batch]:
        """The validation images, with classes."""
        return map(self._labelled(self._validation_labels), self.validation_images.numbered_batches(batch_size))

    @staticmethod
    def _labelled(labels: np.ndarray | None) -> Callable[[Batch], Batch]:
        def add(batch: Batch) -> Batch:
            if labels is None:
                return batch
            return batch | {"class_labels": torch.from_numpy(labels[batch["index"].numpy()])}

        return add


def class_names(features: datasets.Features, column: str | None, source: str) -> list[str] | None:
    """Names of a column's classes; None where no column is named.

    Raises ValueError where the column does not exist or holds no classes.
    """
    import datasets

    if column is None:
        return None
    none = "; `class_column null` trains a generator without classes"
    if column not in features:
        raise ValueError(f"`class_column` must be one of {list(features)} in '{source}', got {column!r}{none}")
    if not isinstance(features[column], datasets.ClassLabel):
        raise ValueError(
            f"`class_column` {column!r} in '{source}' must be of the type ClassLabel, got {features[column]}: "
            f"`Dataset.class_encode_column` makes one{none}"
        )
    return list(features[column].names)


def check_labels(labels: np.ndarray, classes: list[str] | None, column: str | None, source: str) -> None:
    """Raises ValueError for a label that is no class; data sets write -1 where they have none."""
    count = len(classes or [])
    wrong = np.flatnonzero((labels < 0) | (labels >= count))
    if len(wrong):
        raise ValueError(
            f"`class_column` {column!r} in '{source}' must hold classes in [0, {count}), got {labels[wrong[0]]} in row "
            f"{wrong[0]} ({len(wrong)} such rows)"
        )
