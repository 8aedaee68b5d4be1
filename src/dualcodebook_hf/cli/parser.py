"""A parser that takes flags in both spellings and complains in one line."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's, but `--max_pixels` is `--max-pixels`, nothing may be abbreviated, and a mistake is a ValueError.

    Flags are added with hyphens. Subcommands' parsers are of this class too.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse's, with the underscores of flags read as hyphens; values and what follows a `--` stay."""
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        return super().parse_known_args([*map(_with_hyphens, words[:end]), *words[end:]], namespace)

    def in_words_of(self, command: str, text: str) -> str:
        """A message with the names of arguments in backticks, `batch_size`, as the command's flags, `--batch-size`."""
        (commands,) = (action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction))
        words = {}
        for action in commands[command]._actions:
            flags = [flag for flag in action.option_strings if flag.startswith("--")]
            shown = flags[0] if flags else str(action.metavar or action.dest)
            words |= {action.dest: shown, shown.lower(): shown}
        return re.sub(r"`(\w+)`", lambda match: f"`{words.get(match[1], match[1])}`", text)

    def error(self, message: str) -> NoReturn:
        """Raises ValueError with argparse's message and where to read more."""
        raise ValueError(f"{message} (see `{self.prog} --help`)")


def _with_hyphens(word: str) -> str:
    """`--a_b=c_d` -> `--a-b=c_d`, with a `~` in front of the value expanded; a word that is not a flag stays."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + os.path.expanduser(value)  # `--output=~/x`: no shell expands that
