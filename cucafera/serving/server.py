"""The HTTP server: routes, keys and limits, streams, disconnects and metrics, in front of an engine in its thread.

The event loop never waits for the model: the engine's thread posts events to a `Mailbox`, and a response takes all that
have arrived. A client that disconnects has its requests cancelled, streaming or not.
"""

import asyncio
import base64
import contextlib
import functools
import hashlib
import hmac
import json
import logging
import math
import queue
import re
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cucafera.config.errors import UserError, one_line
from cucafera.config.schema import SamplingConfig
from cucafera.generation.engine_thread import EngineThread, RequestGroup, Ticket
from cucafera.generation.request import (
    ContextFullError,
    Finished,
    GenerationEvent,
    QueueFullError,
    StoppingError,
    WaitedTooLongError,
)
from cucafera.quantities import number_of
from cucafera.serving.collected import CollectedRows
from cucafera.serving.openai_api import Answer, ApiError, ApiRequest, Json, ServedModel, context_error, parse_body

Parsed = TypeVar("Parsed")

log = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page.html")
PUBLIC = ("/", "/health")
"""Paths that need no key: the page asks for it."""
BODY_SECONDS = 60
"""Longest time that a body may take to arrive."""
CHUNK_SECONDS = 0.04
"""Shortest time between two chunks of a stream: more of them would take the engine's time, and no reader notices."""
MAX_RETRY_SECONDS = 60
MAX_LOGGED_PATH = 100
HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^\[\]:]+?)\.?(:[0-9]*)?")
"""Value of a Host header: a name or address, and perhaps a port."""
NONE = "'none'"
CLIENT_GONE = 499
"""Status of a request whose client has disconnected, in the log and the metrics, as of nginx."""
SECURE_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}


@dataclass(frozen=True)
class Access:
    """Clients that are served.

    Attributes:
        keys: API keys, one of which a request must have; empty: none is needed.
        hosts: Host names that a request may be addressed to; None: any. Without them, a web page of another site could
            have its own name resolved to this machine, and read the answers (DNS rebinding).
        origins: Origins of web pages that may read answers (CORS).
        max_body: Bytes of the largest body.
    """

    keys: tuple[str, ...] = ()
    hosts: frozenset[str] | None = None
    origins: tuple[str, ...] = ()
    max_body: int = 2_000_000


class JsonResponse(Response):
    """A response with a JSON object, and characters as they are."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the object as UTF-8."""
        return encode(content)


def encode(content: Any) -> bytes:
    """Return an object as compact JSON in UTF-8."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def error_response(error: ApiError) -> Response:
    """Return the response of an error."""
    return JsonResponse(error.content(), error.status, SECURE_HEADERS | error.headers)


def api_error(error: UserError, retry_seconds: int) -> ApiError:
    """Return the error of the API for one of the engine."""
    retry = {"Retry-After": str(retry_seconds)}
    if isinstance(error, ContextFullError):
        return context_error(error.tokens, error.context)
    if isinstance(error, QueueFullError):
        return ApiError(429, "The queue of this server is full: try again later", "rate_limit_exceeded", headers=retry)
    if isinstance(error, StoppingError):
        return ApiError(503, "This server is stopping", "stopping")
    if isinstance(error, WaitedTooLongError):
        return ApiError(503, "The request waited too long for its turn: try again later", "timeout", headers=retry)
    log.error("A request failed: %s", error)
    return ApiError(500, "The model could not answer: its operator finds the reason in the log", "model_failed")


class ClientGoneError(Exception):
    """The client has disconnected."""


# From the engine's thread to the event loop


class Mailbox:
    """Hands events of the engine's thread to the event loop, with one wake-up for all that come while it is busy.

    Args:
        loop: The event loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._posts: deque[Callable[[], None]] = deque()
        self._is_scheduled = False

    def post(self, delivery: Callable[[], None]) -> None:
        """Let the event loop call `delivery` soon; from any thread."""
        self._posts.append(delivery)
        if not self._is_scheduled:  # appended before this is read, and reset before posts are taken: none is lost
            self._is_scheduled = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: no one waits any more
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_scheduled = False
        while self._posts:
            self._posts.popleft()()


Batch = list[tuple[int, Sequence[GenerationEvent]]]
"""Numbers of choices, and events of each."""


class RunningRequest:
    """The engine's requests for the choices of one API request.

    Args:
        engine: The engine.
        mailbox: Delivers its events.

    Attributes:
        first_event: Reading of time.monotonic at the first event; NaN before it.
    """

    def __init__(self, engine: EngineThread, mailbox: Mailbox) -> None:
        self._engine = engine
        self._mailbox = mailbox
        self._tickets: dict[int, Ticket] = {}
        self._batch: Batch = []
        self._error: Exception | None = None
        self._is_ready = asyncio.Event()
        self._has_failed = asyncio.Event()
        self.first_event = math.nan

    def start(self, request: ApiRequest) -> None:
        """Submit a request per choice. Raises UserError, and then none is left."""
        group = RequestGroup()
        for number, choice in enumerate(request.engine_requests(self._engine.context)):
            self._tickets[number] = self._engine.submit(choice, functools.partial(self._post, number), group)

    def _post(self, number: int, result: Sequence[GenerationEvent] | UserError) -> None:
        self._mailbox.post(functools.partial(self._receive, number, result))

    def _receive(self, number: int, result: Sequence[GenerationEvent] | UserError) -> None:
        if isinstance(result, UserError):
            self.fail(result)
            return
        if math.isnan(self.first_event):
            self.first_event = time.monotonic()
        self._batch.append((number, result))
        if result and isinstance(result[-1], Finished):
            self._tickets.pop(number, None)
        self._is_ready.set()

    def fail(self, error: Exception) -> None:
        """End `batches` with an error."""
        self._error = self._error or error
        self._is_ready.set()
        self._has_failed.set()

    async def pause(self, seconds: float) -> None:
        """Let events gather; ends early if `batches` has an error to raise."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._has_failed.wait()

    @property
    def is_finished(self) -> bool:
        """True if no event is to come."""
        return not self._tickets

    async def batches(self) -> AsyncIterator[Batch]:
        """Yield the events that have arrived since the last batch, until all choices are finished.

        Raises:
            UserError: the engine ended a request.
            ClientGoneError: the client has disconnected.
        """
        while self._tickets or self._batch:
            await self._is_ready.wait()
            self._is_ready.clear()
            if self._error is not None:
                raise self._error
            batch, self._batch = self._batch, []
            yield batch

    def cancel(self) -> None:
        """Cancel what is unfinished."""
        for ticket in self._tickets.values():
            self._engine.cancel(ticket)
        self._tickets = {}


# Responses that the engine generates


class GeneratedResponse(Response):
    """The answer to an API request: one JSON object, or a stream of server-sent events.

    A stream begins with its first event, so that an error before it has its own status.

    Args:
        service: The server.
        request: The request.
    """

    def __init__(self, service: "Service", request: ApiRequest) -> None:
        self.background = None
        self._service = service
        self._request = request
        self._answer = Answer(request, service.model.tokenizer)
        self._generation = RunningRequest(service.engine, service.mailbox())
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Generate, and send; cancel what is unfinished if the client disconnects."""
        generation = self._generation
        watcher = asyncio.ensure_future(_watch(receive, generation))
        began = time.monotonic()
        try:
            generation.start(self._request)
            await (self._stream(send) if self._request.stream else self._complete(scope, receive, send))
            scope["usage"] = self._answer.usage()
            self._service.record_answer(time.monotonic() - began, generation.first_event - began)
        except ClientGoneError:
            scope["status"] = CLIENT_GONE
        except UserError as error:
            await self._send_error(api_error(error, self._service.retry_seconds()), scope, receive, send)
        finally:
            generation.cancel()
            watcher.cancel()
            self._service.log_texts(self._request, self._answer)

    async def _complete(self, scope: Scope, receive: Receive, send: Send) -> None:
        events: list[list[GenerationEvent]] = [[] for _ in self._answer.choices]
        async for batch in self._generation.batches():
            for number, new in batch:
                events[number] += new
        response = JsonResponse(self._answer.complete(events), headers=SECURE_HEADERS)
        await response(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        async for batch in self._generation.batches():
            began = time.monotonic()
            chunks = list(self._answer.opening()) if not self._has_begun else []
            for number, events in merged(batch).items():
                chunks += self._answer.chunks(number, events)
            await self._begin(send)
            await _send_events(send, map(encode, chunks))
            if not self._generation.is_finished:
                await self._generation.pause(CHUNK_SECONDS - (time.monotonic() - began))
        await _send_events(send, [*map(encode, self._answer.closing()), b"[DONE]"], is_last=True)

    async def _begin(self, send: Send) -> None:
        if not self._has_begun:
            self._has_begun = True
            headers = {"Content-Type": "text/event-stream; charset=utf-8", **SECURE_HEADERS}
            raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
            await send({"type": "http.response.start", "status": 200, "headers": raw})

    async def _send_error(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        if self._has_begun:  # the status has been sent
            await _send_events(send, [encode(error.content())], is_last=True)
        else:
            await error_response(error)(scope, receive, send)


async def _watch(receive: Receive, generation: RunningRequest) -> None:
    """Wait until the client disconnects, and end the generation then."""
    while (await receive())["type"] != "http.disconnect":
        pass
    generation.fail(ClientGoneError())


async def _send_events(send: Send, contents: Iterable[bytes], is_last: bool = False) -> None:
    body = b"".join(b"data: " + content + b"\n\n" for content in contents)
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": not is_last})


def merged(batch: Batch) -> dict[int, list[GenerationEvent]]:
    """Return the events of each choice."""
    events: dict[int, list[GenerationEvent]] = {}
    for number, new in batch:
        events.setdefault(number, []).extend(new)
    return events


# The routes


class Worker:
    """One thread that calls functions in turn, and that the end of the program does not wait for.

    One, since rows are written one after another, and the event loop needs the rest of the machine.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="worker", daemon=True).start()

    def submit(self, function: Callable[[], Parsed]) -> Future[Parsed]:
        """Call a function soon; returns its future result."""
        future: Future[Parsed] = Future()

        def call() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:  # belongs to who waits for the result
                    future.set_exception(error)

        self._calls.put(call)
        return future

    def _run(self) -> None:
        while True:
            self._calls.get()()


class Service:
    """The routes of a server, and its metrics.

    Args:
        engine: The engine.
        model: The model that it runs.
        access: Clients that are served.
        page_sampling: Sampling that the page begins with.
        collected: Where the page's preferences and ratings are written; None: nowhere.
        logs_texts: Write prompts and answers into the log.

    Attributes:
        is_stopping: True once the server refuses new requests, for /health.
        active: Number of requests that are being answered.
    """

    def __init__(
        self,
        engine: EngineThread,
        model: ServedModel,
        access: Access,
        page_sampling: SamplingConfig,
        collected: CollectedRows | None = None,
        logs_texts: bool = False,
    ) -> None:
        self.engine = engine
        self.model = model
        self.access = access
        self.is_stopping = False
        self.active = 0
        self._page_sampling = page_sampling
        self._collected = collected
        self._logs_texts = logs_texts
        self._responses: Counter[tuple[str, int]] = Counter()
        self._answered = 0
        self._seconds = 0.0
        self._first_token_seconds = 0.0
        self._mailbox: Mailbox | None = None
        self._worker = Worker()
        self._page = PAGE.read_text(encoding="utf-8")

    def app(self) -> ASGIApp:
        """Return the ASGI application."""
        app: ASGIApp = Starlette(
            routes=[
                Route("/", self.page),
                Route("/health", self.health),
                Route("/metrics", self.metrics),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.one_model),
                Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/page/settings", self.page_settings),
                Route("/page/preference", self.preference, methods=["POST"]),
                Route("/page/rating", self.rating, methods=["POST"]),
            ],
            exception_handlers={
                ApiError: _on_api_error,
                HTTPException: _on_http_exception,
                ClientDisconnect: _on_disconnect,
                Exception: _on_bug,
            },
        )
        app.router.redirect_slashes = False  # type: ignore[attr-defined]
        app = Gate(app, self.access)
        if self.access.origins:
            app = CORSMiddleware(
                app, self.access.origins, ["GET", "POST"], ["*"], expose_headers=["Retry-After"], max_age=600
            )
        return RequestLog(app, self)

    def mailbox(self) -> Mailbox:
        """Return the mailbox of the running event loop."""
        if self._mailbox is None:
            self._mailbox = Mailbox(asyncio.get_running_loop())
        return self._mailbox

    async def page(self, request: Request) -> Response:
        """GET /: the page."""
        return HTMLResponse(
            self._page, headers=SECURE_HEADERS | {"Content-Security-Policy": content_security_policy(self._page)}
        )

    async def health(self, request: Request) -> Response:
        """GET /health: 503 while the server stops, so that no new request is sent here."""
        status, code = ("stopping", 503) if self.is_stopping else ("ok", 200)
        return JsonResponse({"status": status}, code, SECURE_HEADERS)

    async def models(self, request: Request) -> Response:
        """GET /v1/models: the one model."""
        return JsonResponse({"object": "list", "data": [self.model.content()]}, headers=SECURE_HEADERS)

    async def one_model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        self.model.check_name(request.path_params["name"])
        return JsonResponse(self.model.content(), headers=SECURE_HEADERS)

    async def chat_completions(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return GeneratedResponse(self, await self._parsed(request, self.model.parse_chat))

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return GeneratedResponse(self, await self._parsed(request, self.model.parse_completion))

    async def page_settings(self, request: Request) -> Response:
        """GET /page/settings: what the page begins with."""
        sampling = vars(self._page_sampling).copy()
        del sampling["stop"]
        content = {
            "model": self.model.name,
            "chats": self.model.chats,
            "context": self.model.context,
            "collects": self._collected is not None,
            "system": self.model.system,
            "sampling": {"max_tokens": sampling.pop("max_new_tokens"), **sampling},
        }
        return JsonResponse(content, headers=SECURE_HEADERS)

    async def preference(self, request: Request) -> Response:
        """POST /page/preference: write which of two answers is better."""
        await self._parsed(request, self._writer().write_preference)
        return Response(status_code=204)

    async def rating(self, request: Request) -> Response:
        """POST /page/rating: write a rating of a conversation."""
        await self._parsed(request, self._writer().write_rating)
        return Response(status_code=204)

    def _writer(self) -> CollectedRows:
        if self._collected is None:
            raise ApiError(404, "This server collects no answers: it was started without --collect", "not_collecting")
        return self._collected

    async def _parsed(self, request: Request, parse: Callable[[Json], Parsed]) -> Parsed:
        """Read a body, and parse it in the worker thread. Raises ApiError."""
        body = await read_body(request, self.access.max_body)
        return await asyncio.wrap_future(self._worker.submit(lambda: parse(parse_body(body))))

    # Metrics and log

    async def metrics(self, request: Request) -> Response:
        """GET /metrics: gauges and counters in Prometheus's text format."""
        return PlainTextResponse(self._metrics(), headers=SECURE_HEADERS, media_type="text/plain; version=0.0.4")

    def _metrics(self) -> str:
        load = self.engine.load()
        samples = [
            ("requests_running", "gauge", "Choices that are being generated.", load.running),
            ("requests_waiting", "gauge", "Choices that wait for a slot.", load.waiting),
            ("slots", "gauge", "Choices that can be generated at once.", load.slots),
            ("requests_finished_total", "counter", "Choices that were finished.", load.finished),
            ("requests_cancelled_total", "counter", "Choices that clients cancelled.", load.cancelled),
            ("requests_failed_total", "counter", "Choices that ended with an error.", load.failed),
            ("prompt_tokens_total", "counter", "Tokens of prompts.", load.prompt_tokens),
            ("cached_tokens_total", "counter", "Tokens of prompts that were in the KV cache.", load.cached_tokens),
            ("completion_tokens_total", "counter", "Tokens generated.", load.completion_tokens),
            ("answers_total", "counter", "Requests that were answered.", self._answered),
            ("answer_seconds_total", "counter", "Time that the answers took.", round(self._seconds, 6)),
            ("first_token_seconds_total", "counter", "Time to their first token.", round(self._first_token_seconds, 6)),
        ]
        lines = []
        for name, kind, meaning, value in samples:
            name = f"cucafera_{name}"
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}", f"{name} {value}"]
        name = "cucafera_http_responses_total"
        lines += [f"# HELP {name} Responses by path and status.", f"# TYPE {name} counter"]
        lines += [
            f'{name}{{path="{path}",status="{status}"}} {count}'
            for (path, status), count in sorted(self._responses.items())
        ]
        return "\n".join(lines) + "\n"

    def retry_seconds(self) -> int:
        """Return after how many seconds a place in the queue should be free: the mean time of an answer per slot."""
        seconds = self._seconds / max(self._answered, 1) / self.engine.slots
        return max(1, min(math.ceil(seconds), MAX_RETRY_SECONDS))

    def record_answer(self, seconds: float, first_token_seconds: float) -> None:
        """Count an answer, and the time that it took."""
        self._answered += 1
        self._seconds += seconds
        self._first_token_seconds += first_token_seconds

    def record_response(self, scope: Scope, seconds: float) -> None:
        """Count a response, and write a line without texts into the log."""
        status = scope["status"]
        route = scope.get("route")
        self._responses[route.path if isinstance(route, Route) else "other", status] += 1
        client = scope["client"][0] if scope.get("client") else "-"
        path = one_line(scope["path"])[:MAX_LOGGED_PATH]
        usage = scope.get("usage")
        tokens = ""
        if usage is not None:
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            generated = usage["completion_tokens"]
            tokens = f", prompt {usage['prompt_tokens']:,} ({cached:,} cached), generated {generated:,}"
        log.info("%s %s %s %d %.3f s%s", client, scope["method"], path, status, seconds, tokens)

    def log_texts(self, request: ApiRequest, answer: Answer) -> None:
        """Write prompts and answers into the log, if the operator asked for it."""
        if self._logs_texts:
            for choice in answer.choices:
                texts = (self.model.tokenizer.decode(choice.prompt.ids), choice.text)
                log.info("%s[%d] %s -> %s", answer.id, choice.number, *(encode(text).decode() for text in texts))


def content_security_policy(page: str) -> str:
    """Return the policy under which a page runs its own scripts and styles, talks to this server, and nothing else."""
    hashes = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
            for content in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        )
        for tag in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {hashes['script'] or NONE}; style-src {hashes['style'] or NONE}; "
        "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    )


async def read_body(request: Request, limit: int) -> bytes:
    """Return the body of a request.

    Raises:
        ApiError: it is not JSON, too large, or does not arrive.
        ClientDisconnect: the client has gone.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" or request.headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, "The body must be JSON, not compressed, with Content-Type: application/json")
    length = request.headers.get("content-length", "0")
    too_large = ApiError(413, f"The body has more than the {number_of(limit, 'byte')} that this server reads")
    if length.isdecimal() and int(length[:20]) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise too_large
    except TimeoutError as error:
        raise ApiError(408, f"The body did not arrive within {BODY_SECONDS} s") from error
    return bytes(body)


# What surrounds the routes


class Gate:
    """Refuses requests to another host name, and those without a key.

    Args:
        app: The application.
        access: Clients that are served.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._hosts = access.hosts
        self._digests = [_digest(key.encode()) for key in access.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        error = self._refusal(scope["path"], Headers(scope=scope)) if scope["type"] == "http" else None
        await (error_response(error) if error else self._app)(scope, receive, send)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        if self._hosts is not None and host_name(headers.get("host", "")) not in self._hosts:
            return ApiError(403, "This server answers only requests to the host that it listens on", "host_not_allowed")
        if not self._digests or path in PUBLIC:
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._is_known(key.strip()):
            return None
        given = "The API key is not known" if key else "The API key is missing"
        message = f"{given}: send it in the header Authorization: Bearer KEY"
        return ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _is_known(self, key: str) -> bool:
        """Compare with all keys, in a time that does not depend on where a key differs."""
        digest = _digest(key.encode("latin-1"))
        return sum([hmac.compare_digest(digest, known) for known in self._digests]) > 0


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def host_name(host: str) -> str:
    """Return the name in a Host header, without its port; empty if it is none."""
    match = HOST.fullmatch(host.strip().lower())
    return match["name"] if match else ""


class RequestLog:
    """Counts and logs every request.

    Args:
        app: The application.
        service: Its routes.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, and record it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        scope["status"] = 500

        async def send_and_record(message: Message) -> None:
            if message["type"] == "http.response.start":
                scope["status"] = message["status"]
            await send(message)

        self._service.active += 1
        try:
            await self._app(scope, receive, send_and_record)
        except asyncio.CancelledError:  # only by the end of the server, which has closed the connection before
            scope["status"] = CLIENT_GONE
        finally:
            self._service.active -= 1
            self._service.record_response(scope, time.monotonic() - began)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Return an unknown path or a wrong method in OpenAI's format."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        message = f"{request.method} is not allowed here; allowed: {headers.get('Allow', headers.get('allow', ''))}"
        return error_response(ApiError(405, message, "method_not_allowed", headers=headers))
    message = "There is no such address on this server; those of the API begin with /v1/"
    return error_response(ApiError(error.status_code, message, "unknown_url", headers=headers))


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)  # no one reads it


async def _on_bug(request: Request, error: Exception) -> Response:
    return error_response(ApiError(500, "The server failed: its operator finds the reason in the log"))
