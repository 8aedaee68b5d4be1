"""The command line: `dualcodebook reconstruct | tokenize | detokenize | train | evaluate`.

Everything that can be wrong with the input is looked at before a model is loaded or anything is written; then one line
says what is wrong and the exit code is 2. Heavy modules are imported by the commands that need them.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from .autoencoder_dualcodebook import DualCodebookVQModel

BAD_INPUT = 2
SOFTWARE = "dualcodebook_hf"  # the PNG text that marks pictures written here, which alone may be overwritten
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit code: 0, 2 for bad input, or that of the training process."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["train"]:  # its flags are the trainer's
            return _train(argv[1:])
        arguments = _build_parser().parse_args(argv)
        return arguments.run(arguments)
    except ValueError as error:
        return _complain(error, BAD_INPUT)
    except OSError as error:  # a full disk, a file that went away meanwhile
        return _complain(error, 1)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _complain(error: Exception, code: int) -> int:
    print("dualcodebook: error:", " ".join(str(error).split()), file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """Complains as everything else here does: in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see `{self.prog} --help`)")


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dualcodebook", description="Dual Codebook VQ: images to two grids of tokens and back.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("reconstruct", help="encode and decode pictures; show and measure the result")
    _add_images(command)
    command.add_argument("--output", type=Path, default=Path("reconstructions"), help="folder (default: %(default)s)")
    command.add_argument("--sheet", type=Path, metavar="FILE.png", help="write all comparisons into one PNG as well")
    _add_model(command)
    command.set_defaults(run=_reconstruct)

    command = commands.add_parser("tokenize", help="pictures -> token file")
    _add_images(command)
    command.add_argument("--output", type=Path, required=True, metavar="FILE.safetensors", help="the token file")
    _add_model(command)
    command.set_defaults(run=_tokenize)

    command = commands.add_parser("detokenize", help="token file -> pictures")
    command.add_argument("file", type=Path, help="token file written by `tokenize`")
    command.add_argument("--output", type=Path, required=True, help="folder; PNGs are named after the originals")
    _add_model(command)
    command.set_defaults(run=_detokenize)

    command = commands.add_parser("evaluate", help="measure tokenizers on a split of a data set")
    _add_evaluate(command)
    command.set_defaults(run=_evaluate)

    commands.add_parser("train", add_help=False, help="train a tokenizer: [accelerate launch's flags --] --config ...")
    return parser


def _add_images(command: argparse.ArgumentParser) -> None:
    from .image_processing_dualcodebook import DEFAULT_MAX_PIXELS

    command.add_argument("images", nargs="+", type=Path, help="pictures, or folders of pictures (not their subfolders)")
    command.add_argument(
        "--max-pixels",
        type=int,
        default=DEFAULT_MAX_PIXELS,
        metavar="N",
        help="shrink larger pictures to N pixels, keeping their shape; 0: never (default: %(default)s)",
    )


def _add_model(command: argparse.ArgumentParser, **options: str) -> None:
    text = "folder or Hub id (default: the checkpoint inside the package, offline)"
    command.add_argument("--model", help=options.pop("also", "") + text, **options)
    command.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: cuda where there is one, or cpu)")
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="of the network (default: %(default)s)")


def _add_evaluate(command: argparse.ArgumentParser) -> None:
    _add_model(command, action="append", also="may be repeated; ")
    data = command.add_argument_group("data")
    data.add_argument("--dataset", required=True, help="Hub id, folder of pictures or parquet files, or a parquet file")
    data.add_argument("--config", help="configuration of a Hub data set that has several")
    data.add_argument("--split", default="test", help="(default: %(default)s)")
    data.add_argument("--image-column", default="image", help="column of the pictures (default: %(default)s)")
    data.add_argument("--streaming", action="store_true", help="read the data set as it arrives, without storing it")
    data.add_argument(
        "--size", type=_positive, default=256, help="side of the centre crop that is measured (default: 256)"
    )
    data.add_argument(
        "--resample",
        choices=("bilinear", "bicubic", "lanczos"),
        default="lanczos",
        help="filter that resizes the shorter side (default: %(default)s)",
    )
    data.add_argument("--limit", type=_positive, help="measure the first so many pictures only")
    data.add_argument("--batch-size", type=_positive, default=8, help="pictures at a time (default: %(default)s)")
    rival = command.add_argument_group("patch-linear codec: the rival without a network, at the first model's bits")
    rival.add_argument("--patch-linear", action="store_true", help="fit and measure it as well")
    rival.add_argument("--fit-dataset", help="data set that it is fitted to (default: that of --dataset)")
    rival.add_argument("--fit-split", default="train", help="split that it is fitted to (default: %(default)s)")
    rival.add_argument(
        "--fit-pictures", type=_positive, default=400, help="so many of its pictures (default: %(default)s)"
    )
    command.add_argument("--output", type=Path, metavar="FILE.json", help="write the results, with their protocol")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


@dataclass
class _Coded:
    """One picture through the tokenizer.

    original: as it was encoded, after any resize of the file's picture. tokens: (books, h, w).
    quality: PSNR and SSIM of the reconstruction, where one was made.
    """

    name: str
    file_size: tuple[int, int]
    original: Image.Image
    tokens: torch.Tensor
    quality: tuple[float, float] | None = None

    @property
    def positions(self) -> int:
        return self.tokens[0].numel()

    @property
    def pixels(self) -> int:
        return self.original.width * self.original.height


def _reconstruct(arguments: argparse.Namespace) -> int:
    from .evaluation.figures import comparison, comparison_sheet
    from .image_processing_dualcodebook import to_image, to_pixels

    paths = _find_pictures(arguments)
    names = [path.name for path in paths]
    figure_paths = _png_paths(arguments.output, names, "-comparison")
    image_paths = _png_paths(arguments.output, names, "-reconstruction")
    if arguments.sheet:
        _check_file(arguments.sheet, "--sheet", ".png")
    model = _load_model(arguments)
    table, figures = _Table(model), []
    arguments.output.mkdir(parents=True, exist_ok=True)
    for index, coded in enumerate(_encode(model, paths, arguments.max_pixels)):
        pixels = model.detokenize(coded.tokens[None], size=coded.original.size[::-1])
        coded.quality = _quality(pixels, to_pixels(coded.original)[None])
        table.add(coded)
        image, ids = to_image(pixels[0]), coded.tokens.cpu()
        figure = comparison(
            coded.original, image, ids, list(table.books.values()), list(table.books), table.title(coded)
        )
        _save_png(figure, figure_paths[index])
        _save_png(image, image_paths[index])
        if arguments.sheet:
            figures.append(figure)
    if arguments.sheet:
        arguments.sheet.parent.mkdir(parents=True, exist_ok=True)
        _save_png(comparison_sheet(figures), arguments.sheet)
    print(table)
    print(f"pictures written to {arguments.output}")
    return 0


def _tokenize(arguments: argparse.Namespace) -> int:
    from .configuration_dualcodebook import config_hash
    from .token_file import TokenFile, TokenizedPicture, save_tokens

    paths = _find_pictures(arguments)
    _check_file(arguments.output, "--output", ".safetensors")
    model = _load_model(arguments)
    table, pictures = _Table(model), []
    for coded in _encode(model, paths, arguments.max_pixels):
        table.add(coded)
        pictures.append(TokenizedPicture(coded.name, coded.original.size[::-1], coded.tokens.cpu()))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    content = TokenFile(pictures, model.downsample_factor, table.books, config_hash(model.config))
    save_tokens(arguments.output, content)
    print(table)
    print(f"tokens written to {arguments.output}")
    return 0


def _detokenize(arguments: argparse.Namespace) -> int:
    from .configuration_dualcodebook import config_hash
    from .image_processing_dualcodebook import to_image
    from .token_file import load_tokens

    content = load_tokens(arguments.file)
    paths = _png_paths(arguments.output, [picture.name for picture in content.pictures])
    model = _load_model(arguments)
    if content.config_hash != config_hash(model.config):
        raise ValueError(
            f"the tokens in '{arguments.file}' are of a model with config hash {content.config_hash}, books "
            f"{content.books}; this model's is {config_hash(model.config)}; give the one that made them by `--model`"
        )
    arguments.output.mkdir(parents=True, exist_ok=True)
    for picture, path in zip(content.pictures, paths, strict=True):
        pixels = model.detokenize(picture.tokens[None].to(model.device), size=picture.size)
        _save_png(to_image(pixels[0]), path)
    print(f"{len(paths)} pictures written to {arguments.output}")
    return 0


def _encode(model: DualCodebookVQModel, paths: Sequence[Path], max_pixels: int) -> Iterator[_Coded]:
    from .image_processing_dualcodebook import read_image, resize_to_max_pixels, to_pixels

    for path in paths:
        picture = read_image(path)
        original = resize_to_max_pixels(picture, max_pixels or None)
        tokens = model.tokenize(to_pixels(original)[None].to(model.device, model.dtype))[0]
        yield _Coded(path.name, picture.size, original, tokens)


def _quality(reconstruction: torch.Tensor, original: torch.Tensor) -> tuple[float, float]:
    """PSNR and SSIM of (1, 3, H, W) in [-1, 1], by the protocol of `evaluate`: clamped, not rounded to 8 bits."""
    from .evaluation.metrics import psnr, ssim

    x, y = (reconstruction.cpu().float() + 1) / 2, (original + 1) / 2
    return psnr(x, y).item(), ssim(x, y).item()


class _Table:
    """One line a picture, and one for all of several: sizes, bytes, bits per pixel, quality, codes used."""

    def __init__(self, model: DualCodebookVQModel) -> None:
        self.bits = model.quantize.bits_per_position
        self.books = {name: book.size for name, book in model.quantize.books.items()}
        self.used: dict[str, set[int]] = {name: set() for name in self.books}
        self.rows: list[list[str]] = []
        self.quality: list[tuple[float, float]] = []
        self.bytes = self.positions = self.pixels = 0

    def add(self, coded: _Coded) -> None:
        (width, height), (file_width, file_height) = coded.original.size, coded.file_size
        resized = f" (of {file_width}x{file_height})" if coded.original.size != coded.file_size else ""
        used = {name: set(ids.unique().tolist()) for name, ids in zip(self.books, coded.tokens, strict=True)}
        grid = "x".join(map(str, coded.tokens.shape))
        quality = [coded.quality] if coded.quality else []
        cells = [coded.name, f"{width}x{height}{resized}", grid, *self._rate_cells(self._bytes(coded), coded)]
        self.rows.append(cells + self._quality_cells(quality) + self._usage_cells(used))
        self.bytes += self._bytes(coded)
        self.positions += coded.positions
        self.pixels += coded.pixels
        self.quality += quality
        for name in self.books:
            self.used[name] |= used[name]

    def title(self, coded: _Coded) -> str:
        """What stands above a picture's figure."""
        count, rate = self._rate_cells(self._bytes(coded), coded)
        psnr, ssim = self._quality_cells([coded.quality])
        parts = [coded.name, f"{count} bytes", f"{rate} bits per pixel", f"PSNR {psnr} dB", f"SSIM {ssim}"]
        return "   ·   ".join(parts)

    def _bytes(self, coded: _Coded) -> int:
        from .token_file import token_bytes

        return token_bytes(tuple(coded.tokens.shape[1:]), self.bits)

    def _rate_cells(self, count: int, counted: _Coded | _Table) -> list[str]:
        return [str(count), f"{counted.positions * self.bits / counted.pixels:.4f}"]

    def _quality_cells(self, quality: Sequence[tuple[float, float]]) -> list[str]:
        means = [sum(values) / len(values) for values in zip(*quality, strict=True)]
        return [f"{mean:.{digits}f}" for mean, digits in zip(means, (2, 4), strict=False)]

    def _usage_cells(self, used: dict[str, set[int]]) -> list[str]:
        return [f"{len(used[name])}/{size}" for name, size in self.books.items()]

    def __str__(self) -> str:
        header = ["picture", "pixels", "tokens", "bytes", "bits/pixel"]
        header += ["PSNR dB", "SSIM"] if self.quality else []
        rows = [header + [f"{name} codes" for name in self.books], *self.rows]
        if len(self.rows) > 1:
            summary = [f"all {len(self.rows)}", "", "", *self._rate_cells(self.bytes, self)]
            rows.append(summary + self._quality_cells(self.quality) + self._usage_cells(self.used))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if place > 1 else cell.ljust(width) for place, (cell, width) in enumerate(cells)
            )
            for cells in (zip(row, widths, strict=True) for row in rows)
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _evaluate(arguments: argparse.Namespace) -> int:
    models = arguments.model or [None]
    for model in models:
        _check_model_name(model)
    if arguments.output:
        _check_file(arguments.output, "--output", ".json")
    _need("datasets", "eval")
    fit_dataset = arguments.fit_dataset or arguments.dataset
    _check_data(arguments, arguments.dataset, arguments.split)
    if arguments.patch_linear:
        _check_data(arguments, fit_dataset, arguments.fit_split)
    from .evaluation.evaluate import evaluate_model, evaluate_patch_linear, format_table

    shared = ("image_column", "streaming", "size", "resample", "limit", "batch_size")
    options = {name: getattr(arguments, name) for name in shared} | {"progress": sys.stderr.isatty()}
    source = (arguments.dataset, arguments.config, arguments.split)
    results, sizes = [], None
    for model in models:
        loaded = _load_model(argparse.Namespace(**{**vars(arguments), "model": model}))
        sizes = sizes or [book.size for book in loaded.quantize.books.values()]
        results.append(evaluate_model(loaded, *source, name=_public_name(model), **options))
        del loaded
    if arguments.patch_linear:
        fit = {"train_split": arguments.fit_split, "train_pictures": arguments.fit_pictures, "sizes": sizes}
        # A configuration belongs to a data set; another data set is fitted in its own default one.
        fit["train_config"] = None if arguments.fit_dataset else arguments.config
        results.append(evaluate_patch_linear(fit_dataset, *source, **fit, **options))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        with _complete(arguments.output) as temporary:
            temporary.write_text(json.dumps({"results": results}, indent=2) + "\n")
    print(format_table((result["model"]["name"], result) for result in results))
    if arguments.output:
        print(f"results written to {arguments.output}")
    return 0


def _check_data(arguments: argparse.Namespace, dataset: str, split: str) -> None:
    """Opens a split, so that a wrong name is known before any work."""
    from .picture_datasets import load_pictures

    config = arguments.config if dataset == arguments.dataset else None
    load_pictures(dataset, config, split, arguments.image_column, arguments.streaming)


def _public_name(model: str | None) -> str:
    """A Hub id as it is; of a folder the last two parts: results are published, this machine's folders are not."""
    if model is None:
        return "embedded checkpoint"
    path = Path(model).expanduser()
    return "/".join(path.resolve().parts[-2:]) if path.is_dir() else model


def _need(module: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"this command needs the package {module}: pip install 'dualcodebook-hf[{extra}]'")


def _find_pictures(arguments: argparse.Namespace) -> list[Path]:
    """The pictures that were named, folders replaced by the pictures in them; each was decoded once, to be sure."""
    from PIL import Image

    from .image_processing_dualcodebook import read_image

    if arguments.max_pixels < 0:
        raise ValueError(f"`--max-pixels` must be 0 (no limit) or above, got {arguments.max_pixels}")
    Image.init()
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN} - {".pdf"}
    paths = []
    for path in arguments.images:
        inside = [path]
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in known and file.is_file())
            if not inside:
                raise ValueError(f"there is no picture in the folder '{path}'")
        paths += inside
    for path in paths:
        read_image(path)
    return paths


def _check_model_name(model: str | None) -> None:
    from . import default_checkpoint

    path = Path(model or default_checkpoint()).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"`--model`: there is no config.json in the folder '{path}'")
    elif model is None:
        raise ValueError(f"the checkpoint inside the package is missing: '{path}'; name another by `--model`")
    elif path.exists() or not HUB_ID.fullmatch(model) or model.startswith("."):
        raise ValueError(f"`--model` must be a folder or a Hub id (owner/name), got '{model}', which is neither")


def _check_folder(path: Path, flag: str) -> None:
    """Raises ValueError unless files can be written into the folder, which may be still to be made."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise ValueError(f"`{flag}`: '{existing}' is no folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"`{flag}`: the folder '{existing}' cannot be written to")


def _check_file(path: Path, flag: str, suffix: str) -> None:
    if path.suffix != suffix:
        raise ValueError(f"`{flag}` must be a file named *{suffix}, got '{path}'")
    if path.is_dir():
        raise ValueError(f"`{flag}` must be a file, '{path}' is a folder")
    _check_folder(path.parent, flag)
    _check_overwrite(path)


def _png_paths(folder: Path, names: Sequence[str], ending: str = "") -> list[Path]:
    """Where the pictures of these names are written, each under a name of its own."""
    _check_folder(folder, "--output")
    paths = [folder / f"{stem}{ending}.png" for stem in _unique_stems(names)]
    for path in paths:
        _check_overwrite(path)
    return paths


def _check_overwrite(path: Path) -> None:
    """Raises ValueError where a file lies that was not written here: the original, maybe."""
    from PIL import Image

    from .token_file import load_tokens

    if not path.exists():
        return
    try:
        if path.suffix == ".json":
            ours = "results" in json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            ours = bool(load_tokens(path))
        else:
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


def _load_model(arguments: argparse.Namespace) -> DualCodebookVQModel:
    _check_model_name(arguments.model)
    import torch
    from safetensors import SafetensorError

    from . import DualCodebookVQModel, default_checkpoint

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises where there is no CUDA
        raise ValueError(f"`--device` {device} cannot be used: {str(error).splitlines()[0]}") from error
    name = arguments.model or default_checkpoint()
    if Path(name).expanduser().is_dir():
        name = Path(name).expanduser()
    try:
        model = DualCodebookVQModel.from_pretrained(name, dtype=getattr(torch, arguments.dtype))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot load the model '{name}': {error}") from error
    return model.eval().to(device)


def _save_png(image: Image.Image, path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Software", SOFTWARE)
    with _complete(path) as temporary:
        image.save(temporary, "PNG", pnginfo=info)


@contextmanager
def _complete(path: Path) -> Iterator[Path]:
    """A temporary name to write to: under its own name the file appears complete or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _train(argv: Sequence[str]) -> int:
    """`accelerate launch` of the trainer, with the launcher's flags before a `--`.

    The trainer's flags and data are checked here first: the launcher takes long, and turns every exit code into 1.
    """
    _need("accelerate", "train")
    _need("datasets", "train")
    from .picture_datasets import load_pictures
    from .training.arguments import EXIT_CODE_FILE, parse_run_config

    place = argv.index("--") if "--" in argv else 0
    launch_flags, flags = argv[:place], argv[place + 1 :] if place else argv
    data = parse_run_config(flags).data
    for split in filter(None, (data.train_split, data.validation_split)):
        load_pictures(data.dataset, data.dataset_config, split, data.image_column, data.streaming)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *launch_flags]
    command += ["-m", "dualcodebook_hf.training.trainer", *flags]
    with tempfile.TemporaryDirectory() as folder:
        code_file = Path(folder) / "exit-code"
        code = _run_forwarding_signals(command, {**os.environ, EXIT_CODE_FILE: str(code_file)})
        return int(code_file.read_text()) if code and code_file.exists() else code


def _run_forwarding_signals(command: Sequence[str], environment: dict[str, str] | None = None) -> int:
    """Runs the launcher and returns its exit code, 128 + n if signal n ended it.

    SIGTERM, SIGINT and SIGHUP go to the training processes, which save and end; a second SIGINT kills everything.
    Not to the launcher: it would die, and leave them. Nor to their data workers: a dead worker is an error.
    """
    launcher: subprocess.Popen | None = None
    received: list[int] = []

    def forward(number: int, _: object) -> None:
        received.append(number)
        if launcher is None:
            return
        if received.count(signal.SIGINT) > 1:
            with suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
        else:
            _signal_ranks(launcher.pid, signal.SIGTERM if number == signal.SIGHUP else number)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    previous = {number: signal.signal(number, forward) for number in numbers}
    try:
        # A session of its own: the terminal's Ctrl-C reaches this process alone.
        launcher = subprocess.Popen(command, env=environment, start_new_session=True)
        if received:
            launcher.terminate()
        code = launcher.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _signal_ranks(launcher: int, number: int) -> None:
    """Signals the launcher's children, or the launcher itself where it has started none yet."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(launcher)
        for child in process.children() or [process]:
            child.send_signal(number)


if __name__ == "__main__":
    sys.exit(main())
