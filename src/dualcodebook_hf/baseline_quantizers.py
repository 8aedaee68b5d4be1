"""Codebooks of other papers, for `quantizers.py`: adapters of the library `vector-quantize-pytorch`.

Imported only when one of them is built (extra `benchmarks`).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .packages import require_package


def library() -> ModuleType:
    """The package vector_quantize_pytorch. Raises ValueError naming the extra to install when it is missing."""
    require_package("vector_quantize_pytorch", extra="benchmarks", user="`quantizer: fsq`, `lfq` or `residual`")
    return importlib.import_module("vector_quantize_pytorch")


class ScalarCodebook(nn.Module):
    """A codebook without weights: its codes are a grid, and the library's module is no part of the state.

    That module is built where it is first needed: its tables are in no checkpoint, and a model that is built on the
    meta device and then filled would leave them empty.

    Args:
        size: N.
        dim: D, channels that are rounded one by one.
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        library()
        self.size, self.dim = size, dim
        self._device: torch.Tensor
        self.register_buffer("_device", torch.empty(0), persistent=False)  # follows `to`, and holds nothing
        self._library_modules: dict[torch.device, nn.Module] = {}  # of one device; a dict, so that it is no submodule

    def _build_library_module(self) -> nn.Module:
        raise NotImplementedError

    def _library_module(self) -> nn.Module:
        device = self._device.device
        if device not in self._library_modules:
            with torch.device("cpu"):
                module = self._build_library_module()
            self._library_modules = {device: module.to(device)}
        return self._library_modules[device].train(self.training)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_library_modules": {}}

    def extra_repr(self) -> str:
        return f"{self.size}, {self.dim}"


class FSQCodebook(ScalarCodebook):
    """Finite scalar quantization (arXiv 2309.15505): channel i is bounded by a tanh and rounded to levels[i] values.

    Args:
        levels: of each channel, at least 3; N is their product.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__(math.prod(levels), len(levels))
        self.levels = list(levels)

    def _build_library_module(self) -> nn.Module:
        return library().FSQ(self.levels)

    def codes(self) -> torch.Tensor:
        """(N, D) float32 in [-1, 1]."""
        codes: Any = self._library_module().implicit_codebook
        return codes.float()

    def forward(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Vectors (M, D) float32 -> codes (M, D) with the library's gradient, ids int64 (M,), the loss 0."""
        quantized, ids = self._library_module()(vectors[None])
        return quantized[0], ids[0].long(), vectors.new_zeros(())


class LFQCodebook(ScalarCodebook):
    """Lookup-free quantization (MAGVIT-v2, arXiv 2310.05737): the signs of D channels, N = 2^D codes of -1 and 1.

    The loss is the library's, with its weights: 0.1 x (entropy of a position - entropy of the batch), taken over this
    codebook's N codes, + commitment_cost x mean|z - sg(e)|^2; 0 outside training.

    Args:
        dim: D.
        commitment_cost: weight of the commitment term.
    """

    def __init__(self, dim: int, commitment_cost: float) -> None:
        super().__init__(2**dim, dim)
        self.commitment_cost = commitment_cost

    def _build_library_module(self) -> nn.Module:
        return library().LFQ(codebook_size=self.size, commitment_loss_weight=self.commitment_cost)

    def codes(self) -> torch.Tensor:
        """(N, D) float32, -1 and 1."""
        codes: Any = self._library_module().codebook
        return codes

    def forward(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Vectors (M, D) float32 -> codes (M, D) with the library's gradient, ids int64 (M,), loss."""
        quantized, ids, loss = self._library_module()(vectors[None])
        return quantized[0], ids[0].long(), loss


class ResidualStages(nn.Module):
    """Residual VQ's stages (SoundStream, arXiv 2107.03312): tables of N_i x D, each for what the ones before it left.

    Kept by EMA; the first batch, even outside training, starts them by k-means. A code whose moving count falls under
    `revival_threshold` of uniform use is put on a live vector (0: never); the EMA codebook of this package
    splits the most used code instead. The tables are buffers: averaging of the weights leaves them as they are.

    Args:
        sizes: N_i of each stage.
        dim: D.
        commitment_cost: weight of each stage's commitment loss.
        ema_decay: of the tables, for each batch.
        revival_threshold: see above.
    """

    def __init__(
        self, sizes: Sequence[int], dim: int, *, commitment_cost: float, ema_decay: float, revival_threshold: float
    ) -> None:
        super().__init__()
        self.sizes, self.dim, self.revival_threshold = list(sizes), dim, revival_threshold
        self.residual = library().ResidualVQ(
            dim=dim,
            codebook_size=tuple(sizes),
            decay=ema_decay,
            commitment_weight=commitment_cost,
            kmeans_init=True,
            threshold_ema_dead_code=revival_threshold,
            rotation_trick=False,
        )
        # Constants that the library keeps out of the state: transformers would leave them empty when it loads a model.
        for module in self.residual.modules():
            module._non_persistent_buffers_set.clear()

    def codebooks(self) -> list[Stage]:
        """A view of each stage's table."""
        return [Stage(layer) for layer in self.residual.layers]

    def forward(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Vectors (M, D) float32 -> sum of codes (M, D), ids int64 (M, stages), commitment loss of each stage.

        The losses are 0 outside training.
        """
        for layer, size in zip(self.residual.layers, self.sizes, strict=True):
            floor = self.revival_threshold * len(vectors) / size  # the library counts vectors of a batch
            layer._codebook.threshold_ema_dead_code = floor
            layer._codebook.reset_cluster_size = 2 * floor
        quantized, ids, losses = self.residual(vectors[None])
        return quantized[0], ids[0], list(losses.flatten().unbind())


class Stage:
    """One stage's table.

    Attributes:
        size: N.
        dim: D.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self.size, self.dim = layer.codebook_size, layer.dim

    def codes(self) -> torch.Tensor:
        """(N, D) float32."""
        return self._layer.codebook.float()
