"""What lies where in the folder of a training run, and beside the weights of a saved model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

CONFIG = "config.json"
TRAIN_CONFIG = "train_config.json"  # all settings of the run that made the weights
METRICS = "metrics.json"  # written by `dualcodebook evaluate --output`
CONVERSION = "conversion.json"  # written by `dualcodebook convert`: whose weights these are
RECORDS = {"train": TRAIN_CONFIG, "metrics": METRICS, "conversion": CONVERSION}

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class RunFolder:
    """The `output_dir` of a training run.

    - checkpoint-N/: the state of the run after update N; its model/ is for `from_pretrained`
    - damaged-checkpoint-N/: one that `resume_from_checkpoint: latest` could not use
    - final/: the model at the end, for `from_pretrained`
    - best/: with `patience`, the model of the best validation
    - samples/step-N.png: validation images above their reconstructions
    - logs/: TensorBoard's
    """

    path: Path

    @property
    def final(self) -> Path:
        """The model that the run ended with."""
        return self.path / "final"

    @property
    def best(self) -> Path:
        """The model of the best validation, whether it exists or not."""
        return self.path / "best"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint after `step` updates, whether it exists or not."""
        return self.path / f"checkpoint-{step}"

    def checkpoints(self) -> list[Path]:
        """The checkpoints, oldest first; an empty folder is none."""
        folders = [path for path in self.path.glob("checkpoint-*") if path.is_dir() and any(path.iterdir())]
        steps = [(step, path) for path in folders if (step := checkpoint_step(path)) is not None]
        return [path for _, path in sorted(steps)]

    def sample(self, step: int) -> Path:
        """The validation images after `step` updates, whether they exist or not."""
        return self.path / "samples" / f"step-{step:07d}.png"

    def last_sample(self) -> Path | None:
        """The validation images that were drawn last."""
        return max((self.path / "samples").glob("step-*.png"), default=None)


@dataclass(frozen=True)
class SavedModel:
    """A folder for `from_pretrained`, and the run that it belongs to where it is part of one.

    home: the run, the checkpoint or the folder itself: records may lie there too, and its name is the model's.
    """

    folder: Path
    home: Path

    @classmethod
    def find(cls, path: str | Path) -> SavedModel:
        """The model of a run (its `final/`), of a checkpoint (its `model/`), or in a folder itself.

        Raises ValueError where there is none.
        """
        place = Path(path).expanduser().resolve()
        if not place.is_dir():
            raise ValueError(f"`run` must be the folder of a run or of a trained model, got '{path}'")
        found = [folder for folder in (place, place / "final", place / "model") if (folder / CONFIG).is_file()]
        if not found:
            there = ", ".join(folder.name for folder in RunFolder(place).checkpoints())
            hint = f"; name one of its checkpoints: {there}" if there else ""
            raise ValueError(f"there is no {CONFIG} in '{path}', nor in its final/ or model/{hint}")
        folder = found[0]
        return cls(folder, folder.parent if folder.name in ("final", "model") else folder)

    @property
    def name(self) -> str:
        """The home's name, in the characters that the Hub allows."""
        return re.sub(r"[^\w.-]|^[.-]", "_", self.home.name)

    def records(self) -> dict[str, Path]:
        """The files of `RECORDS` that lie beside the weights or in the home."""
        places = {key: [place / name for place in (self.folder, self.home)] for key, name in RECORDS.items()}
        found = {key: [path for path in paths if path.is_file()] for key, paths in places.items()}
        return {key: paths[0] for key, paths in found.items() if paths}

    def sample(self) -> Path | None:
        """The run's validation images at this model's step."""
        step = checkpoint_step(self.home)
        if step is None:
            return RunFolder(self.home).last_sample()
        path = RunFolder(self.home.parent).sample(step)
        return path if path.is_file() else None


def checkpoint_step(path: Path) -> int | None:
    """The number of updates that a checkpoint's name tells; None for another name."""
    match = _CHECKPOINT.fullmatch(path.name)
    return int(match[1]) if match else None
