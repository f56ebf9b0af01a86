"""Models of the Hugging Face hub: a small server in its place serves one in the form of the published chat model."""

import hashlib
import http.server
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from cucafera.config.errors import UserError
from cucafera.hub import hub_problem
from cucafera.interop.hf_spec import folder_of
from cucafera.interop.trained import load_trained

NAME, COMMIT = "pauhidalgoo/cucafera-chat", "0123456789abcdef0123456789abcdef01234567"


class FakeHub(http.server.ThreadingHTTPServer):
    """A server with the part of the hub's interface that a download uses.

    Args:
        folder: The content of the only repository.

    Attributes:
        requests: Method, file and range of each request for a file.
        breaks_after: Bytes of the weights after which the next connection breaks; None: it does not.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), FakeHubHandler)
        self.folder = folder
        self.requests: list[tuple[str, str, str | None]] = []
        self.breaks_after: int | None = None


class FakeHubHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(f"/{NAME}/resolve/"):
            self.send_file(path.rpartition("/")[2])
        elif path.startswith(f"/api/models/{NAME}/tree/"):
            self.send_object(
                [{"type": "file", "oid": "0" * 40, "size": size, "path": name} for name, size in self.sizes()]
            )
        elif path.startswith(f"/api/models/{NAME}"):
            files = [{"rfilename": name, "size": size} for name, size in self.sizes()]
            self.send_object({"id": NAME, "sha": COMMIT, "siblings": files, "cardData": {"license": "apache-2.0"}})
        else:
            self.send_error(404)

    do_HEAD = do_GET  # noqa: N815

    def sizes(self) -> list[tuple[str, int]]:
        return [(path.name, path.stat().st_size) for path in sorted(self.server.folder.iterdir())]

    def send_object(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, name: str) -> None:
        path, asked = self.server.folder / name, self.headers.get("Range")
        self.server.requests.append((self.command, name, asked))
        if not path.exists():
            return self.send_error(404)
        content = path.read_bytes()
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            limit = None
            if name == "model.safetensors":
                limit, self.server.breaks_after = self.server.breaks_after, None
            self.wfile.write(content[start:limit])
            self.close_connection = limit is not None

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    (tmp_path / "repository").mkdir()
    with FakeHub(tmp_path / "repository") as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        hub_problem.cache_clear()  # it was asked of another address
        yield server
        hub_problem.cache_clear()
        server.shutdown()
        thread.join()


def test_the_published_chat_model_is_downloaded_once_through_a_broken_connection(
    hub, published_chat, caplog, monkeypatch
):
    hub.folder = published_chat
    caplog.set_level(logging.INFO, "cucafera")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500_000)
    hub.breaks_after = 1_000_000
    trained = load_trained(NAME)
    assert trained.chats and trained.tokenizer.vocab_size == 65_536
    assert "<|im_start|> from 65,536 to 4, <|im_end|> from 65,537 to 5" in trained.notes[0]
    ranges = [asked for method, name, asked in hub.requests if (method, name) == ("GET", "model.safetensors")]
    assert ranges == [None, "bytes=1000000-"]
    (message,) = (record.getMessage() for record in caplog.records if record.name.startswith("cucafera"))
    size = sum(path.stat().st_size for path in hub.folder.iterdir()) / 1e9
    assert message.endswith(f"{size:.3f} GB, licence: apache-2.0")

    hub.requests.clear()
    caplog.clear()
    assert folder_of(NAME, with_weights=True) == trained.checkpoint
    assert not hub.requests and not caplog.records


def test_a_download_that_cannot_succeed_is_refused_before_it_begins(hub, monkeypatch):
    (hub.folder / "model.safetensors").write_bytes(bytes(7_000_000))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=6_000_000))
    with pytest.raises(
        UserError, match=r"has 0\.007 GB, and the disk of .* has 0\.006 GB free\. HF_HOME names a folder"
    ):
        folder_of(NAME, with_weights=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"{NAME}: reading its weights needs safetensors: pip install"):
        folder_of(NAME, with_weights=True)
    assert not hub.requests
