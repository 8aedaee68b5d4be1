"""Arguments of the loop, which those of every task extend."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..flags import did_you_mean
from ..presets import SHORT

PRECISIONS = ("no", "bf16", "fp16")
SCHEDULES = ("constant", "linear", "cosine")
TRACKERS = ("tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio")


def described(text: str, **more: Any) -> dict[str, Any]:
    """A field's metadata.

    Args:
        text: what `--help` says about it.
        more: path=True where it may name a file or folder; separator="," where a YAML list becomes one text; heading,
            of the group in `--help` that starts with this field; flags, further ones beside its name.
    """
    return {"help": text, **more}


@dataclass(kw_only=True)
class Arguments:
    """A section of a run file."""

    def __post_init__(self) -> None:
        """Expands `~` in every field that may name a file or folder."""
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if spec.metadata.get("path") and value is not None:
                words = [os.path.expanduser(word) for word in (value if isinstance(value, list) else [value])]
                setattr(self, spec.name, words if isinstance(value, list) else words[0])


@dataclass(kw_only=True)
class RunArguments(Arguments):
    """What `run.Trainer` reads: length, batches, precision, schedule, logs, validation, checkpoints, publishing."""

    output_dir: str = field(
        default="runs/default",
        metadata=described("where checkpoints, logs and samples go", path=True, flags=("--output",), heading="the run"),
    )
    seed: int = field(default=0, metadata=described("of initialisation, data order, augmentation and dropout"))
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata=described("a checkpoint folder, or `latest` (a fresh start where there is none)", path=True),
    )
    max_train_steps: int = field(default=10_000, metadata=described("updates in all", heading="length and batches"))
    max_train_minutes: float = field(
        default=0.0, metadata=described("stop and save after this many minutes in this process; 0: no limit")
    )
    train_batch_size: int = field(
        default=16, metadata=described("samples of one process in one forward pass", flags=("--batch-size",))
    )
    gradient_accumulation_steps: int = field(default=1, metadata=described("forward passes per update"))
    mixed_precision: str | None = field(
        default=None,
        metadata=described(
            f"one of {', '.join(PRECISIONS)}; null: what the launcher says, or no", heading="processes and precision"
        ),
    )
    num_processes: int | None = field(
        default=None,
        metadata=described("processes that train together; null: as many as are started, otherwise so many must be"),
    )
    num_threads: int = field(default=0, metadata=described("CPU threads of torch; 0: its default"))
    max_grad_norm: float = field(
        default=0.0, metadata=described("clip the gradient to this norm; 0: do not", heading="schedule")
    )
    lr_schedule: str = field(default="constant", metadata=described(f"after warm-up, one of {', '.join(SCHEDULES)}"))
    lr_warmup_steps: int = field(default=0, metadata=described("updates of linear warm-up"))
    lr_final: float = field(
        default=0.01, metadata=described("fraction of the learning rate that linear and cosine end at")
    )
    ema_decay: float = field(
        default=0.0, metadata=described("decay of the averaged weights, which are saved and validated; 0: no averaging")
    )
    validation_steps: int = field(
        default=1000, metadata=described("validate every N updates; 0: never", heading="logs and checkpoints")
    )
    patience: int = field(
        default=0,
        metadata=described("end after N validations in a row without a better one, whose model is in best/; 0: do not"),
    )
    logging_steps: int = field(default=10, metadata=described("log the losses every N updates"))
    report_to: str = field(
        default="tensorboard",
        metadata=described("accelerate's trackers, separated by commas: tensorboard, wandb, ...", separator=","),
    )
    checkpointing_steps: int = field(default=1000, metadata=described("save every N updates; 0: only at the end"))
    checkpoints_total_limit: int = field(default=2, metadata=described("keep the newest N checkpoints; 0: all"))
    push_to_hub: bool = field(
        default=False, metadata=described("publish `final/` on the Hub at the end", heading="publishing")
    )
    hub_model_id: str | None = field(default=None, metadata=described("push_to_hub: the repository, owner/name"))
    hub_private: bool = field(default=False, metadata=described("push_to_hub: make a new repository private"))
    non_finite_limit: int = field(
        default=10,
        metadata=described(
            "stop with an error after N updates in a row were skipped for NaN or infinity", heading="errors"
        ),
    )

    @property
    def trackers(self) -> list[str]:
        """Names of the trackers in `report_to`."""
        return [name for name in map(str.strip, self.report_to.split(",")) if name != "none"]

    def check(self) -> None:
        """Raises ValueError for a field that is wrong, by name."""
        if self.mixed_precision is not None:
            one_of("mixed_precision", self.mixed_precision, PRECISIONS)
        if self.num_processes is not None:
            at_least(self, 1, "num_processes")
        place = Path(self.output_dir).absolute()
        there = next(path for path in (place, *place.parents) if path.exists())
        if not there.is_dir():
            raise ValueError(f"`output_dir` must be a folder or a new name, got {self.output_dir!r}: {there} is a file")
        one_of("lr_schedule", self.lr_schedule, SCHEDULES)
        at_least(self, 1, "max_train_steps", "train_batch_size", "gradient_accumulation_steps")
        at_least(self, 1, "logging_steps", "non_finite_limit")
        if self.patience and not self.validation_steps:
            raise ValueError(f"`patience` {self.patience} needs `validation_steps` above 0, got 0")
        numbers = [spec.name for spec in dataclasses.fields(self) if isinstance(spec.default, (int, float))]
        at_least(self, 0, *numbers)
        for name in self.trackers:
            one_of("report_to", name, TRACKERS)
            if importlib.util.find_spec(name) is None:
                raise ValueError(f"`report_to` names {name}, which is not installed")
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("`push_to_hub` needs `hub_model_id`, the repository's owner/name")
        if self.lr_final > 1:
            raise ValueError(f"`lr_final` must be at most 1, got {self.lr_final}")
        below_one(self, "ema_decay")
        if self.lr_warmup_steps and self.lr_warmup_steps >= self.max_train_steps:
            raise ValueError(
                f"`lr_warmup_steps` must be below max_train_steps={self.max_train_steps}, got {self.lr_warmup_steps}"
            )


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(
            f"`{name}` must be one of {', '.join(choices)}, got {SHORT.repr(value)}{did_you_mean(str(value), choices)}"
        )


LARGEST_NUMBER = 2**32  # where numpy's seeds end; nothing else comes near


def at_least(arguments: object, low: float, *names: str) -> None:
    """Raises ValueError for a field that is below `low`, infinite or NaN, or a whole number of `LARGEST_NUMBER` on."""
    for name in names:
        value = getattr(arguments, name)
        if not value >= low:
            raise ValueError(f"`{name}` must be at least {low}, got {value}")
        limit = LARGEST_NUMBER if isinstance(value, int) else float("inf")
        if not value < limit:
            raise ValueError(f"`{name}` must be below {limit}, got {reprlib.repr(value)}")


def below_one(arguments: object, *names: str) -> None:
    """Raises ValueError for a field that does not lie in [0, 1)."""
    for name in names:
        if not 0 <= getattr(arguments, name) < 1:
            raise ValueError(f"`{name}` must lie in [0, 1), got {getattr(arguments, name)}")
