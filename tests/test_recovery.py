"""Stops, resumes, refusals and full disks of whole runs, in one process."""

import errno
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cucafera.config.errors import UserError
from cucafera.interop.trained import load_trained
from cucafera.output import protect_output
from cucafera.run import train
from cucafera.runs.checkpoints import CheckpointFolder, _HashedFile, read_checkpoint
from cucafera.runs.lock import run_lock
from cucafera.storage import read_json_with_checksum, write_json_with_checksum
from cucafera.training.callbacks.checkpoints import Checkpoints
from cucafera.training.callbacks.interruption import Interruption
from cucafera.training.checkpoint_writer import CheckpointWriter
from cucafera.training.module import LanguageModel
from tests.support import assert_equal, folder_of, history_of, scalars, weights

HORIZON = "schedule.horizon_steps=12"


@pytest.fixture
def at_step(monkeypatch):
    """Calls a function in the middle of a step, the first being 1."""

    def schedule(number: int, act) -> None:
        clip = LanguageModel._clip_gradients

        def clip_and_act(module):
            if module.steps_done + 1 == number:
                act()
            return clip(module)

        monkeypatch.setattr(LanguageModel, "_clip_gradients", clip_and_act)

    return schedule


def stopped(config, code: int) -> None:
    with pytest.raises(SystemExit) as stop:
        train(config, [])
    assert stop.value.code == code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_finishes_the_step_saves_and_says_how_to_resume(small_run, at_step, caplog, capfd, number):
    caplog.set_level("INFO")
    at_step(6, lambda: os.kill(os.getpid(), number))
    stopped(small_run("name=run"), 128 + number)
    assert folder_of("run").checkpoints.complete()[-1].step == 6
    assert (
        f"Stopped by {number.name} after step 6; checkpoint saved. Run the same command again to resume." in caplog.text
    )
    assert f"{number.name} received: saving a checkpoint after this step." in capfd.readouterr().err
    assert history_of("run")[-1]["event"] == "stopped"


def test_a_stopped_run_resumes_to_the_same_end(small_run, at_step):
    train(small_run("name=whole"), [])
    at_step(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    stopped(small_run("name=run"), 143)
    at_step(99, lambda: None)
    train(small_run("name=run"), [])
    assert_equal(weights("outputs/whole"), weights("outputs/run"))
    for tag in ("loss/train", "loss/val", "train/gradient_norm"):
        assert scalars("outputs/whole", tag) == scalars("outputs/run", tag)


@pytest.mark.parametrize(
    "numbers",
    [[signal.SIGHUP, signal.SIGHUP], [signal.SIGTERM, signal.SIGHUP], [signal.SIGHUP, signal.SIGTERM, signal.SIGHUP]],
)
def test_the_signals_of_a_closed_terminal_are_one_request(small_run, at_step, numbers):
    at_step(6, lambda: [os.kill(os.getpid(), number) for number in numbers])
    stopped(small_run("name=run"), 128 + (signal.SIGTERM if signal.SIGTERM in numbers else signal.SIGHUP))
    assert folder_of("run").checkpoints.complete()[-1].step == 6


def test_a_second_signal_ends_at_once(small_run, at_step, monkeypatch):
    class EndedError(Exception):
        pass

    def end(interruption, number):
        raise EndedError(number)

    monkeypatch.setattr(Interruption, "_exit_at_once", end)

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(6, twice)
    with pytest.raises(EndedError):
        train(small_run("name=run"), [])
    assert folder_of("run").checkpoints.complete()[-1].step == 4


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        ({"SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "3"}, "--ntasks-per-node=2"),
        ({"SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "3"}, "--nodes=3"),
        ({}, "--ntasks=2"),
        ({"SLURM_NTASKS_PER_NODE": "1"}, "This is process 0 of 2, for 1 device"),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "1"}, "This is process 1 of 1, for 1 device"),
        ({"SLURM_NTASKS": "two"}, "invalid literal for int"),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": None}, "The environment variable 'SLURM_PROCID' is missing"),
    ],
)
def test_devices_that_slurm_did_not_allocate_are_refused(small_run, monkeypatch, facts, problem):
    facts = {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "job", "SLURM_PROCID": "0"} | facts
    facts = {name: value for name, value in facts.items() if value is not None}
    for name, value in facts.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"{problem}.*sbatch --nodes=1 --ntasks-per-node=1, or other values of"):
        train(small_run("name=run"), [])


def test_devices_that_torchrun_did_not_start_are_refused(small_run, monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "job", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"torchrun --nnodes=1 --nproc-per-node=1, or other values of"):
        train(small_run("name=run"), [])


def test_a_signal_at_the_last_step_changes_nothing(small_run, at_step):
    at_step(12, lambda: os.kill(os.getpid(), signal.SIGTERM))
    train(small_run("name=run"), [])
    assert folder_of("run").report.exists() and history_of("run")[-1]["event"] == "completed"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_ends_at_once_with_nothing_to_save(small_run, monkeypatch, number):
    monkeypatch.setattr(LanguageModel, "setup", lambda module, stage: os.kill(os.getpid(), number))
    stopped(small_run("name=run"), 128 + number)
    assert folder_of("run").checkpoints.complete() == []


def test_signal_handlers_are_restored(small_run):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    train(small_run("name=run"), [])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_sigusr1_saves_and_training_continues(small_run, at_step, caplog):
    caplog.set_level("INFO")
    at_step(6, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    train(small_run("name=run", "callbacks.keep_last=9"), [])
    assert "Checkpoint saved after step 6, as requested; training continues." in caplog.text
    assert [checkpoint.step for checkpoint in folder_of("run").checkpoints.complete()] == [4, 6, 8, 12]
    assert scalars("outputs/run", "loss/train")[-1][0] == 12


def test_max_time_saves_and_stops_with_the_status_of_timeout(small_run, caplog):
    caplog.set_level("INFO")
    for step in (1, 2):
        stopped(small_run("name=run", "max_time=00:00:00"), 124)
        assert folder_of("run").checkpoints.complete()[-1].step == step
    assert "Stopped by max_time=00:00:00 after step 2; checkpoint saved" in caplog.text
    train(small_run("name=run", "max_time=1:00:00:00"), [])
    train(small_run("name=whole"), [])
    assert_equal(weights("outputs/whole"), weights("outputs/run"))


def test_max_time_counts_from_the_start_of_the_command(small_run):
    assert Interruption(small_run("max_time=00:10:00"), started=100.0).deadline == 700.0
    assert Interruption(small_run(), started=100.0).deadline is None


@pytest.mark.parametrize(
    ("text", "seconds"), [("00:00:30", 30), ("11:30:00", 41_400), ("1:00:00:00", 86_400), ("36:00:00", 129_600)]
)
def test_max_time_in_seconds(small_run, text, seconds):
    assert small_run(f"max_time={text}").max_seconds == seconds


@pytest.mark.parametrize("text", ["90", "1h", "10:00", "1:2:3:4:5", "::", "00:00:1"])
def test_a_time_of_another_form_is_refused(small_run, text):
    with pytest.raises(UserError, match=r"max_time is .*; it must be HH:MM:SS or DD:HH:MM:SS"):
        small_run(f"max_time='{text}'")


@pytest.mark.parametrize(("here", "there"), [(8, 8), (8, 4), (None, 4)])
def test_processes_that_found_different_checkpoints_are_refused(small_run, monkeypatch, here, there):
    def reduce(ends: torch.Tensor, operation: object) -> None:
        ends.copy_(torch.maximum(ends, torch.tensor([there, -there])))

    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    writer = SimpleNamespace(saved_step=here, first_step=here or 0)
    checkpoints = Checkpoints(small_run("name=run"), folder_of("run"), writer, None, None)
    trainer = SimpleNamespace(world_size=2, strategy=SimpleNamespace(root_device=torch.device("cpu")))
    if here == there:
        checkpoints.on_fit_start(trainer, None)
        return
    with pytest.raises(UserError, match=rf"of steps {min(here or 0, there)} and {max(here or 0, there)}: another"):
        checkpoints.on_fit_start(trainer, None)


def test_a_run_folder_in_use_is_refused(small_run):
    with run_lock(folder_of("run").lock), pytest.raises(UserError, match="outputs/run is in use by process"):
        train(small_run("name=run"), [])
    train(small_run("name=run"), [])
    assert not folder_of("run").lock.exists()


def test_a_changed_value_is_named_with_the_override_that_forces_it(small_run, caplog):
    caplog.set_level("INFO")
    train(small_run("name=run", HORIZON, "budget_tokens=2048"), [])
    changed = ("optimizer.lr=1e-4", "schedule.final_lr_ratio=0.5", "seed=7")
    with pytest.raises(UserError) as refusal:
        train(small_run("name=run", HORIZON, *changed), [])
    assert "optimizer.lr: 0.0001 (requested) != 0.003 (checkpoint)" in str(refusal.value)
    assert "'resume_allow_changed=[seed,optimizer.lr,schedule.final_lr_ratio]'" in str(refusal.value)
    train(small_run("name=run", HORIZON, *changed, "resume_allow_changed=[seed,optimizer.lr,schedule]"), [])
    changes = history_of("run")[-2]["changed"]
    assert changes["optimizer.lr"] == [0.003, 0.0001]
    assert changes["budget_tokens"] == [2048, 3072]
    assert scalars("outputs/run", "train/lr/embedding")[-1][1] == pytest.approx(5.5e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("batch_tokens=512", "batch_tokens: 512 (requested) != 256 (checkpoint); this key cannot change within a run"),
        ("model.hidden_size=64", "model.hidden_size: 64 (requested) != 48 (checkpoint); this key cannot change"),
        (
            "optimizer=muon",
            "optimizer.name: muon (requested) != adamw (checkpoint); this key cannot change within a run",
        ),
        ("sequence_length=16", "sequence_length: 16 (requested) != 32 (checkpoint); this key cannot change"),
    ],
)
def test_an_impossible_change_is_refused_with_the_override_for_another_run(small_run, change, message):
    train(small_run("name=run", "budget_tokens=1024"), [])
    with pytest.raises(UserError) as refusal:
        train(small_run("name=run", change, "resume_allow_changed=[batch_tokens,model,sequence_length]"), [])
    assert message in str(refusal.value)
    assert "name=ANOTHER init_from=outputs/run" in str(refusal.value)


def test_changed_text_is_named_with_both_fingerprints_and_may_be_forced(small_run, corpus):
    train(small_run("name=run", HORIZON, "budget_tokens=1024"), [])
    with corpus.open("a") as file:
        file.write('{"text": "Un document nou, que abans no hi era."}\n')
    with pytest.raises(UserError) as refusal:
        train(small_run("name=run", HORIZON), [])
    before = read_checkpoint(folder_of("run").checkpoints.marked()[-1])["fingerprints"]
    assert f"(now) != {before['data.sources.files'][:16]} (trained with)" in str(refusal.value)
    assert "'resume_allow_changed=[tokenizer,data.sources.files]'" in str(refusal.value)
    train(small_run("name=run", HORIZON, "resume_allow_changed=[tokenizer,data]"), [])
    assert scalars("outputs/run", "loss/train")[-1][0] == 12


def test_allowed_changes_take_effect_and_are_written_to_the_history(small_run):
    train(small_run("name=whole", HORIZON), [])
    train(small_run("name=run", HORIZON, "budget_tokens=2048"), [])
    train(
        small_run(
            "name=run", HORIZON, "trainer.micro_batch_windows=2", "trainer.num_workers=1",
            "callbacks.log_every_steps=2", "callbacks.checkpoint_every_steps=3",
        ),
        ["name=run"],
    )  # fmt: skip
    began, saved, completed, resumed_entry, completed_again = history_of("run")
    assert [began["event"], saved["event"], saved["step"]] == ["started", "first checkpoint", 4]
    assert [completed["event"], completed_again["event"]] == ["completed", "completed"]
    assert (resumed_entry["event"], resumed_entry["step"], resumed_entry["overrides"]) == ("resumed", 8, ["name=run"])
    assert resumed_entry["changed"] == {
        "budget_tokens": [2048, 3072],
        "trainer.micro_batch_windows": ["auto", 2],
        "trainer.num_workers": [None, 1],
        "callbacks.log_every_steps": [1, 2],
        "callbacks.checkpoint_every_steps": [4, 3],
    }
    assert resumed_entry["hardware"]["micro_batch_windows"] == 2
    for name, value in weights("outputs/whole").items():
        torch.testing.assert_close(weights("outputs/run")[name], value, rtol=1e-4, atol=2e-5)


def test_checkpoints_of_an_abandoned_future_are_removed_on_resume(small_run, caplog):
    train(small_run("name=run", "callbacks.keep_last=9"), [])
    undisturbed = weights("outputs/run")
    folder = folder_of("run").checkpoints
    for step in (8, 12):
        folder.file_at(step).write_bytes(b"nothing")
    train(small_run("name=run", "callbacks.checkpoint_every_steps=6"), [])
    assert "step-00000012.ckpt is damaged: it has 7 bytes" in caplog.text
    assert [checkpoint.step for checkpoint in folder.complete()] == [6, 12]
    assert_equal(undisturbed, weights("outputs/run"))
    assert len(history_of("run")[-2]["damaged"]) == 2


def test_an_interrupted_first_save_is_reported_and_the_run_starts_again(small_run, caplog):
    train(small_run("name=whole"), [])
    folder = folder_of("run")
    folder.checkpoints.path.mkdir(parents=True)
    folder.checkpoints.file_at(4).write_bytes(b"half of")
    folder.checkpoints.file_at(3).with_suffix(".ckpt.partial").write_bytes(b"a quarter")
    train(small_run("name=run"), [])
    assert (
        "step-00000004.ckpt has no marker, so it was never completed: renamed to step-00000004.ckpt.unfin"
        in caplog.text
    )
    assert folder.checkpoints.path.joinpath("step-00000004.ckpt.unfinished").read_bytes() == b"half of"
    assert not list(folder.checkpoints.path.glob("*.partial"))
    assert_equal(weights("outputs/whole"), weights("outputs/run"))
    train(small_run("name=run", "resume=overwrite"), [])
    assert not list(folder.checkpoints.path.glob("*.unfinished"))


def test_every_nth_checkpoint_is_kept_forever(small_run):
    train(small_run("name=run", "callbacks.checkpoint_every_steps=1", "callbacks.keep_every_steps=3"), [])
    assert {3, 6, 9, 11, 12} <= {checkpoint.step for checkpoint in folder_of("run").checkpoints.complete()}
    with pytest.raises(UserError, match=r"callbacks\.keep_every_steps is 3; it must be a multiple of"):
        small_run("callbacks.checkpoint_every_steps=2", "callbacks.keep_every_steps=3")


@pytest.fixture
def full_disk(monkeypatch):
    """From one save of a run to another, counted from 1, the disk is full."""
    saves = 0

    def fill(first: int, last: int) -> None:
        write = CheckpointWriter._write

        def fail_or_write(writer, *arguments):
            nonlocal saves
            saves += 1
            with monkeypatch.context() as patch:
                if first <= saves <= last:
                    patch.setattr(_HashedFile, "write", full_write)
                write(writer, *arguments)

        monkeypatch.setattr(CheckpointWriter, "_write", fail_or_write)

    return fill


def full_write(file, content):
    file.error = OSError(errno.ENOSPC, "No space left on device")
    raise file.error


def test_a_full_disk_does_not_end_the_run(small_run, full_disk, caplog):
    full_disk(2, 2)
    train(small_run("name=run"), [])
    assert "THE CHECKPOINT OF STEP 8 COULD NOT BE WRITTEN to outputs/run/checkpoints: No space left" in caplog.text
    assert "the last checkpoint is of step 4" in caplog.text
    assert [checkpoint.step for checkpoint in folder_of("run").checkpoints.complete()] == [4, 12]


def test_a_result_that_could_not_be_saved_is_an_error_and_can_be_fixed(small_run, full_disk):
    train(small_run("name=whole"), [])
    full_disk(2, 3)
    with pytest.raises(UserError, match=r"training is complete, but its result could not be written.*after step 4"):
        train(small_run("name=run"), [])
    assert history_of("run")[-1]["reason"] == "the result could not be written: No space left on device"
    train(small_run("name=run"), [])
    assert_equal(weights("outputs/whole"), weights("outputs/run"))
    assert scalars("outputs/whole", "loss/val") == scalars("outputs/run", "loss/val")


def test_a_run_killed_before_its_report_writes_it_at_the_next_start(small_run):
    train(small_run("name=run"), [])
    folder = folder_of("run")
    report = folder.report.read_text()
    folder.metrics.unlink()
    folder.report.unlink()
    train(small_run("name=run"), [])
    assert folder.report.read_text() == report
    assert [line["event"] for line in history_of("run")] == ["started", "first checkpoint", "completed", "completed"]


def test_a_stop_that_could_not_be_saved_says_where_the_run_resumes(small_run, full_disk, at_step, caplog):
    caplog.set_level("INFO")
    full_disk(2, 2)
    at_step(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    stopped(small_run("name=run"), 143)
    assert "after step 6, which could not be saved. Run the same command again to resume after step 4." in caplog.text


def test_a_disk_that_is_too_small_is_reported_before_training(small_run, monkeypatch, caplog):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    train(small_run("name=run", "budget_tokens=256", "schedule.warmup_steps=0"), [])
    assert "THE DISK MAY BECOME FULL" not in caplog.text
    train(small_run("name=run", "budget_tokens=3072", "schedule.warmup_steps=0", "callbacks.keep_last=9"), [])
    assert "THE DISK MAY BECOME FULL: 3 checkpoints of" in caplog.text
    (estimate,) = re.findall(r"3 checkpoints of ([\d.]+) kB", caplog.text)
    assert float(estimate) * 1e3 == pytest.approx(folder_of("run").checkpoints.complete()[-1].size, rel=0.1)


def test_a_truncated_line_of_the_history_damages_no_other(small_run):
    train(small_run("name=run", HORIZON, "budget_tokens=2048"), [])
    history = folder_of("run").history
    history.write_bytes(history.read_bytes()[:-10])
    train(small_run("name=run", HORIZON), [])
    began, _, torn, resumed_entry, completed = history.read_text().splitlines()
    assert json.loads(began)["event"] == "started" and torn.startswith('{"time"')
    assert (json.loads(resumed_entry)["event"], json.loads(completed)["event"]) == ("resumed", "completed")


def test_a_model_whose_best_checkpoint_is_damaged_is_refused_with_the_other_one(small_run):
    train(small_run("name=run"), [])
    before, newest = folder_of("run").checkpoints.complete()
    mark = newest.path.with_suffix(".json")
    write_json_with_checksum(
        mark, read_json_with_checksum(mark) | {"score": {"metric": "loss", "value": 99.0, "direction": "lower"}}
    )
    assert load_trained("outputs/run").step == before.step
    before.path.write_bytes(b"nothing")
    with pytest.raises(UserError, match=rf"is damaged.*There is also .*{newest.path.name}: name it"):
        load_trained("outputs/run")
    with pytest.raises(UserError, match="There is also"):
        train(small_run("name=next", "init_from=outputs/run"), [])
    assert load_trained(str(newest.path)).step == newest.step


@pytest.mark.parametrize("what", ["tokenizer.json", "prepared.json", "shards.json", "*.shard"])
def test_damaged_prepared_files_are_refused_by_name(small_run, what):
    train(small_run("name=run", HORIZON, "budget_tokens=1024"), [])
    dice = random.Random(0)
    paths = list(Path("prepared").rglob(what))
    assert paths
    for path in paths:
        content = path.read_bytes()
        for changed in (content[: dice.randrange(len(content))], flipped(content, dice)):
            path.write_bytes(changed)
            with pytest.raises(UserError, match=rf"{path.name} is damaged|{path.name} holds"):
                train(small_run("name=run", HORIZON), [])
        path.write_bytes(content)
    train(small_run("name=run", HORIZON), [])


def flipped(content: bytes, dice: random.Random) -> bytes:
    changed = bytearray(content)
    changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def test_a_folder_that_cannot_be_written_is_refused(small_run, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    config = small_run("name=run")
    train(small_run("name=other"), [])  # the prepared data is there
    for allowed in (0, 5, 6, 7):  # of config, overrides, history and the tokenizer's two files
        calls = itertools.count()
        monkeypatch.setattr(
            os, "fsync", lambda fd, calls=calls, allowed=allowed: full(fd) if next(calls) >= allowed else None
        )
        with pytest.raises(UserError, match="outputs/run cannot be written: No space left on device"):
            train(config, [])


def test_a_killed_worker_stops_the_run_after_the_step_with_a_checkpoint(small_run, at_step, caplog):
    def kill():
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()

    caplog.set_level("INFO")
    at_step(5, kill)
    stopped(small_run("name=run", "trainer.num_workers=1", "budget_tokens=25_600", HORIZON), 1)
    assert "(SIGKILL; memory may have run out) after step 6; checkpoint saved. Run the same command" in caplog.text
    assert not multiprocessing.active_children() and not folder_of("run").lock.exists()
    assert history_of("run")[-1]["reason"].startswith("the death of data loader worker")
    assert folder_of("run").checkpoints.complete()[-1].step == 6


def refused_thread(thread):
    raise RuntimeError("can't start new thread")


def no_memory(state, copies, path=""):
    raise MemoryError


@pytest.mark.parametrize(
    ("patched", "message"),
    [
        (
            ("threading.Thread.start", refused_thread),
            "Training waits for the checkpoint to be written: can't start new",
        ),
        (("cucafera.training.checkpoint_writer._copied", no_memory), "to be written: no memory for a copy"),
    ],
)
def test_a_save_without_a_thread_or_memory_is_written_while_training_waits(
    small_run, monkeypatch, caplog, patched, message
):
    monkeypatch.setattr(*patched)
    train(small_run("name=run"), [])
    assert message in caplog.text
    assert [checkpoint.step for checkpoint in folder_of("run").checkpoints.complete()] == [8, 12]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_save_that_runs_out_of_memory_does_not_end_the_run(small_run, monkeypatch, caplog, error):
    write = CheckpointFolder.write

    def fail_or_write(folder, step, state, score):
        if step == 8:
            raise error
        write(folder, step, state, score)

    monkeypatch.setattr(CheckpointFolder, "write", fail_or_write)
    train(small_run("name=run"), [])
    assert "THE CHECKPOINT OF STEP 8 COULD NOT BE WRITTEN" in caplog.text
    assert [checkpoint.step for checkpoint in folder_of("run").checkpoints.complete()] == [4, 12]


def test_curves_and_history_that_cannot_be_written_for_a_time_end_no_run(small_run, monkeypatch, caplog):
    calls = itertools.count()
    write = os.write

    def fail_or_write(descriptor, content):
        if next(calls) and "history.jsonl" not in caplog.text:  # the first one is the start of the run in its history
            raise OSError(errno.EIO, "Input/output error")
        return write(descriptor, content)

    monkeypatch.setattr(os, "write", fail_or_write)
    train(small_run("name=run"), [])
    assert "history.jsonl cannot be written: Input/output error" in caplog.text
    assert "The curves wait in memory" in caplog.text
    assert len(scalars("outputs/run", "loss/train")) == 12


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_run_whose_terminal_or_pipe_is_closed_trains_to_its_end(small_run, monkeypatch, is_terminal):
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def isatty(self) -> bool:
            return is_terminal

    monkeypatch.setattr(sys, "stdout", Closed())
    protect_output()
    train(small_run("name=run"), [])
    assert folder_of("run").checkpoints.complete()[-1].step == 12
