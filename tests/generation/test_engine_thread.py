"""An engine in a thread: many callers at once, the queue and its limits, cancellation, and the end."""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from cucafera.config.errors import UserError
from cucafera.generation.backend import TorchBackend
from cucafera.generation.engine import Engine
from cucafera.generation.engine_thread import EngineThread, RequestGroup
from cucafera.generation.request import (
    ContextFullError,
    EngineFailedError,
    Finished,
    QueueFullError,
    Request,
    StoppingError,
    WaitedTooLongError,
)
from tests.generation.models import GREEDY, NO_STOP, prompts_of

SECONDS = 30
"""A test that waits longer has failed."""


class Stepwise(TorchBackend):
    """A backend that computes only while it is let."""

    def __init__(self, model, slots):
        super().__init__(model, slots)
        self.permits = threading.Semaphore(0)
        self.is_computing = threading.Event()
        self.is_free = False

    def extend(self, extensions):
        self.is_computing.set()
        if not self.is_free:
            assert self.permits.acquire(timeout=SECONDS)
        return super().extend(extensions)

    def let_go(self):
        self.is_free = True
        self.permits.release(1000)


class Inbox:
    """Receives what a request is answered with."""

    def __init__(self):
        self.received = []

    def __call__(self, events):
        self.received += [events] if isinstance(events, UserError) else events

    @property
    def is_finished(self) -> bool:
        return bool(self.received) and isinstance(self.received[-1], Finished | UserError)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def requests_of(count: int) -> list[Request]:
    return [Request(prompt, GREEDY, NO_STOP) for prompt in prompts_of(*range(4, 4 + count))]


@pytest.fixture
def backend(model) -> Iterator[Stepwise]:
    backend = Stepwise(model, 2)
    yield backend
    backend.let_go()


def test_requests_of_many_threads_get_the_events_that_each_gets_alone(model, tokenizer):
    requests = requests_of(12)
    alone = [list(Engine(TorchBackend(model), tokenizer).stream(request)) for request in requests]
    answers: dict[int, list] = {}
    with EngineThread(Engine(TorchBackend(model, 4), tokenizer), queue_limit=12) as engine:
        threads = [
            threading.Thread(target=lambda n=n: answers.update({n: list(engine.stream(requests[n]))}))
            for n in range(12)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        load = engine.load()
    texts = [[getattr(event, "text", event.__class__) for event in answers[number]] for number in range(12)]
    assert texts == [[getattr(event, "text", event.__class__) for event in events] for events in alone]
    assert (load.finished, load.running, load.waiting, load.completion_tokens) == (12, 0, 0, 12 * 20)
    assert load.prompt_tokens == sum(len(request.prompt) for request in requests)


def test_a_cancelled_request_frees_its_slot_before_the_next_step(backend, tokenizer):
    inboxes = [Inbox() for _ in range(3)]
    with EngineThread(Engine(backend, tokenizer)) as engine:
        tickets = [engine.submit(request, inbox) for request, inbox in zip(requests_of(3), inboxes, strict=True)]
        until(lambda: engine.load().running == 2)
        backend.permits.release(1)
        until(lambda: bool(inboxes[0].received))
        engine.cancel(tickets[0])
        engine.cancel(tickets[0])
        received = len(inboxes[0].received)
        backend.permits.release(6)  # fewer steps than the other needs to its end
        until(lambda: bool(inboxes[2].received))
        assert not inboxes[1].is_finished
        backend.let_go()
        until(lambda: inboxes[1].is_finished and inboxes[2].is_finished)
        assert len(inboxes[0].received) == received
        assert (engine.load().finished, engine.load().cancelled) == (2, 1)
        engine.cancel(tickets[1])  # after its end
        assert engine.load().cancelled == 1


def test_a_closed_stream_cancels_its_request(backend, tokenizer):
    with EngineThread(Engine(backend, tokenizer)) as engine:
        events = engine.stream(requests_of(1)[0])
        backend.permits.release(1)
        next(events)
        events.close()
        assert engine.load().cancelled == 1 and engine.load().running == 0
        backend.let_go()


def test_a_full_queue_refuses_and_takes_again(backend, tokenizer):
    first, *others = requests_of(5)
    with EngineThread(Engine(backend, tokenizer), queue_limit=1) as engine:
        inboxes = [Inbox() for _ in range(3)]
        for request, inbox in zip(others, inboxes, strict=False):
            engine.submit(request, inbox)
        with pytest.raises(QueueFullError, match="the model is busy: 1 request"):
            engine.submit(first, Inbox())
        backend.let_go()
        until(lambda: all(inbox.is_finished for inbox in inboxes))
        assert list(engine.stream(first))


def test_a_queue_of_none_still_takes_what_a_slot_is_free_for(model, tokenizer):
    with EngineThread(Engine(TorchBackend(model, 2), tokenizer), queue_limit=0) as engine:
        assert isinstance(list(engine.stream(requests_of(1)[0]))[-1], Finished)


def test_a_request_that_waits_too_long_ends_with_an_error(backend, tokenizer):
    inboxes = [Inbox() for _ in range(3)]
    with EngineThread(Engine(backend, tokenizer), timeout=0.2) as engine:
        for request, inbox in zip(requests_of(3), inboxes, strict=True):
            engine.submit(request, inbox)
        time.sleep(0.3)
        backend.let_go()
        until(lambda: all(inbox.is_finished for inbox in inboxes))
    assert isinstance(inboxes[2].received[0], WaitedTooLongError)
    assert "no answer could begin within 0.2 s" in str(inboxes[2].received[0])
    assert isinstance(inboxes[0].received[-1], Finished)


def test_requests_of_a_group_wait_for_each_other_without_a_limit(backend, tokenizer):
    group, inboxes = RequestGroup(), [Inbox() for _ in range(4)]
    with EngineThread(Engine(backend, tokenizer), timeout=0.2) as engine:
        for request, inbox in zip(requests_of(4), inboxes, strict=True):
            engine.submit(request, inbox, group)
        backend.permits.release(1)
        until(lambda: bool(inboxes[0].received))
        time.sleep(0.3)
        backend.let_go()
        until(lambda: all(inbox.is_finished for inbox in inboxes))
    assert all(isinstance(inbox.received[-1], Finished) for inbox in inboxes)


def test_a_cancelled_request_leaves_its_place_in_the_queue_at_once(backend, tokenizer):
    with EngineThread(Engine(backend, tokenizer), queue_limit=0) as engine:
        tickets = [engine.submit(request, Inbox()) for request in requests_of(2)]
        assert backend.is_computing.wait(SECONDS)
        engine.cancel(tickets[0])
        engine.submit(requests_of(1)[0], Inbox())
        backend.let_go()


def test_draining_what_has_ended_takes_no_time(backend, tokenizer):
    engine = EngineThread(Engine(backend, tokenizer))
    engine.submit(requests_of(1)[0], Inbox())
    backend.let_go()
    engine.close()
    started = time.monotonic()
    assert engine.drain(SECONDS) and time.monotonic() - started < SECONDS / 2


def test_impossible_requests_are_refused_at_once(model, tokenizer):
    with EngineThread(Engine(TorchBackend(model), tokenizer)) as engine:
        with pytest.raises(ContextFullError):
            engine.submit(Request(prompts_of(48)[0], GREEDY), Inbox())
        with pytest.raises(ValueError, match="at least one token"):
            next(engine.stream(Request([], GREEDY)))


def test_draining_ends_what_runs_and_refuses_what_comes(backend, tokenizer):
    inboxes = [Inbox() for _ in range(3)]
    with EngineThread(Engine(backend, tokenizer)) as engine:
        for request, inbox in zip(requests_of(3), inboxes, strict=True):
            engine.submit(request, inbox)
        until(lambda: engine.load().running == 2)
        results: list[bool] = []
        drainer = threading.Thread(target=lambda: results.append(engine.drain(SECONDS)))
        drainer.start()

        def is_refused() -> bool:
            try:
                engine.cancel(engine.submit(requests_of(1)[0], Inbox()))
            except StoppingError:
                return True
            return False

        until(is_refused)
        backend.let_go()
        drainer.join(SECONDS)
    assert results == [True]
    assert all(isinstance(inbox.received[-1], Finished) for inbox in inboxes)


def test_what_does_not_end_in_time_is_cut_off_with_an_error(backend, tokenizer):
    inbox = Inbox()
    with EngineThread(Engine(backend, tokenizer)) as engine:
        engine.submit(requests_of(1)[0], inbox)
        assert not engine.drain(0.05)
        assert isinstance(inbox.received[-1], StoppingError)
        backend.let_go()
    with pytest.raises(StoppingError, match="takes no new requests"):
        engine.submit(requests_of(1)[0], Inbox())


def test_a_fault_ends_the_requests_and_not_the_engine(model, tokenizer, caplog):
    class Faulty(TorchBackend):
        is_broken = True

        def extend(self, extensions):
            if self.is_broken:
                raise RuntimeError("out of memory at /secret/path")
            return super().extend(extensions)

    backend = Faulty(model, 2)
    request = requests_of(1)[0]
    with EngineThread(Engine(backend, tokenizer)) as engine:
        with pytest.raises(EngineFailedError, match=r"^the model failed: RuntimeError$"):
            list(engine.stream(request))
        backend.is_broken = False
        assert isinstance(list(engine.stream(request))[-1], Finished)
        assert engine.load().failed == 1


def test_a_receiver_that_fails_disturbs_no_other(model, tokenizer, caplog):
    def failing(events):
        raise RuntimeError("the loop is closed")

    with EngineThread(Engine(TorchBackend(model, 2), tokenizer)) as engine:
        first, second = requests_of(2)
        engine.submit(first, failing)
        longer = dataclasses.replace(second, sampling=dataclasses.replace(GREEDY, max_new_tokens=30))
        assert isinstance(list(engine.stream(longer))[-1], Finished)
    assert "the receiver of an answer failed" in caplog.text
