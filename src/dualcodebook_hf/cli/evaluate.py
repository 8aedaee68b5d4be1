"""`dualcodebook evaluate`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .inputs import add_model, check_file, check_model_name, complete, load_model, need, positive, public_name


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds the command to the parser."""
    command = commands.add_parser("evaluate", help="measure tokenizers on a split of a data set")
    command.set_defaults(run=_evaluate)
    add_model(command, action="append", also="may be repeated; ")
    data = command.add_argument_group("data")
    data.add_argument("--dataset", required=True, help="Hub id, folder of pictures or parquet files, or a parquet file")
    data.add_argument("--config", help="configuration of a Hub data set that has several")
    data.add_argument("--split", default="test", help="(default: %(default)s)")
    data.add_argument("--image-column", default="image", help="column of the pictures (default: %(default)s)")
    data.add_argument("--streaming", action="store_true", help="read the data set as it arrives, without storing it")
    data.add_argument(
        "--size", type=positive, default=256, help="side of the centre crop that is measured (default: 256)"
    )
    data.add_argument(
        "--resample",
        choices=("bilinear", "bicubic", "lanczos"),
        default="lanczos",
        help="filter that resizes the shorter side (default: %(default)s)",
    )
    data.add_argument("--limit", type=positive, help="measure the first so many pictures only")
    data.add_argument("--batch-size", type=positive, default=8, help="pictures at a time (default: %(default)s)")
    rival = command.add_argument_group("patch-linear codec: the rival without a network, at the first model's bits")
    rival.add_argument("--patch-linear", action="store_true", help="fit and measure it as well")
    rival.add_argument("--fit-dataset", help="data set that it is fitted to (default: that of --dataset)")
    rival.add_argument("--fit-split", default="train", help="split that it is fitted to (default: %(default)s)")
    rival.add_argument(
        "--fit-pictures", type=positive, default=400, help="so many of its pictures (default: %(default)s)"
    )
    command.add_argument("--output", type=Path, metavar="FILE.json", help="write the results, with their protocol")


def _evaluate(arguments: argparse.Namespace) -> int:
    models = arguments.model or [None]
    for model in models:
        check_model_name(model)
    if arguments.output:
        check_file(arguments.output, "--output", ".json")
    need("datasets", "eval")
    fit_dataset = arguments.fit_dataset or arguments.dataset
    _check_data(arguments, arguments.dataset, arguments.split)
    if arguments.patch_linear:
        _check_data(arguments, fit_dataset, arguments.fit_split)
    from ..evaluation.evaluate import evaluate_model, evaluate_patch_linear, format_table

    shared = ("image_column", "streaming", "size", "resample", "limit", "batch_size")
    options = {name: getattr(arguments, name) for name in shared} | {"progress": sys.stderr.isatty()}
    source = (arguments.dataset, arguments.config, arguments.split)
    results, sizes = [], None
    for model in models:
        loaded = load_model(argparse.Namespace(**{**vars(arguments), "model": model}))
        sizes = sizes or [book.size for book in loaded.quantize.books.values()]
        results.append(evaluate_model(loaded, *source, name=public_name(model), **options))
        del loaded
    if arguments.patch_linear:
        fit = {"train_split": arguments.fit_split, "train_pictures": arguments.fit_pictures, "sizes": sizes}
        # A configuration belongs to a data set; another data set is fitted in its own default one.
        fit["train_config"] = None if arguments.fit_dataset else arguments.config
        results.append(evaluate_patch_linear(fit_dataset, *source, **fit, **options))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        with complete(arguments.output) as temporary:
            temporary.write_text(json.dumps({"results": results}, indent=2) + "\n")
    print(format_table((result["model"]["name"], result) for result in results))
    if arguments.output:
        print(f"results written to {arguments.output}")
    return 0


def _check_data(arguments: argparse.Namespace, dataset: str, split: str) -> None:
    """Opens a split, so that a wrong name is known before any work."""
    from ..picture_datasets import load_pictures

    config = arguments.config if dataset == arguments.dataset else None
    load_pictures(dataset, config, split, arguments.image_column, arguments.streaming)
