"""`dualcodebook reconstruct | tokenize | detokenize`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .inputs import add_model, check_file, find_images, load_model, png_paths, save_png

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ..autoencoder_dualcodebook import DualCodebookVQModel


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds the three commands to the parser."""
    command = commands.add_parser("reconstruct", help="encode and decode pictures; show and measure the result")
    _add_images(command)
    command.add_argument("--output", type=Path, default=Path("reconstructions"), help="folder (default: %(default)s)")
    command.add_argument("--sheet", type=Path, metavar="FILE.png", help="write all comparisons into one PNG as well")
    add_model(command)
    command.set_defaults(run=_reconstruct)

    command = commands.add_parser("tokenize", help="pictures -> token file")
    _add_images(command)
    command.add_argument("--output", type=Path, required=True, metavar="FILE.safetensors", help="the token file")
    add_model(command)
    command.set_defaults(run=_tokenize)

    command = commands.add_parser("detokenize", help="token file -> pictures")
    command.add_argument("file", type=Path, help="token file written by `tokenize`")
    command.add_argument("--output", type=Path, required=True, help="folder; PNGs are named after the originals")
    add_model(command)
    command.set_defaults(run=_detokenize)


def _add_images(command: argparse.ArgumentParser) -> None:
    from ..image_processing_dualcodebook import DEFAULT_MAX_PIXELS

    command.add_argument("images", nargs="+", type=Path, help="pictures, or folders of pictures (not their subfolders)")
    command.add_argument(
        "--max-pixels",
        type=int,
        default=DEFAULT_MAX_PIXELS,
        metavar="N",
        help="shrink larger pictures to N pixels, keeping their shape; 0: never (default: %(default)s)",
    )


@dataclass
class _Coded:
    """One picture through the tokenizer.

    original: as it was encoded, after any resize of the file's picture. tokens: (books, h, w).
    quality: PSNR and SSIM of the reconstruction, where one was made.
    """

    name: str
    file_size: tuple[int, int]
    original: Image.Image
    tokens: torch.Tensor
    quality: tuple[float, float] | None = None

    @property
    def positions(self) -> int:
        return self.tokens[0].numel()

    @property
    def pixels(self) -> int:
        return self.original.width * self.original.height


def _reconstruct(arguments: argparse.Namespace) -> int:
    from ..figures import comparison, comparison_sheet
    from ..image_processing_dualcodebook import to_image, to_pixels
    from ..metrics.images import image_quality

    paths = find_images(arguments)
    names = [path.name for path in paths]
    figure_paths = png_paths(arguments.output, names, "-comparison")
    image_paths = png_paths(arguments.output, names, "-reconstruction")
    if arguments.sheet:
        check_file(arguments.sheet, "--sheet", ".png")
    model = load_model(arguments)
    table, figures = _Table(model), []
    arguments.output.mkdir(parents=True, exist_ok=True)
    for index, coded in enumerate(_encode(model, paths, arguments.max_pixels)):
        pixels = model.detokenize(coded.tokens[None], size=coded.original.size[::-1])
        coded.quality = image_quality(pixels, to_pixels(coded.original)[None])
        table.add(coded)
        image, ids = to_image(pixels[0]), coded.tokens.cpu()
        figure = comparison(
            coded.original, image, ids, list(table.codebooks.values()), list(table.codebooks), table.title(coded)
        )
        save_png(figure, figure_paths[index])
        save_png(image, image_paths[index])
        if arguments.sheet:
            figures.append(figure)
    if arguments.sheet:
        arguments.sheet.parent.mkdir(parents=True, exist_ok=True)
        save_png(comparison_sheet(figures), arguments.sheet)
    print(table)
    print(f"pictures written to {arguments.output}")
    return 0


def _tokenize(arguments: argparse.Namespace) -> int:
    from ..configuration_dualcodebook import config_hash
    from ..tokens.file import TokenFile, TokenizedImage, save_tokens

    paths = find_images(arguments)
    check_file(arguments.output, "--output", ".safetensors")
    model = load_model(arguments)
    table, images = _Table(model), []
    for coded in _encode(model, paths, arguments.max_pixels):
        table.add(coded)
        images.append(TokenizedImage(coded.name, coded.original.size[::-1], coded.tokens.cpu()))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    content = TokenFile(images, model.downsample_factor, table.codebooks, config_hash(model.config))
    save_tokens(arguments.output, content)
    print(table)
    print(f"tokens written to {arguments.output}")
    return 0


def _detokenize(arguments: argparse.Namespace) -> int:
    from ..configuration_dualcodebook import config_hash
    from ..image_processing_dualcodebook import to_image
    from ..tokens.file import load_tokens

    content = load_tokens(arguments.file)
    paths = png_paths(arguments.output, [image.name for image in content.images])
    model = load_model(arguments)
    if content.config_hash != config_hash(model.config):
        raise ValueError(
            f"the tokens in '{arguments.file}' are of a model with config hash {content.config_hash}, books "
            f"{content.codebooks}; this model's is {config_hash(model.config)}; give the one that made them by `--model`"
        )
    arguments.output.mkdir(parents=True, exist_ok=True)
    for image, path in zip(content.images, paths, strict=True):
        pixels = model.detokenize(image.tokens[None].to(model.device), size=image.size)
        save_png(to_image(pixels[0]), path)
    print(f"{len(paths)} pictures written to {arguments.output}")
    return 0


def _encode(model: DualCodebookVQModel, paths: Sequence[Path], max_pixels: int) -> Iterator[_Coded]:
    from ..image_processing_dualcodebook import read_image, resize_to_max_pixels, to_pixels

    for path in paths:
        image = read_image(path)
        original = resize_to_max_pixels(image, max_pixels or None)
        tokens = model.tokenize(to_pixels(original)[None].to(model.device, model.dtype))[0]
        yield _Coded(path.name, image.size, original, tokens)


class _Table:
    """One line a picture, and one for all of several: sizes, bytes, bits per pixel, quality, codes used."""

    def __init__(self, model: DualCodebookVQModel) -> None:
        self.bits = model.quantize.bits_per_position
        self.codebooks = {name: codebook.size for name, codebook in model.quantize.codebooks.items()}
        self.used: dict[str, set[int]] = {name: set() for name in self.codebooks}
        self.rows: list[list[str]] = []
        self.quality: list[tuple[float, float]] = []
        self.bytes = self.positions = self.pixels = 0

    def add(self, coded: _Coded) -> None:
        (width, height), (file_width, file_height) = coded.original.size, coded.file_size
        resized = f" (of {file_width}x{file_height})" if coded.original.size != coded.file_size else ""
        used = {name: set(ids.unique().tolist()) for name, ids in zip(self.codebooks, coded.tokens, strict=True)}
        grid = "x".join(map(str, coded.tokens.shape))
        quality = [coded.quality] if coded.quality else []
        cells = [coded.name, f"{width}x{height}{resized}", grid, *self._rate_cells(self._bytes(coded), coded)]
        self.rows.append(cells + self._quality_cells(quality) + self._usage_cells(used))
        self.bytes += self._bytes(coded)
        self.positions += coded.positions
        self.pixels += coded.pixels
        self.quality += quality
        for name in self.codebooks:
            self.used[name] |= used[name]

    def title(self, coded: _Coded) -> str:
        """What stands above a picture's figure."""
        count, rate = self._rate_cells(self._bytes(coded), coded)
        psnr, ssim = self._quality_cells([coded.quality])
        parts = [coded.name, f"{count} bytes", f"{rate} bits per pixel", f"PSNR {psnr} dB", f"SSIM {ssim}"]
        return "   ·   ".join(parts)

    def _bytes(self, coded: _Coded) -> int:
        from ..tokens.file import token_bytes

        return token_bytes(tuple(coded.tokens.shape[1:]), self.bits)

    def _rate_cells(self, count: int, counted: _Coded | _Table) -> list[str]:
        return [str(count), f"{counted.positions * self.bits / counted.pixels:.4f}"]

    def _quality_cells(self, quality: Sequence[tuple[float, float]]) -> list[str]:
        means = [sum(values) / len(values) for values in zip(*quality, strict=True)]
        return [f"{mean:.{digits}f}" for mean, digits in zip(means, (2, 4), strict=False)]

    def _usage_cells(self, used: dict[str, set[int]]) -> list[str]:
        return [f"{len(used[name])}/{size}" for name, size in self.codebooks.items()]

    def __str__(self) -> str:
        header = ["picture", "pixels", "tokens", "bytes", "bits/pixel"]
        header += ["PSNR dB", "SSIM"] if self.quality else []
        rows = [header + [f"{name} codes" for name in self.codebooks], *self.rows]
        if len(self.rows) > 1:
            summary = [f"all {len(self.rows)}", "", "", *self._rate_cells(self.bytes, self)]
            rows.append(summary + self._quality_cells(self.quality) + self._usage_cells(self.used))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if place > 1 else cell.ljust(width) for place, (cell, width) in enumerate(cells)
            )
            for cells in (zip(row, widths, strict=True) for row in rows)
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
