"""Results of measurements as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..metrics import IMAGE_METRICS

ALWAYS = ("psnr", "ssim", "ms_ssim", "l1")  # a column each, whatever was measured


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, aligned for the terminal as well."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def results_table(results: Iterable[tuple[str, dict[str, Any]]]) -> str:
    """(name, result of `evaluate`) pairs -> a Markdown table, one line each.

    A metric that was measured for some results only has a column that says where it was not.
    """
    return markdown_table(*results_cells(results))


def results_cells(results: Iterable[tuple[str, dict[str, Any]]]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of `results_table`."""
    results = list(results)
    measured = {name for _, result in results for name, value in result["metrics"].items() if value is not None}
    names = [name for name in IMAGE_METRICS if name in ALWAYS or name in measured]
    header = ["model", "data", "N", "bits/position", "bits/pixel", *(IMAGE_METRICS[name].title for name in names)]
    header += ["quant. error", "codes used", "perplexity", "norm. entropy", "pair entropy"]
    return header, [_row(name, result, names) for name, result in results]


def _row(name: str, result: dict[str, Any], image_metrics: Sequence[str]) -> list[str]:
    protocol, metrics = result["protocol"], result["metrics"]
    codebooks = metrics["codebooks"].values()
    return [
        name,
        f"{protocol['dataset']} {protocol['split']}",
        str(protocol["pictures"]),
        f"{metrics['bits_per_position']:g}",
        f"{metrics['bits_per_pixel']:.4f}",
        *(_cell(metrics.get(key), IMAGE_METRICS[key].digits) for key in image_metrics),
        f"{metrics['quantization_error']:.4f}",
        " / ".join(f"{codebook['usage']:.1%}" for codebook in codebooks),
        " / ".join(f"{codebook['perplexity']:.0f}" for codebook in codebooks),
        " / ".join(f"{codebook['normalized_entropy']:.3f}" for codebook in codebooks),
        f"{metrics['pair_entropy']:.2f}",
    ]


def _cell(value: float | None, digits: int) -> str:
    return "not measured" if value is None else f"{value:.{digits}f}"
