"""Requests to a scorer, without torch: windows of text, and continuations of contexts."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from cucafera.config.tokens import DOCUMENT_START_ID
from cucafera.data.tokenizer import Tokenizer

DOCUMENT_START = (DOCUMENT_START_ID,)
"""Prefix of every plain text: in pretraining each document began with it."""

ScoringWindow = tuple[list[int], int]
"""Token ids, and the position of the first one to score: at least 1, since the first token has no context."""
ContinuationRequest = tuple[list[int], list[int]]
"""Token ids of a context, at least one, and of its continuation."""


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
