"""`dualcodebook demo`: the Space, on this machine."""

from __future__ import annotations

import argparse
import socket

from ..flags import Parser
from ..packages import require_package
from .inputs import positive, set_command


def add_demo(command: Parser) -> None:
    """Adds the command's flags to its parser."""
    set_command(command, _demo)
    command.add_argument(
        "--models",
        "--model",
        dest="models",
        nargs="+",
        metavar="MODEL",
        help="folders or Hub ids to choose from, and to compare (default: sharp and faithful, inside the package)",
    )
    command.add_argument(
        "--generator", metavar="MODEL", help="folder or Hub id of a generator (default: the one inside the package)"
    )
    command.add_argument("--host", default="127.0.0.1", help="0.0.0.0: open to the network (default: %(default)s)")
    command.add_argument("--port", type=positive, default=7860, metavar="N", help="(default: %(default)s)")


def _demo(arguments: argparse.Namespace) -> int:
    from ..loading import check_generator_name, check_tokenizer_name

    require_package("gradio", "space")
    for model in arguments.models or ():  # those inside the package need no check
        check_tokenizer_name(model, "--models")
    if arguments.generator is not None:
        check_generator_name(arguments.generator, "--generator")
    _check_address(arguments.host, arguments.port)
    from ..demo import build_demo, launch_options

    demo = build_demo(arguments.models, arguments.generator)
    _, url, _ = demo.launch(
        server_name=arguments.host,
        server_port=arguments.port,
        prevent_thread_lock=True,
        quiet=True,
        **launch_options(),
    )
    print(f"the demo runs at {url} (Ctrl+C ends it)", flush=True)
    demo.block_thread()
    return 0


def _check_address(host: str, port: int) -> None:
    """Raises ValueError unless a server can listen there."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"`--host` {host} and `--port` {port} cannot be used: {error}") from error
