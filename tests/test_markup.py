"""Texts from elsewhere are shown as they are, in Markdown as TensorBoard renders it, in HTML and in CSV."""

from html import unescape

import pytest
from tensorboard.plugin_util import markdown_to_safe_html

from cucafera.markup import csv_cell, html_text, markdown, markdown_code, markdown_lines, markdown_table

TEXTS = (
    "a|b", "<script>x</script>", "[x](javascript:y)", "![x](http://y)", "**b** `c` _d_ ~~e~~", "\\|", "# h", "&amp;",
    "- a", "1. a", "> a", "---", "===", "+ a", "```", "<!-- x", "<im_end>", "</table>", "_a b_", "$x$ 5$", "1) a",
)  # fmt: skip
ELEMENTS = (
    "<script",
    "<a ",
    "<img",
    "<strong",
    "<code",
    "<em",
    "<h1",
    "<h2",
    "<ul",
    "<ol",
    "<hr",
    "<blockquote",
    "<pre",
)


@pytest.mark.parametrize("text", TEXTS)
def test_markdown_shows_a_text_and_interprets_nothing(text):
    for shown in (markdown(text), markdown_lines(text), markdown_lines(f"a\n{text}\n\n{text}")):
        html = markdown_to_safe_html(shown)
        assert not any(element in html for element in ELEMENTS), html
        assert text in unescape(html)


def test_tables_keep_their_rows_and_columns():
    rows = [("key", "value"), *(("k", text) for text in TEXTS), ("k", "one\ntwo\r\n| three |")]
    html = markdown_to_safe_html("\n".join(markdown_table(rows, "lr")))
    assert html.count("<tr>") == len(rows) and html.count("<td") == 2 * (len(rows) - 1)
    assert "one two | three |" in unescape(html)


def test_usual_values_stay_readable():
    for text in ("1e-05 outputs/x y_z", "4.213 -> 3.9 (best 3.8)", "AdamW, lr 0.003", "12 steps; 1,024 tokens"):
        assert markdown(text) == text


def test_lines_keep_their_indentation_and_their_ends():
    html = markdown_to_safe_html(markdown_lines("    def f():\n\treturn 1\n\nfi"))
    assert "<pre" not in html and html.count("<br") == 1 and html.count("<p>") == 2
    assert "\u00a0\u00a0\u00a0\u00a0def f():" in unescape(html) and "\u00a0\u00a0\u00a0\u00a0return 1" in unescape(html)


def test_no_text_ends_a_block_of_code():
    html = markdown_to_safe_html(markdown_code("a: |\n  ```\n\n# <b>x</b>\nz"))
    assert html.count("<pre>") == 1 and "<h1" not in html and "<b>" not in html


def test_control_characters_become_visible():
    for shown in (markdown("\x1b[31mx\u202e"), markdown_lines("\x1b[31mx\u202e"), html_text("\x1b[31mx\u202e")):
        assert "\x1b" not in shown and "x1b" in shown and "u202e" in shown
    assert html_text("a\n<b> \ud800") == "a\n&lt;b&gt; \\ud800"


@pytest.mark.parametrize("text", ["=1+1", "+experiment=x", "-x", "@SUM(A1)", "\t=1", "\r=1"])
def test_a_spreadsheet_computes_no_text(text):
    assert csv_cell(text) == f"'{text}"


@pytest.mark.parametrize("value", ["-1", "+1e-4", "a=b", "", None, -0.5, 3])
def test_numbers_and_other_texts_stay_as_they_are_in_csv(value):
    assert csv_cell(value) == value
