"""How much memory tokens, images and an update of training take, beside diffusers' VQModel and the plain step:

    python benchmarks/memory.py                                # the paper's network, as the operating system sees it
    python benchmarks/memory.py --dataset DATA                 # an update of training too, on one of DATA's images
    python benchmarks/memory.py --device cuda --sizes 256 512 1024 --batch-sizes 1 32     # as torch's allocator sees it

Every number is of a process of its own: what a pass adds at its highest to the process with the weights loaded. Two
updates in a row, of all losses (see training.py), add activations, gradients and the optimizers' moments.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from cost import model_arguments
from speed import BASE, build
from timing import machine, report
from training import OURS, PLAIN, TASKS, Run
from training import build as build_trainer

from dualcodebook_hf.cli.inputs import positive
from dualcodebook_hf.evaluation.table import markdown_table
from dualcodebook_hf.loading import check_device
from dualcodebook_hf.malloc import keep_freed_memory

# Linux: writing 5 there sets the highest resident size back to the present one.
RESET, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 2 and one line for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="paper", help="preset or YAML file (default: paper)")
    parser.add_argument("--sizes", type=positive, nargs="+", default=[256], help="sides of the images (default: 256)")
    parser.add_argument("--batch-sizes", type=positive, nargs="+", default=[1, 4], help="(default: 1 4)")
    parser.add_argument("--dataset", help="for the updates: Hub id, folder or parquet file; its split `train`")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    arguments = parser.parse_args(argv)
    return report(parser, lambda: measure_all(arguments), table, arguments.json)


def measure_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """The record that is printed and written."""
    device, config = check_device(arguments.device), model_arguments(arguments.config)
    if device == "cpu" and not RESET.exists():
        raise ValueError("`--device cpu` must be on Linux, which says how much a process took at its highest")
    names = list(build(config, device))
    cases = [(name, size, batch) for size in arguments.sizes for batch in arguments.batch_sizes for name in names]
    record = {"protocol": {"config": arguments.config, "threads": 1, "machine": machine(device)}}
    record["rows"] = [fresh(measure, config, device, *case) for case in cases]
    if arguments.dataset:
        cases = [(name, size) for size in arguments.sizes for name in (PLAIN, OURS)]
        record["updates"] = [
            fresh(measure_updates, arguments.config, arguments.dataset, device, *case) for case in cases
        ]
    return record


def fresh(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What a function returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


@torch.inference_mode()
def measure(config: dict[str, Any], device: str, name: str, size: int, batch: int) -> dict[str, Any]:
    """One row, in this process."""
    torch.set_num_threads(1)
    contender = build(config, device, only=name)[name]
    if contender.keeps_memory:
        keep_freed_memory()
    pixels = torch.rand(batch, 3, size, size, device=device) * 2 - 1
    small = pixels[:1, :, :64, :64].contiguous()
    contender.decode(contender.encode(small))  # what libraries set up once
    before = reset_peak(device)
    tokens = contender.encode(pixels)
    encode = peak(device) - before
    before = reset_peak(device)
    contender.decode(tokens)
    return {"row": name, "size": size, "batch": batch, "encode_bytes": encode, "decode_bytes": peak(device) - before}


def measure_updates(config: str, dataset: str, device: str, name: str, size: int) -> dict[str, Any]:
    """What two updates on one image add, in this process."""
    torch.set_num_threads(1)
    options = {"config": config, "dataset": dataset, "batch_size": 1, "resolution": size, "flags": []}
    if name == OURS:
        keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(build_trainer(argparse.Namespace(**options), TASKS[name], Path(folder) / "run"))
        before = reset_peak(device)
        run.update()
        run.update()
        return {"row": name, "size": size, "bytes": peak(device) - before}


def reset_peak(device: str) -> int:
    """Forgets the highest use so far; the present one in bytes."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    RESET.write_text("5")
    return psutil.Process().memory_info().rss


def peak(device: str) -> int:
    """The highest use since `reset_peak`, in bytes."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def table(record: dict[str, Any]) -> str:
    """Markdown, with each row's share of VQModel's and of the plain step's."""
    rows = record["rows"]
    base = {(row["size"], row["batch"]): row for row in rows if row["row"] == BASE}
    cells = []
    for row in rows:
        theirs = base.get((row["size"], row["batch"]))
        cell = [row["row"], str(row["size"]), str(row["batch"])]
        for key in ("encode_bytes", "decode_bytes"):
            share = f" ({row[key] / theirs[key]:.0%})" if theirs else ""
            cell.append(f"{row[key] / 2**20:,.0f} MiB{share}")
        cells.append(cell)
    tables = [markdown_table(["", "side", "batch", "encode", "decode"], cells)]
    if "updates" in record:
        plain = {row["size"]: row["bytes"] for row in record["updates"] if row["row"] == PLAIN}
        updates = [
            [row["row"], str(row["size"]), f"{row['bytes'] / 2**20:,.0f} MiB ({row['bytes'] / plain[row['size']]:.0%})"]
            for row in record["updates"]
        ]
        tables.append(markdown_table(["", "side", "two updates, batch 1"], updates))
    return "\n\n".join(tables)


if __name__ == "__main__":
    sys.exit(main())
