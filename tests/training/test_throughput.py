"""The values of speed, MFU and waiting, of the curves and of the report, with a clock that the test moves."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cucafera.config.command_line import composed_config
from cucafera.model.flops import training_flops_per_token
from cucafera.training.callbacks import throughput as module_of_callback
from cucafera.training.callbacks.throughput import Throughput, peak_memory_bytes
from cucafera.training.hardware import decide_hardware
from cucafera.training.module import StepRecord
from cucafera.training.results import collect_metrics

BATCH, PEAK, DEVICES = 2048, 1e9, 2
CONFIG = composed_config(
    ["trainer=cpu", f"batch_tokens={BATCH}", f"budget_tokens={10 * BATCH}", "schedule.warmup_steps=0",
     "callbacks.log_every_steps=4", "callbacks.validate_every_steps=0", "callbacks.checkpoint_every_steps=0"]
)  # fmt: skip
HARDWARE = dataclasses.replace(decide_hardware(CONFIG), world_size=DEVICES, peak_flops=PEAK)
FLOPS = training_flops_per_token(CONFIG.model, CONFIG.sequence_length)


class Session:
    """The callback in a session of a run, with a clock in place of work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(module_of_callback, "time", SimpleNamespace(perf_counter=lambda: self.now))
        self.guards = SimpleNamespace(latest=StepRecord(0, 5.0, 1.0, True), skipped_updates=0, skipped_batches=[])
        self.callback = Throughput(CONFIG, HARDWARE, self.guards)
        self.logged: list[tuple[int, dict[str, float]]] = []
        logger = SimpleNamespace(log_metrics=lambda values, step: self.logged.append((step, dict(values))))
        data = SimpleNamespace(left_out=[], describe=lambda: "", epochs_at=lambda step: step / 5)
        self.trainer = SimpleNamespace(
            is_global_zero=True,
            loggers=[logger],
            datamodule=SimpleNamespace(data=data),
            optimizers=[SimpleNamespace(param_groups=[{"name": "matrices", "lr": 0.25}, {"lr": 0.5}])],
        )
        self.module = SimpleNamespace(steps_done=0, other_hooks_done_at=0.0, device=torch.device("cpu"))

    def begin(self, validation: float) -> None:
        """Start, with a validation before the first step."""
        self.callback.on_session_start(self.trainer, self.module)
        self.now += validation
        self.module.other_hooks_done_at = self.now

    def step(self, waiting: float, computing: float, others: float = 0.0) -> None:
        """Take a step: wait for its data, compute, and then validate, sample and save."""
        self.now += waiting
        self.callback.on_step_start(self.trainer, self.module)
        self.now += computing
        self.module.steps_done += 1
        self.guards.latest = StepRecord(self.module.steps_done, 5.0 - self.module.steps_done / 10, 1.5, True)
        self.callback.on_step_end(self.trainer, self.module)
        self.now += others
        self.module.other_hooks_done_at = self.now


@pytest.fixture
def session(monkeypatch) -> Session:
    """Ten steps: four of 2 seconds, four of 4, two of 5, with long validations between them."""
    session = Session(monkeypatch)
    session.begin(validation=100.0)
    for number in range(4):
        session.step(waiting=0.5, computing=1.5, others=50.0 if number in (1, 3) else 0.0)
    for _ in range(4):
        session.step(waiting=1.0, computing=3.0, others=7.0)
    for _ in range(2):
        session.step(waiting=0.0, computing=5.0, others=60.0)
    return session


def test_tokens_per_second_are_those_of_the_steps_since_the_last_log_without_validation(session):
    assert [step for step, _ in session.logged] == [4, 8, 10]
    speeds = [values["speed/tokens_per_second"] for _, values in session.logged]
    assert speeds == pytest.approx([BATCH / 2, BATCH / 4, BATCH / 5])
    assert [values["speed/data_wait"] for _, values in session.logged] == pytest.approx([0.25, 0.25, 0.0])


def test_mfu_is_the_share_of_the_peak_of_all_devices(session):
    speeds = [BATCH / 2, BATCH / 4, BATCH / 5]
    expected = [FLOPS * speed / (DEVICES * PEAK) for speed in speeds]
    assert [values["speed/mfu"] for _, values in session.logged] == pytest.approx(expected)


def test_the_other_curves_are_those_of_the_step(session):
    step, values = session.logged[1]
    assert values["loss/train"] == pytest.approx(5.0 - step / 10)
    assert (values["train/tokens"], values["train/epoch"]) == (8 * BATCH, 8 / 5)
    assert (values["train/lr/matrices"], values["train/lr/1"]) == (0.25, 0.5)


def test_a_resumed_session_adds_its_time_and_not_the_time_between(session, monkeypatch):
    assert session.callback.training_seconds == pytest.approx(4 * 2 + 4 * 4 + 2 * 5)
    assert session.callback.waiting_seconds == pytest.approx(4 * 0.5 + 4 * 1.0)
    resumed = Session(monkeypatch)
    resumed.callback.load_state_dict(session.callback.state_dict())
    assert resumed.callback.latest == session.callback.latest
    resumed.module.steps_done = 8
    resumed.begin(validation=0.0)
    for _ in range(2):
        resumed.step(waiting=0.25, computing=0.75)
    assert resumed.logged[0][1]["speed/tokens_per_second"] == pytest.approx(BATCH)
    assert resumed.callback.training_seconds == pytest.approx(34 + 2)
    assert resumed.callback.waiting_seconds == pytest.approx(6 + 0.5)


def test_the_report_has_the_speed_of_the_whole_run_and_its_share_of_all_devices(session):
    history = [{"step": 0, "tokens": 0, "bpb": 4.0}, {"step": 5, "tokens": 5 * BATCH, "bpb": 2.0},
               {"step": 10, "tokens": 10 * BATCH, "bpb": 3.0}]  # fmt: skip
    callbacks = SimpleNamespace(
        guards=session.guards, throughput=session.callback, validation=SimpleNamespace(history=history),
        samples=SimpleNamespace(latest=[], answers=[]), answers=SimpleNamespace(warnings=[]),
    )  # fmt: skip
    metrics = collect_metrics(CONFIG, HARDWARE, callbacks)
    speed = 10 * BATCH / 34
    assert (metrics["steps"], metrics["tokens"], metrics["training_seconds"]) == (10, 10 * BATCH, pytest.approx(34))
    assert metrics["tokens_per_second"] == pytest.approx(speed)
    assert metrics["mfu"] == pytest.approx(FLOPS * speed / (DEVICES * PEAK))
    assert metrics["data_wait"] == pytest.approx(6 / 34)
    assert (metrics["train_loss"], metrics["best_bpb"]) == (pytest.approx(4.0), 2.0)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc of Linux")
def test_the_peak_of_memory_is_that_of_the_process_in_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    assert peak_memory_bytes(torch.device("cpu")) == pytest.approx(1024 * kilobytes, rel=0.1)
