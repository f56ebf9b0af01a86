"""Worker processes that read windows: order, death, and what they leave."""

import errno
import multiprocessing
import os
import pickle
import signal
from multiprocessing.process import BaseProcess

import pytest
import torch

from cucafera.data.windows import Batch
from cucafera.training.data_module import StepLoader

STEPS = 40


class Steps:
    """Batches that hold the number of their step."""

    def __getitem__(self, step: int) -> Batch:
        return Batch(torch.full((64, 512), step), torch.zeros(64, 512), None, (step,))  # more than a pipe takes


class UnreadableSteps(Steps):
    """Steps of which one cannot be read."""

    def __getitem__(self, step: int) -> Batch:
        if step == 5:
            raise OSError(errno.EIO, "Input/output error")
        return super().__getitem__(step)


def loader(workers: int, lost=pytest.fail, steps: Steps | None = None, first: int = 0) -> StepLoader:
    return StepLoader(steps or Steps(), range(first, STEPS), workers, False, lost)


def numbers(batches) -> list[int]:
    return [int(batch.input_ids[0, 0]) for batch in batches]


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_steps_come_in_their_order_from_any_number_of_workers(workers):
    batches = loader(workers, first=3)
    assert len(batches) == STEPS - 3
    assert numbers(batches) == list(range(3, STEPS))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("at", [0, 1, 7, STEPS - 1])
def test_after_the_death_of_a_worker_the_training_process_reads_the_same_steps(killed, at):
    reasons: list[str] = []
    batches = loader(2, reasons.append)
    seen = []
    for number, batch in enumerate(batches):
        if number == at:
            worker = batches._workers[killed].process
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()
        seen.append(int(batch.input_ids[0, 0]))
    assert seen == list(range(STEPS))
    expected = [f"the death of data loader worker {worker.pid} (SIGKILL; memory may have run out)"]
    assert reasons == (expected if at < STEPS - 1 else [])
    assert not multiprocessing.active_children()


def test_workers_ignore_the_signals_of_their_job():
    batches = loader(2)
    stream = iter(batches)
    first = next(stream)
    for worker in batches._workers:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(worker.process.pid, number)
    assert numbers([first, *stream]) == list(range(STEPS))


def test_a_loader_that_is_left_early_leaves_no_worker():
    batches = loader(2)
    stream = iter(batches)
    next(stream)
    assert len(multiprocessing.active_children()) == 2
    stream.close()
    assert not multiprocessing.active_children()


def test_what_a_worker_cannot_read_the_training_process_reports_as_its_own():
    stream = iter(loader(2, steps=UnreadableSteps()))
    assert numbers(next(stream) for _ in range(5)) == list(range(5))
    with pytest.raises(OSError, match="Input/output error"):
        next(stream)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("error", [OSError(errno.EAGAIN, "Resource temporarily unavailable"), MemoryError()])
def test_where_no_process_can_be_started_the_training_process_reads(monkeypatch, caplog, error):
    start = BaseProcess.start
    started = []

    def limited(process: BaseProcess) -> None:
        if started:
            raise error
        started.append(process)
        start(process)

    monkeypatch.setattr(BaseProcess, "start", limited)
    assert numbers(loader(2)) == list(range(STEPS))
    assert "trainer.num_workers=2: a process cannot be started" in caplog.text
    assert not multiprocessing.active_children()


def test_a_batch_is_sent_with_its_own_numbers_only():
    whole = torch.arange(1_000_000)
    from cucafera.training.data_module import _packed

    content = _packed(Batch(whole[:10], whole[10:20], None, (1,)))
    assert len(content) < 2000
    assert torch.equal(pickle.loads(content).input_ids, whole[:10])
