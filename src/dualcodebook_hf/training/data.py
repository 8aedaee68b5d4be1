"""Images of data sets -> endless training batches, a function of (seed, position) alone, and validation batches."""

from __future__ import annotations

import itertools
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import methodcaller
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm.auto import tqdm

from ..image_datasets import ON_BAD_IMAGE, ImageReader, ImageSplit, ImageSplits, check_skipped
from ..image_processing_dualcodebook import (
    BadImageError,
    cut_for_enlargement,
    resampling_filter,
    resize_shorter_side,
    to_pixels,
)
from .arguments import resize_sizes
from .sources import open_splits

if TYPE_CHECKING:
    from collections.abc import Callable

    import datasets

    from .arguments import DataArguments

PREFETCHED_BATCHES = 4  # of each worker process
BAD_IN_A_ROW = 10  # samples after a bad one that are tried in its place


class ImageTransform:
    """RGB image -> square crop, a pure function of (image, seed, epoch, index): nothing else is random.

    First the resize that is asked for, to one of several sizes by chance. Then an image whose shorter side is still
    below `resolution` is enlarged until it fits. Then the crop, and a mirror image in half of the cases where asked
    for. Of an image that is too long to be enlarged the middle is taken, see `cut_for_enlargement`.

    Args:
        resolution: side R of the crop, in pixels.
        resize: pixels to resize to before the crop; 0: no such resize; several: one of them at random.
        resize_mode: "shorter" brings the shorter side to `resize`, "exact" brings both sides there whatever the aspect
            (paper: the authors' CelebA-HQ).
        resample: PIL's filter of both resizes, "bilinear", "bicubic" or "lanczos".
        crop: "random" or "center".
        horizontal_flip: mirror at random.
        seed: not negative.

    Raises ValueError for arguments out of range.
    """

    def __init__(
        self,
        resolution: int,
        *,
        resize: int | Sequence[int] = 0,
        resize_mode: str = "shorter",
        resample: str = "bilinear",
        crop: str = "random",
        horizontal_flip: bool = False,
        seed: int = 0,
    ) -> None:
        if resolution < 1:
            raise ValueError(f"`resolution` must be at least 1, got {resolution}")
        sizes = resize_sizes(resize, resolution)
        if resize_mode not in ("shorter", "exact"):
            raise ValueError(f"`resize_mode` must be shorter or exact, got {resize_mode!r}")
        if crop not in ("random", "center"):
            raise ValueError(f"`crop` must be random or center, got {crop!r}")
        if seed < 0:
            raise ValueError(f"`seed` must be at least 0, got {seed}")
        self.resolution, self.sizes, self.resize_mode = resolution, sizes, resize_mode
        self.filter = resampling_filter(resample)
        self.random_crop, self.horizontal_flip, self.seed = crop == "random", horizontal_flip, seed

    def __call__(self, image: Image.Image, epoch: int = 0, index: int = 0) -> torch.Tensor:
        """RGB image of any size -> (3, R, R) float32 in [-1, 1]."""
        return self.crop(self.resize(image, self.draw_size(epoch, index)), epoch, index)

    def draw_size(self, epoch: int, index: int) -> int:
        """The size that this image is resized to, one of `resize`."""
        if len(self.sizes) == 1:
            return self.sizes[0]
        # Its own generator: crops are the same whether one size is given or several.
        return int(np.random.default_rng([self.seed, epoch, index, len(self.sizes)]).choice(self.sizes))

    def resize(self, image: Image.Image, size: int) -> np.ndarray:
        """The part without chance: RGB image -> uint8 (H, W, 3), both sides at least R."""
        if size and self.resize_mode == "exact":
            image = image.resize((size, size), self.filter)
        elif size:
            image = resize_shorter_side(cut_for_enlargement(image, size), size, self.filter)
        if min(image.size) < self.resolution:
            image = cut_for_enlargement(image, self.resolution)
            image = resize_shorter_side(image, self.resolution, self.filter)
        return np.asarray(image)

    def crop(self, pixels: np.ndarray, epoch: int, index: int) -> torch.Tensor:
        """uint8 (H, W, 3), sides at least R -> (3, R, R) float32 in [-1, 1]."""
        room = np.subtract(pixels.shape[:2], self.resolution)
        rng = np.random.default_rng([self.seed, epoch, index])
        top, left = rng.integers(0, room + 1) if self.random_crop else room // 2
        pixels = pixels[top : top + self.resolution, left : left + self.resolution]
        if self.horizontal_flip and rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        return to_pixels(Image.fromarray(np.ascontiguousarray(pixels)))


class Sample(NamedTuple):
    """One element of the endless sequence.

    Attributes:
        epoch: from 0.
        index: of the row in the tables; of streams, the number in the epoch's order.
        streamed: split and row; None where the tables can be asked for them by `index`.
    """

    epoch: int
    index: int
    streamed: tuple[ImageSplit, dict[str, Any]] | None


class Skipped(NamedTuple):
    """An image that was left out.

    Attributes:
        epoch: of its sample.
        error: which image, and why.
    """

    epoch: int
    error: BadImageError


class TrainingBatches(IterableDataset):
    """The endless stream of one process's batches, from any sample on. Give it to `DataLoader(batch_size=None)`.

    All processes walk one sequence of samples, epoch after epoch, each epoch in its own order. Global batch t is the
    samples [start + t*B*W, start + (t+1)*B*W), and process r of W takes the r-th B of them; batches cross the ends of
    epochs, so that every sample comes exactly once per epoch. Worker w of n makes the batches w, w+n, ..., which the
    loader puts back into order. So the batches depend on neither the number of workers nor, together, on that of
    processes, and a stream that starts at sample k is the tail of the one that starts at 0.

    - Tables are shuffled together by the permutation of default_rng([seed, epoch]); `index` is the row, those of the
      second data set following on those of the first.
    - A stream is shuffled by its buffer and the order of its files from the same generator; several give a row each in
      turn, until all have ended; `index` is the number in the epoch's order. To start at k they are replayed without
      decoding, whole epochs skipped once the first has told their length. Each process and each worker reads all of
      the streams and decodes its own part.

    With `on_bad_image` "skip", a sample that cannot be read shows the next one of the sequence that can, with its own
    crop and mirroring. This too depends on (seed, position) alone.

    A batch is {"pixel_values": (B, 3, R, R) float32 in [-1, 1], "index": (B,) int64, of what is shown, "skipped": list
    of `Skipped`}.

    Args:
        splits: of one or several data sets, all tables or all streams.
        transform: makes the crops.
        batch_size: B, of one process.
        seed: of the order.
        rank: r, of this process.
        world_size: W, number of processes.
        start: samples of all processes that were consumed before.
        shuffle_buffer: images in a stream's buffer.
        cache: keep images decoded and resized, as uint8 in memory: 3 bytes per pixel, once for each worker process
            and each size (256 x 256: 0.2 MB per image). Not for a stream.
        on_bad_image: "error" or "skip".

    Raises ValueError for arguments out of range, and while iterating for a data set without rows; BadImageError for an
    image that cannot be read and, where these are skipped, for more than 10 in a row.
    """

    def __init__(
        self,
        splits: Sequence[ImageSplit],
        transform: ImageTransform,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        shuffle_buffer: int = 1000,
        cache: bool = False,
        on_bad_image: str = "error",
    ) -> None:
        for argument, value, low in (
            ("batch_size", batch_size, 1),
            ("world_size", world_size, 1),
            ("shuffle_buffer", shuffle_buffer, 1),
            ("start", start, 0),
            ("seed", seed, 0),
        ):
            if value < low:
                raise ValueError(f"`{argument}` must be at least {low}, got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"`rank` must lie in [0, world_size={world_size}), got {rank}")
        self.images = ImageSplits(splits)
        if cache and self.images.streaming:
            raise ValueError("`cache` must be off for a streamed data set: its images have no fixed index")
        if on_bad_image not in ON_BAD_IMAGE:
            raise ValueError(f"`on_bad_image` must be one of {', '.join(ON_BAD_IMAGE)}, got {on_bad_image!r}")
        self.transform, self.on_bad_image = transform, on_bad_image
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.start, self.shuffle_buffer = start, shuffle_buffer
        self._cache: dict[tuple[int, int], np.ndarray] | None = {} if cache else None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        sequence = self._streamed() if self.images.streaming else self._permuted()
        window: list[Sample] = []  # of the sequence, from the global batch's first sample on

        def sample(place: int) -> Sample:
            window.extend(itertools.islice(sequence, max(0, place + 1 - len(window))))
            return window[place]

        for number in itertools.count():
            sample(self.batch_size * self.world_size - 1)
            if number % step == first:
                yield self._batch(sample)
            del window[: self.batch_size * self.world_size]

    def _permuted(self) -> Iterator[Sample]:
        length = len(self.images)
        if length == 0:
            raise ValueError(self._no_images())
        epoch, skip = divmod(self.start, length)
        while True:
            for index in np.random.default_rng([self.seed, epoch]).permutation(length)[skip:].tolist():
                yield Sample(epoch, index, None)
            epoch, skip = epoch + 1, 0

    def _streamed(self) -> Iterator[Sample]:
        epoch, skip = 0, self.start
        while True:
            # A stream of its own for each epoch: `set_epoch` writes to memory that forked workers share.
            rng = np.random.default_rng([self.seed, epoch])
            length = 0
            for streamed in self.images.stream(methodcaller("shuffle", generator=rng, buffer_size=self.shuffle_buffer)):
                if length >= skip:
                    yield Sample(epoch, length, streamed)
                length += 1
            if length == 0:
                raise ValueError(self._no_images())
            whole_epochs, skip = divmod(max(0, skip - length), length)
            epoch += 1 + whole_epochs

    def _no_images(self) -> str:
        return f"there are no images in {', '.join(repr(split.dataset) for split in self.images.splits)}"

    def _batch(self, sample: Callable[[int], Sample]) -> dict[str, Any]:
        skipped: list[Skipped] = []
        places = range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        shown = [self._shown(sample, place, skipped) for place in places]
        return {
            "pixel_values": torch.stack([pixels for pixels, _ in shown]),
            "index": torch.tensor([index for _, index in shown]),
            "skipped": skipped,
        }

    def _shown(self, sample: Callable[[int], Sample], place: int, skipped: list[Skipped]) -> tuple[torch.Tensor, int]:
        """The crop at a place and the index of its image: the first from there on that can be read."""
        own = sample(place)
        size = self.transform.draw_size(own.epoch, own.index)
        for other in range(place, place + BAD_IN_A_ROW + 1):
            candidate = sample(other)
            try:
                pixels = self._pixels(candidate, size)
            except BadImageError as error:
                if self.on_bad_image == "error":
                    raise
                last = error
                if other == place:
                    skipped.append(Skipped(own.epoch, error))
            else:
                return self.transform.crop(pixels, own.epoch, own.index), candidate.index
        raise last.because(f"{last.reason}, nor can the {BAD_IN_A_ROW} samples before it, too many in a row to skip")

    def _pixels(self, sample: Sample, size: int) -> np.ndarray:
        """An image after the resize to `size`, from the cache where there is one."""
        pixels = self._cache.get((sample.index, size)) if self._cache is not None else None
        if pixels is None:
            if sample.streamed is None:
                split, index = self.images.locate(sample.index)
                image = split.read(split.rows[index], index)
            else:
                split, row = sample.streamed
                image = split.read(row)
            pixels = self.transform.resize(image, size)
            if self._cache is not None:
                self._cache[sample.index, size] = pixels
        return pixels


class TrainingLoader(DataLoader):
    """Loads `TrainingBatches`, and says which images are left out: each once, on stderr.

    Its batches come without "skipped". Raises BadImageError as `TrainingBatches` does, in the same words from a worker
    process, and where in one epoch more are left out than 10 and 1% of all images read.

    Attributes:
        left_out: what it said, in this process.
    """

    def __init__(self, batches: TrainingBatches, **options: Any) -> None:
        super().__init__(_ErrorsAsBatches(batches), batch_size=None, **options)
        self.batches = batches
        self.left_out: set[str] = set()

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        read, epoch, count = self.batches.start // self.batches.world_size, 0, 0
        for batch in super().__iter__():
            if isinstance(batch, BadImageError):
                raise batch
            read += len(batch["index"])
            if threading.current_thread() is threading.main_thread():
                # DataLoader's handler raises wherever the trainer is when a worker dies. Its `next` says that, too, and
                # there nothing is half done.
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for skipped in batch.pop("skipped"):
                epoch, count = skipped.epoch, count + 1 if skipped.epoch == epoch else 1
                if str(skipped.error) not in self.left_out:
                    self.left_out.add(str(skipped.error))
                    tqdm.write(f"left out: {skipped.error}", file=sys.stderr)
                check_skipped(skipped.error, count, read)
            yield batch

    def remarks(self) -> list[str]:
        """How many images were left out, in a line; none where all were read."""
        count = len(self.left_out)
        return [f"{count} images that cannot be read were left out (`on_bad_image: skip`)"] if count else []


class _ErrorsAsBatches(IterableDataset):
    """An error that ends the batches is the last of them: raised in a worker, it would come with its traceback."""

    def __init__(self, batches: TrainingBatches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, Any] | BadImageError]:
        try:
            yield from self.batches
        except BadImageError as error:
            yield error


class TrainingImages:
    """The splits that are trained on, opened and not decoded; the first `max_train_samples` rows of each data set.

    Raises ValueError as `load_images` does, and for arguments that `ImageTransform` or `TrainingBatches` refuse.
    """

    def __init__(self, args: DataArguments, seed: int = 0) -> None:
        self.args, self.seed = args, seed
        self.transform = _transform(args, args.crop, args.horizontal_flip, seed)
        self.splits = [
            replace(split, rows=_first_rows(split.rows, args.max_train_samples))
            for split in open_splits(args, args.train_split)
        ]
        self._batches(batch_size=1)

    def loader(
        self, batch_size: int, *, start: int = 0, rank: int = 0, world_size: int = 1, pin_memory: bool = False
    ) -> TrainingLoader:
        """An endless loader of `TrainingBatches` with `num_workers` processes; draws from no global generator.

        It is sharded already: accelerate must not prepare it.

        Args:
            batch_size: of one process.
            start: samples that all processes together consumed before, to resume.
            rank: of this process.
            world_size: number of processes.
            pin_memory: for copies to a GPU.
        """
        return TrainingLoader(
            self._batches(batch_size=batch_size, start=start, rank=rank, world_size=world_size),
            num_workers=self.args.num_workers,
            prefetch_factor=PREFETCHED_BATCHES if self.args.num_workers else None,
            pin_memory=pin_memory,
            # A loader draws a base seed for its workers; from the global generator, resuming would cost one more draw.
            generator=torch.Generator().manual_seed(self.seed),
            worker_init_fn=_ignore_signals,
        )

    def first(self, count: int) -> torch.Tensor:
        """The first `count` training crops, as training sees them: (count, 3, R, R) float32 in [-1, 1]."""
        return next(iter(self._batches(batch_size=count)))["pixel_values"]

    def _batches(self, **place: int) -> TrainingBatches:
        return TrainingBatches(
            self.splits,
            self.transform,
            seed=self.seed,
            shuffle_buffer=self.args.shuffle_buffer,
            cache=self.args.cache_images,
            on_bad_image=self.args.on_bad_image,
            **place,
        )


def _ignore_signals(_: int) -> None:
    """A signal to the whole process group ends the run in good order; a dead worker would end it with an error."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class ValidationImages:
    """Images of the validation splits, centre-cropped, otherwise transformed as in training, the same ones each time.

    `validation_horizontal_flip` mirrors half of them, always the same ones.

    Args:
        args: which split, and how an image becomes a crop.
        samples: number of images, spread evenly over the splits, because many are sorted by class; of streams the
            first ones of each. 0: all.
        seed: of the mirrored ones.

    Attributes:
        skipped: images that cannot be read, as the latest `batches` left them out where `on_bad_image` is "skip".

    Raises ValueError as `TrainingImages` does, and in `batches` BadImageError for an image that cannot be read or,
    where these are skipped, for more than 10 and 1% of all images, or all of them.
    """

    def __init__(self, args: DataArguments, samples: int = 0, seed: int = 0) -> None:
        self.args, self.samples = args, samples
        first = resize_sizes(args.resize, args.resolution)[0]
        self.transform = _transform(replace(args, resize=first), "center", args.validation_horizontal_flip, seed)
        self.images = ImageSplits(open_splits(args, args.validation_split))
        self.skipped: list[BadImageError] = []
        self._named: set[str] = set()

    def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """(b, 3, R, R) float32 in [-1, 1], in the splits' order; b is `batch_size`, for the last batch the rest.

        Says on stderr, once, which images are left out.
        """
        for batch in self.numbered_batches(batch_size):
            yield batch["pixel_values"]

    def numbered_batches(self, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        """As `batches`, each with "index", int64 (b,): the rows of all tables, of streams their numbers."""
        crops = self._crops()
        while chunk := list(itertools.islice(crops, batch_size)):
            index, pixels = zip(*chunk, strict=True)
            yield {"pixel_values": torch.stack(pixels), "index": torch.tensor(index)}

    def _crops(self) -> Iterator[tuple[int, torch.Tensor]]:
        reader = ImageReader(self.args.on_bad_image)
        self.skipped, count = reader.skipped, 0
        for index, split, row, place in self._streamed() if self.images.streaming else self._spread():
            image = reader.read(split, row, place)
            if image is not None:
                count += 1
                yield index, self.transform(image, 0, index)
        if self.skipped and not count:
            raise self.skipped[-1]
        for error in self.skipped:
            if str(error) not in self._named:
                self._named.add(str(error))
                tqdm.write(f"left out: {error}", file=sys.stderr)

    def _spread(self) -> Iterator[tuple[int, ImageSplit, dict[str, Any], int]]:
        """(index in all tables, split, row, its index in the split)."""
        length = len(self.images)
        count = min(self.samples or length, length)
        for number in range(count):
            index = number * length // count
            split, place = self.images.locate(index)
            yield index, split, split.rows[place], place

    def _streamed(self) -> Iterator[tuple[int, ImageSplit, dict[str, Any], int]]:
        counts = dict.fromkeys(map(id, self.images.splits), -1)
        for index, (split, row) in enumerate(itertools.islice(self.images.stream(), self.samples or None)):
            counts[id(split)] += 1
            yield index, split, row, counts[id(split)]


def _first_rows(rows: datasets.Dataset | datasets.IterableDataset, count: int) -> Any:
    """At most `count` rows, the first ones; 0: all."""
    if not count:
        return rows
    return rows.select(range(min(count, len(rows)))) if hasattr(rows, "__len__") else rows.take(count)


def _transform(args: DataArguments, crop: str, horizontal_flip: bool, seed: int) -> ImageTransform:
    return ImageTransform(
        args.resolution,
        resize=args.resize,
        resize_mode=args.resize_mode,
        resample=args.resample,
        crop=crop,
        horizontal_flip=horizontal_flip,
        seed=seed,
    )
