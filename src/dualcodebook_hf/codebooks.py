"""The two codebooks of the paper and the nearest-neighbour search over them."""

from __future__ import annotations

import contextlib
import importlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# The distance matrix is made in tiles of at most so many codes and so many numbers (16 MiB in float32).
SEARCH_CODES, SEARCH_ENTRIES = 2**13, 2**22
# How far a code that is split from another starts from it, as a share of the way to a random latent.
SPLIT_DISTANCE = 0.02


def nearest_codes(vectors: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Index of the L2-nearest code of each vector, the first one in a tie.

    `vectors` (M, D) and `codes` (N, D), any floating type, are compared in float32 with autocast off; memory does not
    grow with M x N. Returns int64 (M,).
    """
    with torch.autocast(vectors.device.type, enabled=False):
        vectors, codes = vectors.detach().float(), codes.detach().float()
        # |v - e|^2 = |v|^2 - 2 (v.e - |e|^2 / 2), and |v|^2 is the same for every code. Around the codes' mean, because
        # a common offset would eat the digits that tell the codes apart.
        centre = codes.mean(0)
        vectors, codes = vectors - centre, codes - centre
        tiles = [(tile, tile.square().sum(1) / 2) for tile in codes.split(SEARCH_CODES)]
        rows = max(1, SEARCH_ENTRIES // len(tiles[0][0]))
        return torch.cat([_nearest_of_tiles(part, tiles) for part in vectors.split(rows)])


def _nearest_of_tiles(vectors: torch.Tensor, tiles: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for number, (tile, offsets) in enumerate(tiles):
        least, ids = (offsets - vectors @ tile.T).min(dim=1)
        found.append((least, ids + number * SEARCH_CODES))
    if len(found) == 1:
        return found[0][1]
    distances, ids = (torch.stack(column, dim=1) for column in zip(*found, strict=True))
    return ids.gather(1, distances.argmin(dim=1, keepdim=True))[:, 0]


class Codebook(nn.Module):
    """N code vectors of D numbers: a table, or a table seen through a transformer or a matrix.

    Args:
        size: N. dim: D.
        transformer_layers: depth of the TransformerEncoder whose outputs are the codes; 0 = the table itself.
        heads, feed_forward, dropout: its shape. ReLU, post-norm, no positions (paper: "global codebook").
        scale_to_latents: the codes are mean + std x transformer output, with the running statistics of the latents.
        update: "gradient" (the codebook loss moves the table), "ema" (a moving average of each code's vectors) or
            "linear" (the codes are a fixed random table times a learned D x D matrix: SimVQ, arXiv 2411.02038); the
            last two without a transformer. A table that no gradient moves is a parameter without gradient, so that
            weight averaging and distributed wrappers carry it along.
        ema_decay: of the EMA table and of the latents' statistics.
        revival_threshold: EMA codes used less than this share of uniform use are dead: they split the most used codes,
            or are put on live vectors where those have too little to share; 0 = never.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        transformer_layers: int = 0,
        heads: int = 8,
        feed_forward: int = 2048,
        dropout: float = 0.1,
        scale_to_latents: bool = False,
        update: str = "gradient",
        ema_decay: float = 0.99,
        revival_threshold: float = 0.1,
    ) -> None:
        super().__init__()
        self.size, self.dim, self.update = size, dim, update
        self.ema_decay, self.revival_threshold = ema_decay, revival_threshold
        self.weight = nn.Parameter(torch.empty(size, dim), requires_grad=update == "gradient")
        self.transformer = None
        self.projection = nn.Linear(dim, dim, bias=False) if update == "linear" else None
        if transformer_layers:
            layer = nn.TransformerEncoderLayer(dim, heads, feed_forward, dropout, batch_first=True)
            self.transformer = nn.TransformerEncoder(layer, transformer_layers, enable_nested_tensor=False)
        if update == "ema":
            self.cluster_size = nn.Parameter(torch.empty(size), requires_grad=False)
        self.scale_to_latents = scale_to_latents and self.transformer is not None
        if self.scale_to_latents:
            self.latent_mean = nn.Parameter(torch.empty(dim), requires_grad=False)
            self.latent_std = nn.Parameter(torch.empty(dim), requires_grad=False)
        self._cache: tuple[torch.Tensor, torch.Tensor] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 1) before a transformer, U(-1/N, 1/N) for a plain table (paper), N(0, 1/D) before a matrix (SimVQ)."""
        if self.transformer is not None:
            nn.init.normal_(self.weight)
        elif self.projection is not None:
            nn.init.normal_(self.weight, std=self.dim**-0.5)
        else:
            nn.init.uniform_(self.weight, -1 / self.size, 1 / self.size)
        if self.update == "ema":
            nn.init.zeros_(self.cluster_size)  # all dead: the first batch puts the codes on live vectors
        if self.scale_to_latents:
            nn.init.zeros_(self.latent_mean)
            nn.init.ones_(self.latent_std)

    def codes(self) -> torch.Tensor:
        """The code vectors, (N, D) float32.

        In training mode they carry the graph. In eval mode the transformer runs once: its output is kept, without a
        graph, for as long as the parameters hold the same values (they are compared, because weight swaps such as
        `EMAModel.copy_to` leave no other trace). A compiled or exported graph computes them in place. Parameters that
        accelerate has offloaded are brought back meanwhile.
        """
        if torch.compiler.is_compiling():
            return self._compute_codes()
        with _in_memory(self):
            return self._codes()

    def _codes(self) -> torch.Tensor:
        if self.transformer is None or self.training:
            return self._compute_codes()
        if self.weight.is_meta:
            return self._compute_codes()
        # With gradients on, torch takes the same kernels as in training; without, a fused path that rounds differently.
        inference = self.weight.is_inference()
        with torch.inference_mode(inference), torch.set_grad_enabled(not inference):
            source = torch.cat([parameter.detach().flatten() for parameter in self.parameters()])
            if self._cache is None or not _same(self._cache[0], source):
                self._cache = (source, self._compute_codes().detach())
        return self._cache[1]

    def _compute_codes(self) -> torch.Tensor:
        if self.transformer is None and self.projection is None:
            return self.weight.float()
        with torch.autocast(self.weight.device.type, enabled=False):
            if self.transformer is None:
                return self.projection(self.weight).float()
            codes = self.transformer(self.weight[None])[0].float()
            if self.scale_to_latents:  # clones: the next forward pass moves the statistics in place
                codes = self.latent_mean.float().clone() + self.latent_std.float().clone() * codes
        return codes

    def forward(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantizes vectors (M, D) float32 -> nearest codes (M, D), ids int64 (M,), codes (N, D).

        In training mode, unless gradients are off, the moving statistics are updated from these vectors over all
        processes: the latents' mean and std before the codes are computed, the EMA table after they were looked up.
        """
        learning = self.training and torch.is_grad_enabled()
        if learning and self.scale_to_latents:
            self._track_latents(vectors.detach())
        codes = self.codes()
        ids = nearest_codes(vectors, codes)
        nearest = F.embedding(ids, codes)
        if learning and self.update == "ema":
            self._update_ema(vectors.detach(), ids)
        return nearest, ids, codes

    @torch.no_grad()
    def _update_ema(self, vectors: torch.Tensor, ids: torch.Tensor) -> None:
        counts = torch.bincount(ids, minlength=self.size).to(vectors.dtype)
        sums = torch.zeros_like(self.weight, dtype=vectors.dtype).index_add_(0, ids, vectors)
        _all_reduce(counts)
        _all_reduce(sums)
        # Shares of the batch, so that the statistics mean the same for every batch size.
        total = counts.sum()
        counts, sums = counts / total, sums / total
        # The table is sum / size, so the sum need not be kept: e += (1 - decay) (batch sum - batch count e) / new size.
        size = self.cluster_size * self.ema_decay + counts * (1 - self.ema_decay)
        moved = (
            self.weight + (1 - self.ema_decay) * (sums - counts[:, None] * self.weight) / size.clamp_min(1e-9)[:, None]
        )
        if self.revival_threshold:
            moved, size = self._revive(moved, size, self._live_vectors(vectors))
        # A batch with a NaN or an infinity must not spoil the table (the trainer then skips the step as well).
        finite = torch.isfinite(sums).all()
        self.weight.copy_(torch.where(finite, moved, self.weight))
        self.cluster_size.copy_(torch.where(finite, size, self.cluster_size))

    def _revive(self, codes: torch.Tensor, size: torch.Tensor, live: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (N, D) and their shares (N,), after those below the floor have been given work.

        The k-th dead code takes half the work of the k-th most used one, by standing beside it (the split of Linde,
        Buzo and Gray 1980); where that one has too little to share, it goes to one of the `live` vectors (N, D).
        """
        floor, live = self.revival_threshold / self.size, live.to(codes.dtype)
        dead = size < floor
        donors = size.argsort(descending=True, stable=True)[(dead.cumsum(0) - 1).clamp_min(0)]
        split = dead & (size[donors] >= 4 * floor)
        beside = torch.lerp(codes[donors], live, SPLIT_DISTANCE)
        codes = torch.where(dead[:, None], torch.where(split[:, None], beside, live), codes)
        shared = torch.zeros_like(size).index_add_(0, donors, split.to(size.dtype)) > 0
        size = torch.where(dead, torch.where(split, size[donors] / 2, 2 * floor), size)
        return codes, torch.where(shared, size / 2, size)

    def _live_vectors(self, vectors: torch.Tensor) -> torch.Tensor:
        """N of the vectors of all processes, the same ones on each: drawn on rank 0, filled in by their owners."""
        world, rank = (dist.get_world_size(), dist.get_rank()) if _distributed() else (1, 0)
        picks = torch.randint(len(vectors) * world, (self.size,)).to(vectors.device)
        if world > 1:
            dist.broadcast(picks, 0)
        picks = picks - rank * len(vectors)
        mine = (picks >= 0) & (picks < len(vectors))
        live = torch.where(mine[:, None], vectors[picks.clamp(0, len(vectors) - 1)], 0.0)
        _all_reduce(live)
        return live

    @torch.no_grad()
    def _track_latents(self, vectors: torch.Tensor) -> None:
        moments = torch.stack([vectors.mean(0), vectors.square().mean(0)])
        _all_reduce(moments)
        if _distributed():
            moments /= dist.get_world_size()
        std = (moments[1] - moments[0].square()).clamp_min(0).sqrt()
        finite = torch.isfinite(moments).all()
        for kept, new in ((self.latent_mean, moments[0]), (self.latent_std, std)):
            kept.copy_(torch.where(finite, torch.lerp(kept, new, 1 - self.ema_decay), kept))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_cache": None}

    def extra_repr(self) -> str:
        return f"{self.size}, {self.dim}, update={self.update!r}"


class GlobalCodebook(Codebook):
    """The paper's global codebook: its codes leave a transformer together, so that every gradient moves all of them."""

    def __init__(self, size: int = 512, dim: int = 128, *, transformer_layers: int = 6, **kwargs) -> None:
        super().__init__(size, dim, transformer_layers=transformer_layers, **kwargs)


class LocalCodebook(Codebook):
    """The paper's local codebook: a plain table."""

    def __init__(self, size: int = 512, dim: int = 128, *, transformer_layers: int = 0, **kwargs) -> None:
        super().__init__(size, dim, transformer_layers=transformer_layers, **kwargs)


@contextlib.contextmanager
def _in_memory(module: nn.Module):
    """Codes are read without a forward pass too, where accelerate's hooks do not load what they offloaded."""
    with contextlib.ExitStack() as stack:
        if any(parameter.is_meta for parameter in module.parameters()):
            hooked = [part for part in module.modules() if hasattr(part, "_hf_hook")]
            for part in hooked:
                stack.enter_context(importlib.import_module("accelerate.utils").align_module_device(part))
        yield


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _all_reduce(tensor: torch.Tensor) -> None:
    if _distributed():
        dist.all_reduce(tensor)
