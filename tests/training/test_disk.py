"""The disk that the checkpoints of a run need."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from cucafera.config.command_line import composed_config
from cucafera.quantities import number_of
from cucafera.runs.folder import RunFolder
from cucafera.training.trainer import disk_problem

TRAINED, FROZEN = 1000, 500
SIZE = 12 * TRAINED + 4 * FROZEN
"""Bytes of a checkpoint: weights in fp32, and two moments of those that are trained."""


def warning(tmp_path, monkeypatch, free: int, existing: int = 0, **settings: int) -> str | None:
    """Return the warning for a run of 20 steps."""
    config = composed_config(["batch_tokens=2048", "budget_tokens=40_960", "schedule.warmup_steps=0"])
    for name, value in settings.items():
        assert hasattr(config.callbacks, name)
        setattr(config.callbacks, name, value)
    weights = [torch.nn.Parameter(torch.zeros(TRAINED)), torch.nn.Parameter(torch.zeros(FROZEN), requires_grad=False)]
    module = SimpleNamespace(
        optimizer_spec=SimpleNamespace(state_bytes=lambda config: 8 * TRAINED), parameters=lambda: weights
    )
    folder = RunFolder(tmp_path / "run")
    monkeypatch.setattr(folder.checkpoints, "complete", lambda: [SimpleNamespace(size=SIZE)] * existing)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    return disk_problem(config, folder, module)


@pytest.mark.parametrize(
    ("settings", "at_once"),
    [
        ({"checkpoint_every_steps": 0}, 1),  # only at the end
        ({"checkpoint_every_steps": 10}, 2),
        ({"checkpoint_every_steps": 7}, 3),
        ({"checkpoint_every_steps": 1, "keep_last": 1}, 3),  # the last, the best, and the one that is being written
        ({"checkpoint_every_steps": 1, "keep_last": 5}, 7),
        ({"checkpoint_every_steps": 1, "keep_last": 2, "keep_every_steps": 5}, 8),  # and four for good
        ({"checkpoint_every_steps": 1, "keep_last": 50}, 20),
    ],
)
def test_a_warning_comes_exactly_when_the_checkpoints_do_not_fit_at_once(tmp_path, monkeypatch, settings, at_once):
    assert warning(tmp_path, monkeypatch, at_once * SIZE, **settings) is None
    message = warning(tmp_path, monkeypatch, at_once * SIZE - 1, **settings)
    assert message is not None and f"THE DISK MAY BECOME FULL: {number_of(at_once, 'checkpoint')} of" in message
    assert ("keep_every_steps" in message) == ("keep_every_steps" in settings)


def test_checkpoints_that_are_there_already_have_their_place(tmp_path, monkeypatch):
    settings = {"checkpoint_every_steps": 1, "keep_last": 1}
    assert warning(tmp_path, monkeypatch, free=SIZE, existing=2, **settings) is None
    assert warning(tmp_path, monkeypatch, free=SIZE, existing=1, **settings) is not None
