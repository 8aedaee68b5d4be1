"""The processes around a run: who may write to its folder, and who must not outlive whom."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import psutil

LOCK = ".training.lock"
LAUNCHED = "DUALCODEBOOK_LAUNCHED"  # the number of the process without which its children are not to go on


def is_main_process() -> bool:
    """Whether this process speaks and writes for the run, known before accelerate is set up."""
    return os.environ.get("RANK", "0") == "0"


def announce(message: str) -> None:
    """A line for the user, from the main process alone."""
    if is_main_process():
        print(message, file=sys.stderr, flush=True)


@contextmanager
def sole_run(folder: Path) -> Iterator[None]:
    """Makes `folder`, and keeps other runs out of it; one that is killed lets go of it.

    Folders that were made are deleted again where they stay empty. Only the main process of a run calls this.

    Raises ValueError when another run is there, or when the folder cannot be made or written to.
    """
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _lock(path)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise ValueError(f"`output_dir` must be a folder that can be written to: {error}") from error
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is let go: who waits for nothing looks whether it is still the same
        file.close()
        for parent in made:
            with suppress(OSError):
                parent.rmdir()


def _lock(path: Path) -> TextIO:
    """The file, locked for as long as this process lives and the file is open; forked workers do not inherit that."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
                announce(f"the folder {path.parent} cannot be locked ({error.strerror}): start no second run on it")
                return file
            file.seek(0)
            holder = file.read() or "another process"
            file.close()
            raise ValueError(f"`output_dir` {str(path.parent)!r} is in use by another run: {holder}") from error
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        file.close()  # its holder has just deleted it


def end_with_parent(seconds: float = 1.0) -> None:
    """Sends SIGTERM to this process when its parent, or the one that `LAUNCHED` names, has ended, however that came.

    Args:
        seconds: between two looks.
    """
    parent, launcher = os.getppid(), int(os.environ.get(LAUNCHED, os.getppid()))

    def watch() -> None:
        # Two, because the parent may be gone before this process looks for the first time.
        while os.getppid() == parent and psutil.pid_exists(launcher):
            time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()
