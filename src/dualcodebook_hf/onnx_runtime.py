"""A tokenizer that `dualcodebook export` wrote, run by onnxruntime: numpy arrays in and out, and no torch.

from dualcodebook_hf.onnx_runtime import OnnxTokenizer, from_image, to_image

tokenizer = OnnxTokenizer.from_pretrained("exported")            # a folder, or a Hub id
pixels = from_image(read_image("photo.jpg"))                     # (1, 3, H, W) float32 in [-1, 1]
tokens = tokenizer.tokenize(pixels)                              # int64 (1, 2, ceil(H/f), ceil(W/f))
to_image(tokenizer.detokenize(tokens, size=pixels.shape[-2:])).save("restored.png")
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .packages import require_package
from .pil_images import read_image

if TYPE_CHECKING:
    from onnxruntime import SessionOptions
    from PIL import Image

__all__ = ["OnnxTokenizer", "from_image", "read_image", "to_image"]
FOLDER = "onnx"
VARIANTS = ("fp16", "int8")
# As the model's: what lies further out has another range (0..255, ...).
RANGE_TOLERANCE = 1e-2


@dataclass(frozen=True)
class TokenizerFile:
    """What onnx/tokenizer.json says.

    Attributes:
        downsample_factor: f, pixels of a position's side.
        channels: of images.
        codebooks: [name, number of codes], in the order of the tokens.
        config_hash: of the model's architecture, as in token files.
        weights_sha256: of its encoder and codebooks, as in token files.
        version: of the package that wrote it.
    """

    NAME: ClassVar[str] = "tokenizer.json"

    downsample_factor: int
    channels: int
    codebooks: list
    config_hash: str
    weights_sha256: str
    version: str

    @classmethod
    def read(cls, path: Path) -> TokenizerFile:
        """Raises ValueError, naming the file, for anything else."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{field.name: content[field.name] for field in fields(cls)})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"'{path}' does not describe an exported tokenizer: {error}") from error


class OnnxTokenizer:
    """Images (B, C, H, W) in [-1, 1] to tokens (B, codebooks, h, w) and back, as `DualCodebookVQModel` does it.

    Args:
        folder: holds onnx/ with tokenizer.json, encoder_model.onnx and decoder_model.onnx.
        variant: "fp16" or "int8": of these files; None: float32.
        providers: onnxruntime's execution providers, in order of preference; None: the CPU's.
        session_options: onnxruntime.SessionOptions, for the number of threads and the like.

    Attributes:
        downsample_factor: f.
        codebook_sizes: {name: number of codes}, in the order of the tokens.
        bits_per_position: log2 of the number of combinations of tokens at one position.

    Raises ValueError where files are missing or onnxruntime is.
    """

    def __init__(
        self,
        folder: str | Path,
        variant: str | None = None,
        providers: Sequence[str] | None = None,
        session_options: SessionOptions | None = None,
    ) -> None:
        if variant is not None and variant not in VARIANTS:
            raise ValueError(f"`variant` must be None or one of {', '.join(VARIANTS)}, got {variant!r}")
        require_package("onnxruntime", extra="onnx", user="`OnnxTokenizer`")
        import onnxruntime

        place, ending = Path(folder) / FOLDER, f"_{variant}" if variant else ""
        self.description = TokenizerFile.read(place / TokenizerFile.NAME)
        self.downsample_factor = self.description.downsample_factor
        self.codebook_sizes = {name: size for name, size in self.description.codebooks}
        self.bits_per_position = float(sum(math.log2(size) for size in self.codebook_sizes.values()))
        sessions = []
        for name in (f"encoder_model{ending}.onnx", f"decoder_model{ending}.onnx"):
            if not (place / name).is_file():
                raise ValueError(f"there is no {name} in '{place}'")
            chosen = list(providers) if providers else ["CPUExecutionProvider"]
            sessions.append(onnxruntime.InferenceSession(place / name, session_options, providers=chosen))
        self._encoder, self._decoder = sessions

    @classmethod
    def from_pretrained(
        cls, name: str | Path, variant: str | None = None, revision: str | None = None, **options: Any
    ) -> OnnxTokenizer:
        """The tokenizer of a folder, or of a Hub id, whose onnx/ is downloaded.

        Args:
            name: the folder or Hub id.
            variant: see the class.
            revision: branch, tag or commit of a Hub id.
            options: `providers` and `session_options`, see the class.
        """
        if not Path(name).is_dir():
            from huggingface_hub import snapshot_download

            ending = f"_{variant}" if variant else ""
            names = [TokenizerFile.NAME, f"encoder_model{ending}.onnx", f"decoder_model{ending}.onnx"]
            name = snapshot_download(
                str(name), revision=revision, allow_patterns=[f"{FOLDER}/{each}" for each in names]
            )
        return cls(name, variant, **options)

    def tokenize(self, pixel_values: np.ndarray) -> np.ndarray:
        """Images (B, C, H, W) in [-1, 1] -> tokens int64 (B, codebooks, ceil(H/f), ceil(W/f)).

        Raises ValueError for a wrong shape, type or range.
        """
        pixels, channels = pixel_values, self.description.channels
        if not isinstance(pixels, np.ndarray) or not np.issubdtype(pixels.dtype, np.floating):
            kind = getattr(pixels, "dtype", type(pixels).__name__)
            raise ValueError(f"`pixel_values` must be a floating point array in [-1, 1], got {kind}")
        if pixels.ndim != 4 or pixels.shape[1] != channels or 0 in pixels.shape:
            raise ValueError(f"`pixel_values` must be of shape (B, {channels}, H, W), got {pixels.shape}")
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= -1 - RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):  # NaN fails too
            raise ValueError(f"`pixel_values` must lie in [-1, 1], got [{low:.4g}, {high:.4g}]")
        pixels = np.ascontiguousarray(pixels, dtype=np.float32)
        return self._encoder.run(["tokens"], {"pixel_values": pixels})[0]

    def detokenize(
        self, tokens: np.ndarray, size: tuple[int, int] | None = None, only: str | None = None
    ) -> np.ndarray:
        """Tokens to images float32 (B, C, h*f, w*f), about [-1, 1], not clamped.

        Args:
            tokens: (B, codebooks, h, w), any integer type.
            size: (H, W) of the original image, to crop the padding away.
            only: a codebook's name: every other codebook gives the mean of its codes instead.

        Raises ValueError for a wrong shape, type, range, size or name.
        """
        self._check_tokens(tokens, size, only)
        tokens = np.array(tokens, dtype=np.int64)
        for index, (name, codes) in enumerate(self.codebook_sizes.items()):
            if only not in (None, name):
                tokens[:, index] = codes  # the graph's token for the mean
        pixels = self._decoder.run(["pixel_values"], {"tokens": tokens})[0]
        return pixels if size is None else pixels[..., : size[0], : size[1]]

    def _check_tokens(self, tokens: np.ndarray, size: tuple[int, int] | None, only: str | None) -> None:
        names, factor = list(self.codebook_sizes), self.downsample_factor
        if not isinstance(tokens, np.ndarray) or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"`tokens` must be integers, got {getattr(tokens, 'dtype', type(tokens).__name__)}")
        if tokens.ndim != 4 or tokens.shape[1] != len(names) or 0 in tokens.shape:
            raise ValueError(f"`tokens` must be of shape (B, {len(names)}, h, w), got {tokens.shape}")
        if only is not None and only not in names:
            raise ValueError(f"`only` must be one of {', '.join(names)} or None, got {only!r}")
        if size is not None and (len(size) != 2 or tuple(-(-side // factor) for side in size) != tokens.shape[-2:]):
            raise ValueError(
                f"`size` must be an (H, W) that f={factor} maps to the token grid {tokens.shape[-2:]}, got {size}"
            )
        for index, (name, codes) in enumerate(self.codebook_sizes.items()):
            low, high = int(tokens[:, index].min()), int(tokens[:, index].max())
            if low < 0 or high >= codes:
                raise ValueError(f"`tokens` of the {name} codebook must lie in [0, {codes}), got [{low}, {high}]")


def from_image(image: Image.Image) -> np.ndarray:
    """RGB image -> (1, 3, H, W) float32 in [-1, 1]. Raises ValueError for another mode."""
    if image.mode != "RGB":
        raise ValueError(f"`image` must be of mode RGB (see `read_image`), got {image.mode}")
    return np.asarray(image, dtype=np.float32).transpose(2, 0, 1)[None] / 255 * 2 - 1


def to_image(pixels: np.ndarray) -> Image.Image:
    """(3, H, W) or (1, 3, H, W) in [-1, 1] -> RGB image, clamped and rounded to 8 bits."""
    from PIL import Image

    if pixels.shape[-3] != 3 or pixels.size != math.prod(pixels.shape[-3:]):
        raise ValueError(f"`pixels` must be of shape (3, H, W), got {pixels.shape}")
    values = (np.clip(pixels.reshape(pixels.shape[-3:]), -1, 1) + 1) * 127.5
    return Image.fromarray(np.rint(values).astype(np.uint8).transpose(1, 2, 0))
