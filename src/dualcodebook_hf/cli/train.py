"""`dualcodebook train` and `train-generator`: accelerate's launcher with signals, exit codes and early checks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ..flags import Parser
from ..loading import check_tokenizer_name
from ..packages import require_package
from ..presets import GENERATOR, load_preset
from ..training.arguments import CLASSES, DataArguments, naming_arguments, parse_run_config
from ..training.parsing import DESCRIPTION, USAGE, add_fields
from ..training.sources import open_splits


def add_train(command: Parser) -> None:
    """Adds the command's flags to its parser, for completion; `main` hands the command's words to `train` whole."""
    command.usage, command.description = USAGE, DESCRIPTION
    add_fields(command, CLASSES, load_preset("tiny"))


def train(argv: Sequence[str]) -> int:
    """`accelerate launch` of the trainer, with the launcher's flags before a `--`; returns the exit code.

    What can be wrong with the flags of both, and with the data, is found here first: the launcher takes long.
    """
    launch_flags, flags = _split_at_dashes(argv)
    run = parse_run_config(flags)
    _require_packages()
    _open_images(run.data, bool(run.training.validation_steps))
    return _launch(launch_flags, "dualcodebook_hf.training.train", flags)


def add_train_generator(command: Parser) -> None:
    """Adds the command's flags to its parser, for completion; `main` hands the words to `train_generator` whole."""
    from ..generation import arguments

    command.usage, command.description = USAGE, DESCRIPTION
    add_fields(command, arguments.CLASSES, load_preset("tiny", GENERATOR), GENERATOR)


def train_generator(argv: Sequence[str]) -> int:
    """As `train`, for a generator."""
    from ..generation.arguments import parse_generator_config

    launch_flags, flags = _split_at_dashes(argv)
    run = parse_generator_config(flags)
    from ..tokens.dataset import TokenDataset  # it needs numpy, and `--help` has ended here

    _require_packages()
    check_tokenizer_name(run.data.tokenizer, "tokenizer")
    if run.data.dataset:
        _open_images(run.data, bool(run.training.validation_steps))
    for name in ("tokens", "validation_tokens"):
        folder = getattr(run.data, name)
        if folder:
            TokenDataset(folder, name)
    return _launch(launch_flags, "dualcodebook_hf.generation.train", flags)


def _require_packages() -> None:
    for package in ("accelerate", "datasets"):
        require_package(package, "train")


def _open_images(data: DataArguments, validates: bool) -> None:
    for name, split in (("train_split", data.train_split), ("validation_split", data.validation_split)):
        if name == "train_split" or validates:
            with naming_arguments(name):
                open_splits(data, split)


def _launch(launch_flags: Sequence[str], module: str, flags: Sequence[str]) -> int:
    """Starts the launcher with a module that trains; returns its exit code."""
    launch_flags = complete_launch_flags(launch_flags)
    from ..training.processes import LAUNCHED  # it needs psutil

    command = [sys.executable, "-m", "dualcodebook_hf.training.launch", *launch_flags, "-m", module, *flags]
    return _run_forwarding_signals(command, {**os.environ, LAUNCHED: str(os.getpid())})


def _split_at_dashes(argv: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """The launcher's flags and the trainer's, which follow the first `--`; without one all are the trainer's."""
    if "--" not in argv:
        return [], argv
    place = argv.index("--")
    return argv[:place], argv[place + 1 :]


def complete_launch_flags(flags: Sequence[str]) -> list[str]:
    """The launcher's flags with the defaults that it would announce, line by line, if it were left to choose them.

    A file of `accelerate config` makes its own choices. On a CPU the process gets torch's number of threads.

    Raises ValueError for flags that it does not know, and for several processes on a CPU: it would start one.
    """
    import torch
    from accelerate.commands.config import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    parser.error = _raise_value_error
    args = parser.parse_args([*flags, "-m", "trainer"])
    on_cpu = args.cpu or not torch.accelerator.is_available()
    several = args.num_processes
    from_file = args.config_file is not None or (os.path.isfile(default_config_file) and not args.cpu)
    if from_file and several is None:
        several = load_config_from_file(args.config_file).num_processes
    if on_cpu and (several or 1) > 1 and not (args.multi_gpu or args.mpirun_hostfile):
        raise ValueError(
            f"`--num_processes {several}`: on a CPU accelerate's launcher starts one process; several are started by "
            f"`ACCELERATE_USE_CPU=true torchrun --nproc_per_node {several} scripts/train.py ...`"
        )
    count = several or (1 if on_cpu else torch.accelerator.device_count())
    missing: dict[str, Any] = {}
    if not from_file:
        missing = {"num_processes": count, "num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"}
    if on_cpu and "OMP_NUM_THREADS" not in os.environ:  # it would be one thread
        missing["num_cpu_threads_per_process"] = max(1, torch.get_num_threads() // count)
    added = [f"--{name}={value}" for name, value in missing.items() if getattr(args, name) is None]
    kind = from_file or args.cpu or args.multi_gpu or args.tpu or args.use_deepspeed or args.use_fsdp
    return [*flags, *added, *(["--multi_gpu"] if count > 1 and not kind else [])]


def _raise_value_error(message: str) -> None:
    raise ValueError(f"{message} (before the `--`: flags of `accelerate launch`)")


def _run_forwarding_signals(command: Sequence[str], environment: dict[str, str] | None = None) -> int:
    """Runs the launcher and returns its exit code, 128 + n if signal n ended it.

    SIGTERM, SIGINT and SIGHUP go to the training processes, which save and end; a second SIGINT kills everything (130).
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
            _kill_all(launcher.pid)
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
    if received.count(signal.SIGINT) > 1:
        print("dualcodebook: error: killed by a second Ctrl-C; the last checkpoint is what is left", file=sys.stderr)
        return 128 + signal.SIGINT
    return code if code >= 0 else 128 - code


def _signal_ranks(launcher: int, number: int) -> None:
    """Signals the launcher's children, or the launcher itself while it has none."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(launcher)
        for child in process.children() or [process]:
            child.send_signal(number)


def _kill_all(launcher: int) -> None:
    """Kills the launcher and all that it started, in whatever session."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(launcher)
        for member in [process, *process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
