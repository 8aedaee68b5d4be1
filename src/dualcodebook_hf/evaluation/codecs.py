"""The codecs that a tokenizer is compared with: Pillow's JPEG, WebP and AVIF, at a quality or at a number of bytes."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, features

from ..image_processing_dualcodebook import read_image


@dataclass(frozen=True)
class Codec:
    """A codec with its settings.

    Attributes:
        format: Pillow's name.
        feature: what Pillow must have been built with.
        lowest: end of its quality scale.
        highest: end of its quality scale.
        options: of saving.
        shrink: sides are divided by it before encoding and restored after decoding (Lanczos), which reaches rates below
            the format's own lowest.
    """

    format: str
    feature: str
    lowest: int
    highest: int
    options: dict[str, Any] = field(default_factory=dict)
    shrink: int = 1

    def encode(self, image: Image.Image, quality: int) -> bytes:
        """The file of an RGB image, as it would be sent: headers included, no metadata."""
        if self.shrink > 1:
            size = tuple(max(1, round(side / self.shrink)) for side in image.size)
            image = image.resize(size, Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.save(file, self.format, quality=quality, **self.options)
        return file.getvalue()

    def decode(self, data: bytes, size: tuple[int, int]) -> Image.Image:
        """The file's image, of `size` = (W, H)."""
        image = read_image(data)
        return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


AVIF_OPTIONS = {"speed": 4, "subsampling": "4:2:0"}
CODECS = {
    "JPEG": Codec("JPEG", "jpg", 1, 95, {"optimize": True, "subsampling": "4:2:0"}),
    "WebP": Codec("WEBP", "webp", 0, 100, {"method": 6}),
    "AVIF": Codec("AVIF", "avif", 0, 100, AVIF_OPTIONS),
    "AVIF at half size": Codec("AVIF", "avif", 0, 100, AVIF_OPTIONS, shrink=2),
}


@dataclass(frozen=True)
class EncodedImage:
    """An image as a codec's file gives it back.

    Attributes:
        image: decoded, of the original's size.
        count: bytes of the file.
        quality: on the codec's own scale.
        smallest: even the lowest quality takes more bytes than allowed.
    """

    image: Image.Image
    count: int
    quality: int
    smallest: bool = False


def available_codecs() -> dict[str, Codec]:
    """Those of `CODECS` that this Pillow was built with."""
    return {name: codec for name, codec in CODECS.items() if features.check(codec.feature)}


def coded_at(codec: Codec, image: Image.Image, quality: int) -> EncodedImage:
    """The image at a quality of the codec's own scale."""
    data = codec.encode(image, quality)
    return EncodedImage(codec.decode(data, image.size), len(data), quality)


def coded_within(codec: Codec, image: Image.Image, count: int) -> EncodedImage:
    """The image at the highest quality of at most `count` bytes, or, marked `smallest`, at the lowest quality.

    By bisection: files are taken to grow with quality.
    """
    low, high = codec.lowest, codec.highest
    best = codec.encode(image, low)
    if len(best) > count:
        return EncodedImage(codec.decode(best, image.size), len(best), low, smallest=True)
    while low < high:
        middle = (low + high + 1) // 2
        data = codec.encode(image, middle)
        if len(data) <= count:
            low, best = middle, data
        else:
            high = middle - 1
    return EncodedImage(codec.decode(best, image.size), len(best), low)
