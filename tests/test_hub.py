"""The Hugging Face hub: one that is not there is not waited for, a slow one is."""

import functools
import http.server
import json
import socket
import threading
import time
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import constants

from cucafera import hub
from cucafera.config.errors import UserError
from cucafera.data.sources import ReadContext
from cucafera.data.sources.hub import HubConfig, HubSource, _newest_commit
from cucafera.evaluation.samples import load_generator
from cucafera.interop.hf_spec import folder_of
from cucafera.interop.trained import load_trained

COMMIT = "0123456789" * 4


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Let the hub be asked, with an empty cache of downloads; everything is as before afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    for cached in (hub.hub_problem, _newest_commit):
        cached.cache_clear()
    yield
    for cached in (hub.hub_problem, _newest_commit):
        cached.cache_clear()


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch):
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield server


def refusal(action) -> str:
    with pytest.raises(UserError) as refused:
        action()
    return str(refused.value)


def test_a_hub_that_does_not_answer_is_asked_once_and_then_only_downloads_count(silent, monkeypatch):
    monkeypatch.setattr(hub, "WAIT_SECONDS", 0.2)
    start = time.monotonic()
    source = HubSource(HubConfig(dataset="a/b"), ReadContext("data.sources.web", "", ""))
    stream = HubSource(HubConfig(dataset="a/b", streaming=True), ReadContext("data.sources.web", "", ""))
    messages = [
        refusal(lambda: load_trained("owner/model")),
        refusal(lambda: folder_of("owner/model@v1", with_weights=False)),
        refusal(lambda: load_generator("owner/model", torch.device("cpu"))),
        refusal(lambda: list(source.documents())),
        refusal(lambda: list(stream.documents())),
        *source.notes(),
    ]
    assert time.monotonic() - start < 5
    for message in messages:
        assert f"the Hugging Face hub was not reached ({constants.ENDPOINT}: no answer within 0.2 seconds)" in message
        assert all(name in message for name in ("HTTPS_PROXY", "HF_ENDPOINT", "a local folder", "HF_HUB_OFFLINE=1"))


def test_the_wait_ends_within_ten_seconds():
    assert 2 < hub.WAIT_SECONDS < 10


def test_the_deadline_covers_name_resolution(monkeypatch):
    monkeypatch.setattr(hub, "WAIT_SECONDS", 0.1)
    monkeypatch.setattr(constants, "ENDPOINT", "http://nowhere.invalid")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **settings: time.sleep(2) or [])
    start = time.monotonic()
    assert "no answer within 0.1 seconds" in str(hub.hub_problem())
    assert time.monotonic() - start < 1.5


def test_a_closed_port_and_a_server_error_are_not_an_answer(monkeypatch, serve):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    assert "ConnectError: " in str(hub.hub_problem())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.hub_problem.cache_clear()
    serve(status=503)
    assert "it answers with status 503" in str(hub.hub_problem())


def test_offline_by_the_variable_asks_nothing(silent, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    start = time.monotonic()
    assert "HF_HUB_OFFLINE is set: unset it" in str(hub.hub_problem())
    assert time.monotonic() - start < 1


class SlowHub(http.server.BaseHTTPRequestHandler):
    """A hub with one model that has one file, and sends it bit by bit."""

    content = b'{"hidden_size": 8}' * 4
    status = 200
    is_stalled = False
    """It greets, and answers nothing else, as the start page of a network may."""

    def do_HEAD(self) -> None:
        self.answer(with_content=False)

    def do_GET(self) -> None:
        self.answer(with_content=True)

    def answer(self, with_content: bool) -> None:
        content, path = self.content, self.path.partition("?")[0]
        if self.is_stalled and path != "/":
            time.sleep(2)
            return
        if path.startswith("/api/models/owner/model/tree"):
            file = {"type": "file", "path": "config.json", "size": len(content), "oid": COMMIT}
            content = json.dumps([file]).encode()
        elif path.startswith("/api/"):
            model = {"id": "owner/model", "sha": COMMIT, "siblings": [{"rfilename": "config.json"}]}
            content = json.dumps(model).encode()
        elif path == "/":
            content = b""
        time.sleep(0.05)
        self.send_response(self.status)
        headers = {"Content-Length": len(content), "ETag": f'"{COMMIT}"', "X-Repo-Commit": COMMIT}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if with_content:
            for start in range(0, len(content), 8):
                self.wfile.write(content[start : start + 8])
                self.wfile.flush()
                time.sleep(0.05 if content == self.content else 0)

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch):
    servers = []

    def start(status: int = 200, is_stalled: bool = False) -> None:
        handler = type("Hub", (SlowHub,), {"status": status, "is_stalled": is_stalled})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01), daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_slow_hub_is_waited_for_as_long_as_bytes_arrive(serve, monkeypatch):
    serve()
    monkeypatch.setattr(hub, "WAIT_SECONDS", 0.4)
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        monkeypatch.setattr(constants, name, 1)
    start = time.monotonic()
    folder = folder_of("owner/model", with_weights=True)
    assert (folder / "config.json").read_bytes() == SlowHub.content
    assert time.monotonic() - start > hub.WAIT_SECONDS
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.hub_problem.cache_clear()
    assert folder_of("owner/model", with_weights=True) == folder, "what was downloaded is used without the hub"


def test_a_hub_that_stops_answering_is_not_waited_for(serve, monkeypatch):
    serve(is_stalled=True)
    monkeypatch.setattr(hub, "WAIT_SECONDS", 0.4)
    start = time.monotonic()
    with pytest.raises(
        UserError, match=r"owner/model: .*no earlier download, and the Hugging Face hub was not reached"
    ):
        folder_of("owner/model", with_weights=True)
    assert time.monotonic() - start < 2
