"""Quantizers: latents -> tokens -> quantized latents, one codebook for each slice of the channels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import nn

from .codebooks import Codebook, build_codebook
from .configuration_dualcodebook import DualCodebookConfig


@dataclass
class QuantizerOutput:
    """What every quantizer returns.

    Attributes:
        quantized: (B, C, h, w) in the latents' type; its gradient is the latents' (straight-through).
        tokens: int64 (B, codebooks, h, w).
        losses: {"<name>_codebook": scalar float32}, the paper's L_global and L_local.
    """

    quantized: torch.Tensor
    tokens: torch.Tensor
    losses: dict[str, torch.Tensor]


def sum_losses(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    """L_global + L_local, a scalar."""
    first, *others = losses.values()
    return sum(others, start=first)


class Quantizer(nn.Module):
    """Splits the channels among its codebooks, in order, and quantizes each slice by its own codebook.

    A subclass registers its codebooks as submodules and names them in `codebook_names`: {token name: attribute}.
    """

    codebook_names: dict[str, str] = {}

    if TYPE_CHECKING:  # which codebooks there are is known at run time alone

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, commitment_cost: float = 0.25) -> None:
        super().__init__()
        self.commitment_cost = commitment_cost

    @property
    def codebooks(self) -> dict[str, Codebook]:
        """The codebooks by name, in the order of the tokens and of the channels."""
        return {name: getattr(self, attribute) for name, attribute in self.codebook_names.items()}

    @property
    def sizes(self) -> list[int]:
        """Number of codes of each codebook."""
        return [codebook.size for codebook in self.codebooks.values()]

    @property
    def slices(self) -> dict[str, int]:
        """Width of each part of the channels that is quantized by itself, in order: one for each codebook."""
        return {name: codebook.dim for name, codebook in self.codebooks.items()}

    @property
    def dims(self) -> list[int]:
        """The widths of `slices`."""
        return list(self.slices.values())

    @property
    def bits_per_position(self) -> float:
        """log2 of the number of token combinations at one latent position (paper: 9 + 9 = 18)."""
        return float(sum(math.log2(size) for size in self.sizes))

    def quantize_latents(self, z: torch.Tensor) -> QuantizerOutput:
        """Latents (B, C, h, w) -> QuantizerOutput.

        Each loss is mean|sg(z) - e|^2 + commitment_cost * mean|z - sg(e)|^2 (paper: the loss); a codebook that no
        gradient moves has the second term only. Everything runs in float32 with autocast off, whatever the type of z.
        Raises ValueError when C is not the sum of the codebooks' widths.
        """
        self._check_latents(z)
        parts, tokens, losses = [], [], {}
        with torch.autocast(z.device.type, enabled=False):
            for (name, codebook), part in zip(self.codebooks.items(), z.float().split(self.dims, dim=1), strict=True):
                vectors = part.movedim(1, -1)
                codes, ids, loss = self._quantize_slice(codebook, vectors.reshape(-1, codebook.dim))
                losses[f"{name}_codebook" if name != "codebook" else name] = loss
                parts.append(codes.view(vectors.shape).movedim(-1, 1))
                tokens.append(ids.view(vectors.shape[:-1]))
        quantized = torch.cat(parts, dim=1).to(z.dtype)
        return QuantizerOutput(quantized.contiguous(), torch.stack(tokens, dim=1), losses)

    def _quantize_slice(
        self, codebook: Codebook, vectors: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Vectors (M, D) float32 -> codes (M, D) with the vectors' gradient, ids int64 (M,), loss."""
        nearest, ids = codebook(vectors)
        loss = self.commitment_cost * F.mse_loss(vectors, nearest.detach())
        if codebook.learns_by_gradient:
            loss = loss + F.mse_loss(nearest, vectors.detach())
        return straight_through(vectors, nearest), ids, loss

    def lookup(self, tokens: torch.Tensor, only: str | None = None) -> torch.Tensor:
        """Tokens to codes.

        Args:
            tokens: (B, codebooks, h, w), any integer type.
            only: a codebook's name: every other slice is the mean of its codebook's codes.

        Returns (B, C, h, w) float32.
        """
        parts = []
        for index, (name, codebook) in enumerate(self.codebooks.items()):
            codes = codebook.codes()
            if only is None or only == name:
                part = F.embedding(tokens[:, index].to(codes.device), codes)
            else:
                part = codes.mean(0).expand(*tokens[:, index].shape, codebook.dim)
            parts.append(part)
        return torch.cat(parts, dim=-1).movedim(-1, 1).contiguous()

    def to_product_ids(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, codebooks, h, w) -> one product id per position, (B, h, w): g * N_local + l."""
        ids = tokens[:, 0]
        for index, size in enumerate(self.sizes[1:], start=1):
            ids = ids * size + tokens[:, index]
        return ids

    def from_product_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Product ids (B, h, w) -> tokens (B, codebooks, h, w)."""
        parts = []
        for size in reversed(self.sizes[1:]):
            parts.append(ids % size)
            ids = ids // size
        # What is left is not wrapped into the first codebook: an id out of range must fail when it is looked up.
        return torch.stack([ids, *parts[::-1]], dim=1)

    @overload
    def forward(
        self, z: torch.Tensor, return_dict: Literal[False] = False
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[None, None, torch.Tensor]]: ...
    @overload
    def forward(self, z: torch.Tensor, return_dict: Literal[True]) -> QuantizerOutput: ...
    def forward(
        self, z: torch.Tensor, return_dict: bool = False
    ) -> QuantizerOutput | tuple[torch.Tensor, torch.Tensor, tuple[None, None, torch.Tensor]]:
        """diffusers' VQModel contract: z (B, C, h, w) -> (z_q, summed loss, (None, None, ids)).

        ids: int64, flat (B*h*w,), row-major product ids. `return_dict=True`: `quantize_latents`.
        """
        output = self.quantize_latents(z)
        if return_dict:
            return output
        ids = self.to_product_ids(output.tokens).flatten()
        return output.quantized, sum_losses(output.losses), (None, None, ids)

    def get_codebook_entry(self, indices: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """diffusers' VQModel contract: product ids of any shape and (B, h, w, C) -> codes (B, C, h, w).

        Raises IndexError for an id out of range, as an embedding does.
        """
        return self.lookup(self.from_product_ids(indices.long().reshape(tuple(shape[:3]))))

    def _check_latents(self, z: torch.Tensor) -> None:
        if z.ndim != 4 or z.shape[1] != sum(self.dims) or not z.is_floating_point():
            raise ValueError(
                f"`z` must be floating point of shape (B, {sum(self.dims)}, h, w), got {z.dtype} {tuple(z.shape)}"
            )


class DualCodebookQuantizer(Quantizer):
    """The paper's: the first `global_dim` channels by the global codebook, the rest by the local one."""

    codebook_names = {"global": "global_codebook", "local": "local_codebook"}

    def __init__(self, config: DualCodebookConfig) -> None:
        super().__init__(config.commitment_cost)
        self.global_codebook = build_codebook(config, "global")
        self.local_codebook = build_codebook(config, "local")


class SingleCodebookQuantizer(Quantizer):
    """VQGAN's: one codebook over all channels (`local_codebook_size` x `local_dim`)."""

    codebook_names = {"codebook": "codebook"}

    def __init__(self, config: DualCodebookConfig) -> None:
        super().__init__(config.commitment_cost)
        self.codebook = build_codebook(config, "local")


class ScalarQuantizer(Quantizer):
    """FSQ and LFQ: each channel is rounded by itself; the first `global_dim` channels make one token, the rest another.

    Two tokens instead of one of 2^18 codes, so that histograms and token files hold them. Gradient and losses are those
    of the library `vector-quantize-pytorch`; its commitment term has the weight `commitment_cost` (LFQ).
    """

    codebook_names = {"first": "first_codebook", "second": "second_codebook"}

    def __init__(self, config: DualCodebookConfig) -> None:
        from .baseline_quantizers import FSQCodebook, LFQCodebook

        super().__init__(config.commitment_cost)
        self.first_codebook: nn.Module
        self.second_codebook: nn.Module
        if config.quantizer == "fsq":
            levels = config.fsq_levels or []
            self.first_codebook = FSQCodebook(levels[: config.global_dim])
            self.second_codebook = FSQCodebook(levels[config.global_dim :])
        else:
            self.first_codebook = LFQCodebook(config.global_dim, config.commitment_cost)
            self.second_codebook = LFQCodebook(config.local_dim, config.commitment_cost)

    def _quantize_slice(self, codebook: Any, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        quantized, ids, loss = codebook(vectors)
        return straight_through(quantized, F.embedding(ids, codebook.codes())), ids, loss


class ResidualQuantizer(Quantizer):
    """Residual VQ: the second codebook quantizes, over all channels, what the first one left; the codes are added.

    EMA codebooks from the library `vector-quantize-pytorch`; losses: commitment_cost * mean|z - sg(e)|^2 of each
    stage. The gradient passes straight through once (the library's own sum of stages would pass it once per stage).
    """

    def __init__(self, config: DualCodebookConfig) -> None:
        from .baseline_quantizers import ResidualStages

        super().__init__(config.commitment_cost)
        self.stages = ResidualStages(
            [config.global_codebook_size, config.local_codebook_size],
            config.latent_width,
            commitment_cost=config.commitment_cost,
            ema_decay=config.codebook_ema_decay,
            revival_threshold=config.revival_threshold,
        )

    @property
    def codebooks(self) -> dict[str, Any]:
        """The stages, each with `size`, `dim` (all channels) and `codes()`."""
        return dict(zip(("first", "second"), self.stages.codebooks(), strict=True))

    @property
    def slices(self) -> dict[str, int]:
        """All channels together: every stage quantizes all of them."""
        return {"latents": self.stages.dim}

    def quantize_latents(self, z: torch.Tensor) -> QuantizerOutput:
        """Latents (B, C, h, w) -> QuantizerOutput, in float32 with autocast off."""
        self._check_latents(z)
        with torch.autocast(z.device.type, enabled=False):
            vectors = z.float().movedim(1, -1)
            codes, ids, losses = self.stages(vectors.reshape(-1, self.stages.dim))
            tokens = ids.view(*vectors.shape[:-1], -1).movedim(-1, 1)
            quantized = straight_through(z.float(), codes.view(vectors.shape).movedim(-1, 1))
        named = {f"{name}_codebook": loss for name, loss in zip(self.codebooks, losses, strict=True)}
        return QuantizerOutput(quantized.to(z.dtype).contiguous(), tokens, named)

    def lookup(self, tokens: torch.Tensor, only: str | None = None) -> torch.Tensor:
        """Tokens to the sum of the stages' codes.

        Args:
            tokens: (B, stages, h, w), any integer type.
            only: a stage's name: every other stage adds the mean of its codes.

        Returns (B, C, h, w) float32.
        """
        parts = []
        for index, (name, codebook) in enumerate(self.codebooks.items()):
            codes = codebook.codes()
            ids = tokens[:, index].to(codes.device)
            parts.append(F.embedding(ids, codes) if only in (None, name) else codes.mean(0))
        return sum(parts[1:], start=parts[0]).movedim(-1, 1).contiguous()


QUANTIZERS = {
    "dual": DualCodebookQuantizer,
    "single": SingleCodebookQuantizer,
    "residual": ResidualQuantizer,
    "fsq": ScalarQuantizer,
    "lfq": ScalarQuantizer,
}


def build_quantizer(config: DualCodebookConfig) -> Quantizer:
    """The quantizer that `config.quantizer` names.

    It draws its random numbers from a generator of its own, seeded by the global one, which stays where it was: the
    rest of the model starts with the same weights whatever the quantizer. Raises ValueError, naming the extra to
    install, when the quantizer needs a package that is not there.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), device="cpu")))
        return QUANTIZERS[config.quantizer](config)


def straight_through(source: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Exactly `value`, with exactly the gradient of `source` (straight-through): source - sg(source) is zero."""
    return value.detach() + (source - source.detach())
