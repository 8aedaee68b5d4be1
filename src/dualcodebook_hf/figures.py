"""Figures made with PIL alone: original and reconstruction side by side, error maps, token maps, validation grids."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .clustering import principal_components
from .image_processing_dualcodebook import to_image

PAPER, INK, FAINT_INK = (255, 255, 255), (32, 34, 40), (112, 116, 126)
ERROR_SCALE = 0.25  # mean absolute difference of the channels, of 1, that gets the brightest colour
LARGEST_PANEL, SMALLEST_PANEL = 512, 256  # longer side of a panel; smaller images are enlarged by whole factors
LARGEST_PIECE = 2**20  # pixels of an error map that are made at a time
# Text and spaces for a panel of 340 pixels and less; they grow with larger ones.
MARGIN, GAP, TITLE_SIZE, CAPTION_SIZE, NOTE_SIZE, SCALE_WIDTH = 16, 12, 17, 15, 12, 110

# OKLab of a code that is the mean of all, and how far lightness, green-red and blue-yellow go from there.
OKLAB_LIGHTNESS, OKLAB_SPREAD = 0.64, (0.26, 0.12, 0.12)
COLOUR_QUANTILE = 0.75  # of the codes: so many are within the middle three quarters of each range

# Dark to light with monotone lightness: black, indigo, purple, crimson, orange, cream.
ERROR_COLOURS = [
    (4, 4, 10),
    (40, 20, 88),
    (104, 30, 122),
    (178, 50, 104),
    (236, 98, 70),
    (252, 170, 96),
    (254, 242, 200),
]


def comparison(
    original: Image.Image,
    reconstruction: Image.Image,
    tokens: torch.Tensor,
    codebook_sizes: Mapping[str, int],
    title: str | None = None,
) -> Image.Image:
    """original | reconstruction | error map | one token map per codebook, with captions.

    Images above 512 pixels are shown smaller, small ones enlarged by a whole factor (nearest neighbour).

    Args:
        original: RGB, W x H.
        reconstruction: RGB, of the same size.
        tokens: integers (codebooks, h, w); h = ceil(H/f) and w = ceil(W/f) for some power of two f.
        codebook_sizes: {name: number of codes}, in the order of the tokens.
        title: a line above the panels.

    Raises ValueError where sizes do not fit together.
    """
    if original.size != reconstruction.size:
        raise ValueError(f"`reconstruction` must have the original's size {original.size}, got {reconstruction.size}")
    if tokens.ndim != 3 or len(tokens) != len(codebook_sizes):
        raise ValueError(
            f"`tokens` must be of shape ({len(codebook_sizes)}, h, w) for the codebooks {dict(codebook_sizes)}, "
            f"got {tuple(tokens.shape)}"
        )
    size_note = f"{original.width} x {original.height}"
    grid_note = f"{tokens.shape[2]} x {tokens.shape[1]}"
    unit = max(1.0, max(_fitted_size(original.size)) / 340)
    panels = [
        _panel("original", size_note, original, Image.Resampling.LANCZOS, unit),
        _panel("reconstruction", size_note, reconstruction, Image.Resampling.LANCZOS, unit),
        _panel("absolute error", None, error_map(original, reconstruction), Image.Resampling.BOX, unit),
    ]
    for (name, codebook_size), ids in zip(codebook_sizes.items(), tokens, strict=True):
        note = f"{grid_note}, {len(torch.unique(ids))} of {codebook_size} codes"
        colours = token_map(ids, original.size)
        panels.append(_panel(f"{name} tokens", note, colours, Image.Resampling.NEAREST, unit))
    return _row(panels, title, unit)


def captioned_row(panels: Sequence[tuple[str, str, Image.Image]], title: str | None = None) -> Image.Image:
    """Images side by side, each under its caption; shown smaller or enlarged as in `comparison`.

    Args:
        panels: (caption, a smaller line below it, RGB image), at least one.
        title: a line above the panels.
    """
    unit = max(1.0, max(max(_fitted_size(image.size)) for _, _, image in panels) / 340)
    shown = [_panel(caption, note, image, Image.Resampling.LANCZOS, unit) for caption, note, image in panels]
    return _row(shown, title, unit)


def comparison_sheet(rows: Iterable[Image.Image], sizes: Sequence[tuple[int, int]] | None = None) -> Image.Image:
    """Stacks images, one below another.

    Args:
        rows: RGB images; with `sizes` each is used once and let go, so that they need not fit into memory together.
        sizes: (W, H) of each row; None: `rows` is a sequence, whose images are asked.

    Raises ValueError for no rows.
    """
    sizes = [row.size for row in rows] if sizes is None else sizes
    if not sizes:
        raise ValueError("`rows` must hold at least one image, got none")
    sheet = Image.new("RGB", (max(width for width, _ in sizes), sum(height for _, height in sizes)), PAPER)
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def grid(originals: torch.Tensor, reconstructions: torch.Tensor, columns: int = 8) -> Image.Image:
    """Pairs of rows, originals above their reconstructions.

    Args:
        originals: (B, 3, H, W) in [-1, 1]; values outside are clamped.
        reconstructions: likewise.
        columns: images of a row, at most.

    Raises ValueError for shapes that differ.
    """
    if originals.ndim != 4 or originals.shape != reconstructions.shape or not len(originals):
        raise ValueError(
            "`originals` and `reconstructions` must both be of shape (B, 3, H, W), "
            f"got {tuple(originals.shape)} and {tuple(reconstructions.shape)}"
        )
    count, _, height, width = originals.shape
    columns, gap = min(columns, count), 2
    pairs = -(-count // columns)
    sheet = Image.new(
        "RGB", (columns * (width + gap) - gap, pairs * 2 * (height + gap) + (pairs - 1) * gap * 2 - gap), PAPER
    )
    for index in range(count):
        left, top = index % columns * (width + gap), index // columns * (2 * (height + gap) + gap * 2)
        sheet.paste(to_image(originals[index]), (left, top))
        sheet.paste(to_image(reconstructions[index]), (left, top + height + gap))
    return sheet


def sample_sheet(rows: Sequence[tuple[str | None, Sequence[Image.Image]]]) -> Image.Image:
    """Rows of images in their own size, each under its title.

    Args:
        rows: (title or None, RGB images), of which there is at least one in each row.

    Raises ValueError for no rows, and for a row without images.
    """
    if not all(images for _, images in rows):
        raise ValueError("`rows` must hold at least one image each, got none")
    return comparison_sheet([_row(images, title, 1.0) for title, images in rows])


def error_map(original: Image.Image, reconstruction: Image.Image) -> Image.Image:
    """Mean absolute difference of the channels, each of 0..1, from 0 (black) to `ERROR_SCALE` and above (cream)."""
    errors = Image.new("RGB", original.size)
    step = max(LARGEST_PIECE // original.width, 1)
    for top in range(0, original.height, step):  # in pieces: a huge image in floating point takes gigabytes
        box = (0, top, original.width, min(top + step, original.height))
        pair = (np.asarray(image.crop(box), dtype=np.float32) for image in (original, reconstruction))
        difference = np.abs(np.subtract(*pair)).mean(axis=-1)
        errors.paste(_error_colours(difference / 255 / ERROR_SCALE), (0, top))
    return errors


def token_map(ids: torch.Tensor, size: tuple[int, int], colours: np.ndarray | None = None) -> Image.Image:
    """One codebook's tokens as an image, f x f pixels per token.

    Args:
        ids: (h, w).
        size: (W, H) of the image.
        colours: (N, 3) uint8, of each code (see `code_colours`); None: ids that follow each other differ most.

    Raises ValueError when no power of two f makes the grid of that size.
    """
    height, width = ids.shape
    factor = 1
    # Of two powers of two both fit only where the grid is 1x1, and then they give the same image.
    while (-(-size[1] // factor), -(-size[0] // factor)) != (height, width):
        factor *= 2
        if factor > 2 * max(size):
            raise ValueError(
                f"`ids` of shape {(height, width)} are not the token grid of an image of {size[0]}x{size[1]}"
            )
    rows, columns = np.arange(size[1]) // factor, np.arange(size[0]) // factor
    ids = ids.cpu().numpy()
    squares = _token_colours(ids) if colours is None else colours[ids]
    return Image.fromarray(squares[rows[:, None], columns[None, :]])


def code_colours(codes: torch.Tensor) -> np.ndarray:
    """Colours in which codes that are near each other look alike: their first three principal components as OKLab.

    The components are scaled to equal spread, that of most codes (a few are far out), and squeezed (tanh) into what a
    screen can show: the first one is the lightness, the others are green to red and blue to yellow. The sign of a
    component is free: its largest entry is taken positive, so that the same codes have the same colours every time.

    Args:
        codes: (N, D).

    Returns (N, 3) uint8. Codes that are all equal are grey.
    """
    codes = codes.detach().cpu().double()
    smallest = 1e-6 * codes.abs().max().clamp_min(1e-30)  # what differs by less is rounding
    codes = codes - codes.mean(0)
    directions, _ = principal_components(codes.T @ codes, min(3, codes.shape[1]))
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    values = codes @ (directions * largest.sign()).double().T
    spread = values.abs().quantile(COLOUR_QUANTILE, dim=0)
    values = values / spread.clamp_min(max(smallest, 1e-3 * spread[0]))
    values = torch.nn.functional.pad(values, (0, 3 - values.shape[1]))
    lab = torch.tanh(values) * torch.tensor(OKLAB_SPREAD).double() + torch.tensor([OKLAB_LIGHTNESS, 0, 0])
    return _oklab_to_rgb(lab.numpy())


@functools.cache
def font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """PIL's own typeface at a size in pixels."""
    return ImageFont.load_default(size=round(size))


def text_width(text: str, face: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    """Pixels that a line of text takes."""
    return int(np.ceil(face.getlength(text)))


def _error_colours(values: np.ndarray) -> Image.Image:
    anchors = np.array(ERROR_COLOURS, dtype=np.float32)
    positions = np.linspace(0, 1, len(anchors))
    channels = [np.interp(values, positions, anchors[:, channel]) for channel in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def _token_colours(ids: np.ndarray) -> np.ndarray:
    """Ids (h, w) -> colours (h, w, 3) uint8.

    Neighbouring ids get hues a golden angle apart; lightness and chroma vary more slowly. OKLCH (Ottosson 2020), in
    which steps look equally large.
    """
    ids = ids.astype(np.int64)
    hue = 2 * np.pi * (ids * 0.6180339887498949 % 1)
    lightness = 0.50 + 0.36 * (ids * 0.7548776662466927 % 1)
    chroma = 0.06 + 0.08 * (ids * 0.5698402909980532 % 1)
    return _oklab_to_rgb(np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1))


def _oklab_to_rgb(lab: np.ndarray) -> np.ndarray:
    """OKLab (..., 3) -> sRGB (..., 3) uint8; colours that a screen cannot show are clamped."""
    to_cone = np.array(
        [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip((lab @ to_cone.T) ** 3 @ to_rgb.T, 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (encoded * 255).round().astype(np.uint8)


def _panel(caption: str, note: str | None, image: Image.Image, filter_: Image.Resampling, unit: float) -> Image.Image:
    """An image under its caption; without a note there is the error map's colour scale."""
    size = _fitted_size(image.size)
    image = image.resize(size, filter_ if max(size) < max(image.size) else Image.Resampling.NEAREST)
    caption_font, note_font = font(CAPTION_SIZE * unit), font(NOTE_SIZE * unit)
    legend = _legend(unit) if note is None else None
    second_width = legend.width if legend else text_width(note, note_font)
    second_top, top = round((CAPTION_SIZE + 4) * unit), round((CAPTION_SIZE + NOTE_SIZE + 14) * unit)
    width = max(image.width, text_width(caption, caption_font), second_width)
    panel = Image.new("RGB", (width, top + image.height), PAPER)
    draw = ImageDraw.Draw(panel)
    draw.text((0, 0), caption, INK, caption_font)
    if legend:
        panel.paste(legend, (0, second_top))
    else:
        draw.text((0, second_top), note, FAINT_INK, note_font)
    panel.paste(image, (0, top))
    return panel


def _legend(unit: float) -> Image.Image:
    """0 [black ... cream] 0.25, the scale of the error map."""
    legend = Image.new("RGB", (round(SCALE_WIDTH * unit), round((NOTE_SIZE + 4) * unit)), PAPER)
    draw, face = ImageDraw.Draw(legend), font(NOTE_SIZE * unit)
    left, width = text_width("0", face) + round(5 * unit), round(60 * unit)
    draw.text((0, 0), "0", FAINT_INK, face)
    legend.paste(_error_colours(np.tile(np.linspace(0, 1, width), (round(8 * unit), 1))), (left, round(4 * unit)))
    draw.text((left + width + round(5 * unit), 0), f"{ERROR_SCALE:g}", FAINT_INK, face)
    return legend


def _row(panels: Sequence[Image.Image], title: str | None, unit: float) -> Image.Image:
    margin, gap, face = round(MARGIN * unit), round(GAP * unit), font(TITLE_SIZE * unit)
    top = margin + (round((TITLE_SIZE + GAP) * unit) if title else 0)
    width = max(sum(panel.width + gap for panel in panels) - gap, text_width(title or "", face))
    row = Image.new("RGB", (width + 2 * margin, top + max(panel.height for panel in panels) + margin), PAPER)
    if title:
        ImageDraw.Draw(row).text((margin, round((MARGIN - 4) * unit)), title, INK, face)
    left = margin
    for panel in panels:
        row.paste(panel, (left, top))
        left += panel.width + gap
    return row


def _fitted_size(size: tuple[int, int]) -> tuple[int, int]:
    """The size (W, H) at which an image is shown."""
    longer = max(size)
    if longer > LARGEST_PANEL:
        return tuple(max(1, round(side * LARGEST_PANEL / longer)) for side in size)
    factor = max(1, SMALLEST_PANEL // longer)
    return tuple(side * factor for side in size)
