"""The gate of the app: each input of each event passes through it, and each answer to an error comes out of it."""

from __future__ import annotations

import html
import logging
import os
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from .reading import Rejected

REFUSAL = "Please upload the file: this app reads what was uploaded to it, and nothing else."
FAILURE = "Something went wrong in this app; its log says what."
LONGEST_TEXT = 16_384  # characters of an input: a path, a model's label, or painted squares
FILE_KEYS = {"path", "url"}

logger = logging.getLogger(__name__)


class Refused(gr.Error):
    """An answer in words: what a visitor reads when their request has failed."""

    def __init__(self, message: str) -> None:
        # The page shows a message as HTML, and this one may name the visitor's file.
        super().__init__(html.escape(message, quote=False), duration=None, print_exception=False)


class GatedBlocks(gr.Blocks):
    """Blocks whose functions read files that were uploaded to this app, or examples of it, and no others.

    Gradio checks the files of an input only where the client marks them as such, and follows addresses. Every route
    ends in `process_api`, so this is the place that no event can get around.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._logged: set[tuple[type[Exception], str, int | None]] = set()

    async def process_api(self, block_fn: Any, inputs: list[Any], *arguments: Any, **options: Any) -> dict[str, Any]:
        """As Gradio's, for inputs that are harmless; raises Refused for others, and whatever else goes wrong."""
        blocks = (self.fns[block_fn] if isinstance(block_fn, int) else block_fn).inputs
        try:
            event_data = options.get("event_data")
            _check_files(event_data and event_data._data)
            inputs = [_checked(block, value) for block, value in zip(blocks, inputs, strict=False)]
            return await super().process_api(block_fn, inputs, *arguments, **options)
        except Refused:
            raise
        except Rejected as error:
            raise Refused(str(error)) from error
        except Exception as error:
            # With a traceback once for each place: a visitor can repeat it, and shall not fill the disk.
            place = traceback.extract_tb(error.__traceback__)[-1]
            key = (type(error), place.filename, place.lineno)
            logger.error("an event failed: %s", type(error).__name__, exc_info=key not in self._logged)
            self._logged.add(key)
            raise Refused(FAILURE) from error


def _checked(block: Any, value: Any) -> Any:
    """An input as a handler may see it. Only the path is left of a file; a client's idea of a state is dropped."""
    if block.stateful or value is None:
        return None
    if getattr(block, "data_model", None) is None:
        if not isinstance(value, (bool, int, float, str)) or len(str(value)) > LONGEST_TEXT:
            raise Refused(REFUSAL)
        return value
    if not isinstance(value, dict):
        raise Refused(REFUSAL)
    return {"path": _uploaded(value.get("path")), "meta": {"_type": "gradio.FileData"}}


def _check_files(value: Any) -> None:
    """Raises Refused for a file, at any depth of what came with a click, that was not uploaded."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if FILE_KEYS & value.keys():
                _uploaded(value.get("path"))
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def _uploaded(path: Any) -> str:
    """The resolved path of a regular file inside this app's folder; raises Refused for everything else."""
    if isinstance(path, str) and len(path) <= LONGEST_TEXT:
        with suppress(OSError, ValueError):  # too long a name, a null character
            real = Path(os.path.realpath(path))
            if real.is_relative_to(os.path.realpath(get_upload_folder())) and real.is_file():
                return str(real)
    raise Refused(REFUSAL)
