"""The honest rival of a neural tokenizer: a linear codec with the same tokens.

A picture is cut into patches, each is projected on the first principal components, and the coefficients are quantized
by k-means, the second book on what the first one left. No network: a tokenizer has to beat it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ..backbone import pad_to_multiple
from ..codebooks import nearest_codes

# Points that the first centres are drawn from, one after the other.
SEEDING_POINTS = 20_000
KMEANS_ITERATIONS = 30


@dataclass
class PatchLinearOutput:
    """sample (B, 3, H, W), not clamped; tokens int64 (B, stages, h, w); latents, quantized (B, components, h, w)."""

    sample: torch.Tensor
    tokens: torch.Tensor
    latents: torch.Tensor
    quantized: torch.Tensor


class PatchLinearCodec(nn.Module):
    """Patches -> principal components -> residual k-means -> tokens (B, stages, ceil(H/f), ceil(W/f)), f = patch_size.

    Args:
        sizes: codes of each stage; bits a position are the sum of their log2 (512 + 512: 18, as the paper's model).
        components: principal components that are kept of the 3 * patch_size^2 numbers of a patch.
        patch_size: side of a patch in pixels.
    """

    def __init__(self, sizes: Sequence[int] = (512, 512), components: int = 48, patch_size: int = 16) -> None:
        super().__init__()
        width = 3 * patch_size**2
        if patch_size < 1 or not 1 <= components <= width:
            raise ValueError(f"`components` must lie in [1, {width}] for patches of {patch_size}, got {components}")
        if not sizes or min(sizes) < 1:
            raise ValueError(f"`sizes` must hold at least one positive size, got {tuple(sizes)}")
        self.sizes, self.components, self.patch_size = tuple(sizes), components, patch_size
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("basis", torch.zeros(components, width))
        for stage, size in enumerate(self.sizes):
            self.register_buffer(f"codes_{stage}", torch.zeros(size, components))

    @property
    def downsample_factor(self) -> int:
        """Pixels a side of a token position."""
        return self.patch_size

    @property
    def codebook_sizes(self) -> dict[str, int]:
        """Codes of each stage by name, in the order of the tokens."""
        return {f"stage_{stage + 1}": size for stage, size in enumerate(self.sizes)}

    @property
    def bits_per_position(self) -> float:
        """Sum of the log2 of the sizes."""
        return float(sum(math.log2(size) for size in self.sizes))

    @torch.no_grad()
    def fit(self, pictures: Iterable[torch.Tensor], patches_per_picture: int = 256, seed: int = 0) -> PatchLinearCodec:
        """Fits components and codes to pictures (3, H, W) in [-1, 1]; the same pictures and seed give the same codec.

        Of each picture at most `patches_per_picture` patches are drawn (256: all of a 256 x 256 picture).
        Raises ValueError when there are fewer patches than components or codes.
        """
        generator = torch.Generator().manual_seed(seed)
        patches = []
        for picture in pictures:
            found = self._patches(picture[None].to(self.mean)).flatten(0, 2)
            chosen = torch.randperm(len(found), generator=generator)[:patches_per_picture]
            patches.append(found[chosen.to(found.device)])
        needed = max(*self.sizes, self.components)
        if sum(map(len, patches)) < needed:
            raise ValueError(f"`pictures` must hold at least {needed} patches, got {sum(map(len, patches))}")

        points = torch.cat(patches)
        self.mean.copy_(points.mean(0))
        points -= self.mean
        # eigh sorts upwards, the first component is the last one.
        _, vectors = torch.linalg.eigh((points.T @ points).double())
        self.basis.copy_(vectors.flip(1)[:, : self.components].T)
        residual = points @ self.basis.T
        for stage, size in enumerate(self.sizes):
            codes = kmeans(residual, size, generator)
            getattr(self, f"codes_{stage}").copy_(codes)
            residual = residual - codes[nearest_codes(residual, codes)]
        return self

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> PatchLinearOutput:
        """Pictures (B, 3, H, W) in [-1, 1] -> PatchLinearOutput, the sample of the same H, W."""
        latents = self.encode(pixel_values)
        residual, tokens = latents.movedim(1, -1), []
        for stage in range(len(self.sizes)):
            codes = getattr(self, f"codes_{stage}")
            ids = nearest_codes(residual.flatten(0, 2), codes).view(residual.shape[:3])
            residual = residual - codes[ids]
            tokens.append(ids)
        tokens = torch.stack(tokens, dim=1)
        quantized = self.lookup(tokens)
        return PatchLinearOutput(self.decode(quantized, pixel_values.shape[-2:]), tokens, latents, quantized)

    def tokenize(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, H, W) in [-1, 1], padded as the model pads -> int64 (B, stages, ceil(H/f), ceil(W/f))."""
        return self(pixel_values).tokens

    def detokenize(self, tokens: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
        """Tokens (B, stages, h, w) -> pictures (B, 3, h*f, w*f), cropped to `size` = (H, W); not clamped."""
        if tokens.ndim != 4 or tokens.shape[1] != len(self.sizes):
            raise ValueError(f"`tokens` must be of shape (B, {len(self.sizes)}, h, w), got {tuple(tokens.shape)}")
        return self.decode(self.lookup(tokens), size)

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, H, W) -> principal components (B, components, ceil(H/f), ceil(W/f)), not quantized."""
        return ((self._patches(pixel_values) - self.mean) @ self.basis.T).movedim(-1, 1)

    def lookup(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, stages, h, w) -> the sum of the stages' codes (B, components, h, w)."""
        codes = [F.embedding(tokens[:, stage], getattr(self, f"codes_{stage}")) for stage in range(len(self.sizes))]
        return torch.stack(codes).sum(0).movedim(-1, 1)

    def decode(self, coefficients: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
        """Coefficients (B, components, h, w), quantized or not -> pictures (B, 3, h*f, w*f), cropped to `size`."""
        patches = coefficients.movedim(1, -1) @ self.basis + self.mean
        side = self.patch_size
        pictures = patches.unflatten(-1, (3, side, side)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        return pictures if size is None else pictures[..., : size[0], : size[1]]

    def _patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, h, w, 3 * f * f)."""
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or not pixel_values.is_floating_point():
            got = f"{pixel_values.dtype} {tuple(pixel_values.shape)}"
            raise ValueError(f"`pixel_values` must be floating point of shape (B, 3, H, W), got {got}")
        side = self.patch_size
        padded = pad_to_multiple(pixel_values, side).unflatten(3, (-1, side)).unflatten(2, (-1, side))
        return padded.permute(0, 2, 4, 1, 3, 5).flatten(3)

    def save(self, path: str | Path) -> None:
        """Writes the codec as one safetensors file."""
        shape = {"sizes": self.sizes, "components": self.components, "patch_size": self.patch_size}
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, str(path), metadata={"patch_linear_codec": json.dumps(shape)})

    @classmethod
    def load(cls, path: str | Path) -> PatchLinearCodec:
        """Reads what `save` wrote. Raises ValueError for another safetensors file."""
        with safe_open(str(path), framework="pt") as file:
            metadata = (file.metadata() or {}).get("patch_linear_codec")
            if metadata is None:
                raise ValueError(f"`path` must be a file written by PatchLinearCodec.save, got {str(path)!r}")
            codec = cls(**json.loads(metadata))
        codec.load_state_dict(load_file(str(path)))
        return codec


def kmeans(
    points: torch.Tensor, size: int, generator: torch.Generator, iterations: int = KMEANS_ITERATIONS
) -> torch.Tensor:
    """Lloyd's algorithm from k-means++ centres: points (M, D), M >= size -> centres (size, D).

    A centre that loses all its points moves to the point that is worst served. Ends early when an iteration lowers the
    error by less than 1e-4 of itself. Raises ValueError when there are fewer points than centres.
    """
    if len(points) < size:
        raise ValueError(f"`points` must be at least {size}, one a centre, got {len(points)}")
    centres = _spread_centres(points, size, generator)
    last = math.inf
    for _ in range(iterations):
        ids = nearest_codes(points, centres)
        distances = (points - centres[ids]).square().sum(1)
        counts = torch.bincount(ids, minlength=size)
        centres = torch.zeros_like(centres).index_add_(0, ids, points) / counts.clamp_min(1)[:, None]
        dead = (counts == 0).nonzero()[:, 0]
        centres[dead] = points[distances.topk(len(dead)).indices]
        error = distances.sum().item()
        if not len(dead) and last - error <= 1e-4 * error:
            break
        last = error
    return centres


def _spread_centres(points: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """k-means++: each next centre is a point drawn with probability ~ squared distance to the nearest one so far."""
    sample = points[torch.randperm(len(points), generator=generator)[: max(SEEDING_POINTS, size)].to(points.device)]
    centres = [sample[0]]
    distances = (sample - sample[0]).square().sum(1)
    for _ in range(size - 1):
        # Drawn by hand on the CPU, in float64: the same seed gives the same centres on every device.
        cumulative = distances.double().cpu().cumsum(0)
        draw = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
        chosen = sample[min(int(torch.searchsorted(cumulative, draw)), len(sample) - 1)]
        centres.append(chosen)
        distances = torch.minimum(distances, (sample - chosen).square().sum(1))
    return torch.stack(centres)
