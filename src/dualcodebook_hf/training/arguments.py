"""Training arguments: dataclasses read by `HfArgumentParser` from YAML presets with includes and from flags."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import HfArgumentParser

from ..configuration_dualcodebook import DualCodebookFields
from ..presets import load_preset, preset_names

# `dualcodebook train` learns the exit code from the file that this names: accelerate's launcher turns any into 1.
EXIT_CODE_FILE = "DUALCODEBOOK_EXIT_CODE_FILE"
RESIZE_MODES = ("shorter", "exact")
RESAMPLES = ("bilinear", "bicubic", "lanczos")
CROPS = ("random", "center")
SCHEDULES = ("constant", "linear", "cosine")
TRACKERS = ("tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio")
NULLABLE = ("validation_split",)  # beside the fields that are None by default
PERCEPTUALS = ("lpips", "ms-ssim", "none")
SMALLEST_ADVERSARIAL_CROP = 24  # PatchGAN's three strides and two 4 x 4 convolutions leave one logit


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(kw_only=True)
class DataArguments:
    """What is trained on and how a picture becomes a crop."""

    dataset: str | None = field(default=None, metadata=_help("Hub id, image folder, parquet file or folder"))
    dataset_config: str | None = field(default=None, metadata=_help("configuration of a Hub dataset that has several"))
    train_split: str = field(default="train", metadata=_help("split that is trained on"))
    validation_split: str | None = field(default="validation", metadata=_help("split that is validated on; null: none"))
    image_column: str = field(default="image", metadata=_help("column that holds the pictures"))
    streaming: bool = field(default=False, metadata=_help("read the data set as it arrives, without storing it"))
    shuffle_buffer: int = field(default=1000, metadata=_help("pictures in the shuffle buffer of a streamed data set"))
    max_train_samples: int = field(default=0, metadata=_help("use only the first N pictures; 0: all"))
    resolution: int = field(default=256, metadata=_help("side of the square training crop, in pixels"))
    resize: int = field(default=0, metadata=_help("resize to this many pixels before the crop; 0: do not"))
    resize_mode: str = field(
        default="shorter",
        metadata=_help(f"what `resize` gives, of {RESIZE_MODES}: the shorter side, or both sides exactly"),
    )
    resample: str = field(default="bilinear", metadata=_help(f"filter of every resize, of {RESAMPLES}"))
    crop: str = field(default="random", metadata=_help(f"place of the training crop, of {CROPS}"))
    horizontal_flip: bool = field(default=True, metadata=_help("mirror every second training picture at random"))
    validation_horizontal_flip: bool = field(default=False, metadata=_help("the same in validation (the authors do)"))
    num_workers: int = field(
        default=2, metadata=_help("processes that read and crop pictures; any number, same batches")
    )
    cache_images: bool = field(default=False, metadata=_help("keep decoded pictures in memory (3 bytes a pixel)"))

    def check(self) -> None:
        """Raises ValueError for a field that is wrong."""
        if not self.dataset:
            raise ValueError("`dataset` must name a Hub data set, an image folder or parquet files, got nothing")
        _one_of("resize_mode", self.resize_mode, RESIZE_MODES)
        _one_of("resample", self.resample, RESAMPLES)
        _one_of("crop", self.crop, CROPS)
        _at_least(self, 1, "resolution", "shuffle_buffer")
        _at_least(self, 0, "resize", "num_workers", "max_train_samples")
        if self.resize and self.resize < self.resolution:
            raise ValueError(f"`resize` must be 0 or at least resolution={self.resolution}, got {self.resize}")


@dataclass(kw_only=True)
class TrainArguments:
    """The loss, the optimizers, and the run itself. The loss and its defaults are the paper's."""

    output_dir: str = field(default="runs/default", metadata=_help("where checkpoints, logs and samples go"))
    seed: int = field(default=0, metadata=_help("of initialisation, data order, augmentation and dropout"))
    init_from: str | None = field(
        default=None,
        metadata=_help("start from these weights (folder or Hub id); of another quantizer: encoder and decoder alone"),
    )
    data_initialization: int = field(
        default=0,
        metadata=_help("fit the linear shortcut (PCA) and the books (k-means) to this many pictures first; 0: no"),
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata=_help("a checkpoint folder, or `latest` (starts anew where there is none)")
    )
    max_train_steps: int = field(default=10_000, metadata=_help("generator updates in all"))
    max_train_minutes: float = field(
        default=0.0, metadata=_help("stop and save after this long in this process; 0: no limit")
    )
    train_batch_size: int = field(default=16, metadata=_help("crops of one process in one forward pass"))
    gradient_accumulation_steps: int = field(default=1, metadata=_help("forward passes that make one update"))
    mixed_precision: str = field(default="no", metadata=_help("no, bf16 or fp16"))
    gradient_checkpointing: bool = field(default=False, metadata=_help("recompute activations: less memory, slower"))
    channels_last: bool = field(default=False, metadata=_help("memory format of the convolutions"))
    compile: bool = field(default=False, metadata=_help("torch.compile the encoder and the decoder"))
    num_threads: int = field(default=0, metadata=_help("CPU threads of torch; 0: its default"))

    l1_weight: float = field(default=1.0, metadata=_help("weight of mean |x - x_hat|"))
    l2_weight: float = field(default=0.0, metadata=_help("weight of mean (x - x_hat)^2"))
    log_l2_weight: float = field(
        default=0.0, metadata=_help("weight of the pictures' mean ln(MSE + 0.004), their PSNR")
    )
    perceptual: str = field(default="lpips", metadata=_help(f"perceptual loss, of {PERCEPTUALS}"))
    perceptual_weight: float = field(default=1.25, metadata=_help("its weight"))
    vgg_weights: str = field(default="timm/vgg16.tv_in1k", metadata=_help("lpips: Hub id or folder of VGG16's weights"))
    codebook_weight: float = field(default=1.0, metadata=_help("weight of L_global + L_local"))
    adversarial_weight: float = field(
        default=0.8, metadata=_help("weight of the generator's term; 0: no discriminator")
    )
    adversarial_start: int = field(default=10_000, metadata=_help("generator updates before the discriminator starts"))
    discriminator_channels: int = field(default=64, metadata=_help("width of PatchGAN's first layer"))
    discriminator_learning_rate: float = field(default=0.0, metadata=_help("0: the same as learning_rate"))
    discriminator_beta1: float = field(default=0.5, metadata=_help("Adam's beta1 of the discriminator"))
    discriminator_beta2: float = field(default=0.9, metadata=_help("Adam's beta2 of the discriminator"))

    learning_rate: float = field(default=1.44e-4, metadata=_help("of encoder and decoder (the authors: 4.5e-6 x 32)"))
    codebook_learning_rate: float = field(default=0.0, metadata=_help("of the codebooks; 0: the same"))
    adam_beta1: float = field(default=0.5, metadata=_help("Adam's beta1"))
    adam_beta2: float = field(default=0.9, metadata=_help("Adam's beta2"))
    weight_decay: float = field(default=0.0, metadata=_help("AdamW's decoupled decay"))
    max_grad_norm: float = field(default=0.0, metadata=_help("clip the gradient to this norm; 0: do not"))
    lr_schedule: str = field(default="constant", metadata=_help(f"after the warm-up, of {SCHEDULES}"))
    lr_warmup_steps: int = field(default=0, metadata=_help("updates of linear warm-up"))
    lr_final: float = field(default=0.01, metadata=_help("share of the learning rate that linear and cosine end at"))
    anneal_codebook_lr: bool = field(default=True, metadata=_help("let the schedule act on the codebooks' rate too"))
    ema_decay: float = field(
        default=0.0, metadata=_help("averaging of the weights that are saved and validated; 0: none")
    )

    validation_steps: int = field(default=1000, metadata=_help("validate every so many updates; 0: never"))
    validation_samples: int = field(default=64, metadata=_help("pictures that are measured; 0: the whole split"))
    validation_batch_size: int = field(default=8, metadata=_help("pictures of one forward pass in validation"))
    logging_steps: int = field(default=10, metadata=_help("log the losses every so many updates"))
    report_to: str = field(
        default="tensorboard", metadata=_help("accelerate's trackers: tensorboard, wandb, ..., or none")
    )
    checkpointing_steps: int = field(default=1000, metadata=_help("save every so many updates; 0: only at the end"))
    checkpoints_total_limit: int = field(default=2, metadata=_help("checkpoints that are kept; 0: all"))
    weights_dtype: str = field(
        default="float32", metadata=_help("of the exported backbone: float32, bfloat16, float16")
    )
    push_to_hub: bool = field(default=False, metadata=_help("publish `final/` on the Hub at the end"))
    hub_model_id: str | None = field(default=None, metadata=_help("push_to_hub: the repository, owner/name"))
    hub_private: bool = field(default=False, metadata=_help("push_to_hub: make a new repository private"))
    non_finite_limit: int = field(
        default=10, metadata=_help("updates lost in a row to NaN or infinity before an error")
    )

    @property
    def trackers(self) -> list[str]:
        """Names of the trackers in `report_to`."""
        return [name for name in self.report_to.split(",") if name != "none"]

    def check(self) -> None:
        """Raises ValueError for a field that is wrong."""
        _one_of("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        _one_of("weights_dtype", self.weights_dtype, ("float32", "bfloat16", "float16"))
        _one_of("perceptual", self.perceptual, PERCEPTUALS)
        _one_of("lr_schedule", self.lr_schedule, SCHEDULES)
        _at_least(
            self, 1, "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "discriminator_channels"
        )
        _at_least(self, 1, "validation_batch_size", "logging_steps", "non_finite_limit")
        zero = [spec.name for spec in dataclasses.fields(self) if isinstance(spec.default, (int, float))]
        _at_least(self, 0, *zero)
        for name in self.trackers:
            _one_of("report_to", name, TRACKERS)
            if importlib.util.find_spec(name) is None:
                raise ValueError(f"`report_to` names {name}, which is not installed")
        if not self.learning_rate > 0:
            raise ValueError(f"`learning_rate` must be above 0, got {self.learning_rate}")
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("`push_to_hub` needs `hub_model_id`, the repository's owner/name")
        if self.lr_final > 1:
            raise ValueError(f"`lr_final` must be at most 1, got {self.lr_final}")
        for name in ("adam_beta1", "adam_beta2", "discriminator_beta1", "discriminator_beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must lie in [0, 1), got {getattr(self, name)}")
        if self.lr_warmup_steps and self.lr_warmup_steps >= self.max_train_steps:
            raise ValueError(
                f"`lr_warmup_steps` must be below max_train_steps={self.max_train_steps}, got {self.lr_warmup_steps}"
            )
        if self.init_from and self.data_initialization:
            raise ValueError(
                "`init_from` and `data_initialization` exclude each other: both set the weights to start from"
            )
        pixels = self.l1_weight or self.l2_weight or self.log_l2_weight
        if not (pixels or (self.perceptual_weight and self.perceptual != "none")):
            raise ValueError("`l1_weight`, `l2_weight`, `log_l2_weight` and `perceptual_weight` must not all be 0")


@dataclass
class RunConfig:
    """One run: what is saved as train_config.json and read back by a resumed run."""

    model: DualCodebookFields
    data: DataArguments
    training: TrainArguments

    def check(self) -> None:
        """Raises ValueError for a field that is wrong, before any data or weights are touched."""
        self.model.check()
        self.data.check()
        self.training.check()
        if self.training.adversarial_weight and self.data.resolution < SMALLEST_ADVERSARIAL_CROP:
            raise ValueError(
                f"`resolution` must be at least {SMALLEST_ADVERSARIAL_CROP} with a discriminator "
                f"(`adversarial_weight` above 0), got {self.data.resolution}"
            )
        if self.training.data_initialization and not self.model.linear_shortcut:
            raise ValueError("`data_initialization` needs `linear_shortcut: true`")
        if self.training.data_initialization and self.model.quantizer not in ("dual", "single"):
            raise ValueError(
                f"`data_initialization` is for the quantizers dual and single, got {self.model.quantizer!r}"
            )

    def to_dict(self) -> dict[str, dict]:
        """The three sections, JSON- and YAML-ready."""
        return {name: dataclasses.asdict(getattr(self, name)) for name in ("model", "data", "training")}


CLASSES = {"model": DualCodebookFields, "data": DataArguments, "training": TrainArguments}


def parse_run_config(argv: Sequence[str]) -> RunConfig:
    """`--config NAME|FILE` (default: tiny) and flags, which win over the file -> a checked RunConfig.

    Ends the process with exit code 2 for a flag that argparse refuses. Raises ValueError for every other mistake.
    """
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--config", default="tiny")
    chosen, flags = chooser.parse_known_args(list(argv))
    sections = load_preset(chosen.config)
    parser = HfArgumentParser(tuple(CLASSES.values()), prog="train.py", allow_abbrev=False)
    parser.add_argument("--config", help=f"one of {', '.join(preset_names())}, or a YAML file (default: tiny)")
    *parts, _, unknown = parser.parse_args_into_dataclasses(
        [*_as_flags(sections), *flags], return_remaining_strings=True
    )
    if unknown:
        raise ValueError(_unknown(unknown[0], [f"--{name}" for name in _all_fields()]))
    run = RunConfig(*parts)
    given = {flag.split("=")[0].removeprefix("--") for flag in flags if flag.startswith("--")}
    for section, values in sections.items():
        for name, value in values.items():
            if value is None and name not in given:
                _set_null(getattr(run, section), name)
    run.check()
    return run


def _as_flags(sections: dict[str, dict]) -> list[str]:
    """Sends YAML values through the same parser as the flags, so that types are checked in one place."""
    flags: list[str] = []
    for section, values in sections.items():
        known = [spec.name for spec in dataclasses.fields(CLASSES[section])]
        for name, value in values.items():
            if name not in known:
                raise ValueError(_unknown(f"{section}.{name}", known, name))
            if isinstance(value, dict):
                raise ValueError(f"`{section}.{name}` must be a plain value or a list, got {value!r}")
            if value is None:
                continue
            items = value if isinstance(value, list) else [value]
            flags += [f"--{name}", *map(str, items)]
    return flags


def _set_null(arguments: object, name: str) -> None:
    """A YAML null sets a field to None, which no flag can."""
    default = next(spec.default for spec in dataclasses.fields(arguments) if spec.name == name)
    if name not in NULLABLE and default is not None:
        raise ValueError(f"`{name}` must have a value, got null")
    setattr(arguments, name, None)


def _all_fields() -> list[str]:
    return ["config", *(spec.name for kind in CLASSES.values() for spec in dataclasses.fields(kind))]


def _unknown(what: str, known: list[str], name: str | None = None) -> str:
    close = difflib.get_close_matches(name or what.split("=")[0], known, n=1)
    return f"unknown argument `{what}`" + (f"; did you mean `{close[0]}`?" if close else "")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}")


def _at_least(arguments: object, low: float, *names: str) -> None:
    for name in names:
        if not low <= getattr(arguments, name) < float("inf"):
            raise ValueError(f"`{name}` must be at least {low}, got {getattr(arguments, name)}")
