"""Trains a tokenizer: `accelerate launch scripts/train.py ...` or `dualcodebook train ...`."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..autoencoder_dualcodebook import DualCodebookVQModel
from ..backbone import last_convolution
from .adversary import Adversary
from .arguments import EXIT_CODE_FILE, RunConfig, TrainArguments, parse_run_config
from .checkpoints import export_model, exportable, find_checkpoint, save_checkpoint
from .data import TrainingImages, ValidationImages
from .initialization import initialize_from_images
from .losses import ReconstructionLoss, weighted_sum
from .validation import validate


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint.

    step: generator updates taken. samples: pictures consumed by all processes (the data position).
    lost: updates lost in a row to NaN or infinity.
    """

    step: int = 0
    samples: int = 0
    lost: int = 0

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        for spec in fields(self):
            setattr(self, spec.name, state[spec.name])


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


@dataclass
class MicroBatch:
    """What one forward pass leaves behind: detached loss terms and which pictures they came from."""

    terms: dict[str, torch.Tensor]
    index: list[int]


class Trainer:
    """A training run: model, adversary, optimizers, data and progress under one accelerator.

    Raises ValueError for bad arguments, before any weights or pictures are loaded.
    """

    def __init__(self, run: RunConfig, stop: StopRequest | None = None) -> None:
        run.check()
        self.stop = stop or StopRequest()
        self.run, self.arguments = run, run.training
        checkpoint = find_checkpoint(run)
        if self.arguments.push_to_hub and os.environ.get("RANK", "0") == "0":
            from ..hub import check_access

            check_access(self.arguments.hub_model_id)
        self.training_images = TrainingImages(run.data, self.arguments.seed)
        self.validation_images = None
        if self.arguments.validation_steps and run.data.validation_split:
            self.validation_images = ValidationImages(run.data, self.arguments.validation_samples, self.arguments.seed)
        self.accelerator = build_accelerator(self.arguments)
        if self.arguments.num_threads:
            torch.set_num_threads(self.arguments.num_threads)
        set_seed(self.arguments.seed)
        self.progress = Progress()
        self._build_networks(fresh=checkpoint is None)
        if checkpoint is not None:
            self.accelerator.load_state(str(checkpoint))

    def _build_networks(self, fresh: bool) -> None:
        arguments, accelerator = self.arguments, self.accelerator
        lpips = None
        if arguments.perceptual == "lpips" and arguments.perceptual_weight:
            from .perceptual import LPIPS

            lpips = LPIPS.from_pretrained(arguments.vgg_weights).to(accelerator.device)
        self.reconstruction_loss = ReconstructionLoss(
            l1_weight=arguments.l1_weight,
            l2_weight=arguments.l2_weight,
            log_l2_weight=arguments.log_l2_weight,
            perceptual=arguments.perceptual,
            perceptual_weight=arguments.perceptual_weight,
            lpips=lpips,
        )
        model = build_model(self.run, fresh)
        if fresh and arguments.data_initialization:
            images = self.training_images.first(arguments.data_initialization)
            initialize_from_images(model, images, seed=arguments.seed)
        if arguments.channels_last:
            model.to(memory_format=torch.channels_last)
        if arguments.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if arguments.compile:
            # The adaptive weight walks the graph twice; donated buffers would be gone by the second time.
            torch._functorch.config.donated_buffer = not arguments.adversarial_weight
            model.encoder.compile()
            model.decoder.compile()
        optimizer = build_optimizer(model, arguments)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.adversary = None
        if arguments.adversarial_weight:
            self.adversary = Adversary(
                channels=arguments.discriminator_channels,
                learning_rate=arguments.discriminator_learning_rate or arguments.learning_rate,
                betas=(arguments.discriminator_beta1, arguments.discriminator_beta2),
                start_step=arguments.adversarial_start,
                weight=arguments.adversarial_weight,
            )
            self.adversary.prepare(accelerator)
        self.ema = None
        if arguments.ema_decay:
            self.ema = EMAModel(self.network.parameters(), decay=arguments.ema_decay, foreach=True)
            self.ema.to(accelerator.device)
            accelerator.register_for_checkpointing(self.ema)
        accelerator.register_for_checkpointing(self.progress)

    @property
    def network(self) -> DualCodebookVQModel:
        """The model without its distributed wrapper."""
        return self.accelerator.unwrap_model(self.model)

    def train(self) -> None:
        """Runs until `max_train_steps`, `max_train_minutes` or a signal; then saves a checkpoint and `final/`.

        Raises ValueError for a picture that cannot be read (after saving), and RuntimeError after `non_finite_limit`
        updates in a row were lost to NaN or infinity.
        """
        arguments = self.arguments
        deadline = time.monotonic() + arguments.max_train_minutes * 60 if arguments.max_train_minutes else math.inf
        batches = iter(self._loader())
        self.model.train()
        with self._tracking(), self._progress_bar() as bar:
            while self.progress.step < arguments.max_train_steps and not self._should_stop(deadline):
                try:
                    taken, terms = self._update(batches)
                except ValueError:  # a picture that cannot be read: what was learned so far is kept
                    if self.accelerator.num_processes == 1:
                        self._save()
                    raise
                if not taken:
                    continue
                bar.update()
                step = self.progress.step
                if step % arguments.logging_steps == 0:
                    bar.set_postfix(self._log(terms), refresh=False)
                if self.validation_images is not None and step % arguments.validation_steps == 0:
                    self._validate()
                if arguments.checkpointing_steps and step % arguments.checkpointing_steps == 0:
                    self._save()
            export = self._save()
            if export is not None:
                export_model(export, Path(self.arguments.output_dir) / "final", self.run)
            self.accelerator.wait_for_everyone()
        # A run that was stopped will be resumed: it is published when it is done.
        if self.arguments.push_to_hub and self.accelerator.is_main_process and not self.stop.requested:
            self._publish()

    def _publish(self) -> None:
        from ..hub import push_model

        folder, repo_id = self.arguments.output_dir, self.arguments.hub_model_id
        try:
            url = push_model(folder, repo_id, private=self.arguments.hub_private)
        except (OSError, ValueError) as error:
            again = f"dualcodebook push {folder} --repo-id {repo_id}"
            raise OSError(f"{error}. The run itself is complete; publish it by `{again}`") from error
        tqdm.write(f"published: {url}", file=sys.stderr)

    def _loader(self) -> DataLoader:
        return self.training_images.loader(
            self.arguments.train_batch_size,
            start=self.progress.samples,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _update(self, batches: Iterator[dict[str, torch.Tensor]]) -> tuple[bool, dict[str, torch.Tensor]]:
        """One generator update (and one of the discriminator once it plays): was it taken, and the mean loss terms."""
        accelerator, done = self.accelerator, []
        factor = learning_rate_factor(self.arguments, self.progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * (factor if group["annealed"] else 1.0)
        if self.adversary is not None:
            self.adversary.optimizer.param_groups[0]["lr"] = self.adversary.learning_rate * factor
        for _ in range(self.arguments.gradient_accumulation_steps):
            batch = next(batches)
            with accelerator.accumulate(*self._trained_modules()):
                done.append(self._forward_backward(batch))
        self.progress.samples += sum(len(micro.index) for micro in done) * accelerator.num_processes
        taken = self._step_if_finite(done)
        return taken, {name: torch.stack([micro.terms[name] for micro in done]).mean() for name in done[0].terms}

    def _forward_backward(self, batch: dict[str, torch.Tensor]) -> MicroBatch:
        """The paper's loss and its gradients, for both networks, of one batch."""
        x = batch["pixel_values"].to(self.accelerator.device, non_blocking=True)
        if self.arguments.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        out = self.model(x)
        terms = self.reconstruction_loss(out.sample, x)
        weights = dict(self.reconstruction_loss.weights)
        if self.adversary is not None:
            rec = self.reconstruction_loss.rec(terms)
            last_layer = last_convolution(self.network.decoder).weight
            # adaptive weight and adversarial_weight are inside the term
            terms["adversarial"] = self.adversary.generator_term(out.sample, rec, last_layer, self.progress.step)
            weights["adversarial"] = 1.0
        terms |= out.losses
        weights |= dict.fromkeys(out.losses, self.arguments.codebook_weight)
        self.accelerator.backward(weighted_sum(terms, weights))
        if self.adversary is not None:
            discriminator_loss = self.adversary.discriminator_loss(x, out.sample.detach(), self.progress.step)
            if discriminator_loss is not None:
                self.accelerator.backward(discriminator_loss)
                terms["discriminator"] = discriminator_loss
        return MicroBatch({name: term.detach().float() for name, term in terms.items()}, batch["index"].tolist())

    def _step_if_finite(self, done: list[MicroBatch]) -> bool:
        """Clips and steps both optimizers, or neither when any loss or gradient is NaN or infinite."""
        accelerator, optimizers = self.accelerator, [self.optimizer]
        limit = self.arguments.max_grad_norm or math.inf
        norms = [accelerator.clip_grad_norm_(self.model.parameters(), limit)]  # fp16: unscales both networks
        if self.adversary is not None and self.adversary.started(self.progress.step):
            optimizers.append(self.adversary.optimizer)
            norms.append(torch.nn.utils.clip_grad_norm_(self.adversary.discriminator.parameters(), limit))
        losses = [term for micro in done for term in micro.terms.values()]
        finite = torch.isfinite(torch.stack([value.detach().float() for value in [*norms, *losses]])).all()
        if accelerator.num_processes > 1:
            finite = accelerator.reduce(finite.float(), "mean") == 1
        taken = bool(finite)
        self._step(optimizers, taken)
        if not taken:
            self._count_lost(done, norms)
            return False
        self.progress.step += 1
        self.progress.lost = 0
        if self.ema is not None:
            self.ema.step(self.network.parameters())
        return True

    def _step(self, optimizers: list[AcceleratedOptimizer], taken: bool) -> None:
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

    def _count_lost(self, done: list[MicroBatch], norms: list[torch.Tensor]) -> None:
        self.progress.lost += 1
        if self.adversary is not None:
            self.adversary.forget_non_finite_statistics()
        terms = {name: float(value) for micro in done for name, value in micro.terms.items() if not value.isfinite()}
        named = ", ".join(f"{name} = {value}" for name, value in terms.items())
        named = named or "gradient norm = " + ", ".join(str(float(norm)) for norm in norms)
        images = sorted({index for micro in done for index in micro.index})
        message = f"update {self.progress.step + 1} not taken: {named}; batch: pictures {images} of the training split"
        if self.progress.lost >= self.arguments.non_finite_limit:
            raise RuntimeError(f"{message}; {self.progress.lost} in a row (`non_finite_limit`), training stops")
        tqdm.write(message, file=sys.stderr)

    def _trained_modules(self) -> list[torch.nn.Module]:
        return [self.model] if self.adversary is None else [self.model, self.adversary.discriminator]

    @contextmanager
    def averaged_weights(self) -> Iterator[DualCodebookVQModel]:
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
            with self.averaged_weights() as network:
                batches = self.validation_images.batches(self.arguments.validation_batch_size)
                metrics, grid = validate(network, batches)
            folder = Path(self.arguments.output_dir) / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            grid.save(folder / f"step-{self.progress.step:07d}.png")
            self.accelerator.log({f"validation/{name}": value for name, value in metrics.items()}, self.progress.step)
            for tracker in self.accelerator.trackers:
                if tracker.name in ("tensorboard", "wandb"):
                    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    images = {"validation/reconstructions": np.asarray(grid)[None]}
                    tracker.log_images(images, self.progress.step, **layout)
            line = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            tqdm.write(f"step {self.progress.step}: {line}", file=sys.stderr)
        self.accelerator.wait_for_everyone()

    def _save(self) -> DualCodebookVQModel | None:
        """Writes a checkpoint; returns the exported model on the main process."""
        export = None
        if self.accelerator.is_main_process:
            with self.averaged_weights() as averaged:
                export = exportable(averaged, self.arguments.weights_dtype)
        save_checkpoint(self.accelerator, self.run, self.progress.step, export)
        return export

    def _log(self, terms: dict[str, torch.Tensor]) -> dict[str, float]:
        names = sorted(terms)
        values = self.accelerator.reduce(torch.stack([terms[name] for name in names]), "mean").tolist()
        logged = dict(zip(names, values, strict=True))
        rates = {f"learning_rate/{group['name']}": group["lr"] for group in self.optimizer.param_groups}
        self.accelerator.log({f"train/{name}": value for name, value in logged.items()} | rates, self.progress.step)
        return {name: f"{value:.3g}" for name, value in logged.items()}

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
        flat = {name: value for section in self.run.to_dict().values() for name, value in section.items()}
        simple = {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in flat.items()}
        # TensorBoard's folder in output_dir; the project's name elsewhere.
        name = "logs" if self.arguments.trackers == ["tensorboard"] else "dualcodebook"
        self.accelerator.init_trackers(name, config=simple)
        try:
            yield
        finally:
            self.accelerator.end_training()


def build_accelerator(arguments: TrainArguments) -> Accelerator:
    """accelerate's Accelerator for these arguments; D's BatchNorm buffers are the adversary's business, not DDP's."""
    return Accelerator(
        mixed_precision=arguments.mixed_precision,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        log_with=arguments.trackers or None,
        project_dir=arguments.output_dir,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def build_model(run: RunConfig, fresh: bool = True) -> DualCodebookVQModel:
    """A new model; with the weights of `init_from` in it at a fresh start.

    A source with another kind of quantizer (a converted VQGAN for a dual model) gives its encoder and decoder alone.
    Raises ValueError when they cannot be had or do not fit the configuration.
    """
    model = DualCodebookVQModel(**asdict(run.model))
    if run.training.init_from and fresh:
        try:
            source = DualCodebookVQModel.from_pretrained(run.training.init_from)
            state = source.state_dict()
            if source.config.quantizer != model.config.quantizer:
                codebooks = {key: value for key, value in model.state_dict().items() if key.startswith("quantize.")}
                state = {key: value for key, value in state.items() if not key.startswith("quantize.")} | codebooks
            model.load_state_dict(state)
        except OSError as error:
            raise ValueError(f"`init_from` {run.training.init_from!r} cannot be loaded: {error}") from error
        except RuntimeError as error:
            raise ValueError(f"`init_from` {run.training.init_from!r} does not fit the model: {error}") from error
    return model


def build_optimizer(model: DualCodebookVQModel, arguments: TrainArguments) -> torch.optim.AdamW:
    """AdamW (Adam at weight decay 0) with the codebooks in a group of their own."""
    codebooks = [parameter for parameter in model.quantize.parameters() if parameter.requires_grad]
    ids = {id(parameter) for parameter in codebooks}
    backbone = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in ids]
    rates = (arguments.learning_rate, arguments.codebook_learning_rate or arguments.learning_rate)
    annealed = (True, arguments.anneal_codebook_lr)
    groups = [
        {"name": name, "params": params, "lr": rate, "base_lr": rate, "annealed": anneal}
        for name, params, rate, anneal in zip(
            ("backbone", "codebooks"), (backbone, codebooks), rates, annealed, strict=True
        )
        if params
    ]
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    return torch.optim.AdamW(groups, betas=betas, weight_decay=arguments.weight_decay)


def learning_rate_factor(arguments: TrainArguments, step: int) -> float:
    """Share of the learning rate at update `step` (from 0): linear warm-up, then the schedule down to `lr_final`."""
    warmup = arguments.lr_warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(arguments.max_train_steps - warmup, 1)
    if arguments.lr_schedule == "constant":
        return 1.0
    left = (1 + math.cos(math.pi * done)) / 2 if arguments.lr_schedule == "cosine" else 1 - done
    return arguments.lr_final + (1 - arguments.lr_final) * left


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the trainer: 0 when it ended or was asked to stop, 2 for bad input."""
    with StopRequest().watching() as stop:
        try:
            Trainer(parse_run_config(sys.argv[1:] if argv is None else argv), stop).train()
        except ValueError as error:
            print(f"dualcodebook train: error: {error}", file=sys.stderr)
            if EXIT_CODE_FILE in os.environ:
                Path(os.environ[EXIT_CODE_FILE]).write_text("2")
            return 2
        except OSError as error:
            print(f"dualcodebook train: error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
