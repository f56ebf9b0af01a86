"""A server without a model: the HTTP that the page uses, with texts, delays and failures that a test chooses."""

import asyncio
import contextlib
import json
import re
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from aiohttp import web

from cucafera.serving.openai_api import context_error
from cucafera.serving.server import PAGE, content_security_policy


class FakeServer:
    """The server, in a thread; a context manager.

    Attributes:
        answer: Returns the text that answers a request body; each word is a token.
        delay: Seconds before each token.
        settings: The answer of /page/settings.
        key: The key that requests need; None: none.
        failures: Status, headers and error object of the next requests, the first first.
        frame: Tokens of a prompt apart from its words.
        breaks_after: Tokens after which the connection is cut; None: never.
        requests: Bodies of the requests to the model.
        preferences, ratings: Bodies of those.
        cancelled: Number of requests that the client has cut off.
    """

    def __init__(self) -> None:
        self.answer: Callable[[dict[str, Any]], str] = lambda body: "Bon dia!"
        self.delay = 0.0
        self.settings: dict[str, Any] = {
            "model": "cucafera", "chats": True, "context": 2048, "collects": True, "system": "",
            "sampling": {
                "max_tokens": 256, "temperature": 0.6, "top_k": 50, "top_p": 0.9, "min_p": 0.0,
                "repetition_penalty": 1.2,
            },
        }  # fmt: skip
        self.key: str | None = None
        self.failures: list[tuple[int, dict[str, str], dict[str, Any]]] = []
        self.frame = 0
        self.breaks_after: int | None = None
        self.requests: list[dict[str, Any]] = []
        self.preferences: list[dict[str, Any]] = []
        self.ratings: list[dict[str, Any]] = []
        self.cancelled = 0
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> "FakeServer":
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application(middlewares=[self._check])
        app.router.add_get("/", self._page)
        app.router.add_get("/page/settings", self._settings)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/page/preference", self._collect)
        app.router.add_post("/page/rating", self._collect)
        # Without handler_cancellation a handler would not notice that the client has gone.
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/"

    @web.middleware
    async def _check(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path != "/":
            if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
                return web.json_response({"error": {"message": "no key", "code": "invalid_api_key"}}, status=401)
            if self.failures:
                status, headers, error = self.failures.pop(0)
                return web.json_response({"error": error}, status=status, headers=headers)
            if request.method == "POST" and request.content_type != "application/json":
                return web.json_response({"error": {"message": "not JSON"}}, status=415)
        response: web.StreamResponse = await handler(request)
        return response

    async def _page(self, _: web.Request) -> web.Response:
        text = PAGE.read_text(encoding="utf-8")
        headers = {"Content-Security-Policy": content_security_policy(text), "Cache-Control": "no-store"}
        return web.Response(text=text, content_type="text/html", headers=headers)

    async def _settings(self, _: web.Request) -> web.Response:
        return web.json_response(self.settings)

    async def _collect(self, request: web.Request) -> web.Response:
        rows = self.preferences if request.path.endswith("preference") else self.ratings
        rows.append(await request.json())
        return web.Response(status=204)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        prompt = body.get("prompt") or "\n".join(message["content"] for message in body["messages"])
        prompt_tokens = len(prompt.split()) + self.frame
        if prompt_tokens >= self.settings["context"]:
            error = context_error(prompt_tokens, self.settings["context"])
            body = {"error": {"message": str(error), "code": error.code}}
            return web.json_response(body, status=error.status)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            async for chunk in self._chunks(body, prompt_tokens):
                await response.write(f"data: {chunk}\n\n".encode())
        except (ConnectionResetError, asyncio.CancelledError):
            self.cancelled += 1
            raise
        return response

    async def _chunks(self, body: dict[str, Any], prompt_tokens: int) -> AsyncIterator[str]:
        is_chat = "messages" in body
        tokens = re.findall(r"\s*\S+", self.answer(body))
        room = min(body["max_tokens"], self.settings["context"] - prompt_tokens)
        written = tokens[:room]

        def chunk(reason: str | None = None, **delta: str) -> str:
            piece = {"delta": delta} if is_chat else {"text": delta.get("content", "")}
            return json.dumps({"choices": [{"index": 0, "finish_reason": reason, **piece}]})

        if is_chat:
            yield chunk(role="assistant")
        for number, token in enumerate(written):
            if number == self.breaks_after:
                return
            await asyncio.sleep(self.delay)
            yield chunk(content=token)
        yield chunk("length" if len(tokens) > room else "stop")
        yield json.dumps({"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": len(written)}})
        yield "[DONE]"

    @contextlib.contextmanager
    def changed(self, **settings: Any) -> Any:
        """Answer /page/settings otherwise for a while."""
        before = dict(self.settings)
        self.settings |= settings
        try:
            yield
        finally:
            self.settings = before
