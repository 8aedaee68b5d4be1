"""What every tokenizer here offers: both faces of the model, and the linear codec that they are compared with."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Autoencoded(Protocol):
    """What `Tokenizer.autoencode` returns, at least.

    Attributes:
        sample: reconstructions (B, C, H, W), about [-1, 1], not clamped.
        tokens: int64 (B, codebooks, h, w).
        latents: (B, D, h, w), before the codebooks.
        quantized: (B, D, h, w), after them.
    """

    @property
    def sample(self) -> torch.Tensor: ...
    @property
    def tokens(self) -> torch.Tensor: ...
    @property
    def latents(self) -> torch.Tensor: ...
    @property
    def quantized(self) -> torch.Tensor: ...


class Tokenizer(Protocol):
    """Images (B, C, H, W) in [-1, 1] to tokens (B, codebooks, h, w) and back, with h = ceil(H/f) and w = ceil(W/f).

    Attributes:
        device: where the weights are.
        dtype: what `autoencode` and `tokenize` take.
        downsample_factor: f, pixels of a position's side.
        codebook_sizes: {name: number of codes}, in the order of the tokens.
        latent_slices: {name: channels} of each part of the latents that has a quantization error of its own.
        bits_per_position: log2 of the number of combinations of tokens at one position.
    """

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def downsample_factor(self) -> int: ...
    @property
    def codebook_sizes(self) -> dict[str, int]: ...
    @property
    def latent_slices(self) -> dict[str, int]: ...
    @property
    def bits_per_position(self) -> float: ...

    def autoencode(self, x: torch.Tensor) -> Autoencoded:
        """Images to tokens and back."""

    def tokenize(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images to tokens."""

    def detokenize(self, tokens: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
        """Tokens to images, cropped to `size` = (H, W)."""

    def num_parameters(self) -> int:
        """Numbers that a checkpoint holds."""


def check_tokenizer(model: Any) -> None:
    """Raises ValueError that names what `model` lacks of the contract."""
    names = [name for name, part in vars(Tokenizer).items() if callable(part) or isinstance(part, property)]
    missing = [name for name in names if not name.startswith("_") and not hasattr(model, name)]
    if missing:
        raise ValueError(f"`model` must be a tokenizer, got {type(model).__name__}, which has no {', '.join(missing)}")
