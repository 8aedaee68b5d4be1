"""The report of benchmarks/quality.py: results.jsonl -> table.md and figures, drawn with PIL."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

# fsq bounds the latents by a tanh and lfq takes their signs: the distance between latents and codes is no loss there.
WITHOUT_ERROR = ("fsq", "lfq")
NOTE = (
    "One small network, trained on pixels alone (no LPIPS, no GAN) in equal steps, from scratch but where the recipe "
    "has data_initialization (PCA in a linear shortcut, k-means in EMA books). `paper-quantizer` is the paper's "
    "quantizer, not the paper's model. Means over seeds, +- the sample standard deviation. Sorted by rate, then by "
    "PSNR. The error is E|z - z_q|^2 / Var z; fsq and lfq have none (their latents are bounded first). `+dropout`: "
    "the same model, its codes one draw of the transformer with dropout on, as in training, instead of its output "
    "without. Seconds a step are wall time, reading of the pictures and checkpoints included. Megabytes are the codes"
    " alone, in float32."
)
SCALE = 2  # pixels a point
WHITE, INK, FAINT, LINE = (255, 255, 255), (32, 34, 40), (112, 116, 126), (226, 228, 233)
# A colour for each rate, from a palette that the colour-blind can tell apart (Okabe and Ito).
COLOURS = [(213, 94, 0), (0, 158, 115), (0, 114, 178), (204, 121, 167), (86, 180, 233), (230, 159, 0)]


PANEL, TOP, STEP = 300, 108, 22  # width of a data set's panel, its upper edge, height of a row; in points
Reader = Callable[[dict[str, Any]], float | None]


@dataclass(frozen=True)
class Group:
    """All seeds of one row on one data set."""

    row: str
    dataset: str
    lines: list[dict[str, Any]]

    def values(self, read: Reader) -> list[float]:
        """One number a seed; none where the reader finds none."""
        return [value for value in map(read, self.lines) if value is not None]

    @property
    def bits(self) -> float:
        return self.lines[0]["metrics"]["bits_per_position"]

    @property
    def psnr(self) -> float:
        return statistics.fmean(self.values(lambda line: line["metrics"]["psnr"]))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The results so far; an unfinished last line, of a run that was killed while it wrote, is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def groups(lines: Sequence[dict[str, Any]]) -> dict[str, list[Group]]:
    """Lines -> {data set: rows, by rate and then by falling PSNR}, data sets in the order of their first lines.

    Of equal row, seed and data set the last line counts.
    """
    measured = [line for line in lines if "failed" not in line]
    result: dict[str, list[Group]] = {line["evaluated_on"]: [] for line in measured}
    for dataset, rows in result.items():
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for line in measured:
            if line["evaluated_on"] == dataset:
                found.setdefault(line["row"], {})[line["seed"]] = line
        rows += [Group(row, dataset, [seeds[seed] for seed in sorted(seeds)]) for row, seeds in found.items()]
        rows.sort(key=lambda group: (group.bits, -group.psnr))
    return result


def table(lines: Sequence[dict[str, Any]], backbone: str) -> str:
    """Markdown: the conditions, then a table for each data set. `backbone`: its name."""
    run = next(line["run"] for line in lines if "run" in line)
    data, training = run["data"], run["training"]
    parts = [
        f"Backbone {backbone}, {data['resolution']} px, {training['max_train_steps']} steps of "
        f"{training['train_batch_size']} crops of {data['dataset']} ({data['train_split']}), precision "
        f"{training['mixed_precision']}.",
        NOTE,
    ]
    for dataset, rows in groups(lines).items():
        protocol = rows[0].lines[0]["protocol"]
        parts.append(
            f"**{dataset}, {protocol['split']}**, {protocol['pictures']} pictures, shorter side {protocol['size']} px "
            f"({protocol['resample']}), centre crop"
        )
        parts.append(_markdown([HEADER, *(_cells(group) for group in rows)]))
    failures = [line for line in lines if "failed" in line]
    parts += [f"{line['row']}, seed {line['seed']}, diverged: {line['failed']}" for line in failures]
    return "\n\n".join(parts) + "\n"


HEADER = [
    "row",
    "recipe",
    "bits/position",
    "bits/pixel",
    "seeds",
    "PSNR",
    "SSIM",
    "MS-SSIM",
    "SWD",
    "error",
    "codes used",
]
HEADER += ["perplexity", "norm. entropy", "pair entropy", "M param. in quantizer", "MB of codes", "s/step"]


def write_report(output: Path) -> None:
    """results.jsonl and conditions.json of a folder -> table.md and four figures beside them."""
    lines = read_lines(output / "results.jsonl")
    found = groups(lines)
    if not found:
        return
    backbone = json.loads((output / "conditions.json").read_text())["backbone"]
    (output / "table.md").write_text(table(lines, backbone))
    run = next(line["run"] for line in lines if "run" in line)
    note = f"{backbone}, {run['data']['resolution']} px, {run['training']['max_train_steps']} steps, no LPIPS, no GAN"
    chart("PSNR in dB", note, found, {"": lambda line: line["metrics"]["psnr"]}, "{:.2f}").save(output / "psnr.png")
    with_error = {name: [g for g in rows if _has_error(g.lines[0])] for name, rows in found.items()}
    if any(with_error.values()):
        error = {"": lambda line: line["metrics"]["quantization_error"]}
        title = "Quantization error, a share of the latents' variance"
        chart(title, note, with_error, error, "{:.3f}").save(output / "error.png")
    for key, title, name in (
        ("usage", "Share of the codes in use", "usage.png"),
        ("normalized_entropy", "Entropy of each codebook's tokens, as a share of its bits", "entropy.png"),
    ):
        series = {f"{place} book": _codebook_reader(index, key) for index, place in enumerate(("first", "second"))}
        chart(title, note, found, series, "{:.2f}").save(output / name)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and sample standard deviation (0 for one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def chart(title: str, note: str, found: dict[str, list[Group]], series: dict[str, Reader], number: str) -> Image.Image:
    """A panel for each data set: a line for each row, its mean, +- one deviation and its seeds; a colour for each rate.

    `series`: what is read from a result, by name; of two the second one is hollow. `number`: how values are printed.
    """
    found = {dataset: members for dataset, members in found.items() if members}
    order: dict[str, tuple[float, float]] = {}
    for members in found.values():  # of the first data set that a row was measured on
        for group in members:
            order.setdefault(group.row, (group.bits, -group.psnr))
    rows = [(row, order[row][0]) for row in sorted(order, key=order.__getitem__)]
    rates = sorted({bits for _, bits in rows})
    colours = {bits: COLOURS[index % len(COLOURS)] for index, bits in enumerate(rates)}
    values = {dataset: [_printed(group, series, number) for group in members] for dataset, members in found.items()}
    label = 44 + math.ceil(max(_width(row, 12) for row, _ in rows))
    room = PANEL + 40 + math.ceil(max(_width(text, 11) for texts in values.values() for text in texts))
    size = (label + len(found) * room, TOP + STEP * len(rows) + 36)
    image = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), WHITE)
    pen = Pen(ImageDraw.Draw(image))
    pen.text((20, 14), title, INK, 17)
    pen.text((20, 38), note, FAINT, 12)
    _legend(pen, colours, list(series))
    for index, (row, bits) in enumerate(rows):
        pen.text((label - 16, TOP + STEP * index + 3), row, INK, 12, align="right")
        if index and bits != rows[index - 1][1]:
            pen.line((20, TOP + STEP * index), (size[0] - 20, TOP + STEP * index), LINE)
    for index, (dataset, members) in enumerate(found.items()):
        left = label + index * room
        pen.text((left, TOP - 22), dataset, INK, 12)
        places = {row: TOP + STEP * (place + 0.5) for place, (row, _) in enumerate(rows)}
        placed = [(places[group.row], group) for group in members]
        _panel(pen, left, STEP * len(rows), placed, series, colours)
        for (y, _), text in zip(placed, values[dataset], strict=True):
            pen.text((left + PANEL + 14, y - 8), text, INK, 11)
    return image


class Pen:
    """Draws in points; the picture has SCALE pixels a point."""

    def __init__(self, draw: ImageDraw.ImageDraw) -> None:
        self.draw = draw

    def text(self, at: tuple[float, float], text: str, colour: tuple, size: float, align: str = "left") -> None:
        """`at`: the upper left corner, or the upper right or middle one."""
        x = at[0] - {"left": 0, "right": 1, "middle": 0.5}[align] * _width(text, size)
        self.draw.text((x * SCALE, at[1] * SCALE), text, colour, _font(size))

    def line(self, start: tuple[float, float], end: tuple[float, float], colour: tuple, width: float = 1) -> None:
        points = [tuple(SCALE * x for x in point) for point in (start, end)]
        self.draw.line(points, colour, round(width * SCALE))

    def dot(self, at: tuple[float, float], radius: float, colour: tuple, hollow: bool = False) -> None:
        box = [SCALE * (x + sign * radius) for sign in (-1, 1) for x in at]
        self.draw.ellipse(box, WHITE if hollow else colour, colour, round(1.5 * SCALE) if hollow else 0)


def _panel(
    pen: Pen,
    left: float,
    height: float,
    placed: Sequence[tuple[float, Group]],
    series: dict[str, Reader],
    colours: dict[float, tuple],
) -> None:
    everything = [value for _, group in placed for read in series.values() for value in group.values(read)]
    ticks = nice_ticks(min(everything), max(everything))
    low, high = ticks[0], ticks[-1]

    def place(value: float) -> float:
        return left + PANEL * (min(max(value, low), high) - low) / (high - low)

    for tick in ticks:
        pen.line((place(tick), TOP), (place(tick), TOP + height), LINE)
        pen.text((place(tick), TOP + height + 6), f"{tick:g}", FAINT, 11, align="middle")
    for y, group in placed:
        for order, read in enumerate(series.values()):
            values, colour = group.values(read), colours[group.bits]
            if not values:
                continue
            mean, deviation = spread(values)
            pen.line((place(mean - deviation), y), (place(mean + deviation), y), colour, 2)
            for value in values if len(values) > 1 else ():
                pen.line((place(value), y - 6), (place(value), y + 6), colour)
            pen.dot((place(mean), y), 4.5, colour, hollow=order > 0)


def _printed(group: Group, series: dict[str, Reader], number: str) -> str:
    found = [spread(values) for values in map(group.values, series.values()) if values]
    if len(found) == 1 and len(group.lines) > 1:
        return f"{number.format(found[0][0])} ± {number.format(found[0][1])}"
    return " / ".join(number.format(mean) for mean, _ in found)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers, evenly spaced, from at most `low` to at least `high`; about `count` of them."""
    room = max(high - low, abs(high) * 1e-3, 1e-6)
    unit = 10 ** math.floor(math.log10(room / count))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor * count >= room)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * index, 10) for index in range(first, max(last, first + 1) + 1)]


def _legend(pen: Pen, colours: dict[float, tuple], series: Sequence[str]) -> None:
    x = 24
    for bits, colour in colours.items():
        text = f"{bits:g} bits a position"
        pen.dot((x, 64), 4.5, colour)
        pen.text((x + 10, 56), text, FAINT, 12)
        x += _width(text, 12) + 32
    for order, name in enumerate(series if len(series) > 1 else ()):
        pen.dot((x, 64), 4.5, FAINT, hollow=order > 0)
        pen.text((x + 10, 56), name, FAINT, 12)
        x += _width(name, 12) + 32


def _cells(group: Group) -> list[str]:
    lines, first = group.lines, group.lines[0]
    metrics, training = first["metrics"], first["training"]
    codebooks = [list(line["metrics"]["codebooks"].values()) for line in lines]

    def each(key: str, form: str, scale: float = 1.0) -> str:
        means = (statistics.fmean(values[key] for values in column) for column in zip(*codebooks, strict=True))
        return " / ".join(form.format(scale * mean) for mean in means)

    def mean(key: str, form: str) -> str:
        value, deviation = spread(group.values(lambda line: line["metrics"][key]))
        return form.format(value) + (f" ± {form.format(deviation)}" if len(lines) > 1 else "")

    seconds = [line["training"]["seconds_per_step"] for line in lines if line["training"].get("seconds_per_step")]
    parameters = training["parameters"]
    return [
        group.row,
        ", ".join(f"{key} {value}" for key, value in first["differences"]["training"].items()),
        f"{metrics['bits_per_position']:g}",
        f"{metrics['bits_per_pixel']:.4f}",
        str(len(lines)),
        mean("psnr", "{:.2f}"),
        mean("ssim", "{:.4f}"),
        mean("ms_ssim", "{:.4f}"),
        mean("swd", "{:.0f}"),
        mean("quantization_error", "{:.3f}") if _has_error(first) else "-",
        each("usage", "{:.3g}%", 100),
        each("perplexity", "{:.0f}"),
        each("normalized_entropy", "{:.3f}"),
        mean("pair_entropy", "{:.2f}"),
        f"{parameters['quantizer'] / 1e6:.2f}",
        f"{parameters['codebook_bytes'] / 1e6:.2f}",
        f"{statistics.fmean(seconds):.2f}" if seconds else "-",
    ]


def _codebook_reader(index: int, key: str) -> Reader:
    def read(line: dict[str, Any]) -> float | None:
        codebooks = list(line["metrics"]["codebooks"].values())
        return codebooks[index][key] if index < len(codebooks) else None

    return read


def _has_error(line: dict[str, Any]) -> bool:
    return line["run"]["model"]["quantizer"] not in WITHOUT_ERROR


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=round(size * SCALE))


def _width(text: str, size: float) -> float:
    return _font(size).getlength(text) / SCALE
