"""A data set -> a token data set, shard by shard; every engine runs `ShardTokenizer` on some of the shards."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..image_datasets import ON_BAD_IMAGE, check_skipped
from ..inference import optimize_for_inference
from ..loading import load_tokenizer_with_hash, tokenizer_label
from ..pil_images import BadImageError
from .augment import Augmentation, Crops
from .dataset import TokenDatasetInfo, write_shard
from .source import OpenSource, SourceRow, TokenSource

if TYPE_CHECKING:
    from ..autoencoder_dualcodebook import DualCodebookVQModel

ROWS_PER_SHARD = 10_000  # of a table, unless the number of shards is given
BATCHES_AHEAD = 3  # of decoded images, so that the model never waits


@dataclass(frozen=True, kw_only=True)
class TokenizeJob:
    """All settings of one run; it can be pickled.

    Attributes:
        source: what is tokenized.
        output: folder of the token data set.
        augmentation: which crops of each image.
        num_shards: None: one for each 10,000 rows, or for each file of a stream.
        model: folder or Hub id; None: the embedded checkpoint.
        device: None: CUDA where there is one; with several, that of the process's number.
        dtype: of the network, float32 or float16; bfloat16: of its convolutions, the sums stay in float32.
        batch_size: crops in one forward pass.
        workers: threads that read and crop images; None: one for each core that the process may use.
        on_bad_image: what an image that cannot be read does, "error" or "skip".
    """

    source: TokenSource
    output: str
    augmentation: Augmentation = field(default_factory=Augmentation)
    num_shards: int | None = None
    model: str | None = None
    device: str | None = None
    dtype: str = "float32"
    batch_size: int = 32
    workers: int | None = None
    on_bad_image: str = "error"

    def __post_init__(self) -> None:
        if self.on_bad_image not in ON_BAD_IMAGE:
            raise ValueError(f"`on_bad_image` must be one of {', '.join(ON_BAD_IMAGE)}, got {self.on_bad_image!r}")
        for name in ("num_shards", "batch_size", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")

    def at_absolute_paths(self) -> TokenizeJob:
        """The same for processes in other working folders."""
        source, model = (
            os.path.abspath(x) if x and os.path.exists(x) else x for x in (self.source.dataset, self.model)
        )
        output = os.path.abspath(self.output)
        return replace(self, source=replace(self.source, dataset=source), model=model, output=output)

    def prepare(self) -> ShardTokenizer:
        """Opens the source, loads the model, and creates the output folder or checks that it is this job's.

        Raises ValueError for whatever is wrong, before any image is read.
        """
        source = self.source.open()
        num_shards = check_num_shards(self.num_shards, source)
        job = replace(self, num_shards=num_shards)
        model, weights = _load(job)
        info = TokenDatasetInfo.of_model(
            model,
            weights,
            tokenizer=tokenizer_label(job.model),
            source=job.source.record() | source.size | {"columns": list(job.source.columns)},
            num_shards=num_shards,
            augmentation=asdict(job.augmentation) | {"crop_ranges": list(job.augmentation.crop_ranges)},
            settings={"batch_size": job.batch_size, "dtype": job.dtype, "on_bad_image": job.on_bad_image},
        )
        info.create(Path(job.output))
        return ShardTokenizer(job, source, model, info)


def _load(job: TokenizeJob) -> tuple[DualCodebookVQModel, str]:
    """The model, made fast, and its weights' hash. No choice is left to the machine: all processes make the same."""
    inside = job.dtype == "bfloat16"
    dtype = "float32" if inside else job.dtype
    model, weights = load_tokenizer_with_hash(job.model, device=_own_device(job.device), dtype=dtype)
    compile = model.device.type == "cuda" and job.augmentation.kind != "none"  # images of many sizes: many compilations
    return optimize_for_inference(model, torch.bfloat16 if inside else torch.float32, compile), weights


def check_num_shards(wanted: int | None, source: OpenSource) -> int:
    """The number of shards. Raises ValueError for more than the source can be cut into, and for an empty source."""
    ((unit, count),) = source.size.items()
    if not count:
        raise ValueError(f"`dataset`: there are no images in {source.source.dataset!r} ({source.source.split})")
    if wanted is None:
        return count if source.source.streaming else -(-count // ROWS_PER_SHARD)
    if wanted > count:
        raise ValueError(f"`num_shards` must be at most {count}, the {unit} of {source.source.dataset!r}, got {wanted}")
    return wanted


class Shard(NamedTuple):
    """What came of a shard.

    Attributes:
        number: from 0.
        rows: images in it.
        skipped: images that could not be read.
    """

    number: int
    rows: int
    skipped: list[BadImageError]


class ShardTokenizer:
    """Writes shards; what it writes depends on the job and the shard's number alone.

    `TokenizeJob.prepare` makes it. Called with {"shard": numbers}, a batch of Ray Data, it writes these shards.

    Attributes:
        job: its settings.
        source: opened.
        model: in eval mode.
        info: what tokens.json holds.
    """

    def __init__(
        self, job: TokenizeJob, source: OpenSource, model: DualCodebookVQModel, info: TokenDatasetInfo
    ) -> None:
        self.job, self.source, self.model, self.info = job, source, model, info
        self.output = Path(job.output)

    def write(self, shard: int, on_row: Callable[[], None] = lambda: None) -> Shard:
        """Writes one shard.

        Args:
            shard: its number.
            on_row: called after each image.

        Raises BadImageError for an image that cannot be read or, where these are skipped, for too many in this shard.
        """
        path = self.info.shard_path(self.output, shard)
        features = self.info.features(self.source.features)
        skipped: list[BadImageError] = []
        with write_shard(path, features, asdict(self.info)) as writer, closing(self._decoded(shard)) as decoded:
            for row, crops, tokens in self._tokenized(self._readable(decoded, skipped, writer.skipped)):
                writer.add(_columns(row, crops, tokens, self.job.source.columns))
                on_row()
        return Shard(shard, writer.rows, skipped)

    def _decoded(self, shard: int) -> Iterator[tuple[SourceRow, _Decoded | BadImageError]]:
        """The rows of a shard in order, decoded and cropped by threads, some batches ahead."""
        rows_ahead = BATCHES_AHEAD * max(1, self.job.batch_size // self.job.augmentation.count)
        workers = self.job.workers or len(os.sched_getaffinity(0))
        with ThreadPoolExecutor(workers) as pool:
            waiting: deque = deque()
            try:
                for row in self.source.rows(shard, self.info.num_shards):
                    waiting.append((row, pool.submit(self._decode, row)))
                    if len(waiting) > rows_ahead + workers:
                        first, result = waiting.popleft()
                        yield first, result.result()
                for first, result in waiting:
                    yield first, result.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _decode(self, row: SourceRow) -> _Decoded | BadImageError:
        try:
            image = self.source.split.read(row.row, row.index)
        except BadImageError as error:
            return error
        return _Decoded(image.height, image.width, self.job.augmentation(image, row.key))

    def _readable(
        self,
        decoded: Iterable[tuple[SourceRow, _Decoded | BadImageError]],
        skipped: list[BadImageError],
        record: list[dict[str, Any]],
    ) -> Iterator[tuple[SourceRow, _Decoded]]:
        """The images that could be read; the others are added to `skipped`, and to the record in the shard."""
        for read, (row, image) in enumerate(decoded, start=1):
            if not isinstance(image, BadImageError):
                yield row, image
                continue
            if self.job.on_bad_image == "error":
                raise image
            skipped.append(image)
            record.append({"id": row.id, "file": image.file and Path(image.file).name, "reason": image.reason})
            check_skipped(image, len(skipped), read)

    def _tokenized(
        self, images: Iterable[tuple[SourceRow, _Decoded]]
    ) -> Iterator[tuple[SourceRow, _Decoded, np.ndarray]]:
        """Images with the tokens of their crops, uint16 (A, codebooks, h, w).

        The device works on a batch while the one before is fetched and written.
        """
        before: tuple[list[tuple[SourceRow, _Decoded]], torch.Tensor] | None = None
        count = max(1, self.job.batch_size // self.job.augmentation.count)
        for batch in _batches(images, count):
            pixels = np.concatenate([image.crops.pixels for _, image in batch])
            if self.model.device.type == "cuda" and self.job.augmentation.kind != "none":
                # A compiled network's sums depend on the shapes that it saw before: so there is only one.
                missing = count * self.job.augmentation.count - len(pixels)
                pixels = np.concatenate([pixels, np.zeros((missing, *pixels.shape[1:]), np.uint8)])
            tokens = self._tokens(pixels)
            if before is not None:
                yield from _with_tokens(*before)
            before = batch, tokens
        if before is not None:
            yield from _with_tokens(*before)

    @torch.no_grad()
    def _tokens(self, pixels: np.ndarray) -> torch.Tensor:
        """uint8 (N, H, W, 3) -> tokens (N, codebooks, h, w) on the model's device."""
        parts = []
        for part in torch.from_numpy(pixels).split(self.job.batch_size):
            x = part.to(self.model.device, non_blocking=True).permute(0, 3, 1, 2).contiguous().float()
            parts.append(self.model.tokenize(x.div_(255).mul_(2).sub_(1).to(self.model.dtype)))
        return torch.cat(parts)


class _Decoded(NamedTuple):
    """A decoded image: its size, and its crops."""

    height: int
    width: int
    crops: Crops


def _batches(images: Iterable[tuple[SourceRow, _Decoded]], count: int) -> Iterator[list[tuple[SourceRow, _Decoded]]]:
    """Images that follow each other and whose crops are of one size, `count` at the most."""
    batch: list[tuple[SourceRow, _Decoded]] = []
    for row, image in images:
        shape = image.crops.pixels.shape
        if batch and (len(batch) == count or shape != batch[0][1].crops.pixels.shape):
            yield batch
            batch = []
        batch.append((row, image))
    if batch:
        yield batch


def _with_tokens(
    batch: Sequence[tuple[SourceRow, _Decoded]], tokens: torch.Tensor
) -> Iterator[tuple[SourceRow, _Decoded, np.ndarray]]:
    values, count = tokens.cpu().numpy().astype(np.uint16), len(batch[0][1].crops.pixels)
    for number, (row, image) in enumerate(batch):
        yield row, image, values[number * count : (number + 1) * count]


def _columns(row: SourceRow, image: _Decoded, tokens: np.ndarray, columns: Sequence[str]) -> dict[str, Any]:
    own = {"id": row.id, "tokens": tokens, "height": image.height, "width": image.width}
    own |= {"crop": image.crops.boxes, "flip": image.crops.flips.tolist()}
    return own | {name: row.row[name] for name in columns}


def _own_device(device: str | None) -> str | None:
    """The GPU of this process, where a launcher started several and none is named."""
    if device is None and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return device
