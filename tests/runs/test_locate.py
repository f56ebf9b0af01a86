"""The kind and path that a RUN argument refers to, by looking at paths alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cucafera.config.command_line import composed_config
from cucafera.config.errors import UserError
from cucafera.run import read_model_elsewhere
from cucafera.runs.folder import checkpoint_of
from cucafera.runs.locate import OUTPUTS, check_not_gguf, locate_model, run_named, runs_below


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs/run/checkpoints").mkdir(parents=True)
    (tmp_path / "outputs/run/checkpoints/step-00000004.ckpt").touch()
    (tmp_path / "outputs/empty/checkpoints").mkdir(parents=True)
    for number, name in enumerate(("old", "sweep/3", "new")):
        saved = tmp_path / "outputs" / name / "checkpoints" / "step-00000004.ckpt"
        saved.parent.mkdir(parents=True)
        saved.touch()
        saved.with_suffix(".json").touch()
        os.utime(saved.with_suffix(".json"), (number, number))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").touch()
    (tmp_path / "model.gguf").touch()
    for name in ("renamed", "renamed.ckpt"):
        (tmp_path / name).write_bytes(b"GGUF\x03")
    (tmp_path / "corpus.jsonl").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("outputs/run", "run"),
        ("outputs/run/checkpoints/step-00000004.ckpt", "checkpoint"),
        ("hf", "hugging_face"),
        ("model.gguf", "gguf"),
        ("renamed", "gguf"),
        ("renamed.ckpt", "gguf"),
    ],
)
def test_each_kind_of_model_is_recognized_by_its_path(files, source, kind):
    assert locate_model(source) == (kind, Path(source))
    assert locate_model(str(files / source)) == (kind, files / source)


def test_weights_are_not_taken_from_a_gguf_file_whatever_its_name(files, monkeypatch):
    message = "renamed.ckpt is a GGUF file, which only chat and evaluate --text read: give the run it was made from"
    for load in (checkpoint_of, check_not_gguf):
        with pytest.raises(UserError, match=rf"^init_from={message}$"):
            load("renamed.ckpt", "init_from=")
    with pytest.raises(UserError, match=f"init_from={message}"):
        composed_config(["model=inherited", "init_from=renamed.ckpt"], read_model_elsewhere)


@pytest.mark.parametrize("source", ["owner/name", "owner/name@main", "owner/name@refs/pr/1"])
def test_a_name_of_the_hub_has_no_path(files, source):
    assert locate_model(source) == ("hugging_face", None)


def test_runs_are_found_below_a_folder_the_one_that_saved_last_first(files):
    names = ["outputs/new", "outputs/sweep/3", "outputs/old"]  # outputs/run never completed its checkpoint
    (files / "outputs/locked").touch()
    assert list(map(str, runs_below(OUTPUTS))) == names
    assert runs_below(files / "nowhere") == []


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("new", "outputs/new"),
        ("sweep/3", "outputs/sweep/3"),
        ("hf", "hf"),
        ("outputs/new", "outputs/new"),
        ("owner/name", "owner/name"),
        ("sweep", "sweep"),
        ("", ""),
        ("x" * 5000, "x" * 5000),
        ("~no-such-user/run", "~no-such-user/run"),
    ],
)
def test_a_name_stands_for_the_run_of_that_name_unless_something_else_has_it(files, source, path):
    assert run_named(source) == path


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "RUN is empty: give a run folder"),
        ("outputs/nowhere", "outputs/nowhere: there is no such run folder or checkpoint"),
        ("outputs/empty", "outputs/empty: the folder holds no checkpoint"),
        ("outputs", "outputs: the folder holds no checkpoint: it has no folder checkpoints/; runs in it: outputs/new,"),
        ("outputs/swep/3", "outputs/swep/3: there is no such run folder or checkpoint; did you mean outputs/sweep/3?"),
        ("nwe", "nwe: there is no such run folder or checkpoint; did you mean outputs/new?"),
        ("nowhere/model.gguf", "nowhere/model.gguf: there is no such .gguf file"),
        ("corpus.jsonl", "corpus.jsonl is not a checkpoint: checkpoint files end with .ckpt"),
        ("x" * 5000, "cannot be read: File name too long"),
        ("~no-such-user/run", "~no-such-user/run cannot be read"),
    ],
)
def test_a_wrong_path_is_refused_in_one_line(files, source, message):
    with pytest.raises(UserError) as refused:
        locate_model(source)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_looking_at_paths_imports_nothing_heavy():
    program = "import sys; import cucafera.runs.locate; print({'torch', 'numpy', 'tokenizers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.stdout == "set()\n", result.stderr
