"""Reads the command line, runs one command, and turns errors into a line and an exit code."""

from __future__ import annotations

import importlib
import io
import signal
import sys
from collections.abc import Container, Sequence

from ..flags import Parser
from ..malloc import keep_freed_memory
from ..version import __version__
from .completion import add_print_completion

BAD_INPUT = 2
# What adds a command's flags to its parser, and a line of help. A command's module is imported when it is named.
COMMANDS = {
    "reconstruct": ("images.add_reconstruct", "encode and decode images; show and measure the result"),
    "tokenize": ("images.add_tokenize", "images -> token file"),
    "detokenize": ("images.add_detokenize", "token file -> images"),
    "tokenize-dataset": ("tokenize_dataset.add_tokenize_dataset", "a whole data set -> parquet shards of tokens"),
    "detokenize-dataset": ("token_datasets.add_detokenize_dataset", "token data set -> parquet shards of images"),
    "export-tokens": ("token_datasets.add_export_tokens", "token data set -> what trainers of generators read"),
    "evaluate": ("evaluate.add_evaluate", "measure tokenizers on a split of a data set"),
    "evaluate-generator": (
        "evaluate_generator.add_evaluate_generator",
        "measure generated images: distances, precision and recall, copies",
    ),
    "generate": ("generate.add_generate", "draw images by a generator on dual tokens, or repaint a part of one"),
    "train": ("train.add_train", "train a tokenizer"),
    "train-generator": ("train.add_train_generator", "train a generator on a tokenizer's tokens"),
    "convert": ("convert.add_convert", "turn other tokenizers' weights into a folder of ours"),
    "export": ("export.add_export", "write a tokenizer as ONNX graphs and torch.export programs"),
    "card": ("publish.add_card", "write the model card of a trained model"),
    "push": ("publish.add_push", "publish a trained model, or the Space, on the Hugging Face Hub"),
    "demo": ("demo.add_demo", "look at models and their tokens in a browser, on this machine"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit code: 0, 2 for bad input, or that of the training process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's name may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] in (["train"], ["train-generator"]):  # flags of accelerate's launcher may stand before their own
            from .train import train, train_generator

            return (train if argv[0] == "train" else train_generator)(argv[1:])
        parser = build_parser(argv[:1])
        arguments = parser.parse_args(argv)
        keep_freed_memory()
        try:
            return arguments.run(arguments)
        except ValueError as error:
            raise ValueError(parser.in_words_of(arguments.command, str(error))) from error
    except ValueError as error:
        return _complain(error, BAD_INPUT)
    except OSError as error:  # a full disk, a file that went away meanwhile
        return _complain(error, 1)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _complain(error: Exception, code: int) -> int:
    print("dualcodebook: error:", " ".join(str(error).split()), file=sys.stderr)
    return code


def build_parser(names: Container[str] = COMMANDS) -> Parser:
    """The parser of all commands, of which those in `names` have their flags."""
    parser = Parser(
        prog="dualcodebook",
        usage="%(prog)s COMMAND ...",
        description="Dual Codebook VQ: images to two grids of tokens and back.",
        epilog="`dualcodebook COMMAND --help` tells more. Flags are written with dashes or with underscores.",
    )
    parser.add_argument("--version", action="version", version=f"dualcodebook_hf {__version__}")
    add_print_completion(parser, build_parser)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", title="commands", prog="dualcodebook"
    )
    for name, (place, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if name in names:
            module, function = place.split(".")
            getattr(importlib.import_module(f".{module}", __package__), function)(command)
    return parser
