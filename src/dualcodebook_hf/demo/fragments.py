"""The demo's own pieces of HTML, and its style sheet: colours come from the theme, so that light and dark both work."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence

from PIL import Image

CSS = """
.dcb { --faint: color-mix(in srgb, var(--body-text-color) 72%, transparent); }
.gradio-container { max-width: 1240px !important; margin: 0 auto; }
.html-container:has(.dcb) { padding: 0; }
.dcb h1 { font-size: 1.7rem; font-weight: 600; margin: 0 0 0.2rem; }
.dcb h3 { font-size: 1.1rem; font-weight: 600; margin: 0.6rem 0 0; }
.dcb p { margin: 0.15rem 0; line-height: 1.45; }
.dcb .faint { color: var(--faint); }
.dcb .hint { padding: 1.4rem 1rem; text-align: center; border: 1px dashed var(--border-color-primary);
  border-radius: var(--radius-lg); color: var(--faint); }
.dcb .tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(120px, 1fr)); gap: 10px; }
.dcb .tile { border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg); padding: 8px 12px;
  background: var(--block-background-fill); }
.dcb .tile b { display: block; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.dcb .tile span { color: var(--faint); font-size: 0.85rem; }
.dcb table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 0; }
.dcb table, .dcb tr { border: 0; }
.dcb th, .dcb td { padding: 6px 8px; text-align: right; border: 0;
  border-bottom: 1px solid var(--border-color-primary); background: none; }
.dcb th { font-weight: 400; color: var(--faint); vertical-align: bottom; }
.dcb th:first-child, .dcb td:first-child { text-align: left; padding-left: 0; }
.dcb tbody tr:first-child td { font-weight: 600; }
.dcb .codebooks { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 20px; }
.dcb svg { display: block; width: 100%; height: 110px; border-bottom: 1px solid var(--body-text-color-subdued);
  fill: var(--color-accent); }
.dcb .ends { display: flex; justify-content: space-between; font-size: 0.85rem; }
.dcb .patches { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 8px; }
.dcb figure { margin: 0; width: 96px; }
.dcb figure img { width: 96px; height: 96px; object-fit: contain; image-rendering: pixelated; margin: 0;
  border-radius: var(--radius-sm); border: 1px solid var(--border-color-primary); }
.dcb figcaption { font-size: 0.85rem; line-height: 1.25; margin-top: 4px; color: var(--faint); }
.clickable img { cursor: crosshair; }
.sharp img { image-rendering: pixelated; }
[id$="-examples"] .gallery { display: grid; grid-template-columns: repeat(4, minmax(0, 84px)); gap: 8px; }
[id$="-examples"] .gallery :is(span, .container) { display: block; width: 100%; height: auto; max-height: none; }
[id$="-examples"] .gallery img { display: block; width: 100%; max-width: none; aspect-ratio: 1; object-fit: cover; }
@media (max-width: 640px) {
  .dcb th, .dcb td { padding: 5px 4px; font-size: 0.85rem; }
}
"""


def block(*parts: str) -> str:
    """Wraps pieces so that the style sheet finds them."""
    return f'<div class="dcb">{"".join(parts)}</div>'


def heading(title: str, text: str, level: int = 3) -> str:
    """A heading over a line that explains it."""
    return block(f"<h{level}>{html.escape(title)}</h{level}>", f'<p class="faint">{html.escape(text)}</p>')


def remark(text: str) -> str:
    """A line that explains what stands above it."""
    return block(f'<p class="faint">{html.escape(text)}</p>')


def hint(text: str) -> str:
    """What stands where there is nothing to show yet."""
    return block(f'<div class="hint">{html.escape(text)}</div>')


def about_file(name: str, size: tuple[int, int], count: int, notes: Sequence[str]) -> str:
    """A file's name, size and bytes, and what was done to its image."""
    lines = [f"{size[0]} x {size[1]} pixels, {count:,} bytes", *(f"{note[0].upper()}{note[1:]}." for note in notes)]
    return block(
        f'<p style="overflow-wrap: anywhere"><b>{html.escape(name)}</b></p>',
        *(f'<p class="faint">{html.escape(line)}</p>' for line in lines),
    )


def tiles(values: Mapping[str, str]) -> str:
    """Large numbers, each over its caption."""
    cells = (
        f'<div class="tile"><b>{html.escape(value)}</b><span>{caption}</span></div>'
        for caption, value in values.items()
    )
    return block(f'<div class="tiles">{"".join(cells)}</div>')


def rate_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Bytes, bits per pixel and quality; None is a dash."""
    head = "".join(f"<th>{html.escape(header)}</th>" for header in headers)
    formats = ("{}", "{:,}", "{:.4g}", "{:.2f}", "{:.3f}")
    body = ""
    for row in rows:
        cells = ("-" if value is None else text.format(value) for text, value in zip(formats, row, strict=True))
        body += "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
    return block(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def token_note(grid: tuple[int, int], codebooks: int, packed: int, stored: int) -> str:
    """What the token file of an image holds.

    Args:
        grid: columns and rows of the tokens.
        codebooks: tokens at each position.
        packed: bytes of the tokens, densely packed.
        stored: bytes of the file.
    """
    positions = grid[0] * grid[1]
    return block(
        f"<p>{grid[0]} x {grid[1]} = {_count(positions, 'position')} with {_count(codebooks, 'token')} each: "
        f"<b>{packed:,} bytes</b> when packed.</p>",
        f'<p class="faint">The file takes {stored:,} bytes: it stores each token as 16 bits, with a header that names '
        "the picture, its size and the model's codebooks.</p>",
    )


def opened_note(images: Sequence[tuple[str, tuple[int, int]]]) -> str:
    """The images of a token file: names and sizes (W, H)."""
    lines = (f"<p>{html.escape(name)}, {width} x {height} pixels</p>" for name, (width, height) in images)
    return block(f"<p><b>{_count(len(images), 'picture')}</b>, decoded from the tokens alone</p>", *lines)


def histograms(usage: Mapping[str, tuple[Sequence[int], float]]) -> str:
    """One bar chart per codebook: its codes from the most to the least used."""
    charts = []
    for name, (counts, perplexity) in usage.items():
        ordered = sorted(counts, reverse=True)
        used, top = sum(count > 0 for count in ordered), ordered[0]
        # Logarithmic: in most images one code covers every flat region.
        heights = (100 * math.log1p(count) / math.log1p(top) for count in ordered[:used])
        path = "".join(f"M{place},100V{100 - height:.1f}h1V100z" for place, height in enumerate(heights))
        name = name if name.endswith("codebook") else f"{name} codebook"
        label = f"{name}: {used} of {len(counts)} codes used"
        charts.append(
            f"<div><p><b>{html.escape(name.capitalize())}</b>: {used} of {len(counts)} codes used, "
            f"perplexity {perplexity:.0f}</p>"
            f'<svg viewBox="0 0 {len(counts)} 100" preserveAspectRatio="none" role="img" '
            f'aria-label="{html.escape(label)}"><path d="{path}"/></svg>'
            f'<div class="ends faint"><span>{top:,} x</span><span>logarithmic scale</span></div></div>'
        )
    return block(f'<div class="codebooks">{"".join(charts)}</div>')


def cell(position: str, sentence: str, patches: Iterable[tuple[str, Image.Image]]) -> str:
    """One token position: its codes in words, and small images with captions."""
    figures = "".join(
        f'<figure><img src="{_data_url(image)}" alt="{html.escape(caption)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for caption, image in patches
    )
    return block(
        f"<p><b>{html.escape(position)}</b></p><p>{html.escape(sentence)}</p>", f'<div class="patches">{figures}</div>'
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
