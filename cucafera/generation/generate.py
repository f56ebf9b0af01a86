"""The decode loop: prefill, decode steps, and detokenization as text becomes final.

B sequences, V vocabulary
"""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cucafera.config.errors import UserError
from cucafera.config.schema import SamplingConfig
from cucafera.config.tokens import PAD_ID
from cucafera.data.tokenizer import Tokenizer
from cucafera.generation.cache import KeyValueCache
from cucafera.generation.sampling import TokenPresence, sample_tokens
from cucafera.model.transformer import Decoder
from cucafera.quantities import number_of


class ContextFullError(UserError):
    """A prompt that leaves no space for new tokens in the context."""


class NonfiniteError(UserError):
    """A model whose logits are no distribution to draw from."""


class DecodingBackend(Protocol):
    """A model with its KV cache: one batch of sequences at a time.

    Attributes:
        context: Maximum number of tokens of a sequence, its prompt included.
        vocab_size: V.
        device: Device of the logits.
    """

    context: int
    vocab_size: int
    device: torch.device

    def prefill(self, prompts: Sequence[list[int]], max_new_tokens: int) -> Tensor:
        """Start a new batch: fill the KV cache with prompts of any lengths.

        Args:
            prompts: Token ids of each sequence, at least one token each.
            max_new_tokens: Maximum number of decode steps that will follow.

        Returns:
            Logits [B, V] in fp32 of the token after each prompt.
        """
        ...

    def decode_step(self, tokens: Tensor) -> Tensor:
        """Append one token to each sequence, [B, 1]; return the logits [B, V] in fp32 of the token after it."""
        ...


class TorchBackend:
    """A decoder of this package, on the device of its weights.

    Backends of one decoder share its weights and nothing else; making one costs nothing before `prefill`.
    """

    def __init__(self, model: Decoder) -> None:
        self.context = model.config.max_position_embeddings
        self.vocab_size = model.config.vocab_size
        self.device = model.embed_tokens.weight.device
        self._model = model

    def prefill(self, prompts: Sequence[list[int]], max_new_tokens: int) -> Tensor:
        """See `DecodingBackend.prefill`; shorter prompts are padded on the left."""
        longest = max(map(len, prompts))
        missing = [longest - len(prompt) for prompt in prompts]
        padded = [[PAD_ID] * gap + prompt for gap, prompt in zip(missing, prompts, strict=True)]
        padding = torch.tensor(missing, device=self.device) if any(missing) else None
        capacity, dtype = longest + max_new_tokens, self._model.embed_tokens.weight.dtype
        self._cache = KeyValueCache(self._model.config, len(prompts), capacity, self.device, dtype, padding)
        return self.decode_step(torch.tensor(padded, device=self.device))

    def decode_step(self, tokens: Tensor) -> Tensor:
        """See `DecodingBackend.decode_step`."""
        # `forward` and not `model(...)`: a model compiled for windows would be compiled again for one token.
        hidden = self._model.forward(tokens, cache=self._cache)
        return self._model.logits(hidden[:, -1]).float()


def backend_for(model: Decoder | DecodingBackend) -> DecodingBackend:
    """Return a new backend for a decoder; a backend is returned as it is."""
    return TorchBackend(model) if isinstance(model, Decoder) else model


@dataclass
class Completion:
    """The text generated after a prompt.

    Attributes:
        ids: Token ids, without the stop token.
        text: The same as text, without the stop text.
        finish_reason: `stop` (a stop token or stop text), `length` (max_new_tokens) or `context` (the context is full).
    """

    ids: list[int]
    text: str
    finish_reason: str


@dataclass(frozen=True)
class Usage:
    """Number of tokens of a request.

    Attributes:
        prompt_tokens: Tokens of the prompt, with the control tokens around it.
        completion_tokens: Tokens generated, one per decode step; a stop token counts.
    """

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class TextDelta:
    """The text that one decode step made final; empty while a character or a possible stop text is incomplete."""

    text: str


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


GenerationEvent = TextDelta | Finished


def generate(
    model: Decoder | DecodingBackend,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    sampling: SamplingConfig,
    stop_ids: frozenset[int],
    generator: torch.Generator | None = None,
) -> list[Completion]:
    """Generate a completion of each prompt, all of them in one batch.

    Args:
        model: A decoder, on any device, or another backend.
        tokenizer: Detokenizes.
        prompts: Token ids; each shorter than the context.
        sampling: Sampling settings, max_new_tokens and stop texts.
        stop_ids: Stop tokens.
        generator: Random generator on the model's device; None: torch's global one.

    Raises:
        ContextFullError: a prompt fills the context.
        NonfiniteError: the model computes NaN or infinity.
        ValueError: a prompt has no token.
    """
    if not prompts:
        return []
    backend = backend_for(model)
    outputs = [_Output(tokenizer, len(prompt), backend.context, sampling, stop_ids) for prompt in prompts]
    for tokens in decode_steps(backend, prompts, sampling, generator):
        for output, token in zip(outputs, tokens, strict=True):
            if not output.finish_reason:
                output.add(token)
        if all(output.finish_reason for output in outputs):
            break
    for output in outputs:
        output.finish()
    return [Completion(output.ids, output.detokenizer.text, output.finish_reason) for output in outputs]


def stream(
    model: Decoder | DecodingBackend,
    tokenizer: Tokenizer,
    prompt: list[int],
    sampling: SamplingConfig,
    stop_ids: frozenset[int],
    generator: torch.Generator | None = None,
) -> Iterator[GenerationEvent]:
    """Generate a completion of one prompt as events: a `TextDelta` per decode step, then one `Finished`.

    The deltas never contain half a character or a part of a stop text, and add up to the text of `generate`. Closing
    the iterator cancels the request: control returns after each token, so no more than one token is wasted.

    Arguments and errors are those of `generate`.
    """
    backend = backend_for(model)
    output = _Output(tokenizer, len(prompt), backend.context, sampling, stop_ids)
    for (token,) in decode_steps(backend, [prompt], sampling, generator):
        yield TextDelta(output.add(token))
        if output.finish_reason:
            break
    if rest := output.finish():
        yield TextDelta(rest)
    finish_reason = "stop" if output.finish_reason == "stop" else "length"
    yield Finished(finish_reason, Usage(len(prompt), output.completion_tokens))


class _Output:
    """One completion while it is generated.

    Attributes:
        ids: Token ids so far, without the stop token.
        completion_tokens: Tokens so far, with the stop token.
        finish_reason: See `Completion.finish_reason`; empty while the completion is unfinished.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_tokens: int, context: int, sampling: SamplingConfig, stop_ids: frozenset[int]
    ) -> None:
        self.detokenizer = IncrementalDetokenizer(tokenizer, sampling.stop)
        self.ids: list[int] = []
        self.completion_tokens = 0
        self.finish_reason = ""
        self._max_new_tokens = sampling.max_new_tokens
        self._max_tokens_in_context = context - prompt_tokens
        self._stop_ids = stop_ids

    def add(self, token: int) -> str:
        """Add a token; return the text that it makes final."""
        self.completion_tokens += 1
        if token in self._stop_ids:
            self.finish_reason = "stop"
            return ""
        self.ids.append(token)
        text = self.detokenizer.add(token)
        if self.detokenizer.stopped:
            self.finish_reason = "stop"
        elif len(self.ids) == self._max_new_tokens:
            self.finish_reason = "length"
        elif len(self.ids) == self._max_tokens_in_context:
            self.finish_reason = "context"
        return text

    def finish(self) -> str:
        """Return the rest of the text, after the last token."""
        text = self.detokenizer.finish()
        if self.detokenizer.stopped:
            self.finish_reason = "stop"
        return text


class IncrementalDetokenizer:
    """Detokenizes token by token.

    The text it returns holds complete UTF-8 characters, and nothing that may still become a stop text.

    Attributes:
        text: The final text so far.
        stopped: True once a stop text was found; no text follows it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held_back = ""

    def add(self, token: int) -> str:
        """Add a token; return the text that it makes final, which may be empty."""
        return self._append(self._decoder.decode(self._tokenizer.bytes_of(token)))

    def finish(self) -> str:
        """Return the rest of the text, after the last token; bytes that are no character become U+FFFD."""
        if self.stopped:
            return ""
        text = self._append(self._decoder.decode(b"", final=True))
        if self.stopped:
            return text
        text += self._held_back
        self.text += self._held_back
        self._held_back = ""
        return text

    def _append(self, new: str) -> str:
        pending = self._held_back + new
        matches = [position for position in (pending.find(stop) for stop in self._stop) if position >= 0]
        if matches:
            self.stopped = True
            end = min(matches)
        else:
            end = len(pending) - max((_overlap(pending, stop) for stop in self._stop), default=0)
        final, self._held_back = pending[:end], pending[end:]
        self.text += final
        return final


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of a text that is the start of a stop text, but not all of it."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


@torch.inference_mode()
def decode_steps(
    model: Decoder | DecodingBackend,
    prompts: Sequence[list[int]],
    sampling: SamplingConfig,
    generator: torch.Generator | None,
) -> Iterator[list[int]]:
    """Yield the next token of every sequence, B ids per step, until each has max_new_tokens or fills its context.

    Sequences that have ended get tokens too: the caller ignores them, and closes the iterator when all have ended.

    Arguments and errors are those of `generate`.
    """
    backend = backend_for(model)
    lengths = [len(prompt) for prompt in prompts]
    if not min(lengths):
        raise ValueError("a prompt needs at least one token")
    if max(lengths) >= backend.context:
        raise ContextFullError(
            f"the prompt has {number_of(max(lengths), 'token')} and the model's context {backend.context:,}: "
            "no space is left for "
            "a response. Shorten the prompt"
        )
    steps = max(min(sampling.max_new_tokens, backend.context - length) for length in lengths)
    presence = TokenPresence(list(prompts), backend.vocab_size, backend.device)
    logits = backend.prefill(prompts, steps)
    for step in range(1, steps + 1):
        if not logits.isfinite().all():
            raise NonfiniteError(
                "the model computes values that are not finite: its training diverged, or its weights are damaged"
            )
        tokens = sample_tokens(logits, presence.mask, sampling, generator)
        presence.add(tokens)
        yield tokens[:, 0].tolist()
        if step < steps:  # the logits after the last token are not needed
            logits = backend.decode_step(tokens)
