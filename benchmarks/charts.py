"""Charts by matplotlib: dots of results, curves of quality against rate, bars of how often codes are used."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import SymmetricalLogLocator
from PIL import Image

# Okabe and Ito (2008): told apart by people who see colours differently, too.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
LINE_STYLES = ["-", "--", "-.", ":"]
INK, FAINT_INK, GRID_INK = "#202228", "#70747E", "#E2E4E9"
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": GRID_INK,
    "axes.grid": True,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "font.size": 10,
    "grid.color": GRID_INK,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": FAINT_INK,
    "xtick.minor.bottom": False,
    "ytick.color": FAINT_INK,
    "ytick.minor.left": False,
}
RATE_PANELS = {  # key of a point: title
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "kd_effnetlite2": "KD lite2: kernel distance x 1000, lower is better",
}
DOT, HOLLOW = {"marker": "o", "linestyle": "none"}, {"markerfacecolor": "white"}


@dataclass(frozen=True)
class DotRow:
    """A row of one panel of `dot_plot`.

    Attributes:
        name: of the row; equal names share a line in all panels.
        rate: in bits per position, gives the colour.
        series: for each series the numbers of all seeds, none where the row has no such series.
        text: printed beside the panel.
    """

    name: str
    rate: float
    series: Sequence[Sequence[float]]
    text: str


@matplotlib.rc_context(STYLE)
def dot_plot(
    title: str,
    note: str,
    rows: Sequence[tuple[str, float]],
    panels: dict[str, Sequence[DotRow]],
    names: Sequence[str] = (),
) -> Figure:
    """A panel for each data set, a line for each row: the mean, +- one deviation, a stroke for each of several seeds.

    Args:
        title: above everything.
        note: a line under the title.
        rows: (name, rate) from the top down.
        panels: by title; a panel need not have every row.
        names: of the series where there are two: the second one is hollow.
    """
    rates = sorted({rate for _, rate in rows}, reverse=True)
    colours = {rate: COLOURS[index % len(COLOURS)] for index, rate in enumerate(rates)}
    figure = Figure((2 + 4.2 * len(panels), 1.5 + 0.25 * len(rows)), dpi=150)
    figure.suptitle(f"{title}\n{note}", x=0.01, ha="left")
    handles = [Line2D([], [], color=colours[rate], **DOT, label=f"{rate:g} bits per position") for rate in rates]
    for order, name in enumerate(names):
        handles.append(Line2D([], [], color=FAINT_INK, **DOT, **(HOLLOW if order else {}), label=name))
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), handletextpad=0.2)
    heights = {name: height for height, (name, _) in enumerate(rows)}
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (panel, members) in zip(axes, panels.items(), strict=True):
        axis.set_title(panel)
        axis.set_yticks(range(len(rows)), heights, color=INK)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.grid(axis="y", visible=False)
        axis.tick_params(left=False)
        for height in range(1, len(rows)):
            if rows[height][1] != rows[height - 1][1]:
                axis.axhline(height - 0.5, color=FAINT_INK, linewidth=0.8)
        for row in members:
            _dots(axis, heights[row.name], row, colours[row.rate])
        values = [value for row in members for numbers in row.series for value in numbers]
        room = 0.04 * (max(values) - min(values)) or 0.5
        axis.set_xlim(min(values) - room, max(values) + room)  # a deviation may run beyond the values
    return figure


def _dots(axis: Axes, height: float, row: DotRow, colour: str) -> None:
    for order, values in enumerate(row.series):
        if not values:
            continue
        mean, deviation = spread(values)
        if len(values) > 1:
            axis.plot([mean - deviation, mean + deviation], [height] * 2, color=colour, linewidth=1.6)
            axis.plot(values, [height] * len(values), "|", color=colour, markersize=9)
        axis.plot(mean, height, color=colour, **DOT, **(HOLLOW if order else {}))
    axis.text(1.02, height, row.text, transform=axis.get_yaxis_transform(), va="center_baseline", fontsize="small")


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and sample standard deviation (0 for one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


@matplotlib.rc_context(STYLE)
def rate_curves(points: dict[str, Sequence[dict[str, float]]], ticks: Sequence[float], width: int) -> Figure:
    """PSNR, SSIM and kernel distance against the rate, on a logarithmic axis.

    A curve for each codec, a diamond for each tokenizer.

    Args:
        points: name -> [{"bits_per_pixel", "psnr", "ssim", "kd_effnetlite2"}, ...] in order of rate; one alone is a
            tokenizer, the first of several is the smallest possible and drawn as a ring. What lies beyond the ticks is
            left out.
        ticks: of the rate, in bits per pixel; the axis ends at the first and last one.
        width: in pixels.
    """
    figure = Figure((width / 100, 4.6), dpi=100)
    axes = figure.subplots(1, len(RATE_PANELS))
    for axis, (key, label) in zip(axes, RATE_PANELS.items(), strict=True):
        for order, (name, found) in enumerate(points.items()):
            inside = [point for point in found if ticks[0] <= point["bits_per_pixel"] <= ticks[-1]]
            x, y = [point["bits_per_pixel"] for point in inside], [point[key] for point in inside]
            colour, tokenizer = COLOURS[order % len(COLOURS)], len(found) == 1
            if tokenizer:
                axis.plot(x, y, color=colour, label=name, marker="D", linestyle="none", markersize=9)
                continue
            axis.plot(x, y, LINE_STYLES[order % len(LINE_STYLES)], color=colour, label=name, marker="o", markersize=4)
            if inside and inside[0] is found[0]:
                axis.plot(x[0], y[0], color=colour, markersize=8, **DOT, **HOLLOW)
        axis.set_title(label)
        axis.set_xscale("log")
        axis.set_xlim(ticks[0], ticks[-1])
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel("bits per pixel; ring: the codec's smallest files", color=FAINT_INK)
    _distance_scale(axes[-1])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(points))
    return figure


def _distance_scale(axis: Axes) -> None:
    """Logarithmic, but linear around 0: the distance may be 0 or below."""
    axis.set_yscale("symlog", linthresh=1)
    axis.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1, subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()


@matplotlib.rc_context(STYLE)
def usage_bars(times: np.ndarray, highest: float, width: int, height: int) -> Figure:
    """How often each code is used, as bars on a logarithmic scale that begins at 1/100 of equal use.

    Args:
        times: (N,), use in times of equal use, from the most used code down.
        highest: upper end of the scale, in times of equal use.
        width: in pixels.
        height: in pixels.
    """
    figure = Figure((width / 100, height / 100), dpi=100)
    axis = figure.subplots()
    axis.stairs(times, baseline=1e-3, fill=True, color=COLOURS[0])
    axis.axhline(1, color=COLOURS[1])
    axis.set_yscale("log")
    axis.set_ylim(1e-2, highest)
    axis.set_xlim(0, len(times))
    ticks = [tick for tick in (0.01, 0.1, 1, 10, 100, 1000) if tick <= highest]
    axis.set_yticks(ticks, ["equal use" if tick == 1 else f"{tick:g} x" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel(f"codes, the most used first; equal use is 1/{len(times)} of the tokens", color=FAINT_INK)
    return figure


def to_image(figure: Figure) -> Image.Image:
    """The figure as an RGB image."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
