"""What the commands share: flags, checks before any work, loading a model, PNG files."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..flags import Parser, Switch

if TYPE_CHECKING:
    from PIL import Image

    from ..autoencoder_dualcodebook import DualCodebookVQModel
    from ..pil_images import BadImageError

Item = TypeVar("Item")
DTYPES, AUTO = ("float32", "bfloat16", "float16"), "auto"
LONGEST_NAME = 255  # bytes, on common file systems
# What Pillow knows by name and cannot decode, or only by a program of the system.
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}
SOFTWARE = "dualcodebook_hf"  # the PNG text that marks images written here, which alone may be overwritten


def set_command(command: Parser, run: Callable[[argparse.Namespace], int], words: str = "") -> None:
    """What a command does, and its usage.

    Args:
        command: its parser.
        run: from the parsed arguments to the exit code.
        words: what stands between its name and its flags, such as "IMAGE ...".
    """
    command.set_defaults(run=run)
    command.usage = " ".join(filter(None, ["%(prog)s", words, "[--FLAG VALUE ...]"]))


def add_model(command: argparse._ActionsContainer, fast: bool = False, **options: str) -> None:
    """Adds the flags that `load_model` reads; `fast` where it is called so."""
    text = "folder, Hub id, or a checkpoint inside the package: sharp or faithful (default: sharp)"
    command.add_argument("--model", help=options.pop("also", "") + text, **options)
    add_device(command, fast)


def add_device(command: argparse._ActionsContainer, fast: bool = False) -> None:
    """Adds `--device` and `--dtype`."""
    command.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: cuda where there is one, or cpu)")
    names, text = DTYPES, "of the network (default: %(default)s)"
    if fast:
        names, text = (
            (AUTO, *DTYPES),
            f"{text}; {AUTO}: float32, bfloat16 inside where the machine is faster at it",
        )
    command.add_argument("--dtype", choices=names, default=names[0], help=text)


def add_output(
    command: argparse._ActionsContainer, what: str, default: str | None = None, metavar: str = "FOLDER"
) -> None:
    """Adds `--output`, which no command demands: what has no default there is printed.

    Args:
        command: the parser, or a group of it.
        what: is written.
        default: a path; None: nothing is written.
        metavar: "FOLDER", or "FILE" and its suffix.
    """
    path = None if default is None else Path(default)
    ends = "default: no file; it is printed" if default is None else "default: %(default)s"
    command.add_argument("--output", type=Path, default=path, metavar=metavar, help=f"{what} ({ends})")


def add_batch_size(command: argparse._ActionsContainer, default: int, what: str) -> None:
    """Adds `--batch-size`; `what` says of which N items."""
    text = f"{what} (default: %(default)s)"
    command.add_argument("--batch-size", type=positive, default=default, metavar="N", help=text)


def add_other_weights(command: argparse._ActionsContainer, **options: Any) -> None:
    """Adds `--other-weights`."""
    command.add_argument(
        "--other-weights",
        action=Switch,
        default=False,
        help="take any model of such codebooks, whatever made the tokens (default: false)",
        **options,
    )


def add_on_bad_image(command: argparse._ActionsContainer, skip: str) -> None:
    """Adds `--on-bad-image`; `skip` says what happens then."""
    command.add_argument(
        "--on-bad-image",
        choices=("error", "skip"),
        default="error",
        help=f"an image that cannot be read: end the command (error), or {skip} (default: %(default)s)",
    )


def report_left_out(skipped: Sequence[BadImageError], count: int) -> None:
    """Names on stderr what `--on-bad-image skip` left out, of `count` images. Raises the last one if it was all."""
    for error in skipped:
        print(f"left out: {error}", file=sys.stderr)
    if skipped:
        print(f"{len(skipped)} of {count} images were left out", file=sys.stderr)
        if len(skipped) == count:
            raise skipped[-1]


def with_bar(items: Iterable[Item], total: int) -> Iterator[Item]:
    """The items; on a terminal, a bar on stderr counts them."""
    from tqdm import tqdm

    with tqdm(items, desc="images", total=total, unit="", disable=not sys.stderr.isatty(), leave=False) as bar:
        yield from bar


def positive(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    return _at_least(1, text)


def not_negative(text: str) -> int:
    """argparse type: a whole number of at least 0."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
    return int(text)


def load_model(name: str | None, arguments: argparse.Namespace, fast: bool = False) -> DualCodebookVQModel:
    """A model of `--model` by `--device` and `--dtype`, in eval mode.

    Args:
        name: of the model.
        arguments: that were parsed.
        fast: optimized for inference; results differ by rounding.

    Raises ValueError when one of them is wrong.
    """
    from ..loading import load_tokenizer

    model = load_tokenizer(name, device=arguments.device, dtype=_loaded_dtype(arguments), argument="--model")
    return _optimized(model, arguments) if fast else model


def load_model_with_hash(name: str | None, arguments: argparse.Namespace) -> tuple[DualCodebookVQModel, str]:
    """As a fast `load_model`, with its `encoder_hash`."""
    from ..loading import load_tokenizer_with_hash

    dtype = _loaded_dtype(arguments)
    model, weights = load_tokenizer_with_hash(name, device=arguments.device, dtype=dtype, argument="--model")
    return _optimized(model, arguments), weights


def _loaded_dtype(arguments: argparse.Namespace) -> str:
    return "float32" if arguments.dtype == AUTO else arguments.dtype


def _optimized(model: DualCodebookVQModel, arguments: argparse.Namespace) -> DualCodebookVQModel:
    import torch

    from ..inference import optimize_for_inference

    return optimize_for_inference(model, torch.float32 if arguments.dtype == "float32" else None)


@dataclass(frozen=True)
class ImageFile:
    """An image of the command line, not opened yet.

    Attributes:
        path: of the file.
        name: of the file; of one in a subfolder "subfolder-file".
    """

    path: Path
    name: str


def find_images(arguments: argparse.Namespace) -> list[ImageFile]:
    """The image files that were named, folders replaced by the images in them; none is decoded yet.

    Says on stderr how many files of a folder are left out, and why. Raises ValueError for a file that is missing and
    for a folder without images.
    """
    files = []
    for path in arguments.images:
        if path.is_dir():
            files += _images_in(path, arguments.recursive)
        elif not path.exists():
            raise ValueError(f"cannot read image '{path}': no such file")
        else:
            files.append(ImageFile(path, path.name))
    return files


def _images_in(folder: Path, recursive: bool) -> list[ImageFile]:
    found, left_out = [], Counter()
    for path in sorted(folder.rglob("*") if recursive else folder.iterdir()):
        inside = path.relative_to(folder)
        if any(part.startswith(".") for part in inside.parts):
            reason = "hidden"
        elif path.is_dir():
            reason = None if recursive else "folders (see --recursive)"
        else:
            reason = _why_no_image(path)
            if reason is None:
                found.append(ImageFile(path, "-".join(inside.parts)))
        if reason is not None:
            left_out[reason] += 1
    reasons = ", ".join(f"{reason}: {count}" for reason, count in left_out.items())
    if not found:
        raise ValueError(f"there is no image in the folder '{folder}'" + (f" ({reasons})" if reasons else ""))
    if left_out:
        print(f"left out of '{folder}': {reasons}", file=sys.stderr)
    return found


def _why_no_image(path: Path) -> str | None:
    """Why a file is not read as an image, by its suffix; None: it is read."""
    from ..pil_images import PLUGINS

    suffix = path.suffix.lower()
    if not path.is_file():
        return "no regular file"
    if suffix in _decodable_suffixes():
        return None
    plugin = next((plugin for plugin in PLUGINS if suffix in plugin.suffixes), None)
    return f"{plugin.format} (needs the package {plugin.package})" if plugin else "no image format"


@cache
def _decodable_suffixes() -> set[str]:
    """Suffixes that PIL and its installed plugins decode, in lower case."""
    from PIL import Image

    from ..pil_images import PLUGINS

    Image.init()
    for plugin in PLUGINS:
        plugin.load()
    kinds = Image.registered_extensions()
    return {suffix for suffix, kind in kinds.items() if kind in Image.OPEN and kind not in NOT_DECODED}


def check_folder(path: Path, flag: str) -> None:
    """Raises ValueError unless files can be written into the folder, which need not exist yet."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise ValueError(f"`{flag}`: '{existing}' is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"`{flag}`: the folder '{existing}' cannot be written to")


def check_file(path: Path, flag: str, suffix: str) -> None:
    """Raises ValueError unless a file of this suffix can be written there without losing somebody's own."""
    if path.suffix != suffix:
        raise ValueError(f"`{flag}` must be a file named *{suffix}, got '{path}'")
    _check_length(path)
    if path.is_dir():
        raise ValueError(f"`{flag}` must be a file, '{path}' is a folder")
    check_folder(path.parent, flag)
    _check_overwrite(path)


def png_paths(folder: Path, names: Sequence[str], ending: str = "") -> list[Path]:
    """Where images of these names are written, each under a name of its own.

    Args:
        folder: of `--output`.
        names: file names of the originals.
        ending: what follows an original's name, before ".png".

    Raises ValueError when the folder cannot be written to, or holds somebody else's file of such a name.
    """
    check_folder(folder, "--output")
    paths = [folder / f"{stem}{ending}.png" for stem in _unique_stems(names)]
    for path in paths:
        _check_length(path)
        _check_overwrite(path)
    return paths


def _check_length(path: Path) -> None:
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise ValueError(f"the name '{path.name}' is too long for a file: {LONGEST_NAME} bytes at most")


def _check_overwrite(path: Path) -> None:
    """Raises ValueError where a file lies that was not written here: the original, maybe."""
    if not path.exists():
        return
    try:
        if path.suffix == ".json":
            ours = "results" in json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            from ..tokens.file import load_tokens

            ours = bool(load_tokens(path))
        else:
            from PIL import Image

            with Image.open(path) as image:
                ours = image.info.get("Software") == SOFTWARE
    except (OSError, SyntaxError, TypeError, ValueError):
        ours = False
    if not ours:
        raise ValueError(f"'{path}' exists and was not written by this program; choose another name or folder")


def _unique_stems(names: Sequence[str]) -> list[str]:
    """Names without suffix; one that is taken gets a number. "A" and "a" are the same name to some file systems."""
    stems: list[str] = []
    taken: set[str] = set()
    for stem in (Path(name).stem for name in names):
        numbered = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        stems.append(next(name for name in numbered if name.lower() not in taken))
        taken.add(stems[-1].lower())
    return stems


def save_png(image: Image.Image, path: Path) -> None:
    """Writes a PNG with the mark by which `check_file` and `png_paths` know it again."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Software", SOFTWARE)
    image.save(path, "PNG", pnginfo=info)
