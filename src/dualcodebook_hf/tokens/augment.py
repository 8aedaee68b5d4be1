"""One image -> the crops of it that are tokenized: a pure function of the image, a seed and the image's key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..pil_images import (
    DEFAULT_MAX_PIXELS,
    cut_for_enlargement,
    resampling_filter,
    resize_shorter_side,
    resize_to_max_pixels,
)

KINDS = ("center", "center-flip", "ten-crop", "random-crop", "none")


class Crops(NamedTuple):
    """The crops of one image.

    Attributes:
        pixels: uint8 (A, H, W, 3).
        boxes: float32 (A, 4), each left, top, right, bottom in pixels of the image.
        flips: bool (A,), whether a crop was mirrored after it was cut.
    """

    pixels: np.ndarray
    boxes: np.ndarray
    flips: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Which crops are cut.

    - center: shorter side resized to `size`, then the centre.
    - center-flip: the same and its mirror image.
    - ten-crop: for each of `crop_ranges` c, the shorter side resized to c x size, the centre square of that, and of it
      the four corners, the centre and, of its mirror image, the same five: torchvision's TenCrop, as LlamaGen has it.
    - random-crop: `crops` times the shorter side resized to a length between `size` and the largest of `crop_ranges` x
      size, a random place in it, and a mirror image in half of the cases.
    - none: the whole image, shrunk to one megapixel where it is larger.

    Attributes:
        kind: one of `KINDS`.
        size: S, side of the crops in pixels.
        resample: PIL's filter by name.
        crop_ranges: of ten-crop and random-crop, at least 1.
        crops: of random-crop.
        seed: of random-crop.

    Raises ValueError for a value out of range.
    """

    kind: str = "center"
    size: int = 256
    resample: str = "lanczos"
    crop_ranges: tuple[float, ...] = (1.1,)
    crops: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        resampling_filter(self.resample)
        if self.kind not in KINDS:
            raise ValueError(f"`augmentation` must be one of {', '.join(KINDS)}, got {self.kind!r}")
        for name, low in (("size", 1), ("crops", 1), ("seed", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"`{name}` must be at least {low}, got {getattr(self, name)}")
        if not self.crop_ranges or not all(1 <= value <= 4 for value in self.crop_ranges):
            raise ValueError(f"`crop_ranges` must be numbers in [1, 4], got {list(self.crop_ranges)}")

    @property
    def count(self) -> int:
        """A, crops of one image."""
        counts = {"center-flip": 2, "ten-crop": 10 * len(self.crop_ranges), "random-crop": self.crops}
        return counts.get(self.kind, 1)

    def grid(self, factor: int) -> tuple[int, int] | None:
        """(h, w) of a crop's tokens; None where images differ."""
        side = -(-self.size // factor)
        return None if self.kind == "none" else (side, side)

    def __call__(self, image: Image.Image, key: Sequence[int] = (0,)) -> Crops:
        """RGB image of any size -> its crops.

        Args:
            image: RGB.
            key: of the image, whole numbers of at least 0; random crops are drawn from it and `seed`.
        """
        if self.kind == "none":
            small = resize_to_max_pixels(image, DEFAULT_MAX_PIXELS)
            return Crops(np.asarray(small)[None], _boxes([(0, 0, *image.size)]), np.zeros(1, bool))
        if self.kind == "random-crop":
            parts = [self._random(image, [self.seed, *key, number]) for number in range(self.crops)]
        elif self.kind == "ten-crop":
            parts = [part for value in self.crop_ranges for part in self._ten(image, value)]
        else:
            view = _View(image, self.size, self.resample)
            parts = [view.cut(*view.centre(), flip) for flip in (False, True)[: self.count]]
        pixels, boxes, flips = zip(*parts, strict=True)
        return Crops(np.stack(pixels), _boxes(boxes), np.array(flips))

    def _ten(self, image: Image.Image, crop_range: float) -> list[tuple[np.ndarray, tuple[float, ...], bool]]:
        view = _View(image, self.size, self.resample, int(self.size * crop_range))
        left, top = view.corner
        room = view.side - self.size
        middle = round(room / 2)
        places = [(0, 0), (room, 0), (0, room), (room, room), (middle, middle)]
        # A place in the mirror image, seen from the image itself.
        mirrored = [(room - x, y) for x, y in places]
        cuts = [(place, False) for place in places] + [(place, True) for place in mirrored]
        return [view.cut(left + x, top + y, flip) for (x, y), flip in cuts]

    def _random(self, image: Image.Image, key: list[int]) -> tuple[np.ndarray, tuple[float, ...], bool]:
        rng = np.random.default_rng(key)
        shorter = int(rng.integers(self.size, int(self.size * max(self.crop_ranges)) + 1))
        view = _View(image, self.size, self.resample, shorter)
        left, top = (int(rng.integers(0, side - self.size + 1)) for side in view.image.size)
        return view.cut(left, top, bool(rng.random() < 0.5))


class _View:
    """An image resized for cropping, which knows where its pixels were before.

    Args:
        image: RGB.
        size: side of the crops.
        resample: of the resize.
        side: of the shorter side; None: `size`.

    Attributes:
        image: resized.
        side: of the shorter side.
        corner: left and top of the centre square of that side.
    """

    def __init__(self, image: Image.Image, size: int, resample: str, side: int | None = None) -> None:
        self.size, self.side = size, side or size
        cut = cut_for_enlargement(image, self.side)
        self.image = resize_shorter_side(cut, self.side, resample)
        self.origin = ((image.width - cut.width) // 2, (image.height - cut.height) // 2)
        self.scale = (cut.width / self.image.width, cut.height / self.image.height)
        self.corner = ((self.image.width - self.side) // 2, (self.image.height - self.side) // 2)

    def centre(self) -> tuple[int, int]:
        """Left and top of the crop in the middle."""
        return (self.image.width - self.size) // 2, (self.image.height - self.size) // 2

    def cut(self, left: int, top: int, flip: bool) -> tuple[np.ndarray, tuple[float, ...], bool]:
        """Pixels of a crop, its box in the original image, and whether it is mirrored."""
        corners = (left, top, left + self.size, top + self.size)
        pixels = np.asarray(self.image.crop(corners))
        box = tuple(self.origin[k % 2] + corners[k] * self.scale[k % 2] for k in range(4))
        return pixels[:, ::-1] if flip else pixels, box, flip


def _boxes(boxes: Sequence[Sequence[float]]) -> np.ndarray:
    return np.array(boxes, np.float32)
