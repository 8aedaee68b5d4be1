"""Weights that are loaded whole and fitting, or not at all: what every `from_pretrained` asks of a checkpoint."""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from diffusers.utils import WEIGHTS_NAME as DIFFUSERS_PICKLE_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME, cached_file

from .files import read_json

# What finds a file of a model; the other arguments of `from_pretrained` are for the weights.
LOCATION_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
# Of diffusers and of transformers: whole files; the index of shards has another ending.
WEIGHTS_NAMES = (SAFETENSORS_WEIGHTS_NAME, DIFFUSERS_PICKLE_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME)
# The parts of a tokenizer that turn an image into tokens; `train: decoder` leaves them as they are.
TOKEN_PARTS = ("encoder", "quant_conv", "quantize", "linear_encoder")
LONGEST_NAME = 255  # of a file, in nearly every file system
# What only damaged files make the libraries raise.
DAMAGED = (SafetensorError, zipfile.BadZipFile, RecursionError, pickle.UnpicklingError)
SAVE_AGAIN = "config.json and weights must come from one call of `save_pretrained`"


def check_weights(
    model: nn.Module,
    state: Mapping[str, torch.Tensor] | None,
    files: Sequence[str | Path],
    *,
    ignore_mismatched_sizes: bool = False,
) -> None:
    """Raises ValueError, naming file and tensors, unless the weights fit `model`, all of them, and are finite.

    Names, shapes and types are compared before any value is read, and nothing is allocated for them.

    Args:
        model: its parameters may lie on the meta device.
        state: the content of the file, where it was read already.
        files: where the weights lie; several when they are in shards.
        ignore_mismatched_sizes: let tensors of another shape pass.
    """
    found: dict[str, torch.Tensor] = {}
    for part in [state] if state is not None else map(_read, files):
        found.update(part)
    expected = model.state_dict()
    common = [name for name in found if name in expected]
    shapes = [name for name in common if found[name].shape != expected[name].shape]
    reshaped = [f"{name} {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}" for name in shapes]
    types = [
        f"{name} {_kind(found[name])} instead of {_kind(expected[name])}"
        for name in common
        if not same_kind(found[name], expected[name])
    ]
    problems = {
        "missing": [name for name in expected if name not in found],
        "unknown": [name for name in found if name not in expected],
        "of another shape": [] if ignore_mismatched_sizes else reshaped,
        "of another type": types,
    }
    _refuse(problems, files, f"do not fit their config.json: {SAVE_AGAIN}")
    if files:
        check_size(found.values(), files)
    infinite = [name for name in found if not is_finite(found[name])]
    _refuse({"with NaN or infinity": infinite}, files, "are damaged, or their training diverged: take an earlier save")


def check_range(model: nn.Module) -> None:
    """Raises ValueError where weights, finite before, became infinite in float16, which ends at 65504."""
    half = {name: weight for name, weight in model.state_dict().items() if weight.dtype == torch.float16}
    infinite = [name for name, weight in half.items() if not weight.is_meta and not is_finite(weight)]
    if infinite:
        raise ValueError(
            f"`dtype` must hold all weights, got torch.float16, whose largest number is 65504 and in which "
            f"{len(infinite)} tensors are infinite ({some(infinite)}): take torch.bfloat16 or torch.float32"
        )


def _refuse(problems: Mapping[str, Sequence[str]], files: Sequence[str | Path], verdict: str) -> None:
    told = [f"{len(names)} tensors {what} ({some(names)})" for what, names in problems.items() if names]
    if told:
        where = ", ".join(f"'{file}'" for file in files) or "the state dict"
        raise ValueError(f"the weights in {where} {verdict}; {'; '.join(told)}")


def some(names: Iterable[str], count: int = 5) -> str:
    """The first names, and how many more there are."""
    names = [str(name) for name in names]
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _read(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, mapped and not read; of a pickle nothing but weights."""
    if str(path).endswith(".safetensors"):
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def same_kind(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Both floating point, of any precision, or both of one integer type; with all values there."""
    if one.layout is not torch.strided or one.is_meta:
        return False
    return one.is_floating_point() if other.is_floating_point() else one.dtype == other.dtype


def check_size(tensors: Iterable[torch.Tensor], files: Sequence[str | Path]) -> None:
    """Raises ValueError where tensors are larger than their files: a few numbers, repeated until memory is full."""
    claimed, there = sum(tensor.nbytes for tensor in tensors), sum(Path(file).stat().st_size for file in files)
    if claimed > there:
        where = ", ".join(f"'{file}'" for file in files)
        raise ValueError(f"{where} must hold all numbers of its tensors: they take {claimed} bytes, the file {there}")


def _kind(tensor: torch.Tensor) -> str:
    return str(tensor.dtype) if tensor.layout is torch.strided else f"{tensor.dtype} {tensor.layout}"


def is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # Least and largest need no memory, unlike `isfinite`; float8 has neither. A float64 must fit a float32 too.
    least_and_largest = (tensor.float() if tensor.element_size() == 1 else tensor).aminmax()
    return bool(torch.stack(least_and_largest).float().isfinite().all())


# --- files


def find_weights(source: str | os.PathLike, name: str, variant: str | None = None, **location) -> Path | None:
    """A weights file, or the index of its shards; None where there is neither.

    Args:
        source: folder or Hub id.
        name: of the whole file, such as model.safetensors.
        variant: "fp16" finds model.fp16.safetensors.
        **location: those of `LOCATION_ARGUMENTS`.
    """
    for candidate in (name, f"{name}.index.json"):
        if found := _find_file(source, _of_variant(candidate, variant), **location):
            return found
    return None


def find_shards(index: Path, source: str | os.PathLike, **location) -> list[Path]:
    """The files that an index names. Raises ValueError for a damaged one and for a file that is not beside it."""
    shards = []
    for name in _read_index(index):
        found = _find_file(source, name, **location)
        if found is None:
            raise ValueError(f"'{index}' names the file '{name}', which does not lie beside it")
        shards.append(found)
    return shards


def _read_index(index: Path) -> list[str]:
    """The files that it names. Raises ValueError for one that the libraries cannot read."""
    content = read_json(index) or {}
    entries = content.get("weight_map")
    names = list(entries.values()) if isinstance(entries, dict) else []
    if not names or not all(isinstance(name, str) for name in names) or not isinstance(content.get("metadata"), dict):
        raise ValueError(
            f"'{index}' must hold an object `metadata` and an object `weight_map`, tensors' names to files' names: "
            "download or save the model again"
        )
    _check_beside(index, names)
    return sorted(set(names))


def _check_beside(index: Path, names: Iterable[str]) -> None:
    for name in names:
        if name in ("", "..") or Path(name).name != name or len(name) > LONGEST_NAME or not name.isprintable():
            raise ValueError(f"'{index}' names the file {name[:LONGEST_NAME]!r}, which does not lie beside it")


def _of_variant(name: str, variant: str | None) -> str:
    stem, suffix = name.rsplit(".", 1)
    return f"{stem}.{variant}.{suffix}" if variant else name


def _find_file(source: str | os.PathLike, name: str, **location) -> Path | None:
    found = cached_file(
        str(source),
        name,
        **{**location, "subfolder": location.get("subfolder") or ""},
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def missing_weights(source: str | os.PathLike, subfolder: str | None = None, variant: str | None = None) -> str:
    """The message where there are no weights that can be read: what is there instead, and what to do."""
    folder = Path(source) / (subfolder or "")
    stems = {Path(name).stem for name in WEIGHTS_NAMES}
    there = sorted(path.name for stem in stems for path in folder.glob(f"{stem}*")) if folder.is_dir() else []
    wanted = f"weights of the variant {variant!r}" if variant else "weights (safetensors)"
    if there:
        remedy = f"there is {some(there)}: name its `variant`, or load it where it was saved and save it again"
    else:
        remedy = f"save the model there; {SAVE_AGAIN}"
    return f"there are no {wanted} in '{folder}'; {remedy}"


@contextmanager
def readable(source: str | os.PathLike | None, options: Mapping[str, Any]) -> Iterator[None]:
    """What the libraries raise for damaged files and for none, as errors that name them and say what to do.

    Args:
        source: folder or Hub id.
        options: the arguments of `from_pretrained`.
    """
    _check_indices(source, options)
    try:
        yield
    except (*DAMAGED, LookupError, AttributeError, TypeError, ValueError, OSError) as error:
        _check_json(source, options)
        if isinstance(error, DAMAGED):
            raise ValueError(f"the files in '{source}' are damaged: {error}; download or save them again") from error
        if isinstance(error, OSError):
            place = {"subfolder": options.get("subfolder"), "variant": options.get("variant")}
            folder = Path(source or "") / (place["subfolder"] or "")
            if (folder / "config.json").is_file() and not any(
                find_weights(source or "", name, **place) for name in WEIGHTS_NAMES
            ):
                raise OSError(missing_weights(source or "", **place)) from error
        raise


def _check_indices(source: str | os.PathLike | None, options: Mapping[str, Any]) -> None:
    """Raises ValueError for an index in a folder that names files elsewhere: the libraries open what it names."""
    if source is None:
        return
    for index in Path(source, options.get("subfolder") or "").glob("*.index*.json"):
        content: Any = {}
        with suppress(OSError, ValueError):  # a damaged one may not be what is loaded; its readers say so
            content = read_json(index) or {}
        entries = content.get("weight_map")
        if isinstance(entries, dict):
            _check_beside(index, (entry for entry in entries.values() if isinstance(entry, str)))


def _check_json(source: str | os.PathLike | None, options: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the file, for a config.json or an index of shards that is damaged.

    The libraries read them without checking. Only what is on the disk already is looked at, in the order in which it
    may have been read.
    """
    if source is None:
        return
    location = {name: options[name] for name in LOCATION_ARGUMENTS if name in options}
    location |= {"local_files_only": True, "force_download": False}
    indices = [_of_variant(f"{name}.index.json", options.get("variant")) for name in WEIGHTS_NAMES]
    for name, read in (("config.json", read_json), *((index, _read_index) for index in indices)):
        found = None
        with suppress(OSError, ValueError):  # no name of a folder or repository
            found = _find_file(source, name, **location)
        if found is not None:
            read(found)


class StrictWeights:
    """In front of diffusers' ModelMixin: loads weights whole and fitting, or raises ValueError."""

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, resolved_model_file, *args, **kwargs) -> tuple:
        # The one place that every way of loading passes, with the files found and the model without its weights.
        loose = kwargs.get("ignore_mismatched_sizes", False)
        check_weights(model, state_dict, resolved_model_file, ignore_mismatched_sizes=loose)
        loaded = super()._load_pretrained_model(  # type: ignore[misc]
            model, state_dict, resolved_model_file, *args, **kwargs
        )
        check_range(model)
        return loaded


def weights_hash(model: nn.Module) -> str:
    """SHA-256, as 64 hex digits, of all values of a model as float32, with their names and shapes.

    It is the same whatever library, file format, number of shards or type of at least these values a model was saved
    in. A model loaded in a lower precision than that of its file has rounded values and another hash.
    """
    return _digest(model.state_dict())


def encoder_hash(tokenizer: nn.Module) -> str:
    """As `weights_hash`, of encoder and codebooks alone: what decides an image's tokens and the vectors they stand for.

    It is what token files, token data sets and generators name. A decoder that was trained further changes no token, so
    that several decoders read the same ones. `load_tokenizer_with_hash` gives it for a tokenizer in any precision.
    """
    return _digest({name: v for name, v in tokenizer.state_dict().items() if name.split(".")[0] in TOKEN_PARTS})


def made_tokens(tokenizer: nn.Module, sha256: str, own: str | None = None) -> bool:
    """Whether tokens whose file or generator names this hash are the tokenizer's.

    Args:
        tokenizer: with the values of its file.
        sha256: `encoder_hash`, or what files of older versions have instead, `weights_hash`.
        own: `encoder_hash(tokenizer)`, where it is known already.
    """
    return sha256 == (own or encoder_hash(tokenizer)) or sha256 == weights_hash(tokenizer)


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else torch.int64).contiguous()
        digest.update(f"{name} {list(values.shape)} ".encode())
        digest.update(values.numpy().data)
    return digest.hexdigest()
