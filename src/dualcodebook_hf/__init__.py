"""Dual Codebook VQ (arXiv 2503.10832) for the Hugging Face ecosystem: an image tokenizer with two codebooks.

Names are imported when they are asked for; transformers and diffusers know the classes all the same (registration.py).
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from .packages import check_versions
from .registration import register_when_imported
from .version import __version__

if TYPE_CHECKING:
    from .autoencoder_dualcodebook import DualCodebookVQModel
    from .configuration_dualcodebook import DualCodebookConfig
    from .core import DualCodebookOutput
    from .generation.pipeline import DualCodebookMaskGenerationPipeline
    from .generation.schedulers import MaskedTokenScheduler
    from .generation.transformer import DualCodebookTransformer
    from .image_processing_dualcodebook import DualCodebookImageProcessor
    from .loading import default_checkpoint, default_generator
    from .modeling_dualcodebook import DualCodebookModel, DualCodebookModelOutput

__all__ = [
    "DualCodebookConfig",
    "DualCodebookImageProcessor",
    "DualCodebookMaskGenerationPipeline",
    "DualCodebookModel",
    "DualCodebookModelOutput",
    "DualCodebookOutput",
    "DualCodebookTransformer",
    "DualCodebookVQModel",
    "MaskedTokenScheduler",
    "__version__",
    "default_checkpoint",
    "default_generator",
]

_MODULES = {
    "DualCodebookConfig": "configuration_dualcodebook",
    "DualCodebookImageProcessor": "image_processing_dualcodebook",
    "DualCodebookMaskGenerationPipeline": "generation.pipeline",
    "DualCodebookModel": "modeling_dualcodebook",
    "DualCodebookModelOutput": "modeling_dualcodebook",
    "DualCodebookOutput": "core",
    "DualCodebookTransformer": "generation.transformer",
    "DualCodebookVQModel": "autoencoder_dualcodebook",
    "MaskedTokenScheduler": "generation.schedulers",
    "default_checkpoint": "loading",
    "default_generator": "loading",
}

check_versions()  # before an import fails deep inside of a library
register_when_imported()


if not TYPE_CHECKING:  # a type checker would take any name for one of the package

    def __getattr__(name: str) -> object:
        """A public name, or a module of the package, imported when it is asked for first (PEP 562)."""
        if name in _MODULES:
            value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
        elif not name.startswith("_") and find_spec(f".{name}", __name__):
            value = import_module(f".{name}", __name__)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
