"""Chat sessions and text completions: messages in, events out.

What the chat command, a server and a bot have in common. A session owns its history, settings, random generator and
decoding backend (KV cache); sessions share the weights and nothing else.
"""

from collections.abc import Iterator, Sequence

import torch

from cucafera.config.errors import UserError
from cucafera.config.schema import SamplingConfig
from cucafera.config.tokens import DOCUMENT_START_ID
from cucafera.data.chatml import STOP_IDS, Message, render_prompt
from cucafera.data.tokenizer import Tokenizer
from cucafera.generation.generate import ContextFullError, DecodingBackend, GenerationEvent, TextDelta, stream
from cucafera.quantities import number_of


def answer_messages(
    backend: DecodingBackend,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    sampling: SamplingConfig,
    generator: torch.Generator,
) -> Iterator[GenerationEvent]:
    """Answer a conversation, without any history: a `TextDelta` per token, then one `Finished`.

    Closing the iterator cancels the request within one token.

    Args:
        backend: Backend that no other unfinished request uses.
        tokenizer: The model's tokenizer.
        messages: The conversation; the last message is the one to answer.
        sampling: Sampling settings, max_new_tokens and stop texts.
        generator: Random generator of this request, on the backend's device.

    Raises:
        ContextFullError: the messages fill the context; raised by the first step of the iterator.
    """
    return stream(backend, tokenizer, render_prompt(messages, tokenizer), sampling, frozenset(STOP_IDS), generator)


def complete_text(
    backend: DecodingBackend, tokenizer: Tokenizer, text: str, sampling: SamplingConfig, generator: torch.Generator
) -> Iterator[GenerationEvent]:
    """Continue a text, as a base model does; arguments, events and errors are those of `answer_messages`."""
    prompt = [DOCUMENT_START_ID, *tokenizer.encode(_without_surrogates(text))]
    return stream(backend, tokenizer, prompt, sampling, frozenset(STOP_IDS), generator)


class ChatSession:
    """A conversation with a model.

    One answer at a time: its iterator must be exhausted or closed before the next call.

    Args:
        backend: Decoding backend of this session alone.
        tokenizer: The model's tokenizer.
        sampling: Sampling settings, max_new_tokens and stop texts.
        generator: Random generator of this session, on the backend's device.

    Attributes:
        system: The system message; empty: none.
        history: User messages and answers in turn, without the system message. When the context is full, the oldest
            turns are left out of the prompt; they stay in the history.
    """

    def __init__(
        self, backend: DecodingBackend, tokenizer: Tokenizer, sampling: SamplingConfig, generator: torch.Generator
    ) -> None:
        self.backend = backend
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.generator = generator
        self.system = ""
        self.history: list[Message] = []
        self._unanswered: str | None = None

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
        return complete_text(self.backend, self.tokenizer, text, self.sampling, self.generator)

    def reset(self) -> None:
        """Clear the history; the system message stays."""
        self.history = []
        self._unanswered = None

    def messages(self) -> list[Message]:
        """Return the complete conversation, with the system message."""
        return self._with_system(self.history)

    def _answer(self, previous: list[Message], text: str) -> Iterator[GenerationEvent]:
        question = Message("user", _without_surrogates(text))
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
        return answer_messages(self.backend, self.tokenizer, messages, self.sampling, self.generator)

    def _messages_that_fit(self, messages: list[Message]) -> list[Message]:
        """Add the system message, and leave out as many of the oldest turns as the answer needs space.

        At most a quarter of the context is reserved for the answer, so that a large max_new_tokens does not cost the
        model its memory of the conversation.
        """
        context = self.backend.context
        limit = context - min(self.sampling.max_new_tokens, context // 4)
        while (size := len(render_prompt(self._with_system(messages), self.tokenizer))) > limit:
            if len(messages) == 1:
                system = " and the system message (/system - removes it)" if self.system else ""
                raise ContextFullError(
                    f"this message has {number_of(size, 'token')} with its ChatML framing{system}; the "
                    "model's context of "
                    f"{context:,} leaves room for {limit:,} before the answer. Shorten it"
                )
            messages = messages[2:]
        return self._with_system(messages)

    def _with_system(self, messages: list[Message]) -> list[Message]:
        return [Message("system", _without_surrogates(self.system)), *messages] if self.system else messages


def _without_surrogates(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode, by question marks.

    Python reads them from bytes of a terminal that are not UTF-8, and from JSON's escapes.
    """
    return text.encode(errors="replace").decode()
