"""PIL images <-> pixels in [-1, 1], and transformers' image processor of this model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import SizeDict, infer_channel_dimension_format
from transformers.processing_utils import ImagesKwargs

from .pil_images import (
    DEFAULT_MAX_PIXELS,
    LARGEST_ENLARGEMENT,
    BadImageError,
    center_crop,
    cut_for_enlargement,
    read_image,
    resampling_filter,
    resize_shorter_side,
    resize_to_max_pixels,
    side_for_enlargement,
    size_within,
)

__all__ = [
    "DEFAULT_MAX_PIXELS",
    "LARGEST_ENLARGEMENT",
    "BadImageError",
    "DualCodebookImageProcessor",
    "center_crop",
    "cut_for_enlargement",
    "read_image",
    "resampling_filter",
    "resize_shorter_side",
    "resize_to_max_pixels",
    "to_image",
    "to_pixels",
]


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


class DualCodebookImageProcessorKwargs(ImagesKwargs, total=False):
    """The options of `DualCodebookImageProcessor` that not every image processor has."""

    max_pixels: int | None


class DualCodebookImageProcessor(PilBackend):
    """Images -> `pixel_values` (B, 3, H, W) float32 in [-1, 1], and back (`postprocess`).

    Takes what `read_image` takes, URLs, and arrays; one of them or a list. Arrays, of numpy or torch, are grey or a
    boolean mask (H, W), or have 1, 3 or 4 channels, (H, W, C) or (C, H, W). Their values lie in 0..255 with
    `do_rescale`, else in [0, 1].

    Args:
        do_resize (bool, default False): resize to `size` by `resample`; the tokenizer takes any size.
        size (dict[str, int], default {'shortest_edge': 256}): in pixels; or {'height': h, 'width': w}.
        resample (PIL.Image.Resampling, default LANCZOS): PIL's filter.
        max_pixels (int | None, default 1048576): without `do_resize`, images of more pixels than this are shrunk to no
            more, aspect kept; None: no limit.
        do_center_crop (bool, default False): then cut `crop_size` out of the middle; a smaller image is a ValueError.
        crop_size (dict[str, int], default {'height': 256, 'width': 256}): in pixels.
        do_rescale (bool, default True): 0..255 to 0..1.
        do_normalize (bool, default True): subtract `image_mean` and divide by `image_std`: 0..1 to [-1, 1].
        image_mean (list[float], default [0.5, 0.5, 0.5]): of each channel, in 0..1.
        image_std (list[float], default [0.5, 0.5, 0.5]): of each channel, in 0..1.
        do_convert_rgb (bool, default True): see `read_image`.

    `preprocess(images, return_tensors="pt")` raises ValueError for images that cannot be read (BadImageError), for
    arrays of another shape or range, floats in [0, 1] with `do_rescale` among them, and for images that differ in size
    at the end, which no tensor can hold; without `return_tensors` it gives a list of arrays.
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
        if isinstance(images, (np.ndarray, torch.Tensor)):
            return _with_channels(images)
        return super().fetch_images(images)

    def process_image(  # type: ignore[override]
        self, image: Any, do_convert_rgb: bool | None = None, **kwargs: Any
    ) -> np.ndarray:
        """One image or array -> array (C, H, W)."""
        if isinstance(image, Image.Image):
            return super().process_image(read_image(image) if do_convert_rgb else image, do_convert_rgb=False, **kwargs)
        if kwargs.get("input_data_format") is None and image.ndim == 3:  # transformers 5.18 expects 1 or 3 channels
            kwargs["input_data_format"] = infer_channel_dimension_format(image, num_channels=(1, 3, 4))
        array = super().process_image(image, do_convert_rgb=False, **kwargs)
        if not do_convert_rgb or array.shape[0] == 3:
            return array
        if array.shape[0] == 1:
            return np.repeat(array, 3, axis=0)
        if array.dtype != np.uint8:
            raise ValueError(f"`images` with transparency must be uint8, got {array.dtype} of shape {array.shape}")
        opened = Image.fromarray(np.ascontiguousarray(np.moveaxis(array, 0, -1)))
        return np.moveaxis(np.array(read_image(opened)), -1, 0)

    def center_crop(self, image: np.ndarray, size: Any, **kwargs: Any) -> np.ndarray:  # type: ignore[override]
        """The middle of an array (C, H, W); never pads."""
        if size.height > image.shape[1] or size.width > image.shape[2]:
            raise ValueError(
                f"`crop_size` {size.width}x{size.height} exceeds the image's {image.shape[2]}x{image.shape[1]}; "
                "resize it first (`do_resize`)"
            )
        return super().center_crop(image, size, **kwargs)

    def _preprocess(  # type: ignore[override]
        self,
        images: list[np.ndarray],
        do_resize: bool,
        size: SizeDict,
        resample: Image.Resampling,
        max_pixels: int | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        for image in images:
            _check_values(image, kwargs["rescale_factor"] if kwargs["do_rescale"] else None, kwargs["do_normalize"])
        if do_resize and size.shortest_edge:
            images = [_cut_array(image, size.shortest_edge, kwargs["do_center_crop"]) for image in images]
        elif not do_resize and max_pixels is not None:
            images = [self._resize_to_max_pixels(image, max_pixels, resample) for image in images]
        features = super()._preprocess(
            images, do_resize=do_resize, size=size, resample=resample, return_tensors=None, **kwargs
        )
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
        new_width, new_height = size_within(width, height, max_pixels)
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
            scale, shift = (pixel_values.new_tensor(each, dtype=torch.float32)[:, None, None] for each in (std, mean))
            pixel_values = (pixel_values.float() * scale + shift) * 2 - 1
        return [to_image(pixels) for pixels in pixel_values]


def _with_channels(array: np.ndarray | torch.Tensor) -> np.ndarray:
    """An array of an image or, with one dimension more, of several -> with its channels, masks as black and white.

    Raises ValueError for another shape.
    """
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.dtype == torch.bfloat16 else array).numpy()
    if array.dtype.kind not in "biuf":
        raise ValueError(f"`images` must hold integers, real numbers or booleans, got {array.dtype}")
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    shape = (1, *array.shape) if array.ndim == 2 else array.shape
    if len(shape) not in (3, 4) or 0 in shape or not {shape[-3], shape[-1]} & {1, 3, 4}:
        raise ValueError(
            f"`images` must be of shape (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels, got {array.shape}"
        )
    return array.reshape(shape)


def _check_values(image: np.ndarray, scale: float | None, do_normalize: bool) -> None:
    """Raises ValueError for values outside the documented range.

    Args:
        image: an array of any shape.
        scale: what `do_rescale` multiplies by; None: nothing.
        do_normalize: a range is expected; without it and `scale`, values are taken as they are.
    """
    if (image.dtype == np.uint8 and scale) or not (scale or do_normalize):
        return
    low, high, top = image.min(), image.max(), 1 / scale if scale else 1
    if not (low >= 0 and high <= top):  # a NaN is neither
        raise ValueError(
            f"`images` must hold values in 0..{top:g} with do_rescale={bool(scale)}, "
            f"got {low:g} to {high:g} ({image.dtype})"
        )
    if top > 1 and np.issubdtype(image.dtype, np.floating) and 0 < high <= 1:
        raise ValueError(
            f"`images` holds {image.dtype} of at most {high:g}: for values in [0, 1] pass do_rescale=False; "
            f"with do_rescale=True they must be uint8, or lie in 0..{top:g}"
        )


def _cut_array(image: np.ndarray, size: int, do_center_crop: bool) -> np.ndarray:
    """`cut_for_enlargement` of an array (C, H, W). Raises ValueError where no crop follows."""
    height, width = image.shape[-2:]
    rows, columns = (side_for_enlargement(side, min(height, width), size) for side in (height, width))
    if (rows, columns) != (height, width) and not do_center_crop:
        raise ValueError(
            f"an image of {width}x{height} is too long to have its shorter side enlarged to {size} without a crop "
            "(`do_center_crop`)"
        )
    top, left = (height - rows) // 2, (width - columns) // 2
    return image[:, top : top + rows, left : left + columns]
