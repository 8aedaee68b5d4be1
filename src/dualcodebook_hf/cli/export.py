"""`dualcodebook export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .inputs import check_folder


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds the command to the parser."""
    command = commands.add_parser("export", help="write a tokenizer as ONNX graphs and torch.export programs")
    command.set_defaults(run=_export)
    command.add_argument(
        "model", nargs="?", help="folder or Hub id (default: the checkpoint inside the package, offline)"
    )
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="a folder that is empty or new")
    command.add_argument("--no-fp16", action="store_true", help="leave the graphs in float16 out")
    command.add_argument(
        "--int8", action="store_true", help="graphs with convolutions quantized to 8 bits too; their loss is printed"
    )
    command.add_argument("--no-programs", action="store_true", help="leave the programs of torch.export out")


def _export(arguments: argparse.Namespace) -> int:
    from ..files import atomic_folder
    from ..loading import load_tokenizer
    from ..onnx_export import check_exportable, export_onnx, export_programs

    check_folder(arguments.output, "--output")
    model = load_tokenizer(arguments.model, device="cpu")
    check_exportable(model)
    variants = ["", *([] if arguments.no_fp16 else ["_fp16"]), *(["_int8"] if arguments.int8 else [])]
    with atomic_folder(arguments.output) as folder:
        folder.mkdir()
        checks = export_onnx(model, folder, variants)
        if not arguments.no_programs:
            checks.append(export_programs(model, folder))
    print("\n".join(map(str, checks)))
    print(f"written to {arguments.output}")
    return 0
