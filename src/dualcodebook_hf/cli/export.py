"""`dualcodebook export`."""

from __future__ import annotations

import argparse

from ..flags import Parser, Switch
from .inputs import add_output, check_folder, set_command


def add_export(command: Parser) -> None:
    """Adds the command's flags to its parser."""
    set_command(command, _export, "[MODEL]")
    command.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="folder, Hub id, or a checkpoint inside the package: sharp or faithful (default: sharp)",
    )
    add_output(command, "a new or empty folder for the files", "exported")
    for name, default, text in (
        ("fp16", True, "graphs in float16 too, whose search for codes stays in float32"),
        ("int8", False, "graphs with convolutions quantized to 8 bits too; their loss is printed"),
        ("programs", True, "programs of torch.export too"),
    ):
        shown = str(default).lower()
        command.add_argument(f"--{name}", action=Switch, nargs=0, default=default, help=f"{text} (default: {shown})")


def _export(arguments: argparse.Namespace) -> int:
    from ..files import atomic_folder
    from ..loading import load_tokenizer
    from ..onnx_export import check_exportable, export_onnx, export_programs

    check_folder(arguments.output, "--output")
    model = load_tokenizer(arguments.model, device="cpu")
    check_exportable(model)
    variants = ["", *(f"_{name}" for name in ("fp16", "int8") if getattr(arguments, name))]
    with atomic_folder(arguments.output) as folder:
        folder.mkdir()
        checks = export_onnx(model, folder, variants)
        if arguments.programs:
            checks.append(export_programs(model, folder))
    print("\n".join(map(str, checks)))
    print(f"written to {arguments.output}")
    return 0
