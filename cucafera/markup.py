"""Texts from elsewhere (prompts, answers, names) in Markdown, HTML and CSV: shown as they are, never interpreted."""

import html
import re
from collections.abc import Sequence

from cucafera.output import printable

MARKDOWN = re.compile(r"[\\`*\[\]<&|~$]|://|(?<!\w)_|_(?!\w)")
"""What Markdown or HTML may interpret anywhere in a line."""
LINE_START = re.compile(r"[#>+=:-]|\d+[.)](?=\s|$)")
"""What Markdown may interpret at the start of a line: headings, quotes, lists and rules."""
FORMULA = re.compile(r"[=+\-@\t\r]")
"""What makes a spreadsheet compute a cell, at its start."""


def markdown(text: str) -> str:
    """Return a text for Markdown, as one line: for headings, sentences and cells of tables."""
    return _escaped_line(printable(" ".join(text.split())))


def markdown_lines(text: str) -> str:
    """Return a text for Markdown that keeps its lines, their indentation and their ends."""
    lines = printable(text).expandtabs(4).split("\n")
    indents = [len(line) - len(line.lstrip(" ")) for line in lines]
    # Two spaces before a line's end keep it.
    return "  \n".join(
        "&nbsp;" * count + _escaped_line(line[count:]) for count, line in zip(indents, lines, strict=True)
    )


def markdown_table(rows: Sequence[Sequence[str]], alignments: str = "") -> list[str]:
    """Return the lines of a table in Markdown.

    Args:
        rows: Texts; the first row is the head.
        alignments: `r` for each column of numbers, any other letter for texts; columns after it are texts.
    """
    rules = ["---:" if letter == "r" else "---" for letter in alignments.ljust(len(rows[0]))]
    head, *body = (f"| {' | '.join(map(markdown, row))} |" for row in rows)
    return [head, f"|{'|'.join(rules)}|", *body]


def markdown_code(text: str) -> str:
    """Return a text as an indented block of code, which no text can end."""
    return "\n".join(f"    {line}" for line in printable(text).split("\n"))


def html_text(text: str) -> str:
    """Return a text for HTML."""
    return html.escape(printable(text))


def csv_cell(value: object) -> object:
    """Return a value for a cell of CSV: a text that a spreadsheet would compute gets an apostrophe before it."""
    if not isinstance(value, str) or not FORMULA.match(value):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def _escaped_line(line: str) -> str:
    escaped = MARKDOWN.sub(lambda match: f"&#{ord(match[0][0])};{match[0][1:]}", line)
    if start := LINE_START.match(escaped):
        end = start.end()
        return f"{escaped[: end - 1]}&#{ord(escaped[end - 1])};{escaped[end:]}"
    return escaped
