"""`dualcodebook convert`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .inputs import check_folder


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds the command to the parser."""
    command = commands.add_parser("convert", help="turn other tokenizers' weights into a folder of ours")
    command.set_defaults(run=_convert)
    command.add_argument(
        "source",
        help="checkpoint of the paper's authors or of taming-transformers (.ckpt, .pt, .pth, .bin, .safetensors), or "
        "folder or Hub id of a diffusers VQModel",
    )
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="a folder that is empty or new")
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
