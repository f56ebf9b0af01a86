"""Detokenization in complete characters, up to a stop text."""

import pytest

from cucafera.generation.detokenize import IncrementalDetokenizer


@pytest.mark.parametrize("text", ["la mar 🐌 € cançons", "🐌🐌€é", "", "abc"])
def test_deltas_hold_complete_characters_and_add_up_to_the_text(tokenizer, text):
    detokenizer = IncrementalDetokenizer(tokenizer, [])
    byte_tokens = [next(t for t in range(10, 266) if tokenizer.bytes_of(t) == bytes([b])) for b in text.encode()]
    deltas = [detokenizer.add(token) for token in byte_tokens]
    deltas.append(detokenizer.finish())
    assert "".join(deltas) == detokenizer.text == text
    assert not any("\N{REPLACEMENT CHARACTER}" in delta for delta in deltas)
    assert len(byte_tokens) >= sum(1 for delta in deltas if delta)


def test_an_incomplete_character_becomes_a_replacement_character_at_the_end(tokenizer):
    detokenizer = IncrementalDetokenizer(tokenizer, [])
    half = [next(t for t in range(10, 266) if tokenizer.bytes_of(t) == bytes([b])) for b in "🐌".encode()[:2]]
    assert [detokenizer.add(token) for token in half] == ["", ""]
    assert detokenizer.finish() == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("la mar i el bosc", ["mar"], "la "),
        ("la mar i el bosc", ["bosc", "mar"], "la "),
        ("la mar i el bosc", ["boscos"], "la mar i el bosc"),
        ("aaab", ["aab"], "a"),
        ("un\n\ndos", ["\n\n"], "un"),
        ("cançons €", ["ç"], "can"),
        ("la mar", ["r", "m"], "la "),
        ("la mar", ["m", "r"], "la "),
    ],
)
def test_a_stop_text_ends_the_text_and_no_part_of_it_is_shown(tokenizer, text, stop, expected):
    detokenizer = IncrementalDetokenizer(tokenizer, stop)
    shown = ""
    for token in tokenizer.encode(text):
        shown += detokenizer.add(token)
        assert expected.startswith(shown)
        if detokenizer.stopped:
            break
    shown += detokenizer.finish()
    assert shown == detokenizer.text == expected
    assert detokenizer.stopped == any(part in text for part in stop)
