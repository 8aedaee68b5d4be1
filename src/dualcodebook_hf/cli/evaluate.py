"""`dualcodebook evaluate`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..evaluation.protocols import PROTOCOLS, get_protocol
from ..files import atomic_file
from ..loading import check_tokenizer_name, tokenizer_label
from ..packages import require_package
from .inputs import (
    add_model,
    check_file,
    check_folder,
    load_model,
    positive,
)

# What a flag of the data that was not given stands for without --protocol.
DEFAULTS = {"split": "test", "image_column": "image", "size": 256, "resample": "lanczos", "streaming": False}

NETWORKS = {
    "lpips": "LPIPS, by VGG16: needs torchmetrics",
    "rfid": "rFID, by Inception: needs torchmetrics, torch-fidelity",
}


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds the command to the parser."""
    command = commands.add_parser("evaluate", help="measure tokenizers on a split of a data set")
    command.set_defaults(run=_evaluate)
    add_model(command, action="append", also="may be repeated; ")
    data = command.add_argument_group("data: --protocol or --dataset")
    data.add_argument(
        "--protocol",
        choices=sorted(PROTOCOLS),
        help="a public data set with its split, crop and number of pictures, streamed from the Hub",
    )
    data.add_argument("--dataset", help="Hub id, folder of pictures or parquet files, or a parquet file")
    data.add_argument("--config", help="configuration of a Hub data set that has several")
    data.add_argument("--split", help=f"(default: {DEFAULTS['split']})")
    data.add_argument("--image-column", help=f"column of the pictures (default: {DEFAULTS['image_column']})")
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
    data.add_argument("--limit", type=positive, help="measure the first so many pictures only")
    data.add_argument("--batch-size", type=positive, default=8, help="pictures at a time (default: %(default)s)")
    networks = command.add_argument_group("metrics by pretrained networks, which are downloaded")
    for name, what in NETWORKS.items():
        default = "(default: with --protocol, where they are to be had)"
        networks.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=f"{what} {default}")
    baseline = command.add_argument_group("patch-linear codec: the rival without a network, at the first model's bits")
    baseline.add_argument("--patch-linear", action="store_true", help="fit and measure it as well")
    baseline.add_argument("--fit-dataset", help="data set that it is fitted to (default: --dataset's, --protocol's)")
    baseline.add_argument("--fit-split", help="split that it is fitted to (default: train)")
    baseline.add_argument(
        "--fit-pictures", type=positive, default=400, help="so many of its pictures (default: %(default)s)"
    )
    command.add_argument(
        "--save-pictures",
        type=Path,
        metavar="DIR",
        help="write what was measured as PNG, DIR/0-MODEL/original and DIR/0-MODEL/reconstruction, for other tools",
    )
    command.add_argument("--output", type=Path, metavar="FILE.json", help="write the results, with their protocol")


def _evaluate(arguments: argparse.Namespace) -> int:
    models = arguments.model or [None]
    for model in models:
        check_tokenizer_name(model, "--model")
    if arguments.output:
        check_file(arguments.output, "--output", ".json")
    if arguments.save_pictures:
        from ..files import is_free_folder

        check_folder(arguments.save_pictures, "--save-pictures")
        if not is_free_folder(arguments.save_pictures):
            raise ValueError(f"`--save-pictures` must be an empty folder, '{arguments.save_pictures}' is not")
    data = _data(arguments)
    require_package("datasets", "eval")
    fit_source = _fit_source(arguments, data)
    _check_data(data, data["dataset"], data["config"], data["split"])
    if arguments.patch_linear:
        _check_data(data, *fit_source)
    results = _measure(arguments, models, data, fit_source)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(arguments.output) as temporary:
            temporary.write_text(json.dumps({"results": results}, indent=2) + "\n")
    from ..evaluation.evaluator import format_table

    print(format_table((result["model"]["name"], result) for result in results))
    if arguments.protocol and not results[0]["protocol"]["complete"]:
        measured, expected = (results[0]["protocol"][key] for key in ("pictures", "expected_pictures"))
        print(f"{measured} of the {expected} pictures of {arguments.protocol}: not to be compared with the whole split")
    for reason in results[0]["protocol"].get("not_measured", {}).values():
        print(reason)
    if arguments.output:
        print(f"results written to {arguments.output}")
    return 0


def _data(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is measured: the named protocol's data, which no flag may contradict, or what the flags say."""
    keys = ("dataset", "config", *DEFAULTS)
    given = {key: getattr(arguments, key) for key in keys}
    if arguments.protocol:
        streaming = True if arguments.streaming is None else arguments.streaming
        return get_protocol(arguments.protocol).options(given) | {"streaming": streaming}
    if arguments.dataset is None:
        raise ValueError("one of the following arguments is required: --dataset, --protocol")
    return {key: DEFAULTS.get(key) if value is None else value for key, value in given.items()}


def _fit_source(arguments: argparse.Namespace, data: dict[str, Any]) -> tuple[str, str | None, str]:
    """Data set, configuration and split that the linear codec is fitted to."""
    if arguments.fit_dataset:
        # A configuration belongs to a data set; another data set is fitted in its own default one.
        return arguments.fit_dataset, None, arguments.fit_split or "train"
    if arguments.protocol:
        protocol = get_protocol(arguments.protocol)
        config = protocol.config if protocol.train_dataset == protocol.dataset else None
        return protocol.train_dataset, config, arguments.fit_split or protocol.train_split
    return data["dataset"], data["config"], arguments.fit_split or "train"


def _check_data(data: dict[str, Any], dataset: str, config: str | None, split: str) -> None:
    """Opens a split, so that a wrong name is known before any work."""
    from ..image_datasets import load_images

    load_images(dataset, config, split, data["image_column"], data["streaming"])


def _measure(
    arguments: argparse.Namespace, models: list[str | None], data: dict[str, Any], fit_source: tuple
) -> list[dict[str, Any]]:
    """One result a model, and the linear codec's."""
    from ..evaluation.evaluator import evaluate_model, evaluate_patch_linear

    source = tuple(data.pop(key) for key in ("dataset", "config", "split"))
    options = data | {name: getattr(arguments, name) for name in ("limit", "batch_size")}
    networks, not_measured = _networks(arguments)
    options |= {"progress": sys.stderr.isatty(), **networks}
    results, sizes = [], None
    for model in models:
        loaded = load_model(argparse.Namespace(**{**vars(arguments), "model": model}))
        sizes = sizes or [codebook.size for codebook in loaded.quantize.codebooks.values()]
        options["save_pictures"] = _images_of(arguments, tokenizer_label(model), len(results))
        results.append(evaluate_model(loaded, *source, name=tokenizer_label(model), **options))
        del loaded
    if arguments.patch_linear:
        train_dataset, train_config, train_split = fit_source
        fit = {"train_config": train_config, "train_split": train_split, "train_pictures": arguments.fit_pictures}
        options["save_pictures"] = _images_of(arguments, "patch-linear", len(results))
        results.append(evaluate_patch_linear(train_dataset, *source, **fit, sizes=sizes, **options))
    if arguments.protocol:
        for result in results:
            record = get_protocol(arguments.protocol).record(result["protocol"]["pictures"])
            result["protocol"] = record | result["protocol"] | ({"not_measured": not_measured} if not_measured else {})
    return results


def _images_of(arguments: argparse.Namespace, name: str, place: int) -> Path | None:
    """The folder of one model's pictures; its place tells models of one name apart."""
    if arguments.save_pictures is None:
        return None
    return arguments.save_pictures / f"{place}-{name.replace('/', '-').replace(' ', '-')}"


def _networks(arguments: argparse.Namespace) -> tuple[dict[str, bool], dict[str, str]]:
    """Which metrics by networks are measured, and why a named protocol goes without one that nobody asked for.

    They are loaded once here, so that what is missing is known before the first model has been measured. Raises
    ValueError for one that was asked for and is not to be had.
    """
    from ..evaluation.evaluator import load_metric_networks

    found, reasons = {}, {}
    for name in NETWORKS:
        asked = getattr(arguments, name)
        found[name] = bool(arguments.protocol) if asked is None else asked
        try:
            load_metric_networks(**{**dict.fromkeys(NETWORKS, False), name: found[name]}, device="cpu")
        except ValueError as error:
            if asked:
                raise
            found[name], reasons[name] = False, str(error)
    return found, reasons
