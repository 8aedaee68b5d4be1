"""The images of a data set, cut into shards: each a function of (shard, number of shards) and the data set alone."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..files import public_name
from ..image_datasets import KEY_COLUMN, DatasetError, ImageSplit, load_images
from .dataset import RESERVED

READ_AT_ONCE = 16  # rows
# The pages of a mapped file that were read count as memory of the process, until it is mapped anew.
MAPPED_ROWS = 512


class SourceRow(NamedTuple):
    """A row before its image is decoded.

    Attributes:
        id: its name in the token data set: the row's number, or of a stream "file-row".
        key: the same as numbers.
        index: of the row in the split; None in a stream.
        row: with the image's column, and those that are kept.
    """

    id: str
    key: tuple[int, ...]
    index: int | None
    row: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TokenSource:
    """What is tokenized; see `load_images`.

    Attributes:
        dataset: Hub id, folder of images, parquet files or webdataset tars, or a parquet file.
        config: configuration of a Hub data set that has several.
        split: one of its splits.
        image_column: column of the images.
        columns: that are kept.
        streaming: read rows as they arrive, without storing the data set.
    """

    dataset: str
    config: str | None = None
    split: str = "train"
    image_column: str = "image"
    columns: tuple[str, ...] = ()
    streaming: bool = False

    def open(self) -> OpenSource:
        """Opens the split; no image is read yet. Raises ValueError as `load_images` does, and for unknown columns."""
        import pyarrow as pa

        rows = load_images(self.dataset, self.config, self.split, self.image_column, self.streaming)
        pa.default_memory_pool().release_unused()  # what the preparation of a data set took, before the model comes
        for name in self.columns:
            if name not in rows.features or name == self.image_column:
                others = sorted(set(rows.features) - {self.image_column})
                raise DatasetError("columns", f"must be among {others} in {self.dataset!r}, got {name!r}")
            if name in RESERVED:
                raise DatasetError("columns", f"must not be one of {', '.join(RESERVED)}, got {name!r}")
        wanted = dict.fromkeys((self.image_column, *self.columns, KEY_COLUMN))
        rows = rows.select_columns([name for name in wanted if name in rows.features])
        return OpenSource(self, ImageSplit(rows, self.dataset, self.split, self.image_column))

    def record(self) -> dict[str, Any]:
        """For the metadata, without this machine's folders."""
        public = {"dataset": public_name(Path(self.dataset)), "config": self.config, "split": self.split}
        return public | {"image_column": self.image_column, "streaming": self.streaming}


@dataclass(frozen=True)
class OpenSource:
    """An opened split.

    Attributes:
        source: what was opened.
        split: its rows.
    """

    source: TokenSource
    split: ImageSplit

    @property
    def features(self) -> dict[str, Any]:
        """Of the columns that are kept."""
        return {name: self.split.rows.features[name] for name in self.source.columns}

    @property
    def size(self) -> dict[str, int]:
        """{"rows": N}, or of a stream {"files": N}, which alone is known of it: this many shards it has at the most."""
        if self.source.streaming:
            return {"files": self.split.rows.num_shards}
        return {"rows": len(self.split.rows)}

    def rows(self, shard: int, num_shards: int) -> Iterator[SourceRow]:
        """The rows of a shard, in the split's order: a range of the rows of a table, a range of the files of a stream.

        All shards together have every row once.
        """
        (count,) = self.size.values()
        ends = [shard * count // num_shards, (shard + 1) * count // num_shards]
        yield from self._of_files(*ends) if self.source.streaming else self._of_rows(*ends)

    def count(self, shard: int, num_shards: int) -> int | None:
        """Rows of a shard; None where only reading a stream tells."""
        if self.source.streaming:
            return None
        count = len(self.split.rows)
        return (shard + 1) * count // num_shards - shard * count // num_shards

    def _of_rows(self, start: int, end: int) -> Iterator[SourceRow]:
        index = start
        while index < end:
            part = range(index, min(index + MAPPED_ROWS, end))
            for row in _iterate(pickle.loads(pickle.dumps(self.split.rows)).select(part)):
                yield SourceRow(str(index), (index,), index, row)
                index += 1

    def _of_files(self, start: int, end: int) -> Iterator[SourceRow]:
        files = self.split.rows.num_shards
        for file in range(start, end):
            for number, row in enumerate(_iterate(self.split.rows.shard(num_shards=files, index=file))):
                yield SourceRow(f"{file}-{number}", (file, number), None, row)


def _iterate(rows: Any) -> Iterator[dict[str, Any]]:
    for batch in rows.iter(batch_size=READ_AT_ONCE):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))
