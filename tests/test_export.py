"""The export command."""

import argparse
import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from cucafera import export
from cucafera.config.schema import SamplingConfig
from cucafera.config.tokens import DOCUMENT_START_ID, IM_END_ID, IM_START_ID
from cucafera.interop import hugging_face
from cucafera.interop.gguf import TYPES
from cucafera.interop.hf_spec import ARCHITECTURES
from cucafera.interop.model_card import model_card, read_lineage
from cucafera.interop.trained import load_mean, load_trained
from cucafera.options import averaged_checkpoints
from cucafera.runs.folder import RunFolder
from cucafera.runs.locate import locate_model
from cucafera.runs.results import write_evaluation, write_metrics
from tests.imports import HEAVY, imported_packages


@pytest.fixture
def command(runs, monkeypatch):
    """Run the command in this process, in the folder that holds the runs; returns its exit code."""
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


def test_a_chat_model_is_exported_with_a_model_card(command, runs, tmp_path, capsys, monkeypatch):
    results = [
        {"kind": "harness", "task": "copa_ca", "metrics": {"acc": {"value": 0.614, "stderr": 0.0218}},
         "settings": {"num_fewshot": 0}, "checkpoint": "step-00000012.ckpt", "step": 12, "time": "now"},
        {"kind": "text", "task": "old", "metrics": {"bpb": {"value": 3.0, "stderr": None}},
         "settings": {}, "checkpoint": "step-00000008.ckpt", "step": 8, "time": "before"},
    ]  # fmt: skip
    evaluation = runs / "outputs" / "chat" / "evaluation.json"
    write_evaluation(evaluation, results)
    try:
        assert command("outputs/chat", "--to", "hf", str(tmp_path / "hf"), "--license", "apache-2.0") == 0
    finally:
        evaluation.unlink()
    printed = capsys.readouterr().out
    assert "Verified with transformers on 4 texts: logits differ by at most" in printed and "licence" not in printed
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    front = front_matter(tmp_path / "hf")
    assert front["license"] == "apache-2.0" and front["language"] == ["ca"]
    assert front["model-index"][0]["results"][0]["metrics"] == [{"type": "acc", "name": "acc", "value": 0.614}]
    for text in (
        "# chat\n",
        "| base | texts | local files: files | 1 | 3,072 |",
        "| chat | conversations | local files: files | 1 | 6,144 |",
        "recommends temperature 0.6, top-k 50, top-p 0.9, no repetition penalty (the run had a repetition penalty of "
        "1.2, but transformers would penalize the stop token too), and at most 32 new tokens.",
        "| trained | all weights | all weights |",
        "| optimizer | AdamW, lr 0.003, weight decay 1 | AdamW, lr 0.01, weight decay 1 |",
        "bits per byte on held-out conversations, after 12 steps.",
        "| copa_ca | acc | 0.6140 | 0.0218 | num_fewshot=0 |",
        "![Validation over tokens](curves.png)",
        "**Hola! Qui ets?**",
        "ids 4 and 5",
        "written as a GemmaForCausalLM",
    ):
        assert text in card, text
    assert str(runs) not in card and "| old |" not in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path / "hf")
    exec(code.replace("messages)[", "messages, max_new_tokens=2)["), {})
    assert (tmp_path / "hf" / "curves.png").read_bytes().startswith(b"\x89PNG")
    settings = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").generation_config
    assert (settings.temperature, settings.top_k, settings.pad_token_id) == (0.6, 50, 3)
    assert settings.repetition_penalty == 1.0  # transformers would penalize the stop token of earlier answers
    assert settings.eos_token_id == [IM_END_ID, IM_START_ID, DOCUMENT_START_ID]


def test_a_mean_is_exported_and_its_card_says_whose_figures_it_has(command, runs, tmp_path, capsys):
    results = [
        {"kind": "text", "task": task, "metrics": {"bpb": {"value": value, "stderr": None}}, "settings": {},
         "checkpoint": "step-00000012.ckpt", "step": 12, "time": "now", **averaged}
        for task, value, averaged in (("last", 3.0, {}), ("mean", 2.5, {"averaged": [8, 12]}))
    ]  # fmt: skip
    evaluation = runs / "outputs" / "base" / "evaluation.json"
    write_evaluation(evaluation, results)
    try:
        assert command("outputs/base", "--to", "hf", str(tmp_path / "hf"), "--average", "2") == 0
        assert command("outputs/base", "--to", "hf", str(tmp_path / "last")) == 0
    finally:
        evaluation.unlink()
    printed = capsys.readouterr().out
    assert "Averaging the weights after the steps 8 and 12\n" in printed
    assert (
        "from the mean of 2 checkpoints up to outputs/base/checkpoints/step-00000012.ckpt (steps 8 and 12)" in printed
    )
    card, other = ((tmp_path / name / "README.md").read_text(encoding="utf-8") for name in ("hf", "last"))
    for text in (
        "The weights are the uniform mean of those after the steps 8 and 12, of 2 checkpoints of one run (latest ",
        "on held-out texts, after 12 steps, by the weights of that step and not by their mean.",
        "Of the weights after each step, in training; their mean was not validated.",
        "after 12 steps; not selected. Not by the mean, but by the weights of that step.",
        "| mean | bpb | 2.5000 |",
    ):
        assert text in card, text
    assert "| last | bpb |" not in card and "| last | bpb |" in other
    assert "mean" not in other
    paths = [runs / "outputs" / "base" / "checkpoints" / f"step-{step:08d}.ckpt" for step in (8, 12)]
    expected = load_mean(paths).model.state_dict()
    found = load_trained(str(tmp_path / "hf")).model.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)
    assert (found["embed_tokens.weight"] - load_trained(str(paths[1])).model.embed_tokens.weight).abs().max() > 1e-4


def test_a_gguf_file_of_a_mean_says_so(command, tmp_path):
    for path, arguments in ((tmp_path / "mean.gguf", ["--average", "2"]), (tmp_path / "last.gguf", [])):
        assert command("outputs/base", "--to", "gguf", str(path), *arguments) == 0
    mean, last = (GGUFReader(tmp_path / f"{name}.gguf").get_field("general.description") for name in ("mean", "last"))
    assert mean.contents() == "The mean of the weights after the steps 8 and 12" and last is None


@pytest.mark.parametrize(
    ("schedule", "note"),
    [
        ({"name": "constant", "warmup_steps": 0}, ""),
        ({"name": "constant", "warmup_steps": 8}, "The first of them is from the warm-up of 8 steps, where weights "),
        (
            {"name": "linear", "final_lr_ratio": 0.0, "warmup_steps": 0},
            "The learning rate of step 12 was 8.3% of its peak",
        ),
    ],
)
def test_a_learning_rate_at_which_a_mean_does_not_help_is_reported(runs, tmp_path, monkeypatch, schedule, note, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs / "outputs" / "base", "outputs/base")
    config = yaml.safe_load(Path("outputs/base/config.yaml").read_text())
    config["schedule"] |= schedule
    Path("outputs/base/config.yaml").write_text(yaml.safe_dump(config))
    assert len(averaged_checkpoints(argparse.Namespace(run="outputs/base", average=2))) == 2
    first, *notes = capsys.readouterr().out.splitlines()
    assert first == "Averaging the weights after the steps 8 and 12"
    assert len(notes) == bool(note) and all(line.startswith(note) for line in notes)


def test_an_export_without_licence_says_so(command, tmp_path, capsys):
    assert command("outputs/base", "--to", "hf", str(tmp_path / "hf"), "--type", "bf16", "--name", "gat") == 0
    printed = capsys.readouterr().out
    assert "rounding the weights changed them by up to" in printed and "names no licence" in printed
    assert front_matter(tmp_path / "hf")["license"] == "unknown"
    assert "# gat\n" in (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    settings = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert settings["repetition_penalty"] == 1.1
    assert settings["eos_token_id"] == [IM_END_ID, IM_START_ID, DOCUMENT_START_ID]


def test_an_export_can_be_exported_again_and_replaces_only_exports(command, tmp_path, capsys):
    target = str(tmp_path / "hf")
    assert command("outputs/base", "--to", "hf", target) == 0
    assert command("outputs/base", "--to", "hf", target) == 2
    assert "exists: choose another path, or replace it with --overwrite" in capsys.readouterr().err
    assert command("outputs/chat", "--to", "hf", target, "--overwrite") == 0
    assert command(target, "--to", "hf", str(tmp_path / "again")) == 0
    first, second = (tmp_path / name / "model.safetensors" for name in ("hf", "again"))
    assert first.read_bytes() == second.read_bytes()
    (tmp_path / "mine").mkdir()
    assert command("outputs/base", "--to", "hf", str(tmp_path / "mine"), "--overwrite") == 2
    assert "is not an exported model, so it is not replaced" in capsys.readouterr().err
    (tmp_path / "thesis").write_text("mine", encoding="utf-8")
    assert command("outputs/base", "--to", "gguf", str(tmp_path / "thesis"), "--overwrite") == 2
    assert "is not an exported model, so it is not replaced" in capsys.readouterr().err
    (tmp_path / "model.gguf").write_bytes(b"GGUF of an earlier export")
    assert command("outputs/base", "--to", "gguf", str(tmp_path / "model.gguf"), "--overwrite") == 0
    assert (tmp_path / "model.Modelfile").read_text().splitlines()[1:3] == [
        "FROM ./model.gguf", 'TEMPLATE """{{ .Prompt }}"""',
    ]  # fmt: skip


def test_a_gguf_file_of_any_name_gets_a_modelfile_for_ollama(command, tmp_path, capsys):
    target = tmp_path / "el meu model"
    mine = tmp_path / "el meu model.Modelfile"
    mine.write_text("FROM ./other.gguf\n")
    assert command("outputs/chat", "--to", "gguf", str(target), "--overwrite") == 2
    assert "Modelfile is not an exported model, so it is not replaced" in capsys.readouterr().err
    mine.unlink()
    assert command("outputs/chat", "--to", "gguf", str(target), "--license", "apache-2.0") == 0
    assert f"ollama create el-meu-model -f '{mine}'" in capsys.readouterr().out
    lines = mine.read_text().splitlines()
    assert lines[1] == "FROM ./el meu model"
    wanted = ["num_ctx 128", "temperature 0.6", "top_k 50", "top_p 0.9", "repeat_penalty 1.0", "num_predict 32",
              'stop "<im_end>"', 'stop "<im_start>"', 'stop "</s>"']  # fmt: skip
    assert lines[-10:] == [*(f"PARAMETER {line}" for line in wanted), 'LICENSE "apache-2.0"']
    assert sorted(path.name for path in tmp_path.iterdir()) == [target.name, mine.name]
    assert locate_model(str(target)).kind == "gguf"
    assert command(str(target), "--to", "hf", str(tmp_path / "hf")) == 2
    assert "is a GGUF file, which only chat and evaluate --text read" in capsys.readouterr().err


def test_a_failed_gguf_export_leaves_no_modelfile(command, tmp_path, monkeypatch):
    monkeypatch.setattr("cucafera.interop.gguf.MAX_STORED", {"f16": -1.0})
    assert command("outputs/base", "--to", "gguf", str(tmp_path / "x.gguf")) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_nothing(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hugging_face, "LOGIT_TOLERANCE", 0.0)
    monkeypatch.setattr(hugging_face, "ROUNDING_FACTOR", 0)
    assert command("outputs/base", "--to", "hf", str(tmp_path / "hf")) == 2
    assert "transformers computes other logits" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_model_card_names_its_parts_as_a_stranger_would_read_them(runs, monkeypatch):
    monkeypatch.chdir(runs)
    trained, lineage = load_trained("outputs/base"), read_lineage(RunFolder(Path("outputs/base")))
    config = lineage.config | {"init_from": "OWNER/NAME@main"}
    history = [
        record | {"step": step, "tokens": step}
        for step in range(0, 2500)
        for record in [lineage.metrics["validation"][0]]
    ]
    metrics = lineage.metrics | {"validation": history[:2], "steps": 1}
    config["data"] = {"sources": {"x": {"embedded": "catalan"}, "y": {"dataset": "OWNER/DATA", "weight": 0.5}}}
    lineage = dataclasses.replace(lineage, config=config, metrics=metrics, init_from="OWNER/NAME@main")
    trained = dataclasses.replace(trained, step=1)
    card = model_card(trained, lineage, "gat", None, "Verified", False, SamplingConfig(temperature=0, max_new_tokens=1))
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["base_model"], front["base_model_relation"]) == ("OWNER/NAME", "finetune")
    assert front["datasets"] == ["OWNER/DATA"]
    for text in (
        "on held-out texts, after 1 step.",
        "after 1 step; not selected",
        "at most 1 new token.",
        "greedy decoding, a rep",
        "cucafera's own, in Catalan (CC0 1.0) | 1 |",
        "Initial weights: OWNER/NAME@main.",
        "| step | tokens | validation loss (nats per token) | perplexity | top-1 accuracy | validation bpb (bits per ",
        "The weights that training began with have theirs.",
        "python -m cucafera.chat .",
        "write.generation_config = write.model.generation_config",
    ):
        assert text in card, text
    long = dataclasses.replace(lineage, metrics=metrics | {"validation": history})
    card = model_card(trained, long, "gat", None, "Verified", True, SamplingConfig())
    assert "Of 2,500 validations, 12 are shown." in card and "| 2,499 | 2,499 |" in card and "| 0 | 0 |" in card


def test_texts_from_elsewhere_are_escaped_in_a_model_card(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "chat"):
        shutil.copytree(runs / "outputs" / name, Path("outputs") / name)
    config = RunFolder(Path("outputs/base")).config
    config.write_text(config.read_text().replace("name: base", "name: '<b>|*x*'"))
    folder = RunFolder(Path("outputs/chat"))
    values = folder.read_metrics()
    values["samples"] = [{"prompt": "# a\n<script>", "continuation": "    x = [1](y)\n---", "finish_reason": "stop"}]
    write_metrics(folder.metrics, values)
    trained = load_trained("outputs/chat")
    lineage = read_lineage(trained.run)
    assert [stage.config["name"] for stage in lineage.stages()] == ["<b>|*x*", "chat"]
    name, licence = "n: [x](y)\n---\n# <i>", "mit\n---\nx: 1"
    card = model_card(trained, lineage, name, licence, "Verified", False, SamplingConfig())
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front)["license"] == "mit\n---\nx: 1"
    for markup in ("<b>", "<i>", "<script", "](y)", "*x*", "\n---"):
        assert markup not in body, markup
    assert "# n: &#91;x&#93;(y) --- # &#60;i>\n" in body
    assert "> &nbsp;&nbsp;&nbsp;&nbsp;x = &#91;1&#93;(y)  \n> &#45;--" in body


def test_missing_packages_are_named_before_the_model_is_loaded(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cucafera.interop.llama_cpp.is_installed", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("cucafera.interop.trained.load_trained", None)
    assert command("outputs/base", "--to", "gguf", str(tmp_path / "x.gguf"), "--type", "q4_k_m") == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("q4_k_m needs llama.cpp: pip install")
    assert printed.out == "Loading outputs/base (57,072 parameters, 228 kB in fp32) ...\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["outputs/nothing", "--to", "hf", "x"], "outputs/nothing: there is no such run folder or checkpoint"),
        (["outputs/base", "--to", "onnx", "x"], "--to onnx: there is no such format; it must be hf, gguf or peft"),
        (["outputs/base", "--to", "hf", "x", "--type", "q8_0"], "--type q8_0: for --to hf it must be one of fp32"),
        (["outputs/base", "--to", "gguf", "x", "--type", "fp32"], "--type fp32: for --to gguf it must be one of f32"),
        (["outputs/base", "--to", "gguf", "outputs"], "outputs is a folder: --to gguf takes the name of a file"),
        (["outputs/base", "--to", "gguf", "a\nb"], "a Modelfile cannot name a file with such characters"),
        (["outputs/base", "--to", "gguf", "x", "--architecture", "gemma"], "--architecture is of --to hf"),
        (
            ["outputs/base", "--to", "hf", "x", "--architecture", "gpt2"],
            "--architecture gpt2: it must be one of gemma, ",
        ),
        (["outputs/base", "--to", "hf", "x", "--average", "1"], "--average 1: a mean is of at least 2 checkpoints"),
        (["outputs/base", "--to", "hf", "x", "--average", "3"], "only 2 checkpoints in outputs/base (steps 8 and 12)"),
        (
            ["outputs/base", "--to", "peft", "x", "--average", "2"],
            "--average 2: the mean of several adapters is not an adapter of their rank",
        ),
        (["corpus.jsonl", "--to", "hf", "x"], "corpus.jsonl is not a checkpoint: checkpoint files end with .ckpt"),
        (["outputs/base", "--to", "hf", "corpus.jsonl/x"], "corpus.jsonl cannot be written"),
    ],
)
def test_user_errors_are_one_line_with_exit_code_2(command, arguments, message, capsys):
    assert command(*arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["outputs/base", "--to", "onnx", "x"], 2),
        (["outputs/nowhere", "--to", "hf", "x"], 2),
        (["outputs/base", "--to", "gguf", "outputs"], 2),
        (["outputs/base", "--to", "hf", "x", "--average", "3"], 2),
    ],
)
def test_help_and_wrong_input_are_answered_before_torch_is_imported(runs, arguments, code):
    assert imported_packages("export", arguments, runs, code).isdisjoint({"torch", *HEAVY})


@pytest.mark.slow
def test_an_export_imports_transformers_but_no_training_packages(runs, tmp_path):
    packages = imported_packages("export", ["outputs/base", "--to", "hf", str(tmp_path / "hf")], runs, 0)
    assert "transformers" in packages and packages.isdisjoint({"lightning", "torchmetrics"})


def test_the_command_and_interop_have_the_same_types():
    assert set(export.HUGGING_FACE_TYPES) == hugging_face.DTYPES.keys()
    assert set(export.GGUF_TYPES) == set(TYPES)
    assert set(export.ARCHITECTURES) == set(ARCHITECTURES)
