"""Arguments of a tokenizer's training: model, data and training, from a preset or a YAML file and from flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..configuration_fields import DualCodebookFields
from ..image_datasets import ON_BAD_IMAGE, DatasetError
from ..metrics import IMAGE_METRICS
from ..perceptual import FORMS, SMALLEST_VIEW
from .discriminators import AUGMENTATIONS, NORMS
from .parsing import parse_sections
from .run_arguments import Arguments, RunArguments, at_least, below_one, described, one_of

RESIZE_MODES = ("shorter", "exact")
RESAMPLES = ("bilinear", "bicubic", "lanczos")
CROPS = ("random", "center")
PERCEPTUALS = ("lpips", "efficientnet", "ms-ssim", "none")
TRAINED_PARTS = ("all", "decoder")
DTYPES = ("float32", "bfloat16", "float16")
# Of each discriminator, the crop that leaves one logit.
SMALLEST_ADVERSARIAL_CROPS = {"patch": 24, "projected": 128}


@dataclass(kw_only=True)
class DataArguments(Arguments):
    """The images that are trained on, and how one becomes a crop."""

    dataset: str | list[str] | None = field(
        default=None,
        metadata=described(
            "Hub id, image folder, parquet file or folder of parquet files; several are trained on together",
            path=True,
            heading="what is read",
        ),
    )
    dataset_config: str | list[str] | None = field(
        default=None,
        metadata=described("configuration of a Hub dataset that has several; one, or one for each `dataset`"),
    )
    train_split: str | list[str] = field(
        default="train", metadata=described("split that is trained on; one, or one for each `dataset`")
    )
    validation_split: str | list[str] | None = field(
        default="validation",
        metadata=described("split that is validated on; null: none; one, or one for each `dataset`"),
    )
    image_column: str | list[str] = field(
        default="image", metadata=described("column that holds the images; one, or one for each `dataset`")
    )
    streaming: bool = field(default=False, metadata=described("read the data set as it arrives, without storing it"))
    shuffle_buffer: int = field(default=1000, metadata=described("images in the shuffle buffer of a streamed data set"))
    max_train_samples: int = field(
        default=0, metadata=described("use only the first N images of each data set; 0: all")
    )
    resolution: int = field(
        default=256, metadata=described("side of the square training crop, in pixels", heading="crops")
    )
    resize: int | list[int] = field(
        default=0,
        metadata=described(
            "resize to this many pixels before the crop; 0: do not; several: one of them at random for each image, the "
            "first in validation"
        ),
    )
    resize_mode: str = field(
        default="shorter",
        metadata=described("what `resize` sets: the shorter side (shorter), or both sides (exact)"),
    )
    resample: str = field(
        default="bilinear", metadata=described(f"filter of every resize, one of {', '.join(RESAMPLES)}")
    )
    crop: str = field(default="random", metadata=described(f"place of the training crop, one of {', '.join(CROPS)}"))
    horizontal_flip: bool = field(default=True, metadata=described("mirror every second training image at random"))
    validation_horizontal_flip: bool = field(
        default=False, metadata=described("the same in validation, as the paper's authors do")
    )
    num_workers: int = field(
        default=2,
        metadata=described(
            "processes that read and crop images; the batches do not depend on it", heading="how it is read"
        ),
    )
    cache_images: bool = field(
        default=False,
        metadata=described("keep decoded images in memory (3 bytes per pixel, once for each size of `resize`)"),
    )
    on_bad_image: str = field(
        default="error",
        metadata=described(
            "an image that cannot be read: end the run (error), or name it and train on the next one in its place "
            "(skip; in validation it is left out; more than 10 and a hundredth of the images are an error)"
        ),
    )

    def check(self) -> None:
        """Raises ValueError for a field that is wrong, by name."""
        if not self.dataset:
            raise ValueError("`dataset` must name a Hub data set, an image folder or parquet files, got nothing")
        count = len(self.of_each(self.dataset))
        for name in ("dataset_config", "train_split", "validation_split", "image_column"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != count:
                raise ValueError(
                    f"`{name}` must be one, or one for each data set, of which there are {count}, got {len(value)}"
                )
        one_of("resize_mode", self.resize_mode, RESIZE_MODES)
        one_of("resample", self.resample, RESAMPLES)
        one_of("crop", self.crop, CROPS)
        one_of("on_bad_image", self.on_bad_image, ON_BAD_IMAGE)
        at_least(self, 1, "resolution", "shuffle_buffer")
        at_least(self, 0, "num_workers", "max_train_samples")
        resize_sizes(self.resize, self.resolution)

    def of_each(self, value: str | list[str | None] | None) -> list[str | None]:
        """What a field with one value, or one for each data set, says for each of them."""
        count = len(self.dataset) if isinstance(self.dataset, list) else 1
        return value if isinstance(value, list) else [value] * count


def resize_sizes(resize: int | Sequence[int], resolution: int) -> tuple[int, ...]:
    """`resize` as a tuple. Raises ValueError for one that is neither 0 nor at least `resolution`, and for none."""
    sizes = tuple(resize) if isinstance(resize, Sequence) else (resize,)
    if not sizes:
        raise ValueError("`resize` must have a value, got none")
    for size in sizes:
        if size and size < resolution:
            raise ValueError(f"`resize` must be 0 or at least resolution={resolution}, got {size}")
    return sizes


@dataclass(kw_only=True)
class TrainArguments(RunArguments):
    """The loop's arguments, and a tokenizer's loss and optimizers. The defaults of the loss are the paper's."""

    init_from: str | None = field(
        default=None,
        metadata=described(
            "start from these weights (folder, Hub id, `sharp` or `faithful`); from another quantizer's: encoder and "
            "decoder only",
            path=True,
            heading="start and computation",
        ),
    )
    train: str = field(
        default="all",
        metadata=described(
            "what learns: all of it, or only the decoder: encoder and codebooks of `init_from` stay, and so do tokens"
        ),
    )
    data_initialization: int = field(
        default=0,
        metadata=described("fit the linear shortcut (PCA) and the codebooks (k-means) to the first N crops; 0: do not"),
    )
    gradient_checkpointing: bool = field(
        default=False, metadata=described("recompute activations: less memory, slower")
    )
    channels_last: bool | None = field(
        default=None,
        metadata=described("channels-last memory format of the convolutions; null: on CUDA"),
    )
    compile: bool = field(default=False, metadata=described("torch.compile the encoder and the decoder"))

    l1_weight: float = field(default=1.0, metadata=described("weight of mean |x - x_hat|", heading="loss"))
    l2_weight: float = field(default=0.0, metadata=described("weight of mean (x - x_hat)^2"))
    log_l2_weight: float = field(
        default=0.0, metadata=described("weight of the mean over images of ln(MSE + 0.004), which follows their PSNR")
    )
    grid_weight: float = field(
        default=0.0,
        metadata=described("weight of the pattern that errors have in common in all blocks of f x f pixels"),
    )
    seam_weight: float = field(
        default=0.0, metadata=described("weight of the steps that errors make between blocks of f x f pixels")
    )
    codebook_weight: float = field(default=1.0, metadata=described("weight of L_global + L_local"))
    token_noise: float = field(
        default=0.0,
        metadata=described("share of the tokens of an image with noise that the decoder gets wrong; 0: no noise"),
    )
    token_noise_images: float = field(default=0.1, metadata=described("share of the images that have token noise"))
    token_noise_neighbours: int = field(
        default=100, metadata=described("a wrong token is one of so many nearest codes of the same codebook")
    )
    perceptual: str = field(
        default="lpips",
        metadata=described(f"perceptual loss, one of {', '.join(PERCEPTUALS)}", heading="perceptual losses"),
    )
    perceptual_weight: float = field(default=1.25, metadata=described("weight of the perceptual loss"))
    vgg_weights: str = field(
        default="timm/vgg16.tv_in1k",
        metadata=described("lpips: Hub id, folder or file of VGG16's weights", path=True),
    )
    perceptual_form: str = field(
        default=FORMS[0], metadata=described(f"efficientnet: what is compared, one of {', '.join(FORMS)}")
    )
    feature_matching_weight: float = field(
        default=0.0,
        metadata=described(
            "weight of what reconstructions lack in the mean of many, in features of EfficientNet-Lite1; 0: not used"
        ),
    )
    efficientnet_weights: str | None = field(
        default=None,
        metadata=described(
            "efficientnet, projected: file, folder or Hub id of EfficientNet-Lite0's weights; default: the installed "
            "package of them, else the Hub's",
            path=True,
        ),
    )
    lite1_weights: str | None = field(
        default=None,
        metadata=described(
            "feature matching: file, folder or Hub id of EfficientNet-Lite1's weights; default: as of Lite0's",
            path=True,
        ),
    )
    adversarial_weight: float = field(
        default=0.8,
        metadata=described("weight of the adversarial loss; 0: no discriminator", heading="adversarial loss"),
    )
    adversarial_start: int = field(default=10_000, metadata=described("updates before the discriminator starts"))
    adversarial_ramp: int = field(
        default=0, metadata=described("updates over which the adversarial weight rises from 0, once it has started")
    )
    adaptive_weight: bool = field(
        default=True,
        metadata=described("multiply the adversarial loss by the ratio of the gradients in the decoder's last layer"),
    )
    discriminator: str = field(
        default="patch",
        metadata=described(
            f"one of {', '.join(SMALLEST_ADVERSARIAL_CROPS)}: PatchGAN, or heads on features of EfficientNet-Lite0"
        ),
    )
    discriminator_channels: int = field(default=64, metadata=described("width of the discriminator's first layer"))
    discriminator_norm: str = field(
        default="batch", metadata=described(f"normalisation of the discriminator, one of {', '.join(NORMS)}")
    )
    discriminator_augment: str = field(
        default="none",
        metadata=described(f"what is done to the images that it sees, separated by commas: {', '.join(AUGMENTATIONS)}"),
    )
    discriminator_learning_rate: float = field(default=0.0, metadata=described("0: the same as learning_rate"))
    discriminator_beta1: float = field(default=0.5, metadata=described("Adam's beta1 of the discriminator"))
    discriminator_beta2: float = field(default=0.9, metadata=described("Adam's beta2 of the discriminator"))

    learning_rate: float = field(
        default=1.44e-4,
        metadata=described("of encoder and decoder (the paper's authors: 4.5e-6 x 32)", heading="optimizers"),
    )
    codebook_learning_rate: float = field(
        default=0.0, metadata=described("of the codebooks; 0: the same as learning_rate")
    )
    adam_beta1: float = field(default=0.5, metadata=described("Adam's beta1"))
    adam_beta2: float = field(default=0.9, metadata=described("Adam's beta2"))
    weight_decay: float = field(default=0.0, metadata=described("AdamW's decoupled decay"))
    anneal_codebook_lr: bool = field(
        default=True, metadata=described("let the schedule act on the codebooks' learning rate too")
    )
    validation_samples: int = field(
        default=64,
        metadata=described("images that are validated on; 0: the whole split", heading="validation and export"),
    )
    validation_metrics: str = field(
        default="psnr,ssim", metadata=described(f"separated by commas, of {', '.join(IMAGE_METRICS)}")
    )
    validation_batch_size: int = field(default=8, metadata=described("images per forward pass in validation"))
    weights_dtype: str = field(
        default="float32",
        metadata=described(f"of the exported encoder and decoder, one of {', '.join(DTYPES)}; codebooks stay float32"),
    )

    def check(self) -> None:
        """Raises ValueError for a field that is wrong, by name."""
        super().check()
        one_of("weights_dtype", self.weights_dtype, DTYPES)
        one_of("train", self.train, TRAINED_PARTS)
        one_of("perceptual", self.perceptual, PERCEPTUALS)
        one_of("perceptual_form", self.perceptual_form, FORMS)
        one_of("discriminator", self.discriminator, tuple(SMALLEST_ADVERSARIAL_CROPS))
        one_of("discriminator_norm", self.discriminator_norm, NORMS)
        for name in self.discriminator_augment.split(","):
            one_of("discriminator_augment", name, AUGMENTATIONS)
        for name in self.validation_metrics.split(","):
            one_of("validation_metrics", name, tuple(IMAGE_METRICS))
        at_least(self, 1, "validation_batch_size", "discriminator_channels", "token_noise_neighbours")
        for name in ("token_noise", "token_noise_images"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], got {getattr(self, name)}")
        below_one(self, "adam_beta1", "adam_beta2", "discriminator_beta1", "discriminator_beta2")
        if not self.learning_rate > 0:
            raise ValueError(f"`learning_rate` must be above 0, got {self.learning_rate}")
        if self.init_from and self.data_initialization:
            raise ValueError(
                "`init_from` and `data_initialization` exclude each other: both set the weights to start from"
            )
        if self.train == "decoder" and not self.init_from:
            raise ValueError("`train: decoder` needs `init_from`: the encoder and the codebooks that it decodes from")
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
        if self.training.patience and not self.data.validation_split:
            raise ValueError(f"`patience` {self.training.patience} needs `validation_split` to validate on; or give 0")
        for name in ("in_channels", "out_channels"):
            if getattr(self.model, name) != 3:
                raise ValueError(f"`{name}` must be 3, as images are read as RGB, got {getattr(self.model, name)}")
        smallest = SMALLEST_ADVERSARIAL_CROPS[self.training.discriminator]
        if self.training.adversarial_weight and self.data.resolution < smallest:
            raise ValueError(
                f"`resolution` must be at least {smallest} with a discriminator "
                f"(`adversarial_weight` above 0, `discriminator: {self.training.discriminator}`), "
                f"got {self.data.resolution}"
            )
        distance = self.training.perceptual == "efficientnet" and self.training.perceptual_weight
        if (distance or self.training.feature_matching_weight) and self.data.resolution < SMALLEST_VIEW:
            raise ValueError(
                f"`resolution` must be at least {SMALLEST_VIEW} with `feature_matching_weight` or "
                f"`perceptual: efficientnet`, got {self.data.resolution}"
            )
        if self.training.data_initialization and not self.model.linear_shortcut:
            raise ValueError("`data_initialization` needs `linear_shortcut: true`")
        if self.training.data_initialization and self.model.quantizer not in ("dual", "single"):
            raise ValueError(
                f"`data_initialization` is for the quantizers dual and single, got {self.model.quantizer!r}"
            )

    def to_dict(self) -> dict[str, dict]:
        """The three sections, JSON- and YAML-ready."""
        return {name: dataclasses.asdict(getattr(self, name)) for name in CLASSES}


@contextmanager
def naming_arguments(split: str) -> Iterator[None]:
    """What `load_images` says of its arguments, as a ValueError about ours.

    Args:
        split: the argument that names the split, "train_split" or "validation_split".
    """
    try:
        yield
    except DatasetError as error:
        name = {"split": split, "config": "dataset_config"}.get(error.argument, error.argument)
        none = "; `--validation_split null`, or `validation_split: null` in a YAML file, trains without validation"
        hint = none if name == "validation_split" else ""
        raise ValueError(f"`{name}` {error.detail}{hint}") from error


CLASSES = {"model": DualCodebookFields, "data": DataArguments, "training": TrainArguments}
PROGRAM = "dualcodebook train"


def parse_run_config(argv: Sequence[str]) -> RunConfig:
    """`--config NAME|FILE` (tiny where it is left out) and flags, which win over the file -> a checked RunConfig.

    Ends the process with 0 for `--help`. Raises ValueError for every mistake.
    """
    run = RunConfig(*parse_sections(argv, CLASSES, PROGRAM))
    run.check()
    return run
