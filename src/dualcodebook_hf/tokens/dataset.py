"""Token data sets: the tokens of a whole data set as parquet shards that `datasets.load_dataset` reads.

    DIR/tokens.json                          what made them, see `TokenDatasetInfo`
    DIR/data/train-00000-of-00012.parquet    a shard; it has its name once it is whole

Columns: `id` (text), `tokens` uint16 (augmentations, codebooks, h, w), `height` and `width` of the original, `crop`
float32 (augmentations, 4), each left, top, right, bottom in pixels of the original, `flip` bool (augmentations), then
those of the source. The footer of a shard repeats tokens.json under the key `dualcodebook_tokens`, and lists under
`skipped` the images that could not be read. (No README.md says where the shards lie: with one, `load_dataset` takes the
cached rows of any other folder of the same name.)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..configuration_dualcodebook import config_hash
from ..files import read_json, remove_leftovers, shared_file, write_json
from .augment import Augmentation
from .file import LARGEST_CODEBOOK, METADATA_KEY, check_hashes

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

    from ..core import DualCodebookCore

FORMAT_VERSION = 1
INFO, DATA = "tokens.json", "data"
RESERVED = ("id", "tokens", "height", "width", "crop", "flip", "image")  # no names for columns of the source
SKIPPED = b"skipped"
ROWS_PER_GROUP = 256  # rows that are held in memory before they are written


@dataclass(frozen=True, kw_only=True)
class TokenDatasetInfo:
    """Everything that the shards depend on, the images themselves apart: the content of tokens.json.

    Attributes:
        tokenizer: what the tokenizer is called.
        config_hash: of its architecture.
        weights_sha256: of its encoder and codebooks, see `encoder_hash`.
        downsample_factor: f; a crop's grid is (ceil(H/f), ceil(W/f)).
        books: {name: number of codes}, in the order of the tokens.
        bits_per_position: of all codebooks together.
        source: what was tokenized; its rows or files.
        num_shards: number of shards.
        augmentation: fields of `Augmentation`.
        settings: what else may change a token by rounding: batch size, type; and what bad images do.
        format_version: of this format.
    """

    tokenizer: str
    config_hash: str
    weights_sha256: str
    downsample_factor: int
    books: dict[str, int]
    bits_per_position: float
    source: dict[str, Any]
    num_shards: int
    augmentation: dict[str, Any]
    settings: dict[str, Any]
    format_version: int = FORMAT_VERSION

    @classmethod
    def of_model(cls, model: DualCodebookCore, weights_sha256: str, **others: Any) -> TokenDatasetInfo:
        """Of a tokenizer, its `encoder_hash`, and the fields that it does not tell."""
        return cls(
            config_hash=config_hash(model.config),
            weights_sha256=weights_sha256,
            downsample_factor=model.downsample_factor,
            books=dict(model.codebook_sizes),
            bits_per_position=model.bits_per_position,
            **others,
        )

    @classmethod
    def read(cls, folder: Path) -> TokenDatasetInfo | None:
        """Of a folder; None where it has none. Raises ValueError for a file of another format."""
        content = read_json(folder / INFO)
        if content is None:
            return None
        path = folder / INFO
        if content.get("format_version") != FORMAT_VERSION:
            version = content.get("format_version")
            raise ValueError(f"'{path}' must be of format version {FORMAT_VERSION}, got {version!r}")
        names = {field.name for field in fields(cls)}
        if set(content) != names:
            raise ValueError(f"'{path}' must have the entries {sorted(names)}, got {sorted(content)}")
        info = cls(**content)
        info._check(path)
        return info

    def _check(self, path: Path) -> None:
        for name in ("config_hash", "weights_sha256", "tokenizer"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"'{path}': `{name}` must be text, got {getattr(self, name)!r}")
        counts = {"num_shards": self.num_shards, "downsample_factor": self.downsample_factor}
        books = self.books if isinstance(self.books, dict) and self.books else {"books": None}
        for name, value in {**counts, **books}.items():
            if not isinstance(value, int) or not 1 <= value <= (LARGEST_CODEBOOK if name in books else 10**9):
                raise ValueError(f"'{path}': `{name}` must be a positive whole number, got {value!r}")
        if not all(isinstance(part, dict) for part in (self.source, self.augmentation, self.settings)):
            raise ValueError(f"'{path}': `source`, `augmentation` and `settings` must be objects")
        try:
            _ = self.crops
            split = self.source["split"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"'{path}' is damaged: {type(error).__name__} {error}") from error
        if not isinstance(split, str) or Path(split).name != split:
            raise ValueError(f"'{path}': the source's split must be a plain name, got {split!r}")

    @property
    def crops(self) -> Augmentation:
        """The crops of each image."""
        return Augmentation(**{**self.augmentation, "crop_ranges": tuple(self.augmentation["crop_ranges"])})

    def create(self, folder: Path) -> None:
        """Writes tokens.json into a new folder; one that has it is continued.

        Raises ValueError where the folder holds a data set that was made otherwise; it names what differs.
        """
        there = self.read(folder)
        if there is None:
            (folder / DATA).mkdir(parents=True, exist_ok=True)
            write_json(folder / INFO, asdict(self), shared=True)
            return
        mine, theirs = json.loads(json.dumps(asdict(self))), asdict(there)
        different = [f"{key} {theirs[key]!r} there, {mine[key]!r} here" for key in mine if mine[key] != theirs[key]]
        if different:
            raise ValueError(f"`output`: '{folder}' holds tokens that were made otherwise: {'; '.join(different)}")

    def shard_path(self, folder: Path, shard: int) -> Path:
        """Where a shard lies, or will."""
        return folder / DATA / f"{self.source['split']}-{shard:05d}-of-{self.num_shards:05d}.parquet"

    def missing(self, folder: Path) -> list[int]:
        """Numbers of the shards that are not there."""
        there = {path.name for path in (folder / DATA).glob("*.parquet")}
        return [shard for shard in range(self.num_shards) if self.shard_path(folder, shard).name not in there]

    def clear_leftovers(self, folder: Path) -> None:
        """Of a data set that is whole: deletes what killed processes left in it under temporary names."""
        for part in (folder, folder / DATA):
            remove_leftovers(part)

    def check_model(
        self,
        model: DualCodebookCore,
        weights_sha256: str,
        source: str | Path,
        argument: str = "model",
        other_weights: bool = False,
    ) -> None:
        """Raises ValueError unless a model made the tokens: its architecture, encoder and codebooks.

        Args:
            model: that is to decode them.
            weights_sha256: `encoder_hash` of it.
            source: what the message calls the data set.
            argument: what the message calls `model`.
            other_weights: see `check_hashes`.
        """
        made = self.config_hash, self.weights_sha256, self.books, self.downsample_factor
        check_hashes(*made, model, weights_sha256, source, argument, other_weights)

    def features(self, columns: Mapping[str, Any]) -> datasets.Features:
        """Columns of the shards, those of the source behind the tokens'."""
        import datasets

        count, grid = self.crops.count, self.crops.grid(self.downsample_factor)
        tokens: Any = datasets.Value("uint16")
        if grid is None:
            for _ in range(4):
                tokens = datasets.List(tokens)
        else:
            tokens = datasets.Array4D((count, len(self.books), *grid), "uint16")
        own = {"id": datasets.Value("string"), "tokens": tokens}
        own |= {"height": datasets.Value("int32"), "width": datasets.Value("int32")}
        own |= {"crop": datasets.Array2D((count, 4), "float32"), "flip": datasets.List(datasets.Value("bool"))}
        return datasets.Features({**own, **columns})


@contextmanager
def write_shard(path: Path, features: datasets.Features, metadata: Mapping[str, Any]) -> Iterator[ShardWriter]:
    """Yields a writer of rows; at the end the shard has its name, or nothing is left behind.

    Another process that writes the same shard does no harm, see `shared_file`.

    Args:
        path: of the shard.
        features: of its columns.
        metadata: JSON-ready, for the footer.
    """
    with shared_file(path) as partial:
        writer = ShardWriter(partial, features, metadata)
        try:
            yield writer
        finally:
            writer.close()


class ShardWriter:
    """Writes rows into a parquet file, a few hundred at a time.

    Attributes:
        rows: how many were added.
        skipped: what stands in the footer under "skipped".
    """

    def __init__(self, path: Path, features: datasets.Features, metadata: Mapping[str, Any]) -> None:
        import pyarrow.parquet as pq

        self.features, self.rows = features, 0
        self.skipped: list[dict[str, Any]] = []
        schema = features.arrow_schema
        own = {METADATA_KEY: json.dumps(metadata)}
        self.schema = schema.with_metadata({**schema.metadata, **own})
        self._writer = pq.ParquetWriter(path, self.schema, compression="zstd")
        self._waiting: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row with all columns; arrays may be numpy's."""
        self.rows += 1
        self._waiting.append(row)
        if len(self._waiting) == ROWS_PER_GROUP:
            self._flush()

    def close(self) -> None:
        """Writes what is left and the footer."""
        if self._waiting:
            self._flush()
        self._writer.add_key_value_metadata({SKIPPED: json.dumps(self.skipped)})
        self._writer.close()

    def _flush(self) -> None:
        import datasets

        columns = {name: [row[name] for row in self._waiting] for name in self.features}
        self._waiting = []
        table = datasets.Dataset.from_dict(columns, features=self.features).data.table
        self._writer.write_table(table.cast(self.schema))


class TokenDataset:
    """A token data set on this machine, whole.

    Args:
        folder: that `tokenize-dataset` wrote.
        argument: what messages call it.

    Attributes:
        folder: as given.
        info: content of tokens.json.
        shards: paths of the shards, in order.

    Raises ValueError where it is none, or where shards are missing.
    """

    def __init__(self, folder: str | Path, argument: str = "tokens") -> None:
        self.folder = Path(folder).expanduser()
        info = TokenDatasetInfo.read(self.folder)
        if info is None:
            raise ValueError(f"`{argument}`: '{folder}' is no token data set: there is no {INFO} in it")
        missing = info.missing(self.folder)
        if missing:
            first = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            raise ValueError(
                f"`{argument}`: of the {info.num_shards} shards in '{folder}' {len(missing)} are missing ({first}): "
                "run the same `tokenize-dataset` again, which does them alone"
            )
        self.info = info
        self.shards = [info.shard_path(self.folder, shard) for shard in range(info.num_shards)]

    @cached_property
    def features(self) -> datasets.Features:
        """Of its columns, labels with their names."""
        import datasets
        import pyarrow.parquet as pq

        return datasets.Features.from_arrow_schema(pq.read_schema(self.shards[0]))

    def __len__(self) -> int:
        """Number of images."""
        return sum(summary.rows for summary in map(read_summary, self.shards))

    def rows(self, shards: Sequence[Path] | None = None) -> Iterator[dict[str, Any]]:
        """Rows, in order; `tokens` as uint16 (A, books, h, w), `crop` as float32 (A, 4). Of all shards or of some."""
        for path in self.shards if shards is None else shards:
            yield from _read_rows(path)


@dataclass(frozen=True)
class ShardSummary:
    """What a shard's footer tells.

    Attributes:
        rows: number of images.
        skipped: those that could not be read, as {"id", "file", "reason"}.
        made_by: what made it, as `write_shard` was given it.
    """

    rows: int
    skipped: list[dict[str, Any]]
    made_by: dict[str, Any]


def read_summary(path: Path) -> ShardSummary:
    """Reads a shard's footer. Raises ValueError where it has none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        footer = pq.read_metadata(path)
        skipped, made_by = (
            json.loads((footer.metadata or {}).get(key, b"null")) for key in (SKIPPED, METADATA_KEY.encode())
        )
        return ShardSummary(footer.num_rows, skipped or [], made_by or {})
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"cannot read the shard '{path}': {error}; delete it, and tokenize again") from error


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=ROWS_PER_GROUP):
                columns = {name: _python(batch.column(name), name) for name in batch.schema.names}
                for number in range(batch.num_rows):
                    yield {name: values[number] for name, values in columns.items()}
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"cannot read the shard '{path}': {error}; delete it, and tokenize again") from error


def _python(column: pa.Array, name: str) -> Sequence[Any]:
    """A column's values: arrays of numbers by numpy, the rest as Python's."""
    if name not in ("tokens", "crop"):
        return column.to_pylist()
    storage = column.storage if hasattr(column, "storage") else column
    dtype = np.uint16 if name == "tokens" else np.float32
    return [_array(value, dtype) for value in storage]


def _array(value: pa.Scalar, dtype: Any) -> np.ndarray:
    """A scalar of nested lists, all of one length at each depth, as an array."""
    values, shape = value.values, []
    shape.append(len(values))
    while hasattr(values.type, "value_type"):
        inner = values.flatten()
        shape.append(len(inner) // len(values))
        values = inner
    return values.to_numpy(zero_copy_only=False).astype(dtype, copy=False).reshape(shape)
