"""The parser of every command: flags in both spellings, on and off alike, suggestions, a mistake in one line."""

from __future__ import annotations

import argparse
import difflib
import itertools
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

BOOLEANS = {**dict.fromkeys(("true", "yes", "on", "1"), True), **dict.fromkeys(("false", "no", "off", "0"), False)}


class HelpFormatter(argparse.HelpFormatter):
    """argparse's, with `--flag, --no-flag` for a `Switch`."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # No public method does it; a test reads the help.
        if isinstance(action, Switch):
            return ", ".join(action.option_strings)
        return super()._format_action_invocation(action)


class Parser(argparse.ArgumentParser):
    """argparse's, but `--max_pixels` is `--max-pixels`, nothing may be abbreviated, and a mistake is a ValueError.

    Flags are added with hyphens. Subcommands' parsers are of this class too.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": HelpFormatter, **options})

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's, and `given`: the names of the arguments whose flags were there, for `refuse_given`.

        Raises ValueError with the nearest known flag for an unknown one.
        """
        words = list(sys.argv[1:] if args is None else args)
        commands, given = self.commands(), frozenset[str]()
        if not commands or not words or words[0].startswith("-"):
            given = self._check_flags(words)
        elif words[0] in commands:
            given = commands[words[0]]._check_flags(words)
        arguments, unknown = self.parse_known_args(words, namespace)
        if unknown:
            raise ValueError(f"unexpected argument `{unknown[0]}`{commands.get(words[0], self)._more()}")
        arguments.given = given
        return arguments

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse's, with the underscores of flags read as hyphens; values and what follows a `--` stay."""
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        return super().parse_known_args([*map(_with_hyphens, words[:end]), *words[end:]], namespace)

    def commands(self) -> dict[str, Parser]:
        """The subcommands' parsers by name."""
        found = [action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return found[0] if found else {}

    def in_words_of(self, command: str, text: str) -> str:
        """A message with the names of arguments in backticks, `batch_size`, as the command's flags, `--batch-size`."""
        words = {}
        for action in self.commands()[command]._actions:
            flags = [flag for flag in action.option_strings if flag.startswith("--")]
            shown = flags[0] if flags else str(action.metavar or action.dest)
            words |= {action.dest: shown, shown.lower(): shown}
        return re.sub(r"`(\w+)`", lambda match: f"`{words.get(match[1], match[1])}`", text)

    def error(self, message: str) -> NoReturn:
        """Raises ValueError with argparse's message and where to read more."""
        raise ValueError(re.sub(r"^argument ([^:/]+)[^:]*: ", r"`\1` ", message) + self._more())

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """What argparse asks for each value. Raises ArgumentError with the nearest choice for another one."""
        if action.choices is not None and value not in action.choices:
            names = list(map(str, action.choices))
            message = f"must be one of {', '.join(names)}, got {value!r}{did_you_mean(str(value), names)}"
            raise argparse.ArgumentError(action, message)

    def _check_flags(self, words: Sequence[str]) -> frozenset[str]:
        """The arguments whose flags are there; before argparse misses what else is demanded."""
        given = set()
        for word in itertools.takewhile("--".__ne__, words):
            flag = _with_hyphens(word).partition("=")[0]
            if not flag.startswith("--"):
                continue
            if flag not in self._option_string_actions:
                hint = did_you_mean(flag, self._option_string_actions, "`")
                raise ValueError(f"unknown argument `{word}`{hint}{self._more()}")
            given.add(self._option_string_actions[flag].dest)
        return frozenset(given)

    def _more(self) -> str:
        return f" (see `{self.prog} --help`)"


class Switch(argparse.Action):
    """`--flag` and `--no-flag`; `--flag true` and `--flag false` do the same, where no file's name can follow.

    Args:
        option_strings: `--flag`.
        dest: the attribute.
        nargs: 0 where the command has positional arguments, which would be taken for the value.
        options: of argparse.Action.
    """

    def __init__(self, option_strings: Sequence[str], dest: str, nargs: int | str = "?", **options: Any) -> None:
        names = [*option_strings, *(f"--no-{flag.removeprefix('--')}" for flag in option_strings)]
        super().__init__(names, dest, nargs=nargs, **options)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        """Stores True or False, or the text of another value: what that may be is the field's to say."""
        off = (option_string or "").startswith("--no-")
        if values not in (None, []) and off:
            raise argparse.ArgumentError(None, f"`{option_string}` takes no value, got {values!r}")
        setattr(namespace, self.dest, not off if values in (None, []) else BOOLEANS.get(values.lower(), values))


def boolean(text: str) -> str:
    """argparse type of a `Switch`: a word for true or false."""
    if text.lower() not in BOOLEANS:
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return text


def refuse_given(arguments: argparse.Namespace, names: Iterable[str], because: str) -> None:
    """Raises ValueError for an argument whose flag was there although it changes nothing: "`name` `because`"."""
    for name in names:
        if name in arguments.given:
            raise ValueError(f"`{name}` {because}")


def did_you_mean(word: str, known: Iterable[str], quote: str = "") -> str:
    """The end of a message, with the nearest of the known words between quotes, or nothing."""
    close = difflib.get_close_matches(word[:100], list(known), n=1)
    return f"; did you mean {quote}{close[0]}{quote}?" if close else ""


def _with_hyphens(word: str) -> str:
    """`--a_b=c_d` -> `--a-b=c_d`, with a `~` in front of the value expanded; a word that is not a flag stays."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + os.path.expanduser(value)  # `--output=~/x`: no shell expands that
