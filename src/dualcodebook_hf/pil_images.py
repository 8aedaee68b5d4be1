"""PIL images: the one place where image files are read, resized and cropped; nothing here needs torch."""

from __future__ import annotations

import importlib
import io
import math
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from PIL import Image, ImageCms, ImageOps

if TYPE_CHECKING:
    import numpy as np

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
    import numpy as np

    values, transparent = np.asarray(image), image.info.get("transparency")
    grey = Image.fromarray(_to_8_bits(values, image.mode))
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _to_8_bits(values: np.ndarray, mode: str) -> np.ndarray:
    import numpy as np

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
    import numpy as np

    return np.nan_to_num(values.astype(np.float64), posinf=np.inf, neginf=0)


@lru_cache(maxsize=8)
def _srgb_transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform] | None:
    """(mode of the profile's colours, their way to sRGB); None for a broken profile, and for sRGB itself."""
    import numpy as np

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
    """(width, height) that `resize_to_max_pixels` gives an image. Raises ValueError when `max_pixels` is below 1."""
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
    width, height = (side_for_enlargement(side, min(image.size), size) for side in image.size)
    return image if (width, height) == image.size else center_crop(image, (height, width))


def side_for_enlargement(side: int, shorter: int, size: int) -> int:
    """What `cut_for_enlargement` leaves of a side, where the image's shorter one is `shorter`, all in pixels."""
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
