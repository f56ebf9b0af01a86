"""TensorBoard event files: full disks, kills and resumes."""

import errno
import os
import subprocess
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.summary_pb2 import Summary

from cucafera.runs.folder import EVENTS
from cucafera.training import events
from cucafera.training.events import EventLogger


def scalars(folder: Path, tag: str = "x") -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def full(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_curves_wait_for_a_full_disk_and_are_complete_afterwards(tmp_path, monkeypatch, caplog):
    logger = EventLogger(tmp_path, 0)
    for step in range(1, 10):
        logger.log_metrics({"x": step}, step)
        with monkeypatch.context() as patch:
            if 3 <= step <= 6:
                patch.setattr(os, "fsync", full)
            logger.save()
        if step == 6:
            assert scalars(tmp_path) == [(1, 1.0), (2, 2.0)]
    assert scalars(tmp_path) == [(step, float(step)) for step in range(1, 10)]
    assert caplog.text.count("cannot be written: No space left on device. The curves wait in memory") == 1


def test_declarations_of_a_session_replace_those_of_the_previous_one(tmp_path, monkeypatch):
    first = EventLogger(tmp_path, 0)
    first.declare(Summary(value=[Summary.Value(tag="declared", simple_value=1)]))
    first.log_metrics({"x": 1}, 1)
    first.save()
    second = EventLogger(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        second.declare(Summary(value=[Summary.Value(tag="declared", simple_value=2)]))
    second.log_metrics({"x": 2}, 2)
    second.save()
    assert scalars(tmp_path, "declared") == [(0, 2.0)]
    assert scalars(tmp_path) == [(1, 1.0), (2, 2.0)]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a disk")
def test_a_mounted_disk_that_is_full_keeps_complete_records(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not permitted")
    try:
        logger = EventLogger(disk, 0)
        for step in range(1, 1001):
            logger.log_metrics({"x": step}, step)
            if step % 10 == 0:
                logger.save()
        assert 0 < len(scalars(disk)) < 1000
        subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
        logger.save()
        assert scalars(disk) == [(step, float(step)) for step in range(1, 1001)]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_curves_that_could_never_be_written_are_reported_at_the_end(tmp_path, monkeypatch, caplog):
    logger = EventLogger(tmp_path, 0)
    logger.log_metrics({"x": 1}, 1)
    monkeypatch.setattr(os, "fsync", full)
    logger.finalize("failed")
    assert "the curves since it could last be written are lost" in caplog.text


def test_points_after_the_last_checkpoint_of_a_killed_process_are_dropped(tmp_path):
    killed = EventLogger(tmp_path, 0)
    for step in range(1, 8):
        killed.log_metrics({"x": step}, step)
    killed.save()
    resumed = EventLogger(tmp_path, 5)
    for step in range(6, 10):
        resumed.log_metrics({"x": 10 * step}, step)
    resumed.save()
    assert scalars(tmp_path) == [*((step, float(step)) for step in range(1, 6)), *((s, 10.0 * s) for s in range(6, 10))]


def test_files_stay_in_order_when_the_clock_of_the_next_machine_is_behind(tmp_path, monkeypatch):
    for start, now in ((0, 2_000_000_000), (3, 1_000_000_000), (5, 1_500_000_000)):
        monkeypatch.setattr(events.time, "time_ns", lambda now=now: now * 10**9)
        logger = EventLogger(tmp_path, start)
        for step in range(start + 1, start + 5):
            logger.log_metrics({"x": step}, step)
        logger.save()
    assert [step for step, _ in scalars(tmp_path)] == list(range(1, 10))
    assert len(list(tmp_path.glob(EVENTS + "*"))) == 3


@pytest.mark.parametrize("cut", [1, 10, 100])
def test_a_file_truncated_by_a_crash_does_not_hide_later_events(tmp_path, cut):
    logger = EventLogger(tmp_path, 0)
    for step in range(1, 8):
        logger.log_metrics({"x": step}, step)
    logger.save()
    (path,) = tmp_path.glob(EVENTS + "*")
    os.truncate(path, path.stat().st_size - cut)
    resumed = EventLogger(tmp_path, 4)
    for step in range(5, 10):
        resumed.log_metrics({"x": step}, step)
    resumed.save()
    assert [step for step, _ in scalars(tmp_path)] == list(range(1, 10))
