"""Batched answers: their order, their seeds, and slots that are never idle."""

from collections import deque
from types import SimpleNamespace

import pytest

from cucafera.config.schema import SamplingConfig
from cucafera.data.chatml import Message, render_prompt
from cucafera.data.tokenizer import Tokenizer
from cucafera.generation.request import NonfiniteError, Request
from cucafera.pairs.answers import OwnAnswer, answer_prompts, answer_seed
from cucafera.pairs.prompts import prompt_of

SAMPLING = SamplingConfig(max_new_tokens=16)


class FakeEngine:
    """Answers a request with its seed after a number of steps; the longer the prompt, the more."""

    def __init__(self, tokenizer: Tokenizer, slots: int, context: int = 64) -> None:
        self.tokenizer, self.slots, self.context = tokenizer, slots, context
        self.waiting: deque[SimpleNamespace] = deque()
        self.running: list[SimpleNamespace] = []
        self.added: list[Request] = []
        self.busy: list[int] = []

    def add(self, request: Request) -> SimpleNamespace:
        self.added.append(request)
        answer = SimpleNamespace(steps=len(request.prompt), is_ended=False, error=None)
        answer.text, answer.finish_reason = f" {request.seed}\n", "stop"
        self.waiting.append(answer)
        return answer

    def step(self) -> None:
        while self.waiting and len(self.running) < self.slots:
            self.running.append(self.waiting.popleft())
        self.busy.append(len(self.running))
        for answer in self.running:
            answer.steps -= 1
            answer.is_ended = answer.steps == 0
        self.running = [answer for answer in self.running if not answer.is_ended]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["la mar i el bosc, l'avi cantava " * 5] * 20, vocab_size=300)


def prompts_of(*lengths: int) -> list:
    return [prompt_of([Message("user", "x" * length)]) for length in lengths]


def test_answers_come_in_the_order_of_the_prompts_while_all_slots_are_busy(tokenizer):
    engine, prompts = FakeEngine(tokenizer, slots=4), prompts_of(30, 1, 9, 2, 8, 3, 7, 4)
    answered = list(answer_prompts(engine, prompts, 3, SAMPLING, 5))
    assert [item.prompt for item in answered] == prompts
    for item in answered:
        assert item.answers == [OwnAnswer(str(answer_seed(5, item.prompt, number)), "stop") for number in range(3)]
    assert set(engine.busy[: engine.busy.index(3)]) == {4}
    assert sorted(engine.busy, reverse=True) == engine.busy
    assert len({request.seed for request in engine.added}) == 3 * len(prompts)
    assert all(0 <= request.seed < 1 << 63 for request in engine.added)


def test_a_prompt_has_no_answer_if_it_leaves_no_room_for_one(tokenizer):
    frame = len(render_prompt([Message("user", "x")], tokenizer)) - 1
    limit = 64 - 16 - frame
    answered = list(answer_prompts(FakeEngine(tokenizer, 2), prompts_of(limit, limit + 1, 3), 2, SAMPLING, 0))
    assert [len(item.answers) for item in answered] == [2, 0, 2]
    long = SamplingConfig(max_new_tokens=1000)  # of which at most a quarter of the context is kept free
    answered = list(answer_prompts(FakeEngine(tokenizer, 2), prompts_of(limit, limit + 1), 2, long, 0))
    assert [len(item.answers) for item in answered] == [2, 0]


def test_prompts_are_read_as_they_are_needed(tokenizer):
    read = []

    def prompts():
        for prompt in prompts_of(*[5] * 50):
            read.append(prompt)
            yield prompt

    answered = answer_prompts(FakeEngine(tokenizer, 4), prompts(), 2, SAMPLING, 0)
    next(answered)
    assert len(read) <= 5


def test_an_error_of_the_model_ends_the_command(tokenizer):
    engine = FakeEngine(tokenizer, 2)
    add = engine.add

    def broken(request: Request) -> SimpleNamespace:
        answer = add(request)
        answer.error = NonfiniteError("the model computes values that are not finite")
        return answer

    engine.add = broken
    with pytest.raises(NonfiniteError):
        list(answer_prompts(engine, prompts_of(3), 2, SAMPLING, 0))
