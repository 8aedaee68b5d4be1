"""A real Ray cluster on this machine, one of whose two workers is killed in the middle; `make test-ray`."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from test_token_datasets import checkpoint, contents, job_of, own_cache, photos, write  # noqa: F401

from dualcodebook_hf.cli import main
from dualcodebook_hf.tokens.augment import Augmentation

ray = pytest.importorskip("ray", reason="pip install 'ray[data]'")
pytestmark = pytest.mark.slow

SHARDS = 8


class Killer(threading.Thread):
    """Kills the first process of two that writes a shard once another shard is there.

    Attributes:
        seen: processes that wrote.
        killed: the one that was killed.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.seen, self.killed, self.done = folder, set(), None, False

    def run(self) -> None:
        while not self.done:
            partial = list(self.folder.glob(".*.partial"))
            writers = {int(re.search(r"\.(\d+)\.partial$", path.name)[1]) for path in partial}
            self.seen |= writers
            if self.killed is None and writers and len(self.seen) > 1 and list(self.folder.glob("*.parquet")):
                self.killed = writers.pop()
                os.kill(self.killed, signal.SIGKILL)
            time.sleep(0.001)


def test_a_worker_that_is_killed_costs_nothing(photos, checkpoint, tmp_path, capsys):  # noqa: F811
    # Random crops, and many, so that a shard takes a while.
    augmentation = Augmentation(kind="random-crop", size=16, crops=300)
    write(job_of(photos, tmp_path / "alone", checkpoint, augmentation=augmentation, num_shards=SHARDS))
    killer = Killer(tmp_path / "ray" / "data")
    killer.start()
    command = ["tokenize-dataset", str(photos), "--output", str(tmp_path / "ray"), "--model", checkpoint]
    command += ["--device", "cpu", "--size", "16", "--columns", "label", "--num-shards", str(SHARDS)]
    command += ["--batch-size", "4", "--augmentation", "random-crop", "--crops", "300"]
    code = main([*command, "--engine", "ray", "--ray-workers", "2"])
    killer.done = True
    killer.join()
    assert code == 0
    assert killer.killed is not None and len(killer.seen) >= 2
    assert contents(tmp_path / "ray") == contents(tmp_path / "alone")
    assert f"is complete: {SHARDS} shards, 11 images" in capsys.readouterr().out


def test_a_bad_image_is_named_by_the_worker(photos, checkpoint, tmp_path, capsys):  # noqa: F811
    (tmp_path / "bad/train").mkdir(parents=True)
    (tmp_path / "bad/train/a.png").write_bytes(b"no image")
    command = ["tokenize-dataset", str(tmp_path / "bad"), "--output", str(tmp_path / "out"), "--model", checkpoint]
    assert main([*command, "--device", "cpu", "--size", "16", "--engine", "ray"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dualcodebook: error: ") and "row 0 of" in error and "a.png" in error
