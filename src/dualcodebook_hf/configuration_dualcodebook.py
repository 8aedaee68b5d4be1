"""`DualCodebookConfig`: every hyper-parameter of the model, checked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field

from transformers import PreTrainedConfig

BACKBONES = ("vqgan", "dcae")
QUANTIZERS = ("dual", "single", "residual", "fsq", "lfq")
UPDATES = ("gradient", "ema", "linear")


@dataclass(kw_only=True)
class DualCodebookFields:
    """The model's hyper-parameters; the defaults are the paper's. Written once, read by both faces and by the trainer.

    Raises ValueError (from `check`) naming the field, what was expected and what came.
    """

    in_channels: int = field(default=3, metadata={"help": "channels of the input"})
    out_channels: int = field(default=3, metadata={"help": "channels of the reconstruction"})
    backbone: str = field(default="vqgan", metadata={"help": "encoder and decoder: vqgan or dcae"})
    block_out_channels: list[int] = field(
        default_factory=lambda: [128, 128, 256, 256, 512],
        metadata={"help": "width of each resolution level; the downsampling factor is 2 ** (levels - 1)"},
    )
    layers_per_block: int = field(
        default=2, metadata={"help": "residual blocks per level (vqgan's decoder has one more)"}
    )
    layers_per_level: list[int] | None = field(
        default=None,
        metadata={"help": "dcae: residual blocks of each level; the first may be 0; None: layers_per_block"},
    )
    norm_num_groups: int = field(default=32, metadata={"help": "vqgan: groups of every GroupNorm"})
    attention: bool = field(default=True, metadata={"help": "vqgan: self-attention at the lowest resolution"})
    mid_attention: bool | None = field(
        default=None, metadata={"help": "vqgan: self-attention in the middle blocks; None: like `attention`"}
    )
    linear_shortcut: bool = field(
        default=False, metadata={"help": "add a linear transform of f x f patches, parallel to encoder and decoder"}
    )
    latent_channels: int | None = field(
        default=None, metadata={"help": "channels of the latents; None: global_dim + local_dim, and nothing else fits"}
    )
    vq_embed_dim: int | None = field(
        default=None,
        metadata={"help": "channels that are quantized; None: global_dim + local_dim, and nothing else fits"},
    )
    quantizer: str = field(
        default="dual",
        metadata={
            "help": "dual, or a baseline; single: VQGAN's one codebook, local_codebook_size x local_dim; residual: two "
            "stages over all channels, with the sizes of the two codebooks; fsq, lfq: finite scalar and lookup-free "
            "quantization"
        },
    )
    global_codebook_size: int = field(default=512, metadata={"help": "codes of the global codebook"})
    local_codebook_size: int = field(default=512, metadata={"help": "codes of the local codebook"})
    global_dim: int = field(
        default=128, metadata={"help": "channels quantized by the global codebook (the first ones)"}
    )
    local_dim: int = field(default=128, metadata={"help": "channels quantized by the local codebook"})
    fsq_levels: list[int] | None = field(
        default=None, metadata={"help": "fsq: levels of each channel; their products are the sizes of the codebooks"}
    )
    global_transformer_layers: int = field(
        default=6, metadata={"help": "layers of the global codebook's transformer; 0: a plain table"}
    )
    local_transformer_layers: int = field(
        default=0, metadata={"help": "layers of the local codebook's transformer; 0: a plain table"}
    )
    transformer_heads: int = field(default=8, metadata={"help": "attention heads of a codebook's transformer"})
    transformer_feed_forward: int = field(
        default=2048, metadata={"help": "feed-forward width of a codebook's transformer"}
    )
    transformer_dropout: float = field(default=0.1, metadata={"help": "dropout of a codebook's transformer, in [0, 1)"})
    scale_codes_to_latents: bool = field(
        default=False,
        metadata={"help": "rescale a transformer's codes to the running mean and standard deviation of the latents"},
    )
    global_update: str = field(
        default="gradient",
        metadata={
            "help": "how the global codebook learns; gradient: by the codebook loss; ema: as a moving average of its "
            "latents; linear: by the codebook loss, as a fixed table times a matrix (SimVQ)"
        },
    )
    local_update: str = field(
        default="gradient", metadata={"help": "how the local codebook learns: gradient, ema or linear"}
    )
    codebook_ema_decay: float = field(
        default=0.99, metadata={"help": "decay of ema codebooks and of the latents' statistics, in (0, 1)"}
    )
    revival_threshold: float = field(
        default=0.1, metadata={"help": "ema: codes used less than this share of uniform use are revived; 0: never"}
    )
    commitment_cost: float = field(default=0.25, metadata={"help": "weight of the commitment loss (beta)"})
    scaling_factor: float = field(default=1.0, metadata={"help": "for diffusers' pipelines: multiplies the latents"})
    force_upcast: bool = field(
        default=False, metadata={"help": "for diffusers' pipelines: decode in float32 under fp16"}
    )

    @property
    def downsample_factor(self) -> int:
        """Pixels on the side of a latent position, f."""
        return 2 ** (len(self.block_out_channels) - 1)

    def check(self) -> None:
        """Fills in `latent_channels` and `vq_embed_dim` and raises ValueError for any field that is wrong."""
        for spec in dataclasses.fields(DualCodebookFields):
            _check_type(spec.name, getattr(self, spec.name))
        _one_of("backbone", self.backbone, BACKBONES)
        _one_of("quantizer", self.quantizer, QUANTIZERS)
        _one_of("global_update", self.global_update, UPDATES)
        _one_of("local_update", self.local_update, UPDATES)
        self.block_out_channels = list(self.block_out_channels)
        if not self.block_out_channels or min(self.block_out_channels) < 1:
            raise ValueError(f"`block_out_channels` must be positive widths, got {self.block_out_channels}")
        positive = ("in_channels", "out_channels", "layers_per_block", "norm_num_groups", "local_codebook_size")
        for name in (*positive, "local_dim", "transformer_heads", "transformer_feed_forward"):
            _at_least(name, getattr(self, name), 1)
        for name in ("global_transformer_layers", "local_transformer_layers", "revival_threshold", "commitment_cost"):
            _at_least(name, getattr(self, name), 0)
        self._check_backbone()
        self._check_codebooks()
        if self.quantizer in ("dual", "single"):
            self._check_updates()
        self._check_scalars()

    def _check_backbone(self) -> None:
        if self.layers_per_level is not None:
            self.layers_per_level = list(self.layers_per_level)
            if self.backbone != "dcae":
                raise ValueError("`layers_per_level` is for `backbone: dcae`; use `layers_per_block` with vqgan")
            if len(self.layers_per_level) != len(self.block_out_channels):
                raise ValueError(
                    f"`layers_per_level` must have one number for each of the {len(self.block_out_channels)} levels of "
                    f"`block_out_channels`, got {self.layers_per_level}"
                )
            if min(self.layers_per_level[1:], default=1) < 1 or self.layers_per_level[0] < 0:
                raise ValueError(f"`layers_per_level` must be >= 1 (the first may be 0), got {self.layers_per_level}")
        if self.backbone == "vqgan":
            wrong = [width for width in self.block_out_channels if width % self.norm_num_groups]
            if wrong:
                raise ValueError(
                    f"`block_out_channels` must be multiples of norm_num_groups={self.norm_num_groups}, got {wrong}"
                )

    def _check_codebooks(self) -> None:
        if self.quantizer != "single":
            _at_least("global_codebook_size", self.global_codebook_size, 1)
            _at_least("global_dim", self.global_dim, 1)
        elif self.global_codebook_size or self.global_dim:
            raise ValueError(
                "`quantizer: single` has one codebook, the local one: set global_codebook_size and global_dim to 0, "
                f"got {self.global_codebook_size} and {self.global_dim}"
            )
        width = self.global_dim + self.local_dim
        for name in ("vq_embed_dim", "latent_channels"):
            if getattr(self, name) is None:
                setattr(self, name, width)
            elif getattr(self, name) != width:
                raise ValueError(
                    f"`{name}` must equal global_dim + local_dim = {self.global_dim} + {self.local_dim} = {width}, "
                    f"got {getattr(self, name)}"
                )
        if not 0 <= self.transformer_dropout < 1:
            raise ValueError(f"`transformer_dropout` must lie in [0, 1), got {self.transformer_dropout}")
        if not 0 < self.codebook_ema_decay < 1:
            raise ValueError(f"`codebook_ema_decay` must lie in (0, 1), got {self.codebook_ema_decay}")

    def _check_updates(self) -> None:
        for part in ("global", "local") if self.quantizer == "dual" else ("local",):
            layers, dim = getattr(self, f"{part}_transformer_layers"), getattr(self, f"{part}_dim")
            if layers and dim % self.transformer_heads:
                raise ValueError(
                    f"`{part}_dim` must be a multiple of transformer_heads={self.transformer_heads}, got {dim}"
                )
            update = getattr(self, f"{part}_update")
            if layers and update != "gradient":
                raise ValueError(
                    f"`{part}_update: {update}` needs a plain table; set {part}_transformer_layers to 0, got {layers}"
                )

    def _check_scalars(self) -> None:
        """fsq and lfq: the size of a codebook follows from the channels that it quantizes one by one."""
        if self.quantizer != "fsq" and self.fsq_levels is not None:
            raise ValueError(f"`fsq_levels` is for `quantizer: fsq`, got {self.fsq_levels} with {self.quantizer!r}")
        if self.quantizer not in ("fsq", "lfq"):
            return
        width, levels = self.vq_embed_dim, [2] * self.vq_embed_dim
        if self.quantizer == "fsq":
            levels = self.fsq_levels = list(self.fsq_levels or [])
            if len(levels) != width or min(levels) < 3:
                raise ValueError(
                    f"`fsq_levels` must be one number of at least 3 for each of the global_dim + local_dim = {width} "
                    f"channels, got {levels}"
                )
        for part, numbers in (("global", levels[: self.global_dim]), ("local", levels[self.global_dim :])):
            size, count = getattr(self, f"{part}_codebook_size"), math.prod(numbers)
            if size != count:
                raise ValueError(
                    f"`{part}_codebook_size` must be {count} = {' x '.join(map(str, numbers))}, its channels' levels, "
                    f"with `quantizer: {self.quantizer}`, got {size}"
                )

    def fields_dict(self) -> dict:
        """The hyper-parameters alone, JSON-ready."""
        return {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(DualCodebookFields)}


# Kept as text: HfArgumentParser replaces `Field.type` by the type itself.
FIELD_TYPES = {spec.name: str(spec.type) for spec in dataclasses.fields(DualCodebookFields)}


class DualCodebookConfig(DualCodebookFields, PreTrainedConfig):
    """Configuration of the Dual Codebook VQ tokenizer (arXiv 2503.10832). Fields and defaults: `DualCodebookFields`."""

    model_type = "dualcodebook"

    def __post_init__(self, **kwargs) -> None:
        self.check()
        super().__post_init__(**kwargs)


def config_hash(config) -> str:
    """Twelve hex digits that identify the architecture. Tokens of one hash do not fit a model of another.

    Fields at their default are left out, so that a field that a later version adds changes no hash.

    Args:
        config: anything with the fields as attributes (both faces' `model.config`).
    """
    plain = {}
    for name, default in dataclasses.asdict(DualCodebookFields()).items():
        value = getattr(config, name)
        value = list(value) if isinstance(value, (list, tuple)) else value
        if value != default:
            plain[name] = value
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def _check_type(name: str, value: object) -> None:
    kind = FIELD_TYPES[name]
    if value is None and "None" in kind:
        return
    if kind.startswith("list"):
        good = isinstance(value, (list, tuple)) and all(isinstance(item, int) for item in value)
    elif kind.startswith("bool"):
        good = isinstance(value, bool)
    elif kind.startswith("int"):
        good = isinstance(value, int) and not isinstance(value, bool)
    elif kind.startswith("float"):
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
    else:
        good = isinstance(value, str)
    if not good:
        raise ValueError(f"`{name}` must be of type {kind}, got {value!r}")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}")


def _at_least(name: str, value: float, low: float) -> None:
    if not low <= value < float("inf"):
        raise ValueError(f"`{name}` must be at least {low}, got {value}")
