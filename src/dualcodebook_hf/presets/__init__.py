"""Presets and run files: YAML in sections, with includes.

Of tokenizers (`paper`, `base`, `tiny`; model, data, training) and of generators (`tiny`, `small`, `maskbit`; generator,
data, training).
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..flags import did_you_mean


class PresetFamily(NamedTuple):
    """The run files of one kind of training.

    Attributes:
        folder: of its presets.
        sections: that its files may have.
    """

    folder: Path
    sections: tuple[str, ...]


TOKENIZER = PresetFamily(Path(__file__).parent, ("model", "data", "training"))
GENERATOR = PresetFamily(Path(__file__).parent / "generator", ("generator", "data", "training"))
# A value in a message: YAML's aliases make a few lines into lists of billions.
SHORT = reprlib.Repr()
SHORT.maxlevel, SHORT.maxlist, SHORT.maxdict, SHORT.maxstring, SHORT.maxlong, SHORT.maxother = 2, 12, 6, 200, 60, 60


class RunFileLoader(yaml.SafeLoader):
    """YAML 1.2's values: `no` and `on` are text, 1e-3 is a number, 010 is ten; and no key may stand twice."""

    yaml_implicit_resolvers: dict = {}  # YAML 1.1's are not inherited

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A decimal number, whatever zeros it starts with."""
        return int(self.construct_scalar(node))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """As SafeLoader's. Raises a YAMLError for a key that stands twice, where YAML would take the last one."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and lines.setdefault(key.value, line) != line:
                raise yaml.YAMLError(f"{key.value!r} stands in line {lines[key.value]} and again in line {line}")
        return super().construct_mapping(node, deep)


RunFileLoader.add_constructor("tag:yaml.org,2002:int", RunFileLoader.construct_yaml_int)
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
    ("merge", r"<<", ["<"]),
):
    RunFileLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def preset_names(family: PresetFamily = TOKENIZER) -> list[str]:
    """Names that `--config` and `from_preset` accept beside a file."""
    return sorted(path.stem for path in family.folder.glob("*.yaml"))


def load_preset(name_or_file: str, family: PresetFamily = TOKENIZER) -> dict[str, dict]:
    """Reads a preset or a YAML file with everything that it includes -> {section: {field: value}}.

    `include:` names a preset or a file, relative to the including one; the including file's keys win.
    Raises ValueError for an unknown preset, a missing file, a loop, a key that stands twice, or a section that does not
    exist.
    """
    return _load(_locate(name_or_file, Path.cwd(), family), [], family)


def _locate(name: Any, folder: Path, family: PresetFamily) -> Path:
    names = preset_names(family)
    if name in names:
        return family.folder / f"{name}.yaml"
    try:
        path = folder / Path(name).expanduser()
        there = path.is_file()
    except (OSError, RuntimeError, TypeError):  # too long, in the home of a user that does not exist, or no text
        there = False
    if not there:
        hint = did_you_mean(name, names) if isinstance(name, str) else ""
        known = ", ".join(names)
        raise ValueError(f"`config` must be one of {known} or a YAML file, got {SHORT.repr(name)}{hint}")
    return path.resolve()


def _load(path: Path, seen: list[Path], family: PresetFamily) -> dict[str, dict]:
    if path in seen:
        raise ValueError(f"`include` goes round in a circle: {' -> '.join(map(str, [*seen, path]))}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), RunFileLoader) or {}
    # The last ones: lists in lists, thousands deep, and what SafeLoader raises for tags such as `!!bool perhaps`.
    except (yaml.YAMLError, OSError, ValueError, RecursionError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())[:500]
        raise ValueError(f"`config` {path} is not readable YAML: {reason or type(error).__name__}") from error
    known = ", ".join(family.sections)
    if not isinstance(content, dict):
        raise ValueError(f"`config` {path} must be a mapping with the sections {known}, got {SHORT.repr(content)}")
    merged: dict[str, dict] = {section: {} for section in family.sections}
    if "include" in content:
        merged = _load(_locate(content.pop("include"), path.parent, family), [*seen, path], family)
    for section, values in content.items():
        if section not in family.sections:
            hint = did_you_mean(str(section), [*family.sections, "include"])
            raise ValueError(f"`config` {path} has an unknown section {SHORT.repr(section)}{hint} (known: {known})")
        if not isinstance({} if values is None else values, dict):
            raise ValueError(f"`config` {path}: section {section!r} must be a mapping, got {SHORT.repr(values)}")
        merged[section].update(values or {})
    return merged
