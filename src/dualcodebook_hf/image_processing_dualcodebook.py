"""PIL images <-> pixels in [-1, 1]: the one place where images are read, resized, cropped and scaled."""

from __future__ import annotations

import importlib
import io
import math
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import SizeDict, infer_channel_dimension_format
from transformers.processing_utils import ImagesKwargs

DEFAULT_MAX_PIXELS = 1024 * 1024  # one megapixel: a 12-megapixel photograph is resized to it unless asked otherwise

LARGEST_ENLARGEMENT = 2**24  # pixels of an image that was enlarged for a crop
PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
MODES_OF_PROFILE = {"RGB": ("RGB", "RGBA", "RGBX", "P", "PA"), "L": ("1", "L", "LA"), "CMYK": ("CMYK",)}
SRGB_TOLERANCE = 2  # of 255: a profile that changes no colour by more is another writing of sRGB

ImageSource = str | Path | bytes | BinaryIO | Image.Image


class BadImageError(ValueError):
    """An image that cannot be read, and where it lies. Handlers of bad images catch this class alone.

    Args:
        reason: what is wrong with it, without its place.
        file: name of its file, or what else it can be found by; None: unknown.
        dataset: the data set that it belongs to; None: to none.
        split: of the data set.
        row: index in the split; None where that is not known, in a shuffled stream.

    Attributes: as the arguments.
    """

    def __init__(
        self,
        reason: str,
        file: str | None = None,
        *,
        dataset: str | None = None,
        split: str | None = None,
        row: int | None = None,
    ) -> None:
        super().__init__(reason, file)
        self.reason, self.file = reason, file
        self.dataset, self.split, self.row = dataset, split, row

    def because(self, reason: str) -> BadImageError:
        """An error about the same image for another reason."""
        return BadImageError(reason, self.file, dataset=self.dataset, split=self.split, row=self.row)

    def __str__(self) -> str:
        file = f"'{self.file}'" if self.file else "in memory"
        if self.dataset is None:
            return f"cannot read image {file}: {self.reason}"
        row = "an image" if self.row is None else f"row {self.row}"
        place = f"{row} of '{self.dataset}' ({self.split})" + (f", {file}" if self.file else "")
        return f"cannot read {place}: {self.reason}"


def read_image(source: ImageSource) -> Image.Image:
    """Any image -> RGB image of 8 bits per channel in sRGB, turned as its EXIF orientation says.

    The one reader of everything: training, measuring, the commands and the page. Colours are converted to sRGB by the
    ICC profile inside the image; a broken profile is ignored. Transparency is laid over white; 16-bit grey (I;16, and
    I where a value exceeds 255) is divided by 257; floating point is taken as 0..1, 0..255 or 0..65535, whichever its
    largest value fits; of an animation the first frame is read. HEIC needs the package pillow-heif.

    Args:
        source: a path, the bytes of a file, a file opened in binary mode, or a PIL image (left as it is).

    Raises BadImageError, a ValueError, that names the file when it is missing, not an image, broken, or larger than
    PIL's hard limit against decompression bombs (about 179 megapixels), which is told from the header.
    """
    file = _source_name(source)
    if isinstance(source, (str, Path)) and not Path(source).is_file():
        raise BadImageError(_why_no_file(Path(source)), file)
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source)
        with warnings.catch_warnings():
            # PIL warns from 89 megapixels on and refuses from 179 on; the refusal is enough.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with _open(io.BytesIO(source) if isinstance(source, (bytes, bytearray)) else source) as image:
                return _to_rgb(image)
    except BadImageError as error:
        raise BadImageError(error.reason, file) from error
    # Broken files make PIL's decoders raise nearly anything: OSError, SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        raise BadImageError(getattr(error, "strerror", None) or str(error) or type(error).__name__, file) from error


def _source_name(source: ImageSource) -> str | None:
    if isinstance(source, (str, Path)):
        return str(source)
    name = getattr(source, "filename", None) or getattr(source, "name", None)
    return str(name) if name else None


def _why_no_file(path: Path) -> str:
    if path.is_dir():
        return "it is a folder"
    return "it is not a regular file" if path.exists() else "no such file"


def _open(source: str | Path | BinaryIO) -> Image.Image:
    """PIL's lazily opened image; one of a format that needs a plugin is tried again with the plugin."""
    try:
        return Image.open(source)
    except Image.UnidentifiedImageError:
        head = _head(source)
        if not head:
            raise BadImageError("it is empty") from None
        plugin = next((plugin for plugin in PLUGINS if plugin.wrote(head)), None)
        if plugin is None:
            raise BadImageError("not in an image format that is known here") from None
        if not plugin.load():
            raise BadImageError(f"{plugin.format} needs a package: pip install {plugin.package}") from None
        return Image.open(source)


def _head(source: str | Path | BinaryIO) -> bytes:
    if isinstance(source, (str, Path)):
        with open(source, "rb") as file:
            return file.read(12)
    source.seek(0)
    head = source.read(12)
    source.seek(0)
    return head


@dataclass(frozen=True)
class Plugin:
    """A package that teaches PIL another format.

    Attributes:
        format: for messages.
        suffixes: of its files.
        brands: the four bytes behind "ftyp" that its files begin with.
        package: to install.
        module: to import.
    """

    format: str
    suffixes: tuple[str, ...]
    brands: tuple[bytes, ...]
    package: str
    module: str

    def wrote(self, head: bytes) -> bool:
        """Whether a file that begins with these 12 bytes is of this format."""
        return head[4:8] == b"ftyp" and head[8:12] in self.brands

    def load(self) -> bool:
        """Registers the plugin; False where its package is not installed."""
        # Not an import statement: transformers demands every module that a file loaded with trust_remote_code imports.
        try:
            module = importlib.import_module(self.module)
        except ImportError:
            return False
        if hasattr(module, "register_heif_opener"):  # the other one registers itself
            module.register_heif_opener()
        return True


PLUGINS = (
    Plugin(
        "HEIC",
        (".heic", ".heif", ".hif"),
        (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"),
        "pillow-heif",
        "pillow_heif",
    ),
    Plugin("AVIF", (".avif",), (b"avif", b"avis"), "pillow-avif-plugin", "pillow_avif"),  # in Pillow itself since 11.3
)


def _to_rgb(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise BadImageError(f"it has no pixels: {image.width}x{image.height}")
    transparent_colour = _transparent_colour(image)
    image.load()
    profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    if transparent_colour is not None:
        image.info["transparency"] = transparent_colour
    if image.mode.startswith("I") or image.mode == "F":
        image = _grey(image)
    colours = _to_srgb(image, profile) if profile else None
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if colours is not None:
            colours.putalpha(rgba.getchannel("A"))
            rgba = colours
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba)
    elif colours is not None:
        image = colours
    image = image.convert("RGB")
    image.info.pop("icc_profile", None)  # it has been applied
    return image


def _transparent_colour(image: Image.Image) -> int | tuple[int, ...] | None:
    """The transparent colour of a PNG in the 8 bits that PIL decodes to, where the file has another depth."""
    value, raw = image.info.get("transparency"), image.tile[0][3] if getattr(image, "tile", None) else None
    if image.format != "PNG" or value is None:
        return None
    if raw == "RGB;16B":
        return tuple(channel >> 8 for channel in value)
    return value * {"L;2": 85, "L;4": 17}[raw] if raw in ("L;2", "L;4") else None


def _grey(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits -> mode L, or LA where one of its values is transparent."""
    values, transparent = np.asarray(image), image.info.get("transparency")
    grey = Image.fromarray(_to_8_bits(values, image.mode))
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _to_8_bits(values: np.ndarray, mode: str) -> np.ndarray:
    # In pieces: a large image in float64 takes gigabytes.
    pieces = np.array_split(values.reshape(-1), math.ceil(values.size / 2**20))
    largest = max(_finite_floats(piece).max() for piece in pieces)
    scaled = np.empty(values.size, np.uint8)
    done = 0
    for piece in map(_finite_floats, pieces):
        if mode.startswith("I;16") or largest > 255:
            piece = piece / 257
        elif mode == "F" and largest <= 1:
            piece = piece * 255
        scaled[done : done + piece.size] = np.clip(np.rint(piece), 0, 255)
        done += piece.size
    return scaled.reshape(values.shape)


def _finite_floats(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(values.astype(np.float64), posinf=np.inf, neginf=0)


@lru_cache(maxsize=8)
def _srgb_transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform] | None:
    """(mode of the profile's colours, their way to sRGB); None for a broken profile, and for sRGB itself."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = PROFILE_MODES[opened.profile.xcolor_space.strip()]
        transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode == "CMYK":
            return mode, transform
        steps = np.arange(0, 256, 17, dtype=np.uint8)
        colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
        colours = Image.fromarray(colours if mode == "RGB" else steps[None])
        change = np.subtract(ImageCms.applyTransform(colours, transform), colours.convert("RGB"), dtype=np.int16)
        return None if np.abs(change).max() <= SRGB_TOLERANCE else (mode, transform)
    except (ImageCms.PyCMSError, KeyError, OSError, ImportError):
        return None


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image | None:
    """An image's colours, without its transparency, by its ICC profile in sRGB; None where they stay as they are."""
    found = _srgb_transform(profile)
    if found is None or image.mode not in MODES_OF_PROFILE[found[0]]:
        return None
    return ImageCms.applyTransform(image.convert(found[0]), found[1])


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
    size = size_within(image.width, image.height, max_pixels)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def size_within(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """(W, H) that `resize_to_max_pixels` gives an image of this width and height."""
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


def cut_for_enlargement(image: Image.Image, size: int) -> Image.Image:
    """The middle of an image whose shorter side is to become `size` before a crop; nearly all images stay whole.

    The ends are cut off one so long that it would have more than 16 megapixels when enlarged: 1 x 60000 pixels of a
    file of 300 bytes take gigabytes at a size of 256.

    Args:
        image: of any mode.
        size: of `resize_shorter_side` and of the crop.
    """
    width, height = (_side_for_enlargement(side, min(image.size), size) for side in image.size)
    return image if (width, height) == image.size else center_crop(image, (height, width))


def _side_for_enlargement(side: int, shorter: int, size: int) -> int:
    kept = max(shorter, LARGEST_ENLARGEMENT // size * shorter // size)
    if shorter >= size or side <= kept:
        return side
    return kept + (side - kept) % 2  # the centre stays where it is


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

    Takes what `read_image` takes, URLs, and arrays; one of them or a list. Arrays, of numpy or torch, are grey or a
    boolean mask (H, W), or have 1, 3 or 4 channels, (H, W, C) or (C, H, W). Their values lie in 0..255 with
    `do_rescale`, else in [0, 1].

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

    def process_image(self, image: Any, do_convert_rgb: bool | None = None, **kwargs: Any) -> np.ndarray:
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
            shape = {"dtype": torch.float32, "device": pixel_values.device}
            mean, std = (torch.tensor(values, **shape)[:, None, None] for values in (mean, std))
            pixel_values = (pixel_values.float() * std + mean) * 2 - 1
        return [to_image(pixels) for pixels in pixel_values]


def _with_channels(array: np.ndarray | torch.Tensor) -> np.ndarray:
    """An array of an image or, with one dimension more, of several -> with its channels, masks as black and white.

    Raises ValueError for another shape.
    """
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.dtype == torch.bfloat16 else array).numpy()
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
    rows, columns = (_side_for_enlargement(side, min(height, width), size) for side in (height, width))
    if (rows, columns) != (height, width) and not do_center_crop:
        raise ValueError(
            f"an image of {width}x{height} is too long to have its shorter side enlarged to {size} without a crop "
            "(`do_center_crop`)"
        )
    top, left = (height - rows) // 2, (width - columns) // 2
    return image[:, top : top + rows, left : left + columns]
