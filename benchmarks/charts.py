"""Small charts drawn with PIL: curves over a logarithmic axis, bars; and the type and colours of all figures."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAPER, INK, FAINT_INK, GRID_INK = (255, 255, 255), (32, 34, 40), (112, 116, 126), (228, 230, 235)
# Told apart by people who see colours differently too (Okabe and Ito 2008): blue, vermilion, green, purple, ...
SERIES_COLOURS = [(0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233)]
SUPERSAMPLING = 3  # lines are drawn larger and reduced, which smooths them


@dataclass(frozen=True)
class Series:
    """points: (x, y), drawn as a curve with dots; a single one as a diamond. first_hollow: the first dot is a ring."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: tuple[int, int, int]
    first_hollow: bool = False


def curves(
    series: Sequence[Series],
    size: tuple[int, int],
    title: str,
    x_label: str,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
) -> Image.Image:
    """Curves over a logarithmic x axis, with a legend at the bottom right; the axes end at their first and last ticks.

    `size`: (W, H) of the picture. Points beyond the axes are not drawn. Raises ValueError for fewer than two ticks.
    """
    if len(x_ticks) < 2 or len(y_ticks) < 2 or x_ticks[0] <= 0:
        raise ValueError(f"`x_ticks` and `y_ticks` must hold two ticks or more, x above 0, got {x_ticks}, {y_ticks}")
    width, height = size
    chart = Image.new("RGB", size, PAPER)
    left, top, right, bottom = 46, 34, width - 14, height - 46
    draw, small = ImageDraw.Draw(chart), font(12)

    def place(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / x_ticks[0]) / math.log(x_ticks[-1] / x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return left + across * (right - left), bottom - up * (bottom - top)

    for tick in x_ticks:
        x, text = place(tick, y_ticks[0])[0], f"{tick:g}"
        draw.line([(x, top), (x, bottom)], GRID_INK)
        draw.text((x - text_width(text, small) / 2, bottom + 6), text, FAINT_INK, small)
    for tick in y_ticks:
        y, text = place(x_ticks[0], tick)[1], f"{tick:g}"
        draw.line([(left, y), (right, y)], GRID_INK)
        draw.text((left - text_width(text, small) - 8, y - 8), text, FAINT_INK, small)
    draw.text((left, 6), title, INK, font(15))
    draw.text(((left + right - text_width(x_label, small)) / 2, bottom + 24), x_label, FAINT_INK, small)
    strokes = []
    for one in series:
        points = [place(x, y) for x, y in one.points if x >= x_ticks[0]]
        points = [point for point in points if left <= point[0] <= right and top <= point[1] <= bottom]
        strokes += [(one, points)] if points else []
    samples = _legend(draw, series, right - 8, bottom - 8)
    return _with_strokes(chart, [*strokes, *samples])


def bars(counts: np.ndarray, size: tuple[int, int], colour: tuple[int, int, int]) -> Image.Image:
    """Bars from left to right over the whole width, the highest as high as the picture; thin ones are averaged."""
    width, height = size
    counts = np.asarray(counts, dtype=np.float64)
    edges = np.linspace(0, len(counts), width * SUPERSAMPLING + 1)
    cumulative = np.concatenate([[0], np.cumsum(counts)])
    heights = np.diff(np.interp(edges, np.arange(len(counts) + 1), cumulative)) / np.diff(edges)
    heights = heights / max(counts.max(), 1e-12) * height * SUPERSAMPLING
    filled = np.arange(height * SUPERSAMPLING)[::-1, None] < heights[None]
    pixels = np.where(filled[..., None], np.uint8(colour), np.uint8(PAPER))
    return Image.fromarray(pixels).resize(size, Image.Resampling.BOX)


@functools.cache
def font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """PIL's own face at a size in pixels."""
    return ImageFont.load_default(size=round(size))


def text_width(text: str, face: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    """Pixels that a line of text takes."""
    return int(np.ceil(face.getlength(text)))


def _legend(
    draw: ImageDraw.ImageDraw, series: Sequence[Series], right: int, bottom: int
) -> list[tuple[Series, list[tuple[float, float]]]]:
    """Draws frame and names; returns the samples, still to be drawn."""
    small, line, samples = font(13), 19, []
    left = right - max(text_width(one.name, small) for one in series) - 36
    top = bottom - line * len(series) - 8
    draw.rectangle((left, top, right, bottom), PAPER, GRID_INK)
    for index, one in enumerate(series):
        y = top + 13 + index * line
        draw.text((left + 30, y - 9), one.name, INK, small)
        samples.append((one, [(left + 15, y)] if len(one.points) == 1 else [(left + 6, y), (left + 24, y)]))
    return samples


def _with_strokes(chart: Image.Image, strokes: Sequence[tuple[Series, Sequence[tuple[float, float]]]]) -> Image.Image:
    large = chart.resize((chart.width * SUPERSAMPLING, chart.height * SUPERSAMPLING), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(large)
    for one, points in strokes:
        scaled = [(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points]
        if len(one.points) == 1:
            for x, y in scaled:
                radius = 8 * SUPERSAMPLING
                corners = [(x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y)]
                draw.polygon(corners, one.colour, PAPER, SUPERSAMPLING)
            continue
        draw.line(scaled, one.colour, 2 * SUPERSAMPLING, joint="curve")
        for index, (x, y) in enumerate(scaled):
            hollow = one.first_hollow and index == 0
            radius = (5 if hollow else 3) * SUPERSAMPLING
            box = (x - radius, y - radius, x + radius, y + radius)
            draw.ellipse(box, PAPER if hollow else one.colour, one.colour, 2 * SUPERSAMPLING)
    return large.resize(chart.size, Image.Resampling.BOX)
