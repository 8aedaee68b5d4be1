"""Tables for a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Sequence

WIDTH = 100
NARROWEST = 10  # of a column that is cut


def text_table(rows: Sequence[Sequence[str]], left: int = 2) -> str:
    """Columns under a header, at most `WIDTH` characters wide: long cells of the first one lose their middle.

    Args:
        rows: of as many cells each, the header first.
        left: columns that are aligned to the left; the others are to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    room = WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1)
    widths[0] = min(widths[0], max(room, NARROWEST))
    lines = []
    for first, *others in rows:
        cells = zip([shortened(first, widths[0]), *others], widths, strict=True)
        line = "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width) for place, (cell, width) in enumerate(cells)
        )
        lines.append(line.rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def transposed_tables(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows as columns, under their first cells, as many side by side as `WIDTH` holds, the others below.

    Args:
        header: of the rows.
        rows: of as many cells each.
    """
    names = max(map(len, header))
    columns = [[shortened(cell, WIDTH - names - 2) for cell in row] for row in rows]
    tables: list[list[Sequence[str]]] = []
    room = 0
    for column in columns:
        width = max(map(len, column)) + 2
        if width > room:
            tables.append([header])
            room = WIDTH - names
        tables[-1].append(column)
        room -= width
    return "\n\n".join(text_table(list(zip(*table, strict=True)), left=1) for table in tables)


def shortened(text: str, width: int) -> str:
    """Text of at most `width` characters; a longer one loses its middle, as its end tells files apart."""
    if len(text) <= width:
        return text
    end = (width - 3) * 2 // 3
    return f"{text[: width - 3 - end]}...{text[len(text) - end :]}"
