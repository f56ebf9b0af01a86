"""Multiple choice: file formats and metrics."""

import json
import statistics

import pytest

from cucafera.config.errors import UserError
from cucafera.data.sources import CorpusError
from cucafera.evaluation.likelihood import DecoderScorer
from cucafera.evaluation.multiple_choice import (
    Question,
    answer_questions,
    mean_with_stderr,
    question_of_row,
    read_questions,
)
from cucafera.evaluation.requests import ContinuationScore


@pytest.mark.parametrize(
    ("row", "question"),
    [
        (
            {"ctx": "El gat [header] salta", "endings": ["i cau.", "[step] i vola."], "label": "1"},
            Question("El gat salta", ["i cau.", " i vola."], 1),
        ),
        (
            {
                "ctx_a": "Plou.",
                "ctx_b": "l'àvia",
                "activity_label": "Pluja",
                "ctx": "x",
                "endings": ["a", "b"],
                "label": 0,
            },
            Question("Pluja: Plou. L'àvia", ["a", "b"], 0),
        ),
        (
            {"question": "Què?", "choices": {"text": ["u", "dos"], "label": ["A", "B"]}, "answerKey": "B"},
            Question("Pregunta: Què?\nResposta:", ["u", "dos"], 1),
        ),
        (
            {"question": "Què?", "choices": [{"text": "u", "label": 1}, {"text": "dos", "label": 2}], "answerKey": "1"},
            Question("Pregunta: Què?\nResposta:", ["u", "dos"], 0),
        ),
        (
            {
                "premise": "Plovia. ",
                "question": "effect",
                "choice1": "Em vaig mullar.",
                "choice2": "El sol",
                "label": 0,
            },
            Question("Plovia. i per tant", ["em vaig mullar.", "el sol"], 0),
        ),
        (
            {"premise": "Em vaig mullar.", "question": "cause", "choice1": "Plovia.", "choice2": "Sol.", "label": 1},
            Question("Em vaig mullar perquè", ["plovia.", "sol."], 1),
        ),
    ],
)
def test_formats_are_recognized_by_their_columns(row, question):
    assert question_of_row(row) == question


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "not a question: the columns are text"),
        ({"ctx": "x", "endings": ["a", "b"], "label": 2}, "the answer is number 2 of 2 choices"),
        ({"ctx": "x", "endings": ["a", "b"], "label": ""}, "label is ''"),
        ({"ctx": "x", "endings": ["a", "b"], "label": 0.5}, "label is 0.5"),
        ({"ctx": "x", "endings": ["a", ""], "label": 0}, "a choice is empty"),
        ({"ctx": "x", "endings": "ab", "label": 0}, "endings is not a list of texts"),
        ({"ctx": None, "endings": ["a"], "label": 0}, "ctx is None; it must be a text"),
        ({"question": "x", "choices": {"text": ["a"], "label": []}, "answerKey": "A"}, "choices is neither"),
        ({"question": "x", "choices": ["a"], "answerKey": "A"}, "choices is neither"),
        ({"question": "x", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"}, "answerKey is 'B'"),
        ({"premise": "x", "question": "why", "choice1": "a", "choice2": "b", "label": 0}, "question is 'why'"),
    ],
)
def test_a_broken_row_is_an_error_with_its_reason(row, message):
    with pytest.raises(UserError, match=message):
        question_of_row(row)


def test_a_broken_row_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"ctx": "x", "endings": ["a"], "label": 0}) + "\n{}\n")
    with pytest.raises(CorpusError, match=r"q\.jsonl:2: not a question: .*Fix it, or remove it$"):
        read_questions(str(path))
    path.write_text("\n")
    with pytest.raises(CorpusError, match="holds no question"):
        read_questions(str(path))


def test_accuracy_compares_likelihoods_and_likelihoods_per_character(base, monkeypatch):
    questions = [Question("la mar", ["ab", "abcdefgh"], 0), Question("el sol", ["x", "y"], 1)]
    given = iter([-3.0, -8.0, -1.0, -1.0])
    monkeypatch.setattr(
        DecoderScorer,
        "score_continuations",
        lambda self, requests: [ContinuationScore(next(given), False) for _ in requests],
    )
    metrics = answer_questions(questions, DecoderScorer(base.model), base.tokenizer)
    assert metrics["acc"].value == 0.5  # the first of equal choices wins
    assert metrics["acc_norm"].value == 0.0


def test_the_length_of_a_choice_is_in_characters_as_in_the_harness(base, monkeypatch):
    questions = [Question("la mar", ["àéï", "abcd"], 1), Question("la mar", ["ab", "abcd"], 1)]
    # Per character -1.1 and -1, -1 and -0.9; per byte -0.55 and -1; with the space before it, -0.67 and -0.72.
    given = iter([-3.3, -4.0, -2.0, -3.6])
    asked = []

    def score(scorer, requests):
        asked.extend(base.tokenizer.decode(continuation) for _, continuation in requests)
        return [ContinuationScore(next(given), False) for _ in requests]

    monkeypatch.setattr(DecoderScorer, "score_continuations", score)
    metrics = answer_questions(questions, DecoderScorer(base.model), base.tokenizer)
    assert metrics["acc_norm"].value == 1.0
    assert asked == [" àéï", " abcd", " ab", " abcd"]


def test_the_standard_error_is_that_of_a_mean():
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    assert mean_with_stderr(values) == (0.6, pytest.approx(statistics.stdev(values) / 5**0.5))
    assert mean_with_stderr([1.0]).stderr is None
