"""Command lines of training: a preset or YAML file in sections, and flags that win over it -> dataclasses."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from operator import or_
from typing import Any

from ..flags import BOOLEANS, Parser, Switch, did_you_mean
from ..presets import SHORT, TOKENIZER, PresetFamily, load_preset, preset_names

USAGE = "%(prog)s [flags of `accelerate launch` --] [--config NAME|FILE] [--FLAG VALUE ...]"
DESCRIPTION = (
    "Each flag is also a key of a YAML file, under the section that its heading names first. Flags win over the "
    "file; `null` empties what may be empty. Defaults are those of --config."
)
NULL = ("null", "none", "None")
WORDS = str | list[str]  # one text or several
NUMBERS = int | list[int]
EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def parse_sections(
    argv: Sequence[str], classes: Mapping[str, type], prog: str, family: PresetFamily = TOKENIZER
) -> list[Any]:
    """As `parse_sections_and_flags`, without the second."""
    return parse_sections_and_flags(argv, classes, prog, family)[0]


def parse_sections_and_flags(
    argv: Sequence[str], classes: Mapping[str, type], prog: str, family: PresetFamily = TOKENIZER
) -> tuple[list[Any], frozenset[str]]:
    """`--config NAME|FILE` and flags -> an instance of each class, in order; and the fields that flags have set.

    Nothing is checked but the types.

    Every field is a flag, spelled with underscores or with dashes; `null` sets one to None that may be None. What
    `--help` calls the default is the value under the `--config` beside it. A field's metadata may hold its `help`, a
    `heading`, which opens a group of the help, and `flags`, further names.

    Args:
        argv: the command line, without the program's name.
        classes: {section of the YAML file: dataclass}, without a field name that two of them have.
        prog: the program's name in help and usage.
        family: of the presets and files that `--config` names; one of its presets is `tiny`, the default.

    Ends the process with 0 for `--help`. Raises ValueError for an unknown flag or key, with the nearest known one, and
    for a value of the wrong type.
    """
    chooser = Parser(prog=prog, add_help=False)
    chooser.add_argument("--config", default="tiny")
    chosen, _ = chooser.parse_known_args(argv)
    sections = load_preset(chosen.config, family)
    for section, content in sections.items():
        known = list(_fields(classes[section]))
        unknown = [str(name) for name in content if name not in known]
        if unknown:
            raise ValueError(f"unknown argument `{section}.{unknown[0]}`{did_you_mean(unknown[0], known, '`')}")
    parser = Parser(prog=prog, usage=USAGE, description=DESCRIPTION)
    add_fields(parser, classes, sections, family)
    given = parser.parse_args(argv)
    parts = []
    for section, kind in classes.items():
        fields = _fields(kind)
        of_flags = {name: _of_flag(field, getattr(given, name)) for name, field in fields.items() if name in given}
        values = sections[section] | of_flags
        parts.append(kind(**{name: read_value(fields[name], value) for name, value in values.items()}))
    return parts, given.given


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a section.

    Attributes:
        name: also of its flag.
        kind: bool, int, float, str, `WORDS`, `NUMBERS` or list[int].
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
    if field.kind in (list[int], NUMBERS):
        return _numbers(field, value if isinstance(value, list) else [value])
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


def _numbers(field: Field, values: list[Any]) -> int | list[int]:
    """`list[int]` stays one, also of one number; of `NUMBERS` one number is itself."""
    numbers = [_scalar(field.name, int, value) for value in values]
    if field.kind == list[int]:
        return numbers
    if not numbers:
        raise ValueError(f"`{field.name}` must have a value, got an empty list")
    return numbers if len(numbers) > 1 else numbers[0]


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


def _of_flag(field: Field, words: bool | str | list[str]) -> Any:
    """A flag's words as a file would have them."""
    if isinstance(words, list) and len(words) > 1:
        return [_of_flag(field, word) for word in words]
    alone = words[0] if isinstance(words, list) else words
    return None if field.optional and alone in NULL else alone


@functools.cache
def _fields(kind: type) -> dict[str, Field]:
    hints = typing.get_type_hints(kind)
    found = {}
    for spec in dataclasses.fields(kind):
        hint, parts = hints[spec.name], typing.get_args(hints[spec.name])
        optional = type(None) in parts
        if optional:
            hint = functools.reduce(or_, (part for part in parts if part is not type(None)))
        factory, default = spec.default_factory, spec.default
        default = factory() if factory is not dataclasses.MISSING else default
        extra = (spec.metadata.get("help", ""), spec.metadata.get("separator", ""))
        found[spec.name] = Field(spec.name, hint, optional, default, *extra)
    return found


def add_fields(
    parser: Parser,
    classes: Mapping[str, type],
    sections: Mapping[str, dict[str, Any]],
    family: PresetFamily = TOKENIZER,
) -> None:
    """Adds `--config`, and every field as a flag, in the groups that the fields' headings open.

    Args:
        parser: its flags' values come as text, true, false or lists of text, and those not given not at all.
        classes: see `parse_sections`.
        sections: {section: {field: value}}, the defaults that the help shows.
        family: of the presets.
    """
    names = ", ".join(preset_names(family))
    text = f"one of {names}, or a YAML file with the sections {', '.join(classes)} (default: tiny)"
    parser.add_argument("--config", metavar="NAME|FILE", default=argparse.SUPPRESS, help=text)
    for section, kind in classes.items():
        group: argparse._ArgumentGroup = parser.add_argument_group(section)
        for spec, field in zip(dataclasses.fields(kind), _fields(kind).values(), strict=True):
            if "heading" in spec.metadata:
                title = f"{section} / {spec.metadata['heading']}"
                group = parser.add_argument_group(title)
            _add_field(group, field, spec.metadata.get("flags", ()), sections[section].get(field.name, field.default))


def _add_field(group: argparse._ArgumentGroup, field: Field, more: Sequence[str], value: Any) -> None:
    default = _text(value)
    text = field.help + (f" (default: {default})" if default else "")
    flags = [f"--{field.name.replace('_', '-')}", *more]
    options: dict[str, Any] = {"dest": field.name, "help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
    if field.kind is bool:
        group.add_argument(*flags, action=Switch, **options)
    else:
        several = field.kind in (list[int], NUMBERS, WORDS) or field.separator
        metavar = {int: "N", float: "X", list[int]: "N", NUMBERS: "N"}.get(field.kind, "TEXT")
        group.add_argument(*flags, nargs="+" if several else None, metavar=metavar, **options)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
