"""Windows as text, and their measures."""

import numpy as np
import pytest

from cucafera.config.tokens import DOCUMENT_START_ID, IM_END_ID, IM_START_ID, PAD_ID
from cucafera.data.inspection import measure, pieces, text_of
from cucafera.data.packed import StreamWindows
from cucafera.data.windows import IGNORED, Window
from tests.support import Stream

LENGTH = 8


def window(inputs: list[int], targets: list[int], documents: list[int]) -> Window:
    return Window(*(np.array(values, dtype=np.int32) for values in (inputs, targets, documents)))


def test_the_pieces_of_a_window_of_a_stream_are_its_documents():
    ids = [300, 301, DOCUMENT_START_ID, 302, 303, DOCUMENT_START_ID, 304, 305, 306]
    found = list(pieces(window(ids[:-1], ids[1:], [0, 0, 1, 1, 1, 2, 2, 2])))
    assert [piece.ids.tolist() for piece in found] == [ids[:2], ids[2:5], ids[5:8]]
    assert all(piece.trained.all() and not piece.is_padding for piece in found)


def test_a_conversation_has_its_last_target_and_padding_is_none():
    question, answer = [IM_START_ID, 300], [301, IM_END_ID]
    inputs = [*question, 301, *question, 301, PAD_ID, PAD_ID]
    targets = [IGNORED, *answer, IGNORED, *answer, IGNORED, IGNORED]
    first, second, padding = pieces(window(inputs, targets, [0, 0, 0, 1, 1, 1, 2, 2]))
    for piece in (first, second):
        assert piece.ids.tolist() == [*question, *answer]
        assert piece.trained.tolist() == [False, False, True, True]
    assert padding.is_padding and padding.ids.tolist() == [PAD_ID, PAD_ID]


def test_a_text_marks_what_is_trained_only_if_the_rest_is_not(tokenizer):
    ids = tokenizer.encode("la mar")
    untrained, trained = window(ids, [IGNORED] * len(ids), [0] * len(ids)), window(ids, ids, [0] * len(ids))
    assert text_of(next(pieces(trained)), tokenizer) == text_of(next(pieces(untrained)), tokenizer) == "la mar"
    assert text_of(next(pieces(trained)), tokenizer, "|").replace("|", "") == "la mar"
    assert len(text_of(next(pieces(trained)), tokenizer, "|").split("|")) == len(ids)


def test_a_part_of_a_character_is_shown_as_bytes(tokenizer):
    ids = [tokenizer.tokens.index("Ã"), tokenizer.tokens.index("ł")]  # GPT-2's characters for the bytes of à
    (piece,) = pieces(window(ids, ids, [0, 0]))
    assert text_of(piece, tokenizer, "|") == r"\xc3|\xa0"


def test_the_measures_of_a_stream(tokenizer):
    word = tokenizer.encode("mar")
    document = [DOCUMENT_START_ID, *word, *word]
    tokens = document * 40
    source = StreamWindows(Stream(tokens), LENGTH)
    measures = measure(source, tokenizer, LENGTH)
    assert measures.windows == measures.measured == (len(tokens) - 1) // LENGTH
    assert measures.positions == measures.tokens == measures.targets == measures.windows * LENGTH
    assert (measures.padding, measures.trained) == (0, 1)
    assert measures.lengths.tolist() == [len(document)] * 40
    assert measures.bytes_per_token == pytest.approx(len("mar") / len(word), rel=0.02)
    assert measures.counts.sum() == measures.tokens
    assert measures.counts[DOCUMENT_START_ID] == sum(
        token == DOCUMENT_START_ID for token in tokens[: measures.positions]
    )


def test_of_a_long_stream_windows_and_lengths_are_sampled(tokenizer):
    document = [DOCUMENT_START_ID, *tokenizer.encode("mar") * 3]
    tokens = document * 1000
    measures = measure(StreamWindows(Stream(tokens), LENGTH), tokenizer, LENGTH, most_tokens=800)
    assert measures.measured == 100 < measures.windows
    assert 16 <= len(measures.lengths) <= 800 // len(document)
    assert set(measures.lengths.tolist()) == {len(document)}
