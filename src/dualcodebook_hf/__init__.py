"""Dual Codebook VQ (arXiv 2503.10832) for the Hugging Face ecosystem: an image tokenizer with two codebooks."""

from __future__ import annotations

from pathlib import Path

from .autoencoder_dualcodebook import DualCodebookVQModel
from .configuration_dualcodebook import DualCodebookConfig
from .core import DualCodebookOutput
from .image_processing_dualcodebook import DualCodebookImageProcessor
from .version import __version__

__all__ = [
    "DualCodebookConfig",
    "DualCodebookImageProcessor",
    "DualCodebookOutput",
    "DualCodebookVQModel",
    "__version__",
    "default_checkpoint",
]


def default_checkpoint() -> str:
    """Folder of the embedded checkpoint, inside the package; `from_pretrained` takes it like any other."""
    return str(Path(__file__).parent / "checkpoints" / "tiny")
