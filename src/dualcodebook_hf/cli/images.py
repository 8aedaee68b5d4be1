"""`dualcodebook reconstruct | tokenize | detokenize`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import staged_files
from ..flags import Parser, Switch
from ..loading import check_tokenizer_name
from .inputs import (
    ImageFile,
    Item,
    add_batch_size,
    add_model,
    add_on_bad_image,
    add_other_weights,
    add_output,
    check_file,
    find_images,
    load_model,
    load_model_with_hash,
    not_negative,
    png_paths,
    report_left_out,
    save_png,
    set_command,
    with_bar,
)
from .tables import text_table

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from tqdm import tqdm

    from ..autoencoder_dualcodebook import DualCodebookVQModel
    from ..reconstruction import Reconstruction


def add_reconstruct(command: Parser) -> None:
    """Adds the command's flags to its parser."""
    set_command(command, _reconstruct, "IMAGE ...")
    _add_images(command)
    output = command.add_argument_group("what is written")
    add_output(output, "comparisons and reconstructions as PNG", "reconstructions")
    output.add_argument("--sheet", type=Path, metavar="FILE.png", help="write all comparisons into one PNG as well")
    add_model(command.add_argument_group("the tokenizer"), fast=True)


def add_tokenize(command: Parser) -> None:
    """Adds the command's flags to its parser."""
    set_command(command, _tokenize, "IMAGE ...")
    _add_images(command)
    output = command.add_argument_group("what is written")
    add_output(output, "the token file", "tokens.safetensors", "FILE.safetensors")
    add_model(command.add_argument_group("the tokenizer"), fast=True)


def add_detokenize(command: Parser) -> None:
    """Adds the command's flags to its parser."""
    set_command(command, _detokenize, "FILE")
    command.add_argument("file", type=Path, metavar="FILE", help="token file written by `tokenize`")
    add_batch_size(command, 1, "up to N images that follow each other and have one grid of tokens at a time")
    output = command.add_argument_group("what is written")
    add_output(output, "the images as PNG, named after the originals", "detokenized")
    tokenizer = command.add_argument_group("the tokenizer")
    add_model(tokenizer, fast=True)
    add_other_weights(tokenizer, nargs=0)


def _add_images(command: Parser) -> None:
    from ..pil_images import DEFAULT_MAX_PIXELS

    command.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="images, or folders of images")
    reading = command.add_argument_group("how they are read")
    reading.add_argument(
        "--recursive", action=Switch, nargs=0, default=False, help="read the folders' subfolders too (default: false)"
    )
    reading.add_argument(
        "--max-pixels",
        type=not_negative,
        default=DEFAULT_MAX_PIXELS,
        metavar="N",
        help="shrink larger images to N pixels, keeping their shape; 0: never (default: %(default)s)",
    )
    add_batch_size(
        reading,
        1,
        "up to N images that follow each other and are of one size at a time: faster on a GPU; in rare places another "
        "token, by rounding",
    )
    add_on_bad_image(reading, "name it on stderr, do the others, and exit with 0 unless none is left")


@dataclass(frozen=True)
class _Source:
    """An image of the command line.

    Attributes:
        number: its place among those that were named.
        name: of its file.
        file_size: (W, H) of the file's image.
        image: RGB, after any resize.
    """

    number: int
    name: str
    file_size: tuple[int, int]
    image: Image.Image


def _read_batches(files: Sequence[ImageFile], arguments: argparse.Namespace) -> Iterator[list[_Source]]:
    """Images that follow each other and are of one size, `--batch-size` at the most. A bar on a terminal counts them.

    Raises BadImageError for an image that cannot be read; under `--on-bad-image skip`, where none can.
    """
    sources = _read_images(with_bar(files, len(files)), arguments)
    return _batches(sources, arguments.batch_size, lambda source: source.image.size)


def _batches(items: Iterable[Item], batch_size: int, size: Callable[[Item], object]) -> Iterator[list[Item]]:
    """Items that follow each other and are of one size, `batch_size` at the most."""
    batch: list[Item] = []
    for item in items:
        if batch and (len(batch) == batch_size or size(item) != size(batch[0])):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _read_images(files: Iterable[ImageFile], arguments: argparse.Namespace) -> Iterator[_Source]:
    from ..pil_images import BadImageError, read_image, resize_to_max_pixels

    skipped, number = [], -1
    for number, file in enumerate(files):
        try:
            image = read_image(file.path)
        except BadImageError as error:
            if arguments.on_bad_image == "error":
                raise
            skipped.append(error)
        else:
            yield _Source(number, file.name, image.size, resize_to_max_pixels(image, arguments.max_pixels or None))
    report_left_out(skipped, number + 1)


def _size(batch: Sequence[_Source]) -> tuple[int, int]:
    """(H, W) of its images."""
    return batch[0].image.height, batch[0].image.width


def _tile_bar(model: DualCodebookVQModel, size: tuple[int, int], passes: int = 1) -> tqdm:
    """A bar on a terminal for the tiles of an image that is so large, (H, W), that it is done in tiles."""
    from tqdm import tqdm

    from ..reconstruction import count_tiles

    tiles = count_tiles(model, size)
    hidden = not tiles or not sys.stderr.isatty()
    return tqdm(total=passes * tiles, desc="tiles", unit="", disable=hidden, leave=False)


def _reconstruct(arguments: argparse.Namespace) -> int:
    files = find_images(arguments)
    names = [file.name for file in files]
    figure_paths = png_paths(arguments.output, names, "-comparison")
    image_paths = png_paths(arguments.output, names, "-reconstruction")
    if arguments.sheet:
        check_file(arguments.sheet, "--sheet", ".png")
    check_tokenizer_name(arguments.model, "--model")
    from PIL import Image

    from ..figures import comparison, comparison_sheet
    from ..reconstruction import reconstruct_images

    model = load_model(arguments.model, arguments, fast=True)
    table, figures = _Table(model), {}
    with staged_files(arguments.output) as folder:
        for batch in _read_batches(files, arguments):
            with _tile_bar(model, _size(batch), 2 * len(batch)) as bar:
                results = reconstruct_images(model, [source.image for source in batch], bar.update)
            for source, result in zip(batch, results, strict=True):
                table.add(source, result.tokens, (result.psnr, result.ssim))
                title = _title(source.name, result)
                figure = comparison(result.original, result.image, result.tokens, model.codebook_sizes, title)
                figures[figure_paths[source.number]] = figure.size
                save_png(figure, folder / figure_paths[source.number].name)
                save_png(result.image, folder / image_paths[source.number].name)
    if arguments.sheet:
        with staged_files(arguments.sheet.parent) as folder:
            sheet = comparison_sheet(map(Image.open, figures), list(figures.values()))
            save_png(sheet, folder / arguments.sheet.name)
    print(table)
    print(f"images written to {arguments.output}")
    return 0


def _title(name: str, result: Reconstruction) -> str:
    """What stands above an image's figure."""
    numbers = [f"{result.num_bytes} bytes", f"{result.bits_per_pixel:.4f} bits per pixel"]
    return "   ·   ".join([name, *numbers, f"PSNR {result.psnr:.2f} dB", f"SSIM {result.ssim:.4f}"])


def _tokenize(arguments: argparse.Namespace) -> int:
    files = find_images(arguments)
    check_file(arguments.output, "--output", ".safetensors")
    check_tokenizer_name(arguments.model, "--model")
    from ..reconstruction import tokenize_images
    from ..tokens.file import TokenFile, TokenizedImage, check_names, save_tokens

    check_names([file.name for file in files])
    model, weights = load_model_with_hash(arguments.model, arguments)
    table, images = _Table(model), []
    for batch in _read_batches(files, arguments):
        with _tile_bar(model, _size(batch), len(batch)) as bar:
            grids = tokenize_images(model, [source.image for source in batch], bar.update)
        for source, tokens in zip(batch, grids, strict=True):
            table.add(source, tokens)
            images.append(TokenizedImage(source.name, source.image.size[::-1], tokens))
    with staged_files(arguments.output.parent) as folder:
        save_tokens(folder / arguments.output.name, TokenFile.of_model(model, images, weights))
    print(table)
    print(f"tokens written to {arguments.output}")
    return 0


def _detokenize(arguments: argparse.Namespace) -> int:
    if not arguments.file.is_file():
        raise ValueError(f"`FILE` must be a token file, '{arguments.file}' is none")
    check_tokenizer_name(arguments.model, "--model")
    from ..reconstruction import decode_token_batch
    from ..tokens.file import load_tokens

    content = load_tokens(arguments.file)
    paths = png_paths(arguments.output, [image.name for image in content.images])
    model, weights = load_model_with_hash(arguments.model, arguments)
    content.check_model(model, arguments.file, "--model", weights, arguments.other_weights)
    with staged_files(arguments.output) as folder:
        pairs = with_bar(zip(content.images, paths, strict=True), len(paths))
        for batch in _batches(pairs, arguments.batch_size, lambda pair: pair[0].tokens.shape):
            tokens, sizes = [image.tokens for image, _ in batch], [image.size for image, _ in batch]
            with _tile_bar(model, sizes[0], len(batch)) as bar:
                images = decode_token_batch(model, tokens, sizes, bar.update)
            for image, (_, path) in zip(images, batch, strict=True):
                save_png(image, folder / path.name)
    print(f"{len(paths)} images written to {arguments.output}")
    return 0


class _Totals:
    """What some images take and lose: bytes, bits per pixel, mean quality, codes used."""

    def __init__(self, model: DualCodebookVQModel) -> None:
        self.bits_per_position, self.codebook_sizes = model.bits_per_position, model.codebook_sizes
        self.used: dict[str, set[int]] = {name: set() for name in self.codebook_sizes}
        self.qualities: list[tuple[float, float]] = []
        self.num_bytes = self.positions = self.pixels = 0

    def add(self, image: Image.Image, tokens: torch.Tensor, quality: tuple[float, float] | None) -> None:
        from ..tokens.file import token_bytes

        self.num_bytes += token_bytes(tuple(tokens.shape[1:]), self.bits_per_position)
        self.positions += tokens[0].numel()
        self.pixels += image.width * image.height
        self.qualities += [quality] if quality else []
        for used, ids in zip(self.used.values(), tokens, strict=True):
            used |= set(ids.unique().tolist())

    def cells(self) -> list[str]:
        means = [sum(values) / len(values) for values in zip(*self.qualities, strict=True)]
        return [
            str(self.num_bytes),
            f"{self.positions * self.bits_per_position / self.pixels:.4f}",
            *(f"{mean:.{digits}f}" for mean, digits in zip(means, (2, 4), strict=False)),
            *(f"{len(self.used[name])}/{size}" for name, size in self.codebook_sizes.items()),
        ]


class _Table:
    """One line per image, and one for all of several; under a codebook's name, how many of its codes are used."""

    def __init__(self, model: DualCodebookVQModel) -> None:
        self.model, self.all = model, _Totals(model)
        self.rows: list[list[str]] = []

    def add(self, source: _Source, tokens: torch.Tensor, quality: tuple[float, float] | None = None) -> None:
        """Adds an image with its tokens (codebooks, h, w) and, where it was reconstructed, its PSNR and SSIM."""
        one = _Totals(self.model)
        for totals in (one, self.all):
            totals.add(source.image, tokens, quality)
        size = _size_text(source.image.size)
        if source.image.size != source.file_size:
            size += f" (of {_size_text(source.file_size)})"
        self.rows.append([source.name, size, "x".join(map(str, tokens.shape)), *one.cells()])

    def __str__(self) -> str:
        header = ["image", "pixels", "tokens", "bytes", "bits/px"]
        header += ["PSNR", "SSIM"] if self.all.qualities else []
        rows = [header + list(self.all.codebook_sizes), *self.rows]
        if len(self.rows) > 1:
            rows.append([f"all {len(self.rows)}", "", "", *self.all.cells()])
        return text_table(rows)


def _size_text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
