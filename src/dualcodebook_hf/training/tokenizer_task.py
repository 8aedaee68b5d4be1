"""The tokenizer's training: the paper's loss, its adversary and their optimizers, as a task of `run.Trainer`."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import nn

from ..autoencoder_dualcodebook import DualCodebookVQModel
from ..backbone import last_convolution
from ..evaluation.evaluator import Evaluator
from ..figures import grid
from ..image_processing_dualcodebook import DualCodebookImageProcessor
from ..loading import EMBEDDED_FOLDERS, load_tokenizer
from ..metrics import IMAGE_METRICS, NETWORK_METRICS, image_metrics, load_metric_network
from ..perceptual.distances import EfficientNetDistance
from ..perceptual.efficientnet_lite import EfficientNetLite
from ..perceptual.feature_matching import FeatureAverages, FeatureMatching
from ..perceptual.vgg import LPIPS
from ..perceptual.weights import MissingWeightsError
from ..run_folder import CONVERSION
from ..weights import TOKEN_PARTS
from ..winograd import use_winograd
from .adversary import Adversary
from .arguments import RunConfig, TrainArguments, naming_arguments
from .data import TrainingImages, ValidationImages
from .discriminators.augment import Augmentation
from .discriminators.patch import PatchDiscriminator
from .discriminators.projected import ProjectedDiscriminator
from .ends import read_next
from .initialization import initialize_from_images
from .losses import MSSSIMLoss, ReconstructionLoss, take_gradient, weighted_sum
from .processes import is_main_process
from .task import Trained
from .token_noise import TokenNoise

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .checkpoints import Checkpoint

IMAGES_SHOWN = 8
# Settings of the training that decide which weights a checkpoint holds.
BUILDING_SETTINGS = ("train", "discriminator", "discriminator_norm", "discriminator_channels")
DERIVED_FIELDS = ("latent_channels", "vq_embed_dim")  # sums of others: a message should name the cause


class TokenizerTask:
    """Trains a `DualCodebookVQModel` on images; see `task.Task` for the methods.

    Args:
        run: all settings.

    Attributes:
        model: the network as accelerate prepared it.
        optimizer: its AdamW, as accelerate prepared it.
        adversary: None where `adversarial_weight` is 0.

    Raises ValueError for settings that are wrong, for weights of EfficientNet-Lite that are asked for and not
    available, for data that cannot be opened and for an image among the first `validation_samples` that cannot be read.
    """

    def __init__(self, run: RunConfig) -> None:
        run.check()
        self.run, self.arguments = run, run.training
        self.features, self.matching = load_features(run.training), load_matching(run.training)
        with naming_arguments("train_split"):
            self.training_images = TrainingImages(run.data, run.training.seed)
        self.validates = bool(run.training.validation_steps and run.data.validation_split)
        if self.validates:
            with naming_arguments("validation_split"):
                self.validation_images = ValidationImages(run.data, run.training.validation_samples, run.training.seed)
            if run.training.validation_samples and is_main_process():  # better now than at the first validation
                for _ in self._validation_batches():
                    pass

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """The run's sections."""
        return self.run.to_dict()

    @property
    def goal(self) -> tuple[str, bool]:
        """The first of `validation_metrics`."""
        name = self.arguments.validation_metrics.split(",")[0]
        return name, IMAGE_METRICS[name].higher_is_better

    def check_resumable(self, checkpoint: Checkpoint) -> None:
        """Raises ValueError when the checkpoint holds another model, or other parts than this run has."""
        model = {name: value for name, value in self.settings["model"].items() if name not in DERIVED_FIELDS}
        checkpoint.require_equal("model", model)
        checkpoint.require_same_switch("training", "adversarial_weight", self.arguments.adversarial_weight)
        checkpoint.require_same_switch("training", "feature_matching_weight", self.arguments.feature_matching_weight)
        training = self.settings["training"]
        known = [name for name in BUILDING_SETTINGS if name in checkpoint.settings["training"]]  # not all in older ones
        checkpoint.require_equal("training", {name: training[name] for name in known})

    def prepare(self, accelerator: Accelerator, fresh: bool) -> None:
        """Builds the losses, the model and the adversary."""
        arguments, self.accelerator = self.arguments, accelerator
        self.metric_networks = self._load_metric_networks()
        # Everything from here on draws random numbers, in this order.
        self.reconstruction_loss = build_reconstruction_loss(
            arguments, self.features, self.matching, self.run.model.downsample_factor
        ).to(accelerator.device)
        use_winograd(self.reconstruction_loss)  # frozen, whatever it is
        self.network = model = build_model(self.run, fresh)
        if fresh and arguments.data_initialization:
            images = self.training_images.first(arguments.data_initialization)
            initialize_from_images(model, images, seed=arguments.seed)
        if arguments.train == "decoder":
            for part in self._token_parts():
                part.requires_grad_(False)
        if arguments.token_noise:
            TokenNoise(model, arguments.token_noise, arguments.token_noise_images, arguments.token_noise_neighbours)
        self._lay_out(model)
        if arguments.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if arguments.compile:
            # The adaptive weight walks the graph twice; donated buffers would be gone by the second time.
            torch._functorch.config.donated_buffer = not arguments.adversarial_weight
            model.encoder.compile()
            model.decoder.compile()
        self.model, self.optimizer = accelerator.prepare(model, build_optimizer(model, arguments))
        self.adversary = build_adversary(arguments, self.features) if arguments.adversarial_weight else None
        self.reconstruction_loss.to(memory_format=self.memory_format)
        if self.adversary is not None:
            self.adversary.discriminator.to(memory_format=self.memory_format)
            self.adversary.prepare(accelerator)

    def _lay_out(self, model: DualCodebookVQModel) -> None:
        device, wanted = self.accelerator.device.type, self.arguments.channels_last
        channels_last = device == "cuda" if wanted is None else wanted
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        model.to(memory_format=self.memory_format)
        if device == "cpu" and model.config.backbone == "vqgan" and not channels_last:
            use_winograd(model)

    def batches(self, start: int) -> Iterator[dict[str, torch.Tensor]]:
        """This process's crops, from sample `start` on."""
        self.loader = self.training_images.loader(
            self.arguments.train_batch_size,
            start=start,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        return iter(self.loader)

    def remarks(self) -> list[str]:
        """How many images were left out; each was named when it was."""
        return self.loader.remarks()

    def set_learning_rates(self, factor: float) -> dict[str, float]:
        """The groups' own rates, annealed where they are to be; returns those of the model's groups."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * (factor if group["annealed"] else 1.0)
        if self.adversary is not None:
            self.adversary.optimizer.param_groups[0]["lr"] = self.adversary.learning_rate * factor
        return {group["name"]: group["lr"] for group in self.optimizer.param_groups}

    def forward_backward(self, batch: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
        """The paper's loss and its gradients, for both networks, of one batch."""
        x = batch["pixel_values"].to(self.accelerator.device, non_blocking=True)
        x = x.contiguous(memory_format=self.memory_format)
        if self.arguments.train == "decoder":
            for part in self._token_parts():  # the loop puts the whole network into training mode
                part.eval()
        out = self.model(x)
        leaf = out.sample.detach().requires_grad_()
        terms = self.reconstruction_loss(leaf, x)
        rec = take_gradient(self.reconstruction_loss.rec(terms), leaf, out.sample, self.accelerator.scaler)
        loss = rec + weighted_sum(out.losses, dict.fromkeys(out.losses, self.arguments.codebook_weight))
        if self.adversary is not None:
            last_layer = last_convolution(self.network.decoder).weight
            # adaptive weight and adversarial_weight are inside the term
            terms["adversarial"] = self.adversary.generator_term(out.sample, rec, last_layer, step)
            loss = loss + terms["adversarial"]
        terms |= out.losses
        self.accelerator.backward(loss)
        if self.adversary is not None:
            discriminator_loss = self.adversary.discriminator_loss(x, out.sample.detach(), step)
            if discriminator_loss is not None:
                self.accelerator.backward(discriminator_loss)
                terms["discriminator"] = discriminator_loss
        return {name: term.detach().float() for name, term in terms.items()}

    def parts(self) -> list[Trained]:
        """The model, and where there are such the discriminator and the averages of the features."""
        parts = [Trained(self.model, self.optimizer)]
        if self.adversary is not None:
            parts.append(Trained(self.adversary.discriminator, self.adversary.optimizer))
        if self.feature_averages is not None:
            parts.append(Trained(self.feature_averages, None))
        return parts

    def trained(self, step: int) -> list[Trained]:
        """The model, and the discriminator once it has started."""
        both = self.adversary is not None and self.adversary.started(step)
        return self.parts()[: 2 if both else 1]

    def statistics(self) -> list[torch.Tensor]:
        """The moving averages of codebooks (tables, moments of latents), of BatchNorm in D, and of features."""
        quantizer = self.network.quantize
        tracked = [parameter for parameter in quantizer.parameters() if not parameter.requires_grad]
        tracked += quantizer.buffers()
        if self.adversary is not None:
            tracked += self.adversary.discriminator.buffers()
        if self.feature_averages is not None:
            tracked += self.feature_averages.buffers()
        return tracked

    @property
    def feature_averages(self) -> FeatureAverages | None:
        """What feature matching keeps; None where it is not used."""
        return None if self.matching is None else self.matching.averages

    def validate(self) -> tuple[dict[str, float], Image.Image]:
        """Metrics of the validation images, and the first of them above their reconstructions."""
        names = self.arguments.validation_metrics.split(",")
        evaluator = Evaluator(self.network, image_metrics(names, self.metric_networks))
        shown: list[tuple[torch.Tensor, torch.Tensor]] = []
        for images in self._validation_batches():
            with self.accelerator.autocast():  # as in training
                output = evaluator.update(images)
            if sum(len(originals) for originals, _ in shown) < IMAGES_SHOWN:
                shown.append((images, output.sample.float().cpu()))
        originals, reconstructions = (torch.cat(column)[:IMAGES_SHOWN] for column in zip(*shown, strict=True))
        found = evaluator.compute()
        metrics = {name: found[name] for name in (*names, "quantization_error", "bits_per_pixel")}
        for name, codebook in found["codebooks"].items():
            metrics |= {f"usage_{name}": codebook["usage"], f"perplexity_{name}": codebook["perplexity"]}
        return metrics, grid(originals, reconstructions)

    def _token_parts(self) -> list[nn.Module]:
        """What turns an image into tokens."""
        parts = [getattr(self.network, name) for name in TOKEN_PARTS]
        return [part for part in parts if part is not None]

    def _load_metric_networks(self) -> dict[str, Any]:
        """{metric: network} for validation, on the process that validates; no random number is taken."""
        names = [name for name in self.arguments.validation_metrics.split(",") if name in NETWORK_METRICS]
        if not (self.validates and self.accelerator.is_main_process):
            return {}
        with torch.random.fork_rng(devices=[]):
            size, device = self.run.data.resolution, self.accelerator.device
            return {name: load_metric_network(name, size, device) for name in names}

    def _validation_batches(self) -> Iterator[torch.Tensor]:
        batches = self.validation_images.batches(self.arguments.validation_batch_size)
        with suppress(StopIteration):
            while True:
                yield read_next(batches)

    def export(self, folder: Path) -> None:
        """What every `from_pretrained` reads, with the backbone in `weights_dtype`."""
        model = copy.deepcopy(self.network)
        model.cast_backbone(getattr(torch, self.arguments.weights_dtype))
        model.save_pretrained(folder)
        DualCodebookImageProcessor().save_pretrained(folder)
        source = self.arguments.init_from
        if source and source not in EMBEDDED_FOLDERS:  # those were not converted
            origin = Path(source).expanduser() / CONVERSION
            if origin.is_file():
                shutil.copyfile(origin, folder / CONVERSION)

    def check_publishable(self, repo_id: str) -> None:
        """Asks the Hub for the right to write there."""
        from ..hub import check_access

        check_access(repo_id)

    def publish(self, folder: Path, repo_id: str, private: bool) -> str:
        """Publishes `final/` with its card."""
        from ..hub import push_model

        return push_model(folder, repo_id, private=private)


def build_model(run: RunConfig, fresh: bool = True) -> DualCodebookVQModel:
    """A new model; with the weights of `init_from` in it at a fresh start.

    A source with another kind of quantizer (a converted VQGAN for a dual model) gives its encoder and decoder alone.
    Raises ValueError when they are not available or do not fit the configuration.
    """
    model = DualCodebookVQModel(**asdict(run.model))
    if run.training.init_from and fresh:
        source = load_tokenizer(run.training.init_from, device="cpu", argument="init_from")
        state = source.state_dict()
        if source.config.quantizer != model.config.quantizer:
            codebooks = {key: value for key, value in model.state_dict().items() if key.startswith("quantize.")}
            state = {key: value for key, value in state.items() if not key.startswith("quantize.")} | codebooks
        try:
            model.load_state_dict(state)
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
    return torch.optim.AdamW(groups, betas=betas, weight_decay=arguments.weight_decay, fused=True)


def load_features(arguments: TrainArguments) -> EfficientNetLite | None:
    """EfficientNet-Lite0, where the loss or the discriminator looks through it: one for both.

    Raises ValueError when its weights are not available.
    """
    perceptual = arguments.perceptual == "efficientnet" and arguments.perceptual_weight
    projected = arguments.discriminator == "projected" and arguments.adversarial_weight
    if not (perceptual or projected):
        return None
    user = "perceptual: efficientnet" if perceptual else "discriminator: projected"
    return _load_efficientnet("lite0", arguments.efficientnet_weights, user)


def load_matching(arguments: TrainArguments) -> FeatureMatching | None:
    """The loss by feature matching, where it has a weight. Raises ValueError when its network is not available."""
    weight = arguments.feature_matching_weight
    if not weight:
        return None
    user = f"feature_matching_weight: {weight}"
    return FeatureMatching(_load_efficientnet("lite1", arguments.lite1_weights, user))


def _load_efficientnet(variant: str, weights: str | None, user: str) -> EfficientNetLite:
    try:
        return EfficientNetLite.from_pretrained(variant, weights)
    except MissingWeightsError as error:
        raise ValueError(f"`{user}`: {error}") from error


def build_reconstruction_loss(
    arguments: TrainArguments, features: EfficientNetLite | None, matching: FeatureMatching | None, grid: int
) -> ReconstructionLoss:
    """The loss that the arguments name.

    Args:
        arguments: of the run.
        features: what `load_features` gives.
        matching: what `load_matching` gives.
        grid: downsample factor of the tokenizer.

    Raises ValueError when the weights of LPIPS are not available.
    """
    return ReconstructionLoss(
        l1_weight=arguments.l1_weight,
        l2_weight=arguments.l2_weight,
        log_l2_weight=arguments.log_l2_weight,
        grid_weight=arguments.grid_weight,
        seam_weight=arguments.seam_weight,
        grid=grid,
        perceptual=_build_perceptual(arguments, features),
        perceptual_weight=arguments.perceptual_weight,
        feature_matching=matching,
        feature_matching_weight=arguments.feature_matching_weight,
    )


def _build_perceptual(arguments: TrainArguments, features: EfficientNetLite | None) -> nn.Module | None:
    if arguments.perceptual == "none" or not arguments.perceptual_weight:
        return None
    if arguments.perceptual == "ms-ssim":
        return MSSSIMLoss()
    if arguments.perceptual == "efficientnet":
        return EfficientNetDistance(features, arguments.perceptual_form)
    try:
        return LPIPS.from_pretrained(arguments.vgg_weights)
    except MissingWeightsError as error:
        raise ValueError(
            f"`perceptual: lpips` with `vgg_weights` {arguments.vgg_weights!r}: {error}; "
            "`perceptual: ms-ssim` and `perceptual: none` need no weights"
        ) from error


def build_adversary(arguments: TrainArguments, features: EfficientNetLite | None = None) -> Adversary:
    """The discriminator that the arguments name and its Adam.

    Args:
        arguments: of the run.
        features: what `load_features` gives.
    """
    channels, norm = arguments.discriminator_channels, arguments.discriminator_norm
    projected = arguments.discriminator == "projected"
    return Adversary(
        ProjectedDiscriminator(features, channels, norm) if projected else PatchDiscriminator(channels, norm=norm),
        learning_rate=arguments.discriminator_learning_rate or arguments.learning_rate,
        betas=(arguments.discriminator_beta1, arguments.discriminator_beta2),
        start_step=arguments.adversarial_start,
        weight=arguments.adversarial_weight,
        ramp=arguments.adversarial_ramp,
        adaptive=arguments.adaptive_weight,
        augmentation=Augmentation(arguments.discriminator_augment.split(",")),
    )
