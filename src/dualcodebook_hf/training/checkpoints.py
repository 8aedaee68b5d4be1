"""Checkpoints: which one a run continues from, and writing one that appears whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list

from ..files import atomic_folder, read_json, write_json
from ..run_folder import TRAIN_CONFIG, RunFolder
from .run_arguments import RunArguments

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to continue from.

    Attributes:
        path: its folder.
        settings: of the run that wrote it, by section.
    """

    path: Path
    settings: dict[str, dict[str, Any]]

    def require_equal(self, section: str, wanted: Mapping[str, Any]) -> None:
        """Raises ValueError for the first setting among `wanted` that has another value in the checkpoint."""
        for name, new in wanted.items():
            old = self.settings[section].get(name)
            if old != new:
                raise ValueError(f"`{name}` must be {old!r}, as in the checkpoint {self.path}, got {new!r}")

    def require_same_switch(self, section: str, name: str, new: float) -> None:
        """Raises ValueError when one of the old value and the new one is 0: they decide what a checkpoint holds."""
        old = self.settings[section][name]
        if bool(old) != bool(new):
            raise ValueError(
                f"`{name}` cannot be switched on or off: {old!r} in the checkpoint {self.path}, got {new!r}"
            )


def find_checkpoint(arguments: RunArguments) -> Checkpoint | None:
    """What `resume_from_checkpoint` means; None for a fresh start (`latest` in an empty run is one).

    Raises ValueError when a named folder is not a checkpoint, when its seed or its use of EMA is another one, and when
    a fresh start would mix with the checkpoints that `output_dir` already holds.
    """
    resume, existing = arguments.resume_from_checkpoint, RunFolder(Path(arguments.output_dir)).checkpoints()
    if resume is None:
        if existing:
            raise ValueError(
                f"`output_dir` {arguments.output_dir!r} already holds {existing[-1].name}: set "
                "`resume_from_checkpoint: latest` to continue, or name another folder"
            )
        return None
    if resume == "latest" and not existing:
        return None
    path = existing[-1] if resume == "latest" else Path(resume)
    settings = read_json(path / TRAIN_CONFIG)
    if settings is None:
        raise ValueError(f"`resume_from_checkpoint` must be `latest` or a checkpoint-N folder, got {resume!r}")
    checkpoint = Checkpoint(path, settings)
    checkpoint.require_equal("training", {"seed": arguments.seed})
    checkpoint.require_same_switch("training", "ema_decay", arguments.ema_decay)
    return checkpoint


def save_checkpoint(
    accelerator: Accelerator,
    run: RunFolder,
    step: int,
    *,
    export: Callable[[Path], None],
    settings: Mapping[str, Any],
    keep: int,
) -> None:
    """Writes the checkpoint of `step`, on every process together; one of the same step is left as it is.

    It holds accelerate's state (networks, optimizers, EMA, progress, random numbers of every process),
    train_config.json and, in `model/`, the export.

    Args:
        export: writes the model as a new folder; called on the main process.
        settings: of the run.
        keep: number of checkpoints that stay, the newest ones; 0: all.
    """
    target = run.checkpoint(step)
    if target.exists():
        return
    if accelerator.is_main_process:
        for left in run.path.glob(f".{target.name}.*.partial"):  # by a process that was killed while it saved
            shutil.rmtree(left)
    with atomic_folder(target) if accelerator.is_main_process else nullcontext() as partial:
        [folder] = broadcast_object_list([partial])  # all processes write into the main one's
        accelerator.save_state(str(folder))
        if accelerator.is_main_process:
            export(folder / "model")
            write_json(folder / TRAIN_CONFIG, settings)
        accelerator.wait_for_everyone()
    if accelerator.is_main_process and keep:
        for old in run.checkpoints()[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
