"""Requests to a model, and the events that answer them: the same for a terminal, a batch, a server and a bot."""

from dataclasses import dataclass

from cucafera.config.errors import UserError
from cucafera.config.schema import SamplingConfig
from cucafera.data.chatml import STOP_IDS


class ContextFullError(UserError):
    """A prompt that leaves no space for new tokens in the context.

    Attributes:
        tokens: Number of tokens of the prompt.
        context: Maximum number of tokens of a sequence.
    """

    def __init__(self, message: str, tokens: int, context: int) -> None:
        super().__init__(message)
        self.tokens = tokens
        self.context = context


class NonfiniteError(UserError):
    """A model whose logits are no distribution to draw from."""


class QueueFullError(UserError):
    """More requests wait than the queue holds."""


class StoppingError(UserError):
    """A request that comes while the engine is stopping, or that it stopped before its end."""


class WaitedTooLongError(UserError):
    """A request that waited for a slot longer than its time limit."""


class EngineFailedError(UserError):
    """A request that a fault of the model's program ended."""


@dataclass(frozen=True)
class Request:
    """A text to continue.

    Attributes:
        prompt: Token ids, at least one, fewer than the context.
        sampling: Sampling settings, stop texts, and max_new_tokens, which here may be 0: only score the prompt.
        stop_ids: Tokens that end the text.
        seed: Of this request's random generator: the same seed gives the same text whatever else is running. None:
            random.
        top_logprobs: With each token, also its log-probability and those of this many most probable tokens; None: no
            log-probabilities. They are the model's own: before repetition penalty, temperature and filters.
        prompt_logprobs: Begin with a `PromptScores` event; needs top_logprobs.
    """

    prompt: list[int]
    sampling: SamplingConfig
    stop_ids: frozenset[int] = frozenset(STOP_IDS)
    seed: int | None = None
    top_logprobs: int | None = None
    prompt_logprobs: bool = False


@dataclass(frozen=True)
class TokenScore:
    """A token's log-probability after all tokens before it.

    Attributes:
        id: Token id.
        logprob: Its log-probability, in nats.
        top: Ids and log-probabilities of the most probable tokens, as many as the request asks for, best first.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class PromptScores:
    """The scores of the prompt's tokens from the second on: the first has nothing before it."""

    scores: tuple[TokenScore, ...]


@dataclass(frozen=True)
class TextDelta:
    """The text that one decode step made final; empty while a character or a possible stop text is incomplete.

    Attributes:
        text: The text.
        scores: Scores of the tokens that it is made of, if the request asks for them; tokens of a stop text have none.
    """

    text: str
    scores: tuple[TokenScore, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Number of tokens of a request.

    Attributes:
        prompt_tokens: Tokens of the prompt, with the control tokens around it.
        completion_tokens: Tokens generated, one per decode step; a stop token counts.
        cached_tokens: Tokens of the prompt that were in the KV cache from an earlier request.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class Finished:
    """The last event of a request.

    Attributes:
        finish_reason: `stop` (a stop token or stop text) or `length` (max_new_tokens, or the context is full): the
            values of OpenAI's API.
        usage: Number of tokens.
    """

    finish_reason: str
    usage: Usage


GenerationEvent = PromptScores | TextDelta | Finished
