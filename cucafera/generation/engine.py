"""The decode loop: continuous batching of requests over the slots of a KV cache.

Requests join and leave between steps. A step decodes one token of every running text, then prefills a limited number
of prompt tokens. Chat, samples, evaluations, server and bot all use it.

R rows of a forward pass, V vocabulary
"""

import random
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cucafera.config.errors import UserError
from cucafera.data.tokenizer import Tokenizer
from cucafera.generation.backend import DecodingBackend, Extension, common_prefix
from cucafera.generation.detokenize import IncrementalDetokenizer
from cucafera.generation.request import (
    ContextFullError,
    Finished,
    GenerationEvent,
    NonfiniteError,
    PromptScores,
    Request,
    TextDelta,
    TokenScore,
    Usage,
)
from cucafera.generation.sampling import SamplingBatch, TokenPresence
from cucafera.quantities import number_of

PREFILL_TOKENS = {"cpu": 64, "cuda": 1024}
"""Prompt tokens of a step, padding included: while they are computed, running texts wait."""


class Generation:
    """A request while it is answered, and what came of it.

    Attributes:
        request: The request.
        ids: Token ids generated so far, without a stop token.
        finish_reason: `stop` (a stop token or stop text), `length` (max_new_tokens) or `context` (the context is full);
            empty while unfinished.
        error: The error that ended it.
        events: Events that nothing has taken yet.
        has_begun: True once it has got a slot.
        cached_tokens: Tokens of the prompt that were in the cache.
        completion_tokens: Tokens generated so far, with the stop token.
        random: The request's random generator.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, context: int) -> None:
        self.request = request
        self.ids: list[int] = []
        self.finish_reason = ""
        self.error: UserError | None = None
        self.events: deque[GenerationEvent] = deque()
        self.has_begun = False
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.random = random.Random(request.seed)
        self._detokenizer = IncrementalDetokenizer(tokenizer, request.sampling.stop)
        self._scores: deque[tuple[int, TokenScore]] = deque()
        self._prompt_scores: list[TokenScore] = []
        self._max_tokens_in_context = context - len(request.prompt)

    @property
    def text(self) -> str:
        """The text so far, as far as it is final, without the stop text."""
        return self._detokenizer.text

    @property
    def is_ended(self) -> bool:
        """True once there is a finish_reason or an error."""
        return bool(self.finish_reason) or self.error is not None

    def add(self, token: int, score: TokenScore | None) -> None:
        """Add a generated token, and its score if the request asks for scores."""
        self.completion_tokens += 1
        if token in self.request.stop_ids:
            self._finish("stop")
            return
        self.ids.append(token)
        if score is not None:
            self._scores.append((self._detokenizer.characters, score))
        text = self._detokenizer.add(token)
        self.events.append(TextDelta(text, self._final_scores()))
        if self._detokenizer.stopped:
            self._finish("stop")
        elif len(self.ids) == self.request.sampling.max_new_tokens:
            self._finish("length")
        elif len(self.ids) == self._max_tokens_in_context:
            self._finish("context")

    def add_prompt_scores(self, scores: Sequence[TokenScore]) -> None:
        """Add the scores of the next tokens of the prompt."""
        self._prompt_scores += scores

    def end_prompt(self) -> None:
        """Report the scores of the prompt, if the request asks for them; end, if it asks for no token."""
        if self.request.prompt_logprobs:
            self.events.append(PromptScores(tuple(self._prompt_scores)))
        if not self.request.sampling.max_new_tokens:
            self._finish("length")

    def _finish(self, reason: str) -> None:
        rest = self._detokenizer.finish()
        self.finish_reason = "stop" if self._detokenizer.stopped else reason
        scores = self._final_scores()
        if not self._detokenizer.stopped:  # tokens without text, at the end
            scores += tuple(score for _, score in self._scores)
        if rest or scores:
            self.events.append(TextDelta(rest, scores))
        usage = Usage(len(self.request.prompt), self.completion_tokens, self.cached_tokens)
        self.events.append(Finished("stop" if self.finish_reason == "stop" else "length", usage))

    def _final_scores(self) -> tuple[TokenScore, ...]:
        """Return the scores of tokens whose text has become final: that of a stop text never does."""
        scores = []
        while self._scores and self._scores[0][0] < len(self._detokenizer.text):
            scores.append(self._scores.popleft()[1])
        return tuple(scores)


class _Slot:
    """A sequence of the KV cache.

    Attributes:
        number: Its number.
        generation: The request that it answers; None: free.
        ids: Tokens that the cache holds, also after the request has ended. They are added after the forward pass that
            writes them: Ctrl-C may end it in the middle.
        last_used: When a request took it last.
        last_prefilled: When it was last prefilled, or taken.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.generation: Generation | None = None
        self.ids: list[int] = []
        self.last_used = self.last_prefilled = 0

    @property
    def missing_prompt_tokens(self) -> int:
        """Tokens of the prompt that are not in the cache; 0 if it is free."""
        return 0 if self.generation is None else max(0, len(self.generation.request.prompt) - len(self.ids))


class Engine:
    """Answers requests, as many at a time as its backend has slots, the others in the order in which they came.

    A prompt that begins like an earlier one, as in a conversation that continues, is prefilled from where they differ.
    For one thread; `engine_thread.EngineThread` serves others.

    Args:
        backend: The model with its KV cache, which nothing else may use.
        tokenizer: Detokenizes.
        prefill_tokens: Prompt tokens of a step; None: by the device.

    Attributes:
        tokenizer: The tokenizer.
        context: Maximum number of tokens of a sequence, its prompt included.
        vocab_size: V.
        slots: Requests that are answered at a time.
        waiting: Requests that no slot was free for, oldest first.
    """

    def __init__(self, backend: DecodingBackend, tokenizer: Tokenizer, prefill_tokens: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.context = backend.context
        self.vocab_size = backend.vocab_size
        self.slots = backend.slots
        self.waiting: deque[Generation] = deque()
        self._backend = backend
        self._prefill_tokens = prefill_tokens or PREFILL_TOKENS[backend.device.type]
        self._slots = [_Slot(number) for number in range(backend.slots)]
        self._presence = TokenPresence(backend.slots, backend.vocab_size, backend.device)
        self._clock = 0
        """Counts what happens to slots."""
        self._sampling: SamplingBatch | None = None

    @property
    def running(self) -> list[Generation]:
        """The requests that have a slot."""
        return [slot.generation for slot in self._slots if slot.generation is not None]

    def add(self, request: Request) -> Generation:
        """Add a request, which the next steps answer.

        Raises:
            ContextFullError: the prompt fills the context.
            ValueError: the prompt has no token, or one that the vocabulary does not have.
        """
        self.check(request)
        generation = Generation(request, self.tokenizer, self.context)
        self.waiting.append(generation)
        return generation

    def check(self, request: Request) -> None:
        """Raise what `add` raises."""
        tokens = len(request.prompt)
        if not tokens:
            raise ValueError("a prompt needs at least one token")
        if min(request.prompt) < 0 or max(request.prompt) >= self.vocab_size:
            raise ValueError(f"token ids must be from 0 to {self.vocab_size - 1:,}")
        if tokens + (request.sampling.max_new_tokens > 0) > self.context:
            raise ContextFullError(
                f"the prompt has {number_of(tokens, 'token')} and the model's context {self.context:,}: "
                "no space is left for a response. Shorten the prompt",
                tokens,
                self.context,
            )

    def stream(self, request: Request) -> Iterator[GenerationEvent]:
        """Answer a request: the events of each step as it is done, the last one `Finished`.

        The deltas never contain half a character or a part of a stop text. Closing the iterator cancels the request:
        control returns after each token, so no more than one token is wasted.

        Raises:
            ContextFullError: the prompt fills the context.
            NonfiniteError: the model computes NaN or infinity.
            ValueError: the prompt has no token, or one that the vocabulary does not have.
        """
        generation = self.add(request)
        try:
            while True:
                while generation.events:
                    yield generation.events.popleft()
                if generation.error is not None:
                    raise generation.error
                if generation.finish_reason:
                    return
                self.step()
        finally:
            self.cancel(generation)

    def cancel(self, generation: Generation) -> None:
        """End a request, if it has not ended: its slot is free for the next step."""
        if not generation.has_begun and generation in self.waiting:
            self.waiting.remove(generation)
        for slot in self._slots:
            if slot.generation is generation:
                slot.generation = None

    def forget(self) -> None:
        """End all requests, and forget what the cache holds."""
        self.waiting.clear()
        for slot in self._slots:
            slot.generation, slot.ids = None, []

    @torch.inference_mode()
    def step(self) -> None:
        """Decode one token of every running text, then prefill some tokens of new prompts."""
        self._decode()
        self._admit()
        self._prefill()

    def _decode(self) -> None:
        slots = [slot for slot in self._slots if slot.generation is not None and not slot.missing_prompt_tokens]
        if not slots:
            return
        last = [slot.generation.ids[-1:] for slot in slots if slot.generation is not None]
        self._choose(slots, self._extend(slots, last, [1] * len(slots)))

    def _extend(self, slots: Sequence[_Slot], ids: Sequence[list[int]], scored: Sequence[int]) -> Tensor:
        """Append tokens to the sequences of slots; return the logits after the last ones of each, see `Extension`."""
        logits = self._backend.extend(
            [
                Extension(slot.number, len(slot.ids), of_slot, count)
                for slot, of_slot, count in zip(slots, ids, scored, strict=True)
            ]
        )
        for slot, of_slot in zip(slots, ids, strict=True):
            slot.ids += of_slot
        return logits

    def _admit(self) -> None:
        """Give free slots to waiting requests."""
        while self.waiting:
            prompt = self.waiting[0].request.prompt
            free = [slot for slot in self._slots if slot.generation is None]
            if not free:
                return
            # A slot that holds most of a conversation's tokens continues it; else the slot that waited longest is
            # overwritten, with what another one has of the prompt.
            target = min(free, key=lambda slot: (bool(slot.ids), slot.last_used))
            cached = 0
            if not self.waiting[0].request.prompt_logprobs:
                shared = [common_prefix(prompt, slot.ids, len(prompt) - 1) for slot in self._slots]
                cached = max(shared)
                if self._soon_shared(prompt) > cached:
                    return  # for no longer than it would take to compute these tokens again
                source = self._slots[shared.index(cached)]
                if source.generation is None and 2 * cached >= len(source.ids):
                    target = source
                elif cached and source is not target:
                    target.ids = []  # also if Ctrl-C ends the copy
                    self._backend.copy(source.number, target.number, cached)
            generation = self.waiting.popleft()
            generation.cached_tokens = cached
            generation.has_begun = True
            target.generation, target.ids = generation, prompt[:cached]
            target.last_used = target.last_prefilled = self._now()
            self._presence.start(target.number, prompt)

    def _soon_shared(self, prompt: Sequence[int]) -> int:
        """Return how many tokens of a prompt another slot holds or is prefilling, if a step cannot prefill as many."""
        prefilling = (slot.generation for slot in self._slots if slot.missing_prompt_tokens)
        prompts = [generation.request.prompt for generation in prefilling if generation is not None]
        shared = max((common_prefix(prompt, other, len(prompt) - 1) for other in prompts), default=0)
        return shared if shared >= self._prefill_tokens else 0

    def _now(self) -> int:
        self._clock += 1
        return self._clock

    def _prefill(self) -> None:
        """Prefill some tokens of the prompts whose turn it is."""
        slots: list[_Slot] = []
        longest = 0
        missing = [slot for slot in self._slots if slot.missing_prompt_tokens]
        for slot in sorted(missing, key=lambda slot: slot.last_prefilled):
            size = max(longest, min(slot.missing_prompt_tokens, self._prefill_tokens))
            # The padding of a shorter prompt must fit into the cache too.
            fits = all(len(other.ids) + size <= self._backend.capacity for other in (*slots, slot))
            if slots and (size * (len(slots) + 1) > self._prefill_tokens or not fits):
                break
            slots.append(slot)
            longest = size
        if slots:
            self._prefill_slots(sorted(slots, key=lambda slot: slot.number))

    def _prefill_slots(self, slots: Sequence[_Slot]) -> None:
        ids, scored = [], []
        for slot in slots:
            assert slot.generation is not None
            request = slot.generation.request
            ids.append(request.prompt[len(slot.ids) :][: self._prefill_tokens])
            is_last = len(ids[-1]) == slot.missing_prompt_tokens
            scored.append(len(ids[-1]) if request.prompt_logprobs else int(is_last))
            slot.last_prefilled = self._now()
        rows = self._extend(slots, ids, scored).split(scored)
        prefilled, last = [], []
        for slot, logits in zip(slots, rows, strict=True):
            generation = slot.generation
            assert generation is not None
            if generation.request.prompt_logprobs:
                if not logits.isfinite().all():
                    self._fail(slot)
                    continue
                before = len(slot.ids) - len(logits)
                targets = generation.request.prompt[before + 1 :][: len(logits)]
                count = generation.request.top_logprobs or 0
                generation.add_prompt_scores(token_scores(logits[: len(targets)], targets, count))
            if not slot.missing_prompt_tokens:
                generation.end_prompt()
                if generation.is_ended:
                    slot.generation = None
                else:
                    prefilled.append(slot)
                    last.append(logits[-1])
        if prefilled:
            self._choose(prefilled, torch.stack(last))

    def _fail(self, slot: _Slot) -> None:
        """End a request whose logits are not finite."""
        assert slot.generation is not None
        slot.generation.error = NonfiniteError(
            "the model computes values that are not finite: its training diverged, or its weights are damaged"
        )
        slot.generation, slot.ids = None, []
        self._backend.clear(slot.number)

    def _choose(self, slots: list[_Slot], logits: Tensor) -> None:
        """Choose the next token of each slot by its logits [R, V]."""
        finite = logits.sum(-1).isfinite().tolist()
        if not all(finite):
            for slot, is_finite in zip(slots, finite, strict=True):
                if not is_finite:
                    self._fail(slot)
            logits = logits[[row for row, is_finite in enumerate(finite) if is_finite]]
            slots = [slot for slot, is_finite in zip(slots, finite, strict=True) if is_finite]
            if not slots:
                return
        generations = [slot.generation for slot in slots if slot.generation is not None]
        numbers = [slot.number for slot in slots]
        sampling = self._sampling_of(generations)
        tokens = sampling.next_tokens(logits, self._presence.of(numbers), lambda row: generations[row].random.random())
        self._presence.add(numbers, tokens)
        scores = self._scores(generations, logits, tokens)
        for slot, generation, token, score in zip(slots, generations, tokens, scores, strict=True):
            generation.add(token, score)
            if generation.is_ended:
                slot.generation = None

    def _sampling_of(self, generations: Sequence[Generation]) -> SamplingBatch:
        """Return the sampling settings of the rows: mostly those of the step before."""
        settings = [generation.request.sampling for generation in generations]
        if self._sampling is None or self._sampling.settings != settings:
            self._sampling = SamplingBatch(settings, self._backend.device)
        return self._sampling

    def _scores(
        self, generations: Sequence[Generation], logits: Tensor, tokens: Sequence[int]
    ) -> list[TokenScore | None]:
        counts = [generation.request.top_logprobs for generation in generations]
        rows = [row for row, count in enumerate(counts) if count is not None]
        scores: list[TokenScore | None] = [None] * len(generations)
        for row in rows:
            (scores[row],) = token_scores(logits[row : row + 1], [tokens[row]], counts[row] or 0)
        return scores


def token_scores(logits: Tensor, tokens: Sequence[int], count: int) -> list[TokenScore]:
    """Return the scores of tokens, of the model's own distribution.

    Args:
        logits: [R, V].
        tokens: R token ids.
        count: Number of most probable tokens to add.
    """
    if not tokens:
        return []
    log_probabilities = logits.log_softmax(-1)
    targets = torch.tensor(tokens, device=logits.device)
    of_tokens = log_probabilities.gather(1, targets[:, None])[:, 0].tolist()
    best = log_probabilities.topk(min(count, logits.shape[-1]), dim=-1)
    tops = [tuple(zip(*pair, strict=True)) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return [TokenScore(*score) for score in zip(tokens, of_tokens, tops, strict=True)]
