"""Presets (`paper`, `base`, `tiny`) and run files: YAML in three sections, model, data and training, with includes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

SECTIONS = ("model", "data", "training")
PRESETS = Path(__file__).parent


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


def preset_names() -> list[str]:
    """Names that `--config` and `from_preset` accept beside a file."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_preset(name_or_file: str) -> dict[str, dict]:
    """Reads a preset or a YAML file with everything that it includes -> {"model": {...}, "data": ..., "training": ...}.

    `include:` names a preset or a file, relative to the including one; the including file's keys win.
    Raises ValueError for an unknown preset, a missing file, a loop, a key that stands twice, or a section that does not
    exist.
    """
    return _load(_locate(str(name_or_file), Path.cwd()), [])


def _locate(name: str, folder: Path) -> Path:
    if name in preset_names():
        return PRESETS / f"{name}.yaml"
    path = folder / Path(name).expanduser()
    if not path.is_file():
        close = difflib.get_close_matches(name, preset_names(), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"`config` must be one of {', '.join(preset_names())} or a YAML file, got {name!r}{hint}")
    return path.resolve()


def _load(path: Path, seen: list[Path]) -> dict[str, dict]:
    if path in seen:
        raise ValueError(f"`include` goes round in a circle: {' -> '.join(map(str, [*seen, path]))}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), RunFileLoader) or {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"`config` {path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"`config` {path} must be a mapping with the sections {', '.join(SECTIONS)}, got {content!r}")
    merged: dict[str, dict] = {section: {} for section in SECTIONS}
    if "include" in content:
        merged = _load(_locate(str(content.pop("include")), path.parent), [*seen, path])
    for section, values in content.items():
        if section not in SECTIONS:
            close = difflib.get_close_matches(str(section), [*SECTIONS, "include"], n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"`config` {path} has an unknown section {section!r}{hint} (known: {', '.join(SECTIONS)})")
        if not isinstance({} if values is None else values, dict):
            raise ValueError(f"`config` {path}: section {section!r} must be a mapping, got {values!r}")
        merged[section].update(values or {})
    return merged
