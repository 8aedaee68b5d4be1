"""Dual Codebook VQ (arXiv 2503.10832) for the Hugging Face ecosystem: an image tokenizer with two codebooks."""

from __future__ import annotations

from .packages import check_versions

check_versions()  # before an import fails deep inside of a library

# isort: split
from transformers import AutoConfig, AutoImageProcessor, AutoModel
from transformers.pipelines import PIPELINE_REGISTRY

from .autoencoder_dualcodebook import DualCodebookVQModel
from .configuration_dualcodebook import DualCodebookConfig
from .core import DualCodebookOutput
from .image_processing_dualcodebook import DualCodebookImageProcessor
from .loading import default_checkpoint
from .modeling_dualcodebook import DualCodebookModel, DualCodebookModelOutput
from .reconstruction_pipeline import TASK, ImageReconstructionPipeline
from .version import __version__

__all__ = [
    "DualCodebookConfig",
    "DualCodebookImageProcessor",
    "DualCodebookModel",
    "DualCodebookModelOutput",
    "DualCodebookOutput",
    "DualCodebookVQModel",
    "__version__",
    "default_checkpoint",
]

AutoConfig.register(DualCodebookConfig.model_type, DualCodebookConfig, exist_ok=True)
AutoModel.register(DualCodebookConfig, DualCodebookModel, exist_ok=True)
AutoImageProcessor.register(
    DualCodebookConfig, image_processor_classes={"pil": DualCodebookImageProcessor}, exist_ok=True
)
PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=ImageReconstructionPipeline, pt_model=AutoModel, type="image")

# Without it a saved pipeline would carry a copy of its code, and want trust_remote_code where the package is there.
del ImageReconstructionPipeline._registered_impl
