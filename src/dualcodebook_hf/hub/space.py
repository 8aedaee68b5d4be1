"""The files of the Space: the demo's entry point, its page, its requirements, and this package beside them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import SpaceCardData

PACKAGE = Path(__file__).parents[1]
SDK_VERSION = "6.31.0"
# The base install's, as in pyproject.toml, and the examples'; the Space itself brings gradio of `SDK_VERSION`.
REQUIREMENTS = (
    "torch>=2.6",
    "diffusers>=0.35",
    "transformers>=5.0",
    "huggingface_hub>=1.0",
    "safetensors>=0.4.3",
    "numpy>=1.26",
    "pillow>=10.1",
    "pyyaml>=6.0",
    "scikit-image>=0.24",  # whose wheel holds the example pictures
)
APP = '''"""The Space: the checkpoint inside the package, or those that DUALCODEBOOK_MODELS names (Hub ids)."""

import os

from dualcodebook_hf.demo import build_demo, launch_options

models = os.environ.get("DUALCODEBOOK_MODELS", "{models}").split()
demo = build_demo(models or None)

if __name__ == "__main__":
    demo.launch(**launch_options())
'''
TEXT = """
# Dual Codebook VQ

An image tokenizer with two codebooks: see what each of them keeps of a picture. Upload one, and look at its tokens, at
its reconstruction, and at what is left when one book speaks alone.

The Space shows `dualcodebook_hf`, an independent implementation of
[Dual Codebook VQ](https://arxiv.org/abs/2503.10832), whose source lies beside `app.py`. It runs on a CPU with the
checkpoint inside the package; set the variable `DUALCODEBOOK_MODELS` to Hub ids, with spaces between them, to show
other models. `dualcodebook push --space you/name` publishes a copy.
"""


def app_source(models: Sequence[str] = ()) -> str:
    """app.py: `demo`, a gr.Blocks. `models`: shown where DUALCODEBOOK_MODELS is not set; none: the embedded one."""
    return APP.replace("{models}", " ".join(models))


def readme(models: Sequence[str] = ()) -> str:
    """README.md, whose front matter is the Space's configuration."""
    data = SpaceCardData(
        title="Dual Codebook VQ",
        emoji="🧩",
        colorFrom="indigo",
        colorTo="yellow",
        sdk="gradio",
        sdk_version=SDK_VERSION,
        python_version="3.11",
        app_file="app.py",
        license="apache-2.0",
        pinned=False,
        short_description="Images to two grids of tokens and back",
        models=list(models) or None,
        tags=["image-tokenizer", "vector-quantization", "dual-codebook"],
    )
    return f"---\n{data.to_yaml()}\n---\n{TEXT}"


def requirements() -> str:
    """requirements.txt: the base install."""
    return "\n".join(REQUIREMENTS) + "\n"


def write_space(folder: str | Path, models: Sequence[str] = ()) -> None:
    """Writes the Space's three files and this package, checkpoint included, into a folder."""
    folder = Path(folder)
    hidden = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=hidden)
    for name, text in {"app.py": app_source(models), "README.md": readme(models)}.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "requirements.txt").write_text(requirements())
