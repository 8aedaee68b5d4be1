"""Faults of tokenizing a data set: whatever ends it, the same command again makes the same files, to the last bit."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from harness import Child, Tally, spread, tally
from PIL import Image
from test_token_datasets import SIZE, TINY, contents
from training_faults import EVENTS, may_mount, mounted, watch_events

from dualcodebook_hf import DualCodebookVQModel
from dualcodebook_hf.cli import main

IMAGES, SHARDS, KILLS = 300, 12, 5


class TokenFaults:
    """The faults, each a method that gives a row of the table.

    Args:
        work: an empty folder; a fresh one inside it belongs to each try.
        tries: number of tries of a fault.
        seed: of all random choices.
    """

    def __init__(self, work: Path, tries: int, seed: int) -> None:
        self.work, self.tries, self.random, self.count = work, tries, random.Random(seed), 0
        self.images, self.model = work / "photos", work / "model"
        generator = np.random.default_rng(0)
        for number in range(IMAGES):
            place = self.images / "train" / ("cat", "dog")[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            values = generator.integers(0, 256, (20, 18 + number % 5, 3), dtype=np.uint8)
            Image.fromarray(values).save(place / f"{number:03}.png")
        torch.manual_seed(0)
        DualCodebookVQModel(**TINY).save_pretrained(self.model)
        self.events = work / "events"
        self.whole = self._folder()
        started = time.monotonic()
        self._finish(self.whole, at_event=10**9)
        self.seconds = time.monotonic() - started

    def killed_at_file_system_events(self) -> Tally:
        """SIGKILL at the k-th opening, renaming, making or deleting inside the output."""
        available = int(self.events.read_text())

        def attempt(event: int) -> Callable[[], None]:
            def killed() -> None:
                folder = self._folder()
                self._start(folder, at_event=event).wait()
                self._finish(folder)

            return killed

        kinds = ((f"k={k}", attempt(k)) for k in spread(self.tries, available))
        return tally(f"tokens: SIGKILL at file-system event k of {available}", kinds)

    def killed_five_times_by_one_process(self) -> Tally:
        return self._killed_again_and_again(processes=1)

    def killed_five_times_by_two_processes(self) -> Tally:
        return self._killed_again_and_again(processes=2)

    def _killed_again_and_again(self, processes: int) -> Tally:
        """Each kill at a random moment: of both processes, or of one, whose other goes on to its end."""

        def attempt() -> str:
            folder, ended = self._folder(), 0
            for _ in range(KILLS):
                children = [self._start(folder, rank, processes) for rank in range(processes)]
                time.sleep(self.random.uniform(0, self.seconds))
                for child in children if self.random.random() < 0.5 else children[:1]:
                    child.kill()
                ended += sum(child.wait() == 0 for child in children)
            self._finish(folder, processes=self.random.choice((1, 2)))
            return "ended before its kill" if ended == KILLS * processes else "killed"

        name = f"tokens: SIGKILL at {KILLS} random moments, {processes} process{'es' * (processes > 1)}"
        return tally(name, ((f"try {number}", attempt) for number in range(max(1, self.tries // 4))))

    def disk_full(self) -> Tally:
        """A file system that is too small by another number of bytes each time, and then grows."""
        if not may_mount(self.work):
            return tally("tokens: disk full: not tried, no tmpfs may be mounted here", [("", lambda: "not tried")])
        size = sum(path.stat().st_size for path in self.whole.rglob("*") if path.is_file())

        def attempt(kilobytes: int) -> Callable[[], str]:
            def full() -> str:
                folder = self._folder()
                folder.mkdir()
                with mounted(folder, kilobytes):
                    child = self._start(folder)
                    code = child.wait()
                    assert code in (0, 1) and "Traceback" not in child.said(), child.said()
                with mounted(folder, 2**16):
                    self._finish(folder)
                return "ended by one line" if code else "had room"

            return full

        kilobytes = [4 + k * int(1.5 * size / 1024) // self.tries for k in range(self.tries)]
        return tally("tokens: disk full: tmpfs of k KiB, then room", ((f"k={k}", attempt(k)) for k in kilobytes))

    def _start(self, folder: Path, rank: int = 0, processes: int = 1, at_event: int = 0) -> Child:
        command = ["tokenize-dataset", str(self.images), "--output", str(folder), "--model", str(self.model)]
        command += ["--device", "cpu", "--size", str(SIZE), "--columns", "label", "--num-shards", str(SHARDS)]
        command += ["--augmentation", "random-crop", "--crops", "4", "--crop-ranges", "1.2", "--batch-size", "8"]

        def work() -> int:
            if at_event:
                watch_events(self.events, folder, at_event, EVENTS)
            return main(command)

        self.count += 1
        return Child(work, self.work / f"log-{self.count}", RANK=str(rank), WORLD_SIZE=str(processes))

    def _finish(self, folder: Path, processes: int = 1, at_event: int = 0) -> None:
        """The same command again, after which everything is as without a disturbance."""
        children = [self._start(folder, rank, processes, at_event) for rank in range(processes)]
        for child in children:
            assert child.wait() == 0, child.said()
        if folder != self.whole:
            assert contents(folder) == contents(self.whole)

    def _folder(self) -> Path:
        self.count += 1
        return self.work / f"tokens-{self.count}"
