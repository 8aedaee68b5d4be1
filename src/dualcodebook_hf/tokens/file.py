"""Token files: the tokens of any number of images, and what is needed to decode them, in one safetensors file.

Image k is the tensor `NNNN.tokens` (k with leading zeros), uint16 (codebooks, h, w). The metadata entry
`dualcodebook_tokens` is JSON: `format_version`, `downsample_factor` f, `books` as [name, size] in token order,
`config_hash` of the model's architecture, `weights_sha256` of its encoder and codebooks (missing in files of older
versions), and `pictures` as {name, height, width} of the originals, in order.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..configuration_dualcodebook import config_hash
from ..files import atomic_file
from ..weights import encoder_hash, made_tokens

if TYPE_CHECKING:
    from ..core import DualCodebookCore

FORMAT_VERSION = 1
METADATA_KEY = "dualcodebook_tokens"
LARGEST_CODEBOOK = 2**16  # tokens are stored as uint16
LONGEST_NAME = 255  # bytes of a file name on common file systems
# safetensors reads no header above 100 MB. It holds every name, and less than this for an image besides.
LARGEST_HEADER, HEADER_PER_IMAGE = 100_000_000, 150


@dataclass(frozen=True)
class TokenizedImage:
    """One image of a token file.

    Attributes:
        name: the original's file name, without folders.
        size: the original's (H, W).
        tokens: integers (codebooks, h, w).
    """

    name: str
    size: tuple[int, int]
    tokens: torch.Tensor


@dataclass(frozen=True)
class TokenFile:
    """What a token file holds.

    Attributes:
        images: in the order of the file.
        downsample_factor: f; an image's grid is (ceil(H/f), ceil(W/f)).
        codebooks: {name: number of codes}, in the order of the tokens.
        config_hash: identifies the model's architecture.
        weights_sha256: identifies its encoder and codebooks, see `encoder_hash`; None: unknown.
    """

    images: Sequence[TokenizedImage]
    downsample_factor: int
    codebooks: dict[str, int]
    config_hash: str
    weights_sha256: str | None = None

    @classmethod
    def of_model(
        cls, model: DualCodebookCore, images: Sequence[TokenizedImage], weights_sha256: str | None = None
    ) -> TokenFile:
        """The content of a file of these images, tokenized by `model`.

        Args:
            model: that made the tokens.
            images: of the file.
            weights_sha256: `encoder_hash` of the model, where it is known already.
        """
        weights = weights_sha256 or encoder_hash(model)
        return cls(images, model.downsample_factor, model.codebook_sizes, config_hash(model.config), weights)

    def check(self) -> None:
        """Raises ValueError, naming the image, for anything that contradicts the format or the codebooks' sizes."""
        if not _is_count(self.downsample_factor):
            raise ValueError(f"`downsample_factor` must be a positive integer, got {self.downsample_factor!r}")
        if not self.codebooks:
            raise ValueError("`codebooks` must name at least one codebook, got none")
        for name, size in self.codebooks.items():
            if not _is_count(size) or size > LARGEST_CODEBOOK:
                raise ValueError(
                    f"`codebooks`: size of {name!r} must lie in [1, {LARGEST_CODEBOOK}] (uint16), got {size!r}"
                )
        check_names([image.name for image in self.images])
        for image in self.images:
            _check_image(image, self.downsample_factor, self.codebooks)

    def check_model(
        self,
        model: DualCodebookCore,
        source: str | Path,
        argument: str = "model",
        weights_sha256: str | None = None,
        other_weights: bool = False,
    ) -> None:
        """Raises ValueError unless `model` made the tokens; warns where the file does not tell by which weights.

        Args:
            model: the model that is to decode them.
            source: what the message calls the file.
            argument: what the message calls `model`.
            weights_sha256: `encoder_hash` of the model, where it is known already.
            other_weights: see `check_hashes`.
        """
        made = self.config_hash, self.weights_sha256, self.codebooks, self.downsample_factor
        check_hashes(*made, model, weights_sha256, source, argument, other_weights)


def check_hashes(
    config: str,
    weights: str | None,
    codebooks: dict[str, int],
    factor: int,
    model: DualCodebookCore,
    own_weights: str | None,
    source: str | Path,
    argument: str,
    other_weights: bool,
) -> None:
    """Raises ValueError unless a model made tokens: their architecture, encoder and codebooks are its own.

    Args:
        config: config hash of the tokens' model.
        weights: SHA-256 of its encoder and codebooks; None: unknown, which is a warning.
        codebooks: its codebooks' sizes.
        factor: its downsample factor.
        model: that is to decode the tokens.
        own_weights: `encoder_hash` of it; None: not known yet.
        source: what the message calls the tokens' file.
        argument: what the message calls `model`.
        other_weights: any model of such codebooks will do.
    """
    own, made_by = config_hash(model.config), f"`{argument}` must be the model that made the tokens in '{source}', with"
    if other_weights:
        if (codebooks, factor) != (dict(model.codebook_sizes), model.downsample_factor):
            raise ValueError(
                f"`{argument}` must have the codebooks {codebooks} and the factor {factor} of the tokens in '{source}',"
                f" got {dict(model.codebook_sizes)} and {model.downsample_factor}"
            )
    elif config != own:
        raise ValueError(f"{made_by} config hash {config} and codebooks {codebooks}; got one with config hash {own}")
    elif weights is None:
        warnings.warn(
            f"'{source}' was written before token files named the weights: with others than those that made it, "
            "its images come out as nonsense",
            stacklevel=3,
        )
    elif not made_tokens(model, weights, own_weights):
        own = own_weights or encoder_hash(model)
        raise ValueError(f"{made_by} an encoder and codebooks of SHA-256 {weights}; got one with SHA-256 {own}")


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError, before any image is tokenized, where one file cannot hold the images of these names."""
    for name in names:
        _check_name(name)
    needed = sum(HEADER_PER_IMAGE + len(json.dumps(json.dumps(name))) for name in names)
    if needed > LARGEST_HEADER:
        most = int(len(names) * LARGEST_HEADER / needed)
        raise ValueError(
            f"a token file can hold about {most} images with names such as {names[0]!r}, got {len(names)}: write "
            "several files, for example one for each part of the images"
        )


def save_tokens(path: str | Path, content: TokenFile) -> None:
    """Writes a token file; it appears whole or not at all.

    Raises ValueError (see `TokenFile.check`) before anything is written.
    """
    content.check()
    header = {
        "format_version": FORMAT_VERSION,
        "downsample_factor": content.downsample_factor,
        "books": [[name, size] for name, size in content.codebooks.items()],
        "config_hash": content.config_hash,
        "weights_sha256": content.weights_sha256,
        "pictures": [{"name": p.name, "height": p.size[0], "width": p.size[1]} for p in content.images],
    }
    tensors = {
        _key(index): image.tokens.cpu().to(torch.uint16).contiguous() for index, image in enumerate(content.images)
    }
    with atomic_file(path) as partial:
        # Not safetensors' save_file: it lets nobody but the owner read the file.
        partial.write_bytes(save(tensors, metadata={METADATA_KEY: json.dumps(header)}))


def load_tokens(path: str | Path) -> TokenFile:
    """Reads a token file; tokens come back as int64 (codebooks, h, w).

    Raises ValueError that names the file when it is missing, not a token file, of another version, or inconsistent.
    """
    try:
        content = _load(Path(path))
        content.check()
    except SafetensorError as error:
        raise ValueError(f"cannot read token file '{path}': it is not a token file, or damaged ({error})") from error
    except (OSError, RecursionError, ValueError) as error:  # the second: JSON lists in lists, thousands deep
        raise ValueError(f"cannot read token file '{path}': {error}") from error
    return content


def token_bytes(grid: tuple[int, int], bits_per_position: float) -> int:
    """Bytes that the tokens of one image take, densely packed: ceil(h * w * bits / 8)."""
    return math.ceil(grid[0] * grid[1] * bits_per_position / 8)


def _load(path: Path) -> TokenFile:
    if not path.is_file():
        raise ValueError("no such file")
    with safe_open(path, framework="pt") as file:
        header = _header(file.metadata() or {})
        names = header["pictures"]
        keys = [_key(index) for index in range(len(names))]
        if set(file.keys()) != set(keys):
            raise ValueError(f"expected the tensors of {len(keys)} images, got {len(list(file.keys()))} tensors")
        tensors = [file.get_tensor(key) for key in keys]
    for tensor in tensors:
        if tensor.dtype != torch.uint16:
            raise ValueError(f"expected tokens of type torch.uint16, got {tensor.dtype}")
    images = [
        TokenizedImage(item["name"], (item["height"], item["width"]), tensor.to(torch.int64))
        for item, tensor in zip(names, tensors, strict=True)
    ]
    books = dict(header["books"])
    return TokenFile(images, header["downsample_factor"], books, header["config_hash"], header.get("weights_sha256"))


def _header(metadata: dict[str, str]) -> dict:
    if METADATA_KEY not in metadata:
        raise ValueError(f"it is not a token file (no metadata `{METADATA_KEY}`)")
    header = json.loads(metadata[METADATA_KEY])
    version = header.get("format_version") if isinstance(header, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"expected format version {FORMAT_VERSION}, got {version!r}")
    expected = {"downsample_factor": int, "books": list, "config_hash": str, "pictures": list}
    for key, kind in expected.items():
        if not isinstance(header.get(key), kind):
            raise ValueError(f"metadata `{key}` must be of type {kind.__name__}, got {header.get(key)!r}")
    if not isinstance(header.get("weights_sha256"), (str, type(None))):
        raise ValueError(f"metadata `weights_sha256` must be text, got {header['weights_sha256']!r}")
    if not all(
        isinstance(codebook, list) and len(codebook) == 2 and isinstance(codebook[0], str)
        for codebook in header["books"]
    ):
        raise ValueError(f"metadata `books` must be a list of [name, size], got {header['books']!r}")
    for item in header["pictures"]:
        if not isinstance(item, dict) or set(item) != {"name", "height", "width"}:
            raise ValueError(f"metadata `pictures` must hold name, height and width of each, got {item!r}")
    return header


def _check_name(name: str) -> None:
    # A name with a folder in it could make a reader write outside the folder that it was told to write to.
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise ValueError(f"`name` must be a file name without folders, got {name!r}")
    try:
        length = len(os.fsencode(name))
    except UnicodeEncodeError as error:
        raise ValueError(f"`name` must be a file name, got {name!r}: {error.reason}") from error
    if length > LONGEST_NAME:
        raise ValueError(f"`name` must be at most {LONGEST_NAME} bytes long, got {length}: {name!r}")


def _check_image(image: TokenizedImage, factor: int, codebooks: dict[str, int]) -> None:
    name, tokens = image.name, image.tokens
    if len(image.size) != 2 or not all(_is_count(side) for side in image.size):
        raise ValueError(f"`size` of {name!r} must be a positive (H, W), got {image.size!r}")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"`tokens` of {name!r} must be integers, got {tokens.dtype}")
    expected = (len(codebooks), *(-(-side // factor) for side in image.size))
    if tuple(tokens.shape) != expected:
        height, width = image.size
        raise ValueError(
            f"`tokens` of {name!r} must be of shape {expected} for {width}x{height} pixels at f={factor}, "
            f"got {tuple(tokens.shape)}"
        )
    for (codebook, size), ids in zip(codebooks.items(), tokens.to(torch.int64), strict=True):
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= size:
            raise ValueError(
                f"`tokens` of {name!r} in the codebook {codebook!r} must lie in [0, {size}), got [{low}, {high}]"
            )


def _key(index: int) -> str:
    return f"{index:04d}.tokens"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
