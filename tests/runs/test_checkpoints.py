"""Checkpoint files: markers, checksums, what is kept, and writing during training."""

import errno
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from cucafera.runs import checkpoints
from cucafera.runs.checkpoints import (
    CheckpointError,
    CheckpointFolder,
    DamagedCheckpointError,
    Score,
    read_checkpoint,
    read_marker,
)
from cucafera.training.checkpoint_writer import CheckpointWriter


def state_of(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "config": {"name": "x"},
        "fingerprints": {"tokenizer": "t"},
        "steps_done": step,
        "state_dict": {"weight": torch.randn(50, 20, generator=generator)},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(float(step))}}}],
    }


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints")


def writer_of(folder: CheckpointFolder, keep_last: int = 2, keep_every_steps: int = 0, memory: int = 1 << 40):
    return CheckpointWriter(folder, None, keep_last, keep_every_steps, lambda: memory)


def steps_in(folder: CheckpointFolder) -> list[int]:
    return [checkpoint.step for checkpoint in folder.complete()]


def test_a_checkpoint_and_its_marker_are_read_back_as_written(folder):
    folder.write(3, state_of(3), Score("loss", 1.5, "lower"))
    read = read_checkpoint(folder.file_at(3))
    assert torch.equal(read["state_dict"]["weight"], state_of(3)["state_dict"]["weight"])
    marker = read_marker(folder.file_at(3))
    assert (marker.step, marker.size) == (3, folder.file_at(3).stat().st_size)
    assert marker.score == Score("loss", 1.5, "lower")


def test_the_checksum_in_the_marker_is_the_sha256_of_the_file(folder):
    import hashlib

    folder.write(3, state_of(3), None)
    assert read_marker(folder.file_at(3)).sha256 == hashlib.sha256(folder.file_at(3).read_bytes()).hexdigest()


def test_every_flipped_bit_and_truncation_of_a_checkpoint_is_detected(folder):
    folder.write(3, state_of(3), None)
    path = folder.file_at(3)
    content, marker = path.read_bytes(), path.with_suffix(".json").read_bytes()
    rng = random.Random(0)
    for file, written in ((path, content), (path.with_suffix(".json"), marker)):
        for _ in range(100):
            changed = bytearray(written)
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            file.write_bytes(changed)
            with pytest.raises(CheckpointError, match="damaged"):
                read_checkpoint(path)
            file.write_bytes(written[: rng.randrange(len(written))])
            with pytest.raises(CheckpointError, match="damaged"):
                read_checkpoint(path)
        file.write_bytes(written)
    read_checkpoint(path)


def test_a_read_error_is_not_reported_as_damage(folder, monkeypatch):
    folder.write(3, state_of(3), None)

    def broken_disk(path):
        raise OSError(errno.EIO, "Input/output error")

    def no_memory(*arguments, **settings):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    for owner, name, fails in ((checkpoints, "file_sha256", broken_disk), (torch, "load", no_memory)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            with pytest.raises(CheckpointError, match=r"cannot be read: .*Fix that") as caught:
                read_checkpoint(folder.file_at(3))
            assert not isinstance(caught.value, DamagedCheckpointError)


def test_a_non_finite_validation_is_never_the_best(folder):
    for step, loss in ((1, float("nan")), (2, 3.0), (3, 2.0), (4, float("inf"))):
        folder.write(step, state_of(step), Score("loss", loss, "lower"))
    best = folder.best()
    assert best is not None and best.step == 3


@pytest.mark.parametrize(("direction", "step"), [("lower", 2), ("higher", 3)])
def test_the_best_checkpoint_follows_the_direction_of_its_metric(folder, direction, step):
    for number, value in ((1, 0.5), (2, 0.25), (3, 0.75), (4, 0.25), (5, 0.75)):
        folder.write(number, state_of(number), Score("accuracy", value, direction))
    folder.write(6, state_of(6), None)
    best = folder.best()
    assert best is not None and best.step == step


def test_a_failed_removal_of_old_checkpoints_does_not_fail_the_new_one(folder, monkeypatch, caplog):
    writer = writer_of(folder, keep_last=1)
    writer.save_checkpoint(state_of(1), None, None)
    writer.finish()

    def forbidden(path, **options):
        raise OSError(errno.EPERM, "Operation not permitted")

    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda p, **o: forbidden(p) if "00000001" in p.name else unlink(p, **o))
    writer.save_checkpoint(state_of(2), None, None)
    writer.finish()
    assert "cannot be removed: Operation not permitted" in caplog.text
    assert writer.saved_step == 2 and writer.failure is None


def test_a_checkpoint_without_a_marker_is_incomplete_and_refused(folder):
    folder.write(3, state_of(3), None)
    folder.file_at(3).with_suffix(".json").unlink()
    assert folder.complete() == []
    assert folder.unmarked() == [folder.file_at(3)]
    with pytest.raises(CheckpointError, match=r"its marker step-00000003\.json is missing, so it was never completed"):
        read_checkpoint(folder.file_at(3))


def test_a_marker_of_another_format_version_is_refused(folder, monkeypatch):
    folder.write(3, state_of(3), None)
    monkeypatch.setattr(checkpoints, "VERSION", 7)
    with pytest.raises(CheckpointError, match="its format is 2, and this version of cucafera reads 7"):
        read_checkpoint(folder.file_at(3))


class Executed:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def test_a_checkpoint_renamed_to_another_step_is_refused(folder):
    folder.write(3, state_of(3), None)
    for ending in (".ckpt", ".json"):
        folder.file_at(3).with_suffix(ending).rename(folder.file_at(5).with_suffix(ending))
    assert folder.complete() == []
    with pytest.raises(DamagedCheckpointError, match="it is the marker of step 3"):
        read_checkpoint(folder.file_at(5))


def test_nothing_in_a_checkpoint_is_executed(folder, tmp_path):
    folder.write(3, {**state_of(3), "hostile": Executed(str(tmp_path / "executed"))}, None)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(folder.file_at(3))
    assert not (tmp_path / "executed").exists()


def test_a_file_that_is_not_a_checkpoint_of_cucafera_is_refused(folder):
    folder.write(3, {"weights": torch.ones(3)}, None)
    with pytest.raises(CheckpointError, match="it has no config, fingerprints, state_dict, steps_done"):
        read_checkpoint(folder.file_at(3))


def test_the_last_the_best_and_every_nth_checkpoint_are_kept(folder):
    writer = writer_of(folder, keep_last=2, keep_every_steps=40)
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: 2.5, 50: 2.4, 60: 2.3, 70: 2.2}
    for step, loss in losses.items():
        writer.save_checkpoint(state_of(step), None, {"metric": "loss", "value": loss, "direction": "lower"})
        writer.finish()
    assert steps_in(folder) == [20, 40, 60, 70]
    best = folder.best()
    assert best is not None and best.step == 20


def test_checkpoints_after_the_resumed_step_do_not_displace_the_newest(folder):
    folder.write(90, state_of(90), None)
    writer = writer_of(folder, keep_last=1)
    for step in (10, 20):
        writer.save_checkpoint(state_of(step), None, None)
        writer.finish()
    assert steps_in(folder) == [20, 90]
    folder.remove_after(20)
    assert steps_in(folder) == [20]


def test_the_removal_of_markers_is_on_disk_before_that_of_their_checkpoints(folder, disk_calls):
    for step in (1, 2, 3):
        folder.write(step, state_of(step), None)
    disk_calls.clear()
    folder.remove_old(3, keep_last=1, keep_every_steps=0)
    assert disk_calls == [
        "unlink step-00000001.json", "unlink step-00000002.json", "fsync checkpoints",
        "unlink step-00000001.ckpt", "unlink step-00000002.ckpt",
    ]  # fmt: skip
    disk_calls.clear()
    folder.remove_all()
    assert disk_calls == ["unlink step-00000003.json", "fsync checkpoints", "unlink step-00000003.ckpt"]


WRITTEN = [
    "fsync step-00000003.ckpt.partial", "rename step-00000003.ckpt.partial step-00000003.ckpt", "fsync checkpoints",
    "fsync step-00000003.json.partial", "rename step-00000003.json.partial step-00000003.json", "fsync checkpoints",
]  # fmt: skip


def test_a_marker_is_written_when_its_checkpoint_is_on_disk_and_removed_before_it_changes(folder, disk_calls):
    folder.write(3, state_of(3), None)
    assert disk_calls == WRITTEN
    assert disk_calls.synced["step-00000003.ckpt.partial"] == folder.file_at(3).stat().st_size
    disk_calls.clear()
    folder.write(3, state_of(4) | {"steps_done": 3}, None)
    removed = ["unlink step-00000003.json", "fsync checkpoints", "unlink step-00000003.ckpt"]
    assert disk_calls == [*removed, *WRITTEN]


def test_a_run_resumes_from_the_newest_and_removes_only_what_is_later(folder):
    assert folder.newest_step() == 0
    for step in (4, 8, 12):
        folder.write(step, state_of(step), None)
    assert folder.newest_step() == 12
    folder.remove_after(8)
    assert (steps_in(folder), folder.newest_step()) == ([4, 8], 8)
    folder.file_at(8).with_suffix(".json").unlink()
    assert folder.newest_step() == 4
    folder.remove_after(8)
    assert not folder.file_at(8).exists()


def test_training_can_change_the_weights_while_a_checkpoint_is_written(folder, monkeypatch):
    may_write = threading.Event()
    write = CheckpointFolder.write

    def write_later(*arguments):
        may_write.wait(10)
        write(*arguments)

    monkeypatch.setattr(CheckpointFolder, "write", write_later)
    writer, state = writer_of(folder), state_of(3)
    history = state["history"] = [1]
    writer.save_checkpoint(state, None, None)
    state["state_dict"]["weight"].zero_()
    history.append(2)
    may_write.set()
    writer.finish()
    read = read_checkpoint(folder.file_at(3))
    assert torch.equal(read["state_dict"]["weight"], state_of(3)["state_dict"]["weight"])
    assert read["history"] == [1]


def test_a_save_waits_for_the_one_before_whose_memory_it_takes(folder, monkeypatch):
    written = []
    may_write = threading.Event()
    write = CheckpointFolder.write

    def slow_write(folder, step, state, score):
        may_write.wait(10)
        write(folder, step, state, score)
        written.append(step)

    monkeypatch.setattr(CheckpointFolder, "write", slow_write)
    writer = writer_of(folder)
    writer.save_checkpoint(state_of(1), None, None)
    threading.Timer(0.1, may_write.set).start()
    writer.save_checkpoint(state_of(2), None, None)
    assert written == [1]
    writer.finish()
    assert written == [1, 2]
    for step in (1, 2):
        assert torch.equal(
            read_checkpoint(folder.file_at(step))["state_dict"]["weight"], state_of(step)["state_dict"]["weight"]
        )


def test_a_tensor_that_changed_its_shape_or_dtype_is_copied_as_it_is_now(folder):
    writer = writer_of(folder)
    tensors = [torch.arange(6.0), torch.arange(4.0), torch.arange(4).to(torch.int32), torch.ones(2, 2)]
    for step, tensor in enumerate(tensors, 1):
        writer.save_checkpoint(state_of(step) | {"extra": tensor}, None, None)
        writer.finish()
        read = read_checkpoint(folder.file_at(step))["extra"]
        assert torch.equal(read, tensor) and read.dtype == tensor.dtype


def test_a_tenth_of_the_free_memory_stays_free(folder):
    state = {**state_of(1), "large": torch.zeros(1000, dtype=torch.float64)}
    size = 8000 + 4000 + 4
    free = {"enough": int(size / 0.9) + 1, "too little": int(size / 0.9) - 1}
    for name, memory in free.items():
        assert writer_of(folder, memory=memory)._has_room_for_copy(state) == (name == "enough")
    writer = writer_of(folder, memory=free["enough"])
    writer.save_checkpoint(state, None, None)
    writer.finish()
    writer.free_memory = lambda: 0  # the memory of the first copy is used again
    assert writer._has_room_for_copy(state)


def test_the_next_save_reuses_the_memory_of_the_copy(folder):
    writer = writer_of(folder)
    for step in (1, 2):
        writer.save_checkpoint(state_of(step), None, None)
    writer.finish()
    for step in (1, 2):
        assert torch.equal(
            read_checkpoint(folder.file_at(step))["state_dict"]["weight"], state_of(step)["state_dict"]["weight"]
        )


def test_without_memory_for_a_copy_training_waits_for_the_disk(folder, monkeypatch):
    threads = []
    write = CheckpointFolder.write
    monkeypatch.setattr(
        CheckpointFolder, "write", lambda *a: (threads.append(threading.current_thread().name), write(*a))
    )
    writer_of(folder, memory=100).save_checkpoint(state_of(1), None, None)
    assert threads == [threading.main_thread().name]
    assert steps_in(folder) == [1]


@pytest.mark.parametrize("at_byte", [0, 3000])
def test_a_full_disk_is_logged_keeps_earlier_checkpoints_and_is_retried(folder, monkeypatch, caplog, at_byte):
    writer = writer_of(folder)
    writer.save_checkpoint(state_of(1), None, None)
    writer.finish()
    write = checkpoints._HashedFile.write

    def full(file, content):
        if file.size >= at_byte:
            file.error = OSError(errno.ENOSPC, "No space left on device")
            raise file.error
        return write(file, content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._HashedFile, "write", full)
        writer.save_checkpoint(state_of(2), None, None)
        writer.finish()
    assert "THE CHECKPOINT OF STEP 2 COULD NOT BE WRITTEN" in caplog.text
    assert "No space left on device" in caplog.text and "the last checkpoint is of step 1" in caplog.text
    assert writer.failure is not None and writer.saved_step == 1
    assert sorted(path.name for path in folder.path.iterdir()) == ["step-00000001.ckpt", "step-00000001.json"]
    read_checkpoint(folder.file_at(1))
    writer.save_checkpoint(state_of(3), None, None)
    writer.finish()
    assert writer.failure is None and steps_in(folder) == [1, 3]


def test_an_unexpected_error_of_a_save_is_raised_in_the_training_thread(folder):
    writer = writer_of(folder)
    writer.save_checkpoint({**state_of(1), "unheard of": lambda: None}, None, None)
    with pytest.raises(Exception, match="pickle"):
        writer.finish()
