"""Requests to a scorer, without torch: windows of text, and continuations of contexts."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from cucafera.config.tokens import DOCUMENT_START_ID, IM_START_ID
from cucafera.data.chatml import Message, render_prompt
from cucafera.data.tokenizer import Tokenizer

DOCUMENT_START = (DOCUMENT_START_ID,)
"""Prefix of every plain text: in pretraining each document began with it."""

ScoringWindow = tuple[list[int], int]
"""Token ids, and the position of the first one to score: at least 1, since the first token has no context."""
ContinuationRequest = tuple[list[int], list[int]]
"""Token ids of a context, at least one, and of its continuation."""


class AnswerOpening(NamedTuple):
    """The end of a conversation, where the assistant's answer begins.

    Attributes:
        prefix: Token ids up to the <im_start> of the answer.
        text: What follows it before the answer: the role and a line end, then the beginning of the answer if given.
    """

    prefix: Sequence[int]
    text: str


def open_answer(messages: Sequence[Message], tokenizer: Tokenizer, begun: str = "") -> AnswerOpening:
    """Return the context of an answer in a conversation, as finetuning frames it, for `encode_pair`.

    Args:
        messages: The messages before the answer.
        tokenizer: The model's tokenizer.
        begun: The beginning of the answer.
    """
    ids = render_prompt(messages, tokenizer)
    start = len(ids) - ids[::-1].index(IM_START_ID)  # contents never hold control tokens
    return AnswerOpening(ids[:start], tokenizer.decode(ids[start:]) + begun)


class Scorer(Protocol):
    """A model that computes the likelihood of text.

    Attributes:
        context: Longest window, in tokens.
    """

    context: int

    def nats(self, windows: Sequence[ScoringWindow]) -> list[list[float]]:
        """Return the negative log-likelihood, in nats, of each of ids[first:] given all ids before it.

        Args:
            windows: Of at most `context` ids each.
        """
        ...


class ContinuationScore(NamedTuple):
    """The likelihood of a continuation after its context.

    Attributes:
        log_likelihood: In nats: zero or below.
        is_greedy: True if greedy decoding would write it.
    """

    log_likelihood: float
    is_greedy: bool


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str, prefix: Sequence[int]) -> ContinuationRequest:
    """Return the token ids of a context and its continuation, split as lm-evaluation-harness splits them.

    Both are encoded together and split where the context alone would end. Trailing whitespace of the context moves to
    the continuation, because tokens begin with their space. If a token crosses the boundary, so that nothing is left
    of the continuation, the continuation is encoded alone.

    Args:
        tokenizer: The model's tokenizer.
        context: Text before the continuation; may be empty.
        continuation: The text to score.
        prefix: Token ids before the context.
    """
    visible = len(context.rstrip())
    context, continuation = context[:visible], context[visible:] + continuation
    before = tokenizer.encode(context)
    scored = tokenizer.encode(context + continuation)[len(before) :] or tokenizer.encode(continuation)
    return [*prefix, *before], scored
