"""`dualcodebook evaluate`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.protocols import PROTOCOLS, get_protocol
from ..files import is_free_folder, write_json
from ..flags import Parser, Switch, boolean, refuse_given
from ..loading import check_device, check_tokenizer_name, tokenizer_label
from ..metrics import DEFAULT_METRICS, IMAGE_METRICS, NETWORK_METRICS, image_metrics, load_metric_network
from ..packages import require_package
from ..pil_images import BadImageError
from .inputs import (
    add_batch_size,
    add_model,
    add_on_bad_image,
    add_output,
    check_file,
    check_folder,
    load_model,
    positive,
    report_left_out,
    set_command,
)
from .tables import transposed_tables

if TYPE_CHECKING:
    from ..evaluation.data import EvaluationData, EvaluationImages
    from ..evaluation.linear_codec import PatchLinearCodec
    from ..tokenizer import Tokenizer

# What a flag of the data that was not given stands for without --protocol.
DEFAULTS = {"split": "test", "image_column": "image", "size": 256, "resample": "lanczos", "streaming": False}
DATA_FLAGS = ("dataset", "config", *DEFAULTS, "limit", "on_bad_image")


def add_evaluate(command: Parser) -> None:
    """Adds the command's flags to its parser."""
    set_command(command, _evaluate, "--dataset DATASET | --protocol NAME")
    add_model(command.add_argument_group("the tokenizers"), action="append", also="may be repeated; ")
    _add_data(command.add_argument_group("data: --protocol or --dataset"))
    output = command.add_argument_group("what is written")
    add_output(output, "a record of the results and their protocol", metavar="FILE.json")
    output.add_argument(
        "--save-pictures",
        type=Path,
        metavar="FOLDER",
        help="what was measured as PNG, FOLDER/0-MODEL/original and FOLDER/0-MODEL/reconstruction, for other tools",
    )
    networks = command.add_argument_group("metrics by pretrained networks, which are downloaded")
    for name in NETWORK_METRICS:
        spec = IMAGE_METRICS[name]
        text = f"{spec.title}: needs {spec.needs} (default: with --protocol, where they are available)"
        networks.add_argument(f"--{name.replace('_', '-')}", action=Switch, type=boolean, help=text)
    baseline = command.add_argument_group(
        "patch-linear codec: the baseline without a network, at the first model's bits"
    )
    text = "fit and measure it as well (default: false)"
    baseline.add_argument("--patch-linear", action=Switch, type=boolean, default=False, help=text)
    baseline.add_argument("--fit-dataset", help="data set that it is fitted to (default: --dataset's, --protocol's)")
    baseline.add_argument("--fit-split", help="split that it is fitted to (default: train)")
    baseline.add_argument(
        "--fit-pictures", type=positive, default=400, metavar="N", help="number of its images (default: %(default)s)"
    )


def _add_data(data: argparse._ArgumentGroup) -> None:
    data.add_argument(
        "--protocol",
        choices=sorted(PROTOCOLS),
        help="a public data set with its split, crop and number of images, streamed from the Hub",
    )
    data.add_argument("--dataset", help="Hub id, folder of images or parquet files, or a parquet file")
    data.add_argument("--config", help="configuration of a Hub data set that has several")
    data.add_argument("--split", help=f"(default: {DEFAULTS['split']})")
    data.add_argument("--image-column", help=f"column of the images (default: {DEFAULTS['image_column']})")
    data.add_argument(
        "--streaming",
        action=Switch,
        type=boolean,
        help="read the data set as it arrives, without storing it (default: false; true with --protocol)",
    )
    data.add_argument(
        "--size",
        type=positive,
        metavar="PIXELS",
        help=f"side of the centre crop that is measured (default: {DEFAULTS['size']})",
    )
    data.add_argument(
        "--resample",
        choices=("bilinear", "bicubic", "lanczos"),
        help=f"filter that resizes the shorter side (default: {DEFAULTS['resample']})",
    )
    data.add_argument("--limit", type=positive, metavar="N", help="measure the first N images only (default: all)")
    add_batch_size(data, 8, "N images at a time")
    add_on_bad_image(
        data, "name it on stderr and in the results, and measure the others (more than 10 and 1%% end the command)"
    )


def _evaluate(arguments: argparse.Namespace) -> int:
    models = arguments.model or [None]
    for model in models:
        check_tokenizer_name(model, "--model")
    if arguments.output:
        check_file(arguments.output, "--output", ".json")
    if arguments.save_pictures:
        check_folder(arguments.save_pictures, "--save-pictures")
        if not is_free_folder(arguments.save_pictures):
            raise ValueError(f"`--save-pictures` must be an empty folder, '{arguments.save_pictures}' is not")
    if not arguments.patch_linear:
        refuse_given(arguments, ("fit_dataset", "fit_split", "fit_pictures"), "is of the codec: give --patch-linear")
    data = _data(arguments)
    require_package("datasets", "eval")
    images = data.open()
    train_images = _train_data(arguments, data).open() if arguments.patch_linear else None
    networks, not_measured = _load_networks(arguments, data.size)
    results = _measure(arguments, models, images, train_images, networks)
    report_left_out(images.skipped, results[0]["protocol"]["pictures"] + len(images.skipped))
    for result in results if not_measured else ():
        result["protocol"]["not_measured"] = not_measured
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.output, {"results": results})
    _report(arguments, results, not_measured)
    return 0


def _data(arguments: argparse.Namespace) -> EvaluationData:
    """What is measured: the named protocol's data, which no flag may contradict, or what the flags say."""
    from ..evaluation.data import EvaluationData

    given = {key: getattr(arguments, key) for key in DATA_FLAGS}
    if arguments.protocol:
        return get_protocol(arguments.protocol).with_options(**given)
    if arguments.dataset is None:
        raise ValueError("one of the following arguments is required: --dataset, --protocol")
    return EvaluationData(**{key: DEFAULTS.get(key) if value is None else value for key, value in given.items()})


def _train_data(arguments: argparse.Namespace, data: EvaluationData) -> EvaluationData:
    """What the linear codec is fitted to."""
    train = get_protocol(arguments.protocol).train_data() if arguments.protocol else replace(data, split="train")
    train = replace(train, limit=None, streaming=data.streaming, on_bad_image=data.on_bad_image)
    if arguments.fit_dataset:
        # A configuration belongs to a data set; another data set is fitted in its own default one.
        train = replace(train, dataset=arguments.fit_dataset, config=None, split="train")
    return replace(train, split=arguments.fit_split) if arguments.fit_split else train


def _load_networks(arguments: argparse.Namespace, size: int) -> tuple[dict[str, Any], dict[str, str]]:
    """{metric: network} of what is measured, and why a named protocol goes without one that nobody asked for.

    They are loaded before the first model is. Raises ValueError for one that was asked for and is not available.
    """
    device, networks, reasons = check_device(arguments.device), {}, {}
    for name in NETWORK_METRICS:
        asked = getattr(arguments, name)
        if not (bool(arguments.protocol) if asked is None else asked):
            continue
        try:
            networks[name] = load_metric_network(name, size, device)
        except ValueError as error:
            if asked:
                raise
            reasons[name] = str(error)
    return networks, reasons


def _measure(
    arguments: argparse.Namespace,
    models: list[str | None],
    images: EvaluationImages,
    train_images: EvaluationImages | None,
    networks: dict[str, Any],
) -> list[dict[str, Any]]:
    """One result per model, and the linear codec's, which is fitted before anything is measured."""
    from ..evaluation.evaluator import evaluate

    results, codec, fitted = [], None, {}

    def measure(tokenizer: Tokenizer, name: str, folder: str, **options: Any) -> None:
        metrics, target = image_metrics([*DEFAULT_METRICS, *networks], networks), None
        if arguments.save_pictures is not None:  # the number tells models of one name apart
            target = arguments.save_pictures / f"{len(results)}-{folder.replace('/', '-').replace(' ', '-')}"
        options |= {"batch_size": arguments.batch_size, "progress": sys.stderr.isatty(), "save_images": target}
        results.append(evaluate(tokenizer, images, metrics, name=name, **options))

    for model in models:
        tokenizer, label = load_model(model, arguments), tokenizer_label(model)
        if train_images is not None and codec is None:
            codec, fitted = _fit(arguments, train_images, list(tokenizer.codebook_sizes.values()))
        measure(tokenizer, label, label)
    if codec is not None:
        measure(codec, "patch-linear codec", "patch-linear", about={"fitted_to": fitted})
    return results


def _fit(
    arguments: argparse.Namespace, images: EvaluationImages, sizes: list[int]
) -> tuple[PatchLinearCodec, dict[str, Any]]:
    from ..evaluation.linear_codec import fit_linear_codec

    try:
        return fit_linear_codec(images, arguments.fit_pictures, sizes)
    except BadImageError:
        raise
    except ValueError as error:
        raise ValueError(f"`--fit-pictures` {arguments.fit_pictures} of {images.data.dataset!r}: {error}") from error


def _report(arguments: argparse.Namespace, results: list[dict[str, Any]], not_measured: dict[str, str]) -> None:
    from ..evaluation.table import results_cells

    header, rows = results_cells((result["model"]["name"], result) for result in results)
    print(transposed_tables(header, rows))
    protocol = results[0]["protocol"]
    if not protocol.get("complete", True):
        measured, expected = protocol["pictures"], protocol["expected_pictures"]
        print(f"{measured} of the {expected} images of {arguments.protocol}: not comparable with the whole split")
    for reason in not_measured.values():
        print(reason)
    if arguments.output:
        print(f"results written to {arguments.output}")
