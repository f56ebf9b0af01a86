"""Preference pairs: how often, and by how much, the better answer is the more probable one.

The log-probability of an answer is the sum over its tokens and its stop token, given the prompt; per token, that sum
divided by their number. No reference model is needed, so that any two models can be compared on the same pairs.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cucafera.config.errors import UserError
from cucafera.data.chatml import Rendered, render, up_to_last_answer
from cucafera.data.preference_formats import Preference, preference_of_row
from cucafera.data.sources import CorpusError, ReadContext
from cucafera.data.sources.files import FilesConfig, FilesSource
from cucafera.data.tokenizer import Tokenizer
from cucafera.evaluation.multiple_choice import mean_with_stderr
from cucafera.evaluation.progress import progress_bar
from cucafera.evaluation.results import Result
from cucafera.evaluation.texts import task_name
from cucafera.quantities import number_of

if TYPE_CHECKING:
    from cucafera.evaluation.requests import Scorer

PAIRS_AT_ONCE = 64


class RenderedPair(NamedTuple):
    """The two answers to a prompt, each after the prompt; the loss mask is true for the answers alone."""

    chosen: Rendered
    rejected: Rendered


class Logprobs(NamedTuple):
    """The log-probability of an answer, in nats: of all its tokens, and per token."""

    total: float
    mean: float


def check_pairs(path: str) -> None:
    """Read the first pair of files. Raises CorpusError as `read_pairs` does."""
    next(_preferences(path))


def read_pairs(path: str, tokenizer: Tokenizer) -> Iterator[RenderedPair]:
    """Yield the preference pairs of files, in the formats that preference tuning reads.

    Args:
        path: A file, folder or glob.
        tokenizer: Encodes them.

    Raises:
        CorpusError: the files do not exist, cannot be read, or hold no pair.
    """
    preferences = _preferences(path)
    while batch := list(islice(preferences, PAIRS_AT_ONCE)):
        conversations = [[*pair.prompt, *answer] for pair in batch for answer in (pair.chosen, pair.rejected)]
        rendered = map(up_to_last_answer, render(conversations, tokenizer))
        yield from map(RenderedPair, rendered, rendered)  # better and worse answers alternate


def _preferences(path: str) -> Iterator[Preference]:
    advice = "Fix it, or remove it; conversations are measured with --chats, documents with --text"
    source = FilesSource(FilesConfig(path=path), ReadContext("--pairs", "name another file", advice))
    for preference, _ in source.convert(lambda row: preference_of_row(row, source.config.columns)):
        yield preference
    if not source.counts.documents:
        raise CorpusError(f"--pairs {path} holds no preference pair")


def measure_pairs(scorer: "Scorer", tokenizer: Tokenizer, path: str, documents: int | None) -> Result:
    """Return the metrics of `compare_answers` on the preference pairs of files.

    Args:
        scorer: The model.
        tokenizer: Its tokenizer.
        path: A file, folder or glob.
        documents: Maximum number of pairs; None: all.

    Raises:
        UserError: the files cannot be read, or hold no pair that fits the context.
    """
    return compare_answers(scorer, task_name(path), read_pairs(path, tokenizer), documents, {"pairs": path})


def compare_answers(
    scorer: "Scorer", task: str, pairs: Iterable[RenderedPair], documents: int | None, settings: dict[str, Any]
) -> Result:
    """Return the share of pairs whose better answer is the more probable one, and the log-probability of both.

    logprob_accuracy compares log-probabilities per token, logprob_sum_accuracy those of the complete answers; a tie
    counts one half. chosen_logprob and rejected_logprob are means over the pairs, in nats per token, as in the
    validation of preference tuning.

    Args:
        scorer: The model.
        task: Name of the measurement.
        pairs: One with an answer that does not fit the context is left out, and counted.
        documents: Maximum number of pairs; None: all.
        settings: Of the result; the maximum and the context are added.

    Raises:
        UserError: no pair is left.
    """
    fitting = _FittingPairs(pairs, scorer.context)
    selected = islice(fitting, documents)
    chosen: list[Logprobs] = []
    rejected: list[Logprobs] = []
    with progress_bar("Pairs", None) as bar:
        while batch := list(islice(selected, PAIRS_AT_ONCE)):
            scores = _logprobs(scorer, [answer for pair in batch for answer in pair])
            chosen += scores[::2]
            rejected += scores[1::2]
            bar.update(len(batch))
    left_out = f"{fitting.left_out:,} left out, longer than the context of {number_of(scorer.context, 'token')}"
    if not chosen:
        raise UserError(f"{task}: there is no pair to compare: {left_out}")
    both = list(zip(chosen, rejected, strict=True))
    metrics = {
        "logprob_accuracy": mean_with_stderr([_win(better.mean, worse.mean) for better, worse in both]),
        "logprob_sum_accuracy": mean_with_stderr([_win(better.total, worse.total) for better, worse in both]),
        "chosen_logprob": mean_with_stderr([answer.mean for answer in chosen]),
        "rejected_logprob": mean_with_stderr([answer.mean for answer in rejected]),
    }
    note = number_of(len(chosen), "pair") + (f"; {left_out}" if fitting.left_out else "")
    return Result("pairs", task, metrics, settings | {"documents": documents, "context": scorer.context}, note)


class _FittingPairs:
    """The pairs whose answers fit the context, and the number of those so far that do not."""

    def __init__(self, pairs: Iterable[RenderedPair], context: int) -> None:
        self.left_out = 0
        self._pairs = pairs
        self._context = context

    def __iter__(self) -> Iterator[RenderedPair]:
        for pair in self._pairs:
            if max(len(answer.ids) for answer in pair) <= self._context:
                yield pair
            else:
                self.left_out += 1


def _logprobs(scorer: "Scorer", answers: list[Rendered]) -> list[Logprobs]:
    """Return the log-probability of each answer, given what stands before it."""
    starts = [int(np.flatnonzero(answer.trained)[0]) for answer in answers]
    windows = [(answer.ids.tolist(), start) for answer, start in zip(answers, starts, strict=True)]
    scores = []
    for answer, start, nats in zip(answers, starts, scorer.nats(windows), strict=True):
        scored = -np.array(nats, np.float64)[answer.trained[start:]]
        scores.append(Logprobs(float(scored.sum()), float(scored.mean())))
    return scores


def _win(better: float, worse: float) -> float:
    """Return 1 if the first is larger, one half if they are equal, and else 0."""
    return 0.5 if better == worse else float(better > worse)
