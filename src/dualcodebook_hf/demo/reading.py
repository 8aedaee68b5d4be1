"""Reads the image files that visitors upload, in a process of its own that a hostile file can take down alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..pil_images import DEFAULT_MAX_PIXELS, read_image, resize_to_max_pixels

LARGEST_UPLOAD = 52_000_000  # pixels of an image file: 50-megapixel cameras; at worst (16-bit grey) 2 GB while read
LARGEST_SHOWN = 2 * DEFAULT_MAX_PIXELS  # pixels after shrinking; what exceeds one megapixel is done in tiles
LONGEST_SIDE = 16_000  # pixels after shrinking: WebP ends at 16,383, and a line of pixels pads to f lines
READING_SECONDS = 30  # the largest uploads take a few
# Formats that PIL decodes itself, or with a library of its own, and that are told by their first bytes.
FORMATS = frozenset({"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"})


class Rejected(ValueError):
    """A file or a choice of a visitor that cannot be used: the only error whose text they are shown."""


@dataclass(frozen=True)
class Upload:
    """An image file that a visitor gave.

    Attributes:
        name: of the file, without its folder.
        image: RGB, shrunk to `LARGEST_SHOWN` pixels.
        file_size: (W, H) of the file's image.
        file_bytes: of the file.
        notes: what was done to the file's image, in words.
    """

    name: str
    image: Image.Image
    file_size: tuple[int, int]
    file_bytes: int
    notes: list[str]


class UploadReader:
    """`read_upload` in a process of its own, one file at a time.

    A decoder that a file keeps busy for hours cannot be stopped in a thread. A process can, and because it reads one
    file at a time, the memory for a large image is needed once, however many visitors there are.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._start()

    def read(self, path: str | Path) -> Upload:
        """Reads an image file.

        Raises Rejected as `read_upload` does, and for a file that takes more than `READING_SECONDS`.
        """
        path = Path(path)
        with self._turn:
            try:
                return self._ask(path)
            except (EOFError, BrokenPipeError):
                self._end()
                self._start()
        raise Rejected(f"'{path.name}' cannot be read within the {READING_SECONDS} seconds that this app takes for it")

    def _start(self) -> None:
        self._process = _start_process()
        self._end = weakref.finalize(self, _end_process, self._process)

    def _ask(self, path: Path) -> Upload:
        """Raises EOFError when the process ends before its answer does."""
        requests, answers = self._process.stdin, self._process.stdout
        requests.write(json.dumps(str(path)).encode() + b"\n")
        requests.flush()
        if not answers.readline():  # it has begun: until then it may have been importing
            raise EOFError
        limit = threading.Timer(READING_SECONDS, self._process.kill)
        limit.start()
        try:
            answer = json.loads(answers.readline() or "null")
            if answer is None:
                raise EOFError
            if "rejected" in answer:
                raise Rejected(answer["rejected"])
            width, height = answer["size"]
            pixels = answers.read(width * height * 3)
        finally:
            limit.cancel()
        if len(pixels) < width * height * 3:
            raise EOFError
        image = Image.frombytes("RGB", (width, height), pixels)
        return Upload(path.name, image, tuple(answer["file_size"]), answer["file_bytes"], answer["notes"])


def read_upload(path: str | Path) -> Upload:
    """Reads an uploaded image file (see `read_image`) and shrinks it to `LARGEST_SHOWN` pixels.

    Raises Rejected, naming the file without its folder, when it cannot be read or is too large or too long.
    """
    path = Path(path)
    with named_without_folder(path):
        animated, transparent = _peek(path)
        file_image = read_image(path)
    image, notes = resize_to_max_pixels(file_image, LARGEST_SHOWN), []
    if max(image.size) > LONGEST_SIDE:
        raise Rejected(
            f"'{path.name}' of {_size_text(file_image.size)} pixels is too long for this app: "
            f"at two megapixels its longer side must not exceed {LONGEST_SIDE:,} pixels"
        )
    if image.size != file_image.size:
        notes.append(f"shrunk from {_size_text(file_image.size)} to {_size_text(image.size)} pixels, this app's limit")
    if animated:
        notes.append("the first frame alone")
    if transparent:
        notes.append("transparency laid over white")
    return Upload(path.name, image, file_image.size, path.stat().st_size, notes)


@contextmanager
def named_without_folder(path: Path) -> Iterator[None]:
    """Turns a ValueError into Rejected; the folder is the server's own and says nothing to who uploaded the file."""
    try:
        yield
    except ValueError as error:
        raise Rejected(str(error).replace(str(path), path.name).replace(f"{path.parent}{os.sep}", "")) from error


def _peek(path: Path) -> tuple[bool, bool]:
    """Whether an image file that `read_image` is about to read, or to refuse better, has frames and transparency.

    Raises ValueError for more pixels than `LARGEST_UPLOAD`, before they are decoded.
    """
    pixels, animated, transparent = 0, False, False
    with suppress(Exception), warnings.catch_warnings():  # a broken file; reading it says what is wrong
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(path) as image:
                pixels, transparent = image.width * image.height, image.has_transparency_data
                if pixels <= LARGEST_UPLOAD:
                    image.seek(1)  # EOFError: a single one. Counting all of 40,000 pages would take half a minute.
                    animated = True
        except Image.DecompressionBombError:
            pixels = LARGEST_UPLOAD + 1
    if pixels > LARGEST_UPLOAD:
        raise ValueError(f"'{path}' is too large for this app, which reads at most {LARGEST_UPLOAD:,} pixels")
    return animated, transparent


def _size_text(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _start_process() -> subprocess.Popen:
    """It ends when its stdin does, which is at the latest when this process ends."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    command = [sys.executable, "-m", "dualcodebook_hf.demo.reading"]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def _end_process(process: subprocess.Popen) -> None:
    """Whatever it is at; and waited for, so that nothing of it is left."""
    process.kill()
    process.communicate()


def _serve() -> None:
    """Each line of stdin is a path; the answer is an empty line, a line of JSON, and of an image its pixels."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C in a terminal is for the app
    Image.init()
    Image.ID[:] = [name for name in Image.ID if name in FORMATS]
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a decoder prints goes to the log
    for line in sys.stdin.buffer:
        answers.write(b"\n")
        answers.flush()
        pixels = b""
        try:
            upload = read_upload(json.loads(line))
            answer = {
                "size": upload.image.size,
                "file_size": upload.file_size,
                "file_bytes": upload.file_bytes,
                "notes": upload.notes,
            }
            pixels = upload.image.tobytes()
        except Rejected as error:
            answer = {"rejected": str(error)}
        answers.write(json.dumps(answer).encode() + b"\n" + pixels)
        answers.flush()


if __name__ == "__main__":
    _serve()
