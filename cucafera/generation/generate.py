"""Completions of a batch of prompts, all at once."""

from collections.abc import Sequence
from dataclasses import dataclass

from cucafera.config.schema import SamplingConfig
from cucafera.data.tokenizer import Tokenizer
from cucafera.generation.backend import DecodingBackend, TorchBackend
from cucafera.generation.engine import Engine
from cucafera.generation.request import Request
from cucafera.model.transformer import Decoder

PREFILL_TOKENS = {"cpu": 1024, "cuda": 16_384}
"""Prompt tokens of a step: here nothing waits for the first token of a text."""


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


def generate(
    model: Decoder | DecodingBackend,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    sampling: SamplingConfig,
    stop_ids: frozenset[int],
    seed: int | Sequence[int] | None = None,
    slots: int | None = None,
) -> list[Completion]:
    """Generate a completion of each prompt.

    Args:
        model: A decoder, on any device, or another backend.
        tokenizer: Detokenizes.
        prompts: Token ids; each shorter than the context.
        sampling: Sampling settings, max_new_tokens and stop texts.
        stop_ids: Stop tokens.
        seed: Of the random generators, each prompt with its own: of the first prompt, and one more for each next one;
            or a seed per prompt; None: random.
        slots: Texts that a decoder writes at a time; None: all.

    Raises:
        ContextFullError: a prompt fills the context.
        NonfiniteError: the model computes NaN or infinity.
        ValueError: a prompt has no token.
    """
    if not prompts:
        return []
    if isinstance(model, Decoder):
        capacity = min(model.config.max_position_embeddings, max(map(len, prompts)) + sampling.max_new_tokens)
        model = TorchBackend(model, min(slots or len(prompts), len(prompts)), capacity)
    engine = Engine(model, tokenizer, PREFILL_TOKENS[model.device.type])
    seeds: Sequence[int | None]
    if isinstance(seed, Sequence):
        seeds = seed
    else:
        seeds = [None if seed is None else seed + number for number in range(len(prompts))]
    generations = [
        engine.add(Request(prompt, sampling, stop_ids, of_prompt))
        for prompt, of_prompt in zip(prompts, seeds, strict=True)
    ]
    while engine.running or engine.waiting:
        engine.step()
        for generation in generations:
            generation.events.clear()
            if generation.error is not None:
                raise generation.error
    return [Completion(generation.ids, generation.text, generation.finish_reason) for generation in generations]
