"""What mkdocs writes into pages from the code itself, so that nothing is told twice.

In a page stand markers, each alone on its line:

    <!-- fields: MODULE:CLASS -->   a table of the dataclass's own fields: type, default and help
    <!-- presets -->                the fields that a preset sets
    <!-- metrics -->                every metric of images
    <!-- help: COMMAND -->          what `dualcodebook COMMAND --help` prints
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import io
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

MARKER = re.compile(r"^<!-- (fields|presets|metrics|help)(?:: (\S+))? -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces the markers of a page. Called by mkdocs."""
    return MARKER.sub(lambda match: WRITERS[match[1]](*filter(None, [match[2]])), markdown)


def fields_table(path: str) -> str:
    """The fields that a dataclass adds to those of its bases, from their metadata; `path` is MODULE:CLASS."""
    module, name = path.split(":")
    kind = getattr(importlib.import_module(module), name)
    own = inspect.get_annotations(kind)
    fields = [spec for spec in dataclasses.fields(kind) if spec.name in own]
    kinds = {name: kind.replace(" | None", " or null") for name, kind in own.items()}
    rows = [(anchored(s.name), code(kinds[s.name]), code(default(s)), s.metadata["help"]) for s in fields]
    return table(("field", "type", "default", "meaning"), rows)


def presets_table() -> str:
    """One line for each field that a preset sets; a preset that leaves it alone has the field's default."""
    from dualcodebook_hf.presets import load_preset, preset_names
    from dualcodebook_hf.training.arguments import CLASSES

    presets = {name: load_preset(name) for name in preset_names()}
    rows = []
    for section, kind in CLASSES.items():
        for spec in dataclasses.fields(kind):
            if any(spec.name in preset[section] for preset in presets.values()):
                values = (preset[section].get(spec.name, default(spec)) for preset in presets.values())
                rows.append((f"[`{spec.name}`](#{spec.name})", *map(code, values)))
    return table(("field", *(f"`{name}`" for name in presets)), rows)


def metrics_table() -> str:
    """Name, title, unit and definition of each metric, or what it needs where a network measures."""
    from dualcodebook_hf.metrics import IMAGE_METRICS

    rows = []
    for name, spec in IMAGE_METRICS.items():
        needs = f"on demand: needs {spec.needs}" if spec.load_network else spec.build().definition
        rows.append((code(name), spec.title, spec.unit or "-", needs))
    return table(("name", "title", "unit", "definition"), rows)


def command_help(command: str) -> str:
    """What `dualcodebook COMMAND --help` prints, at 88 columns."""
    from dualcodebook_hf.cli import main

    os.environ["COLUMNS"] = "88"
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        main([command, "--help"])
    return f"```text\n{printed.getvalue().strip()}\n```"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a `|` in a cell does not end it."""
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def anchored(name: str) -> str:
    """A field's name that links can point to."""
    return f'<span id="{name}"></span>`{name}`'


def code(value: Any) -> str:
    """A value as in a YAML file."""
    text = "null" if value is None else str(value)
    return f"`{text.lower() if isinstance(value, bool) else text}`"


def default(spec: dataclasses.Field) -> Any:
    """A field's default, made where it is made anew for each instance."""
    return spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()


WRITERS = {"fields": fields_table, "presets": presets_table, "metrics": metrics_table, "help": command_help}
