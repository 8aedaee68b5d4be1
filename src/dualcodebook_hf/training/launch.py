"""accelerate's launcher, as `dualcodebook train` starts it: one line where a process dies, and no orphans."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys

import torch.distributed.run  # noqa: F401  its loggers
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from .processes import LAUNCHED, end_with_parent


def main() -> int:
    """Runs `accelerate launch` with the flags of this process; the exit code is that of the training process."""
    end_with_parent()
    os.environ[LAUNCHED] = str(os.getpid())
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):  # says at length what is said in a line here
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args())
    except subprocess.CalledProcessError as error:
        return _report(error.returncode)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return _report(failure.exitcode)
    return 0


def _report(code: int) -> int:
    """The process's exit code; what was killed could not say so itself."""
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    print(f"dualcodebook train: error: the training process was killed by {name}", file=sys.stderr)
    return 128 - code


if __name__ == "__main__":
    sys.exit(main())
