"""Writing: prompts to tokens, and to text as it comes.

B texts, P tokens of the longest prompt
"""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cucafera.config import SamplingConfig, UserError
from cucafera.data.tokenizer import PAD_ID, Tokenizer
from cucafera.generation.cache import KeyValueCache
from cucafera.generation.sampling import SeenTokens, next_tokens
from cucafera.model.transformer import Decoder


class ContextFullError(UserError):
    """A prompt that leaves no room for an answer."""


class Reader(Protocol):
    """A model that reads texts as they grow, and says after each reading what comes next.

    Attributes:
        context: Most tokens of a text.
        vocab_size: V.
        device: Where its logits are.
    """

    context: int
    vocab_size: int
    device: torch.device

    def begin(self, prompts: Sequence[list[int]], steps: int) -> Tensor:
        """Reads prompts of any lengths, which will grow by at most so many tokens; logits [B, V] in fp32."""
        ...

    def read(self, tokens: Tensor) -> Tensor:
        """Reads the next token of each text, [B, 1]; logits [B, V] in fp32."""
        ...


class DecoderReader:
    """A decoder that reads, on whatever device it is."""

    def __init__(self, model: Decoder) -> None:
        self.context = model.config.max_position_embeddings
        self.vocab_size = model.config.vocab_size
        self.device = model.embed_tokens.weight.device
        self._model = model

    def begin(self, prompts: Sequence[list[int]], steps: int) -> Tensor:
        """See `Reader`: shorter prompts are padded on their left."""
        longest = max(map(len, prompts))
        missing = [longest - len(prompt) for prompt in prompts]
        padded = [[PAD_ID] * gap + prompt for gap, prompt in zip(missing, prompts, strict=True)]
        padding = torch.tensor(missing, device=self.device) if any(missing) else None
        dtype = self._model.embed_tokens.weight.dtype
        self._cache = KeyValueCache(self._model.config, len(prompts), longest + steps, self.device, dtype, padding)
        return self.read(torch.tensor(padded, device=self.device))

    def read(self, tokens: Tensor) -> Tensor:
        """See `Reader`."""
        # `forward` and not `model(...)`: a model compiled for windows would be compiled again for one token.
        hidden = self._model.forward(tokens, cache=self._cache)
        return self._model.logits(hidden[:, -1]).float()


def reader_of(model: Decoder | Reader) -> Reader:
    """A decoder as a reader; a reader as it is."""
    return DecoderReader(model) if isinstance(model, Decoder) else model


@dataclass
class Written:
    """What was written after a prompt.

    Attributes:
        ids: Token ids, without the one that ended it.
        text: The same as text, without the stop text that ended it.
        ended: Why it ended: `stop` (a stop token or text), `length` (max_new_tokens) or `context` (no room left).
    """

    ids: list[int]
    text: str
    ended: str


def generate(
    model: Decoder | Reader,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    sampling: SamplingConfig,
    stop_ids: frozenset[int],
    generator: torch.Generator | None = None,
) -> list[Written]:
    """Continues prompts of any lengths side by side.

    Args:
        model: The decoder, on any device, or another reader.
        tokenizer: Gives the texts.
        prompts: Token ids; each shorter than the context.
        sampling: How the next tokens are drawn, and what ends a text.
        stop_ids: Tokens that end a text.
        generator: Source of randomness, on the model's device; None: torch's global one.

    Raises:
        ContextFullError: a prompt leaves no room.
        ValueError: a prompt has no token.
    """
    if not prompts:
        return []
    reader = reader_of(model)
    writers = [TextWriter(tokenizer, sampling.stop) for _ in prompts]
    ids: list[list[int]] = [[] for _ in prompts]
    ended = [""] * len(prompts)
    for tokens in token_columns(reader, prompts, sampling, generator):
        for text, token in enumerate(tokens):
            if ended[text]:
                continue
            if token in stop_ids:
                ended[text] = "stop"
                continue
            ids[text].append(token)
            writers[text].add(token)
            if writers[text].stopped:
                ended[text] = "stop"
            elif len(ids[text]) == sampling.max_new_tokens:
                ended[text] = "length"
            elif len(prompts[text]) + len(ids[text]) == reader.context:
                ended[text] = "context"
        if all(ended):
            break
    for text, writer in enumerate(writers):
        writer.finish()
        if writer.stopped:
            ended[text] = "stop"
    return [Written(*written) for written in zip(ids, (writer.text for writer in writers), ended, strict=True)]


def stream(
    model: Decoder | Reader,
    tokenizer: Tokenizer,
    prompt: list[int],
    sampling: SamplingConfig,
    stop_ids: frozenset[int],
    generator: torch.Generator | None = None,
) -> Iterator[str]:
    """The text after one prompt, in pieces as soon as they are certain: never half a character or stop text.

    Arguments and errors are those of `generate`.
    """
    writer = TextWriter(tokenizer, sampling.stop)
    for (token,) in token_columns(model, [prompt], sampling, generator):
        if token in stop_ids:
            break
        if piece := writer.add(token):
            yield piece
        if writer.stopped:
            return
    if piece := writer.finish():
        yield piece


class TextWriter:
    """Tokens to text, piece by piece.

    A piece holds whole UTF-8 characters, and nothing that may still turn out to be the beginning of a stop text.

    Attributes:
        text: The pieces so far.
        stopped: Whether a stop text was met; nothing comes after it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held_back = ""

    def add(self, token: int) -> str:
        """Takes a token; returns the piece that it makes certain, perhaps nothing."""
        return self._take(self._decoder.decode(self._tokenizer.bytes_of(token)))

    def finish(self) -> str:
        """The last piece, when no token comes any more."""
        if self.stopped:
            return ""
        piece = self._take(self._decoder.decode(b"", final=True))
        if self.stopped:
            return piece
        piece += self._held_back
        self.text += self._held_back
        self._held_back = ""
        return piece

    def _take(self, new: str) -> str:
        waiting = self._held_back + new
        found = [place for place in (waiting.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped = True
            certain = min(found)
        else:
            certain = len(waiting) - max((_overlap(waiting, stop) for stop in self._stop), default=0)
        piece, self._held_back = waiting[:certain], waiting[certain:]
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that may be the beginning of a stop text."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


@torch.inference_mode()
def token_columns(
    model: Decoder | Reader, prompts: Sequence[list[int]], sampling: SamplingConfig, generator: torch.Generator | None
) -> Iterator[list[int]]:
    """The next token of every text, again and again until each has max_new_tokens or fills its context."""
    reader = reader_of(model)
    lengths = [len(prompt) for prompt in prompts]
    if not min(lengths):
        raise ValueError("a prompt needs at least one token")
    if max(lengths) >= reader.context:
        raise ContextFullError(
            f"the prompt has {max(lengths):,} tokens and the model's context {reader.context:,}: there is no room for "
            "an answer. Shorten the prompt"
        )
    steps = max(min(sampling.max_new_tokens, reader.context - length) for length in lengths)
    seen = SeenTokens(list(prompts), reader.vocab_size, reader.device)
    logits = reader.begin(prompts, steps)
    for step in range(1, steps + 1):
        new = next_tokens(logits, seen.mask, sampling, generator)
        seen.add(new)
        yield new[:, 0].tolist()
        if step < steps:  # nothing comes after the last token, so it need not be read
            logits = reader.read(new)
