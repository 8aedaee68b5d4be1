"""`dualcodebook convert`."""

from __future__ import annotations

import argparse

from ..flags import Parser
from .inputs import add_output, check_folder, set_command


def add_convert(command: Parser) -> None:
    """Adds the command's flags to its parser."""
    set_command(command, _convert, "SOURCE")
    command.add_argument(
        "source",
        metavar="SOURCE",
        help="checkpoint of the paper's authors or of taming-transformers (.ckpt, .pt, .pth, .bin, .safetensors), or "
        "folder or Hub id of a diffusers VQModel",
    )
    add_output(command, "a new or empty folder for the model", "converted")
    command.add_argument(
        "--kind", help="authors, taming or vqmodel (default: whichever the tensors' names show); another is an error"
    )
    command.add_argument("--subfolder", help="where in the repository or folder the VQModel lies, such as vqvae")
    command.add_argument("--revision", help="branch, tag or commit of a Hub id")


def _convert(arguments: argparse.Namespace) -> int:
    check_folder(arguments.output, "--output")
    from ..convert import convert_checkpoint

    options = {name: getattr(arguments, name) for name in ("kind", "subfolder", "revision")}
    print(convert_checkpoint(arguments.source, arguments.output, **options).summary())
    return 0
