"""`dualcodebook --print-completion SHELL`: what makes a shell complete commands and flags."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..flags import Parser
from ..packages import require_package

SHELLS = ("bash", "zsh", "tcsh")


def add_print_completion(parser: Parser, build_parser: Callable[[], Parser]) -> None:
    """Adds the flag to the parser of all commands.

    Args:
        parser: it.
        build_parser: makes one whose commands have all their flags.
    """
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=SHELLS,
        const=build_parser,
        help="print what completes commands, flags and files in this shell, and exit (docs/api/cli.md)",
    )


class _PrintCompletion(argparse.Action):
    """Prints a script that shtab makes of the parsers: a shell that completes starts no Python."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        require_package("shtab", "completion", "--print-completion")
        import shtab

        whole = self.const()
        for command in whole.commands().values():
            for action in command._actions:
                if action.type is Path:
                    action.complete = shtab.FILE
        print(shtab.complete(whole, values))
        parser.exit()
