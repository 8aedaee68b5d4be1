"""The loop of every training: updates, EMA weights, logs, validation, checkpoints, export. It trains a `Task`."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from ..files import atomic_folder, write_json
from ..run_folder import TRAIN_CONFIG, RunFolder
from .checkpoints import find_checkpoint, save_checkpoint
from .run_arguments import RunArguments
from .task import Task, Trained


class NonFiniteError(RuntimeError):
    """`non_finite_limit` updates in a row were skipped because of a NaN or an infinity."""


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint.

    Attributes:
        step: updates taken.
        samples: samples consumed by all processes, which is the position in the data.
        skipped: updates skipped in a row because of a NaN or an infinity.
    """

    step: int = 0
    samples: int = 0
    skipped: int = 0

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step, self.samples = state["step"], state["samples"]
        self.skipped = state.get("skipped", 0)  # older checkpoints have another word for it


class StopRequest:
    """Set by SIGTERM or SIGINT while inside `watching()`: the run saves after the current update and returns."""

    requested = False

    def _set(self, *_) -> None:
        self.requested = True

    @contextmanager
    def watching(self) -> Iterator[StopRequest]:
        """Takes the two signals over for the length of the block."""
        previous = {number: signal.signal(number, self._set) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class Trainer:
    """A training run: a task, its progress and its EMA weights under one accelerator.

    Args:
        task: what is trained.
        arguments: of the loop.
        stop: asks the run to save and return; None: nothing does.

    Raises ValueError for bad arguments, and for a checkpoint that the run cannot continue from, before any weights are
    built.
    """

    def __init__(self, task: Task, arguments: RunArguments, stop: StopRequest | None = None) -> None:
        arguments.check()
        self.task, self.arguments = task, arguments
        self.stop = stop or StopRequest()
        self.folder = RunFolder(Path(arguments.output_dir))
        checkpoint = find_checkpoint(arguments)
        if checkpoint is not None:
            task.check_resumable(checkpoint)
        if arguments.push_to_hub and os.environ.get("RANK", "0") == "0":
            from ..hub import check_access

            check_access(arguments.hub_model_id)
        self.accelerator = build_accelerator(arguments)
        if arguments.num_threads:
            torch.set_num_threads(arguments.num_threads)
        set_seed(arguments.seed)
        task.prepare(self.accelerator, fresh=checkpoint is None)
        self.ema = None
        if arguments.ema_decay:
            self.ema = EMAModel(task.network.parameters(), decay=arguments.ema_decay, foreach=True)
            self.ema.to(self.accelerator.device)
            self.accelerator.register_for_checkpointing(self.ema)
        self.progress = Progress()
        self.accelerator.register_for_checkpointing(self.progress)
        if checkpoint is not None:
            self.accelerator.load_state(str(checkpoint.path))

    @property
    def network(self) -> nn.Module:
        """The task's network, without its distributed wrapper."""
        return self.task.network

    def train(self) -> None:
        """Runs until `max_train_steps`, `max_train_minutes` or a signal; then saves a checkpoint and `final/`.

        Raises ValueError for a sample that cannot be read (after saving), and NonFiniteError when `non_finite_limit`
        updates in a row were skipped.
        """
        arguments = self.arguments
        deadline = time.monotonic() + arguments.max_train_minutes * 60 if arguments.max_train_minutes else math.inf
        batches = self.task.batches(self.progress.samples)
        self.network.train()
        with self._tracking(), self._progress_bar() as bar:
            while self.progress.step < arguments.max_train_steps and not self._should_stop(deadline):
                try:
                    taken, terms, rates = self._update(batches)
                except ValueError:  # a sample that cannot be read: what was learned so far is kept
                    if self.accelerator.num_processes == 1:
                        self._save()
                    raise
                if not taken:
                    continue
                bar.update()
                if self._is_due(arguments.logging_steps):
                    bar.set_postfix(self._log(terms, rates), refresh=False)
                if self.task.validates and self._is_due(arguments.validation_steps):
                    self._validate()
                if self._is_due(arguments.checkpointing_steps):
                    self._save()
            self._save()
            self._export_final()
        # A run that was stopped will be resumed: it is published when it is done.
        if arguments.push_to_hub and self.accelerator.is_main_process and not self.stop.requested:
            self._publish()

    def _update(
        self, batches: Iterator[dict[str, torch.Tensor]]
    ) -> tuple[bool, dict[str, torch.Tensor], dict[str, float]]:
        """One update: was it taken, the terms of its loss (means of its batches), and its learning rates."""
        arguments, step = self.arguments, self.progress.step
        rates = self.task.set_learning_rates(learning_rate_factor(arguments, step))
        trained = self.task.trained(step)
        done, index = [], []
        for _ in range(arguments.gradient_accumulation_steps):
            batch = next(batches)
            with self.accelerator.accumulate(*(part.module for part in trained)):
                done.append(self.task.forward_backward(batch, step))
            index += batch["index"].tolist()
        self.progress.samples += len(index) * self.accelerator.num_processes
        norms = self._clip(trained)
        taken = self._finite([*norms, *(term for terms in done for term in terms.values())])
        self._step([part.optimizer for part in trained], taken)
        if taken:
            self.progress.step, self.progress.skipped = step + 1, 0
            if self.ema is not None:
                self.ema.step(self.network.parameters())
        else:
            self._skip(done, norms, index)
        return taken, {name: torch.stack([terms[name] for terms in done]).mean() for name in done[0]}, rates

    def _clip(self, trained: list[Trained]) -> list[torch.Tensor]:
        """Clips the gradients of each network to `max_grad_norm`; the norms that they had."""
        limit = self.arguments.max_grad_norm or math.inf
        self.accelerator.unscale_gradients()  # fp16
        return [torch.nn.utils.clip_grad_norm_(part.module.parameters(), limit) for part in trained]

    def _finite(self, values: list[torch.Tensor]) -> bool:
        """Whether all of them are finite, in all processes."""
        finite = torch.isfinite(torch.stack([value.detach().float() for value in values])).all()
        if self.accelerator.num_processes > 1:
            finite = self.accelerator.reduce(finite.float(), "mean") == 1
        return bool(finite)

    def _step(self, optimizers: list[AcceleratedOptimizer], taken: bool) -> None:
        """Steps all optimizers or, where the update is skipped, none."""
        scaler = self.accelerator.scaler
        if taken and scaler is None:
            for optimizer in optimizers:
                optimizer.step()
        elif taken:
            # accelerate's step updates the scaler each time, and the second network would be unscaled again.
            for optimizer in optimizers:
                scaler.step(optimizer.optimizer)
        if scaler is not None:
            scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()

    def _skip(self, done: list[dict[str, torch.Tensor]], norms: list[torch.Tensor], index: list[int]) -> None:
        """Counts an update that was not taken, and says which term of which samples was not finite."""
        self.progress.skipped += 1
        self.task.on_skipped_update()
        terms = {name: float(value) for term in done for name, value in term.items() if not value.isfinite()}
        named = ", ".join(f"{name} = {value}" for name, value in terms.items())
        named = named or "gradient norm = " + ", ".join(str(float(norm)) for norm in norms)
        samples = sorted(set(index))
        message = f"update {self.progress.step + 1} skipped: {named}; batch: samples {samples} of the training split"
        if self.progress.skipped >= self.arguments.non_finite_limit:
            raise NonFiniteError(f"{message}; {self.progress.skipped} in a row (`non_finite_limit`), training stops")
        tqdm.write(message, file=sys.stderr)

    @contextmanager
    def averaged_weights(self) -> Iterator[nn.Module]:
        """The network in eval mode with the EMA weights (its own where there are none); restored afterwards."""
        network = self.network
        network.eval()
        if self.ema is not None:
            self.ema.store(network.parameters())
            self.ema.copy_to(network.parameters())
        try:
            yield network
        finally:
            if self.ema is not None:
                self.ema.restore(network.parameters())
            network.train()

    def _validate(self) -> None:
        if self.accelerator.is_main_process:
            step = self.progress.step
            with self.averaged_weights():
                metrics, image = self.task.validate()
            self.accelerator.log({f"validation/{name}": value for name, value in metrics.items()}, step)
            if image is not None:
                path = self.folder.sample(step)
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
                self._log_image(image)
            line = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            tqdm.write(f"step {step}: {line}", file=sys.stderr)
        self.accelerator.wait_for_everyone()

    def _log_image(self, image: Image.Image) -> None:
        for tracker in self.accelerator.trackers:
            if tracker.name in ("tensorboard", "wandb"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                images = {"validation/reconstructions": np.asarray(image)[None]}
                tracker.log_images(images, self.progress.step, **layout)

    def _log(self, terms: dict[str, torch.Tensor], rates: dict[str, float]) -> dict[str, str]:
        names = sorted(terms)
        values = self.accelerator.reduce(torch.stack([terms[name] for name in names]), "mean").tolist()
        logged = dict(zip(names, values, strict=True))
        rates = {f"learning_rate/{name}": rate for name, rate in rates.items()}
        self.accelerator.log({f"train/{name}": value for name, value in logged.items()} | rates, self.progress.step)
        return {name: f"{value:.3g}" for name, value in logged.items()}

    def _save(self) -> None:
        save_checkpoint(
            self.accelerator,
            self.folder,
            self.progress.step,
            export=self._export,
            settings=self.task.settings,
            keep=self.arguments.checkpoints_total_limit,
        )

    def _export(self, folder: Path) -> None:
        with self.averaged_weights():
            self.task.export(folder)
        write_json(folder / TRAIN_CONFIG, self.task.settings)

    def _export_final(self) -> None:
        if self.accelerator.is_main_process:
            with atomic_folder(self.folder.final, replace=True) as partial:
                self._export(partial)
        self.accelerator.wait_for_everyone()

    def _publish(self) -> None:
        folder, repo_id = self.folder.path, self.arguments.hub_model_id
        try:
            url = self.task.publish(folder, repo_id, self.arguments.hub_private)
        except (OSError, ValueError) as error:
            again = f"dualcodebook push {folder} --repo-id {repo_id}"
            raise OSError(f"{error}. The run itself is complete; publish it by `{again}`") from error
        tqdm.write(f"published: {url}", file=sys.stderr)

    def _is_due(self, every: int) -> bool:
        """Whether the update just taken is one of every N; never for 0."""
        return every > 0 and self.progress.step % every == 0

    def _should_stop(self, deadline: float) -> bool:
        stop = self.stop.requested or time.monotonic() > deadline
        if self.accelerator.num_processes > 1:  # all processes stop at the same update
            flag = torch.tensor(float(stop), device=self.accelerator.device)
            stop = bool(self.accelerator.reduce(flag, "sum") > 0)
        return stop

    def _progress_bar(self) -> tqdm:
        return tqdm(
            total=self.arguments.max_train_steps,
            initial=self.progress.step,
            disable=not self.accelerator.is_main_process,
            mininterval=1.0,
            dynamic_ncols=True,
        )

    @contextmanager
    def _tracking(self) -> Iterator[None]:
        flat = {name: value for section in self.task.settings.values() for name, value in section.items()}
        simple = {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in flat.items()}
        # TensorBoard's folder in output_dir; the project's name elsewhere.
        name = "logs" if self.arguments.trackers == ["tensorboard"] else "dualcodebook"
        self.accelerator.init_trackers(name, config=simple)
        try:
            yield
        finally:
            self.accelerator.end_training()


def build_accelerator(arguments: RunArguments) -> Accelerator:
    """accelerate's Accelerator for these arguments; a task keeps its buffers equal between processes, not DDP."""
    return Accelerator(
        mixed_precision=arguments.mixed_precision,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        log_with=arguments.trackers or None,
        project_dir=arguments.output_dir,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def learning_rate_factor(arguments: RunArguments, step: int) -> float:
    """Share of the learning rate at update `step` (from 0): linear warm-up, then the schedule down to `lr_final`."""
    warmup = arguments.lr_warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(arguments.max_train_steps - warmup, 1)
    if arguments.lr_schedule == "constant":
        return 1.0
    left = (1 + math.cos(math.pi * done)) / 2 if arguments.lr_schedule == "cosine" else 1 - done
    return arguments.lr_final + (1 - arguments.lr_final) * left
