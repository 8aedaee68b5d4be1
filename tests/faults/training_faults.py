"""Faults of a training run: a tiny tokenizer, its adversary, moving averages and validation, saving at every update.

The promise behind all of them: what goes on afterwards ends in the same state as an undisturbed run, to the last bit.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from assertions import assert_equal_checkpoints
from harness import CRASHED, Child, Tally, spread, tally
from test_ends import flags_of
from test_training import run_config

from dualcodebook_hf.run_folder import RunFolder
from dualcodebook_hf.training.checkpoints import MANIFEST, _checksum, find_damage
from dualcodebook_hf.training.train import main

STEPS = 3
SETTINGS = {
    "model": {"local_update": "ema"},
    "max_train_steps": STEPS,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 2,
    "ema_decay": 0.9,
    "adversarial_weight": 0.5,
    "adversarial_start": 1,
    "validation_steps": 2,
    "validation_samples": 2,
}
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.scandir", "os.listdir"}
SAVED = f"checkpoint-{STEPS}"


class TrainingFaults:
    """The faults, each a method that gives a row of the table.

    Args:
        dataset: an image folder.
        work: an empty folder; a fresh one inside it belongs to each try.
        tries: number of tries of a fault.
        seed: of all random choices.
    """

    def __init__(self, dataset: str, work: Path, tries: int, seed: int) -> None:
        self.dataset, self.work, self.tries, self.random = dataset, work, tries, random.Random(seed)
        self.count = 0
        self.whole = self._folder()
        self.events = work / "events"
        self._finish(self.whole, resume=False, at_event=10**9)
        self.seconds = self._timed()

    # --- killed, then continued

    def killed_at_file_system_events(self) -> Tally:
        """SIGKILL at the k-th opening, renaming, making or deleting inside the run's folder."""
        available = int(self.events.read_text())
        return tally(
            f"SIGKILL at file-system event k of {available}",
            ((f"k={k}", self._killed(at_event=k)) for k in spread(self.tries, available)),
        )

    def killed_at_random_moments(self) -> Tally:
        moments = [self.random.uniform(0, self.seconds) for _ in range(self.tries)]
        return tally(
            "SIGKILL at a random moment of a run",
            ((f"after {moment:.3f} s", self._killed(after=moment)) for moment in moments),
        )

    def killed_inside_saves(self) -> Tally:
        """From when a checkpoint's temporary folder is there on, for about as long as saving takes."""
        moments = [self.random.uniform(0, 0.06) for _ in range(self.tries)]
        return tally(
            "SIGKILL inside a save",
            ((f"{moment:.3f} s into a save", self._killed(after=moment, inside_save=True)) for moment in moments),
        )

    def _killed(self, at_event: int = 0, after: float = 0.0, inside_save: bool = False) -> Callable[[], str]:
        def attempt() -> str:
            folder, save = self._folder(), self.random.randint(1, STEPS)
            child = self._start(folder, at_event=at_event)
            while inside_save and not list(folder.glob(f".checkpoint-{save}.*.partial")):
                if (code := child.poll()) is not None:
                    raise AssertionError(f"ended by {code} before checkpoint {save}: {child.said()}")
            if not at_event:
                time.sleep(after)
                child.kill()
            code = child.wait()
            assert code in (0, -signal.SIGKILL), child.said()
            outcome = "killed in a save" if list(folder.glob(".checkpoint-*.partial")) else "killed elsewhere"
            self._finish(folder)
            return outcome if code else "ended before"

        return attempt

    # --- one of two ranks

    def one_of_two_ranks_killed(self) -> Tally:
        """The other one ends by itself once they train; before, where they meet, the launcher ends it."""
        whole = self._folder()
        started = time.monotonic()
        for child in self._ranks(whole, resume=False):
            assert child.wait() == 0, child.said()
        seconds = time.monotonic() - started

        def attempt(rank: int, moment: float) -> Callable[[], str]:
            def killed() -> str:
                folder = self._folder()
                children = self._ranks(folder, resume=False)
                time.sleep(moment)
                children[rank].kill()
                trained = (folder / "checkpoint-1").is_dir()
                code = children[rank].wait()
                if code and not trained:
                    children[1 - rank].kill()
                other = children[1 - rank].wait(60)
                assert code in (0, -signal.SIGKILL)
                assert other in (0, 1, CRASHED, -signal.SIGABRT, -signal.SIGKILL), children[1 - rank].said()
                self._finish_ranks(folder, whole)
                return "ended before" if code == 0 else "while they trained" if trained else "before they trained"

            return killed

        moments = [self.random.uniform(0.3 * seconds, seconds) for _ in range(max(1, self.tries // 2))]
        return tally(
            "SIGKILL of one of two ranks",
            ((f"rank {i % 2} after {m:.2f} s", attempt(i % 2, m)) for i, m in enumerate(moments)),
        )

    def _finish_ranks(self, folder: Path, whole: Path) -> None:
        for child in self._ranks(folder, resume=True):
            assert child.wait() == 0, child.said()
        assert_equal_checkpoints(whole / SAVED, folder / SAVED)

    def _ranks(self, folder: Path, resume: bool) -> list[Child]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [self._start(folder, resume, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]

    # --- disk full

    def disk_full(self) -> Tally:
        """A file system that is too small by another number of bytes each time, and then grows."""
        size = sum(path.stat().st_size for path in self.whole.rglob("*") if path.is_file())
        kilobytes = [16 + k * (int(1.6 * size) // 1024) // self.tries for k in range(self.tries)]
        mounting = may_mount(self.work)
        attempt = self._small_disk if mounting else self._short_files
        how = "tmpfs of k KiB" if mounting else "files of at most k KiB"
        return tally(f"disk full: {how}, then room", ((f"k={k}", attempt(k)) for k in kilobytes))

    def _small_disk(self, kilobytes: int) -> Callable[[], str]:
        def attempt() -> str:
            folder = self._folder()
            folder.mkdir()
            with mounted(folder, kilobytes):
                outcome = self._ends_in_a_line(self._start(folder))
                _intact(folder)
                subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
                self._finish(folder)
            return outcome

        return attempt

    def _short_files(self, kilobytes: int) -> Callable[[], str]:
        def attempt() -> str:
            folder = self._folder()
            outcome = self._ends_in_a_line(self._start(folder, longest=1024 * kilobytes // 8))
            _intact(folder)
            self._finish(folder)
            return outcome

        return attempt

    def _ends_in_a_line(self, child: Child) -> str:
        code = child.wait()
        if code == 0:
            return "had room"
        said = child.said()
        assert code == 1 and "Traceback" not in said, said
        assert said.strip().splitlines()[-1].startswith("dualcodebook train: error: "), said
        return "ended by one line"

    # --- damaged checkpoints

    def damaged_files(self) -> Tally:
        """The newest checkpoint's file is damaged, as its manifest tells: the one before is taken."""

        def attempt(name: str, kind: str) -> Callable[[], str]:
            def damaged() -> str:
                folder = self._copy()
                changed = self._damage(folder / SAVED / name, kind)
                self._finish(folder)
                assert (folder / f"damaged-{SAVED}").is_dir() == changed
                self._nothing_executed(folder)
                return "went on from the one before"

            return damaged

        return tally(
            "a damaged file in the newest checkpoint",
            ((f"{kind} of {name}", attempt(name, kind)) for name, kind in self._damages()),
        )

    def replaced_files(self) -> Tally:
        """The same with a manifest that fits, as someone would write who wants code to run."""

        def attempt(name: str, kind: str) -> Callable[[], str]:
            def replaced() -> str:
                folder = self._copy()
                self._damage(folder / SAVED / name, kind)
                if name != MANIFEST:
                    sign(folder / SAVED)
                child = self._start(folder, resume=True)
                code = child.wait()
                self._nothing_executed(folder)
                said = child.said()
                assert code in (0, 2) and "Traceback" not in said, said
                assert code == 0 or "dualcodebook train: error: " in said.strip().splitlines()[-1], said
                return "refused in one line" if code else "harmless values"

            return replaced

        return tally(
            "a replaced file, with a manifest that fits",
            ((f"{kind} of {name}", attempt(name, kind)) for name, kind in self._damages()),
        )

    def _damages(self) -> list[tuple[str, str]]:
        checkpoint = self.whole / SAVED
        names = sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())
        every = [(name, kind) for name in names for kind in ("bit flip", "cut", "emptying", "removal", "pickle")]
        return self.random.sample(every, min(len(every), self.tries))

    def _damage(self, path: Path, kind: str) -> bool:
        content = path.read_bytes()
        place = self.random.randrange(len(content))
        flipped = content[:place] + bytes([content[place] ^ 1 << self.random.randrange(8)]) + content[place + 1 :]
        new = {"bit flip": flipped, "cut": content[:place], "emptying": b"", "pickle": pickle.dumps(Payload())}
        path.unlink()
        if kind in new:
            path.write_bytes(new[kind])
        return path.name != MANIFEST or find_damage(path.parent) is not None

    def _nothing_executed(self, folder: Path) -> None:
        assert not list(self.work.rglob(Payload.MARK)) and not Path(Payload.MARK).exists(), "a pickle was executed"

    # --- runs

    def _start(
        self, folder: Path, resume: bool = False, at_event: int = 0, longest: int = 0, **environment: str
    ) -> Child:
        latest = {"resume_from_checkpoint": "latest"} if resume else {}
        flags = list(flags_of(run_config(self.dataset, folder, **SETTINGS, **latest)))

        def work() -> int:
            os.chdir(self.work)
            if longest:
                resource.setrlimit(resource.RLIMIT_FSIZE, (longest, resource.RLIM_INFINITY))
            if at_event:
                watch_events(self.events, folder, at_event, EVENTS)
            return main(flags)

        self.count += 1
        return Child(work, self.work / f"log-{self.count}", ACCELERATE_USE_CPU="true", **environment)

    def _finish(self, folder: Path, resume: bool = True, at_event: int = 0) -> None:
        """Continues a run, which then is as the undisturbed one is."""
        child = self._start(folder, resume=resume, at_event=at_event)
        code = child.wait()
        assert code == 0, f"exit code {code}: {child.said()}"
        if folder != self.whole:
            assert_equal_checkpoints(self.whole / SAVED, folder / SAVED)
            assert_equal_checkpoints(self.whole / "final", folder / "final")
        _intact(folder)
        assert not list(folder.glob(".*")), list(folder.glob(".*"))

    def _timed(self) -> float:
        started = time.monotonic()
        self._finish(self._folder(), resume=False)
        return time.monotonic() - started

    def _folder(self) -> Path:
        self.count += 1
        return self.work / f"run-{self.count}"

    def _copy(self) -> Path:
        folder = self._folder()
        shutil.copytree(self.whole, folder)
        return folder


def watch_events(counter: Path, folder: Path, last: int, events: set[str]) -> None:
    """Kills this process at event number `last` inside a folder; of 10**9 the number so far stands in `counter`."""
    seen, prefix, pid = 0, str(folder), os.getpid()
    count = os.open(counter, os.O_WRONLY | os.O_CREAT)

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in events and os.getpid() == pid and str(arguments[0]).startswith(prefix):
            seen += 1
            if last == 10**9:
                os.pwrite(count, str(seen).encode(), 0)
            if seen == last:
                os.kill(pid, signal.SIGKILL)

    sys.addaudithook(hook)


class Payload:
    """A pickle of it makes a folder when it is loaded."""

    MARK = "executed"

    def __reduce__(self):
        return os.mkdir, (self.MARK,)


def sign(checkpoint: Path) -> None:
    """Writes a manifest of the files as they are."""
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST]
    listed = {path.relative_to(checkpoint).as_posix(): [path.stat().st_size, _checksum(path)] for path in files}
    (checkpoint / MANIFEST).write_text(json.dumps({"files": listed}))


def _intact(folder: Path) -> None:
    for checkpoint in RunFolder(folder).checkpoints():
        assert find_damage(checkpoint) is None, f"{checkpoint.name}: {find_damage(checkpoint)}"


@contextmanager
def mounted(folder: Path, kilobytes: int) -> Iterator[None]:
    """A file system in memory, of this size, at an empty folder."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def may_mount(work: Path) -> bool:
    place = work / "mount"
    place.mkdir()
    try:
        with mounted(place, 64):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False
