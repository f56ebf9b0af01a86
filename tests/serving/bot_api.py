"""A local fake of Telegram's Bot API: the methods that the bot calls, and failures on demand."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from aiohttp import web

TOKEN = "4242:AAE-secret_secret-secret"
BOT = {"id": 4242, "is_bot": True, "first_name": "Cucafera", "username": "cucafera_bot"}

Failure = Callable[[web.Request], Awaitable[web.StreamResponse]]


def limited(seconds: int | None) -> Failure:
    """Answer that the rate limit is exceeded; None: without saying for how long."""

    async def respond(request: web.Request) -> web.StreamResponse:
        if seconds is None:
            return refusal(429, "Too Many Requests")
        return refusal(429, f"Too Many Requests: retry after {seconds}", parameters={"retry_after": seconds})

    return respond


def refused(code: int, description: str, **more: Any) -> Failure:
    async def respond(request: web.Request) -> web.StreamResponse:
        return refusal(code, description, **more)

    return respond


async def refused_with_url(request: web.Request) -> web.StreamResponse:
    """Refuse a request with a description that contains its URL, and so the token."""
    return refusal(400, f"Bad Request: {request.url}")


async def redirected(request: web.Request) -> web.StreamResponse:
    """Redirect to the same URL, which has no end."""
    return web.Response(status=302, headers={"Location": str(request.url)})


async def bad_gateway(request: web.Request) -> web.StreamResponse:
    """Answer as a proxy does while Telegram is down."""
    return web.Response(status=502, text="<html><h1>502 Bad Gateway</h1></html>", content_type="text/html")


async def too_many_requests(request: web.Request) -> web.StreamResponse:
    """Answer as a proxy with a rate limit of its own does."""
    return web.Response(status=429, text="<html><h1>429 Too Many Requests</h1></html>", content_type="text/html")


async def reset(request: web.Request) -> web.StreamResponse:
    """Close the connection without a response."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def hang(request: web.Request) -> web.StreamResponse:
    """Answer too late."""
    await asyncio.sleep(60)
    return web.Response()


def refusal(code: int, description: str, **more: Any) -> web.Response:
    return web.json_response({"ok": False, "error_code": code, "description": description, **more}, status=code)


class FakeBotApi:
    """Answers the calls of one bot, and keeps what it sends.

    Attributes:
        url: For --api-url.
        calls: Method and parameters of each successful call but getUpdates, in their order.
        times: When each came, by the monotonic clock.
        updates: Updates that were not acknowledged.
        failures: By method: what answers its next calls instead, one by one.
        requests: Number of requests by method, failed ones too.
        offsets: The offsets of getUpdates.
    """

    def __init__(self) -> None:
        self.url = ""
        self.calls: list[tuple[str, dict[str, str]]] = []
        self.times: list[float] = []
        self.updates: list[dict[str, Any]] = []
        self.failures: dict[str, list[Failure]] = {}
        self.requests: dict[str, int] = {}
        self.offsets: list[int] = []
        self.token = TOKEN
        self._changed = asyncio.Condition()
        self._next_update = 1000
        self._next_message = 1

    # What the test does as a person

    async def say(self, text: str | None, chat: int = 7, user: int | None = None, **message: Any) -> int:
        """Send a message; a positive chat is private. Returns the number of the message."""
        edited = message.pop("edited", False)
        sender = chat if user is None else user
        self._next_message += 1
        content = {
            "message_id": self._next_message,
            "date": 1_700_000_000,
            "chat": {"id": chat, "type": "private"} if chat > 0 else {"id": chat, "type": "supergroup", "title": "g"},
            "from": {"id": sender, "is_bot": False, "first_name": "Pau"},
            **({} if text is None else {"text": text}),
            **message,
        }
        await self.add_update({"edited_message" if edited else "message": content})
        return self._next_message

    async def add_update(self, update: dict[str, Any]) -> None:
        async with self._changed:
            self.updates.append({"update_id": self._next_update, **update})
            self._next_update += 1
            self._changed.notify_all()

    def texts(self, chat: int | None = 7, method: str = "sendMessage") -> list[str]:
        """The texts of the messages to a chat; None: to any."""
        return [
            sent.get("text", "")
            for name, sent in self.calls
            if name == method and (chat is None or sent["chat_id"] == str(chat))
        ]

    def count(self, method: str) -> int:
        return sum(name == method for name, _ in self.calls)

    async def until(self, is_true: Callable[[], bool], seconds: float = 30) -> None:
        """Wait for a condition that a call of the bot makes true."""
        end = time.monotonic() + seconds
        while not is_true():
            assert time.monotonic() < end, (self.calls, self.requests)
            await asyncio.sleep(0.005)

    async def received(self, count: int, chat: int | None = 7) -> list[str]:
        """Wait for that many messages to a chat, and return them."""
        await self.until(lambda: len(self.texts(chat)) >= count)
        return self.texts(chat)

    # The server

    async def respond(self, request: web.Request) -> web.StreamResponse:
        method = request.match_info["method"]
        self.requests[method] = self.requests.get(method, 0) + 1
        if request.match_info["token"] != self.token:
            return refusal(401, "Unauthorized")
        if failures := self.failures.get(method):
            return await failures.pop(0)(request)
        sent = {key: str(value) for key, value in (await request.post()).items()}
        if method == "getUpdates":
            return web.json_response({"ok": True, "result": await self._updates(sent)})
        self.calls.append((method, sent))
        self.times.append(time.monotonic())
        result: Any = True
        if method == "getMe":
            result = BOT
        if method == "sendMessage":
            units = len(sent["text"].encode("utf-16-le")) // 2
            if not sent["text"].strip() or units > 4096:
                self.calls.pop()
                return refusal(400, f"Bad Request: message of {units} units")
            self._next_message += 1
            chat = {"id": int(sent["chat_id"]), "type": "private"}
            result = {"message_id": self._next_message, "date": 1_700_000_000, "chat": chat, "text": sent["text"]}
        return web.json_response({"ok": True, "result": result})

    async def _updates(self, sent: dict[str, str]) -> list[dict[str, Any]]:
        """Forget the updates before the offset, and wait for others."""
        offset, wait = int(sent.get("offset", 0)), float(sent.get("timeout", 0))
        self.offsets.append(offset)
        async with self._changed:
            self.updates = [update for update in self.updates if update["update_id"] >= offset]
            if not self.updates and wait:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait_for(lambda: bool(self.updates)), wait)
            return self.updates[:100]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["FakeBotApi"]:
        """Serve on a free port of the loopback interface."""
        app = web.Application()
        app.router.add_route("*", "/bot{token}/{method}", self.respond)
        runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()


class ThreadedBotApi:
    """A `FakeBotApi` in a thread of its own, for a bot in another process."""

    def __init__(self) -> None:
        self.api = FakeBotApi()
        self._is_ready, self._end = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with self.api.running():
            self._is_ready.set()
            await self._end.wait()

    def __enter__(self) -> "ThreadedBotApi":
        self._thread.start()
        assert self._is_ready.wait(10)
        return self

    def __exit__(self, *exception: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)

    def do(self, work: Any) -> Any:
        """Run a coroutine of the fake in its loop, and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)
