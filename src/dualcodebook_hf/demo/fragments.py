"""The demo's own pieces of HTML; page.css says how they look."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence

from PIL import Image

_ELSEWHERE = ' target="_blank" rel="noopener"'


def block(*parts: str) -> str:
    """Wraps pieces so that the style sheet finds them."""
    return f'<div class="dcb">{"".join(parts)}</div>'


def heading(title: str, text: str) -> str:
    """A heading over a line that explains it."""
    return block(f"<h2>{html.escape(title)}</h2>", f'<p class="faint">{html.escape(text)}</p>')


def remark(text: str) -> str:
    """A line that explains what stands above it."""
    return block(f'<p class="faint">{html.escape(text)}</p>')


def hint(text: str) -> str:
    """What stands where there is nothing to show yet."""
    return block(f'<div class="hint">{html.escape(text)}</div>')


def problem(text: str) -> str:
    """Why something cannot be shown; a screen reader says it at once."""
    return block(f'<div class="problem" role="alert">{html.escape(text)}</div>')


def introduction(title: str, text: str, links: Mapping[str, str]) -> str:
    """The page's heading, what it is about, and where to read more."""
    anchors = "".join(
        f'<a href="{url}"{_ELSEWHERE if url.startswith("http") else ""}>{html.escape(to)}</a>'
        for to, url in links.items()
    )
    return block(
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="faint">{html.escape(text)}</p>',
        f'<p class="links">{anchors}</p>',
    )


def about_model(label: str, rate: str) -> str:
    """A model's name and what its tokens take."""
    return block(f"<p>Model: <b>{html.escape(label)}</b></p>", f'<p class="faint">{html.escape(rate)}</p>')


def examples(images: Mapping[str, Image.Image]) -> str:
    """A button for each picture, with its name."""
    buttons = "".join(
        f'<button type="button" data-index="{index}"><img src="{data_url(image, "WEBP")}" alt="">'
        f"{html.escape(name)}</button>"
        for index, (name, image) in enumerate(images.items())
    )
    return block('<p class="faint">Or take an example:</p>', f'<div class="examples">{buttons}</div>')


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
        f'<figure><img src="{data_url(image)}" alt="{html.escape(caption)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for caption, image in patches
    )
    return block(
        f"<p><b>{html.escape(position)}</b></p><p>{html.escape(sentence)}</p>", f'<div class="patches">{figures}</div>'
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def data_url(image: Image.Image, format_: str = "PNG") -> str:
    """An image inside an address."""
    buffer = io.BytesIO()
    image.save(buffer, format_, quality=90)
    return f"data:image/{format_.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
