"""A base model and a chat model of a few steps, loaded for evaluation."""

from pathlib import Path

import pytest
import torch

from cucafera.evaluation.evaluated_model import EvaluatedModel, load_evaluated_model


@pytest.fixture
def base(runs: Path, monkeypatch: pytest.MonkeyPatch) -> EvaluatedModel:
    """The base model; the working directory is the one that it was trained in."""
    monkeypatch.chdir(runs)
    return load_evaluated_model("outputs/base", torch.device("cpu"))


@pytest.fixture
def chat(runs: Path, monkeypatch: pytest.MonkeyPatch) -> EvaluatedModel:
    """The chat model; the working directory is the one that it was trained in."""
    monkeypatch.chdir(runs)
    return load_evaluated_model("outputs/chat", torch.device("cpu"))
