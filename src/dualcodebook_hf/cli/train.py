"""`dualcodebook train`: accelerate's launcher with signals, exit codes and early checks."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..packages import require_package


def add_command(commands: argparse._SubParsersAction) -> None:
    """Names the command in the help; `main` hands it over whole, since its flags are the trainer's."""
    commands.add_parser("train", add_help=False, help="train a tokenizer: [accelerate launch's flags --] --config ...")


def train(argv: Sequence[str]) -> int:
    """`accelerate launch` of the trainer, with the launcher's flags before a `--`; returns the exit code.

    The trainer's flags and data are checked here first: the launcher takes long, and turns every exit code into 1.
    """
    require_package("accelerate", "train")
    require_package("datasets", "train")
    from ..image_datasets import load_images
    from ..training.arguments import EXIT_CODE_FILE, parse_run_config

    launch_flags, flags = _split_at_dashes(argv)
    data = parse_run_config(flags).data
    for split in filter(None, (data.train_split, data.validation_split)):
        load_images(data.dataset, data.dataset_config, split, data.image_column, data.streaming)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *launch_flags]
    command += ["-m", "dualcodebook_hf.training.train", *flags]
    with tempfile.TemporaryDirectory() as folder:
        code_file = Path(folder) / "exit-code"
        code = _run_forwarding_signals(command, {**_environment(launch_flags), EXIT_CODE_FILE: str(code_file)})
        return int(code_file.read_text()) if code and code_file.exists() else code


def _split_at_dashes(argv: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """The launcher's flags and the trainer's, which follow the first `--`; without one all are the trainer's."""
    if "--" not in argv:
        return [], argv
    place = argv.index("--")
    return argv[:place], argv[place + 1 :]


def _environment(launch_flags: Sequence[str]) -> dict[str, str]:
    """The launcher's environment, with torch's number of threads where OMP_NUM_THREADS is not set.

    Without flags, on a CPU, the launcher starts one process, and would give it one thread.
    """
    import torch

    environment = dict(os.environ)
    if not launch_flags and not torch.cuda.is_available():
        environment.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    return environment


def _run_forwarding_signals(command: Sequence[str], environment: dict[str, str] | None = None) -> int:
    """Runs the launcher and returns its exit code, 128 + n if signal n ended it.

    SIGTERM, SIGINT and SIGHUP go to the training processes, which save and end; a second SIGINT kills everything.
    They do not go to the launcher, which would die and leave the processes, nor to data workers, whose death is an
    error.
    """
    launcher: subprocess.Popen | None = None
    received: list[int] = []

    def forward(number: int, _: object) -> None:
        received.append(number)
        if launcher is None:
            return
        if received.count(signal.SIGINT) > 1:
            with suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
        else:
            _signal_ranks(launcher.pid, signal.SIGTERM if number == signal.SIGHUP else number)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    previous = {number: signal.signal(number, forward) for number in numbers}
    try:
        # A session of its own: the terminal's Ctrl-C reaches this process alone.
        launcher = subprocess.Popen(command, env=environment, start_new_session=True)
        if received:
            launcher.terminate()
        code = launcher.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _signal_ranks(launcher: int, number: int) -> None:
    """Signals the launcher's children, or the launcher itself while it has none."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(launcher)
        for child in process.children() or [process]:
            child.send_signal(number)
