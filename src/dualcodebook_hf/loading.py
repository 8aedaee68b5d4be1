"""A tokenizer by name: the embedded checkpoint, a folder or a Hub id."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import SafetensorError

from .autoencoder_dualcodebook import DualCodebookVQModel
from .files import public_name
from .run_folder import CONFIG

EMBEDDED = "embedded checkpoint"
_HUB_ID = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")


def default_checkpoint() -> str:
    """Folder of the embedded checkpoint, inside the package; `from_pretrained` takes it like any other."""
    return str(Path(__file__).parent / "checkpoints" / "tiny")


def tokenizer_label(name: str | None) -> str:
    """What a tokenizer is called in tables and on pages; of a local folder the last two parts of its path."""
    return EMBEDDED if name in (None, default_checkpoint()) else public_name(name, parts=2)


def check_tokenizer_name(name: str | None, argument: str = "model") -> None:
    """Raises ValueError unless `name` is None (the embedded one), a folder with a config.json, or a Hub id.

    Args:
        argument: what the message calls `name`.
    """
    path = Path(name or default_checkpoint()).expanduser()
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise ValueError(f"`{argument}`: there is no {CONFIG} in the folder '{path}'")
    elif name is None:
        raise ValueError(f"the checkpoint inside the package is missing: '{path}'; name another by `{argument}`")
    elif path.exists() or not _HUB_ID.fullmatch(name):
        raise ValueError(f"`{argument}` must be a folder or a Hub id (owner/name), got '{name}', which is neither")


def check_device(device: str | None, argument: str = "device") -> str:
    """The device, or CUDA's where there is one and none is named. Raises ValueError when it cannot be used."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises where there is no CUDA
        raise ValueError(f"`{argument}` {device} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def load_tokenizer(
    name: str | None = None, *, device: str | None = None, dtype: str = "float32", argument: str = "model"
) -> DualCodebookVQModel:
    """A tokenizer in eval mode.

    Args:
        name: folder or Hub id; None: the embedded checkpoint.
        device: None: CUDA where there is one, else the CPU.
        dtype: of the network, float32, bfloat16 or float16; the codebooks stay in float32.
        argument: what messages call `name`.

    Raises ValueError that names the tokenizer when it cannot be loaded.
    """
    check_tokenizer_name(name, argument)
    path = Path(name or default_checkpoint()).expanduser()
    source = path if path.is_dir() else name
    try:
        model = DualCodebookVQModel.from_pretrained(source, dtype=getattr(torch, dtype))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot load the model '{source}': {error}") from error
    return model.eval().to(check_device(device))
