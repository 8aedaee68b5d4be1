"""Command lines of training: a preset or YAML file in sections, and flags that win over it -> dataclasses."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import HfArgumentParser

from ..presets import load_preset, preset_names


def parse_sections(argv: Sequence[str], classes: Mapping[str, type], prog: str) -> list[Any]:
    """`--config NAME|FILE` and flags -> an instance of each class, in order. Nothing is checked but the types.

    Every field is a flag, spelled with underscores or with dashes. A YAML null sets a field to None, unless a flag sets
    it to something else.

    Args:
        argv: the command line, without the program's name.
        classes: {section of the YAML file: dataclass}, without a field name that two of them have.
        prog: the program's name in help and usage.

    Ends the process with exit code 2 for a flag that argparse refuses, and with 0 for `--help`. Raises ValueError for
    an unknown flag or key, with the nearest known one, and for a null where a value is needed.
    """
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--config", default="tiny")
    chosen, flags = chooser.parse_known_args(list(argv))
    sections = load_preset(chosen.config)
    parser = HfArgumentParser(tuple(classes.values()), prog=prog, allow_abbrev=False, formatter_class=_HelpFormatter)
    names = ", ".join(preset_names())
    parser.add_argument("--config", default="tiny", help=f"one of {names}, or a YAML file")
    file_flags, nulls = _read_sections(sections, classes)
    # argparse leaves alone what is there already, unless a flag sets it.
    values, unknown = parser.parse_known_args([*file_flags, *flags], argparse.Namespace(**dict.fromkeys(nulls)))
    if unknown:
        known = [f"--{name}" for name in ("config", *(name for kind in classes.values() for name in _fields(kind)))]
        raise ValueError(_unknown(unknown[0], known))
    for kind in classes.values():
        hints = typing.get_type_hints(kind)
        for name in _fields(kind):
            if getattr(values, name) is None and type(None) not in typing.get_args(hints[name]):
                raise ValueError(f"`{name}` must have a value, got null")
    return [kind(**{name: getattr(values, name) for name in _fields(kind)}) for kind in classes.values()]


def _read_sections(sections: Mapping[str, dict], classes: Mapping[str, type]) -> tuple[list[str], list[str]]:
    """YAML values as flags, so that types are checked in one place, and the names of the fields that are null."""
    flags: list[str] = []
    nulls: list[str] = []
    for section, values in sections.items():
        known = _fields(classes[section])
        for name, value in values.items():
            if name not in known:
                raise ValueError(_unknown(f"{section}.{name}", known, name))
            if isinstance(value, dict):
                raise ValueError(f"`{section}.{name}` must be a plain value or a list, got {value!r}")
            if value is None:
                nulls.append(name)
            else:
                flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags, nulls


def _fields(kind: type) -> list[str]:
    return [spec.name for spec in dataclasses.fields(kind)]


def _unknown(what: str, known: Sequence[str], name: str | None = None) -> str:
    flag = (name or what).split("=")[0]
    body = flag.lstrip("-")
    spelled = flag.removesuffix(body) + body.replace("-", "_")
    close = difflib.get_close_matches(spelled, known, n=1)
    return f"unknown argument `{what}`" + (f"; did you mean `{close[0]}`?" if close else "")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds a default to each help text, where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)
