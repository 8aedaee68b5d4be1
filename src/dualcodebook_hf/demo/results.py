"""What a visitor is looking at, and its pictures as files under the picture's own name."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image

from ..reconstruction import Reconstruction
from .inspection import LONGEST_STEM, enlarged
from .reading import Upload

Cell = tuple[int, int]


@dataclass(frozen=True)
class Shown:
    """What a visitor is looking at; nobody changes it, so that all sessions share the first one.

    Attributes:
        label: of the model.
        upload: the image file.
        result: its image as the model reconstructs it.
        rows: of the table of rates, under `TABLE_HEADERS`.
        files: what can be saved, by what it is.
    """

    label: str
    upload: Upload
    result: Reconstruction
    rows: list[list[object]]
    files: dict[str, str]

    def __deepcopy__(self, memo: dict) -> Shown:
        return self

    @property
    def middle(self) -> Cell:
        """Row and column of the square in the middle."""
        return tuple(side // 2 for side in self.result.tokens.shape[1:])


def new_folder() -> Path:
    """In gradio's cache, where files are served from without a copy and deleted when they are old."""
    cache = Path(get_upload_folder())
    cache.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=cache))


def file_name(upload: Upload, what: str) -> str:
    """Under the picture's own name: "cat.jpg" and "error map" to "cat-error-map.png"."""
    stem = Path(upload.name).stem[:LONGEST_STEM]
    return f"{stem}-{what.lower().replace(' ', '-').replace('/', '-')[:LONGEST_STEM]}.png"


def save_image(folder: Path, upload: Upload, image: Image.Image, what: str) -> str:
    """Writes an image, enlarged where it is small, and gives its path."""
    path = folder / file_name(upload, what)
    enlarged(image).save(path, compress_level=1)
    return str(path)


def two_images(upload: Upload, images: Sequence[Image.Image], labels: Sequence[str]) -> list[dict]:
    """Two pictures that can be saved; a single codebook leaves the second frame away."""
    folder = new_folder()
    shown = [
        gr.update(value=save_image(folder, upload, image, label.replace(":", "")), label=label, visible=True)
        for image, label in zip(images, labels, strict=False)
    ]
    return (shown + [gr.update(value=None, visible=False)] * 2)[:2]
