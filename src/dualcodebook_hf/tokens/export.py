"""Token data sets in the forms that trainers of generators read.

A position has one token of each codebook. Trainers that know one codebook get the product id
`(global * N_local + local)`, in [0, N_global * N_local), as `quantize.from_product_ids` takes it back.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..files import atomic_folder, write_json
from .dataset import INFO, TokenDataset

MDS_SHARD_BYTES = 2**26
LABELLED = ("llamagen", "jsonl")  # forms that cannot be without a label


class ExportedRow(NamedTuple):
    """What a form takes of a row.

    Attributes:
        id: of the row.
        tokens: uint16 (A, codebooks, h, w).
        label: a class's number; None without a column of labels.
    """

    id: str
    tokens: np.ndarray
    label: int | None


def export_tokens(
    tokens: TokenDataset, form: str, output: str | Path, label_column: str | None = None, progress: Any = iter
) -> None:
    """Writes a folder in one of `FORMS`, which appears whole or not at all, with tokens.json beside.

    - llamagen: imagenetS_codes/N.npy int64 (1, A, h*w) of product ids, imagenetS_labels/N.npy int64 (1,), N from 0.
    - jsonl: 1d-tokenizer's pretokenized.jsonl, a line {"class_id", "tokens"} of product ids for each crop.
    - mds: MosaicML streaming's shards with the columns `id`, `tokens` (ndarray:uint16:A,codebooks,h,w) and `label`.
    - memmap: tokens.npy uint16 (images, A, codebooks, h, w) for `numpy.load(mmap_mode="r")`, and labels.npy int64.

    Args:
        tokens: the data set.
        form: one of `FORMS`.
        output: a new or empty folder.
        label_column: column of classes; None: `label` where there is one.
        progress: wraps the rows' iterator, as tqdm does.

    Raises ValueError for an unknown form, crops of different sizes, a column that holds no class, and a missing one.
    """
    if form not in FORMS:
        raise ValueError(f"`form` must be one of {', '.join(FORMS)}, got {form!r}")
    if tokens.info.crops.kind == "none":
        raise ValueError(f"`tokens`: '{tokens.folder}' holds whole images; {form} needs crops of one size")
    column = _label_column(tokens, form, label_column)
    with atomic_folder(output) as folder:
        folder.mkdir(parents=True)
        FORMS[form](tokens, _Rows(tokens, column, progress), folder)
        write_json(folder / INFO, asdict(tokens.info) | {"form": form})


def _label_column(tokens: TokenDataset, form: str, wanted: str | None) -> str | None:
    column = wanted or ("label" if "label" in tokens.features else None)
    if column is None and form not in LABELLED:
        return None
    feature = tokens.features.get(column)
    if not getattr(feature, "dtype", "").startswith(("int", "uint")):
        what = "there is none" if feature is None else f"{column!r} holds {feature}"
        raise ValueError(
            f"`label_column` must be a column of whole numbers or classes, {what}: name it, and keep it by "
            "`tokenize-dataset --columns`"
        )
    return column


class _Rows:
    """The rows, as often as they are asked for; a label that is missing is an error."""

    def __init__(self, tokens: TokenDataset, column: str | None, progress: Callable[[Iterator], Iterator]) -> None:
        self.tokens, self.column, self.progress = tokens, column, progress

    def __iter__(self) -> Iterator[ExportedRow]:
        for row in self.progress(self.tokens.rows()):
            label = row[self.column] if self.column else None
            if self.column and label is None:
                raise ValueError(f"`label_column`: the image {row['id']!r} has no {self.column!r}")
            yield ExportedRow(row["id"], row["tokens"], label)


def product_ids(tokens: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Tokens (A, codebooks, h, w) -> int64 (A, h*w), see `Quantizer.to_product_ids`."""
    ids = np.zeros(tokens[:, 0].shape, np.int64)
    for book, size in enumerate(sizes):
        ids = ids * size + tokens[:, book]
    return ids.reshape(len(ids), -1)


def _llamagen(tokens: TokenDataset, rows: _Rows, folder: Path) -> None:
    sizes, side = list(tokens.info.books.values()), tokens.info.crops.size
    codes, labels = (folder / f"imagenet{side}_{what}" for what in ("codes", "labels"))
    codes.mkdir()
    labels.mkdir()
    for number, row in enumerate(rows):
        np.save(codes / f"{number}.npy", product_ids(row.tokens, sizes)[None])
        np.save(labels / f"{number}.npy", np.array([row.label], np.int64))


def _jsonl(tokens: TokenDataset, rows: _Rows, folder: Path) -> None:
    sizes = list(tokens.info.books.values())
    with open(folder / "pretokenized.jsonl", "w", encoding="utf-8") as file:
        for row in rows:
            for ids in product_ids(row.tokens, sizes).tolist():
                file.write(json.dumps({"class_id": row.label, "tokens": ids}) + "\n")


def _memmap(tokens: TokenDataset, rows: _Rows, folder: Path) -> None:
    count = len(tokens)
    shape = (count, *tokens.features["tokens"].shape)
    array = np.lib.format.open_memmap(folder / "tokens.npy", "w+", np.uint16, shape)
    labels = np.lib.format.open_memmap(folder / "labels.npy", "w+", np.int64, (count,)) if rows.column else None
    for number, row in enumerate(rows):
        array[number] = row.tokens
        if labels is not None:
            labels[number] = row.label
    array.flush()


def _mds(tokens: TokenDataset, rows: _Rows, folder: Path) -> None:
    """MDS, version 2: mosaicml-streaming itself cannot be installed beside this package (transformers below 5)."""
    shape = ",".join(map(str, tokens.features["tokens"].shape))
    columns = {"id": ("str", None), "tokens": (f"ndarray:uint16:{shape}", None)}
    if rows.column:
        columns["label"] = ("int", 8)
    columns["tokens"] = (columns["tokens"][0], 2 * int(np.prod(tokens.features["tokens"].shape)))
    names = sorted(columns)
    config = {
        "version": 2,
        "format": "mds",
        "compression": None,
        "hashes": [],
        "size_limit": MDS_SHARD_BYTES,
        "column_names": names,
        "column_encodings": [columns[name][0] for name in names],
        "column_sizes": [columns[name][1] for name in names],
    }
    shards, samples, size = [], [], 0

    def write() -> None:
        name = f"shard.{len(shards):05d}.mds"
        data = _mds_shard(samples, json.dumps(config, sort_keys=True).encode())
        (folder / name).write_bytes(data)
        raw = {"basename": name, "bytes": len(data), "hashes": {}}
        shards.append({**config, "samples": len(samples), "raw_data": raw, "zip_data": None})

    for row in rows:
        sample = _mds_sample(row)
        if samples and size + len(sample) > MDS_SHARD_BYTES:
            write()
            samples, size = [], 0
        samples.append(sample)
        size += len(sample)
    if samples:
        write()
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards}, sort_keys=True))


def _mds_sample(row: ExportedRow) -> bytes:
    """The sizes of columns without a fixed one (`id`), then the columns' bytes in the order of their names."""
    name = row.id.encode()
    label = b"" if row.label is None else struct.pack("<q", row.label)
    return struct.pack("<I", len(name)) + name + label + row.tokens.astype("<u2").tobytes()


def _mds_shard(samples: list[bytes], config: bytes) -> bytes:
    """Number of samples, where each begins and the last one ends, the columns as JSON, the samples."""
    start = 4 + 4 * (len(samples) + 1) + len(config)
    offsets = np.cumsum([start, *map(len, samples)]).astype("<u4")
    return b"".join([struct.pack("<I", len(samples)), offsets.tobytes(), config, *samples])


FORMS: dict[str, Callable[[TokenDataset, _Rows, Path], None]] = {
    "llamagen": _llamagen,
    "jsonl": _jsonl,
    "mds": _mds,
    "memmap": _memmap,
}
