"""How a run ends: the requests that stop it, the errors that end it, and the exit codes of both (docs/training.md)."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from safetensors import SafetensorError

FAILED, BAD_INPUT, DIVERGED = 1, 2, 3
Batch = TypeVar("Batch")


class BadDataError(ValueError):
    """The data holds what cannot be trained on."""


class LostDataError(OSError):
    """The data could be read before, and cannot now: a worker process or the network is gone."""


class SavingError(OSError):
    """Something could not be written."""


class NonFiniteError(RuntimeError):
    """`non_finite_limit` updates in a row were skipped because of a NaN or an infinity."""


class ElsewhereError(RuntimeError):
    """Another process of the run ends with an error, which it reports itself.

    Attributes:
        error: what ends it.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def exit_code(error: BaseException) -> int:
    """Of a run that ends with this error."""
    if isinstance(error, ElsewhereError):
        return exit_code(error.error)
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, NonFiniteError):
        return DIVERGED
    return BAD_INPUT if isinstance(error, ValueError) else FAILED


def read_next(batches: Iterator[Batch]) -> Batch:
    """The next batch. Raises BadDataError or LostDataError, in one line, where it cannot be read."""
    try:
        return next(batches)
    except (OSError, RuntimeError, MemoryError) as error:  # DataLoader says by a RuntimeError that a worker is dead
        raise LostDataError(f"the data cannot be read: {_last_line(error)}") from error
    except StopIteration:
        raise
    except ValueError as error:
        raise BadDataError(_last_line(error)) from error
    except Exception as error:
        raise BadDataError(f"the data cannot be read: {type(error).__name__} {_last_line(error)}") from error


def _last_line(error: Exception) -> str:
    """The message; of an error out of a worker process, which comes with its traceback, that of the traceback's end."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines) == 1 else re.sub(r"^[\w.]+(Error|Exception): ", "", lines[-1])


@contextmanager
def saving(what: Any) -> Iterator[None]:
    """Raises SavingError, which names `what`, where the block cannot write to the disk."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        raise SavingError(f"{what} could not be written: {error}") from error


class StopRequest:
    """Set by SIGTERM, SIGHUP or SIGINT while inside `watching()`: the run saves after the current update and returns.

    A second SIGINT raises KeyboardInterrupt.

    Attributes:
        requested: whether a signal came.
        reason: its name.
    """

    requested = False
    reason = ""

    def _set(self, number: int, _: object) -> None:
        name = signal.Signals(number).name
        if self.requested and name == self.reason == "SIGINT":
            raise KeyboardInterrupt
        self.requested, self.reason = True, name

    @contextmanager
    def watching(self) -> Iterator[StopRequest]:
        """Takes the signals over for the length of the block; SIGHUP not where it is ignored, as under nohup."""
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        previous = {number: signal.signal(number, self._set) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
