"""The two controls that Gradio has not, as HTML: two pictures under one slider, and a grid of tokens (grid.js)."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import torch
from PIL import Image

from .fragments import block, data_url
from .mixing import region_text

GRID_JS = Path(__file__).with_name("grid.js").read_text(encoding="utf-8")
SHARP = 256  # pixels: pictures up to there are shown with hard edges


def file_url(path: str | Path) -> str:
    """The address, seen from the page, of a file in Gradio's folder."""
    return f"gradio_api/file={quote(str(path))}"


def slider(left: tuple[str, str], right: tuple[str, str], size: tuple[int, int]) -> str:
    """Two pictures of one size, of which a slider shows the left part of one and the right part of the other.

    Args:
        left: what the picture is, and its file.
        right: likewise.
        size: (W, H).
    """
    names = [html.escape(name) for name, _ in (left, right)]
    images = "".join(
        f'<img src="{file_url(path)}" alt="{name}">' for name, (_, path) in zip(names, (left, right), strict=True)
    )
    sharp = " sharp" if max(size) <= SHARP else ""
    say = html.escape(f"Share of the width that shows {left[0]}; the rest shows {right[0]}", quote=True)
    return block(
        f'<div class="slider{sharp}" style="--ratio: {size[0] / size[1]:.5f}">'
        "<div class=\"scroller\" onscroll=\"this.parentNode.style.setProperty('--x', this.scrollLeft + 'px')\">"
        f'<div class="both">{images}</div></div>'
        f'<span class="tag left" aria-hidden="true">{names[0]}</span>'
        f'<span class="tag right" aria-hidden="true">{names[1]}</span><div class="handle"></div>'
        f'<input type="range" min="0" max="100" value="50" step="any" aria-label="{say}" '
        "oninput=\"this.parentNode.style.setProperty('--at', this.value)\"></div>"
    )


def empty_slider(text: str) -> str:
    """What stands in a slider's place: a frame of its size, with a line in it."""
    return block(f'<div class="slider empty"><p class="faint">{html.escape(text)}</p></div>')


def downloads(files: Mapping[str, str]) -> str:
    """Links that save files: {what they say: file}."""
    links = (
        f'<a class="download" href="{file_url(path)}" download="{html.escape(Path(path).name)}">{html.escape(text)}</a>'
        for text, path in files.items()
    )
    return block(f'<p class="downloads">{"".join(links)}</p>')


def token_grid(
    title: str,
    image: Image.Image,
    factor: int,
    cell: tuple[int, int],
    name: str = "",
    region: torch.Tensor | None = None,
) -> str:
    """A picture with its token grid, for pointer and keyboard.

    Args:
        title: what is shown.
        image: at the pixels that were tokenized.
        factor: pixels of a square's side.
        cell: row and column of the cursor.
        name: of the file under which the picture can be saved; none: it cannot.
        region: bool (h, w), the squares that are painted; None: squares are looked up, and not painted.
    """
    rows, columns = -(-image.height // factor), -(-image.width // factor)
    values = {"rows": rows, "columns": columns, "row": cell[0], "column": cell[1], "factor": factor}
    values |= {"width": image.width, "height": image.height}
    values |= {} if region is None else {"region": region_text(region)}
    data = " ".join(f'data-{key}="{value}"' for key, value in values.items())
    keys = "arrow keys look up" if region is None else "arrow keys move, with shift they paint, space paints or wipes"
    say = html.escape(f"{title}, {rows} rows and {columns} columns: {keys}", quote=True)
    url = data_url(image, "PNG" if region is None else "WEBP")
    save = f'<a class="download" href="{url}" download="{html.escape(name)}">Download</a>' if name else ""
    view = f"0 0 {image.width / factor:.4f} {image.height / factor:.4f}"
    return block(
        f'<p class="title"><b>{html.escape(title)}</b>{save}</p>{"" if region is None else _BRUSHES}'
        f'<div class="sheet" style="--ratio: {image.width / image.height:.5f}">'
        f'<div class="grid" tabindex="0" role="application" aria-label="{say}" {data}><img src="{url}" alt="">'
        f'<svg viewBox="{view}" preserveAspectRatio="none" aria-hidden="true"><path d=""/></svg>'
        '<span class="cursor"></span></div></div><p class="said" role="status"></p>'
    )


_BRUSHES = (
    '<p class="tools"><label>Brush <select class="brush"><option value="1">1 square</option>'
    '<option value="3" selected>3 x 3</option><option value="7">7 x 7</option></select></label>'
    '<button type="button" data-fill="1">Whole picture</button><button type="button" data-fill="0">Clear</button></p>'
)
