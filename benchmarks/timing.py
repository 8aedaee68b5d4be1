"""What the benchmarks of speed share: times taken in turns, ratios with their spread, the machine and its peak."""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dualcodebook_hf.cli.inputs import positive
from dualcodebook_hf.evaluation.evaluator import hardware
from dualcodebook_hf.files import write_json
from dualcodebook_hf.inference import time_in_turns
from dualcodebook_hf.loading import check_device
from dualcodebook_hf.malloc import keep_freed_memory

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# Channels and sides of the 3 x 3 convolutions of the paper's network, where the peak is looked for.
PEAK_SHAPES = ((128, 128), (256, 64), (512, 32))


def add_timing(parser: argparse.ArgumentParser, rounds: int) -> None:
    """The flags that the benchmarks share."""
    parser.add_argument("--rounds", type=positive, default=rounds, help="turns that count (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument("--threads", type=positive, help="of torch on a CPU (default: torch's)")
    parser.add_argument(
        "--clock",
        choices=sorted(CLOCKS),
        default="wall",
        help="cpu: this process's time on the CPU, where others disturb; one thread (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, help="write the numbers there")


def set_up(arguments: argparse.Namespace) -> str:
    """Sets the threads; the device. Raises ValueError for a clock that does not fit."""
    device = check_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.clock == "cpu" and (device != "cpu" or torch.get_num_threads() != 1):
        raise ValueError("`--clock cpu` must come with `--device cpu --threads 1`: it adds up what threads take")
    return device


def report(
    parser: argparse.ArgumentParser,
    measure: Callable[[], dict[str, Any]],
    table: Callable[[dict], str],
    json: Path | None,
) -> int:
    """A benchmark's command line: measures, prints the table, writes the record; 2 and one line for bad input."""
    try:
        record = measure()
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(table(record))
    if json:
        write_json(json, record)
    return 0


def in_turns(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: str,
    clock: str = "wall",
    keeping: Collection[str] | None = None,
) -> dict[str, list[float]]:
    """{name: seconds of each round}, of calls that take turns.

    Args:
        keeping: the names for which the process keeps freed memory, as the commands do; each call is then made once
            before it is timed, since what another gave back has to be taken again. None: malloc is left alone.
    """

    def first(name: str) -> None:
        if keeping is not None:
            keep_freed_memory(name in keeping)
            calls[name]()

    before = [partial(first, name) for name in calls]
    times = time_in_turns(list(calls.values()), rounds, torch.device(device).type, CLOCKS[clock], before)
    return dict(zip(calls, times, strict=True))


def speedup(base: Sequence[float], times: Sequence[float]) -> dict[str, float]:
    """How many times faster than `base`: the median of the rounds' ratios, the lowest and the highest of them."""
    ratios = [one / other for one, other in zip(base, times, strict=True)]
    return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def speedup_text(ratio: Mapping[str, float]) -> str:
    """1.52 (1.48-1.61)."""
    return f"{ratio['median']:.2f} ({ratio['lowest']:.2f}-{ratio['highest']:.2f})"


def convolution_peak(device: str, dtype: torch.dtype, rounds: int = 5, clock: str = "wall") -> float:
    """FLOP/s of torch's own best 3 x 3 convolution on this machine, over `PEAK_SHAPES` and both memory formats."""
    calls, work = {}, {}
    for channels, side in PEAK_SHAPES:
        x = torch.randn(1, channels, side, side, device=device, dtype=dtype)
        weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
        for layout in (torch.contiguous_format, torch.channels_last):
            inputs = x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)
            name = f"{channels} {layout}"
            calls[name] = lambda inputs=inputs: F.conv2d(*inputs, padding=1)
            work[name] = 2 * 9 * channels**2 * side**2
    with torch.inference_mode():
        times = in_turns(calls, rounds, device, clock)
    return max(work[name] / min(found) for name, found in times.items())


def machine(device: str) -> dict[str, Any]:
    """Where it was measured: hardware, processor, what torch makes of it, versions."""
    found = hardware(torch.device(device)) | {"processor": _processor(), "torch": torch.__version__}
    return found | {"cpu_capability": torch.backends.cpu.get_cpu_capability(), "python": platform.python_version()}


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
