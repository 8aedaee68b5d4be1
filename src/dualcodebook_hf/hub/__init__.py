"""Publishing on the Hugging Face Hub: tokenizers with their cards and code, pipelines that hold one, the Space."""

from .card import model_card
from .export import export_code, export_pipeline, prepare_folder
from .push import check_access, check_repo_id, push_model, push_pipeline, push_space
from .records import Records
from .space import write_space

__all__ = [
    "Records",
    "check_access",
    "check_repo_id",
    "export_code",
    "export_pipeline",
    "model_card",
    "prepare_folder",
    "push_model",
    "push_pipeline",
    "push_space",
    "write_space",
]
