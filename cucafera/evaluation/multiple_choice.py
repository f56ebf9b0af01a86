"""Multiple choice: which of some endings a model finds likeliest.

Prompts, choices and metrics are those of lm-evaluation-harness: of `hellaswag`, and of `arc_ca_*` and `copa_ca` in
catalan_bench, without examples. A row is recognized by its columns:

| form      | columns                                                                                        |
|-----------|------------------------------------------------------------------------------------------------|
| HellaSwag | ctx, or ctx_a and ctx_b; endings; label; perhaps activity_label                                |
| ARC       | question; choices: {text: [...], label: [...]} or [{text: ..., label: ...}, ...]; answerKey    |
| COPA      | premise; question: cause or effect; choice1; choice2; label: 0 or 1                            |
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cucafera.config import SourceConfig, UserError
from cucafera.data.corpus import Called, CorpusError, ReadCounts, Row, read_rows
from cucafera.data.tokenizer import Tokenizer
from cucafera.evaluation.likelihood import DOCUMENT_START, DecoderScorer, encoded_pair
from cucafera.evaluation.results import Metric

CONNECTORS = {"cause": "perquè", "effect": "i per tant"}
CALLED = Called("--choices", "name another file", "Mend it, or take it out", "--choices")


class Question(NamedTuple):
    """What is asked.

    Attributes:
        context: The text before a choice and the space between them.
        choices: The ways to go on.
        gold: Which of them is right.
    """

    context: str
    choices: list[str]
    gold: int


def read_questions(path: str) -> list[Question]:
    """The questions of files, .jsonl, also packed, or .parquet.

    Raises:
        CorpusError: they are not there, hold none, or a row is of no form that is known; with its place.
    """
    rows = read_rows(CALLED, SourceConfig(path=path), False, ReadCounts(), question_of_row)
    questions = [question for question, _ in rows]
    if not questions:
        raise CorpusError(f"--choices {path} holds no question")
    return questions


def question_of_row(row: Row) -> Question:
    """The question that a row holds. Raises UserError if it holds none."""
    for columns, convert in FORMS:
        if columns <= row.keys():
            question = convert(row)
            if not 0 <= question.gold < len(question.choices):
                raise UserError(f"the answer is number {question.gold} of {len(question.choices)} choices")
            if not all(question.choices):
                raise UserError("a choice is empty")
            return question
    raise UserError(
        f"no question: it has the columns {', '.join(row) or 'of none'}, and not those of HellaSwag (ctx, endings, "
        "label), ARC (question, choices, answerKey) or COPA (premise, question, choice1, choice2, label)"
    )


def answer_questions(questions: Sequence[Question], scorer: DecoderScorer, tokenizer: Tokenizer) -> dict[str, Metric]:
    """The share of questions whose right choice the model finds likeliest.

    acc takes the choice of the highest log-likelihood, acc_norm that of the highest log-likelihood a character; of
    equal ones the first. Both are the harness's, and so is the standard error: that of a mean, by the sample variance.

    Args:
        questions: What is asked.
        scorer: The model; before each context stands a document start, as before each text that it has learned from.
        tokenizer: Its tokenizer.
    """
    requests = [
        encoded_pair(tokenizer, question.context, f" {choice}", DOCUMENT_START)
        for question in questions
        for choice in question.choices
    ]
    likelihoods = iter(scorer.continuations(requests))
    right, right_by_length = [], []
    for question in questions:
        nats = np.array([next(likelihoods).nats for _ in question.choices])
        lengths = np.array([float(len(choice)) for choice in question.choices])
        right.append(float(np.argmax(nats) == question.gold))
        right_by_length.append(float(np.argmax(nats / lengths) == question.gold))
    return {"acc": mean_of(right), "acc_norm": mean_of(right_by_length)}


def mean_of(values: Sequence[float]) -> Metric:
    """A mean with its standard error: the sample's standard deviation over the root of their number."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Metric(mean)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Metric(mean, math.sqrt(variance / len(values)))


def _hellaswag(row: Row) -> Question:
    if {"ctx_a", "ctx_b"} <= row.keys():
        context = f"{_text(row, 'ctx_a')} {_text(row, 'ctx_b').capitalize()}"
    else:
        context = _text(row, "ctx")
    if "activity_label" in row:
        context = f"{_text(row, 'activity_label')}: {context}"
    endings = row["endings"]
    if not isinstance(endings, list) or not all(isinstance(ending, str) for ending in endings):
        raise UserError("endings is no list of texts")
    return Question(_without_brackets(context), [_without_brackets(ending) for ending in endings], _number(row))


def _without_brackets(text: str) -> str:
    """As the harness has it: brackets are left over from WikiHow, where a part of the dataset comes from."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _arc(row: Row) -> Question:
    choices = row["choices"]
    try:
        pairs = (
            list(zip(choices["text"], choices["label"], strict=True))
            if isinstance(choices, dict)
            else [(choice["text"], choice["label"]) for choice in choices]
        )
    except (TypeError, KeyError, ValueError) as error:
        raise UserError("choices is neither {text: [...], label: [...]}, as long, nor a list of both") from error
    texts, labels = [text for text, _ in pairs], [str(label) for _, label in pairs]
    if not all(isinstance(text, str) for text in texts):
        raise UserError("choices has what is no text")
    answer = str(row["answerKey"])
    if answer not in labels:
        raise UserError(f"answerKey is {answer!r}, and the choices are {', '.join(labels) or 'none'}")
    return Question(f"Pregunta: {_text(row, 'question')}\nResposta:", texts, labels.index(answer))


def _copa(row: Row) -> Question:
    if row["question"] not in CONNECTORS:
        raise UserError(f"question is {row['question']!r}; it must be cause or effect")
    premise = _text(row, "premise")[:-1].strip()
    choices = [_text(row, name) for name in ("choice1", "choice2")]
    choices = [choice[:1].lower() + choice[1:] for choice in choices]
    return Question(f"{premise} {CONNECTORS[row['question']]}", choices, _number(row))


FORMS: list[tuple[set[str], Callable[[Row], Question]]] = [
    ({"premise", "question", "choice1", "choice2", "label"}, _copa),
    ({"question", "choices", "answerKey"}, _arc),
    ({"ctx_a", "ctx_b", "endings", "label"}, _hellaswag),
    ({"ctx", "endings", "label"}, _hellaswag),
]


def _text(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{column} is {value!r}; it must be a text")
    return value


def _number(row: Row) -> int:
    label: Any = row["label"]
    try:
        if isinstance(label, bool | float):
            raise ValueError
        return int(label)
    except (TypeError, ValueError) as error:
        raise UserError(f"label is {label!r}; it must be the number of a choice, the first being 0") from error
