"""Numbers, times and samples as they stand in a report."""

import pytest

from cucafera.runs.report import continuation_of, count, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (87, "1 min 27 s"), (3599, "59 min 59 s"),
     (3600, "1 h 00 min"), (7_384, "2 h 03 min"), (90_000, "25 h 00 min")],
)  # fmt: skip
def test_a_duration_is_in_hours_minutes_and_seconds(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1k"), (45_230, "45.2k"), (999_000, "999k"), (1_640_000, "1.64M"), (2e9, "2B"),
     (5.5e12, "5.5T")],
)  # fmt: skip
def test_a_large_number_has_three_digits_and_a_letter(number, text):
    assert count(number) == text


@pytest.mark.parametrize(("reason", "text"), [("stop", "mar"), ("length", "mar …"), ("context", "mar …")])
def test_an_ellipsis_marks_a_text_that_was_cut(reason, text):
    assert continuation_of({"continuation": "mar", "finish_reason": reason}) == text
