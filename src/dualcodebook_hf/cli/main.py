"""Reads the command line, runs one command, and turns errors into a line and an exit code."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Sequence

from . import convert, demo, evaluate, export, images, publish, train
from .parser import Parser

BAD_INPUT = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit code: 0, 2 for bad input, or that of the training process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's name may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["train"]:  # its flags are the trainer's
            return train.train(argv[1:])
        parser = _build_parser()
        arguments = parser.parse_args(argv)
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


def _build_parser() -> Parser:
    parser = Parser(prog="dualcodebook", description="Dual Codebook VQ: images to two grids of tokens and back.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for family in (images, evaluate, train, convert, export, publish, demo):
        family.add_command(commands)
    return parser
