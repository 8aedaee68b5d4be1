"""The model's hyper-parameters, checked, without an import of torch or transformers: settings are read before these."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import itertools
import math
import reprlib
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)

BACKBONES = ("vqgan", "dcae")
QUANTIZERS = ("dual", "single", "residual", "fsq", "lfq")
UPDATES = ("gradient", "ema", "linear")

# What a configuration may ask for: several times what is of use, and little enough that a file from somewhere cannot
# stop the process that reads it. Both ends are allowed.
BOUNDS = {
    "in_channels": (1, 2**10),
    "out_channels": (1, 2**10),
    "layers_per_block": (1, 32),
    "norm_num_groups": (1, 2**13),
    "global_codebook_size": (0, 2**22),
    "local_codebook_size": (1, 2**22),
    "global_dim": (0, 2**13),
    "local_dim": (1, 2**13),
    "global_transformer_layers": (0, 64),
    "local_transformer_layers": (0, 64),
    "transformer_heads": (1, 2**13),
    "transformer_feed_forward": (1, 2**16),
    "revival_threshold": (0, 1000),
    "commitment_cost": (0, 10**6),
    "scaling_factor": (1e-6, 10**6),
}
WIDTHS = (1, 2**13)
MOST_LEVELS = 10
MOST_LAYERS = 32  # of one level
MOST_TRANSFORMED_CODES = 2**16  # attention takes time in proportion to their square
MOST_TABLE_NUMBERS = 2**28  # of one codebook, and of what its transformer holds for one layer: 1 GiB in float32
MOST_PARAMETERS = 2**31
MOST_LABELS = 2**16  # transformers makes a dictionary of them


@dataclass(kw_only=True)
class DualCodebookFields:
    """The model's hyper-parameters; the defaults are the paper's. Written once, read by both faces and by the trainer.

    Raises ValueError (from `check`) naming the field, what was expected and what came.
    """

    in_channels: int = field(default=3, metadata={"help": "channels of the input", "heading": "encoder and decoder"})
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
    decoder_block_out_channels: list[int] | None = field(
        default=None, metadata={"help": "width of each resolution level of the decoder; None: block_out_channels"}
    )
    decoder_layers_per_level: list[int] | None = field(
        default=None, metadata={"help": "dcae: residual blocks of each level of the decoder; None: layers_per_level"}
    )
    norm_num_groups: int = field(default=32, metadata={"help": "vqgan: groups of every GroupNorm"})
    attention: bool = field(default=True, metadata={"help": "vqgan: self-attention at the lowest resolution"})
    mid_attention: bool | None = field(
        default=None, metadata={"help": "vqgan: self-attention in the middle blocks; None: like `attention`"}
    )
    linear_shortcut: bool = field(
        default=False,
        metadata={
            "help": "add a linear transform of f x f patches, parallel to encoder and decoder",
            "heading": "linear shortcut and latents",
        },
    )
    overlapping_shortcut: bool = field(
        default=False, metadata={"help": "let the decoder's linear transform write 2f x 2f patches, which overlap"}
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
            "quantization",
            "heading": "codebooks",
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
            "latents; linear: by the codebook loss, as a fixed table times a matrix (SimVQ)",
            "heading": "how the codebooks learn",
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
    scaling_factor: float = field(
        default=1.0,
        metadata={"help": "for diffusers' pipelines: multiplies the latents", "heading": "diffusers' pipelines"},
    )
    force_upcast: bool = field(
        default=False, metadata={"help": "for diffusers' pipelines: decode in float32 under fp16"}
    )

    @property
    def downsample_factor(self) -> int:
        """Pixels on the side of a latent position, f."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def latent_width(self) -> int:
        """Channels of the latents, which the codebooks share out among them: global_dim + local_dim."""
        return self.global_dim + self.local_dim

    @property
    def codebook_size(self) -> int:
        """Codes of the largest codebook: every token lies in [0, codebook_size)."""
        return max(self.global_codebook_size, self.local_codebook_size)

    def check(self) -> None:
        """Fills in `latent_channels` and `vq_embed_dim` and raises ValueError for any field that is wrong.

        Takes no time to speak of and no memory: what a configuration costs is computed, not tried out.
        """
        for spec in dataclasses.fields(DualCodebookFields):
            _check_type(spec.name, getattr(self, spec.name))
        _one_of("backbone", self.backbone, BACKBONES)
        _one_of("quantizer", self.quantizer, QUANTIZERS)
        _one_of("global_update", self.global_update, UPDATES)
        _one_of("local_update", self.local_update, UPDATES)
        for name, bounds in BOUNDS.items():
            _within(name, getattr(self, name), *bounds)
        self._check_backbone()
        self._check_codebooks()
        if self.quantizer in ("dual", "single"):
            self._check_updates()
        self._check_scalars()
        self._check_cost()

    @property
    def decoder_widths(self) -> list[int]:
        """Width of each resolution level of the decoder."""
        return self.decoder_block_out_channels or self.block_out_channels

    @property
    def encoder_layers(self) -> list[int]:
        """Residual blocks of each resolution level of the encoder."""
        return self.layers_per_level or [self.layers_per_block] * len(self.block_out_channels)

    @property
    def decoder_layers(self) -> list[int]:
        """Residual blocks of each resolution level of the decoder (vqgan's has one more)."""
        return self.decoder_layers_per_level or self.encoder_layers

    def _check_backbone(self) -> None:
        self._check_widths("block_out_channels")
        self._check_layers("layers_per_level")
        if self.decoder_block_out_channels is not None:
            self._check_widths("decoder_block_out_channels")
            self._check_depth("decoder_block_out_channels")
        self._check_layers("decoder_layers_per_level")
        if self.backbone == "dcae":
            _check_dcae_widths("block_out_channels", self.block_out_channels, self.encoder_layers)
            name = "block_out_channels" if self.decoder_block_out_channels is None else "decoder_block_out_channels"
            _check_dcae_widths(name, self.decoder_widths, self.decoder_layers)
        if self.overlapping_shortcut and not self.linear_shortcut:
            raise ValueError("`overlapping_shortcut` needs `linear_shortcut: true`")
        if self.overlapping_shortcut and self.downsample_factor == 1:
            raise ValueError("`overlapping_shortcut` needs two levels of `block_out_channels` or more, got 1")

    def _check_widths(self, name: str) -> None:
        widths = list(getattr(self, name))
        setattr(self, name, widths)
        if not 1 <= len(widths) <= MOST_LEVELS or min(widths) < WIDTHS[0] or max(widths) > WIDTHS[1]:
            raise ValueError(
                f"`{name}` must be 1 to {MOST_LEVELS} widths in [{WIDTHS[0]}, {WIDTHS[1]}], got {shown(widths)}"
            )
        wrong = [width for width in widths if width % self.norm_num_groups]
        if wrong and self.backbone != "dcae":
            raise ValueError(f"`{name}` must be multiples of norm_num_groups={self.norm_num_groups}, got {wrong}")

    def _check_depth(self, name: str) -> None:
        levels = getattr(self, name)
        if len(levels) != len(self.block_out_channels):
            raise ValueError(
                f"`{name}` must have one number for each of the {len(self.block_out_channels)} levels of "
                f"`block_out_channels`, got {shown(levels)}"
            )

    def _check_layers(self, name: str) -> None:
        if getattr(self, name) is None:
            return
        layers = list(getattr(self, name))
        setattr(self, name, layers)
        if self.backbone != "dcae":
            raise ValueError(f"`{name}` is for `backbone: dcae`; use `layers_per_block` with vqgan")
        self._check_depth(name)
        least = [0 if len(layers) > 1 else 1] + [1] * len(layers[1:])
        if any(not low <= count <= MOST_LAYERS for low, count in zip(least, layers, strict=True)):
            raise ValueError(
                f"`{name}` must lie in [1, {MOST_LAYERS}] (the first of several may be 0), got {shown(layers)}"
            )

    def _check_codebooks(self) -> None:
        if self.quantizer != "single":
            for name in ("global_codebook_size", "global_dim"):
                _within(name, getattr(self, name), 1, BOUNDS[name][1])
        elif self.global_codebook_size or self.global_dim:
            raise ValueError(
                "`quantizer: single` has one codebook, the local one: set global_codebook_size and global_dim to 0, "
                f"got {self.global_codebook_size} and {self.global_dim}"
            )
        width = self.latent_width
        for name in ("vq_embed_dim", "latent_channels"):
            if getattr(self, name) is None:
                setattr(self, name, width)
            elif getattr(self, name) != width:
                raise ValueError(
                    f"`{name}` must equal global_dim + local_dim = {self.global_dim} + {self.local_dim} = {width}, "
                    f"got {shown(getattr(self, name))}"
                )
        if not 0 <= self.transformer_dropout < 1:
            raise ValueError(f"`transformer_dropout` must lie in [0, 1), got {shown(self.transformer_dropout)}")
        if not 0 < self.codebook_ema_decay < 1:
            raise ValueError(f"`codebook_ema_decay` must lie in (0, 1), got {shown(self.codebook_ema_decay)}")

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
            raise ValueError(
                f"`fsq_levels` is for `quantizer: fsq`, got {shown(self.fsq_levels)} with {self.quantizer!r}"
            )
        if self.quantizer not in ("fsq", "lfq"):
            return
        most = BOUNDS["local_codebook_size"][1]
        for name in ("global_dim", "local_dim"):  # at least 2 values for each channel
            _within(name, getattr(self, name), 1, int(math.log2(most)), f" with `quantizer: {self.quantizer}`")
        width, levels = self.latent_width, [2] * self.latent_width
        if self.quantizer == "fsq":
            levels = self.fsq_levels = list(self.fsq_levels or [])
            if len(levels) != width or min(levels) < 3 or max(levels) > most:
                raise ValueError(
                    f"`fsq_levels` must be one number in [3, {most}] for each of the global_dim + local_dim = {width} "
                    f"channels, got {shown(levels)}"
                )
        for part, numbers in (("global", levels[: self.global_dim]), ("local", levels[self.global_dim :])):
            size, count = getattr(self, f"{part}_codebook_size"), math.prod(numbers)
            if size != count:
                raise ValueError(
                    f"`{part}_codebook_size` must be {count} = {' x '.join(map(str, numbers))}, its channels' levels, "
                    f"with `quantizer: {self.quantizer}`, got {size}"
                )

    def _check_cost(self) -> None:
        width = self.latent_width
        for part in ("global", "local"):
            size, layers = getattr(self, f"{part}_codebook_size"), getattr(self, f"{part}_transformer_layers")
            dim = width if self.quantizer == "residual" else getattr(self, f"{part}_dim")
            transformed = layers and self.quantizer in ("dual", "single")
            if transformed and size > MOST_TRANSFORMED_CODES:
                raise ValueError(
                    f"`{part}_codebook_size` must be at most {MOST_TRANSFORMED_CODES} with a transformer over the "
                    f"codes, got {size}; set {part}_transformer_layers to 0"
                )
            numbers = size * max(dim, self.transformer_feed_forward if transformed else 0)
            if numbers > MOST_TABLE_NUMBERS:
                wide = "the larger of its width and transformer_feed_forward" if transformed else "its width"
                raise ValueError(
                    f"`{part}_codebook_size` times {wide} must be at most {MOST_TABLE_NUMBERS}, got {numbers}"
                )
        parameters = self.estimate_parameters()
        if parameters > MOST_PARAMETERS:
            raise ValueError(
                f"`block_out_channels`, its layers and the codebooks must make at most {MOST_PARAMETERS} parameters, "
                f"got about {parameters}"
            )

    def estimate_parameters(self) -> int:
        """About how many numbers a checkpoint holds: those of convolutions, attention and codebooks, without biases."""
        width, factor = self.latent_width, self.downsample_factor
        total = 0
        ends = ((self.block_out_channels, self.encoder_layers, 1), (self.decoder_widths, self.decoder_layers, 16))
        for widths, layers, growth in ends:
            total += sum(18 * count * channels**2 for count, channels in zip(layers, widths, strict=True))
            transitions = sum(one * other for one, other in itertools.pairwise(widths))
            if self.backbone == "dcae":  # to a quarter of the channels, or to four times as many
                total += 9 * growth * transitions // 4
            else:  # the decoder's additional layers, resampling, the middle
                total += 9 * (transitions + sum(2 * channels**2 for channels in widths)) + 44 * widths[-1] ** 2
        total += 9 * (self.block_out_channels[0] * self.in_channels + self.decoder_widths[0] * self.out_channels)
        total += 9 * (self.block_out_channels[-1] + self.decoder_widths[-1]) * width + 2 * width**2
        patch = (self.in_channels + self.out_channels * (4 if self.overlapping_shortcut else 1)) * factor**2
        return total + self.linear_shortcut * width * patch + self._estimate_codebooks()

    def _estimate_codebooks(self) -> int:
        if self.quantizer in ("fsq", "lfq"):
            return 0
        if self.quantizer == "residual":  # a table and its moving average
            return 2 * (self.global_codebook_size + self.local_codebook_size) * self.latent_width
        total = 0
        for part in ("global", "local"):
            size, dim, layers = (
                getattr(self, f"{part}_{name}") for name in ("codebook_size", "dim", "transformer_layers")
            )
            total += size * dim + layers * (4 * dim**2 + 2 * dim * self.transformer_feed_forward) * bool(dim)
            total += dim**2 * (getattr(self, f"{part}_update") == "linear")
        return total

    def fields_dict(self) -> dict:
        """The hyper-parameters alone, JSON-ready."""
        return {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(DualCodebookFields)}


def _check_dcae_widths(name: str, widths: list[int], layers: list[int]) -> None:
    """Its shortcuts shuffle 2 x 2 pixels into channels, and average or repeat these."""
    for level, (width, following) in enumerate(itertools.pairwise(widths)):
        if following % 4 or (layers[level] and 4 * width % following):
            raise ValueError(
                f"`{name}` with `backbone: dcae` must be multiples of 4 after the first, each a divisor "
                f"of 4 times the one before it, got {width} and then {following} in {widths}"
            )


FIELDS = dataclasses.fields(DualCodebookFields)
# Kept as text: HfArgumentParser replaces `Field.type` by the type itself.
FIELD_TYPES = {spec.name: str(spec.type) for spec in FIELDS}


def documents_fields(section: str) -> Callable[[Class], Class]:
    """Class decorator: `help` then shows every field with type, default, meaning and range, under `section`.

    All of it comes from the fields themselves, the one place where it is written.
    """

    def decorate(kind: Class) -> Class:
        if kind.__doc__:  # there is none under `python -OO`
            lines = [textwrap.fill(_description(spec), 110, subsequent_indent=" " * 8) for spec in FIELDS]
            kind.__doc__ = "\n".join([inspect.cleandoc(kind.__doc__), "", f"{section}:", *lines])
        return kind

    return decorate


def _description(spec: dataclasses.Field) -> str:
    default: Any = spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()
    within = "; in [{}, {}]".format(*BOUNDS[spec.name]) if spec.name in BOUNDS else ""
    return f"    {spec.name} ({FIELD_TYPES[spec.name]}, default {default!r}): {spec.metadata['help']}{within}."


def shown(value: object) -> str:
    """`repr` for messages, short whatever the value is."""
    return _SHORT.repr(value)


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxstring, self.maxother = 3, 12, 12, 80, 80

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write numbers of thousands of digits.
        return repr(value) if value.bit_length() < 200 else f"an integer of {value.bit_length()} bits"


_SHORT = _Short()


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_type(name: str, value: object) -> None:
    kind = FIELD_TYPES[name]
    if value is None and "None" in kind:
        return
    if kind.startswith("list"):
        good = isinstance(value, (list, tuple)) and all(map(is_integer, value))
    elif kind.startswith("bool"):
        good = isinstance(value, bool)
    elif kind.startswith("int"):
        good = is_integer(value)
    elif kind.startswith("float"):
        good = isinstance(value, float) or is_integer(value)
    else:
        good = isinstance(value, str)
    if not good:
        raise ValueError(f"`{name}` must be of type {kind}, got {shown(value)}")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(value[:100], choices, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {shown(value)}{hint}")


def _within(name: str, value: float, low: float, high: float, where: str = "") -> None:
    # Written so that NaN, which compares false, fails too.
    if not low <= value <= high:
        raise ValueError(f"`{name}` must lie in [{low}, {high}]{where}, got {shown(value)}")
