"""The report of benchmarks/quality.py: results.jsonl -> tables in Markdown and figures in PNG.

python benchmarks/quality_report.py docs/quality docs/quality/f16    # writes them again
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charts import DotRow, dot_plot, spread, to_image
from matplotlib.figure import Figure

from dualcodebook_hf.evaluation.table import markdown_table
from dualcodebook_hf.files import atomic_file, read_json

# fsq bounds the latents by a tanh and lfq takes their signs: the distance between latents and codes is no loss there.
WITHOUT_ERROR = ("fsq", "lfq")
NOTE = (
    "One small network, trained {losses} in equal steps, from scratch except where the "
    "recipe has data_initialization (PCA in a linear shortcut, k-means in EMA codebooks). `paper-quantizer` is the "
    "paper's quantizer, not the paper's model. Means over seeds, ± the sample standard deviation. Sorted by rate, "
    "then by PSNR. The error is E|z - z_q|^2 / Var z; fsq and lfq have none (their latents are bounded first). "
    "`+dropout`: the same model, its codes one draw of the transformer with dropout on, as in training, instead of "
    "its output without dropout. Seconds per step are wall time and include reading the images and writing "
    "checkpoints. Megabytes are the codes alone, in float32."
)
Reader = Callable[[dict[str, Any]], float | None]


@dataclass(frozen=True)
class Group:
    """All seeds of one row on one data set."""

    row: str
    dataset: str
    lines: list[dict[str, Any]]

    def values(self, read: Reader) -> list[float]:
        """One number for each seed; none where the reader finds none."""
        return [value for value in map(read, self.lines) if value is not None]

    @property
    def bits(self) -> float:
        """Bits per position."""
        return self.lines[0]["metrics"]["bits_per_position"]

    @property
    def psnr(self) -> float:
        """Mean over seeds, in dB."""
        return statistics.fmean(self.values(lambda line: line["metrics"]["psnr"]))

    def metric(self, key: str, form: str) -> str:
        """Mean, and deviation where there are several seeds; a dash where it was not measured."""
        values = self.values(lambda line: line["metrics"].get(key))
        if not values:
            return "-"
        value, deviation = spread(values)
        return form.format(value) + (f" ± {form.format(deviation)}" if len(self.lines) > 1 else "")

    def codebooks(self, key: str, form: str, scale: float = 1) -> str:
        """The mean of each codebook, times `scale`."""
        columns = zip(*(line["metrics"]["codebooks"].values() for line in self.lines), strict=True)
        return " / ".join(form.format(scale * statistics.fmean(one[key] for one in column)) for column in columns)

    def parameters(self, key: str) -> str:
        """In millions."""
        return f"{self.lines[0]['training']['parameters'][key] / 1e6:.2f}"

    def recipe(self) -> str:
        """Where its training differs from the backbone's."""
        return ", ".join(f"{key} {value}" for key, value in self.lines[0]["differences"]["training"].items())

    def error(self) -> str:
        """Quantization error, a dash where it means nothing."""
        return self.metric("quantization_error", "{:.3f}") if _has_error(self.lines[0]) else "-"

    def seconds(self) -> str:
        """Mean over seeds, a dash where nothing was timed."""
        seconds = self.values(lambda line: line["training"].get("seconds_per_step"))
        return f"{statistics.fmean(seconds):.2f}" if seconds else "-"


@dataclass(frozen=True)
class Column:
    """A column of the tables.

    Attributes:
        head: its first line.
        cell: what it says of a group.
        measured: on each data set; False: the same on all of them.
    """

    head: str
    cell: Callable[[Group], str]
    measured: bool = True


COLUMNS = {
    "recipe": Column("recipe", Group.recipe, measured=False),
    "bits": Column("bits/position", lambda group: f"{group.bits:g}", measured=False),
    "rate": Column("bits/pixel", lambda group: f"{group.lines[0]['metrics']['bits_per_pixel']:.4f}", measured=False),
    "seeds": Column("seeds", lambda group: str(len(group.lines)), measured=False),
    "psnr": Column("PSNR", lambda group: group.metric("psnr", "{:.2f}")),
    "ssim": Column("SSIM", lambda group: group.metric("ssim", "{:.4f}")),
    "ms_ssim": Column("MS-SSIM", lambda group: group.metric("ms_ssim", "{:.4f}")),
    "swd": Column("SWD", lambda group: group.metric("swd", "{:.0f}")),
    "kd": Column("KD lite2", lambda group: group.metric("kd_effnetlite2", "{:.1f}")),
    "fd": Column("FD lite2", lambda group: group.metric("fd_effnetlite2", "{:.1f}")),
    "pd": Column("PD lite2", lambda group: group.metric("pd_effnetlite2", "{:.4f}")),
    "error": Column("error", Group.error),
    "usage": Column("codes used", lambda group: group.codebooks("usage", "{:.3g}%", 100)),
    "perplexity": Column("perplexity", lambda group: group.codebooks("perplexity", "{:.0f}")),
    "entropy": Column("norm. entropy", lambda group: group.codebooks("normalized_entropy", "{:.3f}")),
    "pair_entropy": Column("pair entropy", lambda group: group.metric("pair_entropy", "{:.2f}")),
    "parameters": Column("M param. in quantizer", lambda group: group.parameters("quantizer"), measured=False),
    "megabytes": Column("MB of codes", lambda group: group.parameters("codebook_bytes"), measured=False),
    "seconds": Column("seconds per step", Group.seconds, measured=False),
}


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
    """Markdown: the conditions, then a table of all rows and columns for each data set.

    Args:
        lines: of results.jsonl.
        backbone: its name.
    """
    run = next(line["run"] for line in lines if "run" in line)
    data, training = run["data"], run["training"]
    parts = [
        f"Backbone {backbone}, {data['resolution']} px, {training['max_train_steps']} steps of "
        f"{training['train_batch_size']} crops of {data['dataset']} ({data['train_split']}), precision "
        f"{training['mixed_precision']}.",
        NOTE.format(losses=_losses(training)),
    ]
    for dataset, rows in groups(lines).items():
        protocol = rows[0].lines[0]["protocol"]
        parts.append(
            f"**{dataset}, {protocol['split']}**, {protocol['pictures']} images, shorter side {protocol['size']} px "
            f"({protocol['resample']}), centre crop"
        )
        columns = {column.head: [column.cell(group) for group in rows] for column in COLUMNS.values()}
        columns = {head: cells for head, cells in columns.items() if set(cells) != {"-"}}  # what was not measured
        cells = [[group.row, *of_row] for group, of_row in zip(rows, zip(*columns.values(), strict=True), strict=True)]
        parts.append(markdown_table(["row", *columns], cells))
    failures = [line for line in lines if "failed" in line]
    parts += [f"{line['row']}, seed {line['seed']}, diverged: {line['failed']}" for line in failures]
    return "\n\n".join(parts) + "\n"


def _losses(training: dict[str, Any]) -> str:
    """What the network was trained for."""
    parts = []
    if training["perceptual"] != "none":
        parts.append(f"a perceptual loss ({training['perceptual']}, weight {training['perceptual_weight']})")
    if training["adversarial_weight"]:
        kind = "times the adaptive one" if training["adaptive_weight"] else "fixed"
        weight = f"weight {training['adversarial_weight']} {kind}, from step {training['adversarial_start']} on"
        parts.append(f"an adversary ({training['discriminator']}, {weight})")
    return f"with {' and '.join(parts)}" if parts else "on pixels alone (no LPIPS, no GAN)"


def short_table(lines: Sequence[dict[str, Any]], rows: Sequence[str], columns: Sequence[str]) -> str:
    """Markdown of some rows and columns.

    Args:
        lines: of results.jsonl.
        rows: by name, from the top down.
        columns: of `COLUMNS`; what is measured stands once for each data set, or for one alone: `usage@clothing-256`.

    Raises ValueError for a row without results and for an unknown column.
    """
    found = {dataset: {group.row: group for group in members} for dataset, members in groups(lines).items()}
    keys = [column.partition("@")[0] for column in columns]
    for name, given, known in (("rows", rows, next(iter(found.values()))), ("columns", keys, COLUMNS)):
        if unknown := [one for one in given if one not in known]:
            raise ValueError(f"`{name}` must be of {', '.join(known)}, got {', '.join(unknown)}")
    header, readers = ["row"], []
    for key, column in zip(keys, columns, strict=True):
        shown = [column.partition("@")[2]] if "@" in column else list(found)
        for dataset in shown if COLUMNS[key].measured else shown[:1]:
            header.append(f"{COLUMNS[key].head} {dataset}" if COLUMNS[key].measured else COLUMNS[key].head)
            readers.append((COLUMNS[key].cell, dataset))
    return markdown_table(header, [[f"`{row}`", *(cell(found[data][row]) for cell, data in readers)] for row in rows])


def write_table(folder: Path) -> None:
    """results.jsonl and conditions.json of a folder -> table.md beside them."""
    with atomic_file(folder / "table.md") as partial:
        lines = read_lines(folder / "results.jsonl")
        partial.write_text(table(lines, read_json(folder / "conditions.json")["backbone"]))


def write_report(folder: Path) -> None:
    """results.jsonl and conditions.json of a folder -> table.md and figures beside them, if there are results."""
    lines = read_lines(folder / "results.jsonl")
    found = groups(lines)
    if not found:
        return
    write_table(folder)
    run, backbone = (
        next(line["run"] for line in lines if "run" in line),
        read_json(folder / "conditions.json")["backbone"],
    )
    note = f"{backbone}, {run['data']['resolution']} px, {run['training']['max_train_steps']} steps"
    note = f"{note}, {_losses(run['training'])}"
    with_error = {name: [group for group in rows if _has_error(group.lines[0])] for name, rows in found.items()}
    figures = {
        "psnr": chart("PSNR in dB", note, found, {"": _metric_reader("psnr")}, "{:.2f}"),
        "usage": chart("Share of the codes in use", note, found, _codebook_readers("usage"), "{:.2f}"),
    }
    title = "Entropy of each codebook's tokens, as a share of its bits"
    figures["entropy"] = chart(title, note, found, _codebook_readers("normalized_entropy"), "{:.2f}")
    if any(with_error.values()):
        title = "Quantization error, as a share of the latents' variance"
        figures["error"] = chart(title, note, with_error, {"": _metric_reader("quantization_error")}, "{:.3f}")
    for name, figure in figures.items():
        with atomic_file(folder / f"{name}.png") as partial:
            to_image(figure).quantize(256).save(partial, "PNG", optimize=True)


def chart(title: str, note: str, found: dict[str, list[Group]], series: dict[str, Reader], number: str) -> Figure:
    """The dot plot of one or two numbers of every row.

    Args:
        title: of the figure.
        note: the conditions.
        found: the rows of each data set; a data set without rows is left out.
        series: what is read from a result, by name.
        number: how values are printed.
    """
    order: dict[str, tuple[float, float]] = {}
    for members in found.values():  # of the first data set that a row was measured on
        for group in members:
            order.setdefault(group.row, (group.bits, -group.psnr))
    rows = [(row, order[row][0]) for row in sorted(order, key=order.__getitem__)]
    panels = {
        dataset: [
            DotRow(
                group.row, group.bits, [group.values(read) for read in series.values()], _printed(group, series, number)
            )
            for group in members
        ]
        for dataset, members in found.items()
        if members
    }
    return dot_plot(title, note, rows, panels, list(series) if len(series) > 1 else ())


def _printed(group: Group, series: dict[str, Reader], number: str) -> str:
    found = [spread(values) for values in map(group.values, series.values()) if values]
    if len(found) == 1 and len(group.lines) > 1:
        return f"{number.format(found[0][0])} ± {number.format(found[0][1])}"
    return " / ".join(number.format(mean) for mean, _ in found)


def _metric_reader(key: str) -> Reader:
    return lambda line: line["metrics"][key]


def _codebook_readers(key: str) -> dict[str, Reader]:
    def reader(index: int) -> Reader:
        def read(line: dict[str, Any]) -> float | None:
            codebooks = list(line["metrics"]["codebooks"].values())
            return codebooks[index][key] if index < len(codebooks) else None

        return read

    return {"first codebook": reader(0), "second codebook": reader(1)}


def _has_error(line: dict[str, Any]) -> bool:
    return line["run"]["model"]["quantizer"] not in WITHOUT_ERROR


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        write_report(Path(argument))
