"""Multiple choice: the model's answer is the choice with the highest likelihood.

Prompts, choices and metrics are those of lm-evaluation-harness: of `hellaswag`, and of `arc_ca_*` and `copa_ca` in
catalan_bench, zero-shot. The format of a row is recognized by its columns:

| format    | columns                                                                                        |
|-----------|------------------------------------------------------------------------------------------------|
| HellaSwag | ctx, or ctx_a and ctx_b; endings; label; optionally activity_label                             |
| ARC       | question; choices: {text: [...], label: [...]} or [{text: ..., label: ...}, ...]; answerKey    |
| COPA      | premise; question: cause or effect; choice1; choice2; label: 0 or 1                            |
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cucafera.config.errors import UserError
from cucafera.data.chatml import Message
from cucafera.data.sources import CorpusError, ReadContext, Row
from cucafera.data.sources.files import FilesConfig, FilesSource
from cucafera.data.tokenizer import Tokenizer
from cucafera.evaluation.requests import DOCUMENT_START, ContinuationRequest, encode_pair, open_answer
from cucafera.evaluation.results import Metric, Result
from cucafera.evaluation.texts import task_name
from cucafera.quantities import number_of

if TYPE_CHECKING:
    from cucafera.evaluation.likelihood import DecoderScorer

CONNECTORS = {"cause": "perquè", "effect": "i per tant"}


class Question(NamedTuple):
    """A question with its possible answers.

    Attributes:
        context: The text before a choice, without the space between them.
        choices: The possible continuations.
        gold: Index of the right one.
    """

    context: str
    choices: list[str]
    gold: int


def read_questions(path: str) -> list[Question]:
    """Return the questions of .jsonl (also compressed) or .parquet files.

    Raises:
        CorpusError: the files do not exist or hold no question, or a row has no known format; with its position.
    """
    context = ReadContext("--choices", "name another file", "Fix it, or remove it")
    source = FilesSource(FilesConfig(path=path), context)
    questions = [question for question, _ in source.convert(question_of_row)]
    if not questions:
        raise CorpusError(f"--choices {path} holds no question")
    return questions


def question_of_row(row: Row) -> Question:
    """Return the question of a row. Raises UserError if it holds none."""
    for columns, convert in FORMATS:
        if columns <= row.keys():
            question = convert(row)
            if not 0 <= question.gold < len(question.choices):
                raise UserError(f"the answer is number {question.gold} of {number_of(len(question.choices), 'choice')}")
            if not all(question.choices):
                raise UserError("a choice is empty")
            return question
    raise UserError(
        f"not a question: the columns are {', '.join(row) or 'missing'}; needed are those of HellaSwag (ctx, endings, "
        "label), ARC (question, choices, answerKey) or COPA (premise, question, choice1, choice2, label)"
    )


def measure_questions(
    path: str, questions: Sequence[Question], scorer: "DecoderScorer", tokenizer: Tokenizer, as_chat: bool
) -> Result:
    """Return the metrics of `answer_questions` on the questions of a file."""
    settings: dict[str, Any] = {"choices": path, "questions": len(questions)} | (
        {"chat_template": True} if as_chat else {}
    )
    metrics = answer_questions(questions, scorer, tokenizer, as_chat)
    note = number_of(len(questions), "question") + (", in a conversation" if as_chat else "")
    return Result("choices", task_name(path), metrics, settings, note)


def answer_questions(
    questions: Sequence[Question], scorer: "DecoderScorer", tokenizer: Tokenizer, as_chat: bool = False
) -> dict[str, Metric]:
    """Return the share of questions whose right choice gets the highest likelihood.

    acc compares log-likelihoods, acc_norm log-likelihoods per character; the first of equal choices wins. Both are the
    harness's definitions, and so is the standard error: that of a mean, by the sample variance.

    Args:
        questions: At least one.
        scorer: The model.
        tokenizer: Its tokenizer.
        as_chat: Each question is the user's message and each choice the assistant's answer, as in the harness with
            apply_chat_template; False: a question follows a document start token, as every text did in pretraining.
    """
    requests = [request for question in questions for request in _requests(question, tokenizer, as_chat)]
    scores = iter(scorer.score_continuations(requests))
    correct, correct_by_length = [], []
    for question in questions:
        likelihoods = np.array([next(scores).log_likelihood for _ in question.choices])
        lengths = np.array([float(len(choice)) for choice in question.choices])
        correct.append(float(np.argmax(likelihoods) == question.gold))
        correct_by_length.append(float(np.argmax(likelihoods / lengths) == question.gold))
    return {"acc": mean_with_stderr(correct), "acc_norm": mean_with_stderr(correct_by_length)}


def _requests(question: Question, tokenizer: Tokenizer, as_chat: bool) -> list[ContinuationRequest]:
    if as_chat:
        prefix, context = open_answer([Message("user", question.context)], tokenizer)
        return [encode_pair(tokenizer, context, choice, prefix) for choice in question.choices]
    return [encode_pair(tokenizer, question.context, f" {choice}", DOCUMENT_START) for choice in question.choices]


def mean_with_stderr(values: Sequence[float]) -> Metric:
    """Return a mean with its standard error: sample standard deviation / sqrt(n)."""
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
        raise UserError("endings is not a list of texts")
    return Question(_without_brackets(context), [_without_brackets(ending) for ending in endings], _label(row))


def _without_brackets(text: str) -> str:
    """Clean a text as the harness does: brackets are left over from WikiHow, the origin of a part of the dataset."""
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
        raise UserError(
            "choices is neither {text: [...], label: [...]}, equally long, nor a list of {text: ..., label: ...}"
        ) from error
    texts, labels = [text for text, _ in pairs], [str(label) for _, label in pairs]
    if not all(isinstance(text, str) for text in texts):
        raise UserError("choices holds a text that is not a string")
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
    return Question(f"{premise} {CONNECTORS[row['question']]}", choices, _label(row))


FORMATS: list[tuple[set[str], Callable[[Row], Question]]] = [
    ({"premise", "question", "choice1", "choice2", "label"}, _copa),
    ({"question", "choices", "answerKey"}, _arc),
    ({"ctx_a", "ctx_b", "endings", "label"}, _hellaswag),
    ({"ctx", "endings", "label"}, _hellaswag),
]
"""Required columns and converter of each format; the first match counts, since COPA's columns include a question."""


def _text(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{column} is {value!r}; it must be a text")
    return value


def _label(row: Row) -> int:
    label: Any = row["label"]
    try:
        if isinstance(label, bool | float):
            raise ValueError
        return int(label)
    except (TypeError, ValueError) as error:
        raise UserError(f"label is {label!r}; it must be the number of a choice, the first being 0") from error
