"""HTTP connections: how many there may be, how long a request may take to arrive, and the answer to what is no HTTP."""

import asyncio
import contextlib
import errno
import logging
import resource
import socket
import time
from collections.abc import Iterator
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from cucafera.serving.openai_api import ApiError
from cucafera.serving.server import error_response

log = logging.getLogger(__name__)

BACKLOG = 128
"""Connections that wait to be accepted; asyncio accepts as many before one can be closed."""
MAX_CONNECTIONS = 1000
REQUEST_SECONDS = 30
"""Longest time from the start of a connection, or its last response, until the headers of a request have arrived."""
MAX_PIPELINED = 1 << 16
"""Bytes that may follow a request before its response is complete."""
FLUSH_SECONDS = 1
"""Time for clients to read the ends of their responses when the server stops."""
NO_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
WARNING_SECONDS = 60
"""Shortest time between two warnings that connections are refused."""


def max_connections() -> int:
    """Return how many connections may be open: half of the descriptors are left to other files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, soft // 2)


class Connection(H11Protocol):
    """A connection, which uvicorn would let be silent for ever before its first request."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, or refuse one too many."""
        super().connection_made(transport)
        if len(self.connections) > max_connections():
            warn_of_refused("there are too many")
            self._refuse(ApiError(503, "This server has too many connections: try again later", "overloaded"))
        else:
            self.timeout_keep_alive_task = self.loop.call_later(REQUEST_SECONDS, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        """Read a part of a request; the time limit ends with the headers, not with the first byte."""
        self.conn.receive_data(data)
        self.handle_events()

    def handle_events(self) -> None:
        """Handle what has arrived, and read on, since only reading shows that the client disconnects."""
        super().handle_events()
        if self.cycle is None or self.cycle.response_complete:
            return
        self._unset_keepalive_if_required()
        if self.flow.read_paused and self.conn.their_state is h11.DONE:
            if len(self.conn.trailing_data[0]) > MAX_PIPELINED:
                self.transport.abort()
            else:
                self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP in the format of the API."""
        self._refuse(ApiError(400, "The request is no valid HTTP, or its headers have more than 64 KiB"))

    def _refuse(self, error: ApiError) -> None:
        """Send an error, and close the connection."""
        response = error_response(error)
        headers = [*response.raw_headers, (b"connection", b"close")]
        events = (
            h11.Response(status_code=error.status, headers=headers),
            h11.Data(bytes(response.body)),
            h11.EndOfMessage(),
        )
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        try:
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        except h11.LocalProtocolError:  # the response to an earlier part of the request has begun
            self.transport.abort()
        self.transport.close()


_warned = -float("inf")


def warn_of_refused(reason: str) -> None:
    """Log that a connection is refused, at most once in a while."""
    global _warned
    now = time.monotonic()
    if now - _warned >= WARNING_SECONDS:
        _warned = now
        log.warning("Connections are refused: %s", reason)


def on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an error of the event loop: of missing descriptors, one line instead of a trace per try."""
    error = context.get("exception")
    if isinstance(error, OSError) and error.errno in NO_RESOURCES:
        warn_of_refused(error.strerror or str(error))
    else:
        loop.default_exception_handler(context)


def http_server(app: ASGIApp) -> uvicorn.Server:
    """Return a server of an application, without signal handlers; its sockets are given to `serve`."""
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=REQUEST_SECONDS,
        timeout_graceful_shutdown=FLUSH_SECONDS + 1,
    )
    return _Server(config)


class _Server(uvicorn.Server):
    """Leaves signals to the command, which drains the engine before."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start with the handler of errors."""
        asyncio.get_running_loop().set_exception_handler(on_loop_error)
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop; a client that does not read the end of its response is cut off, and its request ends in good order."""
        asyncio.get_running_loop().call_later(FLUSH_SECONDS, self._cut_off)
        await super().shutdown(sockets)

    def _cut_off(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()
