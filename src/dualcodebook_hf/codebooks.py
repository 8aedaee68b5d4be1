"""The kinds of codebook, by how the codes come about and learn, and the nearest-neighbour search over them."""

from __future__ import annotations

import contextlib
import importlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from .configuration_dualcodebook import DualCodebookConfig

# The distance matrix is made in tiles of at most this many codes and this many numbers (16 MiB in float32).
SEARCH_CODES, SEARCH_ENTRIES = 2**13, 2**22
# How far a code that is split from another starts from it, as a share of the way to a random latent.
SPLIT_DISTANCE = 0.02
# Shares of use that an EMA table starts with are at least this part of uniform use.
LEAST_STARTING_USE = 0.1


def nearest_codes(vectors: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Index of the L2-nearest code of each vector, the first one in a tie.

    The search runs in float32 with autocast off; its memory does not grow with M x N.

    Args:
        vectors: (M, D), any floating type.
        codes: (N, D), any floating type.

    Returns int64 (M,).
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
    """N code vectors of D numbers, searched by L2 distance. A kind says how they come about and how they learn.

    What no gradient moves is kept as parameters without gradient, so that weight averaging and distributed wrappers
    carry it along.

    Args:
        size: N.
        dim: D.

    Attributes:
        weight: the table (N, D) that the codes are, or come from.
        is_table: whether the codes are `weight` itself, so that `set_codes` can set them.
        learns_by_gradient: whether the codebook loss mean|sg(z) - e|^2 moves the codes, and belongs in the loss.
    """

    is_table = False
    learns_by_gradient = True

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.size, self.dim = size, dim
        self.weight = nn.Parameter(torch.empty(size, dim))

    @classmethod
    def from_config(cls, config: DualCodebookConfig, size: int, dim: int) -> Codebook:
        """The codebook of a configuration; a kind with settings of its own reads them here."""
        return cls(size, dim)

    @property
    def description(self) -> str:
        """The kind in a few words, for the model card."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draws the table anew, and sets what is tracked back to its start; layers draw their own weights.

        Every kind's constructor ends with it.
        """
        raise NotImplementedError

    def codes(self) -> torch.Tensor:
        """The code vectors, (N, D) float32, with the graph. Parameters that accelerate offloaded are loaded first."""
        if torch.compiler.is_compiling():
            return self._compute_codes()
        with _offloaded_parameters(self):
            return self._compute_codes()

    def _compute_codes(self) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors (M, D) float32 -> their nearest codes (M, D) float32 and the ids of these, int64 (M,).

        In training mode, unless gradients are off, a kind's moving averages are updated by these vectors, those of all
        processes together.
        """
        codes = self.codes()
        ids = nearest_codes(vectors, codes)
        return F.embedding(ids, codes), ids

    def set_codes(self, codes: torch.Tensor, vectors: torch.Tensor | None = None) -> None:
        """Replaces the codes of a table.

        Args:
            codes: (N, D).
            vectors: (M, D) that they were fitted to: how often each code is used, where a kind keeps count of that.

        Raises TypeError when the codes are not a table.
        """
        raise TypeError(f"the codes of a {type(self).__name__} are computed: they cannot be set")

    def _follows_vectors(self) -> bool:
        """Whether moving averages are to be updated."""
        return self.training and torch.is_grad_enabled()

    def extra_repr(self) -> str:
        return f"{self.size}, {self.dim}"


class TableCodebook(Codebook):
    """A table that the codebook loss moves: VQ-VAE's (arXiv 1711.00937), and the paper's local codebook."""

    is_table = True
    description = "a plain table"

    def __init__(self, size: int, dim: int) -> None:
        super().__init__(size, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """U(-1/N, 1/N) (paper)."""
        nn.init.uniform_(self.weight, -1 / self.size, 1 / self.size)

    @torch.no_grad()
    def set_codes(self, codes: torch.Tensor, vectors: torch.Tensor | None = None) -> None:
        """Replaces the codes by `codes` (N, D); `vectors` change nothing here."""
        self.weight.copy_(codes)

    def _compute_codes(self) -> torch.Tensor:
        return self.weight.float()


class EMACodebook(Codebook):
    """A table that follows a moving average of the vectors of each code (VQ-VAE, appendix A), dead codes revived.

    Args:
        size: N.
        dim: D.
        decay: of the moving averages, for each batch.
        revival_threshold: codes used less than this share of uniform use are dead: they split the most used codes, or
            are put on live vectors where those have too little to share; 0: never.

    Attributes:
        cluster_size: (N,), the moving average of each code's share of the vectors.
    """

    is_table = True
    learns_by_gradient = False
    description = "a plain table kept by EMA"

    def __init__(self, size: int, dim: int, decay: float = 0.99, revival_threshold: float = 0.1) -> None:
        super().__init__(size, dim)
        self.decay, self.revival_threshold = decay, revival_threshold
        self.weight.requires_grad_(False)
        self.cluster_size = nn.Parameter(torch.empty(size), requires_grad=False)
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: DualCodebookConfig, size: int, dim: int) -> EMACodebook:
        """With the configuration's decay and revival."""
        return cls(size, dim, config.codebook_ema_decay, config.revival_threshold)

    def reset_parameters(self) -> None:
        """U(-1/N, 1/N), all dead: the first batch puts the codes on live vectors."""
        nn.init.uniform_(self.weight, -1 / self.size, 1 / self.size)
        nn.init.zeros_(self.cluster_size)

    @torch.no_grad()
    def set_codes(self, codes: torch.Tensor, vectors: torch.Tensor | None = None) -> None:
        """Replaces the codes by `codes` (N, D), and counts their use by `vectors` (M, D); None: all are used alike.

        No share starts so low that a rare code is dead before training has looked for it.
        """
        self.weight.copy_(codes)
        if vectors is None:
            self.cluster_size.fill_(1 / self.size)
            return
        counts = torch.bincount(nearest_codes(vectors, self.weight), minlength=self.size)
        least = max(LEAST_STARTING_USE, 2 * self.revival_threshold) / self.size
        self.cluster_size.copy_((counts / counts.sum()).clamp_min(least))

    def _compute_codes(self) -> torch.Tensor:
        return self.weight.float()

    def forward(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As every codebook; the table moves after the codes were looked up."""
        nearest, ids = super().forward(vectors)
        if self._follows_vectors():
            self._update(vectors.detach(), ids)
        return nearest, ids

    @torch.no_grad()
    def _update(self, vectors: torch.Tensor, ids: torch.Tensor) -> None:
        counts = torch.zeros(self.size, dtype=vectors.dtype, device=vectors.device)
        counts.index_add_(0, ids, torch.ones_like(ids, dtype=vectors.dtype))  # bincount would wait for the device
        sums = torch.zeros_like(self.weight, dtype=vectors.dtype).index_add_(0, ids, vectors)
        _all_reduce(counts)
        _all_reduce(sums)
        # Shares of the batch, so that the statistics mean the same for every batch size.
        total = counts.sum()
        counts, sums = counts / total, sums / total
        # The table is sum / share, so the sum need not be kept: e += (1 - decay) (sum - count e) / new share.
        shares = self.cluster_size * self.decay + counts * (1 - self.decay)
        steps = (1 - self.decay) * (sums - counts[:, None] * self.weight) / shares.clamp_min(1e-9)[:, None]
        codes = self.weight + steps
        if self.revival_threshold:
            codes, shares = self._revive(codes, shares, self._draw_live_vectors(vectors))
        # A batch with a NaN or an infinity must not spoil the table (the trainer then skips the step as well).
        finite = torch.isfinite(sums).all()
        self.weight.copy_(torch.where(finite, codes, self.weight))
        self.cluster_size.copy_(torch.where(finite, shares, self.cluster_size))

    def _revive(
        self, codes: torch.Tensor, shares: torch.Tensor, live: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (N, D) and their shares (N,), after those below the floor have been given work.

        The k-th dead code takes half the work of the k-th most used one, by standing beside it (the split of Linde,
        Buzo and Gray 1980); where that one has too little to share, it goes to one of the `live` vectors (N, D).
        """
        floor, live = self.revival_threshold / self.size, live.to(codes.dtype)
        dead = shares < floor
        donors = shares.argsort(descending=True, stable=True)[(dead.cumsum(0) - 1).clamp_min(0)]
        split = dead & (shares[donors] >= 4 * floor)
        beside = torch.lerp(codes[donors], live, SPLIT_DISTANCE)
        codes = torch.where(dead[:, None], torch.where(split[:, None], beside, live), codes)
        halved = torch.zeros_like(shares).index_add_(0, donors, split.to(shares.dtype)) > 0
        shares = torch.where(dead, torch.where(split, shares[donors] / 2, 2 * floor), shares)
        return codes, torch.where(halved, shares / 2, shares)

    def _draw_live_vectors(self, vectors: torch.Tensor) -> torch.Tensor:
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


class TransformerCodebook(Codebook):
    """The paper's global codebook: a table seen through a transformer, so that every gradient moves all of its codes.

    The transformer is a TransformerEncoder over the N entries: ReLU, post-norm, no positions.

    Args:
        size: N.
        dim: D, a multiple of `heads`.
        layers: of the transformer, at least 1.
        heads: attention heads of each layer.
        feed_forward: width of each layer's feed-forward part.
        dropout: of each layer, in [0, 1).
        scaling_decay: not None: the codes are mean + std x the transformer's output, with the latents' running mean
            and standard deviation, which move by this decay for each batch.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        layers: int = 6,
        heads: int = 8,
        feed_forward: int = 2048,
        dropout: float = 0.1,
        scaling_decay: float | None = None,
    ) -> None:
        super().__init__(size, dim)
        layer = nn.TransformerEncoderLayer(dim, heads, feed_forward, dropout, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.scaling_decay = scaling_decay
        if scaling_decay is not None:
            self.latent_mean = nn.Parameter(torch.empty(dim), requires_grad=False)
            self.latent_std = nn.Parameter(torch.empty(dim), requires_grad=False)
        self._cache: tuple[torch.Tensor, torch.Tensor] | None = None
        self._frozen: torch.Tensor | None = None
        self.reset_parameters()

    @property
    def description(self) -> str:
        """With the transformer's depth."""
        return f"the outputs of a transformer of depth {len(self.transformer.layers)}"

    def reset_parameters(self) -> None:
        """N(0, 1) (paper)."""
        nn.init.normal_(self.weight)
        if self.scaling_decay is not None:
            nn.init.zeros_(self.latent_mean)
            nn.init.ones_(self.latent_std)

    def codes(self) -> torch.Tensor:
        """The code vectors, (N, D) float32.

        In training mode they carry the graph, and dropout. In eval mode the transformer runs once: its output is kept,
        without a graph, for as long as the parameters hold the same values (they are compared, because weight swaps
        such as `EMAModel.copy_to` leave no other trace). A compiled or exported graph computes them in place.
        """
        if self._frozen is not None:
            return self._frozen
        if self.training or torch.compiler.is_compiling():
            return super().codes()
        with _offloaded_parameters(self):
            return self._compute_codes() if self.weight.is_meta else self._cached_codes()

    def freeze(self) -> None:
        """Keeps the codes of eval mode, without a look at the parameters, until the module is moved or trained."""
        self._frozen = self.eval().codes().detach()

    def train(self, mode: bool = True) -> TransformerCodebook:
        """torch's switch; frozen codes are let go."""
        self._frozen = None
        return super().train(mode)

    def _apply(self, fn, recurse=True) -> TransformerCodebook:
        self._frozen = None
        return super()._apply(fn, recurse)

    def _cached_codes(self) -> torch.Tensor:
        # With gradients on, torch takes the same kernels as in training; without, a fused path that rounds differently.
        inference = self.weight.is_inference()
        with torch.inference_mode(inference), torch.set_grad_enabled(not inference):
            source = torch.cat([parameter.detach().flatten() for parameter in self.parameters()])
            if self._cache is None or not _equal(self._cache[0], source):
                self._cache = (source, self._compute_codes().detach())
        return self._cache[1]

    def _compute_codes(self) -> torch.Tensor:
        with torch.autocast(self.weight.device.type, enabled=False):
            codes = self.transformer(self.weight[None])[0].float()
            if self.scaling_decay is not None:  # clones: the next forward pass moves the statistics in place
                codes = self.latent_mean.float().clone() + self.latent_std.float().clone() * codes
        return codes

    def forward(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As every codebook; the latents' statistics move before the codes are computed."""
        if self.scaling_decay is not None and self._follows_vectors():
            self._track_latents(vectors.detach(), self.scaling_decay)
        return super().forward(vectors)

    @torch.no_grad()
    def _track_latents(self, vectors: torch.Tensor, decay: float) -> None:
        moments = torch.stack([vectors.mean(0), vectors.square().mean(0)])
        _all_reduce(moments)
        if _distributed():
            moments /= dist.get_world_size()
        std = (moments[1] - moments[0].square()).clamp_min(0).sqrt()
        finite = torch.isfinite(moments).all()
        for kept, new in ((self.latent_mean, moments[0]), (self.latent_std, std)):
            kept.copy_(torch.where(finite, torch.lerp(kept, new, 1 - decay), kept))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_cache": None, "_frozen": None}


class SimVQCodebook(Codebook):
    """SimVQ's (arXiv 2411.02038): a fixed random table times a matrix D x D, which is what learns."""

    description = "a plain table times a learned matrix"

    def __init__(self, size: int, dim: int) -> None:
        super().__init__(size, dim)
        self.weight.requires_grad_(False)
        self.projection = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 1/D) (SimVQ)."""
        nn.init.normal_(self.weight, std=self.dim**-0.5)

    def _compute_codes(self) -> torch.Tensor:
        with torch.autocast(self.weight.device.type, enabled=False):
            return self.projection(self.weight).float()


# By `global_update` and `local_update` of the configuration; a transformer over the table stands beside them.
CODEBOOKS: dict[str, type[Codebook]] = {"gradient": TableCodebook, "ema": EMACodebook, "linear": SimVQCodebook}


def build_codebook(config: DualCodebookConfig, part: str) -> Codebook:
    """The codebook that `config` describes for a part of the latents, "global" or "local"."""
    size, dim = getattr(config, f"{part}_codebook_size"), getattr(config, f"{part}_dim")
    layers, update = getattr(config, f"{part}_transformer_layers"), getattr(config, f"{part}_update")
    if layers:
        return TransformerCodebook(
            size,
            dim,
            layers,
            heads=config.transformer_heads,
            feed_forward=config.transformer_feed_forward,
            dropout=config.transformer_dropout,
            scaling_decay=config.codebook_ema_decay if config.scale_codes_to_latents else None,
        )
    return CODEBOOKS[update].from_config(config, size, dim)


@contextlib.contextmanager
def _offloaded_parameters(module: nn.Module):
    """Codes are read without a forward pass too, where accelerate's hooks do not load what they offloaded."""
    with contextlib.ExitStack() as stack:
        if any(parameter.is_meta for parameter in module.parameters()):
            hooked = [part for part in module.modules() if hasattr(part, "_hf_hook")]
            for part in hooked:
                stack.enter_context(importlib.import_module("accelerate.utils").align_module_device(part))
        yield


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _all_reduce(tensor: torch.Tensor) -> None:
    if _distributed():
        dist.all_reduce(tensor)
