"""The kind and path that a RUN argument refers to, by looking at paths alone."""

import subprocess
import sys
from pathlib import Path

import pytest

from cucafera.config.errors import UserError
from cucafera.runs.locate import locate_model


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs/run/checkpoints").mkdir(parents=True)
    (tmp_path / "outputs/run/checkpoints/step-00000004.ckpt").touch()
    (tmp_path / "outputs/empty/checkpoints").mkdir(parents=True)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").touch()
    (tmp_path / "model.gguf").touch()
    (tmp_path / "corpus.jsonl").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("outputs/run", "run"),
        ("outputs/run/checkpoints/step-00000004.ckpt", "checkpoint"),
        ("hf", "hugging_face"),
        ("model.gguf", "gguf"),
    ],
)
def test_each_kind_of_model_is_recognized_by_its_path(files, source, kind):
    assert locate_model(source) == (kind, Path(source))
    assert locate_model(str(files / source)) == (kind, files / source)


@pytest.mark.parametrize("source", ["owner/name", "owner/name@main", "owner/name@refs/pr/1"])
def test_a_name_of_the_hub_has_no_path(files, source):
    assert locate_model(source) == ("hugging_face", None)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "RUN is empty: give a run folder"),
        ("outputs/nowhere", "outputs/nowhere: there is no such run folder or checkpoint"),
        ("outputs/empty", "outputs/empty: the folder holds no checkpoint"),
        ("outputs", "outputs: the folder holds no checkpoint"),
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
