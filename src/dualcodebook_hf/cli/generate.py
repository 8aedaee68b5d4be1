"""`dualcodebook generate`."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import staged_files
from ..flags import Parser, refuse_given
from ..generation.choices import ORDERS, UNITS
from ..loading import check_generator_name
from .inputs import (
    add_batch_size,
    add_device,
    add_output,
    check_file,
    not_negative,
    png_paths,
    positive,
    save_png,
    set_command,
)
from .sampling import OPTIONS, add_sampling

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ..generation.pipeline import DualCodebookMaskGenerationPipeline


def add_generate(command: Parser) -> None:
    """Adds the command's flags to its parser."""
    set_command(command, _generate)
    what = command.add_argument_group("what is drawn")
    what.add_argument(
        "--class",
        dest="class_labels",
        nargs="+",
        metavar="NAME|ID",
        help="classes, by name or number (default: none in particular)",
    )
    what.add_argument("--count", type=positive, default=8, metavar="N", help="images of each (default: %(default)s)")
    what.add_argument(
        "--seed", type=not_negative, default=0, metavar="N", help="of the first image; the next has N + 1 (default: 0)"
    )
    what.add_argument("--height", type=positive, metavar="N", help="in pixels (default: as trained, or the image's)")
    what.add_argument("--width", type=positive, metavar="N", help="likewise; both or neither")
    image = command.add_argument_group("repainting")
    image.add_argument("--image", type=Path, metavar="FILE", help="begin from this image, shrunk to the trained area")
    image.add_argument(
        "--mask", dest="mask_image", type=Path, metavar="FILE", help="repaint where this image of its size is white"
    )
    image.add_argument(
        "--strength",
        type=float,
        metavar="SHARE",
        help="of the positions, that are repainted (default: .5, or 1 of a mask)",
    )
    how = command.add_argument_group("how")
    add_sampling(how, "--steps")
    how.add_argument("--order", choices=ORDERS, help="in which tokens are revealed (default: the generator's)")
    how.add_argument("--units", choices=UNITS, help="that are revealed together (default: the generator's)")
    add_batch_size(how, 8, "up to N images at a time")
    output = command.add_argument_group("what is written")
    add_output(output, "one PNG of all, or a folder of PNGs", "generated.png", "FILE.png|FOLDER")
    output.add_argument("--tokens-output", type=Path, metavar="FILE.safetensors", help="a token file as well")
    generator = command.add_argument_group("the generator")
    generator.add_argument("--model", help="folder or Hub id of a pipeline (default: the one inside the package)")
    add_device(generator)


def _generate(arguments: argparse.Namespace) -> int:
    classes = arguments.class_labels or [None]
    names = [f"{_stem(label, arguments)}-{arguments.seed + k}.png" for label in classes for k in range(arguments.count)]
    sheet = arguments.output.suffix != "" and not arguments.output.is_dir()
    if sheet:
        check_file(arguments.output, "--output", ".png")
    else:
        paths = png_paths(arguments.output, names)
    if arguments.tokens_output:
        check_file(arguments.tokens_output, "--tokens-output", ".safetensors")
    check_generator_name(arguments.model, "--model")
    if not arguments.class_labels:
        refuse_given(arguments, ("guidance_scale",), "guides towards a class: give --class")
    start = _read_start(arguments)
    from ..figures import sample_sheet
    from ..generation.loading import load_generator

    pipeline = load_generator(arguments.model, device=arguments.device, dtype=arguments.dtype, argument="--model")
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False)
    _set_scheduler(pipeline, arguments)
    rows = [(label, *_draw(pipeline, label, start, arguments)) for label in classes]
    images = [image for _, drawn, _ in rows for image in drawn]
    with staged_files(arguments.output.parent if sheet else arguments.output) as folder:
        if sheet:
            save_png(sample_sheet([(label, drawn) for label, drawn, _ in rows]), folder / arguments.output.name)
        else:
            for image, path in zip(images, paths, strict=True):
                save_png(image, folder / path.name)
    print(f"{len(images)} images written to {arguments.output}")
    if arguments.tokens_output:
        _save_tokens(pipeline, arguments.tokens_output, names, images, [grid for *_, grids in rows for grid in grids])
    return 0


def _stem(label: str | None, arguments: argparse.Namespace) -> str:
    """What the files of a class are named after."""
    words = [arguments.image.stem] if arguments.image else []
    return re.sub(r"[^\w.-]+", "_", "-".join([*words, *([label] if label else [])])) or "image"


def _read_start(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the pipeline that begin from an image; none without one."""
    if not arguments.image:
        for flag, value in (("--mask", arguments.mask_image), ("--strength", arguments.strength)):
            if value is not None:
                raise ValueError(f"`{flag}` must come with an `--image` to begin from")
        return {}
    from ..pil_images import read_image

    start: dict[str, Any] = {"image": read_image(arguments.image), "strength": arguments.strength}
    if arguments.mask_image:
        start["mask_image"] = read_image(arguments.mask_image)
        if start["mask_image"].size != start["image"].size:
            sizes = " and ".join("x".join(map(str, start[name].size)) for name in ("image", "mask_image"))
            raise ValueError(f"`--mask` must have the size of `--image`, they have {sizes}")
    return start


def _set_scheduler(pipeline: DualCodebookMaskGenerationPipeline, arguments: argparse.Namespace) -> None:
    """Another order or other units. Raises ValueError for a generator whose scheduler has neither."""
    from ..generation.schedulers import MaskedTokenScheduler

    changes = {name: value for name in ("order", "units") if (value := getattr(arguments, name))}
    if changes and not isinstance(pipeline.scheduler, MaskedTokenScheduler):
        kind = type(pipeline.scheduler).__name__
        raise ValueError(f"`{next(iter(changes))}` must be left out: the generator's scheduler is {kind}")
    if changes:
        pipeline.scheduler = MaskedTokenScheduler.from_config(pipeline.scheduler.config, **changes)


def _draw(
    pipeline: DualCodebookMaskGenerationPipeline,
    label: str | None,
    start: dict[str, Any],
    arguments: argparse.Namespace,
) -> tuple[list[Image.Image], list[torch.Tensor]]:
    """Images of a class, and their tokens (codebooks, h, w)."""
    import torch

    images, tokens = [], []
    options = {name: getattr(arguments, name) for name in OPTIONS}
    options["height"], options["width"] = _size(pipeline, start, arguments)
    if label is not None:
        options["class_labels"] = int(label) if label.isdecimal() and label not in pipeline.labels else label

    def keep(_: object, step: int, __: object, values: dict[str, torch.Tensor]) -> None:
        if step == arguments.num_inference_steps - 1:
            tokens.extend(values["tokens"].cpu())

    for first in range(0, arguments.count, arguments.batch_size):
        count = min(arguments.batch_size, arguments.count - first)
        generators: Any = [torch.Generator().manual_seed(arguments.seed + first + k) for k in range(count)]
        if type(pipeline.scheduler).__name__ == "AmusedScheduler":  # which takes one
            generators = generators[0]
        drawn = pipeline(num_images=count, generator=generators, callback_on_step_end=keep, **start, **options)
        images += drawn.images
    return images, tokens


def _size(
    pipeline: DualCodebookMaskGenerationPipeline, start: dict[str, Any], arguments: argparse.Namespace
) -> tuple[int | None, int | None]:
    """(H, W) that was asked for; of an image its own, shrunk to the area that was trained on."""
    if not start or arguments.height or arguments.width:
        return arguments.height, arguments.width
    from ..pil_images import size_within

    rows, columns = pipeline.transformer.config.sample_size
    width, height = size_within(*start["image"].size, rows * columns * pipeline.vqvae.downsample_factor**2)
    return height, width


def _save_tokens(
    pipeline: DualCodebookMaskGenerationPipeline,
    path: Path,
    names: list[str],
    images: list[Image.Image],
    tokens: list[torch.Tensor],
) -> None:
    from ..tokens.file import TokenFile, TokenizedImage, save_tokens

    held = [
        TokenizedImage(name, image.size[::-1], grid) for name, image, grid in zip(names, images, tokens, strict=True)
    ]
    weights = pipeline.transformer.config.tokenizer_weights_sha256
    with staged_files(path.parent) as folder:
        save_tokens(folder / path.name, TokenFile.of_model(pipeline.vqvae, held, weights))
    print(f"tokens written to {path}")
