"""The loop of every training: updates, EMA weights, logs, validation, checkpoints, export. It trains a `Task`."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object, set_seed
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from ..files import atomic_file, atomic_folder, remove_leftovers, write_json
from ..run_folder import TRAIN_CONFIG, RunFolder
from .accelerator import build_accelerator, what_ran
from .checkpoints import find_checkpoint, save_checkpoint
from .ends import (
    BadDataError,
    ElsewhereError,
    LostDataError,
    NonFiniteError,
    SavingError,
    StopRequest,
    read_next,
    saving,
)
from .processes import announce, is_main_process, sole_run
from .run_arguments import RunArguments
from .state import Progress, RunState
from .task import Task, Trained


class Trainer:
    """A training run: a task, its progress and its EMA weights under one accelerator.

    It holds the lock of `output_dir` until `train` has ended.

    Args:
        task: what is trained.
        arguments: of the loop.
        stop: asks the run to save and return; None: nothing does.

    Raises ValueError for bad arguments, for an `output_dir` that is in use, and for a checkpoint that the run cannot
    continue from, before any weights are built.
    """

    def __init__(self, task: Task, arguments: RunArguments, stop: StopRequest | None = None) -> None:
        arguments.check()
        self.task, self.arguments = task, arguments
        self.stop = stop or StopRequest()
        self.folder = RunFolder(Path(arguments.output_dir))
        with ExitStack() as stack:
            if is_main_process():
                stack.enter_context(sole_run(self.folder.path))
            self._set_up()
            self._held = stack.pop_all()

    def _set_up(self) -> None:
        task, arguments = self.task, self.arguments
        checkpoint = find_checkpoint(arguments)
        if checkpoint is not None:
            task.check_resumable(checkpoint)
        if arguments.push_to_hub and is_main_process():
            task.check_publishable(arguments.hub_model_id)
        self.accelerator = build_accelerator(arguments)
        sections = task.settings
        self.settings = {**sections, "training": {**sections["training"], **what_ran(self.accelerator)}}
        if arguments.num_threads:
            torch.set_num_threads(arguments.num_threads)
        set_seed(arguments.seed)
        task.prepare(self.accelerator, fresh=checkpoint is None)
        self.ema = None
        if arguments.ema_decay:
            self.ema = EMAModel(task.network.parameters(), decay=arguments.ema_decay, foreach=True)
            self.ema.to(self.accelerator.device)
        self.state = RunState(self.accelerator, task.parts(), task.network, self.ema)
        self.progress = Progress()
        if checkpoint is not None:
            self.progress = self.state.read(checkpoint.path)
            for path, damage in checkpoint.damaged.items():
                announce(f"{path.name} is set aside: {damage}; the run goes on from {checkpoint.path.name}")
        self.accelerator.wait_for_everyone()  # no process looks for checkpoints any more
        if self.accelerator.is_main_process:
            if checkpoint is not None:
                checkpoint.set_damaged_aside()
            for folder in (self.folder.path, self.folder.sample(0).parent):
                remove_leftovers(folder)
        here = checkpoint is not None and checkpoint.path.resolve().parent == self.folder.path.resolve()
        self._saved = self._place() if here else None

    @property
    def network(self) -> nn.Module:
        """The task's network, without its distributed wrapper."""
        return self.task.network

    def train(self) -> str:
        """Runs until `max_train_steps`, `max_train_minutes` or a signal; then saves a checkpoint and `final/`.

        Returns:
            How it ended, in a line.

        Raises, in every process, after saving: BadDataError or LostDataError for a batch that cannot be read,
        NonFiniteError when `non_finite_limit` updates in a row were skipped. SavingError where that is not possible.
        In processes other than the main one they come as ElsewhereError.
        """
        with self._held:
            try:
                self._run()
            finally:
                for line in self.task.remarks():
                    tqdm.write(line, file=sys.stderr)
            # A run that was stopped will be resumed: it is published when it is done.
            if self.arguments.push_to_hub and self.accelerator.is_main_process and not self.stop.requested:
                self._publish()
        final, step = self.folder.final, self.progress.step
        if step >= self.arguments.max_train_steps:
            return f"finished after {step} updates: {final}"
        if self._out_of_patience:
            since = f"no validation has been better since update {self.progress.best_step}: {self.folder.best}"
            return f"finished after {step} updates (`patience`), {since}"
        reason = (self.stop.reason or "a request") if self.stop.requested else "max_train_minutes"
        return f"stopped by {reason} after {step} updates: {final}; `resume_from_checkpoint: latest` goes on"

    def _run(self) -> None:
        arguments = self.arguments
        minutes = arguments.max_train_minutes
        deadline = time.monotonic() + minutes * 60 if minutes else math.inf
        batches = self.task.batches(self.progress.samples)
        self.network.train()
        self._waited, self._logged = 0.0, time.monotonic()  # seconds for data, and since when they are counted
        with self._tracking(), self._progress_bar() as bar:
            while self.progress.step < arguments.max_train_steps and not self._out_of_patience:
                group = self._next_group(batches, deadline)
                if group is None:
                    break
                taken, terms, rates = self._update(group)
                if not taken:
                    continue
                bar.update()
                if self._is_due(arguments.logging_steps):
                    bar.set_postfix(self._log(terms, rates), refresh=False)
                if not arguments.patience:  # a validation that fails costs no checkpoint
                    self._save_if_due()
                if self.task.validates and self._is_due(arguments.validation_steps):
                    self._on_main(self._validate, "what was validated")
                    self._share_patience()
                if arguments.patience:  # the checkpoint knows how good its model is
                    self._save_if_due()
            self._save()
            self._on_main(self._export_final, self.folder.final)

    def _next_group(
        self, batches: Iterator[dict[str, torch.Tensor]], deadline: float
    ) -> list[dict[str, torch.Tensor]] | None:
        """The batches of one update; None when it is time to stop.

        They are all read before the first is used: where one cannot be, there is nothing half done, and it is saved.
        """
        group, error, start = [], None, time.monotonic()
        try:
            group = [read_next(batches) for _ in range(self.arguments.gradient_accumulation_steps)]
        except (BadDataError, LostDataError) as raised:
            error = raised
        self._waited += time.monotonic() - start
        stop = self.stop.requested or time.monotonic() > deadline
        stop, failed = self._any(stop, error is not None)
        if failed:
            self._save()
            self._raise_together(error)
        return None if stop else group

    def _update(self, group: list[dict[str, torch.Tensor]]) -> tuple[bool, dict[str, torch.Tensor], dict[str, float]]:
        """One update: was it taken, the terms of its loss (means of its batches), and its learning rates."""
        step = self.progress.step
        rates = self.task.set_learning_rates(learning_rate_factor(self.arguments, step))
        trained, before = self.task.trained(step), [tensor.clone() for tensor in self.task.statistics()]
        done, index = [], []
        for batch in group:
            with self.accelerator.accumulate(*(part.module for part in trained)):
                done.append(self.task.forward_backward(batch, step))
            index += batch["index"].tolist()
        self.progress.samples += len(index) * self.accelerator.num_processes
        norms = self._clip(trained)
        tracked = [tensor for tensor in self.task.statistics() if tensor.is_floating_point() and tensor.numel()]
        values = [(name, value) for terms in done for name, value in terms.items()]
        values += [("gradient norm", norm) for norm in norms]
        values += [("a running statistic", tensor.abs().max()) for tensor in tracked]
        finite = self._finite([value for _, value in values])
        self._step([part.optimizer for part in trained], finite)
        taken = bool(finite)  # the one wait for the device in an update: it is at work on the step meanwhile
        if taken:
            self.progress.step, self.progress.skipped = step + 1, 0
            if self.ema is not None:
                self.ema.step(self.network.parameters())
        else:
            with torch.no_grad():
                for tensor, value in zip(self.task.statistics(), before, strict=True):
                    tensor.copy_(value)
            self._skip(values, index)
        return taken, {name: torch.stack([terms[name] for terms in done]).mean() for name in done[0]}, rates

    def _clip(self, trained: list[Trained]) -> list[torch.Tensor]:
        """Clips the gradients of each network to `max_grad_norm`; the norms that they had."""
        limit = self.arguments.max_grad_norm or math.inf
        self.accelerator.unscale_gradients()  # fp16
        return [torch.nn.utils.clip_grad_norm_(part.module.parameters(), limit) for part in trained]

    def _finite(self, values: list[torch.Tensor]) -> torch.Tensor:
        """Whether all of them are finite, in all processes: a bool on the device."""
        finite = torch.isfinite(torch.stack([value.detach().float() for value in values])).all()
        if self.accelerator.num_processes > 1:
            finite = self.accelerator.reduce(finite.float(), "mean") == 1
        return finite

    def _step(self, optimizers: list[AcceleratedOptimizer], finite: torch.Tensor) -> None:
        """Steps all optimizers or, where the update is skipped, none: a fused optimizer decides it on the device."""
        scaler = self.accelerator.scaler
        if scaler is None:
            for optimizer in optimizers:
                if optimizer.optimizer.defaults.get("fused"):
                    optimizer.optimizer.found_inf = (~finite).float()  # GradScaler's word to fused optimizers
                elif not finite:
                    continue
                optimizer.step()
        elif finite:
            # accelerate's step updates the scaler each time, and the second network would be unscaled again.
            for optimizer in optimizers:
                scaler.step(optimizer.optimizer)
        if scaler is not None:
            scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()

    def _skip(self, values: list[tuple[str, torch.Tensor]], index: list[int]) -> None:
        """Counts an update that was not taken, and says which of the values of which samples was not finite."""
        self.progress.skipped += 1
        wrong = {name: float(value) for name, value in values if not value.isfinite()}
        terms = [name for name in wrong if name not in ("gradient norm", "a running statistic")]
        named = ", ".join(f"{name} = {wrong[name]}" for name in terms or wrong) or "in another process"
        samples = sorted(set(index))
        message = f"update {self.progress.step + 1} skipped: {named}; batch: samples {samples} of the training split"
        if self.progress.skipped >= self.arguments.non_finite_limit:
            self._save(keep_all=True)  # the weights of old may be better
            message = f"{message}; {self.progress.skipped} in a row (`non_finite_limit`), training stops"
            self._raise_together(NonFiniteError(message))
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
        """An image that cannot be read costs this validation and nothing else."""
        try:
            # A run that goes on from the checkpoint of this step does not validate first.
            with self.state.unchanged_random_numbers(), self.averaged_weights():
                metrics, image = self.task.validate()
        except (BadDataError, LostDataError) as error:
            tqdm.write(f"step {self.progress.step}: no validation: {error}", file=sys.stderr)
        else:
            self._record_validation(metrics, image)

    def _record_validation(self, metrics: dict[str, float], image: Image.Image | None) -> None:
        step = self.progress.step
        if self.arguments.patience:
            self._compare(metrics)
        self.accelerator.log({f"validation/{name}": value for name, value in metrics.items()}, step)
        if image is not None:
            path = self.folder.sample(step)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as partial:
                image.save(partial, format="PNG")
            self._log_image(image)
        line = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        tqdm.write(f"step {step}: {line}", file=sys.stderr)

    def _compare(self, metrics: dict[str, float]) -> None:
        """Counts the validations since the best one, whose model is kept."""
        name, higher_is_better = self.task.goal
        value, progress = metrics[name], self.progress
        if progress.best is None or (value > progress.best if higher_is_better else value < progress.best):
            progress.best, progress.best_step, progress.stale = value, progress.step, 0
            with atomic_folder(self.folder.best, replace=True) as partial:
                self._export(partial)
        else:
            progress.stale += 1

    @property
    def _out_of_patience(self) -> bool:
        return bool(self.arguments.patience) and self.progress.stale >= self.arguments.patience

    def _share_patience(self) -> None:
        """The main process alone validates; all of them stop together."""
        if self._any(self._out_of_patience)[0]:
            self.progress.stale = max(self.progress.stale, self.arguments.patience)

    def _log_image(self, image: Image.Image) -> None:
        for tracker in self.accelerator.trackers:
            if tracker.name in ("tensorboard", "wandb"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                images = {"validation/images": np.asarray(image)[None]}
                tracker.log_images(images, self.progress.step, **layout)

    def _log(self, terms: dict[str, torch.Tensor], rates: dict[str, float]) -> dict[str, str]:
        names = sorted(terms)
        values = self.accelerator.reduce(torch.stack([terms[name] for name in names]), "mean").tolist()
        logged = dict(zip(names, values, strict=True))
        now = time.monotonic()
        wait, self._waited, self._logged = self._waited / (now - self._logged), 0.0, now
        others = {f"learning_rate/{name}": rate for name, rate in rates.items()} | {"data_wait": wait}
        self.accelerator.log({f"train/{name}": value for name, value in logged.items()} | others, self.progress.step)
        return {name: f"{value:.3g}" for name, value in logged.items()} | {"data wait": f"{wait:.1%}"}

    def _place(self) -> tuple[int, int]:
        return self.progress.step, self.progress.samples

    def _save(self, keep_all: bool = False) -> None:
        """Saves the state, on every process together, unless it is saved already or nothing has been learned yet."""
        if self.progress.step == 0 or self._saved == self._place():
            return
        random_states = self.state.random_states()
        keep = 0 if keep_all else self.arguments.checkpoints_total_limit

        def write(folder: Path) -> None:
            self.state.write(folder, self.progress, random_states)
            self._export(folder / "model")
            write_json(folder / TRAIN_CONFIG, self.settings)

        target = self.folder.checkpoint(self.progress.step)
        self._on_main(lambda: save_checkpoint(self.folder, self.progress.step, write, keep=keep), target)
        self._saved = self._place()

    def _save_if_due(self) -> None:
        if self._is_due(self.arguments.checkpointing_steps):
            self._save()

    def _export(self, folder: Path) -> None:
        with self.averaged_weights():
            self.task.export(folder)
        write_json(folder / TRAIN_CONFIG, self.settings)

    def _export_final(self) -> None:
        with atomic_folder(self.folder.final, replace=True) as partial:
            self._export(partial)

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

    def _on_main(self, work: Callable[[], None], what: Any) -> None:
        """Runs `work` on the main process while the others wait; SavingError in all where `what` cannot be written."""
        error = None
        if self.accelerator.is_main_process:
            try:
                with saving(what):
                    work()
            except SavingError as raised:
                error = raised
        if self._any(error is not None)[0]:
            self._raise_together(error)

    def _any(self, *flags: bool) -> list[bool]:
        """Each flag: whether it is set in any process."""
        if self.accelerator.num_processes == 1:
            return list(flags)
        packed = torch.tensor([float(flag) for flag in flags], device=self.accelerator.device)
        return (self.accelerator.reduce(packed, "sum") > 0).tolist()

    def _raise_together(self, error: Exception | None) -> NoReturn:
        """Raises the first process's error that has one, in all of them: in the main one itself, for it to report."""
        if self.accelerator.num_processes == 1:
            raise error
        first = next(found for found in gather_object([error]) if found is not None)
        raise first if self.accelerator.is_main_process else ElsewhereError(first)

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
        flat = {name: value for section in self.settings.values() for name, value in section.items()}
        simple = {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in flat.items()}
        # TensorBoard's folder in output_dir; the project's name elsewhere.
        name = "logs" if self.arguments.trackers == ["tensorboard"] else "dualcodebook"
        self.accelerator.init_trackers(name, config=simple)
        try:
            yield
        finally:
            if self.accelerator.num_processes > 1:
                # A thread of gloo lets go of the last message's tensors, for which it needs Python's lock. Where the
                # group is deleted before that, torch waits for the thread while it holds the lock: for ever.
                time.sleep(0.1)
            self.accelerator.end_training()


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
