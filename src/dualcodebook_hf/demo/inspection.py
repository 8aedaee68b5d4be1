"""What the demo shows of a picture and its tokens: rivals of equal bytes, usage, single cells, halves, swaps, files."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from ..autoencoder_dualcodebook import DualCodebookVQModel
from ..configuration_dualcodebook import config_hash
from ..evaluation import codecs
from ..image_processing_dualcodebook import DEFAULT_MAX_PIXELS, read_image, resize_to_max_pixels, to_image, to_pixels
from ..metrics.images import image_quality
from ..metrics.tokens import TokenStatistics, bits_per_pixel
from ..tokens.file import TokenFile, TokenizedImage, load_tokens, save_tokens, token_bytes

LARGEST_UPLOAD = 100_000_000  # pixels of a picture file: what a modern camera makes, and 300 MB as RGB
LONGEST_SIDE = 16_000  # pixels after shrinking: WebP ends at 16,383, and a line of pixels pads to f lines
LARGEST_FILE = 4 * DEFAULT_MAX_PIXELS  # pixels of all pictures of a token file together
SMALLEST_SHOWN = 256  # smaller pictures are enlarged by whole factors
HIGHLIGHT, FADED = (255, 140, 0), 0.25
BASELINES = ("JPEG", "WebP")
TABLE_HEADERS = ["What", "Bytes", "Bits per pixel", "PSNR (dB)", "SSIM"]


@dataclass(frozen=True)
class Upload:
    """image: RGB, shrunk to one megapixel. notes: what was done to the file's picture, in words. file_size: (W, H)."""

    name: str
    image: Image.Image
    file_size: tuple[int, int]
    file_bytes: int
    notes: list[str]


@dataclass(frozen=True)
class CodedImage:
    """One upload through one model. tokens: int64 (books, h, w). quality: PSNR in dB and SSIM, values not rounded."""

    upload: Upload
    tokens: torch.Tensor
    reconstruction: Image.Image
    quality: tuple[float, float]


def read_upload(path: str | Path) -> Upload:
    """Reads an uploaded picture file (see `read_image`) and shrinks it to one megapixel.

    Raises ValueError, naming the file without its folder, when it cannot be read or is too large or too long.
    """
    path = Path(path)
    with _named_without_folder(path):
        frames, transparent = _peek(path)
        picture = read_image(path)
    image, notes = resize_to_max_pixels(picture), []
    if max(image.size) > LONGEST_SIDE:
        raise ValueError(
            f"'{path.name}' of {_size_text(picture.size)} pixels is too long for this app: "
            f"at one megapixel its longer side must not exceed {LONGEST_SIDE:,} pixels"
        )
    if image.size != picture.size:
        notes.append(f"shrunk from {_size_text(picture.size)} to {_size_text(image.size)} pixels, this app's limit")
    if frames > 1:
        notes.append(f"the first of {frames} frames")
    if transparent:
        notes.append("transparency laid over white")
    return Upload(path.name, image, picture.size, path.stat().st_size, notes)


def tokenize(model: DualCodebookVQModel, upload: Upload) -> torch.Tensor:
    """Tokens (books, h, w) of a picture, int64, on the CPU."""
    return model.tokenize(to_pixels(upload.image)[None].to(model.device, model.dtype))[0].cpu()


def code(model: DualCodebookVQModel, upload: Upload) -> CodedImage:
    """Tokenizes, detokenizes and measures a picture, by the protocol of `evaluate`."""
    tokens = tokenize(model, upload)
    pixels = model.detokenize(tokens[None].to(model.device), size=upload.image.size[::-1])
    return CodedImage(upload, tokens, to_image(pixels[0]), image_quality(pixels, to_pixels(upload.image)[None]))


def packed_bytes(model: DualCodebookVQModel, coded: CodedImage) -> int:
    """Bytes of a picture's tokens, densely packed."""
    return token_bytes(tuple(coded.tokens.shape[1:]), model.quantize.bits_per_position)


def baselines(model: DualCodebookVQModel, coded: CodedImage) -> dict[str, codecs.CodedImage]:
    """A JPEG and a WebP of the tokens' bytes, or their smallest possible."""
    count = packed_bytes(model, coded)
    return {name: codecs.coded_within(codecs.CODECS[name], coded.upload.image, count) for name in BASELINES}


def table(model: DualCodebookVQModel, coded: CodedImage, others: Mapping[str, codecs.CodedImage]) -> list[list[object]]:
    """Rows under `TABLE_HEADERS`: the tokens, their rivals and the file itself, which has no quality (None)."""
    upload, count = coded.upload, packed_bytes(model, coded)
    width, height = upload.image.size
    rate = bits_per_pixel(coded.tokens[0].numel(), model.quantize.bits_per_position, height, width)
    rows = [_row("Tokens", count, rate, coded.quality)]
    original = to_pixels(upload.image)[None]
    for label, other in others.items():
        note = "smallest possible" if other.smallest else f"quality {other.quality}"
        measured = image_quality(to_pixels(other.image)[None], original)
        rows.append(_row(f"{label}, {note}", other.count, other.count * 8 / (width * height), measured))
    pixels = upload.file_size[0] * upload.file_size[1]
    return [*rows, _row("The file itself", upload.file_bytes, upload.file_bytes * 8 / pixels, (None, None))]


def usage(model: DualCodebookVQModel, tokens: torch.Tensor) -> dict[str, tuple[list[int], float]]:
    """Of each book: how often each code occurs in tokens (books, h, w), and the perplexity (2 to the entropy)."""
    statistics = TokenStatistics({name: codebook.size for name, codebook in model.quantize.codebooks.items()})
    statistics.update(tokens[None])
    health = statistics.codebooks()
    return {name: (counts.tolist(), health[name]["perplexity"]) for name, counts in statistics.histograms.items()}


def half(model: DualCodebookVQModel, coded: CodedImage, codebook: str) -> Image.Image:
    """The picture from one book's tokens; the other book gives the mean of its codes."""
    return _decode(model, coded.tokens, coded.upload.image.size, only=codebook)


def swap(model: DualCodebookVQModel, coded: CodedImage, other: Upload) -> list[Image.Image]:
    """Decodes the first book's tokens of one picture with the second's of another, and the other way round.

    The other picture is resized and cut to the first one's size.
    """
    size = coded.upload.image.size
    fitted = replace(other, image=ImageOps.fit(other.image, size, Image.Resampling.LANCZOS))
    tokens = tokenize(model, fitted)
    mixed = torch.cat([coded.tokens[:1], tokens[1:]]), torch.cat([tokens[:1], coded.tokens[1:]])
    return [_decode(model, pair, size) for pair in mixed]


def cell_at(model: DualCodebookVQModel, coded: CodedImage, point: tuple[float, float]) -> tuple[int, int]:
    """Row and column of the token at a point (x, y) of the picture as `enlarged` shows it."""
    scale = model.downsample_factor * _enlargement(coded.upload.image.size)
    rows, columns = coded.tokens.shape[1:]
    return min(max(int(point[1] // scale), 0), rows - 1), min(max(int(point[0] // scale), 0), columns - 1)


def cell_patches(model: DualCodebookVQModel, coded: CodedImage, cell: tuple[int, int]) -> dict[str, Image.Image]:
    """What stands at a cell in the picture and its reconstruction, and what each code, and all, decode to alone.

    Alone: the middle of 3 x 3 positions that all hold the code, f x f pixels.
    """
    factor, (row, column) = model.downsample_factor, cell
    box = (column * factor, row * factor, (column + 1) * factor, (row + 1) * factor)
    box = (*box[:2], min(box[2], coded.upload.image.width), min(box[3], coded.upload.image.height))
    patches = {"original": coded.upload.image.crop(box), "reconstruction": coded.reconstruction.crop(box)}
    tokens = coded.tokens[:, row, column][:, None, None].expand(-1, 3, 3)
    middle = (factor, factor, 2 * factor, 2 * factor)
    for codebook in model.quantize.codebooks:
        patches[codebook] = _decode(model, tokens, (3 * factor, 3 * factor), only=codebook).crop(middle)
    patches["all"] = _decode(model, tokens, (3 * factor, 3 * factor)).crop(middle)
    return patches


def same_code(model: DualCodebookVQModel, coded: CodedImage, codebook: int, cell: tuple[int, int]) -> Image.Image:
    """The reconstruction, faded wherever book number `book` has another code than at the cell, which is framed."""
    factor, (row, column) = model.downsample_factor, cell
    scale = _enlargement(coded.upload.image.size)
    picture = enlarged(coded.reconstruction)
    same = (coded.tokens[codebook] == coded.tokens[codebook, row, column]).numpy()
    rows, columns = (np.arange(side) // (factor * scale) for side in picture.size[::-1])
    bright = same[rows[:, None], columns[None, :], None]
    pixels = np.asarray(picture, dtype=np.float32)
    shown = Image.fromarray(np.where(bright, pixels, 128 + (pixels - 128) * FADED).round().astype(np.uint8))
    step, line = factor * scale, max(2, factor * scale // 6)
    box = [column * step - line, row * step - line, (column + 1) * step + line - 1, (row + 1) * step + line - 1]
    ImageDraw.Draw(shown).rectangle(box, outline=HIGHLIGHT, width=line)
    return shown


def enlarged(image: Image.Image) -> Image.Image:
    """A small picture enlarged by a whole factor, nearest neighbour; others as they are."""
    factor = _enlargement(image.size)
    return image if factor == 1 else image.resize(tuple(side * factor for side in image.size), Image.Resampling.NEAREST)


def save_image_tokens(model: DualCodebookVQModel, upload: Upload, tokens: torch.Tensor, folder: Path) -> Path:
    """Writes one picture's tokens (books, h, w) into a token file in `folder`, named after the picture."""
    path = folder / f"{Path(upload.name).stem}.safetensors"
    codebooks = {name: codebook.size for name, codebook in model.quantize.codebooks.items()}
    picture = TokenizedImage(upload.name, upload.image.size[::-1], tokens)
    save_tokens(path, TokenFile([picture], model.downsample_factor, codebooks, config_hash(model.config)))
    return path


def read_image_tokens(model: DualCodebookVQModel, path: str | Path) -> Sequence[TokenizedImage]:
    """The pictures of a token file that this model can decode.

    Raises ValueError, naming the file without its folder, for any other file, and for more than four megapixels.
    """
    path = Path(path)
    with _named_without_folder(path):
        content = load_tokens(path)
    if content.config_hash != config_hash(model.config):
        raise ValueError(
            f"the tokens in '{path.name}' are of a model with config hash {content.config_hash}, books "
            f"{content.codebooks}; this model's is {config_hash(model.config)}"
        )
    pixels = sum(picture.tokens[0].numel() for picture in content.images) * content.downsample_factor**2
    if not 0 < pixels <= LARGEST_FILE:
        raise ValueError(
            f"the pictures in '{path.name}' have {pixels:,} pixels together; "
            f"this app decodes between 1 and {LARGEST_FILE:,} at once"
        )
    return content.images


def decode_image(model: DualCodebookVQModel, picture: TokenizedImage) -> Image.Image:
    """The picture of its tokens alone."""
    return _decode(model, picture.tokens, picture.size[::-1])


def _decode(
    model: DualCodebookVQModel, tokens: torch.Tensor, size: tuple[int, int], only: str | None = None
) -> Image.Image:
    """Tokens (books, h, w) to a picture of `size` = (W, H)."""
    return to_image(model.detokenize(tokens[None].to(model.device), size=size[::-1], only=only)[0])


def _peek(path: Path) -> tuple[int, bool]:
    """Frames and transparency of a picture file that `read_image` is about to read, or to refuse better.

    Raises ValueError for more pixels than `LARGEST_UPLOAD`, before they are decoded.
    """
    pixels, frames, transparent = 0, 1, False
    with suppress(Exception), warnings.catch_warnings():  # a broken file; reading it says what is wrong
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(path) as image:
                pixels = image.width * image.height
                frames, transparent = getattr(image, "n_frames", 1), image.has_transparency_data
        except Image.DecompressionBombError:
            pixels = LARGEST_UPLOAD + 1
    if pixels > LARGEST_UPLOAD:
        raise ValueError(f"'{path}' is too large for this app, which reads at most {LARGEST_UPLOAD:,} pixels")
    return frames, transparent


@contextmanager
def _named_without_folder(path: Path) -> Iterator[None]:
    """The folder is the server's own and says nothing to who uploaded the file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), path.name)) from error


def _row(what: str, count: int, rate: float, measured: tuple[float | None, float | None]) -> list[object]:
    decibels, similarity = measured
    return [
        what,
        count,
        round(rate, 4),
        None if decibels is None else round(decibels, 2),
        None if similarity is None else round(similarity, 4),
    ]


def _enlargement(size: tuple[int, int]) -> int:
    return max(1, SMALLEST_SHOWN // max(size))


def _size_text(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
