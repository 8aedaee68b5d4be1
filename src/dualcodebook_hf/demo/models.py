"""The models that the demo serves, each with what the page says about it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..autoencoder_dualcodebook import DualCodebookVQModel
from ..figures import code_colours
from ..files import public_name
from ..inference import optimize_for_inference
from ..loading import EMBEDDED_FOLDERS, default_checkpoint, embedded_label, load_tokenizer_with_hash, tokenizer_folder
from ..metrics.tokens import bits_per_pixel
from ..tokens.file import token_bytes
from ..weights import weights_hash

PAPER = "https://arxiv.org/abs/2503.10832"
HUB = "https://huggingface.co"
SIDE = 256  # pixels of the picture that a rate is told for
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_IMAGE = re.compile(r"!\[[^\]]*\]\([^)]*\)\s*|<img[^>]*>\s*")


@dataclass(frozen=True)
class ServedModel:
    """A model in eval mode.

    Attributes:
        label: its name on the page; of a folder no more than its last part.
        tokenizer: the model itself, made fast.
        weights: SHA-256 of its encoder and codebooks, by which token files know it.
        hash: `weights_hash` of the whole model.
        folder: with its files; None for a Hub id.
    """

    label: str
    tokenizer: DualCodebookVQModel
    weights: str
    hash: str
    folder: Path | None

    @cached_property
    def colours(self) -> list[np.ndarray]:
        """Of each codebook, in the order of the tokens: (N, 3) uint8, alike for codes that are alike."""
        return [code_colours(codebook.codes()) for codebook in self.tokenizer.quantize.codebooks.values()]

    @property
    def codebooks(self) -> list[str]:
        """Their names, in the order of the tokens."""
        return list(self.tokenizer.codebook_sizes)

    def rate(self) -> str:
        """What the tokens of a picture take, in a sentence."""
        model = self.tokenizer
        factor, sizes = model.downsample_factor, list(model.codebook_sizes.values())
        side = -(-SIDE // factor)
        count = token_bytes((side, side), model.bits_per_position)
        rate = bits_per_pixel(side * side, model.bits_per_position, SIDE, SIDE)
        tokens = " and ".join(f"one of {size:,} {name}codes" for name, size in zip(self._names(), sizes, strict=True))
        return (
            f"{factor} x {factor} pixels become {tokens}: {rate:.4g} bits per pixel, "
            f"{count:,} bytes for {SIDE} x {SIDE} pixels."
        )

    def card(self) -> str:
        """The model card as Markdown, without its pictures, or a link to it; empty where there is none."""
        if self.folder is None:
            return f"[{self.label}]({HUB}/{self.label})"
        path = self.folder / "README.md"
        if not path.is_file():
            return ""
        text = _IMAGE.sub("", _FRONT_MATTER.sub("", path.read_text(encoding="utf-8", errors="replace")))
        return re.sub(r"^#", "##", text, flags=re.MULTILINE)  # below the page's own heading

    def _names(self) -> list[str]:
        return [f"{name} " for name in self.codebooks] if len(self.codebooks) > 1 else [""]


def load_models(names: Sequence[str] | None) -> dict[str, ServedModel]:
    """Models by label; without names both decoders of the embedded checkpoint.

    Raises ValueError, naming the model, for one that cannot be loaded or does not take RGB images.
    """
    models: dict[str, ServedModel] = {}
    for name in names or map(default_checkpoint, EMBEDDED_FOLDERS):
        model, weights = load_tokenizer_with_hash(name, argument="models")
        place, whole = tokenizer_folder(name, "models"), weights_hash(model)
        label = embedded_label(place) or public_name(place)
        if (model.config.in_channels, model.config.out_channels) != (3, 3):
            raise ValueError(f"the model '{name}' must have 3 channels, got {model.config.in_channels}")
        label = label if label not in models else f"{label} ({len(models) + 1})"
        folder = Path(place).expanduser()
        known = folder if folder.is_dir() else None
        models[label] = ServedModel(label, optimize_for_inference(model), weights, whole, known)
    return models


def links() -> dict[str, str]:
    """Addresses by what stands there: the paper, the page's own model card and, on a Space, the code beside app.py."""
    found = {"Paper": PAPER, "Model card": "#card"}
    if space := os.environ.get("SPACE_ID"):
        found["Code"] = f"{HUB}/spaces/{space}/tree/main"
    return found
