"""How a tokenizer uses its codes, and what its codebooks lose of the latents."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch


def bits_per_pixel(positions: int, bits_per_position: float, height: int, width: int) -> float:
    """Bits of the `positions` (h x w) of a token grid over the pixels of the original H x W image."""
    return positions * bits_per_position / (height * width)


class TokenStatistics:
    """How a tokenizer uses its codes, over all tokens of a split.

    Args:
        sizes: number of codes of each codebook by name, in the order of the tokens' second dimension.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        if not sizes or min(sizes.values()) < 1:
            raise ValueError(f"`sizes` must name at least one codebook of at least one code, got {dict(sizes)}")
        if math.prod(sizes.values()) >= 2**63:
            raise ValueError(f"`sizes`: the combinations of codes must be below 2**63, got {dict(sizes)}")
        self.sizes = dict(sizes)
        self.histograms = {name: torch.zeros(size, dtype=torch.int64) for name, size in self.sizes.items()}
        # Counts of the combinations that occurred: the full table has K1 x K2 entries and is almost empty.
        self._joint_ids = torch.zeros(0, dtype=torch.int64)
        self._joint_counts = torch.zeros(0, dtype=torch.int64)

    def update(self, tokens: torch.Tensor) -> None:
        """Adds tokens (B, codebooks, h, w). Raises ValueError when their shape, type or range is wrong."""
        self._check(tokens)
        columns = tokens.detach().movedim(1, -1).reshape(-1, len(self.sizes)).cpu().long()
        joint = torch.zeros(len(columns), dtype=torch.int64)
        for column, (name, size) in zip(columns.unbind(1), self.sizes.items(), strict=True):
            self.histograms[name] += torch.bincount(column, minlength=size)
            joint = joint * size + column
        ids, counts = torch.unique(joint, return_counts=True)
        self._joint_ids, place = torch.unique(torch.cat([self._joint_ids, ids]), return_inverse=True)
        counts = torch.cat([self._joint_counts, counts])
        self._joint_counts = torch.zeros_like(self._joint_ids).index_add_(0, place, counts)

    def _check(self, tokens: torch.Tensor) -> None:
        if tokens.is_floating_point() or tokens.dtype == torch.bool or tokens.is_complex():
            raise ValueError(f"`tokens` must be integers, got {tokens.dtype}")
        if tokens.ndim != 4 or tokens.shape[1] != len(self.sizes) or 0 in tokens.shape:
            raise ValueError(f"`tokens` must be of shape (B, {len(self.sizes)}, h, w), got {tuple(tokens.shape)}")
        for index, (name, size) in enumerate(self.sizes.items()):
            low, high = tokens[:, index].aminmax()
            if low < 0 or high >= size:
                raise ValueError(f"`tokens` of the {name} codebook must lie in [0, {size}), got [{low}, {high}]")

    @property
    def positions(self) -> int:
        """Token positions seen so far."""
        return int(self._joint_counts.sum())

    @property
    def pair_entropy(self) -> float:
        """Entropy in bits of the combination of all codebooks' tokens, exact over their joint counts.

        At most the smaller of the codebooks' bits together and log2 of `positions`: a small sample bounds it.
        """
        return entropy_bits(self._joint_counts)

    def codebooks(self) -> dict[str, dict[str, float]]:
        """For each codebook: size, usage, perplexity and normalized_entropy.

        usage: share of codes that occurred; perplexity: 2 to the entropy; normalized_entropy: entropy / log2 size.
        """
        result = {}
        for name, counts in self.histograms.items():
            bits, size = entropy_bits(counts), self.sizes[name]
            result[name] = {
                "size": size,
                "usage": (counts > 0).sum().item() / size,
                "perplexity": 2.0**bits,
                "normalized_entropy": bits / math.log2(size) if size > 1 else 1.0,
            }
        return result


class QuantizationError:
    """E|z - z_q|^2 / Var z over a split, of the whole latent and of each codebook's slice.

    Both are sums over the channels c of population moments over all images and positions:
    sum_c mean (z_c - zq_c)^2 / sum_c mean (z_c - mean z_c)^2. 0 = nothing lost, 1 = as bad as one constant vector.

    Args:
        dims: channels of each codebook's slice by name, in the order of the channels.
    """

    def __init__(self, dims: Mapping[str, int]) -> None:
        if not dims or min(dims.values()) < 1:
            raise ValueError(f"`dims` must name at least one codebook of at least one channel, got {dict(dims)}")
        self.dims = dict(dims)
        channels = sum(self.dims.values())
        self._count = 0
        self._mean, self._spread, self._error = (torch.zeros(channels, dtype=torch.float64) for _ in range(3))

    def update(self, latents: torch.Tensor, quantized: torch.Tensor) -> None:
        """Adds latents and quantized latents, both (B, C, h, w). Raises ValueError when a shape is wrong."""
        channels = len(self._mean)
        if latents.ndim != 4 or latents.shape[1] != channels or latents.shape != quantized.shape or 0 in latents.shape:
            shapes = f"{tuple(latents.shape)} and {tuple(quantized.shape)}"
            raise ValueError(f"`latents` and `quantized` must both be (B, {channels}, h, w), got {shapes}")
        z, z_q = (x.detach().movedim(1, -1).reshape(-1, channels).cpu().double() for x in (latents, quantized))
        # Moments of two samples joined (Chan et al.): exact where the mean is large against the spread.
        count, mean = len(z), z.mean(0)
        total, shift = self._count + count, mean - self._mean
        self._spread += (z - mean).square().sum(0) + shift.square() * (self._count * count / total)
        self._mean += shift * (count / total)
        self._error += (z - z_q).square().sum(0)
        self._count = total

    def compute(self) -> dict[str, float]:
        """{"all": the ratio over all channels, <codebook's name>: the ratio over its own}; NaN before any update."""
        names = list(self.dims)
        errors = [part.sum().item() for part in self._error.split(list(self.dims.values()))]
        spreads = [part.sum().item() for part in self._spread.split(list(self.dims.values()))]
        parts = {"all": (sum(errors), sum(spreads)), **dict(zip(names, zip(errors, spreads, strict=True), strict=True))}
        return {name: self._ratio(*part) for name, part in parts.items()}

    def _ratio(self, error: float, spread: float) -> float:
        if self._count == 0:
            return math.nan
        if spread == 0:
            return 0.0 if error == 0 else math.inf
        return error / spread


def entropy_bits(counts: torch.Tensor) -> float:
    """Entropy in bits of a histogram (N,); 0 of an empty one."""
    counts = counts[counts > 0].double()
    share = counts / counts.sum()
    return abs(-(share * share.log2()).sum().item())
