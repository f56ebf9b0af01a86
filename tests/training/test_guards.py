"""Guards: NaN, infinity and loss spikes, injected into complete runs."""

import json
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cucafera.config.command_line import composed_config
from cucafera.config.errors import UserError
from cucafera.config.schema import GuardsConfig
from cucafera.data.windows import TrainingSteps
from cucafera.model.transformer import Decoder
from cucafera.run import train
from cucafera.runs.checkpoints import read_checkpoint
from cucafera.runs.folder import RunFolder
from cucafera.training.callbacks.guards import Guards, LossMonitor
from cucafera.training.callbacks.interruption import Interruption
from cucafera.training.module import LanguageModel, StepRecord
from tests.support import assert_equal, scalars, weights

POISON = 9
"""An id that no text contains; it marks a batch to inject something into."""


@pytest.fixture
def inject(monkeypatch):
    """Multiply loss and gradients of the batches with these numbers by a factor."""

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
def test_a_nonfinite_update_is_not_applied(small_run, inject, caplog, factor):
    inject({5}, factor)
    train(small_run("name=run", "callbacks.checkpoint_every_steps=1", "callbacks.keep_last=12"), [])
    states = [read_checkpoint(path) for path in RunFolder(Path("outputs/run")).checkpoints.marked()]
    before, skipped, after = states[4:7]
    assert (before["steps_done"], skipped["steps_done"]) == (5, 6)
    assert_equal(before["state_dict"], skipped["state_dict"])
    for number, moments in before["optimizer_states"][0]["state"].items():
        assert_equal(moments, skipped["optimizer_states"][0]["state"][number])
    assert not torch.equal(skipped["state_dict"]["model.norm.weight"], after["state_dict"]["model.norm.weight"])
    assert all(value.isfinite().all() for value in states[-1]["state_dict"].values())
    assert "Step 6: loss" in caplog.text and "the update was not applied" in caplog.text
    assert [value for _, value in scalars("outputs/run", "train/skipped_updates")] == [1] * 7
    metrics = json.loads(Path("outputs/run/metrics.json").read_text(), parse_constant=pytest.fail)
    assert metrics["skipped_updates"] == 1
    assert "not applied: 1 of the steps" in Path("outputs/run/report.md").read_text()


def test_a_nonfinite_last_step_leaves_metrics_in_standard_json(small_run, inject):
    inject({11}, math.nan)
    train(small_run("name=run"), [])
    metrics = json.loads(Path("outputs/run/metrics.json").read_text(), parse_constant=pytest.fail)
    assert metrics["train_loss"] is None and math.isfinite(metrics["validation"][-1]["loss"])
    assert "not finite" in Path("outputs/run/report.md").read_text()


def test_steps_between_two_log_steps_are_checked_too(small_run, inject, caplog):
    inject({4, 6}, math.nan)
    train(small_run("name=run", "callbacks.log_every_steps=4"), [])
    assert "Step 5: loss nan" in caplog.text and "Step 7: loss nan" in caplog.text
    assert scalars("outputs/run", "train/skipped_updates") == [(8, 2), (12, 2)]


def test_too_many_consecutive_nonfinite_updates_stop_the_run(small_run, inject):
    inject(range(5, 12), math.nan)
    with pytest.raises(
        UserError, match=r"found 4 consecutive non-finite updates; none was applied.*resume_allow_changed"
    ):
        train(small_run("name=run"), [])
    newest = RunFolder(Path("outputs/run")).checkpoints.complete()[-1]
    assert newest.step == 8
    note = history_of("run")[-1]
    assert (note["event"], note["saved_step"]) == ("stopped", 8) and "4 consecutive non-finite updates" in note[
        "reason"
    ]
    assert all(value.isfinite().all() for value in read_checkpoint(newest.path)["state_dict"].values())


def test_a_diverged_model_writes_no_samples_and_stops(small_run):
    with pytest.raises(UserError, match="found 4 consecutive non-finite updates"):
        train(small_run("name=run", "optimizer.lr=1e9", "schedule.warmup_steps=0"), [])


def test_consecutive_nonfinite_updates_are_counted_across_a_resume(small_run, inject):
    inject(range(6, 12), math.nan)
    horizon = "schedule.horizon_steps=12"
    train(small_run("name=run", horizon, "budget_tokens=2048"), [])
    with pytest.raises(UserError, match="4 consecutive non-finite updates"):
        train(small_run("name=run", horizon), [])


def test_skipped_updates_that_are_not_consecutive_do_not_stop_the_run(small_run, inject):
    inject({3, 4, 5, 7, 8, 9}, math.nan)  # three and three, with one between them
    train(small_run("name=run", "callbacks.log_every_steps=12"), [])
    assert json.loads(Path("outputs/run/metrics.json").read_text())["skipped_updates"] == 6


def test_the_policy_stop_stops_at_the_first_nonfinite_update(small_run, inject):
    inject({5}, math.nan)
    with pytest.raises(UserError, match="found a non-finite update at step 6"):
        train(small_run("name=run", "callbacks.guards.non_finite=stop"), [])


ROLLBACK = "callbacks.guards.non_finite=rollback"


@pytest.mark.parametrize("number", [1, 5])  # before the first checkpoint, and after it
def test_a_rollback_skips_the_batch_as_if_it_had_never_existed(small_run, inject, monkeypatch, caplog, number):
    with monkeypatch.context() as patch:
        patch.setattr(TrainingSteps, "batch_at", lambda steps, step: step + (step >= number))
        train(small_run("name=without"), [])
    inject({number}, math.nan)
    train(small_run("name=run", ROLLBACK), [])
    assert_equal(weights("outputs/without"), weights("outputs/run"))
    for tag in ("loss/train", "loss/val"):
        assert scalars("outputs/without", tag) == scalars("outputs/run", tag)
    back = 4 if number == 5 else 0
    assert (
        f"Found a non-finite update at step {number + 1}: rolling back to step {back}, skipping batch {number}"
        in caplog.text
    )
    (note,) = [line for line in history_of("run") if line["event"] == "rolled back"]
    assert (note["to_step"], note["skipped_batches"]) == (back, [number])
    assert json.loads(Path("outputs/run/metrics.json").read_text())["skipped_batches"] == [number]


def test_a_cooldown_rolls_back_to_the_checkpoint_that_it_began_with(small_run, inject, caplog):
    train(small_run("name=run", "schedule=constant"), [])
    inject({13}, math.nan)
    config = composed_config(["+experiment=cooldown", "init_from=outputs/run", "schedule.cooldown_steps=3", ROLLBACK])
    train(config, [])
    assert "Found a non-finite update at step 14: rolling back to step 12, skipping batch 13" in caplog.text
    assert RunFolder(Path("outputs/run-cooldown")).read_metrics()["skipped_batches"] == [13]
    assert [step for step, _ in scalars("outputs/run-cooldown", "loss/train")] == [13, 14, 15]


def test_each_point_of_the_curves_is_unique_after_a_rollback(small_run, inject):
    inject({9}, math.nan)
    train(small_run("name=run", ROLLBACK), [])
    for tag, steps in (
        ("loss/train", range(1, 13)),
        ("per_layer/gradient_norm/00", range(1, 13)),
        ("loss/val", range(0, 13, 4)),
        ("loss/val_by_tokens", range(0, 3073, 1024)),
    ):
        assert [step for step, _ in scalars("outputs/run", tag)] == list(steps), tag


def test_a_skipped_batch_stays_skipped_when_the_run_is_resumed(small_run, inject):
    inject({5, 9}, math.nan)
    horizon = "schedule.horizon_steps=12"
    train(small_run("name=whole", ROLLBACK, horizon), [])
    train(small_run("name=parts", ROLLBACK, horizon, "budget_tokens=2048"), [])
    train(small_run("name=parts", ROLLBACK, horizon), [])
    assert_equal(weights("outputs/whole"), weights("outputs/parts"))
    assert read_checkpoint(RunFolder(Path("outputs/parts")).checkpoints.marked()[-1])["skipped_batches"] == [5, 9]


def test_repeated_rollbacks_to_one_step_stop_the_run(small_run, inject):
    inject(range(5, 100), math.nan)
    with pytest.raises(UserError, match="3 rollbacks to step 4 did not help"):
        train(small_run("name=run", ROLLBACK), [])
    sessions = ["started", "first checkpoint", *["rolled back", "resumed"] * 3, "stopped"]
    assert [line["event"] for line in history_of("run")] == sessions


def test_a_signal_in_the_step_that_requests_a_rollback_is_not_lost(small_run, inject, monkeypatch, caplog):
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
    assert (
        "Found a non-finite update at step 6. Stopped by SIGTERM. Run the same command again to resume after step 4."
        in caplog.text
    )
    train(small_run("name=run", ROLLBACK, "callbacks.log_every_steps=4"), [])
    assert read_checkpoint(RunFolder(Path("outputs/run")).checkpoints.marked()[-1])["skipped_batches"] == [5]


def test_a_signal_during_a_rollback_is_handled_after_the_next_step(small_run, inject, monkeypatch):
    inject({5}, math.nan)
    begin = RunFolder.begin

    def begin_and_signal(folder, config, overrides, hardware, resumed):
        begin(folder, config, overrides, hardware, resumed)
        if resumed is not None and resumed.state["steps_done"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunFolder, "begin", begin_and_signal)
    with pytest.raises(SystemExit) as stop:
        train(small_run("name=run", ROLLBACK), [])
    assert stop.value.code == 143
    state = read_checkpoint(RunFolder(Path("outputs/run")).checkpoints.marked()[-1])
    assert (state["steps_done"], state["skipped_batches"]) == (5, [5])


@pytest.mark.parametrize("number", [1, 5])  # before the first checkpoint, and after it
def test_resume_overwrite_erases_once_and_not_again_at_a_rollback(small_run, inject, number):
    foreign = Path("outputs/run/checkpoints/notes.txt")
    foreign.parent.mkdir(parents=True)
    foreign.touch()
    inject({number}, math.nan)
    train(small_run("name=run", ROLLBACK, "resume=overwrite"), [])
    assert scalars("outputs/run", "loss/train")[-1][0] == 12
    assert foreign.exists()


SPIKES = ("callbacks.guards.spike_window_steps=4",)


def test_a_loss_spike_is_reported(small_run, inject, caplog):
    inject({7}, 2.0)
    train(small_run("name=run", *SPIKES), [])
    assert "Step 8: its loss of" in caplog.text and "standard deviations above the running mean" in caplog.text
    assert caplog.text.count("standard deviations") == 1


def test_a_loss_spike_can_be_rolled_back(small_run, inject, caplog):
    inject({9}, 2.0)
    train(small_run("name=run", *SPIKES, "callbacks.guards.loss_spike=rollback"), [])
    assert "Found a loss spike, " in caplog.text
    assert "at step 10: rolling back to step 8, skipping batch 9" in caplog.text
    assert max(value for _, value in scalars("outputs/run", "loss/train")) < 6


def test_a_loss_spike_can_be_ignored(small_run, inject, caplog):
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
        share = max(weight, 1 / count)
        variance = (1 - share) * (variance + share * (loss - mean) ** 2)
        mean = (1 - share) * mean + share * loss
    assert monitor.mean == pytest.approx(mean)
    assert monitor.variance == pytest.approx(variance)
    assert math.sqrt(monitor.variance) == pytest.approx(0.1, rel=0.3)


def test_the_monitor_distinguishes_a_spike_from_noise_and_a_falling_loss():
    monitor = LossMonitor(GuardsConfig())
    generator = np.random.default_rng(0)
    losses = 3 + 7 * np.exp(-np.arange(2000) / 100) + generator.normal(0, 0.05, 2000)
    assert max(monitor.deviations(loss) for loss in losses) < 6
    mean = monitor.mean
    assert monitor.deviations(5.0) > 6
    assert monitor.mean - mean < 0.02  # a spike hardly moves the mean
    assert monitor.deviations(3.05) < 6


def test_spikes_are_found_from_the_end_of_the_first_window_on():
    for steps in (9, 10):
        monitor = LossMonitor(GuardsConfig(spike_window_steps=10))
        for _ in range(steps):
            monitor.deviations(2.0)
        assert (monitor.deviations(9.0) > 6) == (steps == 10)


def test_a_loss_that_falls_at_once_is_no_spike():
    monitor = LossMonitor(GuardsConfig(spike_window_steps=10))
    for _ in range(50):
        monitor.deviations(5.0)
    assert monitor.deviations(1.0) < 0


def test_one_spike_does_not_hide_the_next():
    monitor = LossMonitor(GuardsConfig(spike_window_steps=10))
    for _ in range(50):
        monitor.deviations(5.0)
    assert monitor.deviations(1e6) > 6
    assert monitor.mean == pytest.approx(5.0 + 2 / 11 * 6 * 0.05) and monitor.deviations(8.0) > 6


def test_a_nonfinite_loss_leaves_the_monitor_as_it_was(small_run, inject, caplog):
    inject({4}, math.nan)
    train(small_run("name=run", *SPIKES), [])
    state = read_checkpoint(RunFolder(Path("outputs/run")).checkpoints.marked()[-1])
    guards = next(value for key, value in state["callbacks"].items() if "monitor" in value)
    assert math.isfinite(guards["monitor"]["mean"]) and guards["monitor"]["steps"] == 11


def test_the_monitor_of_the_loss_survives_a_resume(small_run, inject, caplog):
    inject({9}, 2.0)  # the second step of the next session: a new monitor would have seen one loss
    horizon = "schedule.horizon_steps=12"
    train(small_run("name=run", horizon, "budget_tokens=2048", *SPIKES), [])
    train(small_run("name=run", horizon, *SPIKES), [])
    assert "Step 10: its loss of" in caplog.text


def test_the_state_of_the_guards_is_complete(small_run):
    config = small_run(*SPIKES)
    guards, restored = (Guards(config, Interruption(config, 0.0), []) for _ in range(2))
    for number, loss in enumerate([5.0, 4.0, 4.5, 4.25, 4.0, 4.1], 1):
        guards._check(SimpleNamespace(is_global_zero=True), [StepRecord(number, loss, 1.0, applied=number != 6)])
    state = guards.state_dict()
    assert (state["skipped_updates"], state["consecutive_skips"], state["monitor"]["steps"]) == (1, 1, 5)
    restored.load_state_dict(state)
    assert restored.state_dict() == state
    assert restored.skipped_updates == 1 and restored.monitor.deviations(9.0) == guards.monitor.deviations(9.0) > 6


def test_a_constant_loss_does_not_spike_at_its_first_change():
    monitor = LossMonitor(GuardsConfig(spike_window_steps=10))
    for _ in range(50):
        monitor.deviations(2.0)
    assert monitor.deviations(2.01) < 6 < monitor.deviations(2.5)
