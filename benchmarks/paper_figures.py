"""The paper's figures 3 to 5 and the rate-quality figure: codebooks, models side by side, extremes, codecs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from charts import GRID_INK, SERIES_COLOURS, Series, bars, curves
from PIL import Image, ImageDraw

from dualcodebook_hf.figures import FAINT_INK, INK, PAPER, comparison_sheet, font, text_width
from dualcodebook_hf.image_processing_dualcodebook import to_image
from dualcodebook_hf.metrics.tokens import entropy_bits

if TYPE_CHECKING:
    from dualcodebook_hf.core import DualCodebookCore

MARGIN, GAP = 16, 10
MARK = (213, 94, 0)  # boxes, and what is not at equal bytes
MOST_CODES = 4096  # more patches cannot be told apart on a page
PATCH_BATCH = 64
RATES = (0.03, 0.05, 0.1, 0.2, 0.5, 1)  # ticks, bits per pixel
WINDOW = 64  # side of the marked region of `models_figure`, in pixels of the picture


@dataclass(frozen=True)
class Tile:
    """A picture with up to two lines under it; box: (left, top, right, bottom) in its pixels; marked: in colour."""

    image: Image.Image
    caption: str = ""
    note: str = ""
    box: tuple[int, int, int, int] | None = None
    marked: bool = False


@torch.no_grad()
def code_patches(model: DualCodebookCore, codebook: str) -> torch.Tensor:
    """What each code of a book looks like: (N, 3, f, f) in about [-1, 1], the other books at the mean of their codes.

    The middle of 3 x 3 positions that all hold the code, so that no border shows. Raises ValueError for an unknown book
    and for one of more than 4096 codes.
    """
    codebooks = model.quantize.codebooks
    if codebook not in codebooks:
        raise ValueError(f"`book` must be one of {', '.join(codebooks)}, got {codebook!r}")
    size, factor = codebooks[codebook].size, model.downsample_factor
    if size > MOST_CODES:
        raise ValueError(f"`book` must have at most {MOST_CODES} codes to be drawn, {codebook} has {size}")
    tokens = torch.zeros(size, len(codebooks), 3, 3, dtype=torch.long, device=model.device)
    tokens[:, list(codebooks).index(codebook)] = torch.arange(size, device=model.device)[:, None, None]
    decoded = [model.detokenize(part, only=codebook).float().cpu() for part in tokens.split(PATCH_BATCH)]
    return torch.cat(decoded)[..., factor : 2 * factor, factor : 2 * factor]


def codebook_figure(codebooks: dict[str, tuple[torch.Tensor, torch.Tensor]], title: str) -> Image.Image:
    """Books side by side: a grid of their codes, the most used first, and under it how often each is used (fig. 3).

    `books`: name -> patches (N, 3, f, f) in [-1, 1], counts (N,) of a split. Codes that no token uses are crossed out.
    """
    most = max(_times_of_equal_use(counts).max().item() for _, counts in codebooks.values())
    highest = math.ceil(math.log10(max(most, 1)) + 2) + 0.3
    panels = [_codebook_panel(name, *content, highest) for name, content in codebooks.items()]
    return _titled(_beside(panels, 2 * MARGIN), title)


def _times_of_equal_use(counts: torch.Tensor) -> torch.Tensor:
    return counts.double() / counts.sum().clamp_min(1) * len(counts)


def _codebook_panel(name: str, patches: torch.Tensor, counts: torch.Tensor, highest: float) -> Image.Image:
    order = counts.argsort(descending=True, stable=True)
    patches, counts = patches[order], counts[order]
    size, side = len(counts), 22
    columns = 2 ** math.ceil(math.log2(size) / 2 + 0.5) if size > 1 else 1  # 512 codes: 32 x 16
    rows = -(-size // columns)
    width, grid_top, bar_height = columns * side, 48, 140
    panel = Image.new("RGB", (max(width, 330), grid_top + rows * side + bar_height + 40), PAPER)
    draw = ImageDraw.Draw(panel)
    used, bits = int((counts > 0).sum()), entropy_bits(counts)
    draw.text((0, 0), f"{name} book", INK, font(17))
    share = f"{used} of {size} codes used   ·   perplexity {2**bits:.0f}   ·   most used first"
    draw.text((0, 24), share, FAINT_INK, font(13))
    for index in range(size):
        left, top = index % columns * side, grid_top + index // columns * side
        patch = to_image(patches[index]).resize((side - 2, side - 2), Image.Resampling.BICUBIC)
        panel.paste(patch, (left, top))
        if counts[index] == 0:
            draw.line((left, top, left + side - 3, top + side - 3), MARK, 2)
    _usage_bars(panel, (0, grid_top + rows * side + 10, width, bar_height), counts, highest)
    return panel


def _usage_bars(panel: Image.Image, place: tuple[int, int, int, int], counts: torch.Tensor, highest: float) -> None:
    """Shares of the tokens on a logarithmic scale of `highest` decades, the lowest at 1/100 of equal use.

    `place`: (left, top, width, height); `counts`: from the most used code down.
    """
    left, top, width, height = place
    draw, small, bottom = ImageDraw.Draw(panel), font(12), top + height
    heights = (_times_of_equal_use(counts).clamp_min(1e-2).log10() + 2) / highest
    bars_height = round(height * heights.max().item())
    if bars_height:
        panel.paste(bars(heights.numpy(), (width, bars_height), SERIES_COLOURS[0]), (left, bottom - bars_height))
    draw.line((left, bottom, left + width, bottom), FAINT_INK)
    for exponent in range(-1, int(highest) - 1):
        y = bottom - round(height * (exponent + 2) / highest)
        draw.line((left, y, left + width, y), MARK if exponent == 0 else GRID_INK)
        text = "equal use" if exponent == 0 else f"{10.0**exponent:g} x"
        place, ink = (left + width - text_width(text, small) - 2, y - 15), MARK if exponent == 0 else FAINT_INK
        draw.text(place, text, ink, small, stroke_width=2, stroke_fill="white")  # it may stand on a bar
    note = f"how often each code is used, in times of equal use (1/{len(counts)} of the tokens); logarithmic"
    draw.text((left, bottom + 6), note, FAINT_INK, small)


def difference_window(original: torch.Tensor, reconstructions: Sequence[torch.Tensor], side: int = WINDOW) -> tuple:
    """(left, top, right, bottom) of the square in which the models' squared errors differ the most.

    `original` and each of `reconstructions`: (3, H, W); the difference is that of the worst to the best model. A single
    reconstruction: where its error is largest.
    """
    height, width = original.shape[-2:]
    side = min(side, height, width)
    errors = torch.stack([(one - original).square().mean(0) for one in reconstructions])
    sums = F.avg_pool2d(errors[:, None], side, stride=1)[:, 0]
    spread = sums.amax(0) - sums.amin(0) if len(reconstructions) > 1 else sums[0]
    top, left = divmod(int(spread.argmax()), spread.shape[1])
    return left, top, left + side, top + side


def models_figure(rows: Sequence[Sequence[Tile]], names: Sequence[str], title: str) -> Image.Image:
    """A row a picture, a column for the original and for each model, the box of each tile enlarged beside it (fig. 4).

    Raises ValueError where a row has not one tile a name, or a tile no box.
    """
    if any(len(row) != len(names) or not all(tile.box for tile in row) for row in rows):
        raise ValueError(f"`rows` must hold {len(names)} tiles each, all with a box")
    pairs = []
    for row in rows:
        enlarged = [tile.image.crop(tile.box).resize(tile.image.size, Image.Resampling.LANCZOS) for tile in row]
        frames = [_framed(image, MARK) for image in enlarged]
        pairs.append([part for pair in zip(row, map(Tile, frames), strict=True) for part in pair])
    heads = [head for name in names for head in (name, "")]
    return _titled(tiles_figure(pairs, heads), title)


def extremes_figure(best: Sequence[Sequence[Tile]], worst: Sequence[Sequence[Tile]], title: str) -> Image.Image:
    """Best pictures above the worst ones (fig. 5); each list: a row of originals and one of reconstructions."""
    parts = []
    for name, rows in (("best by PSNR", best), ("worst by PSNR", worst)):
        parts.append(_headed(tiles_figure(rows), name))
    return _titled(comparison_sheet(parts), title)


def rate_figure(
    points: dict[str, Sequence[dict[str, float]]], title: str, notes: Sequence[str], strip: Image.Image
) -> Image.Image:
    """PSNR and SSIM against bits per pixel, a curve for each codec, a diamond for each tokenizer; under it pictures.

    `points`: name -> [{"bits_per_pixel", "psnr", "ssim"}, ...] in order of rate; the first one of several is the
    smallest possible and drawn as a ring.
    """
    charts = []
    for key, label, step in (("psnr", "PSNR, dB", 2), ("ssim", "SSIM", 0.1)):
        series = [
            Series(name, [(point["bits_per_pixel"], point[key]) for point in found], colour, first_hollow=True)
            for (name, found), colour in zip(points.items(), _colours(len(points)), strict=True)
        ]
        heights = [y for one in series for x, y in one.points if RATES[0] <= x <= RATES[-1]]
        first, last = math.floor(min(heights) / step), math.ceil(max(heights) / step)
        y_ticks = [round(step * number, 6) for number in range(first, max(last, first + 1) + 1)]
        charts.append(curves(series, (640, 420), label, "bits per pixel; ring: smallest possible", RATES, y_ticks))
    return _titled(comparison_sheet([_beside(charts, MARGIN), _lines(notes), strip]), title)


def tiles_figure(rows: Sequence[Sequence[Tile]], heads: Sequence[str] = (), side: int | None = None) -> Image.Image:
    """Tiles in rows and columns, a head over each column; `side`: all pictures are shown at that longer side."""
    caption_face, note_face = font(14), font(12)
    top = 22 if heads else 0
    shown = [[_shown(tile, side) for tile in row] for row in rows]
    widths = [max(row[column].width for row in shown if column < len(row)) for column in range(max(map(len, shown)))]
    notes = [18 * bool(any(tile.caption for tile in row)) + 16 * bool(any(tile.note for tile in row)) for row in rows]
    heights = [max(image.height for image in row) + note for row, note in zip(shown, notes, strict=True)]
    size = (sum(widths) + GAP * (len(widths) - 1), top + sum(heights) + GAP * (len(heights) - 1))
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    lefts = [sum(widths[:column]) + GAP * column for column in range(len(widths))]
    for left, head in zip(lefts, heads, strict=False):
        draw.text((left, 0), head, INK, font(15))
    for row, images, height in zip(rows, shown, heights, strict=True):
        for left, tile, image in zip(lefts, row, images, strict=False):
            sheet.paste(image, (left, top))
            bottom = top + image.height + 3
            draw.text((left, bottom), tile.caption, MARK if tile.marked else INK, caption_face)
            draw.text(
                (left, bottom + 17 * bool(tile.caption)), tile.note, MARK if tile.marked else FAINT_INK, note_face
            )
        top += height + GAP
    return sheet


def _shown(tile: Tile, side: int | None) -> Image.Image:
    image = tile.image
    if tile.box:
        image = image.copy()
        ImageDraw.Draw(image).rectangle(tile.box, outline=MARK, width=2)
    if side and max(image.size) != side:
        scale = side / max(image.size)
        image = image.resize(tuple(max(1, round(edge * scale)) for edge in image.size), Image.Resampling.LANCZOS)
    return image


def _framed(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    image = image.copy()
    ImageDraw.Draw(image).rectangle((0, 0, image.width - 1, image.height - 1), outline=colour, width=2)
    return image


def _beside(panels: Sequence[Image.Image], gap: int) -> Image.Image:
    sheet = Image.new(
        "RGB", (sum(panel.width + gap for panel in panels) - gap, max(panel.height for panel in panels)), PAPER
    )
    left = 0
    for panel in panels:
        sheet.paste(panel, (left, 0))
        left += panel.width + gap
    return sheet


def _headed(content: Image.Image, head: str) -> Image.Image:
    sheet = Image.new("RGB", (content.width, content.height + 26 + MARGIN), PAPER)
    ImageDraw.Draw(sheet).text((0, 0), head, INK, font(16))
    sheet.paste(content, (0, 26))
    return sheet


def _lines(texts: Sequence[str]) -> Image.Image:
    face = font(13)
    sheet = Image.new("RGB", (max(text_width(text, face) for text in texts), 19 * len(texts) + MARGIN), PAPER)
    for index, text in enumerate(texts):
        ImageDraw.Draw(sheet).text((0, 4 + 19 * index), text, INK, face)
    return sheet


def _titled(content: Image.Image, title: str) -> Image.Image:
    face = font(18)
    width = max(content.width, text_width(title, face)) + 2 * MARGIN
    sheet = Image.new("RGB", (width, content.height + 2 * MARGIN + 34), PAPER)
    ImageDraw.Draw(sheet).text((MARGIN, MARGIN - 2), title, INK, face)
    sheet.paste(content, (MARGIN, MARGIN + 34))
    return sheet


def _colours(count: int) -> list[tuple[int, int, int]]:
    return [SERIES_COLOURS[index % len(SERIES_COLOURS)] for index in range(count)]
