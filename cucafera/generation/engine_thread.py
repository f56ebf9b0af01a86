"""An engine in a thread of its own, for programs that answer several people: a server, a bot."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

from cucafera.config.errors import UserError
from cucafera.generation.engine import Engine, Generation
from cucafera.generation.request import (
    EngineFailedError,
    Finished,
    GenerationEvent,
    QueueFullError,
    Request,
    StoppingError,
    WaitedTooLongError,
)
from cucafera.quantities import number_of

logger = logging.getLogger(__name__)

OnEvents = Callable[[Sequence[GenerationEvent] | UserError], None]


@dataclass
class RequestGroup:
    """Requests that belong together, such as the choices of one request of a client.

    Attributes:
        has_begun: True once one of them has got a slot. From then on the others wait for each other, without a limit.
    """

    has_begun: bool = False


@dataclass(eq=False)
class Ticket:
    """A request that was submitted.

    Attributes:
        request: The request.
        on_events: Called with its events.
        group: What it belongs to.
        submitted: When, by the monotonic clock, in seconds.
        generation: Its state in the engine; None before the engine has seen it.
        is_ended: True once no event follows.
    """

    request: Request
    on_events: OnEvents
    group: RequestGroup
    submitted: float = field(default_factory=time.monotonic)
    generation: Generation | None = None
    is_ended: bool = False


@dataclass
class EngineLoad:
    """Requests and tokens of an engine, at one moment.

    Attributes:
        slots: Requests that are answered at a time.
        running: Requests that are being answered.
        waiting: Requests that wait for a slot.
        finished, cancelled, failed: Requests that ended so.
        prompt_tokens, cached_tokens, completion_tokens: Tokens of the finished requests; see `Usage`.
    """

    slots: int
    running: int = 0
    waiting: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class EngineThread:
    """Runs an engine in a thread while there are requests, which may come from any thread.

    Args:
        engine: The engine, which nothing else may use.
        queue_limit: Requests that may wait for a slot.
        timeout: Seconds that a request may wait for a slot; None: no limit.
    """

    def __init__(self, engine: Engine, queue_limit: int = 64, timeout: float | None = None) -> None:
        self.tokenizer = engine.tokenizer
        self.context = engine.context
        self.vocab_size = engine.vocab_size
        self.slots = engine.slots
        self._engine = engine
        self._queue_limit = queue_limit
        self._timeout = timeout
        self._load = EngineLoad(engine.slots)
        self._tickets: list[Ticket] = []
        """Unfinished requests, in the order in which they came."""
        self._is_stopping = False
        self._is_closed = False
        self._changed = threading.Condition()
        """Guards all of the above, and wakes the thread and those who wait for its end."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_events: OnEvents, group: RequestGroup | None = None) -> Ticket:
        """Queue a request.

        Args:
            request: The request.
            on_events: Called in the engine's thread with the events of each step, of which the last is `Finished`; or
                with an error that ends the request. It must not wait for anything.
            group: What it belongs to; None: it is alone.

        Raises:
            ContextFullError: the prompt fills the context.
            QueueFullError: too many requests wait.
            StoppingError: the engine is stopping.
            ValueError: see `Engine.add`.
        """
        self._engine.check(request)
        ticket = Ticket(request, on_events, group or RequestGroup())
        with self._changed:
            if self._is_stopping:
                raise StoppingError("the model is stopping, and takes no new requests")
            waiting = self._unfinished() - self.slots
            if waiting >= self._queue_limit:
                raise QueueFullError(f"the model is busy: {number_of(max(waiting, 0), 'request')} wait already")
            self._tickets.append(ticket)
            self._changed.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request: its slot is free before the next step, and no event follows. Again, it does nothing."""
        with self._changed:
            if not ticket.is_ended:
                ticket.is_ended = True
                self._load.cancelled += 1
                self._changed.notify_all()

    def stream(self, request: Request) -> Iterator[GenerationEvent]:
        """Answer a request: its events; closing the iterator cancels it. Raises what `submit` raises, and its error."""
        received: queue.SimpleQueue[Sequence[GenerationEvent] | UserError] = queue.SimpleQueue()
        ticket = self.submit(request, received.put)
        try:
            while True:
                events = received.get()
                if isinstance(events, UserError):
                    raise events
                yield from events
                if isinstance(events[-1], Finished):
                    return
        finally:
            self.cancel(ticket)

    def load(self) -> EngineLoad:
        """Return what the engine does and has done, at this moment."""
        with self._changed:
            unfinished = self._unfinished()
            running = min(unfinished, self.slots)
            return EngineLoad(**vars(self._load) | {"running": running, "waiting": unfinished - running})

    def drain(self, seconds: float) -> bool:
        """Refuse new requests, and wait for the others.

        Args:
            seconds: After this time, those that are left end with a StoppingError.

        Returns:
            True if all could finish.
        """
        with self._changed:
            self._is_stopping = True
            is_done = self._changed.wait_for(lambda: not self._unfinished(), seconds)
            for ticket in self._tickets:
                self._end(ticket, StoppingError("the model was stopped before the end of the answer"))
            self._changed.notify_all()
        return is_done

    def close(self) -> None:
        """End all requests, and the thread."""
        self.drain(0)
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tickets or self._is_closed)
                if self._is_closed:
                    return
                self._sort_tickets()
                has_work = bool(self._tickets)
            if has_work:
                self._step()

    def _unfinished(self) -> int:
        return sum(not ticket.is_ended for ticket in self._tickets)

    def _sort_tickets(self) -> None:
        """Take requests out that have ended or waited too long, and give new ones to the engine."""
        now = time.monotonic()
        for ticket in self._tickets:
            if ticket.generation is not None and ticket.generation.has_begun:
                ticket.group.has_begun = True
            elif self._timeout is not None and now - ticket.submitted > self._timeout and not ticket.group.has_begun:
                self._end(ticket, WaitedTooLongError(f"no answer could begin within {self._timeout:g} s"))
            if ticket.is_ended and ticket.generation is not None:
                self._engine.cancel(ticket.generation)
            elif not ticket.is_ended and ticket.generation is None:
                ticket.generation = self._engine.add(ticket.request)
        if any(ticket.is_ended for ticket in self._tickets):
            self._tickets = [ticket for ticket in self._tickets if not ticket.is_ended]
            self._changed.notify_all()

    def _step(self) -> None:
        failure = None
        try:
            self._engine.step()
        except Exception as error:  # out of memory, a fault of a driver: the next requests may still be answered
            logger.exception("the model failed")
            self._engine.forget()
            failure = EngineFailedError(f"the model failed: {type(error).__name__}")
        with self._changed:
            for ticket in self._tickets:
                if not ticket.is_ended and ticket.generation is not None:
                    self._report(ticket, ticket.generation, failure)

    def _report(self, ticket: Ticket, generation: Generation, failure: UserError | None) -> None:
        if error := failure or generation.error:
            self._end(ticket, error)
        elif generation.events:
            events = list(generation.events)
            generation.events.clear()
            if isinstance(events[-1], Finished):
                ticket.is_ended = True
                usage = events[-1].usage
                self._load.finished += 1
                self._load.prompt_tokens += usage.prompt_tokens
                self._load.cached_tokens += usage.cached_tokens
                self._load.completion_tokens += usage.completion_tokens
            self._call(ticket, events)

    def _end(self, ticket: Ticket, error: UserError) -> None:
        if not ticket.is_ended:
            ticket.is_ended = True
            self._load.failed += 1
            self._call(ticket, error)

    def _call(self, ticket: Ticket, events: Sequence[GenerationEvent] | UserError) -> None:
        try:
            ticket.on_events(events)
        except Exception:  # such as an event loop that was closed: the other requests continue
            logger.exception("the receiver of an answer failed")
