"""The base model and the chat model of a few steps, as they are measured."""

from pathlib import Path

import pytest
import torch

from cucafera.evaluation.subject import Subject, load_subject


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
