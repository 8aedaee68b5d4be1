"""The paper's figures 3 to 5 and the rate-quality figure: codebooks, models side by side, extremes, codecs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from charts import rate_curves, usage_bars
from charts import to_image as chart_image
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
WINDOW = 64  # side of the marked region of `models_figure`, in pixels of the image


@dataclass(frozen=True)
class Tile:
    """An image with up to two lines under it.

    Attributes:
        image: the image.
        caption: first line.
        note: second line, in small type.
        box: (left, top, right, bottom) of a frame, in the image's pixels.
        marked: the lines are in colour.
    """

    image: Image.Image
    caption: str = ""
    note: str = ""
    box: tuple[int, int, int, int] | None = None
    marked: bool = False


@torch.no_grad()
def code_patches(model: DualCodebookCore, codebook: str) -> torch.Tensor:
    """What each code of a codebook looks like: (N, 3, f, f) in about [-1, 1], other codebooks at their codes' mean.

    The middle of 3 x 3 positions that all hold the code, so that no border shows. Raises ValueError for an unknown
    codebook and for one of more than 4096 codes.
    """
    codebooks = model.quantize.codebooks
    if codebook not in codebooks:
        raise ValueError(f"`codebook` must be one of {', '.join(codebooks)}, got {codebook!r}")
    size, factor = codebooks[codebook].size, model.downsample_factor
    if size > MOST_CODES:
        raise ValueError(f"`codebook` must have at most {MOST_CODES} codes to be drawn, {codebook} has {size}")
    tokens = torch.zeros(size, len(codebooks), 3, 3, dtype=torch.long, device=model.device)
    tokens[:, list(codebooks).index(codebook)] = torch.arange(size, device=model.device)[:, None, None]
    decoded = [model.detokenize(part, only=codebook).float().cpu() for part in tokens.split(PATCH_BATCH)]
    return torch.cat(decoded)[..., factor : 2 * factor, factor : 2 * factor]


def codebook_figure(codebooks: dict[str, tuple[torch.Tensor, torch.Tensor]], title: str) -> Image.Image:
    """Codebooks side by side: a grid of their codes, the most used first, and how often each is used (fig. 3).

    Args:
        codebooks: name -> patches (N, 3, f, f) in [-1, 1], counts (N,) of a split. Codes that no token uses are crossed
            out.
        title: above everything.
    """
    highest = 2 * max(_times_of_equal_use(counts).max().item() for _, counts in codebooks.values())
    panels = [_codebook_panel(name, *content, max(highest, 2)) for name, content in codebooks.items()]
    return _titled(_beside(panels, 2 * MARGIN), title)


def _times_of_equal_use(counts: torch.Tensor) -> torch.Tensor:
    return counts.double() / counts.sum().clamp_min(1) * len(counts)


def _codebook_panel(name: str, patches: torch.Tensor, counts: torch.Tensor, highest: float) -> Image.Image:
    order = counts.argsort(descending=True, stable=True)
    patches, counts = patches[order], counts[order]
    size, side = len(counts), 22
    columns = 2 ** math.ceil(math.log2(size) / 2 + 0.5) if size > 1 else 1  # 512 codes: 32 x 16
    width, grid_top, grid_height = max(columns * side, 400), 48, -(-size // columns) * side
    bars = chart_image(usage_bars(_times_of_equal_use(counts).numpy(), highest, width, 200))
    panel = Image.new("RGB", (width, grid_top + grid_height + bars.height), PAPER)
    draw = ImageDraw.Draw(panel)
    used, bits = int((counts > 0).sum()), entropy_bits(counts)
    draw.text((0, 0), f"{name} codebook", INK, font(17))
    share = f"{used} of {size} codes used   ·   perplexity {2**bits:.0f}   ·   most used first"
    draw.text((0, 24), share, FAINT_INK, font(13))
    for index in range(size):
        left, top = index % columns * side, grid_top + index // columns * side
        patch = to_image(patches[index]).resize((side - 2, side - 2), Image.Resampling.BICUBIC)
        panel.paste(patch, (left, top))
        if counts[index] == 0:
            draw.line((left, top, left + side - 3, top + side - 3), MARK, 2)
    panel.paste(bars, (0, grid_top + grid_height))
    return panel


def difference_window(original: torch.Tensor, reconstructions: Sequence[torch.Tensor], side: int = WINDOW) -> tuple:
    """(left, top, right, bottom) of the square in which the models' squared errors differ the most.

    Args:
        original: (3, H, W).
        reconstructions: each (3, H, W); the difference is that of the worst to the best one. A single one: where its
            error is largest.
        side: of the square, in pixels.
    """
    height, width = original.shape[-2:]
    side = min(side, height, width)
    errors = torch.stack([(one - original).square().mean(0) for one in reconstructions])
    sums = F.avg_pool2d(errors[:, None], side, stride=1)[:, 0]
    spread = sums.amax(0) - sums.amin(0) if len(reconstructions) > 1 else sums[0]
    top, left = divmod(int(spread.argmax()), spread.shape[1])
    return left, top, left + side, top + side


def models_figure(rows: Sequence[Sequence[Tile]], names: Sequence[str], title: str) -> Image.Image:
    """A row for each image, a column for each name, the box of each tile enlarged beside it (fig. 4).

    Args:
        rows: a tile for each name.
        names: heads of the columns.
        title: above everything.

    Raises ValueError where a row does not have one tile per name, or a tile no box.
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
    """The best images above the worst ones (fig. 5).

    Args:
        best: a row of originals and a row of reconstructions.
        worst: the same.
        title: above everything.
    """
    parts = []
    for name, rows in (("best by PSNR", best), ("worst by PSNR", worst)):
        parts.append(_headed(tiles_figure(rows), name))
    return _titled(comparison_sheet(parts), title)


def rate_figure(
    points: dict[str, Sequence[dict[str, float]]], title: str, notes: Sequence[str], strip: Image.Image
) -> Image.Image:
    """PSNR, SSIM and kernel distance against bits per pixel, the comparison in words, and under it images.

    Args:
        points: see `charts.rate_curves`.
        title: above everything.
        notes: lines between the curves and the images.
        strip: the images.
    """
    curves = chart_image(rate_curves(points, RATES, strip.width))
    return _titled(comparison_sheet([curves, _lines(notes), strip]), title)


def tiles_figure(rows: Sequence[Sequence[Tile]], heads: Sequence[str] = (), side: int | None = None) -> Image.Image:
    """Tiles in rows and columns.

    Args:
        rows: not necessarily of one length.
        heads: one over each column.
        side: longer side at which all images are shown; None: as they are.
    """
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
