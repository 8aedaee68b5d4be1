"""The one implementation of encode, quantize, decode, tokenize, detokenize that every face shares."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, overload

import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from .backbone import build_decoder, build_encoder, build_linear_decoder, pad_to_multiple
from .configuration_dualcodebook import DualCodebookConfig
from .quantizers import QUANTIZERS, build_quantizer
from .tiling import TilingMixin
from .weights import check_range

Method = TypeVar("Method", bound=Callable[..., Any])

# bfloat16 rounds values near 1 by up to 2**-9; what lies further out has another range (0..255, ...).
RANGE_TOLERANCE = 1e-2
# What `device_map` keeps on one device: classes within which tensors meet without a hooked forward pass.
NO_SPLIT_MODULES = ["Encoder", "Decoder", *(kind.__name__ for kind in QUANTIZERS.values())]


@dataclass
class DualCodebookOutput(BaseOutput):
    """Result of a forward pass over images (B, C, H, W).

    Attributes:
        sample: (B, C, H, W) reconstruction, about [-1, 1], not clamped.
        tokens: int64 (B, codebooks, h, w).
        losses: {"<name>_codebook": scalar}, the paper's L_global and L_local.
        latents: (B, vq_embed_dim, h, w), before the codebooks.
        quantized: (B, vq_embed_dim, h, w), after them.
    """

    # Defaults let accelerate rebuild the output from a dict when it converts it to float32.
    sample: torch.Tensor
    tokens: torch.Tensor = None  # type: ignore[assignment]
    losses: dict[str, torch.Tensor] = None  # type: ignore[assignment]
    latents: torch.Tensor = None  # type: ignore[assignment]
    quantized: torch.Tensor = None  # type: ignore[assignment]


def hooked(method: Method) -> Method:
    """diffusers' `apply_forward_hook` (accelerate's offloading sees the call), with the method's signature kept."""
    return cast(Method, functools.wraps(method)(apply_forward_hook(method)))  # diffusers 0.40 does not wrap it


# What the faces bring to the mixin, for type checkers.
if TYPE_CHECKING:

    class _Module(nn.Module):
        @property
        def config(self) -> Any: ...
        @property
        def dtype(self) -> torch.dtype: ...

else:
    _Module = object


class DualCodebookCore(TilingMixin, _Module):
    """Encoder -> quant_conv -> codebooks -> post_quant_conv -> Decoder (paper): a mixin over a module with `config`."""

    encoder: Any
    decoder: Any
    linear_encoder: nn.Module | None
    linear_decoder: nn.Module | None

    def build_layers(self, config: DualCodebookConfig) -> None:
        """Creates the submodules; both faces call it, so that their state-dict keys are equal.

        Raises ValueError for a field that is wrong: transformers sets fields after it made the configuration.
        """
        config.check()
        factor, width = config.downsample_factor, config.latent_width
        self.downsample_factor = factor
        self.encoder = build_encoder(config)
        self.quant_conv = nn.Conv2d(width, width, 1)
        self.quantize = build_quantizer(config)
        self.post_quant_conv = nn.Conv2d(width, width, 1)
        self.decoder = build_decoder(config)
        self.linear_encoder = self.linear_decoder = None
        if config.linear_shortcut:
            self.linear_encoder = nn.Conv2d(config.in_channels, width, factor, stride=factor)
            self.linear_decoder = build_linear_decoder(config)
        self._set_tiles()

    @property
    def codebook_sizes(self) -> dict[str, int]:
        """Codes of each codebook by name, in the order of the tokens."""
        return {name: codebook.size for name, codebook in self.quantize.codebooks.items()}

    @property
    def latent_slices(self) -> dict[str, int]:
        """Channels of each part of the latents that is quantized by itself, in order."""
        return self.quantize.slices

    @property
    def bits_per_position(self) -> float:
        """log2 of the number of combinations of tokens at one position (paper: 9 + 9 = 18)."""
        return self.quantize.bits_per_position

    def cast_backbone(self, dtype: torch.dtype) -> None:
        """Casts everything but the quantizer, whose codebooks stay as they are (`.to(dtype)` rounds them too).

        Raises ValueError where a weight was too large for `dtype` and became infinite.
        """
        for name, child in self.named_children():
            if name != "quantize":
                child.to(dtype)
        check_range(self)

    @overload
    def encode(self, x: torch.Tensor, return_dict: Literal[True] = True) -> VQEncoderOutput: ...
    @overload
    def encode(self, x: torch.Tensor, return_dict: Literal[False]) -> tuple[torch.Tensor]: ...
    @hooked
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[torch.Tensor]:
        """Images (B, C, H, W) -> `.latents` (B, vq_embed_dim, ceil(H/f), ceil(W/f)), not quantized.

        Images are cast to the model's dtype and padded at the bottom and the right by reflection. Raises ValueError for
        another shape, and for what is not floating point.
        """
        latents = self._latents(x)
        return VQEncoderOutput(latents=latents) if return_dict else (latents,)

    def _latents(self, x: torch.Tensor) -> torch.Tensor:
        self._check_pixels(x)
        if x.dtype != self.dtype and not _is_autocast(x):
            x = x.to(self.dtype)
        x = pad_to_multiple(x, self.downsample_factor)
        return torch.cat([self._encode(part) for part in x.split(1)]) if self.use_slicing else self._encode(x)

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        if not self._is_tiled(*x.shape[-2:]):
            return self._encode_whole(x)
        grid = (side // self.downsample_factor for side in x.shape[-2:])
        return torch.cat(list(self.encode_strips(lambda rows, columns: x[..., rows, columns], *grid)), dim=-2)

    def _encode_whole(self, x: torch.Tensor) -> torch.Tensor:
        z = self.quant_conv(self.encoder(x))
        return z if self.linear_encoder is None else z + self.linear_encoder(x).to(z.device)

    @overload
    def decode(
        self,
        h: torch.Tensor,
        force_not_quantize: bool = False,
        return_dict: Literal[True] = True,
        shape: tuple[int, ...] | None = None,
    ) -> DecoderOutput: ...
    @overload
    def decode(
        self,
        h: torch.Tensor,
        force_not_quantize: bool = False,
        *,
        return_dict: Literal[False],
        shape: tuple[int, ...] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...
    @hooked
    def decode(
        self,
        h: torch.Tensor,
        force_not_quantize: bool = False,
        return_dict: bool = True,
        shape: tuple[int, ...] | None = None,
    ) -> DecoderOutput | tuple[torch.Tensor, torch.Tensor]:
        """Latents, or product ids, to images (B, C, h*f, w*f), as diffusers' VQModel does; never crops.

        Args:
            h: latents (B, vq_embed_dim, h, w); or integer product ids g * N_local + l, of shape (B, h, w), or of any
                other shape together with `shape`.
            force_not_quantize: decode latents as they are; otherwise they are quantized first.
            return_dict: False: the tuple (sample, loss).
            shape: (B, h, w, C), of product ids only.

        Raises ValueError for another shape.
        """
        loss: Any
        if torch.is_floating_point(h):
            if h.ndim != 4 or h.shape[1] != self.config.vq_embed_dim:
                raise ValueError(f"`h` must be latents (B, {self.config.vq_embed_dim}, h, w), got {tuple(h.shape)}")
            quantized, loss = h, torch.zeros(h.shape[0], device=h.device, dtype=h.dtype)
            if not force_not_quantize:
                quantized, loss, _ = self.quantize(h)
        else:
            if shape is None and h.ndim != 3:
                raise ValueError(f"`h` of product ids must be (B, h, w) or come with `shape`, got {tuple(h.shape)}")
            quantized = self.quantize.get_codebook_entry(h, shape or h.shape)
            loss = torch.zeros(quantized.shape[0], device=h.device)
        sample = self._decode(quantized)
        return DecoderOutput(sample=sample, commit_loss=loss) if return_dict else (sample, loss)

    def _decode(self, quantized: torch.Tensor) -> torch.Tensor:
        quantized = quantized.to(self.dtype)
        if self.use_slicing:
            return torch.cat([self._decode_slice(part) for part in quantized.split(1)])
        return self._decode_slice(quantized)

    def _decode_slice(self, quantized: torch.Tensor) -> torch.Tensor:
        height, width = (side * self.downsample_factor for side in quantized.shape[-2:])
        if not self._is_tiled(height, width):
            return self._decode_whole(quantized)
        sample = quantized.new_empty(len(quantized), self.config.out_channels, height, width)
        strips = self.decode_strips(lambda rows, columns: quantized[..., rows, columns], *quantized.shape[-2:])
        top = 0
        for strip in strips:  # not by `torch.cat`, which would hold the image twice
            sample[..., top : top + strip.shape[-2], :] = strip
            top += strip.shape[-2]
        return sample

    def _decode_whole(self, quantized: torch.Tensor) -> torch.Tensor:
        sample = self.decoder(self.post_quant_conv(quantized))
        return sample if self.linear_decoder is None else sample + self.linear_decoder(quantized).to(sample.device)

    @hooked
    def autoencode(self, x: torch.Tensor) -> DualCodebookOutput:
        """The forward pass of both faces: images (B, C, H, W) -> DualCodebookOutput, cropped to (H, W)."""
        latents = self._latents(x)
        output = self.quantize(latents, return_dict=True)
        sample = self._decode(output.quantized)[..., : x.shape[-2], : x.shape[-1]]
        return DualCodebookOutput(sample, output.tokens, output.losses, latents, output.quantized)

    @torch.no_grad()
    @hooked
    def tokenize(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) in [-1, 1] -> tokens int64 (B, codebooks, ceil(H/f), ceil(W/f)).

        [:, 0] are the global tokens, [:, 1] the local ones. Raises ValueError for a wrong shape, type or range.
        """
        self._check_pixels(pixel_values)
        if not torch.compiler.is_compiling():
            _check_range(pixel_values)
        return self.quantize(self._latents(pixel_values), return_dict=True).tokens

    @torch.no_grad()
    @hooked
    def detokenize(
        self, tokens: torch.Tensor, size: tuple[int, int] | torch.Size | None = None, only: str | None = None
    ) -> torch.Tensor:
        """Tokens to images (B, C, h*f, w*f), about [-1, 1], not clamped.

        Args:
            tokens: (B, codebooks, h, w), any integer type.
            size: (H, W) of the original image, to crop the padding away.
            only: a codebook's name ("global", "local"): every other codebook gives the mean of its codes instead.

        Raises ValueError for a wrong shape, type, range, size or name.
        """
        self._check_tokens(tokens, size, only)
        sample = self._decode(self.quantize.lookup(tokens.long(), only))
        return sample if size is None else sample[..., : size[0], : size[1]]

    def _check_pixels(self, x: torch.Tensor) -> None:
        channels = self.config.in_channels
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"`pixel_values` must be a torch tensor, got {type(x).__name__}")
        if x.ndim != 4 or x.shape[1] != channels or 0 in x.shape:
            raise ValueError(f"`pixel_values` must be of shape (B, {channels}, H, W), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"`pixel_values` must be floating point in [-1, 1], got {x.dtype}")

    def _check_tokens(self, tokens: torch.Tensor, size: tuple[int, int] | torch.Size | None, only: str | None) -> None:
        codebooks = self.quantize.codebooks
        if not isinstance(tokens, torch.Tensor):
            raise ValueError(f"`tokens` must be a torch tensor, got {type(tokens).__name__}")
        if tokens.is_floating_point() or tokens.dtype == torch.bool or tokens.is_complex():
            raise ValueError(f"`tokens` must be integers, got {tokens.dtype}")
        if tokens.ndim != 4 or tokens.shape[1] != len(codebooks) or 0 in tokens.shape:
            raise ValueError(f"`tokens` must be of shape (B, {len(codebooks)}, h, w), got {tuple(tokens.shape)}")
        if only is not None and only not in codebooks:
            raise ValueError(f"`only` must be one of {', '.join(codebooks)} or None, got {only!r}")
        factor, grid = self.downsample_factor, tuple(tokens.shape[-2:])
        pair = isinstance(size, (tuple, list, torch.Size)) and len(size) == 2
        if size is not None and not (pair and tuple(-(-side // factor) for side in size) == grid):
            raise ValueError(f"`size` must be an (H, W) that f={factor} maps to the token grid {grid}, got {size}")
        if torch.compiler.is_compiling():
            return
        for index, (name, codebook) in enumerate(codebooks.items()):
            low, high = tokens[:, index].long().aminmax()
            if low < 0 or high >= codebook.size:
                raise ValueError(
                    f"`tokens` of the {name} codebook must lie in [0, {codebook.size}), got [{low}, {high}]"
                )


def _is_autocast(x: torch.Tensor) -> bool:
    # The question is an error for devices without autocast, such as meta.
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


def _check_range(pixels: torch.Tensor) -> None:
    low, high = pixels.aminmax()
    # Written so that NaN, which compares false, fails too.
    if not (low >= -1 - RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
        raise ValueError(f"`pixel_values` must lie in [-1, 1], got [{low.item():.4g}, {high.item():.4g}]")
    # An image of [-1, 1] may have no value below 0, but hardly ever both ends of [0, 1].
    if 0 <= low < 0.1 and high > 0.9:
        warnings.warn(
            f"`pixel_values` lie in [{low.item():.4g}, {high.item():.4g}]: the model takes [-1, 1], so for values in "
            "[0, 1] pass `2 * pixel_values - 1`",
            stacklevel=4,
        )
