"""Chat sessions and text completions: messages in, events out.

What the chat command, the server and the bot have in common. A session owns its history, settings and random generator;
sessions may share an engine.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Protocol

from cucafera.config.errors import UserError
from cucafera.config.schema import SamplingConfig
from cucafera.config.tokens import DOCUMENT_START_ID
from cucafera.data.chatml import Message, render, render_prompt
from cucafera.data.tokenizer import Tokenizer
from cucafera.generation.request import ContextFullError, GenerationEvent, Request, TextDelta
from cucafera.quantities import number_of

MIN_MESSAGE_TOKENS = 6
"""Of a message of one token: <im_start>, its role, two line ends, and <im_end>, in addition."""


class RequestStream(Protocol):
    """Answers requests: an `Engine`, or an `EngineThread` that many sessions share.

    Attributes:
        context: Maximum number of tokens of a sequence, its prompt included.
    """

    context: int

    def stream(self, request: Request) -> Iterator[GenerationEvent]:
        """Answer a request: a `TextDelta` per token, then one `Finished`; closing the iterator cancels it."""
        ...


def chat_request(
    messages: Sequence[Message], tokenizer: Tokenizer, sampling: SamplingConfig, seed: int | None
) -> Request:
    """Return the request for an answer to a conversation, whose last message is the one to answer."""
    return Request(render_prompt(messages, tokenizer), sampling, seed=seed)


def completion_request(text: str, tokenizer: Tokenizer, sampling: SamplingConfig, seed: int | None) -> Request:
    """Return the request for the continuation of a text, as a base model writes it."""
    return Request([DOCUMENT_START_ID, *tokenizer.encode(without_surrogates(text))], sampling, seed=seed)


class ChatSession:
    """A conversation with a model.

    One answer at a time: its iterator must be exhausted or closed before the next call.

    Args:
        engine: Answers the requests of the session.
        tokenizer: The model's tokenizer.
        sampling: Sampling settings, max_new_tokens and stop texts.
        seed: The same seed gives the same answers; None: random.

    Attributes:
        system: The system message; empty: none.
        history: User messages and answers in turn, without the system message. When the context is full, the oldest
            turns are left out of the prompt; they stay in the history.
    """

    def __init__(
        self, engine: RequestStream, tokenizer: Tokenizer, sampling: SamplingConfig, seed: int | None = None
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.seed(seed)
        self.system = ""
        self.history: list[Message] = []
        self._unanswered: str | None = None

    def seed(self, seed: int | None) -> None:
        """Seed the random generator that the seed of each answer is drawn from; None: with a random number."""
        self._random = random.Random(seed)

    def answer(self, text: str) -> Iterator[GenerationEvent]:
        """Answer a message; both are added to the history, unless the response is empty.

        Closing the iterator cancels the answer; what was generated until then is kept.

        Raises:
            ContextFullError: the message alone leaves no space for an answer.
        """
        self._unanswered = text
        yield from self._answer(self.history, text)

    def redo(self) -> Iterator[GenerationEvent]:
        """Answer the last message again; the answer replaces the one before, unless the response is empty.

        Raises:
            UserError: there is no message.
            ContextFullError: the message alone leaves no space for an answer.
        """
        if self._unanswered is not None:
            yield from self._answer(self.history, self._unanswered)
        elif self.history:
            yield from self._answer(self.history[:-2], self.history[-2].content)
        else:
            raise UserError("There is no answer to redo.")

    def undo(self) -> str:
        """Remove the last message, with its answer if it has one, and return it.

        Raises:
            UserError: there is no message.
        """
        if self._unanswered is not None:
            text, self._unanswered = self._unanswered, None
        elif self.history:
            text, self.history = self.history[-2].content, self.history[:-2]
        else:
            raise UserError("There is no message to remove.")
        return text

    def complete(self, text: str) -> Iterator[GenerationEvent]:
        """Continue a text without the history, as a base model does.

        Raises:
            ContextFullError: the text fills the context.
        """
        return self.engine.stream(completion_request(text, self.tokenizer, self.sampling, self._next_seed()))

    def reset(self) -> None:
        """Clear the history; the system message stays."""
        self.history = []
        self._unanswered = None

    def messages(self) -> list[Message]:
        """Return the complete conversation, with the system message."""
        return self._with_system(self.history)

    def _answer(self, previous: list[Message], text: str) -> Iterator[GenerationEvent]:
        question = Message("user", without_surrogates(text))
        messages = self._messages_that_fit([*previous, question])
        answer = ""
        try:
            for event in self._respond(messages):
                if isinstance(event, TextDelta):
                    answer += event.text
                yield event
        finally:  # also when the iterator is closed: a cancelled answer is kept as far as it came
            if answer.strip():
                self.history = [*previous, question, Message("assistant", answer)]
                self._unanswered = None

    def _respond(self, messages: list[Message]) -> Iterator[GenerationEvent]:
        return self.engine.stream(chat_request(messages, self.tokenizer, self.sampling, self._next_seed()))

    def _next_seed(self) -> int:
        return self._random.getrandbits(63)

    def _messages_that_fit(self, messages: list[Message]) -> list[Message]:
        """Add the system message, and leave out as many of the oldest turns as the answer needs space.

        At most a quarter of the context is reserved for the answer, so that a large max_new_tokens does not cost the
        model its memory of the conversation.
        """
        context = self.engine.context
        limit = context - min(self.sampling.max_new_tokens, context // 4)
        # Older ones do not fit, however short they are: without counting their tokens, a long history costs nothing.
        messages = messages[max(0, len(messages) - limit // MIN_MESSAGE_TOKENS - 1) // 2 * 2 :]
        opened = len(render_prompt(self._with_system([]), self.tokenizer))
        sizes = [len(rendered.ids) for rendered in render([[message] for message in messages], self.tokenizer)]
        while (size := opened + sum(sizes)) > limit:
            if len(messages) == 1:
                system = " and the system message (/system - removes it)" if self.system else ""
                raise ContextFullError(
                    f"this message has {number_of(size, 'token')} with its ChatML framing{system}; the "
                    "model's context of "
                    f"{context:,} leaves room for {limit:,} before the answer. Shorten it",
                    size,
                    context,
                )
            messages, sizes = messages[2:], sizes[2:]
        return self._with_system(messages)

    def _with_system(self, messages: list[Message]) -> list[Message]:
        return [Message("system", without_surrogates(self.system)), *messages] if self.system else messages


def without_surrogates(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode, by question marks.

    Python reads them from bytes of a terminal that are not UTF-8, and from JSON's escapes.
    """
    return text.encode(errors="replace").decode()
