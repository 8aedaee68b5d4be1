"""Writes the tables of README.md and docs/ again from the results that they show:

    python benchmarks/doc_tables.py

In a page stands `<!-- table: NAME key=a,b key=c -->`, the table, `<!-- /table -->`: the call of a function of `TABLES`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path

from cost import UTILISATION, cost, cost_table, gpu_hours, model_arguments, training_flops, training_table
from quality_report import read_lines, short_table, write_table

from dualcodebook_hf.evaluation.protocols import PROTOCOLS
from dualcodebook_hf.evaluation.table import markdown_table, results_cells
from dualcodebook_hf.files import atomic_file, read_json
from dualcodebook_hf.loading import EMBEDDED_FOLDERS, default_checkpoint
from dualcodebook_hf.run_folder import SavedModel

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# Folders of benchmarks/quality.py, with a table.md of their own.
RESULTS = ("quality", "quality/f16", "quality/perceptual")
PAGES = ("README.md", "docs/quality/README.md", "docs/figures/README.md", "docs/paper-table.md", "docs/speed.md")
PAGES += ("docs/runtimes.md", "docs/generator.md", "docs/experiments.md")
MARKED = re.compile(r"(<!-- table: (\w+)(.*?) -->\n).*?(<!-- /table -->)", re.DOTALL)


EMBEDDED_COLUMNS = (
    "model",
    "data",
    "N",
    "bits/pixel",
    "PSNR",
    "SSIM",
    "MS-SSIM",
    "SWD",
    "KD lite2",
    "PD lite2",
    "codes used",
)


def embedded(datasets: list[str]) -> str:
    """Both decoders of the embedded checkpoint and the linear codec, of their metrics.json, data set by data set."""
    found = {}
    for decoder in EMBEDDED_FOLDERS:
        for result in read_json(SavedModel.find(default_checkpoint(decoder)).records()["metrics"])["results"]:
            found.setdefault(result["protocol"]["dataset"], {}).setdefault(result["model"]["name"], result)
    header, rows = results_cells((name, one) for dataset in datasets for name, one in sorted(found[dataset].items()))
    columns = [header.index(name) for name in EMBEDDED_COLUMNS]
    return markdown_table(EMBEDDED_COLUMNS, [[row[column] for column in columns] for row in rows])


def results(rows: list[str], columns: list[str], folder: list[str]) -> str:
    """Rows and columns of a results.jsonl, see `quality_report.COLUMNS`."""
    return short_table(read_lines(DOCS / folder[0] / "results.jsonl"), rows, columns)


def costs(rows: list[str], columns: list[str]) -> str:
    """Rows of configs/ and presets, see `cost.COLUMNS`."""
    return cost_table([{"row": row, **cost(model_arguments(row))} for row in rows], columns)


def training_hours() -> str:
    """What training the preset `paper` would cost."""
    step = training_flops(model_arguments("paper"))
    return training_table(step, gpu_hours(step, UTILISATION), UTILISATION)


def protocols() -> str:
    """The named protocols."""
    rows = [[f"`{one.name}`", f"`{one.dataset}`", one.split, f"{one.images:,}"] for one in PROTOCOLS.values()]
    return markdown_table(["protocol", "Hub data set", "split", "N"], rows)


def equal_bytes() -> str:
    """The tokenizer and the codecs at the tokens' bytes, of figures/rate.json."""
    record = read_json(DOCS / "figures" / "rate.json")
    equal, points = record["equal_bytes"], record["points"]
    (ours,) = points[equal["model"]]
    header = ["", "bytes, mean", f"images within {equal['bytes']} bytes", "PSNR", "SSIM", "KD lite2"]
    header += ["tokenizer better by PSNR", "by SSIM"]

    def quality(found: dict[str, float]) -> list[str]:
        return [f"{found['psnr']:.2f}", f"{found['ssim']:.3f}", f"{found['kd_effnetlite2']:.1f}"]

    rows = [[equal["model"], str(equal["bytes"]), "100%", *quality(ours), "-", "-"]]
    for name, found in equal["codecs"].items():
        size = [f"{found['bytes']:.0f}", f"{found['within_bytes']:.0%}"]
        rows.append(
            [name, *size, *quality(found), *(f"{found[f'tokenizer_better_{key}']:.0%}" for key in ("psnr", "ssim"))]
        )
    return markdown_table(header, rows)


def measured(name: list[str]) -> str:
    """What benchmarks/NAME.py prints of its NAME.json in a folder of docs/; of several files each is NAME-more.json."""
    (file,) = name
    (record,) = DOCS.glob(f"*/{file}.json")
    return importlib.import_module(file.split("-")[0]).table(read_json(record))


FUNCTIONS = (embedded, results, costs, training_hours, protocols, equal_bytes, measured)
TABLES: dict[str, Callable[..., str]] = {function.__name__: function for function in FUNCTIONS}


def filled(page: str) -> str:
    """The page with its tables made again. Raises ValueError for a table that is not in `TABLES`."""

    def table(match: re.Match[str]) -> str:
        opening, name, given, closing = match.groups()
        if name not in TABLES:
            raise ValueError(f"`table` must be one of {', '.join(TABLES)}, got {name!r}")
        options = {key: values.split(",") for key, values in (part.split("=") for part in given.split())}
        return f"{opening}\n{TABLES[name](**options)}\n\n{closing}"

    return MARKED.sub(table, page)


if __name__ == "__main__":
    for folder in RESULTS:
        write_table(DOCS / folder)
    for page in PAGES:
        text = filled((ROOT / page).read_text())
        with atomic_file(ROOT / page) as partial:
            partial.write_text(text)
