"""What a stranger's requests may take: which routes, how many bytes, how much disk, how much of the queue."""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
from gradio.utils import get_upload_folder
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import get_route_path

RETENTION = 3600  # seconds that uploads and results are kept
LARGEST_FILE = 40 * 2**20  # bytes of an upload
LARGEST_BODY = 48 * 2**20  # bytes of a request that uploads: a file, and what it is wrapped in
LARGEST_CALL = 64 * 2**10  # bytes of any other request
UPLOAD_SECONDS = 120
DISK = 2 * 2**30  # bytes of uploads and results together, half of them for uploads that are on their way
SMALLEST_SHARE = 64 * 2**10  # bytes that each file counts at least: a million tiny ones fill a disk too
QUEUE = 64  # jobs that wait
WAITING_PER_VISITOR = 48  # of them: an address alone cannot fill the queue
# What the page and gradio_client ask for. Gradio has more, which fetches addresses, records, runs functions of
# components or saves the page's state.
PAGES = {"", "config", "assets", "static", "svelte", "favicon.ico", "robots.txt", "manifest.json", "theme.css"}
API = {"info", "openapi.json", "startup-events", "app_id", "heartbeat", "theme.css", "user", "login_check"}
API |= {"upload", "upload_progress", "file=", "queue", "call", "run", "cancel", "reset"}


def use_own_folder() -> None:
    """Gives Gradio, in this process, a folder for uploads and results that no other app shares; deleted at the end."""
    os.environ["GRADIO_TEMP_DIR"] = _own_folder().name


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory:
    parent = Path(get_upload_folder())
    parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix="dualcodebook-", dir=parent.resolve())


def make_room(folder: str | Path, limit: float, kept: Collection[str] = ()) -> None:
    """Deletes the oldest files of a folder until the others take at most `limit` bytes, and those that are too old.

    Args:
        folder: with folders inside.
        limit: bytes, with at least `SMALLEST_SHARE` a file.
        kept: paths of files that stay, and do not count.
    """
    now, files = time.time(), []
    for parent, _, names in os.walk(folder, topdown=False):
        with suppress(OSError):  # deleted by somebody else, or an empty folder that is not
            # A minute: Gradio makes the folder of an upload before the file.
            if not names and parent != str(folder) and os.stat(parent).st_mtime < now - 60:
                os.rmdir(parent)
        for path in {os.path.join(parent, name) for name in names}.difference(kept):
            with suppress(OSError):
                status = os.lstat(path)
                files.append((status.st_mtime, max(status.st_size, SMALLEST_SHARE), path))
    total = sum(count for _, count, _ in files)
    for modified, count, path in sorted(files):
        if total <= limit and modified > now - RETENTION:
            break
        Path(path).unlink(missing_ok=True)
        total -= count


class RequestLimits:
    """ASGI middleware inside Gradio's app."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._arriving: Counter[str] = Counter()  # bytes that visitors are sending

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        area, _, route = get_route_path(scope).strip("/").partition("/")
        route = route.partition("/")[0] if area == "gradio_api" else ""
        if not _is_known(area, route):
            await JSONResponse({"detail": "Not Found"}, 404)(scope, receive, send)
        elif scope["method"] != "POST":
            await self._app(scope, receive, send)
        elif route == "upload":
            await self._upload(scope, receive, send)
        else:
            await self._call(route, scope, receive, send)

    async def _call(self, route: str, scope: dict, receive: Any, send: Any) -> None:
        size, blocks = _content_length(scope), scope["app"].get_blocks()
        waiting = [
            event.request.client.host
            for queue in blocks._queue.event_queue_per_concurrency_id.values()
            for event in queue.queue
        ]
        if size is None or size > LARGEST_CALL:
            refusal = JSONResponse({"detail": f"A request must have at most {LARGEST_CALL:,} bytes."}, 413)
            await refusal(scope, receive, send)
        elif route in ("queue", "call", "run") and waiting.count(_visitor(scope)) >= WAITING_PER_VISITOR:
            refusal = JSONResponse({"detail": "Too many of your requests are waiting. Please try again later."}, 503)
            await refusal(scope, receive, send)
        else:
            await self._make_room(blocks)
            await self._app(scope, receive, send)

    async def _upload(self, scope: dict, receive: Any, send: Any) -> None:
        visitor, size = _visitor(scope), _content_length(scope)
        if size is None or size > LARGEST_BODY:
            await _text(f"A file must have at most {LARGEST_FILE:,} bytes.", 413)(scope, receive, send)
        elif self._arriving.total() + size > DISK / 2 or self._arriving[visitor] + size > DISK / 4:
            await _text("Too many uploads at once. Please try again later.", 503)(scope, receive, send)
        else:
            self._arriving[visitor] += size
            try:
                await self._make_room(scope["app"].get_blocks())
                with anyio.move_on_after(UPLOAD_SECONDS) as time_limit:
                    await self._app(scope, receive, send)
                if time_limit.cancelled_caught:
                    await _text(f"An upload must end within {UPLOAD_SECONDS} seconds.", 408)(scope, receive, send)
            finally:
                self._arriving.subtract({visitor: size})
                self._arriving += Counter()  # who sends nothing is not remembered

    async def _make_room(self, blocks: Any) -> None:
        examples = {path for block in blocks.blocks.values() for path in getattr(block, "keep_in_cache", ())}
        limit = DISK - self._arriving.total()
        await anyio.to_thread.run_sync(make_room, get_upload_folder(), limit, examples)


def _is_known(area: str, route: str) -> bool:
    if area != "gradio_api":
        return area in PAGES
    name, sign, scheme = route.partition("=")
    return name + sign in API and scheme.lower() not in ("http:", "https:")


def _content_length(scope: dict) -> int | None:
    """Bytes of the body; None where the client does not say: then they could be without end."""
    return next((int(value) for name, value in scope["headers"] if name == b"content-length"), None)


def _visitor(scope: dict) -> str:
    return scope["client"][0]


def _text(text: str, status: int) -> Response:
    """What the page shows as it is; of the other refusals it shows its own words."""
    return PlainTextResponse(text, status)
