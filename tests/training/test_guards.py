"""What happens when training goes wrong: NaN, Inf and leaps of the loss, injected into real runs."""

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from cucafera.config import GuardsConfig, UserError
from cucafera.data.windows import TrainingSteps
from cucafera.model.transformer import Decoder
from cucafera.run import train
from cucafera.training.callbacks.guards import LossMonitor
from cucafera.training.checkpoint_files import read_checkpoint
from cucafera.training.module import LanguageModel
from cucafera.training.run_folder import RunFolder
from tests.test_run import assert_equal, scalars, weights

POISON = 9
"""An id that no text gives: a batch that is made of it is one to inject something into."""


@pytest.fixture
def inject(monkeypatch):
    """Multiplies the loss of the batches of these numbers by a factor, gradients and all."""

    def injection(batches, factor: float) -> None:
        item, forward = TrainingSteps.__getitem__, Decoder.forward

        def poisoned_item(steps, step):
            batch = item(steps, step)
            if steps.batch_at(step) in batches:
                batch.input_ids.fill_(POISON)
            return batch

        def poisoned_forward(model, input_ids, *arguments, **settings):
            result = forward(model, input_ids, *arguments, **settings)
            return result * factor if model.training and bool((input_ids == POISON).all()) else result

        monkeypatch.setattr(TrainingSteps, "__getitem__", poisoned_item)
        monkeypatch.setattr(Decoder, "forward", poisoned_forward)

    return injection


def history_of(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(f"outputs/{name}/history.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_not_applied(small_run, inject, caplog, factor):
    inject({5}, factor)
    train(small_run("name=run", "callbacks.checkpoint_every_steps=1", "callbacks.keep_last=12"), [])
    states = [read_checkpoint(path) for path in RunFolder(Path("outputs/run")).checkpoints.marked()]
    before, broken, after = states[4:7]
    assert (before["steps_done"], broken["steps_done"]) == (5, 6)
    assert_equal(before["state_dict"], broken["state_dict"])
    for number, moments in before["optimizer_states"][0]["state"].items():
        assert_equal(moments, broken["optimizer_states"][0]["state"][number])
    assert not torch.equal(broken["state_dict"]["model.norm.weight"], after["state_dict"]["model.norm.weight"])
    assert all(value.isfinite().all() for value in states[-1]["state_dict"].values())
    assert "Step 6: loss" in caplog.text and "the update was not applied" in caplog.text
    assert [value for _, value in scalars("outputs/run", "guards/skipped_updates")] == [0] * 5 + [1] * 7
    metrics = json.loads(Path("outputs/run/metrics.json").read_text(), parse_constant=pytest.fail)
    assert metrics["skipped_updates"] == 1
    assert "not applied: 1 of the steps" in Path("outputs/run/report.md").read_text()


def test_a_last_step_that_is_not_finite_leaves_metrics_that_every_program_can_read(small_run, inject):
    inject({11}, math.nan)
    train(small_run("name=run"), [])
    metrics = json.loads(Path("outputs/run/metrics.json").read_text(), parse_constant=pytest.fail)
    assert metrics["train_loss"] is None and math.isfinite(metrics["validation"][-1]["loss"])
    assert "not finite" in Path("outputs/run/report.md").read_text()


def test_steps_between_two_log_steps_are_looked_at_too(small_run, inject, caplog):
    inject({4, 6}, math.nan)
    train(small_run("name=run", "callbacks.log_every_steps=4"), [])
    assert "Step 5: loss nan" in caplog.text and "Step 7: loss nan" in caplog.text
    assert scalars("outputs/run", "guards/skipped_updates") == [(4, 0), (8, 2), (12, 2)]


def test_too_many_in_a_row_stop_the_run_and_the_last_checkpoint_is_sound(small_run, inject):
    inject(range(5, 12), math.nan)
    with pytest.raises(UserError, match=r"4 updates in a row were not finite, and none was applied.*resume_despite"):
        train(small_run("name=run"), [])
    newest = RunFolder(Path("outputs/run")).checkpoints.complete()[-1]
    assert newest.step == 8
    note = history_of("run")[-1]
    assert (note["what"], note["saved_step"]) == ("stopped", 8) and "4 updates in a row" in note["why"]
    assert all(value.isfinite().all() for value in read_checkpoint(newest.path)["state_dict"].values())


def test_a_model_that_a_step_has_broken_writes_no_samples_and_is_told(small_run):
    with pytest.raises(UserError, match="4 updates in a row were not finite"):
        train(small_run("name=run", "optimizer.lr=1e9", "schedule.warmup_steps=0"), [])


def test_a_row_that_spans_a_resume_is_one_row(small_run, inject):
    inject(range(6, 12), math.nan)
    horizon = "schedule.horizon_steps=12"
    train(small_run("name=run", horizon, "budget_tokens=2048"), [])
    with pytest.raises(UserError, match="4 updates in a row"):
        train(small_run("name=run", horizon), [])


def test_the_policy_stop_stops_at_the_first(small_run, inject):
    inject({5}, math.nan)
    with pytest.raises(UserError, match="the update of step 6 was not finite"):
        train(small_run("name=run", "callbacks.guards.non_finite=stop"), [])


ROLLBACK = "callbacks.guards.non_finite=rollback"


@pytest.mark.parametrize("number", [1, 5])  # before the first checkpoint, and behind it
def test_a_rollback_leaves_out_the_batch_as_if_it_had_never_been_there(small_run, inject, monkeypatch, caplog, number):
    with monkeypatch.context() as patch:
        patch.setattr(TrainingSteps, "batch_at", lambda steps, step: step + (step >= number))
        train(small_run("name=without"), [])
    inject({number}, math.nan)
    train(small_run("name=run", ROLLBACK), [])
    assert_equal(weights("outputs/without"), weights("outputs/run"))
    for tag in ("train/loss", "val/loss"):
        assert scalars("outputs/without", tag) == scalars("outputs/run", tag)
    back = 4 if number == 5 else 0
    assert f"Step {number + 1} was not finite: back to step {back}, and on without batch {number}" in caplog.text
    (note,) = [line for line in history_of("run") if line["what"] == "rolled back"]
    assert (note["to_step"], note["left_out_batches"]) == (back, [number])
    assert json.loads(Path("outputs/run/metrics.json").read_text())["left_out_batches"] == [number]


def test_each_point_of_the_curves_stands_once_after_a_rollback(small_run, inject):
    inject({9}, math.nan)
    train(small_run("name=run", ROLLBACK), [])
    for tag, steps in (
        ("train/loss", range(1, 13)),
        ("schedule/planned", range(1, 13)),
        ("layers/gradient_norm/00", range(1, 13)),
        ("val/loss", range(0, 13, 4)),
        ("hp/val_loss", range(0, 13, 4)),
        ("by_tokens/val_loss", range(0, 3073, 1024)),
    ):
        assert [step for step, _ in scalars("outputs/run", tag)] == list(steps), tag


def test_a_batch_that_was_left_out_stays_out_when_the_run_goes_on(small_run, inject):
    inject({5, 9}, math.nan)
    horizon = "schedule.horizon_steps=12"
    train(small_run("name=whole", ROLLBACK, horizon), [])
    train(small_run("name=parts", ROLLBACK, horizon, "budget_tokens=2048"), [])
    train(small_run("name=parts", ROLLBACK, horizon), [])
    assert_equal(weights("outputs/whole"), weights("outputs/parts"))
    assert read_checkpoint(RunFolder(Path("outputs/parts")).checkpoints.marked()[-1])["left_out_batches"] == [5, 9]


def test_rollbacks_that_lead_nowhere_end(small_run, inject):
    inject(range(5, 100), math.nan)
    with pytest.raises(UserError, match="going back to step 4 was tried 3 times"):
        train(small_run("name=run", ROLLBACK), [])
    assert [line["what"] for line in history_of("run")] == ["began", *["rolled back", "went on"] * 3, "stopped"]


def test_a_signal_in_the_step_that_asks_for_a_rollback_is_not_lost(small_run, inject, monkeypatch, caplog):
    caplog.set_level("INFO")
    train(small_run("name=whole", ROLLBACK, "callbacks.log_every_steps=4"), [])
    inject({5}, math.nan)
    clip = LanguageModel._clip_gradients

    def clip_and_signal(module):
        if module.steps_done == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return clip(module)

    config = small_run("name=run", ROLLBACK, "callbacks.log_every_steps=4")
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "_clip_gradients", clip_and_signal)
        with pytest.raises(SystemExit) as stop:
            train(config, [])
    assert stop.value.code == 143
    assert "Step 6 was not finite. Stopped by SIGTERM; the same command goes on after step 4." in caplog.text
    train(small_run("name=run", ROLLBACK, "callbacks.log_every_steps=4"), [])
    assert read_checkpoint(RunFolder(Path("outputs/run")).checkpoints.marked()[-1])["left_out_batches"] == [5]


def test_a_signal_during_a_rollback_is_answered_after_the_next_step(small_run, inject, monkeypatch):
    inject({5}, math.nan)
    begin = RunFolder.begin

    def begin_and_signal(folder, config, overrides, resumed_step):
        begin(folder, config, overrides, resumed_step)
        if resumed_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunFolder, "begin", begin_and_signal)
    with pytest.raises(SystemExit) as stop:
        train(small_run("name=run", ROLLBACK), [])
    assert stop.value.code == 143
    state = read_checkpoint(RunFolder(Path("outputs/run")).checkpoints.marked()[-1])
    assert (state["steps_done"], state["left_out_batches"]) == (5, [5])


@pytest.mark.parametrize("number", [1, 5])  # before the first checkpoint, and behind it
def test_overwrite_erases_once_and_not_again_at_a_rollback(small_run, inject, number):
    foreign = Path("outputs/run/checkpoints/notes.txt")
    foreign.parent.mkdir(parents=True)
    foreign.touch()
    inject({number}, math.nan)
    train(small_run("name=run", ROLLBACK, "resume=overwrite"), [])
    assert scalars("outputs/run", "train/loss")[-1][0] == 12
    assert foreign.exists()


SPIKES = ("callbacks.guards.spike_window_steps=4",)


def test_a_loss_that_leaps_is_told(small_run, inject, caplog):
    inject({7}, 2.0)
    train(small_run("name=run", *SPIKES), [])
    assert "Step 8: its loss of" in caplog.text and "standard deviations above the running mean" in caplog.text
    assert caplog.text.count("standard deviations") == 1


def test_a_loss_that_leaps_may_be_rolled_back(small_run, inject, caplog):
    inject({9}, 2.0)
    train(small_run("name=run", *SPIKES, "callbacks.guards.loss_spike=rollback"), [])
    assert "a spike: back to step 8, and on without batch 9" in caplog.text
    assert max(value for _, value in scalars("outputs/run", "train/loss")) < 6


def test_a_loss_that_leaps_may_be_ignored(small_run, inject, caplog):
    inject({7}, 2.0)
    train(small_run("name=run", *SPIKES, "callbacks.guards.loss_spike=ignore"), [])
    assert "standard deviations" not in caplog.text


def test_the_monitor_is_an_exponentially_weighted_mean_and_variance():
    losses = np.random.default_rng(0).normal(3.0, 0.1, 400)
    monitor = LossMonitor(GuardsConfig(spike_window_steps=50, spike_deviations=1e9))
    for loss in losses:
        monitor.deviations(loss)
    weight = 2 / 51
    mean, variance = losses[0], 0.0
    for count, loss in enumerate(losses[1:], 2):
        here = max(weight, 1 / count)
        variance = (1 - here) * (variance + here * (loss - mean) ** 2)
        mean = (1 - here) * mean + here * loss
    assert monitor.mean == pytest.approx(mean)
    assert monitor.variance == pytest.approx(variance)
    assert math.sqrt(monitor.variance) == pytest.approx(0.1, rel=0.3)


def test_the_monitor_knows_a_spike_from_noise_and_from_a_falling_loss():
    monitor = LossMonitor(GuardsConfig())
    generator = np.random.default_rng(0)
    losses = 3 + 7 * np.exp(-np.arange(2000) / 100) + generator.normal(0, 0.05, 2000)
    assert max(monitor.deviations(loss) for loss in losses) < 6
    mean = monitor.mean
    assert monitor.deviations(5.0) > 6
    assert monitor.mean - mean < 0.02  # a spike hardly moves what later losses are measured by
    assert monitor.deviations(3.05) < 6


def test_a_constant_loss_does_not_spike_at_the_first_movement():
    monitor = LossMonitor(GuardsConfig(spike_window_steps=10))
    for _ in range(50):
        monitor.deviations(2.0)
    assert monitor.deviations(2.01) < 6 < monitor.deviations(2.5)
