"""A token data set -> a data set of images, shard by shard, as `datasets.load_dataset` reads it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..image_processing_dualcodebook import to_image
from ..pil_images import DEFAULT_MAX_PIXELS, size_within
from ..weights import weights_hash
from .dataset import DATA, RESERVED, TokenDataset, read_summary, write_shard

if TYPE_CHECKING:
    from ..autoencoder_dualcodebook import DualCodebookVQModel


class ShardDetokenizer:
    """Writes shards of images, each of the shard of tokens of the same number alone.

    Columns: `id`, `image` (PNG), and those of the source.

    Args:
        tokens: what is decoded.
        model: that made them, in eval mode.
        weights_sha256: of its weights.
        output: folder, continued where it holds images of the same tokens.
        crop: which of an image's crops.
        batch_size: crops in one forward pass.
        other_weights: take any model of such codebooks.
        argument: what messages call `model`.

    Raises ValueError for another model than the one that made the tokens, for a `crop` that is not there, and for an
    `output` with images of other tokens, of another crop, or by other weights.
    """

    def __init__(
        self,
        tokens: TokenDataset,
        model: DualCodebookVQModel,
        weights_sha256: str,
        output: str | Path,
        *,
        crop: int = 0,
        batch_size: int = 32,
        other_weights: bool = False,
        argument: str = "model",
    ) -> None:
        tokens.info.check_model(model, weights_sha256, tokens.folder, argument, other_weights)
        count = tokens.info.crops.count
        if not 0 <= crop < count:
            raise ValueError(f"`crop` must lie in [0, {count}), the crops of an image in '{tokens.folder}', got {crop}")
        self.tokens, self.model, self.output = tokens, model, Path(output)
        self.crop, self.batch_size = crop, batch_size
        self.metadata = asdict(tokens.info) | {"crop": crop, "model_sha256": weights_hash(model)}
        self._check_output()
        (self.output / DATA).mkdir(parents=True, exist_ok=True)

    def _check_output(self) -> None:
        first = min((self.output / DATA).glob("*.parquet"), default=None)
        if first is None:
            return
        theirs = read_summary(first).made_by
        different = [key for key, value in self.metadata.items() if theirs.get(key) != value]
        if different:
            raise ValueError(f"`output`: '{first}' was made otherwise, by another {', '.join(different)}")

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there."""
        return self.tokens.info.missing(self.output)

    def write(self, shard: int, on_row: Callable[[], None] = lambda: None) -> int:
        """Writes one shard and returns its number of images; `on_row` is called after each."""
        import datasets

        columns = {name: kind for name, kind in self.tokens.features.items() if name not in RESERVED}
        features = datasets.Features({"id": datasets.Value("string"), "image": datasets.Image(), **columns})
        path = self.tokens.info.shard_path(self.output, shard)
        with write_shard(path, features, self.metadata) as writer, ThreadPoolExecutor() as pool:
            for batch in self._batches(self.tokens.rows([self.tokens.shards[shard]])):
                for row, data in zip(batch, pool.map(_png, self._decode(batch)), strict=True):
                    image = {"bytes": data, "path": f"{row['id']}.png"}
                    writer.add({name: row[name] for name in columns} | {"id": row["id"], "image": image})
                    on_row()
        return writer.rows

    def _batches(self, rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        """Rows that follow each other and whose crops are of one size."""
        batch: list[dict[str, Any]] = []
        for row in rows:
            if batch and (len(batch) == self.batch_size or self._size(row) != self._size(batch[0])):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _size(self, row: dict[str, Any]) -> tuple[int, int]:
        """(H, W) of a row's crops."""
        augmentation = self.tokens.info.crops
        if augmentation.kind != "none":
            return augmentation.size, augmentation.size
        width, height = size_within(row["width"], row["height"], DEFAULT_MAX_PIXELS)
        return height, width

    @torch.no_grad()
    def _decode(self, rows: list[dict[str, Any]]) -> torch.Tensor:
        """(B, 3, H, W) on the CPU."""
        tokens = np.stack([row["tokens"][self.crop] for row in rows]).astype(np.int64)
        return self.model.detokenize(torch.from_numpy(tokens).to(self.model.device), size=self._size(rows[0])).cpu()


def _png(pixels: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    to_image(pixels).save(buffer, "PNG")
    return buffer.getvalue()
