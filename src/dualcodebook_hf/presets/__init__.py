"""Presets (`paper`, `base`, `tiny`) and run files: YAML in three sections, model, data and training, with includes."""

from __future__ import annotations

import difflib
from pathlib import Path

import yaml

SECTIONS = ("model", "data", "training")
PRESETS = Path(__file__).parent


def preset_names() -> list[str]:
    """Names that `--config` and `from_preset` accept beside a file."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_preset(name_or_file: str) -> dict[str, dict]:
    """Reads a preset or a YAML file with everything that it includes -> {"model": {...}, "data": ..., "training": ...}.

    `include:` names a preset or a file, relative to the including one; the including file's keys win.
    Raises ValueError for an unknown preset, a missing file, a loop, or a section that does not exist.
    """
    return _load(_locate(str(name_or_file), Path.cwd()), [])


def _locate(name: str, folder: Path) -> Path:
    if name in preset_names():
        return PRESETS / f"{name}.yaml"
    path = Path(name) if Path(name).is_absolute() else folder / name
    if not path.is_file():
        close = difflib.get_close_matches(name, preset_names(), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"`config` must be one of {', '.join(preset_names())} or a YAML file, got {name!r}{hint}")
    return path.resolve()


def _load(path: Path, seen: list[Path]) -> dict[str, dict]:
    if path in seen:
        raise ValueError(f"`include` goes round in a circle: {' -> '.join(map(str, [*seen, path]))}")
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`config` {path} is not readable YAML: {error}") from error
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
        if not isinstance(values or {}, dict):
            raise ValueError(f"`config` {path}: section {section!r} must be a mapping, got {values!r}")
        merged[section].update(values or {})
    return merged
