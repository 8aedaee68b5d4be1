"""A generator's training: masked cross-entropy on dual tokens, as a task of `training.run.Trainer`."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.utils import make_image_grid
from PIL import Image
from torch import nn

from ..configuration_dualcodebook import config_hash
from ..loading import load_tokenizer_with_hash
from ..training.arguments import naming_arguments
from ..training.ends import read_next
from ..training.task import Trained
from .arguments import GeneratorConfig, GeneratorTrainArguments
from .data import Batch, ImageSource, TokenDatasetSource
from .masking import cross_entropies, draw_hidden, mask_tokens, scored_masks
from .pipeline import DualCodebookMaskGenerationPipeline
from .schedulers import MaskedTokenScheduler
from .transformer import DualCodebookTransformer

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..training.checkpoints import Checkpoint

TRANSFORMER = "transformer"  # the pipeline's part, and its subfolder
# Settings that decide which weights a checkpoint holds, or what they mean.
BUILDING_SETTINGS = ("masking",)


class GeneratorTask:
    """Trains a `DualCodebookTransformer`; see `training.task.Task` for the methods.

    Args:
        run: all settings.

    Attributes:
        tokenizer: whose tokens they are.
        model: the network as accelerate prepared it.
        optimizer: its AdamW, as accelerate prepared it.

    Raises ValueError for settings that are wrong, for data that cannot be opened, and for a tokenizer that cannot be
    loaded or did not make the tokens.
    """

    def __init__(self, run: GeneratorConfig) -> None:
        run.check()
        self.run, self.arguments = run, run.training
        self.source = open_source(run)
        self.validates = bool(run.training.validation_steps and self.source.validates)
        self.tokenizer, self._weights = load_tokenizer_with_hash(run.data.tokenizer, device="cpu", argument="tokenizer")
        if isinstance(self.source, TokenDatasetSource):
            self.source.info.check_model(self.tokenizer, self._weights, run.data.tokens, argument="tokenizer")
        self._scored: list[Batch] | None = None

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """The run's sections."""
        return self.run.to_dict()

    @property
    def goal(self) -> tuple[str, bool]:
        """Bits per position are to fall."""
        return "bits_per_position", False

    def check_resumable(self, checkpoint: Checkpoint) -> None:
        """Raises ValueError when the checkpoint holds another transformer."""
        checkpoint.require_equal("generator", self.settings["generator"])
        data, training = self.settings["data"], self.settings["training"]
        checkpoint.require_equal("training", {name: training[name] for name in BUILDING_SETTINGS})
        checkpoint.require_equal("data", {"class_column": data["class_column"]})

    def prepare(self, accelerator: Accelerator, fresh: bool) -> None:
        """Builds the transformer and its optimizer."""
        arguments, self.accelerator = self.arguments, accelerator
        self.network = self._build(fresh)
        self.tokenizer.to(accelerator.device)
        self.masks = mask_tokens(self.network.mask_token_ids, accelerator.device)
        if arguments.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        if arguments.compile:
            for block in self.network.blocks:
                block.compile()
        self.model, self.optimizer = accelerator.prepare(self.network, build_optimizer(self.network, arguments))

    def _build(self, fresh: bool) -> DualCodebookTransformer:
        classes, fields = self.source.classes, self.settings["generator"]
        network = DualCodebookTransformer(
            codebook_sizes=tuple(self.tokenizer.codebook_sizes.values()),
            num_classes=None if classes is None else len(classes),
            sample_size=self.source.grid(self.tokenizer),
            tokenizer_config_hash=config_hash(self.tokenizer.config),
            tokenizer_weights_sha256=self._weights,
            **fields,
        )
        if fresh and self.arguments.init_from:
            load_transformer(network, self.arguments.init_from)
        return network

    def batches(self, start: int) -> Iterator[Batch]:
        """This process's samples, from sample `start` on."""
        place = (self.accelerator.process_index, self.accelerator.num_processes)
        return self.source.training(self.arguments.train_batch_size, start, *place)

    def remarks(self) -> list[str]:
        """The source's."""
        return self.source.remarks()

    def set_learning_rates(self, factor: float) -> dict[str, float]:
        """One rate for all."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.arguments.learning_rate * factor
        return {TRANSFORMER: self.arguments.learning_rate * factor}

    def forward_backward(self, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        """The mean cross-entropy of the hidden tokens, with label smoothing, and its gradients."""
        arguments = self.arguments
        tokens, labels = self._tokens(batch), self._labels(batch)
        if labels is not None:
            dropped = torch.rand(len(labels), device=labels.device) < arguments.class_dropout
            labels = torch.where(dropped, self.network.config.num_classes, labels)
        hidden = draw_hidden(tokens, arguments.masking, arguments.masking_schedule)
        logits = self.model(torch.where(hidden, self.masks, tokens), labels).logits
        losses = cross_entropies(logits, tokens, arguments.label_smoothing) * hidden
        counts = hidden.sum((0, 2, 3))
        self.accelerator.backward(losses.sum() / counts.sum())
        means = losses.detach().sum((0, 2, 3)) / counts.clamp(min=1)
        return {f"cross_entropy_{name}": mean for name, mean in zip(self.tokenizer.codebook_sizes, means, strict=True)}

    def parts(self) -> list[Trained]:
        """The transformer."""
        return [Trained(self.model, self.optimizer)]

    def trained(self, step: int) -> list[Trained]:
        """The transformer."""
        return self.parts()

    def statistics(self) -> list[torch.Tensor]:
        """None."""
        return []

    def validate(self) -> tuple[dict[str, float], Image.Image | None]:
        """Bits per position, of all and of each codebook, and images drawn with one class after the other."""
        if self._scored is None:
            self._scored = list(self._read_validation())  # all of it, or where an image cannot be read, none
        bits = torch.zeros(len(self.tokenizer.codebook_sizes), dtype=torch.float64)
        total, done = sum(len(batch["index"]) for batch in self._scored), 0
        for batch in self._scored:
            bits += self._bits(batch, done)
            done += len(batch["index"])
        columns = zip(self.tokenizer.codebook_sizes, (bits / total).tolist(), strict=True)
        metrics = {"bits_per_position": float(bits.sum() / total)}
        return metrics | {f"bits_{name}": value for name, value in columns}, self._samples()

    def _read_validation(self) -> Iterator[Batch]:
        batches = self.source.validation(self.arguments.validation_batch_size)
        with suppress(StopIteration):
            while True:
                yield self._kept(read_next(batches))

    def _kept(self, batch: Batch) -> Batch:
        """A batch for every validation: its tokens, and no images."""
        tokens = self._tokens(batch).to("cpu", torch.int32)
        return {key: value for key, value in batch.items() if key != "pixel_values"} | {"tokens": tokens}

    @torch.no_grad()
    def _bits(self, batch: Batch, done: int) -> torch.Tensor:
        """Sums over a batch of each codebook's bits per position, float64.

        Each sample has masks of its own; `done` came before.
        """
        tokens, labels = self._tokens(batch).long(), self._labels(batch)
        drawn = []
        for number in range(done, done + len(tokens)):
            rng = np.random.default_rng([self.arguments.seed, number])
            place = (number + 1) * GOLDEN % 1  # evenly, and within each class too where classes follow each other
            drawn.append(scored_masks(tuple(tokens.shape[1:]), self.arguments.masking, place, rng))
        bits = torch.zeros(tokens.shape[1], dtype=torch.float64)
        for masks in zip(*drawn, strict=True):
            hidden = torch.from_numpy(np.stack([mask.hidden for mask in masks])).to(tokens.device)
            weight = torch.from_numpy(np.stack([mask.weight for mask in masks])).to(tokens.device)
            with self.accelerator.autocast():  # as in training
                logits = self.network(torch.where(hidden, self.masks, tokens), labels).logits
            losses = cross_entropies(logits, tokens) * weight
            bits += losses.sum((0, 2, 3)).double().cpu() / math.log(2)
        return bits

    def _samples(self) -> Image.Image | None:
        count, classes = self.arguments.sample_count, self.source.classes
        if not count:
            return None
        pipeline = self.pipeline(self.network)
        pipeline.set_progress_bar_config(disable=True)
        labels = None if classes is None else [number % len(classes) for number in range(count)]
        images = pipeline(
            class_labels=labels,
            num_images=1 if labels else count,
            guidance_scale=self.arguments.sample_guidance if labels else 1.0,
            num_inference_steps=self.arguments.sample_steps,
            sampling_temperature=self.arguments.sample_temperature,
            generator=torch.Generator().manual_seed(self.arguments.seed),
        ).images
        columns = next(size for size in (8, 5, 4, 3, 2, 1) if count % size == 0)
        return make_image_grid(images, rows=count // columns, cols=columns)

    def pipeline(self, network: DualCodebookTransformer) -> DualCodebookMaskGenerationPipeline:
        """What samples from a transformer of this run, with the scheduler that its masking asks for."""
        classes = self.source.classes
        return DualCodebookMaskGenerationPipeline(
            vqvae=self.tokenizer,
            transformer=network,
            scheduler=MaskedTokenScheduler(
                codebook_sizes=network.config.codebook_sizes,
                units=self.arguments.masking,
                masking_schedule=self.arguments.masking_schedule,
            ),
            id2label=None if classes is None else dict(enumerate(classes)),
        )

    def _tokens(self, batch: Batch) -> torch.Tensor:
        """Of a batch, on the device; those of images are made there."""
        device = self.accelerator.device
        if "tokens" in batch:
            return batch["tokens"].to(device, non_blocking=True)
        with torch.no_grad():
            return self.tokenizer.tokenize(batch["pixel_values"].to(device, non_blocking=True))

    def _labels(self, batch: Batch) -> torch.Tensor | None:
        labels = batch.get("class_labels")
        return None if labels is None else labels.to(self.accelerator.device, non_blocking=True)

    def export(self, folder: Path) -> None:
        """The whole pipeline, with the transformer in `weights_dtype`."""
        network = nn.Module.to(copy.deepcopy(self.network), getattr(torch, self.arguments.weights_dtype))
        self.pipeline(network).save_pretrained(folder)

    def check_publishable(self, repo_id: str) -> None:
        """Asks the Hub for the right to write there."""
        from ..hub import check_access

        check_access(repo_id)

    def publish(self, folder: Path, repo_id: str, private: bool) -> str:
        """Publishes the pipeline in `final/` with its card."""
        from ..hub import push_pipeline
        from ..run_folder import RunFolder

        pipeline = DualCodebookMaskGenerationPipeline.from_pretrained(RunFolder(folder).final)
        return push_pipeline(pipeline, repo_id, private=private, train=self.settings)


GOLDEN = (5**0.5 - 1) / 2  # its multiples modulo 1 are spread evenly, however many are taken


def open_source(run: GeneratorConfig) -> TokenDatasetSource | ImageSource:
    """The data of a run."""
    place = (run.data, run.training.seed, run.training.validation_samples)
    if run.data.tokens:
        return TokenDatasetSource(*place)
    with naming_arguments("train_split"):
        return ImageSource(*place)


def build_optimizer(network: nn.Module, arguments: GeneratorTrainArguments) -> torch.optim.AdamW:
    """AdamW that decays the matrices of linear layers alone."""
    matrices = [module.weight for module in network.modules() if isinstance(module, nn.Linear)]
    ids = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in network.parameters() if id(parameter) not in ids]
    groups = [
        {"params": matrices, "weight_decay": arguments.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    return torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=betas, fused=True)


def load_transformer(network: DualCodebookTransformer, source: str) -> None:
    """Loads another generator's transformer into `network`; the positions of another grid are stretched.

    Args:
        network: takes the weights.
        source: the folder of a pipeline, or of a run: then its `final/`.

    Raises ValueError where there is none, or where it has another size, other codebooks, classes or another tokenizer.
    """
    place = Path(source)
    place = place / "final" if (place / "final").is_dir() else place
    try:
        other = DualCodebookTransformer.from_pretrained(place, subfolder=TRANSFORMER)
    except (OSError, ValueError) as error:
        raise ValueError(f"`init_from` must be the folder of a generator, got {source!r}: {error}") from error
    for name in ("codebook_sizes", "num_classes", "tokenizer_weights_sha256"):
        theirs, mine = (_plain(getattr(owner.config, name)) for owner in (other, network))
        if theirs != mine:
            raise ValueError(f"`init_from` {source!r} must have {name} {mine}, got {theirs}")
    state = other.state_dict()
    state["positions"] = other.stretched_positions(*network.config.sample_size)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"`init_from` {source!r} does not fit the transformer: {error}") from error


def _plain(value: Any) -> Any:
    """A setting as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value
