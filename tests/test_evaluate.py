"""The evaluation door."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cucafera import evaluate

QUESTION = {"ctx": "la mar", "endings": ["és gran", "dorm"], "label": 0}


@pytest.fixture
def door(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Runs the door in the folder of the runs; gives its exit code, output and errors."""
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


def test_a_run_alone_is_measured_on_what_it_has_held_out(door, runs):
    for name, kind, what in (("base", "text", "documents; their ends"), ("chat", "answers", "only their answers")):
        code, out, _ = door(f"outputs/{name}")
        assert code == 0
        assert "held-out-files  bpb" in out and what in out and "Windows of 128 tokens, each 64 behind" in out
        (entry,) = (entry for entry in entries(runs, name) if entry["task"] == "held-out-files")
        assert entry["kind"] == kind and entry["step"] == 12
        assert entry["settings"] == {"held_out": "files", "documents": None, "stride": 64, "context": 128}
        assert 0 < entry["metrics"]["bpb"]["value"] < 20


def test_text_and_choices_are_measured_and_kept(door, runs, tmp_path):
    choices = tmp_path / "copa_ca.jsonl"
    choices.write_text((json.dumps(QUESTION) + "\n") * 3)
    code, out, _ = door(
        "outputs/base", "--text", "corpus.jsonl", "--documents", "3", "--stride", "127", "--choices", str(choices)
    )
    assert code == 0
    assert "in 3 documents" in out and "the original" in out and "0.6140 ± 0.0218" in out
    text, answered = (entry for entry in entries(runs, "base") if entry["task"] in ("corpus", "copa_ca"))
    assert text["settings"] == {"text": "corpus.jsonl", "column": "text", "documents": 3, "stride": 127, "context": 128}
    assert answered["metrics"]["acc"]["stderr"] == 0.0


def test_samples_and_attention_go_into_the_run_folder_or_where_they_are_sent(door, runs, tmp_path):
    code, out, _ = door("outputs/base", "--samples", "--beside", "outputs/chat", "--max-new-tokens", "4")
    assert code == 0 and "outputs/base/samples.html" in out
    content = (runs / "outputs" / "base" / "samples.html").read_text()
    assert "la mar" in content and "el sol" in content and "outputs/chat" in content
    picture = tmp_path / "a.png"
    code, out, _ = door("outputs/base", "--attention", "la mar", "--heads", "0", "--layers", "1", "--out", str(picture))
    assert code == 0 and picture.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["outputs/nowhere"], "outputs/nowhere: there is no such run folder or checkpoint"),
        ([""], "RUN is empty"),
        ([], "the following arguments are required: RUN"),
        (["outputs/base", "--text", "nothing.jsonl"], "there is no file nothing.jsonl (--text)"),
        (["outputs/base", "--text", ""], "--text is empty"),
        (["outputs/base", "--text", "corpus.jsonl", "--column", "words"], "no column 'words'; it has text"),
        (["outputs/base", "--text", "corpus.jsonl", "--stride", "0"], "--stride is 0; it must be at least 1"),
        (["outputs/base", "--stride", "128"], "--stride is 128; it must be below the model's context of 128 tokens"),
        (["outputs/base", "--documents", "0"], "--documents is 0; it must be at least 1"),
        (["outputs/base", "--column", "x"], "--column says nothing without --text"),
        (["outputs/base", "--beside", "x"], "--beside says nothing without --samples"),
        (["outputs/base", "--num-fewshot", "0"], "--num-fewshot says nothing without --tasks"),
        (["outputs/base", "--tasks", ","], "--tasks is empty"),
        (["outputs/base", "--choices", "corpus.jsonl"], "corpus.jsonl:1: no question"),
        (["outputs/base", "--samples", "--temperature", "-1"], "temperature is -1; it must be at least 0"),
        (["outputs/base", "--attention", "x", "--out", "x.pdf"], "--out x.pdf: a picture is a .png file"),
        (["outputs/base", "--out", "x.html"], "--out needs one of --samples and --attention"),
        (["outputs/base", "--samples", "--attention", "x", "--out", "x"], "--out needs one of"),
        (["outputs/base", "--attention", "x", "--layers", "a"], "--layers is 'a'"),
    ],
)
def test_what_the_user_can_mend_is_told_with_code_2(door, arguments, message):
    code, _, err = door(*arguments)
    assert code == 2
    assert message in err.splitlines()[-1] and "Traceback" not in err


def test_a_missing_package_is_named_before_anything_is_loaded(door, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert door("outputs/nowhere", "--tasks", "copa_ca")[2] == "--tasks needs lm_eval: pip install '.[eval]'\n"
    assert door("x", "--attention", "a")[2] == "--attention needs matplotlib: pip install '.[plots]'\n"


def test_a_run_whose_prepared_tokens_are_gone_says_what_can_be_measured(door, runs, tmp_path, monkeypatch):
    (tmp_path / "outputs").symlink_to(runs / "outputs")
    monkeypatch.chdir(tmp_path)
    code, _, err = door("outputs/base")
    assert code == 2
    assert "its prepared tokens are not in prepared any more; give --text FILE for bits a byte, --choices" in err


def test_a_damaged_file_of_results_is_not_overwritten(door, runs):
    path = runs / "outputs" / "base" / "evaluation.json"
    before = path.read_bytes() if path.exists() else None
    path.write_text("{")
    try:
        code, _, err = door("outputs/base")
        assert code == 2 and "evaluation.json is damaged" in err and path.read_text() == "{"
    finally:
        path.unlink() if before is None else path.write_bytes(before)


def test_ctrl_c_ends_with_a_line_and_code_130(door, monkeypatch):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate", interrupt)
    code, _, err = door("outputs/base")
    assert code == 130 and err.strip() == "Interrupted: what was measured before is kept"


def test_help_needs_nothing_heavy():
    program = (
        "import sys; from cucafera.evaluate import command_line_parser, check\n"
        "check(command_line_parser().parse_args(['x', '--text', 'y'])); print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.stdout == "False\n", result.stderr
