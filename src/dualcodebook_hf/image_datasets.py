"""Images from any source that `datasets` reads: one place for training and for measuring."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .pil_images import BadImageError, read_image

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset
    from PIL import Image

KEY_COLUMN = "__key__"  # of a webdataset: what its row is found by
# What a path of a row may be made of: a file, one in the streamed repository, one in an archive.
PROTOCOLS = {"file", "hf", "zip", "tar", "gzip", "bz2", "lz4", "xz", "zstd"}
FILES = {".parquet": "parquet", ".tar": "webdataset"}  # suffixes and their builders of `datasets`
ON_BAD_IMAGE = ("error", "skip")
SKIPPED_COUNT, SKIPPED_SHARE = 10, 0.01


class DatasetError(ValueError):
    """An argument that does not fit the data set.

    Attributes:
        argument: of `load_images`.
        detail: what it must be, and what came; callers with arguments of other names say it in theirs.
    """

    def __init__(self, argument: str, detail: str) -> None:
        super().__init__(f"`{argument}` {detail}")
        self.argument, self.detail = argument, detail


def load_images(
    dataset: str | Path,
    config: str | None = None,
    split: str = "train",
    image_column: str = "image",
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Opens one split of a data set of images, not decoded: `read_row` decodes.

    `dataset` is a Hub id, a folder of parquet files or webdataset tars, a folder of images (with or without subfolders
    named as the splits), one parquet file or tar (its split is "train") or a folder written by `save_to_disk`. `config`
    names one of the data set's configurations. Streaming reads rows in order as they are asked for and prepares nothing
    on disk.

    Raises ValueError, before any row is read, when the folder does not exist or holds no data, when the split does not
    exist (its message names those that do), and when the column does not exist or cannot hold images.
    """
    path = Path(dataset).expanduser()
    saved = path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    source = {} if saved else {**_source(dataset, path), "name": config}
    import datasets  # takes seconds: what is missing is told before

    if saved:
        if config is not None:
            raise DatasetError("config", f"must be None for a folder written by save_to_disk, got {config!r}")
        opened = datasets.load_from_disk(str(path))
        splits = opened if isinstance(opened, datasets.DatasetDict) else {str(opened.split or "train"): opened}
    else:
        splits = _open_splits(dataset, source, streaming)
    if split not in splits:
        raise DatasetError("split", f"must be one of {list(splits)} in {str(dataset)!r}, got {split!r}")
    images = splits[split]
    if images.features is None:  # a stream of JSON or CSV: known after the first row
        images = images._resolve_features()
    _check_column(images.features, image_column, dataset)
    if streaming and isinstance(images, datasets.Dataset):
        images = images.to_iterable_dataset()
    elif not streaming and isinstance(images, datasets.IterableDataset):
        images = datasets.load_dataset(**source, split=split)
    return images.cast_column(image_column, datasets.Image(decode=False))


def read_row(
    row: dict[str, Any], image_column: str = "image", *, dataset: str | Path, split: str, index: int | None = None
) -> Image.Image:
    """The RGB image of one row of what `load_images` opened, see `read_image`.

    Args:
        row: as it came.
        image_column: its column with the image.
        dataset: for messages.
        split: for messages.
        index: of the row in the split; None in a shuffled stream, where the file's name, or the hash of its bytes,
            tells which image it is.

    Raises BadImageError that says which row holds no image, or one that cannot be read.
    """
    value = row[image_column]
    try:
        if value is None:  # in a webdataset: the image may be another column's
            raise BadImageError(f"its column `{image_column}` holds no image")
        return read_image(image_source(value))
    except BadImageError as error:
        file = (value or {}).get("path") or row.get(KEY_COLUMN)
        if file is None and index is None and value and value["bytes"]:
            file = f"sha256 {hashlib.sha256(value['bytes']).hexdigest()}"
        raise BadImageError(error.reason, file, dataset=str(dataset), split=split, row=index) from error


@dataclass(frozen=True)
class ImageSplit:
    """An opened split, and what messages call it.

    Attributes:
        rows: what `load_images` opened, or any sequence of such rows.
        dataset: its name.
        split: its name.
        image_column: the rows' column with the images.
    """

    rows: Any
    dataset: str = "the data set"
    split: str = "train"
    image_column: str = "image"

    def read(self, row: dict[str, Any], index: int | None = None) -> Image.Image:
        """The RGB image of one of the rows; see `read_row`."""
        return read_row(row, self.image_column, dataset=self.dataset, split=self.split, index=index)


class ImageSplits:
    """Splits of one or several data sets as one: tables one after the other; of streams a row of each in turn.

    Args:
        splits: at least one; all tables (with a length) or all streams.

    Attributes:
        splits: as given.
        streaming: whether they are streams.
    """

    def __init__(self, splits: Sequence[ImageSplit]) -> None:
        self.splits = list(splits)
        self.streaming = not hasattr(self.splits[0].rows, "__len__")
        self._ends = [] if self.streaming else list(accumulate(len(split.rows) for split in self.splits))

    def __len__(self) -> int:
        """Rows of all tables."""
        return self._ends[-1]

    def locate(self, index: int) -> tuple[ImageSplit, int]:
        """The table that holds row `index` of all, and the row's index in it."""
        place = bisect_right(self._ends, index)
        return self.splits[place], index - (self._ends[place - 1] if place else 0)

    def stream(self, prepare: Callable[[Any], Any] = lambda rows: rows) -> Iterator[tuple[ImageSplit, dict[str, Any]]]:
        """A row of each stream in turn, until all have ended.

        Args:
            prepare: what is done to each stream before it is read, such as shuffling.
        """
        streams = [(split, _rows(prepare(split.rows))) for split in self.splits]
        while streams:
            going = []
            for split, rows in streams:
                row = next(rows, None)
                if row is not None:
                    going.append((split, rows))
                    yield split, row
            streams = going


def _rows(stream: IterableDataset) -> Iterator[dict[str, Any]]:
    # By batches of one: iterating a stream itself inside a loader's worker gives each worker a share of the files only.
    for rows in stream.iter(batch_size=1):
        yield {column: values[0] for column, values in rows.items()}


def image_source(value: dict[str, Any] | None) -> bytes | str:
    """The encoded bytes, or the local path, of one entry of the image column that `load_images` opened.

    Raises BadImageError when the entry is empty, or names a file that cannot be opened or lies on another machine: no
    row makes this one ask an address.
    """
    data, path = (value["bytes"], value["path"]) if value else (None, None)
    if data is not None:
        return data
    if path is None:
        raise BadImageError("there is no image in it")
    if "://" not in path:
        return path
    foreign = {part.partition("://")[0] for part in path.split("::") if "://" in part} - PROTOCOLS
    if foreign:
        raise BadImageError(f"it names an address ({', '.join(sorted(foreign))}), which is not fetched", path)
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:  # streamed from the Hub, or out of an archive
            return file.read()
    except OSError as error:
        raise BadImageError(error.strerror or str(error), path) from error


def check_skipped(last: BadImageError, skipped: int, read: int) -> None:
    """Raises BadImageError where so many images were left out that the data is wrong, rather than an image or two.

    Args:
        last: the latest of them.
        skipped: images left out; 10 and 1% of `read` are allowed.
        read: images read, those included.
    """
    if skipped > SKIPPED_COUNT + SKIPPED_SHARE * read:
        raise last.because(f"{last.reason}; {skipped} of {read} images cannot be read, which is too many to skip")


class ImageReader:
    """Reads rows one after the other, and leaves out what cannot be read where that is asked for.

    Args:
        on_bad_image: "error", or "skip" to leave it out.

    Attributes:
        skipped: what was left out so far.
    """

    def __init__(self, on_bad_image: str) -> None:
        self.on_bad_image = on_bad_image
        self.skipped: list[BadImageError] = []
        self._read = 0

    def read(self, split: ImageSplit, row: dict[str, Any], index: int | None = None) -> Image.Image | None:
        """The image of one of a split's rows; None for one that is left out.

        Raises BadImageError for one that is not, and where too many are left out (see `check_skipped`).
        """
        self._read += 1
        try:
            return split.read(row, index)
        except BadImageError as error:
            if self.on_bad_image == "error":
                raise
            self.skipped.append(error)
            check_skipped(error, len(self.skipped), self._read)
        return None


def _source(dataset: str | Path, path: Path) -> dict[str, Any]:
    """The arguments of `datasets.load_dataset` that say where the data is."""
    if path.is_file():
        if path.suffix not in FILES:
            kinds = " or ".join(FILES)
            raise ValueError(f"`dataset` must be a Hub id, a folder or a {kinds} file, got the file {str(path)!r}")
        return {"path": FILES[path.suffix], "data_files": str(path)}
    if path.is_dir():
        return {"path": str(path)}
    name = str(dataset)
    if isinstance(dataset, Path) or name.startswith((".", "/", "~")) or (name.count("/") != 1 and "/" in name):
        raise ValueError(f"`dataset`: no such file or folder: {name!r}")
    return {"path": name}


def _open_splits(dataset: str | Path, source: dict[str, Any], streaming: bool) -> dict[str, Any]:
    """Every split as a stream, which reads no rows: splits and columns are known before the work of preparing them."""
    import datasets

    try:
        return datasets.load_dataset(**source, streaming=True)
    except NotImplementedError as error:  # some archives, and what an offline machine has in its cache
        if streaming:
            raise ValueError(f"`streaming`: {str(dataset)!r} cannot be streamed: {error}") from error
        return datasets.load_dataset(**source)
    except (FileNotFoundError, ConnectionError) as error:
        what = f"{str(dataset)!r} is neither a folder with data nor available from the Hub"
        raise ValueError(f"`dataset`: {what}: {error}") from error


def _check_column(features: Features, image_column: str, dataset: str | Path) -> None:
    import datasets

    if image_column not in features:
        raise ValueError(f"`image_column` must be one of {sorted(features)} in {str(dataset)!r}, got {image_column!r}")
    feature = features[image_column]
    encoded = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    plain = isinstance(feature, datasets.Value) and feature.dtype in (
        "string",
        "large_string",
        "binary",
        "large_binary",
    )
    if not (isinstance(feature, datasets.Image) or encoded or plain):
        raise ValueError(f"`image_column` must hold images; {image_column!r} in {str(dataset)!r} holds {feature}")
