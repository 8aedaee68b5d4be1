"""Images from any source that `datasets` reads: one place for training and for measuring."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset


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
    """Opens one split of a data set of images, not decoded: `read_image(image_source(row[image_column]))` decodes.

    `dataset` is a Hub id, a folder of parquet files, a folder of images (with or without subfolders named as the
    splits), one parquet file (its split is "train") or a folder written by `save_to_disk`. `config` names one of the
    data set's configurations. Streaming reads rows in order as they are asked for and prepares nothing on disk.

    Raises ValueError, before any row is read, when the folder does not exist or holds no data, when the split does not
    exist (its message names those that do), and when the column does not exist or cannot hold images.
    """
    import datasets

    path = Path(dataset).expanduser()
    saved = path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    if saved:
        if config is not None:
            raise DatasetError("config", f"must be None for a folder written by save_to_disk, got {config!r}")
        opened = datasets.load_from_disk(str(path))
        splits = opened if isinstance(opened, datasets.DatasetDict) else {str(opened.split or "train"): opened}
    else:
        source = {**_source(dataset, path), "name": config}
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


def image_source(value: dict[str, Any]) -> bytes | str:
    """The encoded bytes, or the local path, of one entry of the image column that `load_images` opened.

    Raises ValueError when the row holds no image.
    """
    data, path = value["bytes"] if value else None, value["path"] if value else None
    if data is not None:
        return data
    if path is None:
        raise ValueError("a row of the data set holds no image: its `bytes` and `path` are both empty")
    if "://" in path:  # streamed from the Hub, or out of an archive
        import fsspec

        with fsspec.open(path, "rb") as file:
            return file.read()
    return path


def _source(dataset: str | Path, path: Path) -> dict[str, Any]:
    """The arguments of `datasets.load_dataset` that say where the data is."""
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"`dataset` must be a Hub id, a folder or a .parquet file, got the file {str(path)!r}")
        return {"path": "parquet", "data_files": str(path)}
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
