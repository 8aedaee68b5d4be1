"""Command lines of training: a preset or YAML file in sections, and flags that win over it -> dataclasses."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import reduce
from operator import or_
from typing import Any, NoReturn

from ..presets import SHORT, load_preset, preset_names

BOOLEANS = {**dict.fromkeys(("true", "yes", "on", "1"), True), **dict.fromkeys(("false", "no", "off", "0"), False)}
NULL = ("null", "none", "None")
WORDS = str | list[str]  # one text or several
EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def parse_sections(argv: Sequence[str], classes: Mapping[str, type], prog: str) -> list[Any]:
    """`--config NAME|FILE` and flags -> an instance of each class, in order. Nothing is checked but the types.

    Every field is a flag, spelled with underscores or with dashes; `null` sets one to None that may be None. What
    `--help` calls the default is the value under the `--config` beside it.

    Args:
        argv: the command line, without the program's name.
        classes: {section of the YAML file: dataclass}, without a field name that two of them have.
        prog: the program's name in help and usage.

    Ends the process with 0 for `--help`. Raises ValueError for an unknown flag or key, with the nearest known one, and
    for a value of the wrong type.
    """
    chooser = _Parser(prog=prog, add_help=False, allow_abbrev=False)
    chooser.add_argument("--config", default="tiny")
    chosen, _ = chooser.parse_known_args(list(argv))
    sections = load_preset(chosen.config)
    for section, content in sections.items():
        known = list(_fields(classes[section]))
        unknown = [name for name in content if name not in known]
        if unknown:
            raise ValueError(_unknown(f"{section}.{unknown[0]}", known, str(unknown[0])))
    given, unknown = _build_parser(classes, sections, prog).parse_known_args(list(argv))
    if unknown:
        known = [f"--{name}" for name in ("config", *(name for kind in classes.values() for name in _fields(kind)))]
        raise ValueError(_unknown(unknown[0], known))
    parts = []
    for section, kind in classes.items():
        fields = _fields(kind)
        of_flags = {name: _of_flag(field, getattr(given, name)) for name, field in fields.items() if name in given}
        values = sections[section] | of_flags
        parts.append(kind(**{name: read_value(fields[name], value) for name, value in values.items()}))
    return parts


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a section.

    Attributes:
        name: also of its flag.
        kind: bool, int, float, str, `WORDS` or list[int].
        optional: whether it may be None.
        default: None where there is none.
        help: one line.
        separator: of several words in one text; "": one word.
    """

    name: str
    kind: Any
    optional: bool
    default: Any
    help: str
    separator: str


def read_value(field: Field, value: Any) -> Any:
    """A value of YAML, or text, as the field's type. Raises ValueError, with the field's name, for one that is not."""
    if value is None:
        if not field.optional:
            raise ValueError(f"`{field.name}` must have a value, got null")
        return None
    if field.kind == list[int]:
        return [_scalar(field.name, int, item) for item in (value if isinstance(value, list) else [value])]
    if field.kind == WORDS:
        return _words(field, value if isinstance(value, list) else [value])
    if field.separator and isinstance(value, list):
        return field.separator.join(_scalar(field.name, str, item) for item in value)
    return _scalar(field.name, field.kind, value)


def _words(field: Field, values: list[Any]) -> str | list[str | None] | None:
    """One text as it is; several as a list, in which one may be None where the field may."""
    words = [None if field.optional and value is None else _scalar(field.name, str, value) for value in values]
    if not words:
        raise ValueError(f"`{field.name}` must have a value, got an empty list")
    return words if len(words) > 1 and any(words) else words[0]


def _scalar(name: str, kind: type, value: Any) -> Any:
    """1e5 is a whole number; text is read as what is wanted; true and false are no numbers and no text."""
    found = None
    if kind is bool:
        found = BOOLEANS.get(str(value).lower()) if isinstance(value, (bool, int, float, str)) else None
    elif isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            found = str(value) if kind is str else float(value) if kind is float else _whole(value)
    if not isinstance(found, kind):
        raise ValueError(f"`{name}` must be {EXPECTED[kind]}, got {SHORT.repr(value)}")
    return found


def _whole(value: float | str) -> int | None:
    """None for a fraction. Raises ValueError for text that is no number."""
    with suppress(ValueError):
        return value if isinstance(value, int) else int(str(value))  # not by float, which rounds
    return int(float(value)) if float(value).is_integer() else None


def _of_flag(field: Field, words: str | list[str]) -> Any:
    """A flag's words as a file would have them."""
    if isinstance(words, list) and len(words) > 1:
        return [_of_flag(field, word) for word in words]
    alone = words[0] if isinstance(words, list) else words
    return None if field.optional and alone in NULL else alone


def _fields(kind: type) -> dict[str, Field]:
    hints = typing.get_type_hints(kind)
    found = {}
    for spec in dataclasses.fields(kind):
        hint, parts = hints[spec.name], typing.get_args(hints[spec.name])
        optional = type(None) in parts
        if optional:
            others = tuple(part for part in parts if part is not type(None))
            hint = reduce(or_, others)
        factory, default = spec.default_factory, spec.default
        default = factory() if factory is not dataclasses.MISSING else default
        extra = (spec.metadata.get("help", ""), spec.metadata.get("separator", ""))
        found[spec.name] = Field(spec.name, hint, optional, default, *extra)
    return found


def _build_parser(classes: Mapping[str, type], sections: Mapping[str, dict[str, Any]], prog: str) -> _Parser:
    """All flags, as text, in a group for each section."""
    usage = f"{prog} [--config NAME|FILE] [--FLAG VALUE ...]"
    parser = _Parser(prog=prog, usage=usage, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    names = ", ".join(preset_names())
    parser.add_argument("--config", metavar="NAME|FILE", help=f"one of {names}, or a YAML file (default: tiny)")
    for section, kind in classes.items():
        group = parser.add_argument_group(f"{section} (or in a YAML file under `{section}:`)")
        for name, field in _fields(kind).items():
            default = _text(sections[section].get(name, field.default))
            text = field.help.replace("%", "%%") + (f" (default: {default.replace('%', '%%')})" if default else "")
            shape: dict[str, Any] = {"metavar": _metavar(field)}
            if field.kind is bool:
                shape |= {"nargs": "?", "const": "true"}
            elif field.kind in (list[int], WORDS) or field.separator:
                shape |= {"nargs": "+"}
            group.add_argument(f"--{name}", help=text, **shape)
            if "_" in name:
                group.add_argument(f"--{name.replace('_', '-')}", dest=name, help=argparse.SUPPRESS, **shape)
            if field.kind is bool:
                off = [f"--no_{name}", f"--no-{name.replace('_', '-')}"]
                group.add_argument(*off, dest=name, action="store_const", const="false", help=argparse.SUPPRESS)
    return parser


def _metavar(field: Field) -> str:
    if field.kind is bool:
        return "true|false"
    return {int: "N", float: "X", list[int]: "N"}.get(field.kind, "TEXT")


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _unknown(what: str, known: Sequence[str], name: str | None = None) -> str:
    flag = (name or what).split("=")[0]
    body = flag.lstrip("-")
    spelled = flag.removesuffix(body) + body.replace("-", "_")
    close = difflib.get_close_matches(spelled, known, n=1)
    return f"unknown argument `{what}`" + (f"; did you mean `{close[0]}`?" if close else "")


class _Parser(argparse.ArgumentParser):
    """argparse's, but a mistake is one line."""

    def error(self, message: str) -> NoReturn:
        """Raises ValueError with argparse's message and where to read more."""
        raise ValueError(f"{message} (see `{self.prog} --help`)")
