"""Fixtures: servers of the small base and chat models, each in a thread of this process."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from openai import OpenAI

from cucafera.config.schema import SamplingConfig
from cucafera.generation.engine_thread import EngineThread
from cucafera.interop.loaded import LoadedModel, load_model
from cucafera.runs.locate import locate_model
from cucafera.serve import NEUTRAL_SAMPLING, listening_socket
from cucafera.serving.collected import CollectedRows
from cucafera.serving.connections import http_server
from cucafera.serving.openai_api import ServedModel
from cucafera.serving.server import Access, Service

SLOTS, QUEUE = 4, 3


@dataclass
class RunningServer:
    """A server in a thread.

    Attributes:
        service: Its routes.
        url: Its address.
        openai: A client of it.
        http: Its connections.
    """

    service: Service
    url: str
    openai: OpenAI
    http: uvicorn.Server

    def post(self, path: str, **settings: Any) -> httpx.Response:
        return httpx.post(self.url + path, timeout=30, verify=False, **settings)

    def get(self, path: str, **settings: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, verify=False, **settings)

    def running(self) -> int:
        """Return how many choices are being generated or wait."""
        load = self.service.engine.load()
        return load.running + load.waiting

    def wait_until(self, is_true: Callable[[], bool], seconds: float = 10) -> None:
        """Wait until something is true."""
        end = time.monotonic() + seconds
        while not is_true():
            assert time.monotonic() < end
            time.sleep(0.005)


@contextlib.contextmanager
def serving(
    model: LoadedModel,
    name: str,
    access: Access = Access(),  # noqa: B008  # frozen
    collect: Path | None = None,
    step_seconds: float = 0.0,
    timeout: float | None = None,
    **served: Any,
) -> Iterator[RunningServer]:
    """Serve a model in a thread; `step_seconds` is how long each step of the engine takes longer."""
    fast_step = type(model.engine).step

    def step() -> None:
        time.sleep(step_seconds)
        fast_step(model.engine)

    model.engine.step = step  # type: ignore[method-assign]
    with EngineThread(model.engine, QUEUE, timeout) as engine, listening_socket("127.0.0.1", 0) as listener:
        settings = {"sampling": replace(NEUTRAL_SAMPLING), "max_choices": SLOTS + QUEUE} | served
        of_api = ServedModel(name, model.tokenizer, engine.context, model.chats, **settings)
        rows = None if collect is None else CollectedRows(collect, name)
        service = Service(engine, of_api, access, SamplingConfig(), rows)
        server = http_server(service.app())
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        key = access.keys[0] if access.keys else "none"
        with OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30) as client:
            try:
                yield RunningServer(service, url, client, server)
            finally:
                server.should_exit = True
                thread.join(10)
        assert not thread.is_alive()


def loaded(runs: Path, name: str) -> LoadedModel:
    """Load the small model of a run with four slots."""
    source = str(runs / "outputs" / name)
    return load_model(source, locate_model(source), "cpu", SLOTS)


@pytest.fixture(scope="session")
def chat(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server of the chat model, which collects answers."""
    folder = tmp_path_factory.mktemp("collected")
    with serving(loaded(runs, "chat"), "chat", collect=folder / "mine.jsonl") as server:
        yield server


@pytest.fixture(scope="session")
def base(runs: Path) -> Iterator[RunningServer]:
    """A server of the base model."""
    with serving(loaded(runs, "base"), "base") as server:
        yield server


@pytest.fixture
def slow(runs: Path) -> Iterator[RunningServer]:
    """A server of the chat model, of which each step takes 20 ms longer."""
    with serving(loaded(runs, "chat"), "chat", step_seconds=0.02) as server:
        yield server
