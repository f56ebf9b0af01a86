"""Answers of a model to prompts, generated many at a time."""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from cucafera.config.schema import SamplingConfig
from cucafera.data.chatml import render_prompt
from cucafera.generation.engine import Engine, Generation
from cucafera.generation.request import Request
from cucafera.pairs.prompts import PairPrompt

CONTEXT_SHARE = 4
"""At most one part in this many of the context is kept free for an answer, as in a chat."""


class OwnAnswer(NamedTuple):
    """An answer of the model.

    Attributes:
        text: Without spaces and line ends around it; may be empty.
        finish_reason: `stop` (the model ended it), `length` (max_new_tokens) or `context` (the context is full).
    """

    text: str
    finish_reason: str


class AnsweredPrompt(NamedTuple):
    """A prompt with its answers, none if it leaves no room for one in the context."""

    prompt: PairPrompt
    answers: list[OwnAnswer]


def answer_prompts(
    engine: Engine, prompts: Iterable[PairPrompt], count: int, sampling: SamplingConfig, seed: int
) -> Iterator[AnsweredPrompt]:
    """Yield each prompt with its answers, in the order of the prompts.

    All slots of the engine are busy as long as there are prompts. The seed of an answer depends on its prompt and not
    on what was answered before, so that a part of the prompts gets the same answers as all of them.

    Args:
        engine: Answers them; nothing else may use it.
        prompts: Read as they are needed.
        count: Answers per prompt.
        sampling: Sampling settings, max_new_tokens and stop texts.
        seed: Changes all answers.

    Raises:
        NonfiniteError: the model computes NaN or infinity.
    """
    limit = engine.context - min(sampling.max_new_tokens, engine.context // CONTEXT_SHARE)
    started: deque[tuple[PairPrompt, list[Generation]]] = deque()
    left = iter(prompts)
    while True:
        while len(engine.waiting) < engine.slots and (prompt := next(left, None)) is not None:
            ids = render_prompt(prompt.messages, engine.tokenizer)
            seeds = [answer_seed(seed, prompt, number) for number in range(count)] if len(ids) <= limit else []
            requests = [Request(ids, sampling, seed=of_answer) for of_answer in seeds]
            started.append((prompt, [engine.add(request) for request in requests]))
        while started and all(generation.is_ended for generation in started[0][1]):
            prompt, generations = started.popleft()
            for generation in generations:
                if generation.error is not None:
                    raise generation.error
            answers = [OwnAnswer(generation.text.strip(), generation.finish_reason) for generation in generations]
            yield AnsweredPrompt(prompt, answers)
        if not started:
            return
        engine.step()


def answer_seed(seed: int, prompt: PairPrompt, number: int) -> int:
    """Return the seed of an answer: 63 bits of a hash."""
    digest = hashlib.sha256(f"{seed} {prompt.key} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
