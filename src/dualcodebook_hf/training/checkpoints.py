"""Checkpoints: which one a run continues from, and writing one that appears whole or not at all."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import atomic_folder, read_json, remove_folder, remove_leftovers, write_json
from ..run_folder import TRAIN_CONFIG, RunFolder, checkpoint_step
from .run_arguments import RunArguments

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to continue from.

    Attributes:
        path: its folder.
        settings: of the run that wrote it, by section.
        damaged: newer ones that cannot be used, and what is wrong with each.
    """

    path: Path
    settings: dict[str, dict[str, Any]]
    damaged: dict[Path, str] = field(default_factory=dict)

    def require_equal(self, section: str, wanted: Mapping[str, Any]) -> None:
        """Raises ValueError for the first setting among `wanted` that has another value in the checkpoint."""
        for name, new in wanted.items():
            old = self._setting(section, name)
            if old != new:
                raise ValueError(f"`{name}` must be {old!r}, as in the checkpoint {self.path}, got {new!r}")

    def require_same_switch(self, section: str, name: str, new: float) -> None:
        """Raises ValueError when one of the old value and the new one is 0: they decide what a checkpoint holds."""
        old = self._setting(section, name)
        if bool(old) != bool(new):
            raise ValueError(
                f"`{name}` cannot be switched on or off: {old!r} in the checkpoint {self.path}, got {new!r}"
            )

    def set_damaged_aside(self) -> None:
        """Renames the newer checkpoints, which would otherwise count as those to keep; on the main process."""
        for path in self.damaged:
            aside = path.with_name(f"damaged-{path.name}")
            if aside.exists():
                remove_folder(aside)
            path.rename(aside)

    def _setting(self, section: str, name: str) -> Any:
        found = self.settings.get(section)
        return found.get(name) if isinstance(found, dict) else None


def check_fresh_start(arguments: RunArguments) -> None:
    """Raises ValueError when a fresh start would mix with the checkpoints in `output_dir`."""
    existing = RunFolder(Path(arguments.output_dir)).checkpoints()
    if existing and arguments.resume_from_checkpoint is None:
        raise ValueError(
            f"`output_dir` {arguments.output_dir!r} already holds {existing[-1].name}: set "
            "`resume_from_checkpoint: latest` to continue, or name another folder"
        )


def find_checkpoint(arguments: RunArguments) -> Checkpoint | None:
    """What `resume_from_checkpoint` means; None for a fresh start (`latest` in an empty run is one).

    `latest` is the newest one that is complete and undamaged.

    Raises ValueError when a named folder is not such a checkpoint, when its seed or its use of EMA is another one, when
    `latest` finds only damaged ones, and when a fresh start would mix with the checkpoints in `output_dir`.
    """
    check_fresh_start(arguments)
    resume, existing = arguments.resume_from_checkpoint, RunFolder(Path(arguments.output_dir)).checkpoints()
    if resume is None:
        return None
    if resume == "latest" and not existing:
        return None
    if resume != "latest" and not Path(resume).is_dir():
        raise ValueError(f"`resume_from_checkpoint` must be `latest` or a checkpoint-N folder, got {resume!r}")
    damaged: dict[Path, str] = {}
    for path in reversed(existing) if resume == "latest" else [Path(resume)]:
        damage = find_damage(path)
        if damage is None:
            checkpoint = Checkpoint(path, read_json(path / TRAIN_CONFIG) or {}, damaged)
            checkpoint.require_equal("training", {"seed": arguments.seed})
            checkpoint.require_same_switch("training", "ema_decay", arguments.ema_decay)
            return checkpoint
        damaged[path] = damage
    listed = "; ".join(f"{path.name}: {damage}" for path, damage in damaged.items())
    raise ValueError(f"`resume_from_checkpoint` {resume!r}: there is no complete checkpoint ({listed})")


def save_checkpoint(run: RunFolder, step: int, write: Callable[[Path], None], *, keep: int) -> None:
    """Writes the checkpoint of `step`, in place of one of the same step, and deletes older ones.

    Args:
        run: whose.
        step: updates taken.
        write: fills a folder.
        keep: number of checkpoints up to this step that stay, the newest ones; 0: all.
    """
    with atomic_folder(run.checkpoint(step), replace=True) as partial:
        partial.mkdir()
        write(partial)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        listed = {path.relative_to(partial).as_posix(): [path.stat().st_size, _checksum(path)] for path in files}
        write_json(partial / MANIFEST, {"files": listed})
    for old in [path for path in run.checkpoints() if checkpoint_step(path) <= step][:-keep] if keep else []:
        remove_folder(old)
    remove_leftovers(run.path)


def find_damage(checkpoint: Path) -> str | None:
    """The first file that is not as it was written, by size and CRC-32 (3 GB/s); None where all are."""
    path = checkpoint / MANIFEST
    try:
        manifest = read_json(path)
        if manifest is None:
            return f"{MANIFEST} is missing: it is incomplete, or from an earlier version (start from its model/)"
        for name, (size, checksum) in manifest["files"].items():
            path = checkpoint / name
            found = path.stat().st_size if path.is_file() else None
            if found is None:
                return f"{name} is missing"
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            if _checksum(path) != checksum:
                return f"{name} has another checksum than when it was written"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return f"{MANIFEST} is damaged"
    return None


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            value = zlib.crc32(block, value)
    return value
