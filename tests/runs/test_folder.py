"""The run folder: what counts as a run, what a start erases, and files that hold something else than a run wrote."""

import dataclasses
import errno
import json
import os
from pathlib import Path

import pytest
import torch
import yaml

from cucafera import storage
from cucafera.config.errors import UserError
from cucafera.interop.model_card import read_lineage
from cucafera.runs import folder as folders
from cucafera.runs.checkpoints import CheckpointError
from cucafera.runs.folder import RunFolder, StartingPoint, checkpoint_of, read_checkpoint_of
from cucafera.runs.history import has_event, has_no_checkpoint
from cucafera.runs.results import read_evaluation, read_metrics, write_evaluation
from cucafera.storage import read_json_with_checksum, write_json_with_checksum
from tests.support import write_metrics


@pytest.fixture
def config(small_run):
    return small_run("name=run")


@pytest.fixture
def folder(config) -> RunFolder:
    """A run that has started, logged a curve, and saved nothing."""
    folder = RunFolder(Path(config.run_dir))
    begin(folder, config)
    (folder.path / "events.out.tfevents.1.2").write_bytes(b"curve")
    return folder


def begin(folder: RunFolder, config, resumed: StartingPoint | None = None) -> None:
    folder.begin(config, [], {}, resumed)


def save(folder: RunFolder, step: int) -> None:
    content = {"config": {}, "fingerprints": {}, "state_dict": {"w": torch.ones(3)}, "steps_done": step}
    folder.checkpoints.write(step, content, None)


def files_of(folder: RunFolder) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}


def test_a_run_that_has_saved_nothing_starts_again_by_the_same_command(folder, config):
    assert folder.checkpoint_to_resume(config, False) is None
    folder.note("stopped", saved_step=None, reason="SIGTERM")
    folder.note_out_of_memory(config, {})
    assert folder.checkpoint_to_resume(config, False) is None
    begin(folder, config)
    assert not folder.event_files()


def hide_in_mount_point(folder: RunFolder) -> None:
    for path in folder.checkpoints.entries():
        path.unlink()


def hide_behind_link(folder: RunFolder) -> None:
    folder.checkpoints.path.rename(folder.path.parent / "disk")
    folder.checkpoints.path.symlink_to(folder.path.parent / "unmounted")


def lose_folder(folder: RunFolder) -> None:
    hide_in_mount_point(folder)
    folder.checkpoints.path.rmdir()


def lose_markers(folder: RunFolder) -> None:
    for path in folder.checkpoints.entries():
        if path.suffix == ".json":
            path.unlink()


def replace_by_file(folder: RunFolder) -> None:
    lose_folder(folder)
    folder.checkpoints.path.write_text("a file")


HIDE = {
    hide_in_mount_point: r"holds a run \(history\.jsonl, config\.yaml, events.*: its checkpoints/ is empty",
    lose_folder: r"it has no folder checkpoints/. If its checkpoints are elsewhere",
    lose_markers: r"step-00000008\.ckpt has no marker step-00000008\.json: it was never completed",
    hide_behind_link: "checkpoints cannot be read: it is a symlink to .*unmounted, which is not there. Fix that",
    replace_by_file: "checkpoints cannot be read: Not a directory",
}


@pytest.mark.parametrize(("hide", "message"), HIDE.items())
@pytest.mark.parametrize("has_trained", [False, True])
def test_checkpoints_that_cannot_be_seen_do_not_count_as_none(folder, config, hide, message, has_trained):
    save(folder, 4)
    save(folder, 8)
    hide(folder)
    before = files_of(folder)
    with pytest.raises(UserError, match=message) as refused:
        folder.checkpoint_to_resume(config, has_trained)
    assert "\n" not in str(refused.value) and files_of(folder) == before
    with pytest.raises(UserError, match=r"holds no checkpoint: |checkpoints cannot be read: "):
        checkpoint_of(str(folder.path), "")


def test_a_folder_without_permission_does_not_count_as_none(folder, config, monkeypatch):
    save(folder, 4)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    for read in (folder.checkpoints.complete, folder.checkpoints.newest_step, folder.checkpoints.unmarked):
        with pytest.raises(CheckpointError, match="checkpoints cannot be read: Permission denied"):
            read()
    with pytest.raises(UserError, match="Permission denied"):
        folder.checkpoint_to_resume(config, False)


@pytest.mark.parametrize("trace", ["history", "config", "metrics", "report", "evaluation", "events"])
@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_every_trace_of_a_run_without_checkpoints_is_refused(config, trace, kind):
    folder = RunFolder(Path(config.run_dir))
    folder.path.mkdir(parents=True)
    path = folder.path / "events.out.tfevents.1" if trace == "events" else getattr(folder, trace)
    path.write_text("x") if kind == "file" else path.symlink_to("nowhere")
    with pytest.raises(UserError, match=rf"{path.name}.*resume=overwrite"):
        folder.checkpoint_to_resume(config, False)
    config.resume = "overwrite"
    assert folder.checkpoint_to_resume(config, False) is None


def test_files_that_a_refused_start_leaves_are_no_trace_of_a_run(config):
    folder = RunFolder(Path(config.run_dir))
    folder.path.mkdir(parents=True)
    for name in ("run.log", "job.json", "lock"):
        (folder.path / name).touch()
    assert folder.checkpoint_to_resume(config, False) is None


def test_overwriting_erases_nothing_before_its_own_files_are_written(folder, config, monkeypatch):
    save(folder, 4)
    folder.report.write_text("report")
    config.resume = "overwrite"
    before = {path: content for path, content in files_of(folder).items() if path.name != "config.yaml"}

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    for owner, name in ((folders.tempfile, "TemporaryFile"), (folders, "write_text"), (folders, "append_event")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *a, **s: full(None, None))
            with pytest.raises(UserError, match="cannot be written: No space left"):
                begin(folder, config)
        found = files_of(folder)
        assert all(found[path] == content for path, content in before.items() if path.name != "overrides.yaml")
    config.resume = "auto"
    hide_in_mount_point(folder)
    folder.report.unlink()
    with pytest.raises(UserError, match="holds a run"):  # the history still is that of the run that saved something
        folder.checkpoint_to_resume(config, False)


def test_the_history_says_once_that_a_checkpoint_was_saved(folder, config):
    assert has_no_checkpoint(folder.history)
    save(folder, 4)
    save(folder, 8)
    events = [json.loads(line)["event"] for line in folder.history.read_text().splitlines()]
    assert events == ["started", "first checkpoint"] and not has_no_checkpoint(folder.history)
    config.resume = "overwrite"
    begin(folder, config)
    assert has_no_checkpoint(folder.history)


@pytest.mark.parametrize("line", ["3", "[]", "null", "{}", '{"event": "started", "crc32": 1}', "[" * 10_000, "{"])
def test_lines_of_a_history_that_no_run_wrote_prove_nothing(folder, config, line):
    folder.history.write_text(f"{line}\n")
    assert not has_event(folder.history, "started", {}) and not has_no_checkpoint(folder.history)
    folder.note("stopped")
    with pytest.raises(UserError, match=r"holds a run \(history\.jsonl"):
        folder.checkpoint_to_resume(config, False)


def test_an_edited_line_of_a_history_is_not_believed(folder):
    save(folder, 4)
    folder.history.write_text(folder.history.read_text().replace("first checkpoint", "stopped"))
    assert not has_no_checkpoint(folder.history)


def test_lines_of_a_history_that_are_not_used_are_reported_on_resume(folder, config, caplog):
    content = {"config": dataclasses.asdict(config), "fingerprints": {}, "state_dict": {}, "steps_done": 4}
    folder.checkpoints.write(4, content, None)
    assert folder.checkpoint_to_resume(config, False) is not None and "damaged" not in caplog.text
    folder.history.write_text("null\n[1]\n" + folder.history.read_text())
    assert folder.checkpoint_to_resume(config, False) is not None
    assert "history.jsonl: lines that are damaged or were edited, and are not used: 2" in caplog.text


OTHER_KINDS = {
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("make", OTHER_KINDS.values(), ids=OTHER_KINDS)
@pytest.mark.parametrize("name", ["history", "metrics", "evaluation", "config"])
def test_another_kind_of_file_is_refused_and_never_waited_for(folder, make, name):
    path = getattr(folder, name)
    path.unlink(missing_ok=True)
    make(path)
    read = {
        "history": lambda: has_no_checkpoint(path),
        "metrics": folder.read_metrics,
        "evaluation": folder.read_evaluation,
        "config": folder.read_config,
    }
    with pytest.raises(UserError, match=f"{path.name} cannot be read") as refused:
        read[name]()
    assert "\n" not in str(refused.value)


def test_a_file_that_is_too_large_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(storage, "SMALL_FILE_BYTES", 100)
    write_metrics(folder.path, [{}])
    with pytest.raises(
        UserError, match=r"metrics\.json cannot be read: it has .* bytes, and a file of its kind has at"
    ):
        folder.read_metrics()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"steps": "12"}, "steps is not int"),
        ({"steps": 10**30}, "steps is not int"),
        ({"validation": 3}, "validation is not a list"),
        ({"validation": []}, "it has no validation"),
        ({"validation": [{"step": 1, "tokens": 2, "bpb": "good"}]}, "it has no validation.0.loss"),
        ({"samples": [None]}, "samples.0 is not a mapping"),
        ({"objective": ["pretraining"]}, "objective is not str"),
        ({"best_bpb": None}, "best_bpb is not int or float"),
        ({"name": "\ud800"}, "damaged, or was edited"),
    ],
)
def test_metrics_of_wrong_types_are_refused_with_their_place(tmp_path, change, problem):
    path = tmp_path / "metrics.json"
    write_metrics(tmp_path, [{}, {}])
    write_json_with_checksum(path, read_json_with_checksum(path) | change)
    with pytest.raises(UserError, match=rf"metrics\.json .*{problem}"):
        read_metrics(path)


def test_results_that_were_edited_are_refused(tmp_path):
    write_metrics(tmp_path, [{"bpb": 2.5}])
    entry = {"kind": "text", "task": "t", "metrics": {"bpb": {"value": 2.5, "stderr": None}}, "settings": {}}
    write_evaluation(tmp_path / "evaluation.json", [entry | {"checkpoint": "a.ckpt", "step": 1}])
    for read, name in ((read_metrics, "metrics.json"), (read_evaluation, "evaluation.json")):
        assert read(tmp_path / name)
        (tmp_path / name).write_text((tmp_path / name).read_text().replace("2.5", "1.5"))
        with pytest.raises(UserError, match=f"{name} is damaged, or was edited"):
            read(tmp_path / name)


def test_an_edited_configuration_is_reported(folder, config, caplog):
    folder.read_config()
    assert not caplog.text
    folder.config.write_text(folder.config.read_text().replace("batch_tokens: 256", "batch_tokens: 512"))
    folder.read_config()
    assert "config.yaml was edited since the run wrote it: it may not say what was trained" in caplog.text


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "is empty, or not a configuration"),
        ("- a\n", "it is not a mapping"),
        ("3", "it is not a mapping"),
        ("a: [", "cannot be read"),
        ("a: " + "[" * 10_000, "nested too deeply"),
        ("a: &a [1]\nb: *a\n", "it holds an alias"),
        ("a: \x00", "cannot be read"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_in_one_line(folder, content, problem):
    folder.config.write_text(content)
    with pytest.raises(UserError, match=problem) as refused:
        folder.read_config()
    assert "\n" not in str(refused.value)


def test_the_configuration_of_a_lineage_must_fit_the_schema(folder):
    values = yaml.safe_load(folder.config.read_text())
    folder.config.write_text(yaml.safe_dump(values | {"optimizer": ["adamw"]}))
    with pytest.raises(UserError, match=r"config\.yaml cannot be used: optimizer is"):
        read_lineage(folder)


@pytest.mark.parametrize("length", [2, 3])
def test_a_ring_of_initial_weights_is_refused_with_its_runs(small_run, length):
    for number in range(length):
        config = small_run(f"name=r{number}")
        config.init_from = f"outputs/r{(number + 1) % length}"
        begin(RunFolder(Path(config.run_dir)), config)
    with pytest.raises(UserError, match=r"lead in a ring, r0 <- .* <- r0, so one of the folders was overwritten"):
        read_lineage(RunFolder(Path("outputs/r0")))
    config.init_from = config.run_dir
    begin(RunFolder(Path(config.run_dir)), config)  # a run that was started again from its own weights
    assert len(read_lineage(RunFolder(Path("outputs/r0"))).stages()) == length


MARKERS = {"step": "4", "size": None, "sha256": 3, "score": [1], "version": "2"}


@pytest.mark.parametrize("field", MARKERS)
def test_a_marker_of_wrong_types_is_damage(folder, field):
    save(folder, 4)
    marker = folder.checkpoints.file_at(4).with_suffix(".json")
    write_json_with_checksum(marker, read_json_with_checksum(marker) | {field: MARKERS[field]})
    with pytest.raises(UserError, match=r"step-00000004\.json is damaged"):
        read_checkpoint_of(str(folder.checkpoints.file_at(4)), "")
    assert folder.checkpoints.complete() == []


def test_only_an_intact_checkpoint_is_proposed_for_a_damaged_one(folder):
    for step in (4, 8, 12):
        save(folder, step)
    folder.checkpoints.file_at(12).write_bytes(b"nothing")
    folder.checkpoints.file_at(8).write_bytes(folder.checkpoints.file_at(8).read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"There is also .*step-00000004\.ckpt: name it"):
        read_checkpoint_of(str(folder.path), "")
    folder.checkpoints.file_at(4).write_bytes(b"nothing")
    with pytest.raises(UserError) as refused:
        read_checkpoint_of(str(folder.path), "")
    assert "There is also" not in str(refused.value)
