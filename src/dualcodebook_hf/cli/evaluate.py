"""`dualcodebook evaluate`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.protocols import PROTOCOLS, get_protocol
from ..files import is_free_folder, write_json
from ..loading import check_device, check_tokenizer_name, tokenizer_label
from ..metrics import DEFAULT_METRICS, IMAGE_METRICS, NETWORK_METRICS, image_metrics, load_metric_network
from ..packages import require_package
from .inputs import add_model, add_on_bad_image, check_file, check_folder, load_model, positive

if TYPE_CHECKING:
    from ..evaluation.data import EvaluationData, EvaluationImages

# What a flag of the data that was not given stands for without --protocol.
DEFAULTS = {"split": "test", "image_column": "image", "size": 256, "resample": "lanczos", "streaming": False}
DATA_FLAGS = ("dataset", "config", *DEFAULTS, "limit", "on_bad_image")


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds the command to the parser."""
    command = commands.add_parser("evaluate", help="measure tokenizers on a split of a data set")
    command.set_defaults(run=_evaluate)
    add_model(command, action="append", also="may be repeated; ")
    _add_data(command.add_argument_group("data: --protocol or --dataset"))
    networks = command.add_argument_group("metrics by pretrained networks, which are downloaded")
    for name in NETWORK_METRICS:
        spec = IMAGE_METRICS[name]
        text = f"{spec.title}: needs {spec.needs} (default: with --protocol, where they are available)"
        networks.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=text)
    baseline = command.add_argument_group(
        "patch-linear codec: the baseline without a network, at the first model's bits"
    )
    baseline.add_argument("--patch-linear", action="store_true", help="fit and measure it as well")
    baseline.add_argument("--fit-dataset", help="data set that it is fitted to (default: --dataset's, --protocol's)")
    baseline.add_argument("--fit-split", help="split that it is fitted to (default: train)")
    baseline.add_argument(
        "--fit-pictures", type=positive, default=400, help="number of its images (default: %(default)s)"
    )
    command.add_argument(
        "--save-pictures",
        type=Path,
        metavar="DIR",
        help="write what was measured as PNG, DIR/0-MODEL/original and DIR/0-MODEL/reconstruction, for other tools",
    )
    command.add_argument("--output", type=Path, metavar="FILE.json", help="write the results, with their protocol")


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
        action=argparse.BooleanOptionalAction,
        help="read the data set as it arrives, without storing it (default: with --protocol only)",
    )
    data.add_argument(
        "--size", type=positive, help=f"side of the centre crop that is measured (default: {DEFAULTS['size']})"
    )
    data.add_argument(
        "--resample",
        choices=("bilinear", "bicubic", "lanczos"),
        help=f"filter that resizes the shorter side (default: {DEFAULTS['resample']})",
    )
    data.add_argument("--limit", type=positive, help="measure the first N images only")
    add_on_bad_image(data, "measure the others and list it in the results (more than 10 and 1%% end the command)")
    data.add_argument("--batch-size", type=positive, default=8, help="images at a time (default: %(default)s)")


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
    data = _data(arguments)
    require_package("datasets", "eval")
    images = data.open()
    train_images = _train_data(arguments, data).open() if arguments.patch_linear else None
    networks, not_measured = _load_networks(arguments, data.size)
    results = _measure(arguments, models, images, train_images, networks)
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
    device, networks, reasons = check_device(arguments.device, "--device"), {}, {}
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
    """One result per model, and the linear codec's."""
    from ..evaluation.evaluator import evaluate, evaluate_linear_codec

    options = {"batch_size": arguments.batch_size, "progress": sys.stderr.isatty()}
    results, names = [], [*DEFAULT_METRICS, *networks]
    for number, model in enumerate(models):
        tokenizer, label = load_model(argparse.Namespace(**{**vars(arguments), "model": model})), tokenizer_label(model)
        folder = _images_folder(arguments, label, number)
        metrics = image_metrics(names, networks)
        results.append(evaluate(tokenizer, images, metrics, name=label, save_images=folder, **options))
    if train_images is not None:
        sizes = list(results[0]["model"]["codebook_sizes"].values())
        options |= {"count": arguments.fit_pictures, "sizes": sizes}
        options["save_images"] = _images_folder(arguments, "patch-linear", len(results))
        results.append(evaluate_linear_codec(train_images, images, image_metrics(names, networks), **options))
    return results


def _images_folder(arguments: argparse.Namespace, name: str, number: int) -> Path | None:
    """The folder of one model's images; its number tells models of one name apart."""
    if arguments.save_pictures is None:
        return None
    return arguments.save_pictures / f"{number}-{name.replace('/', '-').replace(' ', '-')}"


def _report(arguments: argparse.Namespace, results: list[dict[str, Any]], not_measured: dict[str, str]) -> None:
    from ..evaluation.table import results_table

    print(results_table((result["model"]["name"], result) for result in results))
    protocol = results[0]["protocol"]
    if not protocol.get("complete", True):
        measured, expected = protocol["pictures"], protocol["expected_pictures"]
        print(f"{measured} of the {expected} images of {arguments.protocol}: not comparable with the whole split")
    skipped = protocol.get("skipped", [])
    if skipped:
        print(f"images left out because they cannot be read: {len(skipped)}")
    for image in skipped:
        print(f"  row {image['row']}" + (f" ({image['file']})" if image["file"] else "") + f": {image['reason']}")
    for reason in not_measured.values():
        print(reason)
    if arguments.output:
        print(f"results written to {arguments.output}")
