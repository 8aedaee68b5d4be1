"""`dualcodebook detokenize-dataset | export-tokens`: what is done with a token data set."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from ..loading import check_device, check_tokenizer_name
from ..packages import require_package
from .inputs import add_model, add_other_weights, check_folder, load_model_with_hash, positive
from .tokenize_dataset import add_shard, own_shards


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds both commands to the parser."""
    command = commands.add_parser("detokenize-dataset", help="token data set -> parquet shards of images")
    command.set_defaults(run=_detokenize_dataset)
    command.add_argument("tokens", help="folder that `tokenize-dataset` wrote")
    command.add_argument("--output", required=True, metavar="DIR", help="folder of the data set of images")
    command.add_argument("--crop", type=int, default=0, metavar="A", help="which of an image's crops (default: 0)")
    command.add_argument("--batch-size", type=positive, default=32, metavar="N", help="(default: %(default)s)")
    add_shard(command)
    add_model(command)
    add_other_weights(command)

    command = commands.add_parser("export-tokens", help="token data set -> what trainers of generators read")
    command.set_defaults(run=_export_tokens)
    command.add_argument("tokens", help="folder that `tokenize-dataset` wrote")
    command.add_argument("--output", required=True, metavar="DIR", help="a new folder")
    # The names in `tokens.export.FORMS`, which is not imported for a `--help`.
    command.add_argument("--form", required=True, choices=("llamagen", "jsonl", "mds", "memmap"), help="whose")
    command.add_argument(
        "--label-column", metavar="NAME", help="column of classes (default: label, where there is one)"
    )


def _detokenize_dataset(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    require_package("datasets", "tokens", "detokenize-dataset")
    from ..tokens.dataset import TokenDataset
    from ..tokens.detokenizing import ShardDetokenizer

    check_tokenizer_name(arguments.model, "--model")
    check_device(arguments.device)
    check_folder(Path(arguments.output), "--output")
    tokens = TokenDataset(arguments.tokens)
    model, weights = load_model_with_hash(arguments.model, arguments)
    options = {"crop": arguments.crop, "batch_size": arguments.batch_size, "argument": "--model"}
    options["other_weights"] = arguments.other_weights
    detokenizer = ShardDetokenizer(tokens, model, weights, arguments.output, **options)
    shards = own_shards(arguments.shard, len(tokens.shards), detokenizer.missing())
    with tqdm(desc="images", unit=" images", disable=not sys.stderr.isatty()) as bar:
        images = sum(detokenizer.write(shard, bar.update) for shard in shards)
    there = len(tokens.shards) - len(detokenizer.missing())
    print(f"{images} images written; {there} of {len(tokens.shards)} shards are in {arguments.output}")
    return 0


def _export_tokens(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    require_package("datasets", "tokens", "export-tokens")
    from ..tokens.dataset import TokenDataset
    from ..tokens.export import export_tokens

    check_folder(Path(arguments.output), "--output")
    tokens = TokenDataset(arguments.tokens)
    bar = partial(tqdm, total=len(tokens), desc="images", unit=" images", disable=not sys.stderr.isatty())
    export_tokens(tokens, arguments.form, arguments.output, arguments.label_column, bar)
    print(f"{len(tokens)} images written to {arguments.output} for {arguments.form}")
    return 0
