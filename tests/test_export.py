"""The door to other tools: what it writes, and what it refuses in a sentence."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from cucafera import export
from cucafera.interop import hugging_face
from cucafera.interop.gguf import TYPES


def door(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cucafera.export", *arguments], cwd=folder, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def within(runs, monkeypatch):
    """Calls the door in this process, in the folder that holds the runs; returns its exit code."""
    monkeypatch.chdir(runs)

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["export", *arguments])
        try:
            export.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return call


def front_matter(folder: Path) -> dict:
    _, front, _ = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front)


def test_a_chat_model_is_exported_with_a_card_that_tells_its_past(within, runs, tmp_path, capsys):
    results = [
        {"kind": "harness", "task": "copa_ca", "metrics": {"acc": {"value": 0.614, "stderr": 0.0218}},
         "settings": {"num_fewshot": 0}, "checkpoint": "step-00000012.ckpt", "step": 12, "time": "now"},
        {"kind": "text", "task": "old", "metrics": {"bpb": {"value": 3.0, "stderr": None}},
         "settings": {}, "checkpoint": "step-00000008.ckpt", "step": 8, "time": "before"},
    ]  # fmt: skip
    evaluation = runs / "outputs" / "chat" / "evaluation.json"
    evaluation.write_text(json.dumps({"results": results}))
    try:
        assert within("outputs/chat", "--to", "hf", str(tmp_path / "hf"), "--license", "apache-2.0") == 0
    finally:
        evaluation.unlink()
    printed = capsys.readouterr().out
    assert "Logits of transformers on 4 real texts" in printed and "licence" not in printed
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    front = front_matter(tmp_path / "hf")
    assert front["license"] == "apache-2.0" and front["language"] == ["ca"]
    assert front["model-index"][0]["results"][0]["metrics"] == [{"type": "acc", "name": "acc", "value": 0.614}]
    for told in (
        "| base | local files: files | 1 | 3,072 |",
        "| chat | local files: files | 1 | 6,144 |",
        "| trained | all weights | all weights |",
        "| optimizer | AdamW, lr 0.003 | AdamW, lr 0.01 |",
        "| copa_ca | acc | 0.6140 | 0.0218 | num_fewshot=0 |",
        "![Validation loss against tokens](curves.png)",
        "**Hola! Qui ets?**",
        "ids 4 and 5",
    ):
        assert told in card, told
    assert str(runs) not in card and "| old |" not in card
    assert (tmp_path / "hf" / "curves.png").read_bytes().startswith(b"\x89PNG")
    settings = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").generation_config
    assert (settings.temperature, settings.top_k, settings.pad_token_id) == (0.6, 50, 3)


def test_a_base_model_names_no_licence_and_says_so(within, tmp_path, capsys):
    assert within("outputs/base", "--to", "hf", str(tmp_path / "hf"), "--type", "bf16", "--name", "gat") == 0
    printed = capsys.readouterr().out
    assert "rounding the weights changed them by up to" in printed and "names no licence yet" in printed
    assert front_matter(tmp_path / "hf")["license"] == "unknown"
    assert "# gat\n" in (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")


def test_what_was_exported_can_be_exported_again_and_replaces_only_models(within, tmp_path, capsys):
    target = str(tmp_path / "hf")
    assert within("outputs/base", "--to", "hf", target) == 0
    assert within("outputs/base", "--to", "hf", target) == 2
    assert "exists: choose another, or replace it with --overwrite" in capsys.readouterr().err
    assert within("outputs/chat", "--to", "hf", target, "--overwrite") == 0
    assert within(target, "--to", "hf", str(tmp_path / "again")) == 0
    first, second = (tmp_path / name / "model.safetensors" for name in ("hf", "again"))
    assert first.read_bytes() == second.read_bytes()
    (tmp_path / "mine").mkdir()
    assert within("outputs/base", "--to", "hf", str(tmp_path / "mine"), "--overwrite") == 2
    assert "is no exported model, and is not replaced" in capsys.readouterr().err


def test_nothing_is_left_of_an_export_that_fails(within, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hugging_face, "CLOSE", 0.0)
    monkeypatch.setattr(hugging_face, "ROUNDINGS", 0)
    assert within("outputs/base", "--to", "hf", str(tmp_path / "hf")) == 2
    assert "transformers computes other logits" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["outputs/nothing", "--to", "hf", "x"], "outputs/nothing: there is no such run folder or checkpoint"),
        (["outputs/base", "--to", "onnx", "x"], "--to onnx: there is no such format; it must be hf or gguf"),
        (["outputs/base", "--to", "hf", "x", "--type", "q8_0"], "--type q8_0: for --to hf it must be one of fp32"),
        (["outputs/base", "--to", "gguf", "x", "--type", "fp32"], "--type fp32: for --to gguf it must be one of f32"),
        (["outputs/base", "--to", "gguf", "outputs"], "outputs is a folder: --to gguf takes the name of a file"),
        (["corpus.jsonl", "--to", "hf", "x"], "corpus.jsonl is not a checkpoint: those end with .ckpt"),
        (["outputs/base", "--to", "hf", "corpus.jsonl/x"], "corpus.jsonl cannot be written"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(within, arguments, told, capsys):
    assert within(*arguments) == 2
    error = capsys.readouterr().err.strip()
    assert told in error and "\n" not in error


@pytest.mark.slow
def test_the_door_opens_as_a_program(runs, tmp_path):
    done = door(runs, "outputs/base", "--to", "hf", str(tmp_path / "hf"))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_the_types_that_the_door_names_are_those_of_the_rooms():
    assert set(export.HUGGING_FACE_TYPES) == hugging_face.DTYPES.keys()
    assert set(export.GGUF_TYPES) == set(TYPES)
