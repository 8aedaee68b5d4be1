"""What the Hub's page of a repository shows under "Use this model": its own public rule, told again in Python.

Source: github.com/huggingface/huggingface.js, packages/tasks/src, read in November 2026: `transformers` in
model-libraries-snippets.ts, LIBRARY_TASK_MAPPING in library-to-tasks.ts, `TransformersInfo` in model-data.ts. What the
Hub's server finds out by itself is not public: `auto_model` is taken from config.json's `auto_map` here; `processor`,
which the server knows for some model types, is an argument.
"""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import ModelCard

LIBRARIES = ("transformers", "diffusers")  # those that could be meant here
TRANSFORMERS_TASKS = {"image-classification", "image-feature-extraction", "image-segmentation", "image-to-image"}


def shown_libraries(folder: Path) -> list[str]:
    """The libraries in the menu: the card's `library_name`, and every tag that names one."""
    data = ModelCard.load(folder / "README.md").data
    return [name for name in LIBRARIES if name == data.library_name or name in (data.tags or [])]


def transformers_snippets(folder: Path, repo_id: str, processor: str | None) -> list[str]:
    """The snippets for `transformers`; `processor` is the class that the server knows, if it knows one."""
    data = ModelCard.load(folder / "README.md").data
    auto_map = json.loads((folder / "config.json").read_text()).get("auto_map", {})
    [auto_model] = [name for name in auto_map if name.startswith("AutoModel")]
    remote = ", trust_remote_code=True" if auto_map else ""  # the tag `custom_code`
    if processor:
        direct = [
            f"from transformers import {processor}, {auto_model}",
            f'processor = {processor}.from_pretrained("{repo_id}"{remote})',
            f'model = {auto_model}.from_pretrained("{repo_id}"{remote})',
        ]
    else:
        direct = [
            f"from transformers import {auto_model}",
            f'model = {auto_model}.from_pretrained("{repo_id}"{remote}, dtype="auto")',
        ]
    snippets = ["\n".join(direct)]
    if data.pipeline_tag in TRANSFORMERS_TASKS:
        task = f'pipe = pipeline("{data.pipeline_tag}", model="{repo_id}"{remote})'
        snippets.insert(0, f"from transformers import pipeline\n{task}")
    return snippets
