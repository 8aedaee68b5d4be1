"""Quantizers: latents -> tokens -> quantized latents, one codebook for each slice of the channels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .codebooks import Codebook, GlobalCodebook, LocalCodebook
from .configuration_dualcodebook import DualCodebookConfig


@dataclass
class QuantizerOutput:
    """What every quantizer returns.

    quantized: (B, C, h, w) in the latents' type; its gradient is the latents' (straight-through).
    tokens: int64 (B, books, h, w). losses: {"<book>_codebook": scalar float32}, the paper's L_global and L_local.
    """

    quantized: torch.Tensor
    tokens: torch.Tensor
    losses: dict[str, torch.Tensor]


class Quantizer(nn.Module):
    """Splits the channels among its books, in order, and quantizes each slice by its own book.

    A subclass registers its codebooks as submodules and names them in `book_names`: {token name: attribute}.
    """

    book_names: dict[str, str] = {}

    def __init__(self, commitment_cost: float = 0.25) -> None:
        super().__init__()
        self.commitment_cost = commitment_cost

    @property
    def books(self) -> dict[str, Codebook]:
        """The codebooks by name, in the order of the tokens and of the channels."""
        return {name: getattr(self, attribute) for name, attribute in self.book_names.items()}

    @property
    def sizes(self) -> list[int]:
        """Entries of each book."""
        return [book.size for book in self.books.values()]

    @property
    def dims(self) -> list[int]:
        """Channels of each book's slice."""
        return [book.dim for book in self.books.values()]

    @property
    def bits_per_position(self) -> float:
        """log2 of the number of token combinations at one latent position (paper: 9 + 9 = 18)."""
        return float(sum(math.log2(size) for size in self.sizes))

    def quantize_latents(self, z: torch.Tensor) -> QuantizerOutput:
        """Latents (B, C, h, w) -> QuantizerOutput.

        Each loss is mean|sg(z) - e|^2 + commitment_cost * mean|z - sg(e)|^2 (paper: the loss); a book updated by
        EMA has the second term only. Everything runs in float32 with autocast off, whatever the type of z.
        Raises ValueError when C is not the sum of the books' widths.
        """
        self._check_latents(z)
        quantized, tokens, losses = [], [], {}
        with torch.autocast(z.device.type, enabled=False):
            for (name, book), part in zip(self.books.items(), z.float().split(self.dims, dim=1), strict=True):
                vectors = part.movedim(1, -1)
                nearest, ids, _ = book(vectors.reshape(-1, book.dim))
                nearest = nearest.view(vectors.shape)
                loss = self.commitment_cost * F.mse_loss(vectors, nearest.detach())
                if book.update != "ema":
                    loss = loss + F.mse_loss(nearest, vectors.detach())
                losses[f"{name}_codebook" if name != "codebook" else name] = loss
                quantized.append(nearest.detach().movedim(-1, 1))
                tokens.append(ids.view(vectors.shape[:-1]))
        # z - sg(z) is zero: the value is exactly the code, the gradient exactly the latents'.
        straight_through = torch.cat(quantized, dim=1).to(z.dtype) + (z - z.detach())
        return QuantizerOutput(straight_through.contiguous(), torch.stack(tokens, dim=1), losses)

    def lookup(self, tokens: torch.Tensor, only: str | None = None) -> torch.Tensor:
        """Tokens (B, books, h, w) -> codes (B, C, h, w) float32.

        With `only` (a book's name) every other slice is the mean of its book's codes.
        """
        parts = []
        for index, (name, book) in enumerate(self.books.items()):
            codes = book.codes()
            if only is None or only == name:
                part = F.embedding(tokens[:, index].to(codes.device), codes)
            else:
                part = codes.mean(0).expand(*tokens[:, index].shape, book.dim)
            parts.append(part)
        return torch.cat(parts, dim=-1).movedim(-1, 1).contiguous()

    def join(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, books, h, w) -> one product id a position, (B, h, w): g * N_local + l."""
        ids = tokens[:, 0]
        for index, size in enumerate(self.sizes[1:], start=1):
            ids = ids * size + tokens[:, index]
        return ids

    def split(self, ids: torch.Tensor) -> torch.Tensor:
        """Product ids (B, h, w) -> tokens (B, books, h, w)."""
        parts = []
        for size in reversed(self.sizes[1:]):
            parts.append(ids % size)
            ids = ids // size
        # What is left is not wrapped into the first book: an id out of range must fail when it is looked up.
        return torch.stack([ids, *parts[::-1]], dim=1)

    def forward(
        self, z: torch.Tensor, return_dict: bool = False
    ) -> QuantizerOutput | tuple[torch.Tensor, torch.Tensor, tuple[None, None, torch.Tensor]]:
        """diffusers' VQModel contract: z (B, C, h, w) -> (z_q, summed loss, (None, None, ids)).

        ids: int64, flat (B*h*w,), row-major product ids. `return_dict=True`: `quantize_latents`.
        """
        output = self.quantize_latents(z)
        if return_dict:
            return output
        return output.quantized, sum(output.losses.values()), (None, None, self.join(output.tokens).flatten())

    def get_codebook_entry(self, indices: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """diffusers' VQModel contract: product ids of any shape and (B, h, w, C) -> codes (B, C, h, w).

        Raises IndexError for an id out of range, as an embedding does.
        """
        return self.lookup(self.split(indices.long().reshape(tuple(shape[:3]))))

    def _check_latents(self, z: torch.Tensor) -> None:
        if z.ndim != 4 or z.shape[1] != sum(self.dims) or not z.is_floating_point():
            raise ValueError(
                f"`z` must be floating point of shape (B, {sum(self.dims)}, h, w), got {z.dtype} {tuple(z.shape)}"
            )


class DualCodebookQuantizer(Quantizer):
    """The paper's: the first `global_dim` channels by the global codebook, the rest by the local one."""

    book_names = {"global": "global_codebook", "local": "local_codebook"}

    def __init__(self, config: DualCodebookConfig) -> None:
        super().__init__(config.commitment_cost)
        self.global_codebook = GlobalCodebook(
            config.global_codebook_size,
            config.global_dim,
            transformer_layers=config.global_transformer_layers,
            **_book_options(config, config.global_update),
        )
        self.local_codebook = LocalCodebook(
            config.local_codebook_size,
            config.local_dim,
            transformer_layers=config.local_transformer_layers,
            **_book_options(config, config.local_update),
        )


class SingleCodebookQuantizer(Quantizer):
    """VQGAN's: one book over all channels (`local_codebook_size` x `local_dim`)."""

    book_names = {"codebook": "codebook"}

    def __init__(self, config: DualCodebookConfig) -> None:
        super().__init__(config.commitment_cost)
        self.codebook = LocalCodebook(
            config.local_codebook_size,
            config.local_dim,
            transformer_layers=config.local_transformer_layers,
            **_book_options(config, config.local_update),
        )


QUANTIZERS = {"dual": DualCodebookQuantizer, "single": SingleCodebookQuantizer}


def build_quantizer(config: DualCodebookConfig) -> Quantizer:
    """The quantizer that `config.quantizer` names."""
    return QUANTIZERS[config.quantizer](config)


def _book_options(config: DualCodebookConfig, update: str) -> dict:
    return {
        "heads": config.transformer_heads,
        "feed_forward": config.transformer_feed_forward,
        "dropout": config.transformer_dropout,
        "scale_to_latents": config.scale_codes_to_latents,
        "update": update,
        "ema_decay": config.codebook_ema_decay,
        "revival_threshold": config.revival_threshold,
    }
