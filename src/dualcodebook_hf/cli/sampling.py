"""How a generator is sampled: the flags, and samples that are drawn to be measured."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..generation.choices import GUIDANCE_SCALE, STEPS, TEMPERATURE
from .inputs import positive

if TYPE_CHECKING:
    import torch

    from ..evaluation.data import EvaluationImages

OPTIONS = ("num_inference_steps", "guidance_scale", "sampling_temperature")  # of the pipeline


def add_sampling(how: argparse._ArgumentGroup, steps: str) -> None:
    """Adds the flags of `OPTIONS`, with the pipeline's own defaults; `steps` names the first, as "--steps"."""
    how.add_argument(
        steps,
        dest="num_inference_steps",
        type=positive,
        default=STEPS,
        metavar="N",
        help="passes through the transformer (default: %(default)s)",
    )
    how.add_argument(
        "--guidance-scale",
        type=float,
        default=GUIDANCE_SCALE,
        metavar="S",
        help="how much the class weighs; 1: as learned, and twice as fast (default: %(default)s)",
    )
    how.add_argument(
        "--sampling-temperature",
        type=float,
        default=TEMPERATURE,
        metavar="T",
        help="1: as learned; below 1 likelier tokens, and less variety (default: %(default)s)",
    )


def sampling_options(arguments: argparse.Namespace, classes: bool) -> dict[str, Any]:
    """The values of `OPTIONS`; without classes there is nothing to guide to, and the guidance scale is 1."""
    return {name: getattr(arguments, name) for name in OPTIONS} | ({} if classes else {"guidance_scale": 1.0})


def labels_to_draw(pipeline: Any, images: EvaluationImages, column: str, count: int) -> list[int] | None:
    """The classes of `count` rows of a split, from the first on and again; None for a generator without classes.

    Raises ValueError where the column is missing or holds other classes than the generator has.
    """
    classes = pipeline.transformer.config.num_classes
    if classes is None:
        return None
    if column not in images.rows.column_names:
        raise ValueError(f"`--label-column` must be one of {images.rows.column_names}, got {column!r}")
    labels = list(images.rows[column][: images.count])
    if not all(isinstance(label, int) and label >= 0 for label in labels):
        raise ValueError(f"`--label-column` must hold a class in every row, {column!r} does not")
    names = getattr(images.rows.features[column], "names", None)
    if names and pipeline.labels:  # the numbers of a class may differ
        labels = pipeline.get_label_ids([names[label] for label in labels])
    if max(labels) >= classes:
        raise ValueError(f"`--label-column` must hold the generator's {classes} classes, got class {max(labels)}")
    return [labels[number % len(labels)] for number in range(count)]


def draw(
    pipeline: Any, arguments: argparse.Namespace, labels: list[int] | None, count: int, tokens: list[torch.Tensor]
) -> Iterator[torch.Tensor]:
    """Draws `count` samples and gives them as (3, size, size) in [-1, 1], rounded to 8 bits as PNG files are.

    Sample i has the random numbers of the seed `--seed` + i, whatever `--batch-size` is.

    Args:
        pipeline: a `DualCodebookMaskGenerationPipeline`.
        arguments: that were parsed.
        labels: classes, `count` of them; None: the generator has none.
        count: samples.
        tokens: gets what was drawn, (B, codebooks, h, w) for each batch.
    """
    import torch

    options = sampling_options(arguments, labels is not None)
    options |= {"height": arguments.size, "width": arguments.size, "output_type": "tokens", "return_dict": False}
    for start in range(0, count, arguments.batch_size):
        numbers = range(start, min(start + arguments.batch_size, count))
        generators = [torch.Generator().manual_seed(arguments.seed + number) for number in numbers]
        classes = {} if labels is None else {"class_labels": [labels[number] for number in numbers]}
        classes |= {"num_images": len(numbers)} if labels is None else {}
        drawn = pipeline(**classes, **options, generator=generators)[0]
        tokens.append(drawn.cpu())
        images = pipeline.vqvae.detokenize(drawn, size=(arguments.size, arguments.size)).float().cpu()
        yield from ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
