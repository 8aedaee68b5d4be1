"""Starts a tokenizer where a linear codec already is: PCA in the linear shortcut, k-means in the codebooks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..autoencoder_dualcodebook import DualCodebookVQModel
from ..backbone import last_convolution
from ..clustering import kmeans, patchify, principal_components

PATCHES = 40_000


@torch.no_grad()
def initialize_from_images(model: DualCodebookVQModel, images: torch.Tensor, seed: int = 0) -> None:
    """Fits the linear shortcut and the codebooks to images; the networks start by adding nothing.

    The latents are the principal components of f x f patches, at the pixels' scale: the strongest ones in the first
    channels of the first codebook, as many as carry its share of the bits at the least error (reverse water-filling),
    the next ones in the second codebook; channels that are left over start at zero. `quant_conv` and `post_quant_conv`
    hold each component's standard deviation, so that encoder and decoder work on numbers near 1. A codebook of more
    codes than there are patches (at most 40,000 are taken) starts as the product of two, each over half of the bits.

    Args:
        model: changed in place; codebooks whose codes are computed stay as they are.
        images: (N, 3, R, R) in [-1, 1].
        seed: of the patches that are taken and of k-means.

    Raises ValueError when the model has no linear shortcut.
    """
    if model.linear_encoder is None:
        raise ValueError("`linear_shortcut` must be true for an initialization from images, got false")
    generator = torch.Generator().manual_seed(seed)
    factor, codebooks = model.downsample_factor, model.quantize.codebooks
    height, width = images.shape[-2:]
    patches = patchify(images[..., : height - height % factor, : width - width % factor], factor).flatten(0, 2)
    patches = patches[torch.randperm(len(patches), generator=generator)[:PATCHES]]
    components, variances = principal_components(torch.cov(patches.T.double()), sum(model.quantize.dims))
    channels = _assign(variances, [math.log2(codebook.size) for codebook in codebooks.values()], model.quantize.dims)
    kernels = torch.zeros(len(channels), components.shape[1])
    deviations = torch.full((len(channels),), variances.sqrt()[len(variances) // 2].item())
    for channel, component in enumerate(channels):
        if component is not None:
            kernels[channel], deviations[channel] = components[component], variances[component].sqrt()
    _set_layers(model, kernels, deviations.clamp_min(1e-3))
    latents = (patches @ kernels.T).split(model.quantize.dims, dim=1)
    for codebook, vectors in zip(codebooks.values(), latents, strict=True):
        if codebook.is_table:
            codebook.set_codes(_starting_codes(vectors, codebook.size, generator), vectors)


def _set_layers(model: DualCodebookVQModel, kernels: torch.Tensor, deviations: torch.Tensor) -> None:
    """The shortcut projects on `kernels` (D, 3 * f * f); encoder and decoder see latents over `deviations` (D,)."""
    patches = kernels.unflatten(1, model.linear_encoder.weight.shape[1:])
    for layer in (model.linear_encoder, model.linear_decoder):
        margin = (layer.kernel_size[0] - patches.shape[-1]) // 2  # overlapping patches start with an empty one
        layer.weight.copy_(F.pad(patches, (margin,) * 4))
        nn.init.zeros_(layer.bias)
    for layer, diagonal in ((model.quant_conv, deviations), (model.post_quant_conv, 1 / deviations)):
        layer.weight.copy_(torch.diag(diagonal)[:, :, None, None])
        nn.init.zeros_(layer.bias)
    for layer in (model.encoder.conv_out, last_convolution(model.decoder)):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def _starting_codes(vectors: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Centres (size, D) of vectors (M, D) by k-means; if M < size, every pair of a centre of the first dims and one of
    the others: two codebooks of as equal sizes as their product allows, divided where the first dims carry its bits."""
    if size <= len(vectors):
        return kmeans(vectors, size, generator)
    count = next(divisor for divisor in range(math.isqrt(size), 0, -1) if size % divisor == 0)
    rates = _water_filling(vectors.var(0), math.log2(size)).cumsum(0)
    dims = int((rates - math.log2(count)).abs().argmin()) + 1
    first, second = kmeans(vectors[:, :dims], count, generator), kmeans(vectors[:, dims:], size // count, generator)
    return torch.cat([first.repeat_interleave(len(second), 0), second.repeat(count, 1)], dim=1)


def _assign(variances: torch.Tensor, bits: list[float], dims: list[int]) -> list[int | None]:
    """The component that each channel carries (None: none), codebooks in order, each with its share of the bits."""
    rates = _water_filling(variances, sum(bits)).cumsum(0)
    channels: list[int | None] = []
    first, share = 0, 0.0
    for codebook_bits, dim in zip(bits, dims, strict=True):
        share += codebook_bits
        last = len(variances) if len(channels) + dim == sum(dims) else int((rates - share).abs().argmin()) + 1
        taken = list(range(first, min(last, first + dim)))
        channels += taken + [None] * (dim - len(taken))
        first += len(taken)
    return channels


def _water_filling(variances: torch.Tensor, bits: float) -> torch.Tensor:
    """Bits of each of some independent Gaussians when `bits` in all give the least squared error."""
    low, high = variances.min().clamp_min(1e-12).log(), variances.max().log()
    for _ in range(60):
        level = (low + high) / 2
        rates = ((variances.log() - level) / (2 * math.log(2))).clamp_min(0)
        low, high = (level, high) if rates.sum() > bits else (low, level)
    return rates
