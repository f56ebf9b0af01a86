"""An optimizer and an objective of one file each train, resume, report, sweep and export; nothing else knows them."""

import csv
import importlib
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch

from cucafera.config.command_line import command_line_problems
from cucafera.config.registry import OBJECTIVES, OPTIMIZERS
from cucafera.config.schema import SamplingConfig
from cucafera.interop.model_card import read_lineage
from cucafera.interop.trained import load_trained
from cucafera.run import train
from cucafera.runs.folder import RunFolder
from cucafera.training.module import LanguageModel
from tests.support import assert_equal, run_command, scalars, weights

PLUGINS = Path(__file__).parent / "plugins"
SETTINGS = ["optimizer=toy_sgd", "optimizer.lr=0.05", "optimizer.weight_decay=0", "objective=toy_backward"]


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch):
    """Register the toys in this process, as their entry points do in another."""
    monkeypatch.syspath_prepend(str(PLUGINS))
    for registry in (OPTIMIZERS, OBJECTIVES):
        monkeypatch.setattr(registry, "_entries", {name: registry.get(name) for name in registry.names()})
    for module in ("toy_objective", "toy_optimizer"):
        importlib.import_module(module)
    yield
    for name in ("toy_objective", "toy_optimizer"):
        sys.modules.pop(name)


@pytest.fixture(params=[*OPTIMIZERS.names(), "toy_sgd"])
def optimizer(request: pytest.FixtureRequest, toys) -> str:
    """Every registered optimizer, and the toy."""
    return request.param


def test_toys_train_report_and_resume_to_the_same_weights(toys, small_run, caplog):
    caplog.set_level("INFO")
    score = train(small_run("name=whole", *SETTINGS), [])
    metrics = json.loads(Path("outputs/whole/metrics.json").read_text())
    history = metrics["validation"]
    assert score == history[-1]["hits"] > history[0]["hits"]
    assert metrics["best_hits"] == max(record["hits"] for record in history)
    for text in ("Share of hits", "of the tokens (best", "Direction  ", "backwards"):
        assert text in caplog.text
    assert "| step | tokens | hits |" in Path("outputs/whole/report.md").read_text()
    assert scalars("outputs/whole", "hits/val")[-1][1] == pytest.approx(score)
    best = RunFolder(Path("outputs/whole")).checkpoints.best()
    assert best.score.metric == "hits" and best.score.value == metrics["best_hits"]

    half = "budget_tokens=1536"
    train(small_run("name=parts", *SETTINGS, half, "schedule.horizon_steps=12"), [])
    train(small_run("name=parts", *SETTINGS, "schedule.horizon_steps=12"), [])
    assert_equal(weights("outputs/whole"), weights("outputs/parts"))


def test_toys_export_and_stand_in_the_model_card(toys, small_run):
    train(small_run("name=run", *SETTINGS), [])
    trained = load_trained("outputs/run")
    assert not trained.chats and trained.step == 12
    from cucafera.interop.model_card import model_card

    lineage = read_lineage(RunFolder(Path("outputs/run")))
    card = model_card(trained, lineage, "toy", None, "Compared", False, SamplingConfig())
    assert "SGD, momentum 0.9" in card and "of the tokens on held-out text" in card


def test_toy_settings_are_checked_like_any_other(toys):
    assert command_line_problems([*SETTINGS, "optimizer.momentum=0.5", "objective.scale=2"]) == []
    (problem,) = command_line_problems([*SETTINGS, "optimizer.momentum=1"])
    assert problem.startswith("optimizer.momentum is 1; it must be at least 0 and below 1")
    (problem,) = command_line_problems(["optimizer=toy_sgd", "optimizer.betas=[0.9,0.95]"])
    assert "betas" in problem and "toy_sgd" in problem


def test_a_nonfinite_update_is_never_applied_by_any_optimizer(optimizer, small_run, monkeypatch):
    """A loss of NaN in one step leaves weights and optimizer state bit for bit as they were."""
    states = []

    class RecordedError(Exception):
        pass

    def copy(module: LanguageModel) -> list[torch.Tensor]:
        state = module.optimizers().optimizer.state_dict()["state"]
        kept = [value for moments in state.values() for value in moments.values() if isinstance(value, torch.Tensor)]
        return [tensor.detach().clone() for tensor in [*module.parameters(), *kept]]

    training_step, objective_loss = LanguageModel.training_step, OBJECTIVES.get("pretraining").loss

    def step(module: LanguageModel, batch, batch_idx: int) -> None:
        poisoned = module.steps_done == 5
        if poisoned:
            states.append(copy(module))
            monkeypatch.setattr(
                module.objective, "loss", lambda *arguments: objective_loss(*arguments) * math.nan, raising=False
            )
        training_step(module, batch, batch_idx)
        if poisoned:
            states.append(copy(module))
            raise RecordedError

    monkeypatch.setattr(LanguageModel, "training_step", step)
    with pytest.raises(RecordedError):
        train(small_run("name=run", f"optimizer={optimizer}"), [])
    before, after = states
    assert len(before) == len(after) and all(torch.equal(*pair) for pair in zip(before, after, strict=True))


@pytest.mark.slow
def test_toys_of_another_distribution_sweep_by_their_entry_points(corpus, tmp_path, monkeypatch):
    """The jobs of a sweep are processes of their own: they find the toys by the entry points on their path."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PLUGINS), os.environ["PYTHONPATH"]]))
    found = run_command(
        "-m", "cucafera.run", "--multirun", "name=sweep", "hydra.sweep.dir=outputs/sweep", "data=files",
        f"data.sources.files.path={corpus}", "data.validation_fraction=0.2", "model.vocab_size=320",
        "model.max_position_embeddings=32", "model.hidden_size=48", "batch_tokens=256", "budget_tokens=2048",
        "schedule.warmup_steps=0", "trainer=cpu", "callbacks.prompts=[]", *SETTINGS[:1], *SETTINGS[2:],
        "optimizer.lr=0.01,0.05", "optimizer.momentum=0.5", cwd=tmp_path,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    rows = list(csv.DictReader((tmp_path / "outputs/sweep/results.csv").open()))
    assert {row["optimizer.lr"] for row in rows} == {"0.01", "0.05"}
    scores = [float(row["hits"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert "share of hits" in found.stdout
