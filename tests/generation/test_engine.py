"""The engine: requests that join and leave, each as if it were alone; cancellation; prefix caching; scores."""

import dataclasses
import random
from collections.abc import Iterable
from itertools import zip_longest

import pytest
import torch

from cucafera.config.schema import SamplingConfig
from cucafera.generation.backend import TorchBackend, common_prefix
from cucafera.generation.engine import Engine, Generation
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
from cucafera.model.transformer import Decoder
from tests.generation.models import CONFIG, GREEDY, NO_STOP, prompts_of

DRAWN = SamplingConfig(temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=12)
KINDS = [
    GREEDY, DRAWN, SamplingConfig(max_new_tokens=9), dataclasses.replace(DRAWN, top_p=0.8, repetition_penalty=1.3),
    dataclasses.replace(DRAWN, top_k=7, min_p=0.05), dataclasses.replace(GREEDY, repetition_penalty=1.2),
]  # fmt: skip


def engine_of(model, tokenizer, slots: int = 1, prefill_tokens: int = 8) -> Engine:
    return Engine(TorchBackend(model, slots), tokenizer, prefill_tokens)


def text_of(events: Iterable[GenerationEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def run(engine: Engine) -> None:
    while engine.running or engine.waiting:
        engine.step()


def answered(engine: Engine, *requests: Request) -> list[Generation]:
    generations = [engine.add(request) for request in requests]
    run(engine)
    return generations


def mixed_requests(count: int) -> list[Request]:
    lengths = [3 + 5 * number % 31 for number in range(count)]
    return [
        Request(prompt, KINDS[number % len(KINDS)], NO_STOP, seed=number)
        for number, prompt in enumerate(prompts_of(*lengths, seed=5))
    ]


@pytest.mark.parametrize("slots", [2, 5, 16])
def test_sixteen_requests_together_get_the_text_that_each_gets_alone(model, tokenizer, slots):
    requests = mixed_requests(16)
    alone = [answered(engine_of(model, tokenizer, prefill_tokens=64), request)[0] for request in requests]
    together = answered(engine_of(model, tokenizer, slots), *requests)
    assert [generation.ids for generation in together] == [generation.ids for generation in alone]
    assert [generation.text for generation in together] == [generation.text for generation in alone]
    assert all(generation.finish_reason for generation in together)


def test_requests_that_come_while_others_are_answered_change_nothing(model, tokenizer):
    requests = mixed_requests(12)
    engine, generations, clock = engine_of(model, tokenizer, 4), [], random.Random(0)
    for request in requests:
        generations.append(engine.add(request))
        for _ in range(clock.randrange(4)):
            engine.step()
    cancelled = generations.pop(5)
    engine.cancel(cancelled)
    engine.cancel(cancelled)
    requests.pop(5)
    run(engine)
    alone = [answered(engine_of(model, tokenizer), request)[0].ids for request in requests]
    assert [generation.ids for generation in generations] == alone


def test_greedy_texts_are_those_of_hugging_face(model, theirs, tokenizer):
    prompts = prompts_of(4, 17, 9, 25, 30)
    generations = answered(engine_of(model, tokenizer, 3), *(Request(prompt, GREEDY, NO_STOP) for prompt in prompts))
    for prompt, generation in zip(prompts, generations, strict=True):
        (expected,) = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
        )[:, len(prompt) :].tolist()
        assert generation.ids == expected[: 48 - len(prompt)]


def test_waiting_requests_get_a_slot_in_the_order_in_which_they_came(model, tokenizer):
    engine = engine_of(model, tokenizer, 2, prefill_tokens=64)
    generations = [engine.add(Request(prompt, GREEDY, NO_STOP)) for prompt in prompts_of(5, 6, 7, 8)]
    engine.step()
    assert engine.running == generations[:2] and list(engine.waiting) == generations[2:]
    engine.cancel(generations[0])
    engine.cancel(generations[3])
    engine.step()
    assert engine.running == [generations[2], generations[1]] and not engine.waiting
    assert len(generations[0].ids) == 1


def test_a_long_prompt_is_prefilled_while_others_continue(model, tokenizer):
    engine = engine_of(model, tokenizer, 2, prefill_tokens=4)
    short, long = prompts_of(3, 40)
    first = engine.add(Request(short, GREEDY, NO_STOP))
    engine.step()
    second = engine.add(Request(long, dataclasses.replace(GREEDY, max_new_tokens=3), NO_STOP))
    lengths = []
    while not second.ids:
        engine.step()
        lengths.append(len(first.ids))
    assert lengths == list(range(2, 12))  # a token per step, for the 10 steps of 4 prompt tokens


def test_a_short_prompt_does_not_wait_for_the_end_of_a_long_one(model, tokenizer):
    engine = engine_of(model, tokenizer, 3, prefill_tokens=4)
    long, short, other = prompts_of(44, 4, 6)
    first = engine.add(Request(long, dataclasses.replace(GREEDY, max_new_tokens=2), NO_STOP))
    engine.step()
    generations = [engine.add(Request(prompt, GREEDY, NO_STOP)) for prompt in (short, other)]
    for _ in range(6):
        engine.step()
    assert [bool(generation.ids) for generation in (first, *generations)] == [False, True, True]
    run(engine)
    for generation in (first, *generations):
        assert generation.ids == answered(engine_of(model, tokenizer), generation.request)[0].ids


# Prefix caching


class Counting(TorchBackend):
    """Counts the tokens that it computes."""

    def __init__(self, model, slots):
        super().__init__(model, slots)
        self.computed = 0

    def extend(self, extensions):
        self.computed += sum(len(extension.ids) for extension in extensions)
        return super().extend(extensions)


def test_a_conversation_that_continues_is_prefilled_from_its_new_turn(model, tokenizer):
    backend = Counting(model, 2)
    engine = Engine(backend, tokenizer, 64)
    first, other, more = prompts_of(10, 12, 6)
    short = dataclasses.replace(GREEDY, max_new_tokens=4)
    (answer,) = answered(engine, Request(first, short, NO_STOP))
    answered(engine, Request(other, short, NO_STOP))
    backend.computed = 0
    continued = [*first, *answer.ids, *more]
    (again,) = answered(engine, Request(continued, short, NO_STOP))
    # The last token of the answer was never fed back, so it is not cached.
    assert again.cached_tokens == 10 + 3 and backend.computed == 1 + 6 + 3
    assert again.events[-1] == Finished("length", Usage(20, 4, 13))
    assert again.ids == answered(engine_of(model, tokenizer), Request(continued, short, NO_STOP))[0].ids


def test_a_shared_beginning_is_copied_and_the_conversation_that_had_it_stays(model, tokenizer):
    backend = Counting(model, 3)
    engine = Engine(backend, tokenizer, 64)
    beginning, *ends = prompts_of(8, 20, 5, 6)
    short = dataclasses.replace(GREEDY, max_new_tokens=2)
    prompts = [beginning + end for end in ends]
    answered(engine, Request(prompts[0], short, NO_STOP))
    backend.computed = 0
    generations = answered(engine, *(Request(prompt, short, NO_STOP) for prompt in prompts[1:]))
    assert [generation.cached_tokens for generation in generations] == [8, 8]
    assert backend.computed == 5 + 6 + 2
    (again,) = answered(engine, Request(prompts[0], short, NO_STOP))
    assert again.cached_tokens == len(prompts[0]) - 1  # the last token is computed for its logits
    for prompt, generation in zip(prompts, [again, *generations], strict=True):
        assert generation.ids == answered(engine_of(model, tokenizer), Request(prompt, short, NO_STOP))[0].ids


def test_answers_to_one_prompt_prefill_it_once(model, tokenizer):
    backend = Counting(model, 4)
    (prompt,) = prompts_of(30)
    requests = [Request(prompt, dataclasses.replace(DRAWN, max_new_tokens=3), NO_STOP, seed=n) for n in range(4)]
    generations = answered(Engine(backend, tokenizer, 8), *requests)
    assert backend.computed == 30 + 3 * 1 + 4 * 2
    alone = [answered(engine_of(model, tokenizer), request)[0].ids for request in requests]
    assert [generation.ids for generation in generations] == alone


def test_a_short_common_beginning_is_not_waited_for(model, tokenizer):
    engine = engine_of(model, tokenizer, 2, prefill_tokens=4)
    beginning, long, short = prompts_of(3, 37, 2)
    generations = [engine.add(Request(beginning + end, GREEDY, NO_STOP)) for end in (long, short)]
    engine.step()
    assert engine.running == generations


def test_the_slot_that_waited_longest_is_overwritten(model, tokenizer):
    engine = engine_of(model, tokenizer, 2)
    prompts = prompts_of(20, 20, 20)
    one = dataclasses.replace(GREEDY, max_new_tokens=1)
    for prompt in prompts:
        answered(engine, Request(prompt, one, NO_STOP))
    cached = [answered(engine, Request(prompt, one, NO_STOP))[0].cached_tokens for prompt in (prompts[1], prompts[2])]
    assert cached == [19, 19]


@pytest.mark.parametrize(
    ("one", "other", "limit", "expected"),
    [([], [1], 5, 0), ([1], [1], 0, 0), ([1], [1], -1, 0), (list(range(200)), [*range(130), 9], 500, 130),
     (list(range(200)), list(range(200)), 150, 150), (list(range(64)), list(range(64)), 64, 64)],
)  # fmt: skip
def test_a_common_prefix_is_found(one, other, limit, expected):
    assert common_prefix(one, other, limit) == expected


# Streams


def test_a_stream_is_the_text_in_deltas_and_ends_with_finish_reason_and_usage(model, tokenizer):
    (prompt,) = prompts_of(6, seed=4)
    (generation,) = answered(engine_of(model, tokenizer), Request(prompt, GREEDY, NO_STOP))
    *deltas, last = engine_of(model, tokenizer).stream(Request(prompt, GREEDY, NO_STOP))
    assert text_of(deltas) == generation.text
    assert len(deltas) >= 20 and all(isinstance(delta, TextDelta) for delta in deltas)
    assert last == Finished("length", Usage(6, 20))
    middle = generation.text[len(generation.text) // 2 :][:3]
    stopped = Request(prompt, dataclasses.replace(GREEDY, stop=[middle]), NO_STOP)
    *deltas, last = engine_of(model, tokenizer).stream(stopped)
    assert text_of(deltas) == generation.text[: generation.text.index(middle)] and last.finish_reason == "stop"
    stop = generation.ids[9]
    *_, last = engine_of(model, tokenizer).stream(Request(prompt, GREEDY, frozenset({stop})))
    assert last == Finished("stop", Usage(6, generation.ids.index(stop) + 1))  # the stop token was generated too


def test_a_stream_ends_where_the_context_does(model, tokenizer):
    unlimited = dataclasses.replace(GREEDY, max_new_tokens=1000)
    *_, last = engine_of(model, tokenizer).stream(Request(prompts_of(7)[0], unlimited, NO_STOP))
    assert last == Finished("length", Usage(7, 48 - 7))
    with pytest.raises(ContextFullError, match="the prompt has 48 tokens and the model's context 48") as raised:
        next(engine_of(model, tokenizer).stream(Request(prompts_of(48)[0], GREEDY, NO_STOP)))
    assert (raised.value.tokens, raised.value.context) == (48, 48)


def test_a_closed_stream_computes_no_further_token(model, tokenizer):
    backend = Counting(model, 1)
    # Nothing of this stop text is final before its end, and yet control returns after each token.
    request = Request(prompts_of(6)[0], dataclasses.replace(GREEDY, stop=["x" * 100]), NO_STOP)
    engine = Engine(backend, tokenizer)
    events = engine.stream(request)
    for _ in range(3):
        next(events)
    events.close()
    assert backend.computed == 6 + 2  # the prompt, and the first and the second token
    assert not engine.running and not engine.waiting


@pytest.mark.parametrize("shared", [True, False])
def test_two_streams_at_the_same_time_give_what_each_gives_alone(model, tokenizer, shared):
    requests = [Request(prompt, GREEDY, NO_STOP) for prompt in prompts_of(6, 9)]
    alone = [list(engine_of(model, tokenizer).stream(request)) for request in requests]
    engines = [engine_of(model, tokenizer)] * 2 if shared else [engine_of(model, tokenizer) for _ in range(2)]
    interleaved = list(zip_longest(*(engine.stream(r) for engine, r in zip(engines, requests, strict=True))))
    for number, expected in enumerate(alone):
        assert [pair[number] for pair in interleaved if pair[number] is not None] == expected


def test_a_prompt_without_a_token_or_with_an_impossible_one_is_refused(model, tokenizer):
    engine = engine_of(model, tokenizer)
    with pytest.raises(ValueError, match="at least one token"):
        engine.add(Request([], GREEDY))
    for token in (-1, 300):
        with pytest.raises(ValueError, match="token ids must be from 0 to 299"):
            engine.add(Request([5, token], GREEDY))


def test_a_request_of_a_broken_model_fails_and_its_slot_is_free(model, tokenizer):
    class Broken(TorchBackend):
        def extend(self, extensions):
            logits = super().extend(extensions)
            logits[[row for row, extension in enumerate(extensions) if extension.slot == 1]] = torch.nan
            return logits

    engine = Engine(Broken(model, 2), tokenizer, 64)
    good, bad = answered(engine, *(Request(prompt, GREEDY, NO_STOP) for prompt in prompts_of(5, 5)))
    assert isinstance(bad.error, NonfiniteError) and not bad.ids and not engine.running
    assert good.ids == answered(engine_of(model, tokenizer), good.request)[0].ids


class Interrupted(TorchBackend):
    """Ctrl-C in the n-th forward pass, before it has written its keys."""

    def __init__(self, model, steps: int) -> None:
        super().__init__(model, 2)
        self.steps = steps

    def extend(self, extensions):
        self.steps -= 1
        if self.steps == 0:
            raise KeyboardInterrupt
        return super().extend(extensions)


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_after_ctrl_c_the_cache_holds_only_what_was_computed(model, tokenizer, steps):
    request = Request(prompts_of(20)[0], GREEDY, NO_STOP)
    engine = Engine(Interrupted(model, steps), tokenizer, 8)
    with pytest.raises(KeyboardInterrupt):
        list(engine.stream(request))
    (alone,) = answered(engine_of(model, tokenizer), request)
    again = engine.add(request)
    run(engine)
    assert again.ids == alone.ids
    continued = Request([*request.prompt, *alone.ids[:6], 20], GREEDY, NO_STOP)
    assert answered(engine, continued)[0].ids == answered(engine_of(model, tokenizer), continued)[0].ids


class Poisoned(TorchBackend):
    """Computes NaN until it is cured."""

    is_broken = True

    def extend(self, extensions):
        logits = super().extend(extensions)
        if self.is_broken:
            self._cache._keys[:, 0] = self._cache._values[:, 0] = torch.nan
            logits[:] = torch.nan
        return logits


@pytest.mark.parametrize("new_tokens", [0, 4])
def test_what_is_not_finite_is_an_error_and_leaves_nothing_in_its_slot(model, tokenizer, new_tokens):
    backend = Poisoned(model, 2)
    engine = Engine(backend, tokenizer)
    sampling = dataclasses.replace(GREEDY, max_new_tokens=new_tokens)
    short, long = prompts_of(4, 9)
    with pytest.raises(NonfiniteError):
        list(engine.stream(Request(long, sampling, NO_STOP, top_logprobs=0, prompt_logprobs=True)))
    backend.is_broken = False
    # Computed together with a longer one, the short one reads beyond its own end.
    requests = [Request(prompt, GREEDY, NO_STOP) for prompt in (short, long)]
    alone = [answered(engine_of(model, tokenizer), request)[0].ids for request in requests]
    assert [generation.ids for generation in answered(engine, *requests)] == alone


# Scores


def expected_scores(model: Decoder, ids: list[int], first: int, count: int) -> list[TokenScore]:
    logprobs = model.logits(model(torch.tensor([ids])))[0].log_softmax(-1)
    best = logprobs.topk(count, dim=-1)
    scores = []
    for position in range(first, len(ids)):
        row = position - 1
        top = tuple(zip(best.indices[row].tolist(), best.values[row].tolist(), strict=True))
        scores.append(TokenScore(ids[position], logprobs[row, ids[position]].item(), top))
    return scores


def assert_close(scores: list[TokenScore], expected: list[TokenScore]) -> None:
    assert [score.id for score in scores] == [score.id for score in expected]
    for score, wanted in zip(scores, expected, strict=True):
        assert score.logprob == pytest.approx(wanted.logprob, abs=1e-4)
        assert [token for token, _ in score.top] == [token for token, _ in wanted.top]
        assert [value for _, value in score.top] == pytest.approx([value for _, value in wanted.top], abs=1e-4)


def test_tokens_are_scored_by_the_model_before_any_sampling_setting(model, tokenizer):
    (prompt,) = prompts_of(9)
    for sampling in (GREEDY, dataclasses.replace(DRAWN, temperature=0.3, top_k=5, repetition_penalty=2.0)):
        engine = engine_of(model, tokenizer, 2)
        engine.add(Request(prompts_of(12)[0], DRAWN, NO_STOP))
        events = list(engine.stream(Request(prompt, sampling, NO_STOP, seed=1, top_logprobs=3)))
        scores = [score for event in events if isinstance(event, TextDelta) for score in event.scores]
        ids = [*prompt, *(score.id for score in scores)]
        assert len(scores) == sampling.max_new_tokens
        assert_close(scores, expected_scores(model, ids, len(prompt), 3))


@pytest.mark.parametrize("new_tokens", [0, 2])
@pytest.mark.parametrize("length", [1, 8, 30])
def test_the_tokens_of_a_prompt_are_scored_whatever_is_cached(model, tokenizer, length, new_tokens):
    (prompt,) = prompts_of(length)
    engine = engine_of(model, tokenizer, 2)
    sampling = dataclasses.replace(GREEDY, max_new_tokens=new_tokens)
    request = Request(prompt, sampling, NO_STOP, top_logprobs=2, prompt_logprobs=True)
    for _ in range(2):
        first, *_, last = engine.stream(request)
        assert isinstance(first, PromptScores)
        assert_close(list(first.scores), expected_scores(model, prompt, 1, 2))
        assert last == Finished("length", Usage(length, new_tokens))


def test_a_prompt_that_fills_the_context_can_still_be_scored(model, tokenizer):
    (prompt,) = prompts_of(CONFIG.max_position_embeddings)
    nothing = dataclasses.replace(GREEDY, max_new_tokens=0)
    scores, last = engine_of(model, tokenizer).stream(Request(prompt, nothing, top_logprobs=0, prompt_logprobs=True))
    assert len(scores.scores) == len(prompt) - 1 and last == Finished("length", Usage(len(prompt), 0))


def test_the_tokens_of_a_stop_text_have_no_scores(model, tokenizer):
    text = "la mar i el bosc"
    written = tokenizer.encode(text)

    class Scripted(TorchBackend):
        def extend(self, extensions):
            self.next = iter(written) if extensions[0].start == 0 else self.next
            return torch.nn.functional.one_hot(torch.tensor([next(self.next)]), 300).float()

    sampling = dataclasses.replace(GREEDY, stop=["el b"])
    events = list(Engine(Scripted(model, 1), tokenizer).stream(Request([20], sampling, NO_STOP, top_logprobs=0)))
    scored = [score.id for event in events if isinstance(event, TextDelta) for score in event.scores]
    assert text_of(events) == "la mar i "
    assert tokenizer.decode(scored).startswith("la mar i") and "el b" not in tokenizer.decode(scored)
    assert scored == written[: len(scored)]
