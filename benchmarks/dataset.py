"""How fast and in how much memory a data set becomes tokens, beside the model's own speed on ready tensors:

    python benchmarks/dataset.py --dataset DATA                     # the embedded checkpoint, crops of 256
    python benchmarks/dataset.py --dataset DATA --model M --images 2000 --batch-size 64 --device cuda

In turns, a shard is written from image files and as many ready tensors are tokenized in the same batches, by the same
model. By `--clock cpu` also the time of the model's thread alone: what is left where other cores decode. Memory: the
highest resident size of `dualcodebook tokenize-dataset`, a process for each number of images (those of DATA, repeated),
with crops of 64.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from datasets.table import embed_table_storage
from timing import add_timing, in_turns, machine, report, set_up, speedup, speedup_text

from dualcodebook_hf.cli.inputs import positive
from dualcodebook_hf.evaluation.table import markdown_table
from dualcodebook_hf.files import public_name
from dualcodebook_hf.image_datasets import load_images
from dualcodebook_hf.loading import default_checkpoint
from dualcodebook_hf.malloc import keep_freed_memory
from dualcodebook_hf.tokens.augment import Augmentation
from dualcodebook_hf.tokens.source import TokenSource
from dualcodebook_hf.tokens.tokenizing import TokenizeJob

READY, WRITTEN = "ready tensors", "tokenize-dataset"
MEMORY_SIZE = 64  # side of the crops where memory is measured: thousands of images in a minute


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables; 2 and one line for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="images: Hub id, folder or parquet file")
    parser.add_argument("--split", default="train", help="(default: %(default)s)")
    parser.add_argument("--model", help="folder or Hub id (default: the embedded checkpoint)")
    parser.add_argument("--images", type=positive, default=64, help="of a shard (default: %(default)s)")
    parser.add_argument("--size", type=positive, default=256, help="side of the crops (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=16, help="(default: %(default)s)")
    parser.add_argument(
        "--memory", type=positive, nargs="*", default=[300, 3000], help="numbers of images (default: 300 3000)"
    )
    add_timing(parser, rounds=3)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        return report(parser, lambda: measure(arguments, set_up(arguments), Path(folder)), table, arguments.json)


def measure(arguments: argparse.Namespace, device: str, folder: Path) -> dict[str, Any]:
    """The record that is printed and written."""
    shards = arguments.rounds + 1
    source = repeated(arguments, arguments.images * shards, folder)
    job = TokenizeJob(
        source=TokenSource(dataset=str(source)),
        output=str(folder / "tokens"),
        augmentation=Augmentation(kind="center", size=arguments.size),
        num_shards=shards,
        model=arguments.model,
        device=device,
        batch_size=arguments.batch_size,
        workers=arguments.threads,
    )
    tokenizer = job.prepare()
    keep_freed_memory()  # as the command does
    numbers = iter(range(shards))
    model = tokenizer.model
    pixels = torch.rand(arguments.images, 3, arguments.size, arguments.size) * 2 - 1
    pixels = pixels.to(model.device, model.dtype)
    calls = {
        READY: lambda: [model.tokenize(batch).cpu() for batch in pixels.split(arguments.batch_size)],
        WRITTEN: lambda: tokenizer.write(next(numbers)),
    }
    threads: dict[str, list[float]] = {name: [] for name in calls}
    timed = {name: partial(own_time, call, threads[name]) for name, call in calls.items()}
    times = in_turns(timed, arguments.rounds, device, arguments.clock)
    rows = [
        {"row": name, "images_per_second": arguments.images / statistics.median(found)}
        | {"speedup": speedup(times[READY], found)}
        for name, found in times.items()
    ]
    if arguments.clock == "cpu":
        for row in rows:
            row["speedup_of_thread"] = speedup(threads[READY][1:], threads[row["row"]][1:])
    memory = {count: highest(arguments, device, count, folder) for count in arguments.memory}
    protocol = {"dataset": public_name(arguments.dataset), "size": arguments.size, "images": arguments.images}
    protocol |= {"batch": arguments.batch_size, "rounds": arguments.rounds, "clock": arguments.clock}
    protocol |= {"model": public_name(arguments.model or default_checkpoint())}
    if memory:
        protocol["memory"] = {"size": MEMORY_SIZE, "batch": "the command's default", "threads": "one for each core"}
    return {"protocol": protocol | {"machine": machine(device)}, "rows": rows, "resident_bytes": memory}


def own_time(call: Callable[[], object], found: list[float]) -> None:
    """Calls, and notes the seconds that this thread computed."""
    start = time.thread_time()
    call()
    found.append(time.thread_time() - start)


def repeated(arguments: argparse.Namespace, count: int, folder: Path) -> Path:
    """A parquet file with N images of the data set, from the first on and again."""
    path = folder / f"{count}.parquet"
    rows = load_images(arguments.dataset, split=arguments.split).select_columns("image")
    rows = concatenate_datasets([rows] * math.ceil(count / len(rows))).select(range(count))
    rows.with_format("arrow").map(embed_table_storage, batched=True).with_format(None).to_parquet(path)
    return path


def highest(arguments: argparse.Namespace, device: str, count: int, folder: Path) -> int:
    """Highest resident size in bytes of the command over N images."""
    command = [sys.executable, "-m", "dualcodebook_hf.cli", "tokenize-dataset", str(repeated(arguments, count, folder))]
    command += ["--output", str(folder / f"tokens-{count}"), "--size", str(MEMORY_SIZE), "--device", device]
    command += ["--model", arguments.model] if arguments.model else []
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    message = child.stderr.read().decode()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise ValueError(f"`dualcodebook tokenize-dataset` of {count} images failed: {message.strip()}")
    return usage.ru_maxrss * 1024


def table(record: dict[str, Any]) -> str:
    """Markdown; the shares as the median of the rounds with the lowest and the highest."""
    shares = {"speedup": f"of {READY}", "speedup_of_thread": "the model's thread alone"}
    shares = {key: title for key, title in shares.items() if key in record["rows"][0]}
    cells = [
        [row["row"], f"{row['images_per_second']:.3g}", *(speedup_text(row[key]) for key in shares)]
        for row in record["rows"]
    ]
    memory = [[f"{int(count):,}", f"{size / 2**20:,.0f} MiB"] for count, size in record["resident_bytes"].items()]
    tables = [markdown_table(["", "images/s", *shares.values()], cells)]
    if memory:
        tables.append(markdown_table(["images", "highest resident size"], memory))
    return "\n\n".join(tables)


if __name__ == "__main__":
    sys.exit(main())
