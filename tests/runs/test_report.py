"""Samples as they stand in a report."""

import pytest

from cucafera.runs.report import continuation_of


@pytest.mark.parametrize(("reason", "text"), [("stop", "mar"), ("length", "mar …"), ("context", "mar …")])
def test_an_ellipsis_marks_a_text_that_was_cut(reason, text):
    assert continuation_of({"continuation": "mar", "finish_reason": reason}) == text
