"""PIL images <-> pixels in [-1, 1]: the one place where images are read, resized, cropped and scaled."""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import SizeDict, infer_channel_dimension_format
from transformers.processing_utils import ImagesKwargs

DEFAULT_MAX_PIXELS = 1024 * 1024  # one megapixel: a 12-megapixel photograph is resized to it unless asked otherwise

ImageSource = str | Path | bytes | BinaryIO | Image.Image


def read_image(source: ImageSource) -> Image.Image:
    """Any image -> RGB image of 8 bits per channel, turned as its EXIF orientation says.

    Transparency is laid over white; 16-bit grey (I;16, and I where a value exceeds 255) is divided by 257; floating
    point is taken as 0..1, 0..255 or 0..65535, whichever its largest value fits; of an animation the first frame is
    read. Colour profiles are not applied.

    Args:
        source: a path, the bytes of a file, a file opened in binary mode, or a PIL image (left as it is).

    Raises ValueError that names the file when it is missing, not an image, broken, or larger than PIL's hard limit
    against decompression bombs (about 179 megapixels).
    """
    name = _source_name(source)
    if isinstance(source, Image.Image):
        return _to_rgb(source, name)
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_dir():
            raise ValueError(f"cannot read image {name}: it is a folder")
        if not path.exists():
            raise ValueError(f"cannot read image {name}: no such file")
    try:
        with warnings.catch_warnings():
            # PIL warns from 89 megapixels on and refuses from 179 on; the refusal is enough.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, (bytes, bytearray)) else source) as image:
                return _to_rgb(image, name)
    # Broken files make PIL's decoders raise nearly anything: OSError, SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        if isinstance(error, Image.UnidentifiedImageError):
            raise ValueError(f"cannot read image {name}: not in an image format that is known here") from error
        raise ValueError(f"cannot read image {name}: {error or type(error).__name__}") from error


def _source_name(source: ImageSource) -> str:
    if isinstance(source, (str, Path)):
        return f"'{source}'"
    name = getattr(source, "filename", None) or getattr(source, "name", None)
    return f"'{name}'" if name else f"(a {type(source).__name__} in memory)"


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    image.load()
    if 0 in image.size:
        raise ValueError(f"{name} has no pixels: {image.width}x{image.height}")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_8_bits(np.asarray(image), image.mode))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_8_bits(values: np.ndarray, mode: str) -> np.ndarray:
    values = np.nan_to_num(values.astype(np.float64), posinf=np.inf, neginf=0)
    largest = values.max()
    if mode.startswith("I;16") or largest > 255:
        values = values / 257
    elif mode == "F" and largest <= 1:
        values = values * 255
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def to_pixels(image: Image.Image) -> torch.Tensor:
    """RGB image -> (3, H, W) float32 in [-1, 1]. Raises ValueError for another mode."""
    if image.mode != "RGB":
        raise ValueError(f"`image` must be of mode RGB (see `read_image`), got {image.mode}")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255 * 2 - 1


def to_image(pixels: torch.Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1], any floating type and device -> RGB image; clamped and rounded to 8 bits.

    Raises ValueError for another shape.
    """
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(f"`pixels` must be of shape (3, H, W), got {tuple(pixels.shape)}")
    scaled = (pixels.detach().float().clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(scaled.round().byte().permute(1, 2, 0).contiguous().cpu().numpy())


def resize_to_max_pixels(image: Image.Image, max_pixels: int | None = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Shrinks an image of more than `max_pixels` pixels to no more (LANCZOS, aspect kept); others come back unchanged.

    Args:
        image: of any mode.
        max_pixels: at least 1; None: no limit.

    Raises ValueError when `max_pixels` is below 1.
    """
    if max_pixels is None:
        return image
    size = _size_within(image.width, image.height, max_pixels)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def _size_within(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    if max_pixels < 1:
        raise ValueError(f"`max_pixels` must be at least 1 or None, got {max_pixels}")
    if width * height <= max_pixels:
        return width, height
    scale = math.sqrt(max_pixels / (width * height))
    new_width, new_height = max(1, int(width * scale)), max(1, int(height * scale))
    # Of a very long image one side cannot shrink any more; then the other gives way.
    if new_width == 1:
        return 1, min(new_height, max_pixels)
    return (min(new_width, max_pixels), 1) if new_height == 1 else (new_width, new_height)


def resize_shorter_side(
    image: Image.Image, size: int, resample: str | int | Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """Resizes, up or down, until the shorter side has `size` pixels; the longer one is rounded down, as in torchvision.

    Args:
        image: of any mode.
        size: at least 1.
        resample: PIL's filter or its name ("bilinear", "bicubic", "lanczos", ...).

    Raises ValueError for another name, or a `size` below 1.
    """
    if size < 1:
        raise ValueError(f"`size` must be at least 1, got {size}")
    shorter = min(image.size)
    new_size = tuple(max(size, side * size // shorter) for side in image.size)
    return image if new_size == image.size else image.resize(new_size, resampling_filter(resample))


def resampling_filter(resample: str | int | Image.Resampling) -> Image.Resampling:
    """PIL's filter by its name in any case, or by itself. Raises ValueError for an unknown one."""
    try:
        return Image.Resampling[resample.upper()] if isinstance(resample, str) else Image.Resampling(resample)
    except (KeyError, ValueError):
        names = ", ".join(item.name.lower() for item in Image.Resampling)
        raise ValueError(f"`resample` must be one of {names}, got {resample!r}") from None


def center_crop(image: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """The middle of an image.

    Args:
        image: of any mode.
        size: the side of a square, or (height, width).

    Raises ValueError where the image is smaller.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height > image.height or width > image.width:
        raise ValueError(f"`size` of the crop, {width}x{height}, exceeds the image's {image.width}x{image.height}")
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


class DualCodebookImageProcessorKwargs(ImagesKwargs, total=False):
    """The options of `DualCodebookImageProcessor` that not every image processor has."""

    max_pixels: int | None


class DualCodebookImageProcessor(PilBackend):
    """Images -> `pixel_values` (B, 3, H, W) float32 in [-1, 1], and back (`postprocess`).

    Takes what `read_image` takes, URLs, and arrays (H, W, C) or (C, H, W) of values in 0..255; one of them or a list.

    Args:
        do_resize: resize to `size` by `resample`. Off by default: the tokenizer takes any size.
        size: {"shortest_edge": s} or {"height": h, "width": w}.
        resample: PIL's filter.
        max_pixels: without `do_resize`, images of more pixels than this are shrunk to no more, aspect kept. The
            default is one megapixel; None: no limit.
        do_center_crop: then cut `crop_size` out of the middle; a smaller image is a ValueError.
        crop_size: {"height": h, "width": w}.
        do_rescale: 0..255 to 0..1.
        do_normalize: subtract `image_mean` and divide by `image_std`: 0..1 to [-1, 1] by default.
        image_mean: of each channel.
        image_std: of each channel.
        do_convert_rgb: see `read_image`.

    `preprocess(images, return_tensors="pt")` raises ValueError for images that cannot be read, and for images that
    differ in size at the end, which no tensor can hold; without `return_tensors` it gives a list of arrays.
    """

    valid_kwargs = DualCodebookImageProcessorKwargs
    model_input_names = ["pixel_values"]
    resample = Image.Resampling.LANCZOS
    do_resize = False
    size = {"shortest_edge": 256}
    default_to_square = False
    max_pixels = DEFAULT_MAX_PIXELS
    do_center_crop = False
    crop_size = {"height": 256, "width": 256}
    do_rescale = True
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    do_convert_rgb = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # The base class takes None for "not given"; here it means "no limit".
        if "max_pixels" in kwargs:
            self.max_pixels = kwargs["max_pixels"]

    def fetch_images(self, images: Any) -> Any:
        """Opens what is given as path, bytes or file; only URLs reach the network."""
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image) for image in images]
        if isinstance(images, str) and images.startswith(("http://", "https://")):
            return super().fetch_images(images)
        if isinstance(images, (str, Path, bytes, bytearray)) or hasattr(images, "read"):
            return read_image(images)
        return super().fetch_images(images)

    def process_image(self, image: Any, do_convert_rgb: bool | None = None, **kwargs: Any) -> np.ndarray:
        """One image or array -> array (C, H, W)."""
        if isinstance(image, Image.Image):
            return super().process_image(read_image(image) if do_convert_rgb else image, do_convert_rgb=False, **kwargs)
        if kwargs.get("input_data_format") is None and image.ndim == 3:  # transformers 5.18 expects 1 or 3 channels
            kwargs["input_data_format"] = infer_channel_dimension_format(image, num_channels=(1, 3, 4))
        array = super().process_image(image, do_convert_rgb=False, **kwargs)
        if not do_convert_rgb or array.shape[0] == 3:
            return array
        if array.dtype != np.uint8:
            raise ValueError(f"`images` must have 3 channels or be uint8, got {array.dtype} of shape {array.shape}")
        opened = Image.fromarray(array[0] if array.shape[0] == 1 else np.ascontiguousarray(np.moveaxis(array, 0, -1)))
        return np.moveaxis(np.array(read_image(opened)), -1, 0)

    def center_crop(self, image: np.ndarray, size: SizeDict, **kwargs: Any) -> np.ndarray:
        """The middle of an array (C, H, W); never pads."""
        if size.height > image.shape[1] or size.width > image.shape[2]:
            raise ValueError(
                f"`crop_size` {size.width}x{size.height} exceeds the image's {image.shape[2]}x{image.shape[1]}; "
                "resize it first (`do_resize`)"
            )
        return super().center_crop(image, size, **kwargs)

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_resize: bool,
        resample: Image.Resampling,
        max_pixels: int | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        if not do_resize and max_pixels is not None:
            images = [self._resize_to_max_pixels(image, max_pixels, resample) for image in images]
        features = super()._preprocess(images, do_resize=do_resize, resample=resample, return_tensors=None, **kwargs)
        sizes = {array.shape[-2:] for array in features["pixel_values"]}
        if return_tensors is not None and len(sizes) > 1:
            listed = ", ".join(f"{width}x{height}" for height, width in sorted(sizes))
            raise ValueError(
                f"`images` must be of one size to make one tensor, got {listed}; resize and crop them "
                "(`do_resize`, `do_center_crop`) or preprocess them one by one"
            )
        return features.convert_to_tensors(return_tensors)

    def _resize_to_max_pixels(self, image: np.ndarray, max_pixels: int, resample: Image.Resampling) -> np.ndarray:
        height, width = image.shape[-2:]
        new_width, new_height = _size_within(width, height, max_pixels)
        if (new_width, new_height) == (width, height):
            return image
        return self.resize(image, SizeDict(height=new_height, width=new_width), resample=resample)

    def postprocess(self, pixel_values: torch.Tensor) -> list[Image.Image]:
        """(B, 3, H, W), by default in [-1, 1] -> B images, clamped and rounded.

        Undoes this processor's normalisation. Raises ValueError for another shape, and when it does not rescale.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"`pixel_values` must be of shape (B, 3, H, W), got {tuple(pixel_values.shape)}")
        if not self.do_rescale:
            raise ValueError("`postprocess` needs a processor with `do_rescale`, got one without")
        mean, std = (self.image_mean, self.image_std) if self.do_normalize else ([0.0] * 3, [1.0] * 3)
        if list(mean) != [0.5] * 3 or list(std) != [0.5] * 3:
            shape = {"dtype": torch.float32, "device": pixel_values.device}
            mean, std = (torch.tensor(values, **shape)[:, None, None] for values in (mean, std))
            pixel_values = (pixel_values.float() * std + mean) * 2 - 1
        return [to_image(pixels) for pixels in pixel_values]
