"""The files of the Space: the demo's entry point, its page, its requirements, and this package beside them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import SpaceCardData

from .. import packages

PACKAGE = Path(__file__).parents[1]
EXTRA = "space"
SDK = "gradio"
SDK_VERSION = "6.31.0"
APP = '''"""The Space: the checkpoints inside the package, or those that DUALCODEBOOK_MODELS names (Hub ids)."""

import os

from dualcodebook_hf.demo import build_demo, launch_options

models = os.environ.get("DUALCODEBOOK_MODELS", "{models}").split()
demo = build_demo(models or None)

if __name__ == "__main__":
    demo.launch(**launch_options())
'''
TEXT = """
# Dual Codebook VQ

An image tokenizer with two codebooks: see what each of them keeps of an image. Upload one, and look at its tokens, at
its reconstruction, and at what is left of it when one codebook is decoded alone; paint another picture's tokens into
it, and compare two models on one slider.

The Space shows `dualcodebook_hf`, an independent implementation of
[Dual Codebook VQ](https://arxiv.org/abs/2503.10832), whose source lies beside `app.py`. It runs on a CPU with the
checkpoints inside the package; set the variable `DUALCODEBOOK_MODELS` to Hub ids, with spaces between them, to show
other models. `dualcodebook push --space you/name` publishes a copy.
"""
STATIC_BUILD = Path("build", "static-space")  # where `make static-space` writes
STATIC_FILES = ("index.html", "build.json", "README.md", "onnx/tokenizer.json")
STATIC_TEXT = """
# Dual Codebook VQ in the browser

An image tokenizer with two codebooks that runs on the visitor's machine, by WebGPU where there is one, else by WASM:
a picture becomes two grids of tokens and comes back. Nothing is uploaded, and nothing is fetched from elsewhere.

Made by [Dual Codebook VQ](https://arxiv.org/abs/2503.10832)'s independent implementation `dualcodebook_hf`: `make
static-space`, then `dualcodebook push --space you/name --static`. `onnx/` holds the tokenizer in float16, `ort/`
onnxruntime-web (MIT), `examples/` pictures of scikit-image: astronaut and rocket (NASA, SpaceX; public domain), coffee
(Rachel Michetti, CC0), chelsea (Stefan van der Walt, CC0).
"""


def app_source(models: Sequence[str] = ()) -> str:
    """app.py, with `demo`, a gr.Blocks.

    Args:
        models: Hub ids shown where DUALCODEBOOK_MODELS is not set; none: the embedded checkpoints.
    """
    return APP.replace("{models}", " ".join(models))


def readme(models: Sequence[str] = ()) -> str:
    """README.md, whose front matter is the Space's configuration."""
    data = SpaceCardData(
        title="Dual Codebook VQ",
        emoji="🧩",
        colorFrom="indigo",
        colorTo="yellow",
        sdk=SDK,
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


def static_readme() -> str:
    """README.md of the Space that runs in the browser; its headers allow WASM to use several threads."""
    data = SpaceCardData(
        title="Dual Codebook VQ in the browser",
        emoji="🧩",
        colorFrom="indigo",
        colorTo="yellow",
        sdk="static",
        app_file="index.html",
        license="apache-2.0",
        pinned=False,
        short_description="Images to two grids of tokens, on your machine",
        custom_headers={
            "cross-origin-embedder-policy": "require-corp",
            "cross-origin-opener-policy": "same-origin",
            "cross-origin-resource-policy": "cross-origin",
        },
        tags=["image-tokenizer", "vector-quantization", "dual-codebook", "onnx"],
    )
    return f"---\n{data.to_yaml()}\n---\n{STATIC_TEXT}"


def check_static_space(built: str | Path, argument: str = "static") -> None:
    """Raises ValueError unless `built` is a folder that `make static-space` wrote; `argument`: what it is called."""
    missing = [name for name in STATIC_FILES if not (Path(built) / name).is_file()]
    if missing:
        raise ValueError(
            f"`{argument}` must be the folder that `make static-space` writes, got '{built}' without {missing[0]}"
        )


def requirements() -> str:
    """requirements.txt: the base install and the extra `space`, without gradio, which the Space brings itself."""
    needed = [*packages.requirements(), *packages.requirements(EXTRA)]
    return "".join(f"{requirement}\n" for requirement in needed if requirement.name != SDK)


def write_space(folder: str | Path, models: Sequence[str] = ()) -> None:
    """Writes the Space's three files and this package, checkpoint included.

    Args:
        folder: must hold no folder of the package's name.
        models: see `app_source`.
    """
    folder = Path(folder)
    hidden = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=hidden)
    texts = {"app.py": app_source(models), "README.md": readme(models), "requirements.txt": requirements()}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
