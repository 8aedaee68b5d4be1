"""A generator by name: the embedded one, a folder or a Hub id."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AmusedScheduler
from huggingface_hub import snapshot_download

from ..autoencoder_dualcodebook import DualCodebookVQModel
from ..files import read_json
from ..loading import (
    PIPELINE_INDEX,
    check_cache,
    check_device,
    check_generator_name,
    default_generator,
    naming_the_source,
)
from .pipeline import DualCodebookMaskGenerationPipeline
from .schedulers import MaskedTokenScheduler
from .transformer import DualCodebookTransformer

SCHEDULERS = {kind.__name__: kind for kind in (MaskedTokenScheduler, AmusedScheduler)}
FILES = [PIPELINE_INDEX, "*/*.json", "*/*.safetensors"]  # no code


def load_generator(
    name: str | None = None, *, device: str | None = None, dtype: str = "float32", argument: str = "model"
) -> DualCodebookMaskGenerationPipeline:
    """A pipeline that draws images; no code of its folder is run.

    Args:
        name: folder or Hub id; None: the embedded generator.
        device: None: CUDA where there is one, else the CPU.
        dtype: float32, bfloat16 or float16; the codebooks stay in float32.
        argument: what messages call `name`.

    Raises ValueError that names the generator when it cannot be loaded.
    """
    check_generator_name(name, argument)
    device = check_device(device)
    name = name or default_generator()
    local = Path(name).expanduser().is_dir()
    if not local:
        check_cache(name, argument, PIPELINE_INDEX)
    with naming_the_source(name, argument):
        folder = Path(name).expanduser() if local else Path(snapshot_download(name, allow_patterns=FILES))
        index = read_json(folder / PIPELINE_INDEX)
        if index is None:
            raise ValueError(f"there is no {PIPELINE_INDEX} in it: it is not a generator")
        named = index.get("scheduler")
        kind = SCHEDULERS.get(str(named[-1])) if isinstance(named, list) and named else None
        if kind is None:
            raise ValueError(f"`scheduler` in {PIPELINE_INDEX} must be one of {', '.join(SCHEDULERS)}, got {named!r}")
        # In float32, in which the pipeline compares the tokenizer's weights with those that the transformer names.
        pipeline = DualCodebookMaskGenerationPipeline(
            DualCodebookVQModel.from_pretrained(folder / "vqvae", dtype=torch.float32),
            DualCodebookTransformer.from_pretrained(folder / "transformer", dtype=torch.float32),
            kind.from_pretrained(folder / "scheduler"),
            index.get("id2label"),
        )
    pipeline.vqvae.cast_backbone(getattr(torch, dtype))
    torch.nn.Module.to(pipeline.transformer, getattr(torch, dtype))  # diffusers' own warns of any type
    return pipeline.to(device)
