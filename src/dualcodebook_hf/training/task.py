"""The contract between the loop of `run.Trainer` and what it trains: a model with its data, losses and optimizers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import nn

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    from .checkpoints import Checkpoint


class Trained(NamedTuple):
    """A network and its optimizer, both as accelerate prepared them; None: what forward passes alone move."""

    module: nn.Module
    optimizer: AcceleratedOptimizer | None


class Task(Protocol):
    """What is trained. The constructor checks its arguments and opens the data, before any weights are built.

    The loop calls `prepare` once. For every update it calls `set_learning_rates`, then `forward_backward` for each of
    the batches whose gradients are accumulated, and then steps what `trained` names, or sets `statistics` back.
    It owns everything else: processes, precision, EMA weights, logs, checkpoints, and when to validate, save and stop.

    Attributes:
        settings: all settings of the run, {section: {name: value}}, ready for JSON; saved as train_config.json.
        network: the network that is averaged, validated and exported, without a distributed wrapper.
            It exists from `prepare` on.
        validates: whether there is something to validate on.
        goal: the metric of `validate` by which validations are compared, and whether more of it is better.
    """

    @property
    def settings(self) -> dict[str, dict[str, Any]]: ...
    @property
    def network(self) -> nn.Module: ...
    @property
    def validates(self) -> bool: ...
    @property
    def goal(self) -> tuple[str, bool]: ...

    def check_resumable(self, checkpoint: Checkpoint) -> None:
        """Raises ValueError when this task cannot continue from `checkpoint`; called before `prepare`."""

    def prepare(self, accelerator: Accelerator, fresh: bool) -> None:
        """Builds networks and optimizers and hands them to `accelerator.prepare`.

        The random numbers are seeded just before.

        Args:
            accelerator: moves and wraps what it is given.
            fresh: False when the weights of a checkpoint are loaded next, so that other initial ones need no work.
        """

    def batches(self, start: int) -> Iterator[dict[str, torch.Tensor]]:
        """This process's batches without an end, a function of the seed and of the position alone.

        Args:
            start: samples that all processes together consumed before.

        Returns:
            Dicts of tensors with `train_batch_size` samples each. "index", int64 (B,), names the samples in messages.
            Its `next` raises ValueError for a sample that cannot be trained on, OSError or RuntimeError where there is
            no reading on; it draws no global random numbers.
        """

    def remarks(self) -> list[str]:
        """What there is to say at the end about the data that this process read, a line each."""

    def set_learning_rates(self, factor: float) -> dict[str, float]:
        """Sets the rates of every optimizer for the next update.

        Args:
            factor: share of the full rate, by the schedule.

        Returns:
            The rates to log, by name.
        """

    def forward_backward(self, batch: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
        """The losses of one batch, and their gradients by `accelerator.backward`; it steps no optimizer.

        Args:
            batch: one of `batches`, not yet on the device.
            step: updates taken so far.

        Returns:
            The terms of the loss by name: scalars, float32, detached, of the same names at every call of a step.
        """

    def parts(self) -> list[Trained]:
        """All networks with their optimizers, in an order that never changes: checkpoints hold them by it."""

    def trained(self, step: int) -> list[Trained]:
        """Those of the parts that take part in the update after `step` updates: all of them are stepped, or none is."""

    def statistics(self) -> list[torch.Tensor]:
        """What forward passes of training move by themselves, such as running means: always the same, in one order."""

    def validate(self) -> tuple[dict[str, float], Image.Image | None]:
        """Metrics by name and an image to look at (None: none), on the main process.

        `network` is in eval mode and holds the averaged weights. Raises BadDataError or LostDataError where the images
        cannot be read.
        """

    def export(self, folder: Path) -> None:
        """Writes the model, on the main process, as a `folder` that does not exist yet, for `from_pretrained`.

        `network` is in eval mode and holds the averaged weights.
        """

    def check_publishable(self, repo_id: str) -> None:
        """Raises ValueError or OSError where the finished run could not be published; called before `prepare`."""

    def publish(self, folder: Path, repo_id: str, private: bool) -> str:
        """Publishes the finished run in `folder` on the Hub, and returns the repository's URL.

        Raises OSError or ValueError when that fails.
        """
