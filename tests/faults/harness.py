"""What every fault shares: processes that may die, and the count of what survived."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

CRASHED = 70  # exit code of a process that ends with a traceback


@dataclass
class Tally:
    """A row of the table.

    Attributes:
        fault: what was done to the program.
        tries: how often.
        lost: what went wrong, for each try that did not end as promised.
        outcomes: how often it ended in which of the promised ways, where there are several.
    """

    fault: str
    tries: int = 0
    lost: list[str] = field(default_factory=list)
    outcomes: dict[str, int] = field(default_factory=dict)

    @property
    def row(self) -> str:
        """Of a Markdown table."""
        how = ", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items()))
        return f"| {self.fault} | {self.tries} | {self.tries - len(self.lost)} | {len(self.lost)} | {how} |"


HEADER = "| fault | tries | survived | lost | of the survivors |\n|---|---|---|---|---|"


def tally(fault: str, tries: Iterable[tuple[str, Callable[[], str | None]]]) -> Tally:
    """Runs every try. One that raises is lost; what another returns is counted as its outcome."""
    found = Tally(fault)
    for label, attempt in tries:
        found.tries += 1
        try:
            outcome = attempt()
        except Exception as error:
            found.lost.append(f"{label}: {type(error).__name__} {str(error).strip()[-2000:]}")
        else:
            if outcome:
                found.outcomes[outcome] = found.outcomes.get(outcome, 0) + 1
    return found


class Child:
    """A forked process that does `work` and ends with the exit code that it returns (None: 0).

    Args:
        work: what it does.
        log: file for its standard output and error.
        **environment: variables for it alone.
    """

    def __init__(self, work: Callable[[], int | None], log: Path, **environment: str) -> None:
        self.log = log
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = CRASHED
            try:
                with log.open("ab", buffering=0) as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115  pytest has replaced them
                sys.stderr = sys.__stderr__ = open(2, "w", closefd=False)  # noqa: SIM115
                os.environ.update(environment)
                code = work() or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def kill(self) -> None:
        """As the kernel does for lack of memory: without a warning."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, seconds: float = 120) -> int:
        """The exit code; -n where signal n ended it. Raises TimeoutError, and kills it, where it does not end."""
        deadline = time.monotonic() + seconds
        while (found := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"no end within {seconds} seconds; {self.said()[-500:]}")
            time.sleep(0.003)
        return found

    def poll(self) -> int | None:
        """The exit code, once; None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def said(self) -> str:
        """What it wrote."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def spread(count: int, available: int) -> list[int]:
    """At most `count` of the numbers 1 to `available`, evenly spread, with both ends."""
    if count >= available:
        return list(range(1, available + 1))
    return sorted({1 + round(i * (available - 1) / max(count - 1, 1)) for i in range(count)})
