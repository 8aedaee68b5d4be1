"""`dualcodebook evaluate-generator`."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import public_name, write_json
from ..flags import Parser, refuse_given
from ..generation.choices import CHOICE_TEMPERATURE, GUIDANCE_SCHEDULES
from ..loading import check_device, check_generator_name, check_tokenizer_name, tokenizer_label
from ..packages import require_package
from .inputs import (
    add_batch_size,
    add_output,
    check_file,
    find_images,
    not_negative,
    positive,
    save_png,
    set_command,
    with_bar,
)
from .sampling import OPTIONS, add_sampling, draw, labels_to_draw, sampling_options
from .tables import transposed_tables

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ..autoencoder_dualcodebook import DualCodebookVQModel
    from ..evaluation.data import EvaluationData, EvaluationImages
    from ..evaluation.generator_evaluation import GeneratorEvaluator, MeasuredSet
    from ..metrics.efficientnet import EfficientNetFeatures
    from ..tokens.dataset import TokenDataset
    from .inputs import ImageFile

RECORD, SHEET = "metrics.json", "neighbours.png"
EMBEDDED = "embedded"  # of --tokenizer
NETWORK = "kd_effnetlite2"


def add_evaluate_generator(command: Parser) -> None:
    """Adds the command's flags to its parser."""
    set_command(command, _evaluate, "--samples FOLDER | --model FOLDER --dataset DATASET")
    _add_samples(command.add_argument_group("what is measured: --samples or --model"))
    _add_data(command.add_argument_group("the real images"))
    tokens = command.add_argument_group("tokens: with a tokenizer copies are looked for among tokens too")
    tokens.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="its tokenizer: folder, Hub id, `sharp`, `faithful` or `embedded` (default: that of --model, or none)",
    )
    tokens.add_argument(
        "--train-tokens",
        type=Path,
        metavar="FOLDER",
        help="token data set of the training images with the crops that the generator was trained on (default: the "
        "tokens of the crops that are measured)",
    )
    output = command.add_argument_group("what is measured beside, and written")
    output.add_argument(
        "--baseline-split", action="append", metavar="SPLIT", help="a split measured as samples are; may be repeated"
    )
    text = "k-means cells of C_T (default: one for each 50 test images)"
    output.add_argument("--cells", type=positive, metavar="N", help=text)
    add_output(output, f"{RECORD}, a record of the results and their protocol, and {SHEET}")
    text = f"show the first N samples beside their nearest training images, in {SHEET} (default: %(default)s)"
    output.add_argument("--neighbours", type=not_negative, default=0, metavar="N", help=text)


def _add_samples(samples: argparse._ArgumentGroup) -> None:
    samples.add_argument("--samples", type=Path, metavar="FOLDER", help="a folder of generated images")
    samples.add_argument("--model", metavar="FOLDER", help="folder or Hub id of a generator, which is sampled from")
    samples.add_argument(
        "--count", type=positive, metavar="N", help="samples that are drawn (default: as many as test images)"
    )
    samples.add_argument("--seed", type=not_negative, default=0, help="of all that is drawn (default: %(default)s)")
    text = "column with the classes, whose samples are drawn as often as they occur (default: %(default)s)"
    samples.add_argument("--label-column", default="label", help=text)
    add_sampling(samples, "--num-inference-steps")
    samples.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: cuda where there is one, or cpu)")


def _add_data(data: argparse._ArgumentGroup) -> None:
    data.add_argument("--dataset", help="Hub id, folder of images or parquet files, or a parquet file")
    data.add_argument("--config", help="configuration of a Hub data set that has several")
    data.add_argument("--split", default="test", help="that the samples should resemble (default: %(default)s)")
    text = "that the generator was trained on (default: %(default)s)"
    data.add_argument("--train-split", default="train", metavar="SPLIT", help=text)
    data.add_argument("--image-column", default="image", help="column of the images (default: %(default)s)")
    text = "side of the centre crop, of samples too (default: %(default)s)"
    data.add_argument("--size", type=positive, default=256, metavar="PIXELS", help=text)
    data.add_argument(
        "--resample",
        choices=("bilinear", "bicubic", "lanczos"),
        default="lanczos",
        help="filter that resizes the shorter side (default: %(default)s)",
    )
    data.add_argument("--limit", type=positive, metavar="N", help="the first N test images only (default: all)")
    text = "the first N training images only (default: all)"
    data.add_argument("--train-limit", type=positive, metavar="N", help=text)
    add_batch_size(data, 8, "N images at a time")


@dataclass
class _Job:
    """What was asked for, opened and checked.

    Attributes:
        arguments: that were parsed.
        files: the samples; empty where they are drawn.
        test: of the test split.
        train: of the training split.
        baselines: {split: its images}.
        device: where networks run.
        token_dataset: of the training images; None without one.
        labels: classes of what is drawn; None: there are none, or nothing is drawn.
        generator: pipeline that is drawn from.
        tokenizer: None without one.
        features: of images.
        train_tokens: see `GeneratorEvaluator`.
        shown: the first samples, and what the sheet calls them.
    """

    arguments: argparse.Namespace
    files: list[ImageFile]
    test: EvaluationImages
    train: EvaluationImages
    baselines: dict[str, EvaluationImages]
    device: str
    token_dataset: TokenDataset | None = None
    labels: list[int] | None = None
    generator: Any = None
    tokenizer: DualCodebookVQModel | None = None
    features: EfficientNetFeatures | None = None
    train_tokens: tuple[torch.Tensor, torch.Tensor] | None = None
    shown: list[tuple[str, Image.Image]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self.files) or self.arguments.count or self.test.count

    def name_of(self, number: int) -> str:
        """What a sample is called."""
        return self.files[number].name if self.files else f"seed {self.arguments.seed + number}"

    def measure(self, crops: Iterable[torch.Tensor], count: int, decode: bool = True) -> MeasuredSet:
        """Of `count` images (3, size, size) in [-1, 1]."""
        from ..evaluation.generator_evaluation import measure_images

        batches = _batched(with_bar(crops, count), self.arguments.batch_size)
        return measure_images(batches, self.features, self.device, self.tokenizer, decode)


def _evaluate(arguments: argparse.Namespace) -> int:
    from ..evaluation.generator_evaluation import GeneratorEvaluator, generator_cells

    _check(arguments)
    job = _open(arguments)
    _load(job)
    samples = _measure_samples(job)
    test, train = (job.measure(part, part.count) for part in (job.test, job.train))
    evaluator = GeneratorEvaluator(test, train, job.train_tokens, arguments.cells, arguments.seed)
    results = [_result("samples", samples, evaluator), *_baselines(job, evaluator)]
    record = {"protocol": _protocol(job, evaluator.copying[""].cells), "results": results}
    if arguments.neighbours:
        found = evaluator.neighbours(samples)
        record["neighbours"] = [{"sample": job.name_of(number), **entry} for number, entry in enumerate(found)]
    print(transposed_tables(*generator_cells(results)))
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        write_json(arguments.output / RECORD, record)
        print(f"results written to {arguments.output / RECORD}")
        if arguments.neighbours:
            save_png(_sheet(job, found[: len(job.shown)]), arguments.output / SHEET)
            print(f"nearest training images written to {arguments.output / SHEET}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """What can be told without opening anything. Raises ValueError."""
    if (arguments.samples is None) == (arguments.model is None):
        raise ValueError("one of the arguments --samples and --model is required, and only one")
    if arguments.dataset is None:
        raise ValueError("the following argument is required: --dataset")
    if arguments.model is not None:
        check_generator_name(arguments.model, "--model")
    if arguments.model is None:
        because = "is of samples that are drawn: it needs --model, and --samples is given"
        refuse_given(arguments, ("count", "label_column", *OPTIONS), because)
    if arguments.samples is not None and not arguments.samples.is_dir():
        raise ValueError(f"`--samples` must be a folder of images, got '{arguments.samples}'")
    if arguments.tokenizer:
        check_tokenizer_name(_tokenizer_name(arguments), "--tokenizer")
    if arguments.train_tokens and not (arguments.tokenizer or arguments.model):
        raise ValueError("`--train-tokens` needs the tokenizer that made them: give --tokenizer")
    if arguments.neighbours and not arguments.output:
        raise ValueError("`--neighbours` needs a folder for its sheet: give --output")
    if arguments.output:
        check_file(arguments.output / RECORD, "--output", ".json")
        if arguments.neighbours:
            check_file(arguments.output / SHEET, "--output", ".png")


def _tokenizer_name(arguments: argparse.Namespace) -> str | None:
    return None if arguments.tokenizer == EMBEDDED else arguments.tokenizer


def _open(arguments: argparse.Namespace) -> _Job:
    """Opens the data, decoding no image. Raises ValueError for too few of them."""
    from ..evaluation.data import EvaluationData
    from ..evaluation.generator_evaluation import FEWEST_IMAGES

    files = find_images(argparse.Namespace(images=[arguments.samples], recursive=False)) if arguments.samples else []
    if files and len(files) < FEWEST_IMAGES:
        raise ValueError(f"`--samples` must hold at least {FEWEST_IMAGES} images, got {len(files)}")
    from ..tokens.dataset import TokenDataset

    tokens = TokenDataset(arguments.train_tokens, "--train-tokens") if arguments.train_tokens else None
    require_package("datasets", "eval")
    shared = {key: getattr(arguments, key) for key in ("dataset", "config", "image_column", "size", "resample")}
    test = EvaluationData(**shared, split=arguments.split, limit=arguments.limit).open()
    train = _opened(replace(test.data, split=arguments.train_split, limit=arguments.train_limit), "--train-split")
    others = dict.fromkeys(arguments.baseline_split or ())
    baselines = {split: _opened(replace(test.data, split=split), "--baseline-split") for split in others}
    job = _Job(arguments, files, test, train, baselines, check_device(arguments.device), token_dataset=tokens)
    counts = [("--count", job.count), ("--split", test.count), ("--train-split", train.count)]
    for flag, count in [*counts, *(("--baseline-split", images.count) for images in baselines.values())]:
        if count < FEWEST_IMAGES:
            raise ValueError(f"`{flag}` must hold at least {FEWEST_IMAGES} images, got {count}")
    if arguments.cells and arguments.cells > train.count:
        raise ValueError(f"`--cells` must be at most the {train.count} training images, got {arguments.cells}")
    return job


def _opened(data: EvaluationData, flag: str) -> EvaluationImages:
    """Raises ValueError that calls the split by its flag."""
    from ..image_datasets import DatasetError

    try:
        return data.open()
    except DatasetError as error:
        name = flag if error.argument == "split" else f"--{error.argument.replace('_', '-')}"
        raise ValueError(f"`{name}` {error.detail}") from error


def _load(job: _Job) -> None:
    """Loads what measures, then the tokenizer, then the generator. Raises ValueError where they do not fit."""
    from ..loading import load_tokenizer
    from ..metrics import load_metric_network
    from ..weights import encoder_hash

    arguments = job.arguments
    job.features = load_metric_network(NETWORK, arguments.size, job.device)
    if arguments.model:
        from ..generation.loading import load_generator

        job.generator = load_generator(arguments.model, device=job.device, argument="--model")
        job.generator.set_progress_bar_config(disable=True)
        job.labels = labels_to_draw(job.generator, job.test, arguments.label_column, job.count)
        if job.labels is None:
            refuse_given(arguments, ("label_column", "guidance_scale"), "is for a generator with classes")
        job.tokenizer = job.generator.vqvae.eval()
    if arguments.tokenizer:
        named = load_tokenizer(_tokenizer_name(arguments), device=job.device, argument="--tokenizer")
        if job.generator is None:
            job.tokenizer = named
        elif encoder_hash(named) != encoder_hash(job.generator.vqvae):  # otherwise its own decodes, as it draws
            raise ValueError(
                "`--tokenizer` must have the encoder and the codebooks of the generator's, for tokens to be compared: "
                f"'{arguments.tokenizer}' has others"
            )
    if arguments.train_tokens:
        job.train_tokens = _read_train_tokens(job)


def _read_train_tokens(job: _Job) -> tuple[torch.Tensor, torch.Tensor]:
    """All crops of a token data set (M, codebooks, h, w), and the number of the training image of each (M,)."""
    import numpy as np
    import torch

    from ..weights import encoder_hash

    folder = job.arguments.train_tokens
    tokens = job.token_dataset
    tokens.info.check_model(job.tokenizer, encoder_hash(job.tokenizer), folder, "--tokenizer")
    if tokens.info.crops.grid(job.tokenizer.downsample_factor) != _grid(job):
        raise ValueError(f"`--train-tokens` must be of crops of `--size` {job.arguments.size}, '{folder}' is of others")
    if len(tokens) < job.train.count:
        raise ValueError(f"`--train-tokens` must hold {job.train.count} training images, '{folder}' has {len(tokens)}")
    rows = list(islice((row["tokens"] for row in tokens.rows()), job.train.count))
    images = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(row) for row in rows]))
    return torch.from_numpy(np.concatenate(rows).astype(np.int32)), images


def _grid(job: _Job) -> tuple[int, int]:
    return (-(-job.arguments.size // job.tokenizer.downsample_factor),) * 2


def _measure_samples(job: _Job) -> MeasuredSet:
    if job.generator is None:
        from ..pil_images import read_image

        crops = (job.test.data.crop(read_image(file.path)) for file in job.files)
        return job.measure(_shown(job, crops), job.count, decode=False)
    import torch

    tokens: list[torch.Tensor] = []
    crops = draw(job.generator, job.arguments, job.labels, job.count, tokens)
    samples = replace(job, tokenizer=None).measure(_shown(job, crops), job.count)
    return replace(samples, tokens=torch.cat(tokens).int())


def _shown(job: _Job, crops: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The samples; the first ones are kept for the sheet."""
    from ..image_processing_dualcodebook import to_image

    for number, crop in enumerate(crops):
        if number < job.arguments.neighbours:
            job.shown.append((job.name_of(number), to_image(crop)))
        yield crop


def _batched(crops: Iterable[torch.Tensor], size: int) -> Iterator[torch.Tensor]:
    import torch

    crops = iter(crops)
    while batch := list(islice(crops, size)):
        yield torch.stack(batch)


def _result(name: str, images: MeasuredSet, evaluator: GeneratorEvaluator, decoded: bool = True) -> dict[str, Any]:
    return {"name": name, "pictures": len(images), "metrics": evaluator(images, decoded)}


def _baselines(job: _Job, evaluator: GeneratorEvaluator) -> Iterator[dict[str, Any]]:
    """The best that these tokens allow, a perfect copier, and other real images."""
    import torch

    test, train = evaluator.test, evaluator.train
    if job.tokenizer is not None:
        yield _result(f"{job.test.data.split}, reconstructed", test.of_reconstructions(), evaluator)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(job.arguments.seed))
    copies = train.select(order[: job.count])
    yield _result(f"{job.train.data.split} (copies)", copies, evaluator, decoded=False)
    if job.tokenizer is not None:
        yield _result(f"{job.train.data.split}, reconstructed", copies.of_reconstructions(), evaluator)
    for split, images in job.baselines.items():
        yield _result(split, job.measure(images, images.count, decode=False), evaluator, decoded=False)


def _protocol(job: _Job, cells: int) -> dict[str, Any]:
    import torch

    from ..configuration_dualcodebook import config_hash
    from ..evaluation.evaluator import hardware, library_versions
    from ..evaluation.generator_evaluation import definitions
    from ..weights import weights_hash

    arguments = job.arguments
    protocol = {"test": job.test.data.record(job.test.count), "train": job.train.data.record(job.train.count)}
    protocol["samples"] = _describe_samples(job)
    if job.tokenizer is not None:
        name = tokenizer_label(_tokenizer_name(arguments)) if arguments.model is None else "the generator's"
        hashes = {"config_hash": config_hash(job.tokenizer.config), "weights_sha256": weights_hash(job.tokenizer)}
        protocol["tokenizer"] = {"name": name, **hashes}
    if arguments.train_tokens:
        crops = len(job.train_tokens[0])
        protocol["train_tokens"] = {"folder": public_name(arguments.train_tokens), "crops": crops}
    protocol |= {"seed": arguments.seed, "cells": cells, "batch_size": arguments.batch_size}
    protocol |= {"definitions": definitions(job.features)}
    return protocol | {"versions": library_versions(), "hardware": hardware(torch.device(job.device))}


def _describe_samples(job: _Job) -> dict[str, Any]:
    from ..weights import weights_hash

    if job.generator is None:
        digest = hashlib.sha256()
        for file in job.files:
            digest.update(hashlib.sha256(file.path.read_bytes()).digest())
        found = {"folder": public_name(job.arguments.samples), "sha256": digest.hexdigest()}
        return found | ({"tokens": "of the images, tokenized again"} if job.tokenizer is not None else {})
    return {
        "generator": public_name(job.arguments.model, parts=2),
        "transformer_sha256": weights_hash(job.generator.transformer),
        "scheduler": {"class": type(job.generator.scheduler).__name__, **dict(job.generator.scheduler.config)},
        "classes": None if job.labels is None else f"as often as in {job.test.data.split}",
        **sampling_options(job.arguments, job.labels is not None),
        "guidance_schedule": GUIDANCE_SCHEDULES[0],
        "choice_temperature": CHOICE_TEMPERATURE,
    }


def _sheet(job: _Job, neighbours: list[dict[str, Any]]) -> Image.Image:
    """Of the first samples. As many training images as needed are read again: to keep all would take gigabytes."""
    from ..evaluation.neighbour_sheet import neighbour_sheet
    from ..image_processing_dualcodebook import to_image

    wanted = {found["train_image"] for entry in neighbours for found in entry.values()}
    train = {number: to_image(crop) for number, crop in enumerate(job.train.first(max(wanted) + 1)) if number in wanted}
    return neighbour_sheet(job.shown, neighbours, train)
