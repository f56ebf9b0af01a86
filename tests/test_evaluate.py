"""The evaluate command."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

from cucafera import evaluate
from tests.imports import HEAVY, imported_packages
from tests.support import scalars

QUESTION = {"ctx": "la mar", "endings": ["és gran", "dorm"], "label": 0}


@pytest.fixture
def command(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Run the command in the folder of the runs; returns its exit code, stdout and stderr."""
    monkeypatch.chdir(runs)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
        monkeypatch.setattr(sys, "stdout", sys.stdout)
        code = 0
        try:
            evaluate.main()
        except SystemExit as exit:
            code = int(exit.code or 0)
        return code, *capsys.readouterr()

    return run


def entries(runs: Path, name: str) -> list[dict]:
    return json.loads((runs / "outputs" / name / "evaluation.json").read_text())["results"]


def test_without_options_a_run_is_measured_on_its_held_out_data(command, runs):
    for name, kind, note in (
        ("base", "text", "documents, their ends not scored"),
        ("chat", "answers", "conversations, answers only"),
    ):
        code, out, _ = command(f"outputs/{name}")
        assert code == 0
        assert "held-out-files  bpb" in out and note in out
        assert "sliding windows of 128 tokens, stride 64" in out
        (entry,) = (entry for entry in entries(runs, name) if entry["task"] == "held-out-files")
        assert entry["kind"] == kind and entry["step"] == 12
        assert entry["settings"] == {"held_out": "files", "documents": None, "stride": 64, "context": 128}
        assert 0 < entry["metrics"]["bpb"]["value"] < 20


def test_the_mean_of_checkpoints_is_measured_next_to_the_last_one(command, runs):
    folder = runs / "outputs" / "averaged"
    shutil.copytree(runs / "outputs" / "base", folder, ignore=shutil.ignore_patterns("evaluation.json"))
    try:
        code, out, _ = command("outputs/averaged", "--average", "2")
        assert code == 0
        assert out.startswith("Averaging the weights after the steps 8 and 12\n")
        assert "; the mean of the weights after the steps 8 and 12; on cpu" in out
        command("outputs/averaged")
        mean, last = entries(runs, "averaged")
        curves = [scalars(folder, f"evaluation/held-out-files/{name}") for name in ("mean_of_2/bpb", "bpb")]
    finally:
        shutil.rmtree(folder)
    assert mean["averaged"] == [8, 12] and "averaged" not in last
    assert last["checkpoint"] == mean["checkpoint"] and last["settings"] == mean["settings"]
    assert last["metrics"] != mean["metrics"]
    assert curves == [[(12, pytest.approx(entry["metrics"]["bpb"]["value"]))] for entry in (mean, last)]


def test_text_and_choices_are_measured_and_saved(command, runs, tmp_path):
    choices = tmp_path / "copa_ca.jsonl"
    choices.write_text((json.dumps(QUESTION) + "\n") * 3)
    code, out, _ = command(
        "outputs/base", "--text", "corpus.jsonl", "--documents", "3", "--stride", "127", "--choices", str(choices)
    )
    assert code == 0
    assert "3 documents" in out and "original" in out and "0.6140 ± 0.0218" in out
    text, answered = (entry for entry in entries(runs, "base") if entry["task"] in ("corpus", "copa_ca"))
    assert text["settings"] == {"text": "corpus.jsonl", "column": "text", "documents": 3, "stride": 127, "context": 128}
    assert answered["metrics"]["acc"]["stderr"] == 0.0


def test_the_answers_of_conversations_are_measured_and_saved(command, runs, tmp_path):
    for name in ("base", "chat"):
        code, out, _ = command(f"outputs/{name}", "--chats", "chat.jsonl", "--documents", "5")
        assert code == 0 and "5 conversations, answers only" in out
        (entry,) = (entry for entry in entries(runs, name) if entry["task"] == "chat")
        assert entry["kind"] == "answers" and 0 < entry["metrics"]["bpb"]["value"] < 20
        assert entry["settings"] == {"chats": "chat.jsonl", "documents": 5, "stride": 64, "context": 128}


def test_preference_pairs_are_measured_and_saved_for_any_model(command, runs, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "la mar", "chosen": "el sol", "rejected": "no"}) + "\n")
    for name in ("base", "chat"):
        code, out, _ = command(f"outputs/{name}", "--pairs", str(pairs))
        assert code == 0 and "logprob_sum_accuracy" in out and "pairs: 1 pair\n" in out
        (entry,) = (entry for entry in entries(runs, name) if entry["task"] == "pairs")
        assert entry["kind"] == "pairs" and entry["metrics"]["chosen_logprob"]["value"] < 0
        assert entry["settings"] == {"pairs": str(pairs), "documents": None, "context": 128}


def test_choices_are_answers_in_a_conversation_for_a_chat_model_unless_asked_otherwise(command, runs, tmp_path):
    choices = tmp_path / "copa_ca.jsonl"
    choices.write_text(json.dumps(QUESTION) + "\n")
    for arguments, note in (
        ([], "copa_ca: 1 question, in a conversation"),
        (["--no-apply-chat-template"], "copa_ca: 1 question"),
    ):
        code, out, _ = command("outputs/chat", "--choices", str(choices), *arguments)
        assert code == 0 and note in out.splitlines()
        assert ("original" in out) == bool(arguments), "the published values are of plain text"
    assert "copa_ca: 1 question, in a" in command("outputs/base", "--choices", str(choices), "--apply-chat-template")[1]


def test_an_unknown_task_is_refused_before_anything_is_measured(command, runs):
    pytest.importorskip("lm_eval")
    code, out, err = command("outputs/base", "--text", "corpus.jsonl", "--tasks", "copa_cat")
    assert code == 2 and "--tasks copa_cat: there is no such task; similar: " in err.splitlines()[-1]
    assert "bpb" not in out


def test_samples_and_attention_go_into_the_run_folder_or_to_out(command, runs, tmp_path):
    code, out, _ = command("outputs/base", "--samples", "--compare", "outputs/chat", "--max-new-tokens", "4")
    assert code == 0 and "outputs/base/samples.html" in out and "outputs/chat  " in out
    assert out.count(" ended by themselves, ") == 2
    content = (runs / "outputs" / "base" / "samples.html").read_text()
    assert "la mar" in content and "el sol" in content and "outputs/chat" in content
    picture = tmp_path / "a.png"
    code, out, _ = command(
        "outputs/base", "--attention", "la mar", "--heads", "0", "--layers", "1", "--out", str(picture)
    )
    assert code == 0 and picture.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["outputs/nowhere"], "outputs/nowhere: there is no such run folder or checkpoint"),
        ([""], "RUN is empty"),
        ([], "RUN is missing: the newest run below outputs/ is outputs/chat. To take it: cucafera evaluate"),
        (["outputs/base", "--text", "nothing.jsonl"], "--text: there is no file nothing.jsonl"),
        (["outputs/base", "--text", ""], "--text is empty"),
        (["outputs/chat", "--chats", " "], "--chats is empty"),
        (["outputs/chat", "--pairs", " "], "--pairs is empty"),
        (["outputs/chat", "--pairs", "nothing.jsonl"], "--pairs: there is no file nothing.jsonl"),
        (["outputs/chat", "--pairs", "chat.jsonl"], "conversations are measured with --chats, documents with --text"),
        (["outputs/chat", "--chats", "nothing.jsonl"], "--chats: there is no file nothing.jsonl"),
        (["outputs/chat", "--chats", "corpus.jsonl"], "corpus.jsonl:1: no conversation is recognized in the columns"),
        (["outputs/base", "--text", "corpus.jsonl", "--column", "words"], "no column 'words'; it has text"),
        (["outputs/base", "--text", "corpus.jsonl", "--stride", "0"], "--stride is 0; it must be at least 1"),
        (["outputs/base", "--stride", "128"], "--stride is 128; it must be below the model's context of 128 tokens"),
        (["outputs/base", "--average", "0"], "--average 0: a mean is of at least 2 checkpoints"),
        (
            ["outputs/base", "--average", "9"],
            "--average 9: there are only 2 checkpoints in outputs/base (steps 8 and 12)",
        ),
        (["outputs/base", "--documents", "0"], "--documents is 0; it must be at least 1"),
        (["outputs/base", "--column", "x"], "--column has no effect without --text"),
        (["outputs/base", "--compare", "x"], "--compare has no effect without --samples"),
        (["outputs/base", "--num-fewshot", "0"], "--num-fewshot has no effect without --tasks"),
        (["outputs/base", "--tasks", ","], "--tasks is empty"),
        (["outputs/base", "--apply-chat-template"], "--apply-chat-template has no effect without --choices or --tasks"),
        (["outputs/base", "--system-instruction", "x"], "--system-instruction has no effect without --tasks"),
        (
            ["outputs/base", "--tasks", "a", "--no-fewshot-as-multiturn"],
            "--fewshot-as-multiturn has no effect without --apply-chat-template",
        ),
        (["outputs/base", "--tasks", "nothing.yaml"], "--tasks nothing.yaml: there is no such file"),
        (["outputs/base", "--tasks", "a", "--include-path", "no"], "--include-path no: there is no such folder"),
        (["outputs/base", "--samples", "--compare", "no"], "no: there is no such run folder or checkpoint"),
        (["outputs/base", "--samples", "--out", "no/x.html"], "--out no/x.html: there is no folder no"),
        (["no.gguf", "--text", "corpus.jsonl"], "no.gguf: there is no such .gguf file"),
        (["x.gguf", "--text", "corpus.jsonl", "--samples"], "a .gguf file can only be measured with --text"),
        (["outputs/base", "--choices", "corpus.jsonl"], "corpus.jsonl:1: not a question"),
        (["outputs/base", "--samples", "--temperature", "-1"], "temperature is -1; it must be 0 or at least 0.001"),
        (["outputs/base", "--attention", "x", "--out", "x.pdf"], "--out x.pdf: the picture must be a .png file"),
        (["outputs/base", "--out", "x.html"], "--out needs either --samples or --attention"),
        (["outputs/base", "--samples", "--attention", "x", "--out", "x"], "--out needs either"),
        (["outputs/base", "--attention", "x", "--layers", "a"], "--layers is 'a'"),
    ],
)
def test_user_errors_are_printed_with_exit_code_2(command, arguments, message):
    code, _, err = command(*arguments)
    assert code == 2
    assert message in err.splitlines()[-1] and "Traceback" not in err


def test_a_missing_package_is_named_before_anything_is_loaded(command, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command("outputs/nowhere", "--tasks", "copa_ca")[2] == "--tasks needs lm_eval: pip install '.[eval]'\n"
    assert command("x", "--attention", "a")[2] == "--attention needs matplotlib: pip install '.[plots]'\n"


def test_a_run_without_its_prepared_data_is_an_error_with_alternatives(command, runs, tmp_path, monkeypatch):
    (tmp_path / "outputs").symlink_to(runs / "outputs")
    monkeypatch.chdir(tmp_path)
    code, _, err = command("outputs/base")
    assert code == 2
    assert "its tokenized data is not in prepared; give --text FILE for bits per byte, --chats" in err


def test_a_damaged_results_file_is_not_overwritten(command, runs):
    path = runs / "outputs" / "base" / "evaluation.json"
    before = path.read_bytes() if path.exists() else None
    path.write_text("{")
    try:
        code, _, err = command("outputs/base")
        assert code == 2 and "evaluation.json is damaged" in err and path.read_text() == "{"
    finally:
        path.unlink() if before is None else path.write_bytes(before)


def test_ctrl_c_exits_with_a_line_and_code_130(command, monkeypatch):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate", interrupt)
    code, _, err = command("outputs/base")
    assert code == 130 and err.strip() == "Interrupted: finished measurements are saved"


def test_layers_and_heads_are_separated_by_commas(command):
    assert (evaluate._indices("heads", "0,3"), evaluate._indices("heads", None)) == ([0, 3], None)
    assert "--heads is '0-3'" in command("outputs/base", "--attention", "x", "--heads", "0-3")[2]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["outputs/base", "--nothing"], 2),
        (["outputs/nowhere"], 2),
        (["outputs/base", "--text", "nowhere.jsonl"], 2),
        (["outputs/base", "--chats", "corpus.jsonl"], 2),
        (["outputs/base", "--pairs", "corpus.jsonl"], 2),
        (["outputs/base", "--choices", "corpus.jsonl"], 2),
    ],
)
def test_help_and_wrong_input_are_answered_before_torch_is_imported(runs, arguments, code):
    assert imported_packages("evaluate", arguments, runs, code).isdisjoint({"torch", *HEAVY})


def test_an_evaluation_imports_no_training_packages(runs):
    arguments = ["outputs/chat", "--text", "corpus.jsonl", "--documents", "1"]
    assert imported_packages("evaluate", arguments, runs, 0).isdisjoint(HEAVY)
