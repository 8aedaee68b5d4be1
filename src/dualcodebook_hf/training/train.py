"""The training process: `python -m dualcodebook_hf.training.train`, started by accelerate's launcher."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..malloc import keep_freed_memory
from .arguments import PROGRAM, parse_run_config
from .checkpoints import check_fresh_start
from .ends import BadDataError, ElsewhereError, NonFiniteError, StopRequest, exit_code
from .processes import LAUNCHED, announce, end_with_parent
from .run import Trainer
from .task import Task
from .tokenizer_task import TokenizerTask

# What ends a run in one line once it trains: a ValueError out of the network, say, is a bug and shows where it is.
ENDS = (OSError, NonFiniteError, KeyboardInterrupt, MemoryError, torch.OutOfMemoryError)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what the flags say, and says in a line how it ended; the exit code is one of docs/training.md."""
    return run_training(PROGRAM, parse_run_config, TokenizerTask, argv)


def run_training(
    program: str,
    parse: Callable[[Sequence[str]], Any],
    build_task: Callable[[Any], Task],
    argv: Sequence[str] | None = None,
) -> int:
    """Trains one task as a process; returns its exit code.

    Args:
        program: what messages call it.
        parse: flags -> the settings of a run, whose `training` are the loop's.
        build_task: settings -> what is trained.
        argv: flags; None: those of this process.
    """
    if LAUNCHED in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    keep_freed_memory()
    with StopRequest().watching() as stop:
        try:
            run = parse(sys.argv[1:] if argv is None else argv)
            check_fresh_start(run.training)  # before the task opens, or downloads, any data
            trainer = Trainer(build_task(run), run.training, stop)
        except (ValueError, *ENDS) as error:
            return _end(program, error)
        try:
            announce(f"{program}: {trainer.train()}")
        except (BadDataError, ElsewhereError, *ENDS) as error:
            return _end(program, error)
    return 0


def _end(program: str, error: BaseException) -> int:
    text = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        text = "a second Ctrl-C: the last checkpoint is what is left"
    if not isinstance(error, ElsewhereError):
        print(f"{program}: error: {text or type(error).__name__}", file=sys.stderr)
    return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
