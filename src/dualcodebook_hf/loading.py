"""A tokenizer by name: an embedded checkpoint, a folder or a Hub id."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .files import public_name
from .run_folder import CONFIG

if TYPE_CHECKING:
    from .autoencoder_dualcodebook import DualCodebookVQModel

EMBEDDED = "embedded checkpoint"
SHARP, FAITHFUL = "sharp", "faithful"
EMBEDDED_FOLDERS = {SHARP: "tiny", FAITHFUL: "faithful"}  # of one encoder and the same codebooks
EMBEDDED_LABELS = {SHARP: EMBEDDED, FAITHFUL: f"{EMBEDDED}, {FAITHFUL}"}
PIPELINE_INDEX = "model_index.json"  # of a folder that holds a pipeline of diffusers
_HUB_ID = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")


def default_checkpoint(decoder: str = SHARP) -> str:
    """Folder of an embedded checkpoint, inside the package; `from_pretrained` takes it like any other.

    There are two decoders for the same tokens.

    Args:
        decoder: "sharp", trained for how images look, or "faithful", trained for pixels alone.

    Raises ValueError for another one.
    """
    if decoder not in EMBEDDED_FOLDERS:
        raise ValueError(f"`decoder` must be one of {', '.join(EMBEDDED_FOLDERS)}, got {decoder!r}")
    return str(Path(__file__).parent / "checkpoints" / EMBEDDED_FOLDERS[decoder])


def tokenizer_folder(name: str | None, argument: str = "model") -> str:
    """What `name` stands for: the folder of an embedded checkpoint (None, `sharp`, `faithful`), else itself.

    Raises ValueError where a folder of such a name is here too.

    Args:
        name: of a tokenizer, as users give it.
        argument: what the message calls it.
    """
    if name is None:
        return default_checkpoint()
    if name not in EMBEDDED_FOLDERS:
        return name
    if Path(name).exists():
        raise ValueError(
            f"`{argument}`: '{name}' is a decoder of the embedded checkpoint, and there is '{Path(name).absolute()}'; "
            f"write './{name}' for the folder"
        )
    return default_checkpoint(name)


def embedded_label(path: str) -> str | None:
    """What the embedded checkpoint of that path is called, on any machine; None for other paths."""
    end = "/" + str(path).replace("\\", "/").strip("/")
    for name, folder in EMBEDDED_FOLDERS.items():
        if end.endswith(f"/dualcodebook_hf/checkpoints/{folder}"):
            return EMBEDDED_LABELS[name]
    return None


def default_generator() -> str:
    """Folder of the embedded generator, inside the package, as `default_checkpoint`.

    Raises ValueError while there is none.
    """
    folder = Path(__file__).parent / "checkpoints" / "generator"
    if not (folder / PIPELINE_INDEX).is_file():
        raise ValueError(f"there is no generator inside the package: '{folder}' is missing; name another by `model`")
    return str(folder)


def tokenizer_label(name: str | None) -> str:
    """What a tokenizer is called in tables and on pages; of a local folder the last two parts of its path."""
    folder = tokenizer_folder(name)
    return embedded_label(folder) or public_name(folder, parts=2)


def check_tokenizer_name(name: str | None, argument: str = "model") -> None:
    """Raises ValueError unless `name` is an embedded one's (or None), a folder with a config.json, or a Hub id.

    Args:
        argument: what the message calls `name`.
    """
    folder = tokenizer_folder(name, argument)
    if folder != name and not Path(folder).is_dir():
        raise ValueError(f"the checkpoint inside the package is missing: '{folder}'; name another by `{argument}`")
    _check_name(folder, argument, CONFIG)


def check_generator_name(name: str | None, argument: str = "model") -> None:
    """Raises ValueError unless `name` is a pipeline's folder, or a Hub id, or None and there is one in the package."""
    try:
        _check_name(name or default_generator(), argument, PIPELINE_INDEX)
    except ValueError as error:
        raise ValueError(str(error).replace("`model`", f"`{argument}`")) from error


def _check_name(name: str, argument: str, file: str) -> None:
    """Raises ValueError unless `name` is a folder that holds `file`, or a Hub id."""
    try:
        path = Path(name).expanduser()
        there, is_folder = path.exists(), path.is_dir()
    except (OSError, RuntimeError) as error:  # too long for a path, or in the home of a user that does not exist
        raise ValueError(f"`{argument}` must be a folder or a Hub id (owner/name), got '{name}': {error}") from error
    if is_folder:
        if not (path / file).is_file():
            raise ValueError(f"`{argument}`: there is no {file} in the folder '{path}'")
    elif there or not _HUB_ID.fullmatch(name):
        raise ValueError(f"`{argument}` must be a folder or a Hub id (owner/name), got '{name}', which is neither")


def check_device(device: str | None) -> str:
    """The device, or CUDA's where there is one and none is named. Raises ValueError when it cannot be used."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises where there is no CUDA
        raise ValueError(f"`device` {device} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def load_tokenizer(
    name: str | None = None, *, device: str | None = None, dtype: str = "float32", argument: str = "model"
) -> DualCodebookVQModel:
    """A tokenizer in eval mode.

    Args:
        name: folder or Hub id; `sharp` (None) and `faithful`: the embedded checkpoints.
        device: None: CUDA where there is one, else the CPU.
        dtype: of the network, float32, bfloat16 or float16; the codebooks stay in float32.
        argument: what messages call `name`.

    Raises ValueError that names the tokenizer when it cannot be loaded.
    """
    check_tokenizer_name(name, argument)
    import torch

    from .autoencoder_dualcodebook import DualCodebookVQModel

    device = check_device(device)
    name = tokenizer_folder(name, argument)
    path = Path(name).expanduser()
    source = path if path.is_dir() else name
    if isinstance(source, str):
        check_cache(source, argument, CONFIG)
    with naming_the_source(source, argument):
        model = DualCodebookVQModel.from_pretrained(source, dtype=getattr(torch, dtype))
    return model.eval().to(device)


def load_tokenizer_with_hash(
    name: str | None = None, *, device: str | None = None, dtype: str = "float32", argument: str = "model"
) -> tuple[DualCodebookVQModel, str]:
    """As `load_tokenizer`, and beside the tokenizer the `encoder_hash` of its file, the same for every `dtype`."""
    import torch

    from .weights import encoder_hash

    model = load_tokenizer(name, device=device, argument=argument)
    found = encoder_hash(model)
    model.cast_backbone(getattr(torch, dtype))
    return model, found


@contextmanager
def naming_the_source(source: str | Path, argument: str) -> Iterator[None]:
    """Whatever somebody's files make the libraries raise, as a ValueError that names them.

    Args:
        source: folder or Hub id that is loaded.
        argument: what the message calls it.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        yield
    except (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        # A config.json of another shape gives Attribute- and KeyError.
        reason = _unreachable(str(source)) if _comes_from(error, LocalEntryNotFoundError) else error
        raise ValueError(f"`{argument}`: cannot load the model '{source}': {reason}") from error


def check_cache(name: str, argument: str, file: str) -> None:
    """Raises ValueError where the Hub's files have no place, or are not there and cannot be downloaded."""
    from huggingface_hub import constants, try_to_load_from_cache

    if constants.HF_HUB_CACHE.startswith("~"):
        raise ValueError(f"`{argument}`: there is no home folder for the files of '{name}': set HF_HOME to a folder")
    if constants.HF_HUB_OFFLINE and not isinstance(try_to_load_from_cache(name, file), str):
        raise ValueError(f"`{argument}`: {_unreachable(name)} (HF_HUB_OFFLINE is set)")


def _unreachable(name: str) -> str:
    return f"'{name}' is not in the cache, and offline: run `hf download {name}` where the Hub can be reached"


def _comes_from(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error is not None
