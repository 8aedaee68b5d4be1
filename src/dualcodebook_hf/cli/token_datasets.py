"""`dualcodebook detokenize-dataset | export-tokens`: what is done with a token data set."""

from __future__ import annotations

import argparse
import sys
from functools import partial

from ..flags import Parser
from ..loading import check_tokenizer_name
from ..packages import require_package
from .inputs import (
    add_batch_size,
    add_model,
    add_other_weights,
    add_output,
    check_folder,
    load_model_with_hash,
    not_negative,
    set_command,
)
from .tokenize_dataset import add_shard, own_shards


def add_detokenize_dataset(command: Parser) -> None:
    """Adds the command's flags to its parser."""
    set_command(command, _detokenize_dataset, "TOKENS")
    command.add_argument("tokens", metavar="TOKENS", help="folder that `tokenize-dataset` wrote")
    text = "which of an image's crops, from 0 on (default: %(default)s)"
    command.add_argument("--crop", type=not_negative, default=0, metavar="A", help=text)
    add_batch_size(command, 32, "N crops in one forward pass")
    output = command.add_argument_group("what is written")
    add_output(output, "the data set of images; one that is there is continued", "detokenized-dataset")
    add_shard(output)
    tokenizer = command.add_argument_group("the tokenizer")
    add_model(tokenizer, fast=True)
    add_other_weights(tokenizer, nargs=0)


def add_export_tokens(command: Parser) -> None:
    """Adds the command's flags to its parser."""
    set_command(command, _export_tokens, "TOKENS --form FORM")
    command.add_argument("tokens", metavar="TOKENS", help="folder that `tokenize-dataset` wrote")
    # The names in `tokens.export.FORMS`, which is not imported for a `--help`.
    command.add_argument(
        "--form",
        required=True,
        choices=("llamagen", "jsonl", "mds", "memmap"),
        help="LlamaGen's npy folders, 1d-tokenizer's jsonl, MosaicML streaming's shards, or one array of numpy",
    )
    add_output(command, "a new folder", "exported-tokens")
    text = "column of classes (default: label, where there is one)"
    command.add_argument("--label-column", metavar="NAME", help=text)


def _detokenize_dataset(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    require_package("datasets", "tokens")
    from ..tokens.dataset import TokenDataset
    from ..tokens.detokenizing import ShardDetokenizer

    check_tokenizer_name(arguments.model, "--model")
    check_folder(arguments.output, "--output")
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

    require_package("datasets", "tokens")
    from ..tokens.dataset import TokenDataset
    from ..tokens.export import export_tokens

    check_folder(arguments.output, "--output")
    tokens = TokenDataset(arguments.tokens)
    bar = partial(tqdm, total=len(tokens), desc="images", unit=" images", disable=not sys.stderr.isatty())
    export_tokens(tokens, arguments.form, arguments.output, arguments.label_column, bar)
    print(f"{len(tokens)} images written to {arguments.output} for {arguments.form}")
    return 0
