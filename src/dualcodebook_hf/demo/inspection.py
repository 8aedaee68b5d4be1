"""What the demo shows of an image and its tokens: baselines of equal bytes, usage, single cells, files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..autoencoder_dualcodebook import DualCodebookVQModel
from ..evaluation.codecs import CODECS, EncodedImage, coded_within
from ..image_processing_dualcodebook import DEFAULT_MAX_PIXELS, to_pixels
from ..metrics.images import image_quality
from ..metrics.tokens import TokenStatistics
from ..reconstruction import Reconstruction, decode_tokens
from ..tokens.file import TokenFile, TokenizedImage, load_tokens, save_tokens
from .reading import Rejected, Upload, named_without_folder

LARGEST_FILE = 4 * DEFAULT_MAX_PIXELS  # pixels of all images of a token file together
MOST_IMAGES = 64  # of a token file: each is decoded alone
LONGEST_STEM = 50  # characters of a file's name, of up to 4 bytes each: a name has at most 255
SMALLEST_SHOWN = 256  # smaller images are enlarged by whole factors
HIGHLIGHT, FADED = (255, 140, 0), 0.25
BASELINES = ("JPEG", "WebP")
TABLE_HEADERS = ["What", "Bytes", "Bits per pixel", "PSNR (dB)", "SSIM"]


def baselines(result: Reconstruction) -> dict[str, EncodedImage]:
    """A JPEG and a WebP of the tokens' bytes, or their smallest possible."""
    return {name: coded_within(CODECS[name], result.original, result.num_bytes) for name in BASELINES}


def table(upload: Upload, result: Reconstruction, others: Mapping[str, EncodedImage]) -> list[list[object]]:
    """Rows under `TABLE_HEADERS`: the tokens, the baselines and the file itself, which has no quality (None)."""
    rows = [token_row("Tokens", result)]
    original = to_pixels(result.original)[None]
    for label, other in others.items():
        note = "smallest possible" if other.smallest else f"quality {other.quality}"
        rate = other.count * 8 / (result.original.width * result.original.height)
        rows.append(_row(f"{label}, {note}", other.count, rate, image_quality(to_pixels(other.image)[None], original)))
    pixels = upload.file_size[0] * upload.file_size[1]
    return [*rows, _row("The file itself", upload.file_bytes, upload.file_bytes * 8 / pixels)]


def token_row(what: str, result: Reconstruction) -> list[object]:
    """A row under `TABLE_HEADERS` of a model's tokens."""
    return _row(what, result.num_bytes, result.bits_per_pixel, (result.psnr, result.ssim))


def usage(model: DualCodebookVQModel, tokens: torch.Tensor) -> dict[str, tuple[list[int], float]]:
    """Of each codebook: how often each code occurs in tokens (codebooks, h, w), and the perplexity, 2^entropy."""
    statistics = TokenStatistics(model.codebook_sizes)
    statistics.update(tokens[None])
    health = statistics.codebooks()
    return {name: (counts.tolist(), health[name]["perplexity"]) for name, counts in statistics.histograms.items()}


def cell_patches(model: DualCodebookVQModel, result: Reconstruction, cell: tuple[int, int]) -> dict[str, Image.Image]:
    """What stands at a cell in the image and its reconstruction, and what each code, and all, decode to alone.

    Alone: the middle of 3 x 3 positions that all hold the code, f x f pixels.
    """
    factor, (row, column) = model.downsample_factor, cell
    box = (column * factor, row * factor, (column + 1) * factor, (row + 1) * factor)
    box = (*box[:2], min(box[2], result.original.width), min(box[3], result.original.height))
    patches = {"original": result.original.crop(box), "reconstruction": result.image.crop(box)}
    tokens = result.tokens[:, row, column][:, None, None].expand(-1, 3, 3)
    middle = (factor, factor, 2 * factor, 2 * factor)
    size = (3 * factor, 3 * factor)
    for codebook in model.codebook_sizes:
        patches[codebook] = decode_tokens(model, tokens, size, only=codebook).crop(middle)
    patches["all"] = decode_tokens(model, tokens, size).crop(middle)
    return patches


def same_code(model: DualCodebookVQModel, result: Reconstruction, codebook: int, cell: tuple[int, int]) -> Image.Image:
    """The reconstruction, faded wherever a codebook has another code than at the cell, which is framed.

    Args:
        model: it made the tokens.
        result: the image as the model reconstructs it.
        codebook: its place in the order of the tokens.
        cell: row and column of the token.
    """
    factor, (row, column) = model.downsample_factor, cell
    scale = _enlargement(result.original.size)
    image = enlarged(result.image)
    same = (result.tokens[codebook] == result.tokens[codebook, row, column]).numpy()
    rows, columns = (np.arange(side) // (factor * scale) for side in image.size[::-1])
    bright = same[rows[:, None], columns[None, :], None]
    pixels = np.asarray(image, dtype=np.float32)
    shown = Image.fromarray(np.where(bright, pixels, 128 + (pixels - 128) * FADED).round().astype(np.uint8))
    step, line = factor * scale, max(2, factor * scale // 6)
    box = [column * step - line, row * step - line, (column + 1) * step + line - 1, (row + 1) * step + line - 1]
    ImageDraw.Draw(shown).rectangle(box, outline=HIGHLIGHT, width=line)
    return shown


def enlarged(image: Image.Image) -> Image.Image:
    """A small image enlarged by a whole factor, nearest neighbour; others as they are."""
    factor = _enlargement(image.size)
    return image if factor == 1 else image.resize(tuple(side * factor for side in image.size), Image.Resampling.NEAREST)


def save_image_tokens(
    model: DualCodebookVQModel, weights_sha256: str, upload: Upload, tokens: torch.Tensor, folder: Path
) -> Path:
    """Writes one image's tokens (codebooks, h, w) into a token file in `folder`, named after the image.

    The hash is that of the model's own file, as `encoder_hash` gives it.

    Raises Rejected for a model whose tokens no file can hold.
    """
    path = folder / f"{Path(upload.name).stem[:LONGEST_STEM]}.safetensors"
    image = TokenizedImage(upload.name, upload.image.size[::-1], tokens)
    with named_without_folder(path):
        save_tokens(path, TokenFile.of_model(model, [image], weights_sha256))
    return path


def read_image_tokens(model: DualCodebookVQModel, weights_sha256: str, path: str | Path) -> Sequence[TokenizedImage]:
    """The images of a token file that this model, of a file with such a hash, can decode.

    Raises Rejected, naming the file without its folder, for any other file, and for more than four megapixels or
    `MOST_IMAGES` pictures.
    """
    path = Path(path)
    with named_without_folder(path):
        content = load_tokens(path)
        content.check_model(model, path.name, weights_sha256=weights_sha256)
    if len(content.images) > MOST_IMAGES:
        raise Rejected(f"'{path.name}' holds {len(content.images):,} pictures; this app decodes at most {MOST_IMAGES}")
    pixels = sum(image.tokens[0].numel() for image in content.images) * content.downsample_factor**2
    if not 0 < pixels <= LARGEST_FILE:
        raise Rejected(
            f"the pictures in '{path.name}' have {pixels:,} pixels together; "
            f"this app decodes between 1 and {LARGEST_FILE:,} at once"
        )
    return content.images


def _row(what: str, num_bytes: int, rate: float, quality: tuple[float, float] | None = None) -> list[object]:
    """A row under `TABLE_HEADERS`; without quality two cells are None."""
    measured = [None, None] if quality is None else [round(quality[0], 2), round(quality[1], 4)]
    return [what, num_bytes, round(rate, 4), *measured]


def _enlargement(size: tuple[int, int]) -> int:
    return max(1, SMALLEST_SHOWN // max(size))
