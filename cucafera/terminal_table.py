"""Tables that fit the terminal: long names lose their middle, and what is still too wide is printed in blocks."""

import os
import shutil
import sys
from collections.abc import Sequence

INDENT = "  "
GAP = "  "
NARROWEST = 10
"""Characters that a text keeps at least."""
NARROWEST_TERMINAL = 24


def terminal_width() -> int | None:
    """Return the columns of the terminal, or of the variable COLUMNS; None for a file or a pipe without it."""
    if not sys.stdout.isatty() and not os.environ.get("COLUMNS", "").isdecimal():
        return None
    return max(shutil.get_terminal_size().columns, NARROWEST_TERMINAL)


def terminal_table(rows: Sequence[Sequence[str]], width: int | None) -> str:
    """Return a table as text; columns of numbers are aligned to the right.

    Args:
        rows: Its cells. The first row is the head, and the first column has the names of the rows.
        width: Columns of the terminal; None: as wide as it is.
    """
    is_numeric = [all(_is_number(row[column]) for row in rows[1:]) for column in range(len(rows[0]))]
    if width is not None:
        rows = _shortened_texts(rows, is_numeric, width)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    blocks = []
    for columns in _blocks(widths, width):
        lines = []
        for row in rows:
            cells = (row[i].rjust(widths[i]) if is_numeric[i] else row[i].ljust(widths[i]) for i in columns)
            lines.append(f"{INDENT}{GAP.join(cells)}".rstrip())
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def shortened(texts: Sequence[str], width: int) -> list[str]:
    """Return texts of at most `width` characters, without the middle of those that are longer; none equal another.

    Texts that would be equal show the part in which they differ.
    """
    found: list[str] = []
    short = [_without_middle(text, width) for text in texts]
    for text, each in zip(texts, short, strict=True):
        twins = sorted({other for other, its in zip(texts, short, strict=True) if its == each})
        if len(twins) > 1:
            common = next(i for i in range(len(text) + 1) if len({twin[: i + 1] for twin in twins}) > 1)
            start = max(common - width // 3, 1)
            each = f"…{text[start : start + width - 2]}…" if len(text) > start + width - 1 else f"…{text[1 - width :]}"
        number = 1
        unique = each
        while unique in found and text not in texts[: len(found)]:
            number += 1
            unique = f"{each[: width - len(f'~{number}')]}~{number}"
        found.append(unique)
    return found


def _without_middle(text: str, width: int) -> str:
    tail = (width - 1) // 2
    return text if len(text) <= width else f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def _shortened_texts(rows: Sequence[Sequence[str]], is_numeric: Sequence[bool], width: int) -> list[list[str]]:
    """Shorten texts as little as needed for the table to fit, but not below a third of the width."""
    limit, least = max(len(cell) for row in rows for cell in row), max(NARROWEST, width // 3)
    while True:
        names = shortened([row[0] for row in rows[1:]], limit)
        fitted = [[_without_middle(rows[0][0], limit), *shortened(rows[0][1:], limit)]]
        for name, row in zip(names, rows[1:], strict=True):
            cells = zip(row[1:], is_numeric[1:], strict=True)
            fitted.append([name, *(cell if numeric else _without_middle(cell, limit) for cell, numeric in cells)])
        widths = [max(len(row[column]) for row in fitted) for column in range(len(fitted[0]))]
        if limit <= least or len(_blocks(widths, width)) == 1:
            return fitted
        limit -= 1


def _blocks(widths: Sequence[int], width: int | None) -> list[list[int]]:
    """Return the columns of each block: all that fit, after the names."""
    blocks: list[list[int]] = [[0]]
    used = len(INDENT) + widths[0]
    for column in range(1, len(widths)):
        needed = len(GAP) + widths[column]
        if width is not None and used + needed > width and len(blocks[-1]) > 1:
            blocks.append([0])
            used = len(INDENT) + widths[0]
        blocks[-1].append(column)
        used += needed
    return blocks


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace(",", "").replace("_", "") or 0)
    except ValueError:
        return False
    return True
