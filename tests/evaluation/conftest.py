"""A base model and a chat model of a few steps."""

import os
from pathlib import Path

import pytest
import torch

from cucafera.evaluation.subject import Subject, load_subject
from cucafera.run import train
from tests.conftest import compose_small_chat, compose_small_run, write_corpus


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model in outputs/base and a chat model in outputs/chat; their context is 128."""
    folder = tmp_path_factory.mktemp("runs")
    before = Path.cwd()
    os.chdir(folder)
    try:
        write_corpus(folder / "corpus.jsonl", documents=80)
        base = compose_small_run(
            folder / "corpus.jsonl",
            "name=base",
            "model.max_position_embeddings=128",
            "callbacks.prompts=[la mar,el sol]",
        )
        train(base, [])
        train(compose_small_chat(folder, "name=chat", "init_from=outputs/base", "sequence_length=128"), [])
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def base(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Subject:
    """The base model, seen from the folder that it was trained in."""
    monkeypatch.chdir(runs)
    return load_subject("outputs/base", torch.device("cpu"))


@pytest.fixture
def chat(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Subject:
    """The chat model, seen from the folder that it was trained in."""
    monkeypatch.chdir(runs)
    return load_subject("outputs/chat", torch.device("cpu"))
