"""The baseline of every table: a linear codec with the same tokens as a neural tokenizer.

An image is cut into patches, each is projected on the first principal components, and the coefficients are quantized
by k-means, the second codebook on what the first one left. No network: a tokenizer has to beat it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ..backbone import pad_to_multiple
from ..clustering import kmeans, patchify, principal_components, unpatchify
from ..codebooks import nearest_codes

if TYPE_CHECKING:
    from .data import EvaluationImages


@dataclass
class PatchLinearOutput:
    """What the codec makes of images.

    Attributes:
        sample: (B, 3, H, W), not clamped.
        tokens: int64 (B, stages, h, w).
        latents: (B, components, h, w), the coefficients.
        quantized: (B, components, h, w), the sum of the stages' codes.
    """

    sample: torch.Tensor
    tokens: torch.Tensor
    latents: torch.Tensor
    quantized: torch.Tensor


class PatchLinearCodec(nn.Module):
    """Patches -> principal components -> residual k-means -> tokens; a `Tokenizer` with f = patch_size.

    Args:
        sizes: codes of each stage; bits per position are the sum of their log2 (512 + 512: 18, as the paper's model).
        components: principal components that are kept of the 3 * patch_size^2 numbers of a patch.
        patch_size: side of a patch in pixels.

    Raises ValueError for sizes below 1 and for more components than a patch has numbers.
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
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self.mean.device

    @property
    def dtype(self) -> torch.dtype:
        """The buffers' type."""
        return self.mean.dtype

    @property
    def downsample_factor(self) -> int:
        """Pixels of a position's side."""
        return self.patch_size

    @property
    def codebook_sizes(self) -> dict[str, int]:
        """Codes of each stage by name, in the order of the tokens."""
        return {f"stage_{stage + 1}": size for stage, size in enumerate(self.sizes)}

    @property
    def latent_slices(self) -> dict[str, int]:
        """All coefficients together: the stages do not divide them."""
        return {"components": self.components}

    @property
    def bits_per_position(self) -> float:
        """Sum of the log2 of the sizes."""
        return float(sum(math.log2(size) for size in self.sizes))

    def num_parameters(self) -> int:
        """Numbers in the buffers."""
        return sum(buffer.numel() for buffer in self.buffers())

    @torch.no_grad()
    def fit(self, images: Iterable[torch.Tensor], patches_per_image: int = 256, seed: int = 0) -> PatchLinearCodec:
        """Fits components and codes; the same images and seed give the same codec.

        Args:
            images: (3, H, W) in [-1, 1] each.
            patches_per_image: at most this many are drawn of each image (256: all of a 256 x 256 image).
            seed: of the drawn patches and of k-means.

        Raises ValueError when there are fewer patches than components or codes.
        """
        generator = torch.Generator().manual_seed(seed)
        patches = []
        for image in images:
            found = self._patches(image[None].to(self.mean)).flatten(0, 2)
            chosen = torch.randperm(len(found), generator=generator)[:patches_per_image]
            patches.append(found[chosen.to(found.device)])
        needed = max(*self.sizes, self.components)
        if sum(map(len, patches)) < needed:
            raise ValueError(f"`images` must hold at least {needed} patches, got {sum(map(len, patches))}")

        points = torch.cat(patches)
        self.mean.copy_(points.mean(0))
        points -= self.mean
        self.basis.copy_(principal_components(points.T @ points, self.components)[0])
        residual = points @ self.basis.T
        for stage, size in enumerate(self.sizes):
            codes = kmeans(residual, size, generator)
            self._codes(stage).copy_(codes)
            residual = residual - codes[nearest_codes(residual, codes)]
        return self

    @torch.no_grad()
    def autoencode(self, x: torch.Tensor) -> PatchLinearOutput:
        """Images (B, 3, H, W) in [-1, 1] -> PatchLinearOutput, the sample of the same H, W."""
        latents = self.encode(x)
        residual, tokens = latents.movedim(1, -1), []
        for stage in range(len(self.sizes)):
            codes = self._codes(stage)
            ids = nearest_codes(residual.flatten(0, 2), codes).view(residual.shape[:3])
            residual = residual - codes[ids]
            tokens.append(ids)
        tokens = torch.stack(tokens, dim=1)
        quantized = self.lookup(tokens)
        return PatchLinearOutput(self.decode(quantized, x.shape[-2:]), tokens, latents, quantized)

    def tokenize(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1], padded as the model pads -> int64 (B, stages, ceil(H/f), ceil(W/f))."""
        return self.autoencode(pixel_values).tokens

    def detokenize(self, tokens: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
        """Tokens (B, stages, h, w) -> images (B, 3, h*f, w*f), cropped to `size` = (H, W); not clamped."""
        if tokens.ndim != 4 or tokens.shape[1] != len(self.sizes):
            raise ValueError(f"`tokens` must be of shape (B, {len(self.sizes)}, h, w), got {tuple(tokens.shape)}")
        return self.decode(self.lookup(tokens), size)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) -> principal components (B, components, ceil(H/f), ceil(W/f)), not quantized."""
        return ((self._patches(x) - self.mean) @ self.basis.T).movedim(-1, 1)

    def lookup(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, stages, h, w) -> the sum of the stages' codes (B, components, h, w)."""
        codes = [F.embedding(tokens[:, stage], self._codes(stage)) for stage in range(len(self.sizes))]
        return torch.stack(codes).sum(0).movedim(-1, 1)

    def decode(self, coefficients: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
        """Coefficients (B, components, h, w), quantized or not -> images (B, 3, h*f, w*f), cropped to `size`."""
        images = unpatchify(coefficients.movedim(1, -1) @ self.basis + self.mean, self.patch_size)
        return images if size is None else images[..., : size[0], : size[1]]

    def _codes(self, stage: int) -> torch.Tensor:
        return getattr(self, f"codes_{stage}")

    def _patches(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, h, w, 3 * f * f)."""
        if x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point():
            raise ValueError(f"`x` must be floating point of shape (B, 3, H, W), got {x.dtype} {tuple(x.shape)}")
        return patchify(pad_to_multiple(x, self.patch_size), self.patch_size)

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


def fit_linear_codec(
    images: EvaluationImages,
    count: int = 400,
    sizes: Sequence[int] = (512, 512),
    components: int = 48,
    seed: int = 0,
) -> tuple[PatchLinearCodec, dict[str, Any]]:
    """The baseline of a table: the codec, fitted to images of a split.

    Args:
        images: the split, see `EvaluationData.open`.
        count: images that are drawn from it; all of them where it has fewer.
        sizes: codes of the stages; those of the model that it stands beside, so that both spend the same bits.
        components: see `PatchLinearCodec`.
        seed: of the drawn images and of k-means.

    Returns the codec and, for its record, what it was fitted to. Raises ValueError when the images have fewer patches
    than the codec has components or codes.
    """
    crops = list(images.shuffled(seed).first(count))
    codec = PatchLinearCodec(sizes, components).fit(crops, seed=seed)
    source = {key: images.data.record(len(crops))[key] for key in ("dataset", "config", "split", "pictures")}
    return codec, source | {"sizes": list(sizes), "components": components, "seed": seed}
