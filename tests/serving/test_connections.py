"""Connections: silent ones, too many of them, bytes after a request, and what is no HTTP."""

import asyncio
import errno
import json
import logging
import resource
import signal
import socket
import time
from types import SimpleNamespace

import pytest

from cucafera.serve import Shutdown, listening_socket, start_listening
from cucafera.serving import connections, server
from cucafera.serving.connections import MAX_CONNECTIONS, http_server, max_connections, on_loop_error
from tests.serving.conftest import RunningServer

GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def connected(running: RunningServer) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])))
    connection.settimeout(10)
    return connection


def post(**settings: object) -> bytes:
    content = {"model": "chat", "messages": [{"role": "user", "content": "Bon dia"}], "temperature": 0} | settings
    body = json.dumps(content).encode()
    headers = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return f"POST /v1/chat/completions HTTP/1.1\r\n{headers}\r\n\r\n".encode() + body


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize("sent", [b"", GET[:20], GET + GET[:20]], ids=["nothing", "half a header", "a second half"])
def test_a_connection_without_a_request_is_closed(chat, monkeypatch, sent):
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.3)
    monkeypatch.setattr(chat.http.config, "timeout_keep_alive", 0.3)
    with connected(chat) as connection:
        connection.sendall(sent)
        assert read_all(connection).count(b"HTTP/1.1 200") == sent.count(GET)


def test_a_request_may_take_longer_to_answer_than_to_arrive(slow, monkeypatch):
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.2)
    with connected(slow) as connection:
        connection.sendall(post(max_tokens=40, ignore_eos=True))
        assert connection.recv(12) == b"HTTP/1.1 200"


def test_a_connection_too_many_is_refused_until_another_ends(chat, monkeypatch):
    open_now = len(chat.http.server_state.connections)
    monkeypatch.setattr(connections, "max_connections", lambda: open_now + 2)
    with connected(chat) as first, connected(chat):
        with connected(chat) as third:
            answer = read_all(third)
        assert answer.startswith(b"HTTP/1.1 503") and b'"code":"overloaded"' in answer
        first.close()
        chat.wait_until(lambda: len(chat.http.server_state.connections) == open_now + 1)
        with connected(chat) as fourth:
            fourth.sendall(GET)
            assert fourth.recv(12) == b"HTTP/1.1 200"


@pytest.mark.parametrize(
    ("soft", "expected"), [(1024, 512), (100_000, MAX_CONNECTIONS), (resource.RLIM_INFINITY, MAX_CONNECTIONS)]
)
def test_connections_leave_descriptors_to_other_files(monkeypatch, soft, expected):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, soft))
    assert max_connections() == expected


def test_missing_descriptors_are_one_line_in_the_log(monkeypatch, caplog):
    monkeypatch.setattr(connections, "_warned", -1e9)
    loop = asyncio.new_event_loop()
    for _ in range(100):
        on_loop_error(loop, {"message": "socket.accept()", "exception": OSError(errno.EMFILE, "Too many open files")})
    assert caplog.messages == ["Connections are refused: Too many open files"]
    on_loop_error(loop, {"message": "a bug"})
    assert caplog.messages[1:] == ["a bug"]
    loop.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("later", [b"X", GET], ids=["a byte", "a request"])
def test_a_client_that_sent_more_and_leaves_frees_its_slot(slow, stream, later):
    with connected(slow) as connection:
        connection.sendall(post(max_tokens=100, stream=stream))
        slow.wait_until(lambda: slow.running() == 1)
        connection.sendall(later)
        time.sleep(0.1)
    slow.wait_until(lambda: slow.running() == 0, seconds=1)
    assert slow.service.engine.load().cancelled == 1


def test_requests_in_a_row_are_answered_in_their_order(chat):
    with connected(chat) as connection:
        connection.sendall(post(max_tokens=2) + GET + GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        answers = read_all(connection)
    assert answers.count(b"HTTP/1.1 200") == 3 and answers.index(b'"usage"') < answers.index(b'{"status":"ok"}')


def test_too_much_after_a_request_ends_the_connection(slow):
    with connected(slow) as connection:
        connection.sendall(post(max_tokens=100))
        slow.wait_until(lambda: slow.running() == 1)
        connection.sendall(b"X" * 100_000)
        slow.wait_until(lambda: slow.running() == 0, seconds=1)


def test_a_stream_notices_between_its_chunks_that_the_client_leaves(slow, monkeypatch):
    monkeypatch.setattr(server, "CHUNK_SECONDS", 5)
    with connected(slow) as connection:
        connection.sendall(post(max_tokens=100, stream=True))
        assert connection.recv(12) == b"HTTP/1.1 200"
    slow.wait_until(lambda: slow.running() == 0, seconds=1)


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x00\xff\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 70_000,
        post().replace(b"Content-Length", b"Transfer-Encoding: chunked\r\nX") + b"\r\n",
    ],
    ids=["TLS", "no host", "long header", "chunks"],
)
def test_what_is_no_http_is_an_error_of_the_api(chat, request_, caplog):
    with connected(chat) as connection:
        connection.sendall(request_)
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and b"application/json" in head
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert "Traceback" not in caplog.text


def test_a_signal_is_handled_before_the_address_is_announced():
    def fail(*_: object) -> None:
        raise AssertionError("no drain")

    earlier = signal.signal(signal.SIGTERM, fail)
    service = SimpleNamespace(is_stopping=False, active=0, engine=SimpleNamespace(drain=lambda seconds: True))
    with listening_socket("127.0.0.1", 0) as listener:
        start_listening("127.0.0.1", listener)
        shutdown = Shutdown(service, http_server(lambda *arguments: None), 1)
        assert asyncio.run(shutdown.serve(listener, lambda: signal.raise_signal(signal.SIGTERM))) == 143
    signal.signal(signal.SIGTERM, earlier)
    assert service.is_stopping


def test_a_client_that_does_not_read_is_cut_off_at_the_end_without_a_trace(caplog):
    caplog.set_level(logging.DEBUG)
    has_begun = asyncio.Event()

    async def endless(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        has_begun.set()
        while not has_left.is_set():
            await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
            await asyncio.sleep(0)

    async def run(listener: socket.socket) -> None:
        http = http_server(endless)
        serving = asyncio.ensure_future(http.serve(sockets=[listener]))
        _, writer = await asyncio.open_connection(*listener.getsockname(), limit=1)
        writer.write(GET)
        await has_begun.wait()
        await asyncio.sleep(0.1)
        http.should_exit = True
        asyncio.get_running_loop().call_later(2, has_left.set)
        await serving
        writer.close()

    has_left = asyncio.Event()
    with listening_socket("127.0.0.1", 0) as listener:
        start_listening("127.0.0.1", listener)
        asyncio.run(run(listener))
    assert "Traceback" not in caplog.text and "Cancel" not in caplog.text
