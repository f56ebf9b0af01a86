"""Options that several commands share: RUN, what is loaded, and settings of the sampling."""

import argparse
import io
import json
import os
import sys
from pathlib import Path

import pytest

from cucafera import compare, evaluate, export
from cucafera.config.errors import UserError
from cucafera.options import choose_run, command_parser, loading_line
from cucafera.output import announced
from cucafera.runs.locate import ModelLocation, locate_model


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the runs outputs/old and outputs/new, as far as they are looked for."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("old", "new")):
        checkpoint = tmp_path / "outputs" / name / "checkpoints" / "step-00000004.ckpt"
        checkpoint.parent.mkdir(parents=True)
        checkpoint.touch()
        checkpoint.with_suffix(".json").touch()
        os.utime(checkpoint.with_suffix(".json"), (number, number))
    return tmp_path


def in_terminal(monkeypatch: pytest.MonkeyPatch, value: bool) -> None:
    monkeypatch.setattr("cucafera.options.is_terminal", lambda stream: value)


def test_without_run_a_terminal_gets_the_newest_and_is_informed(saved, monkeypatch, capsys):
    in_terminal(monkeypatch, True)
    arguments = argparse.Namespace(run=None)
    choose_run("chat", arguments)
    assert arguments.run == "outputs/new"
    assert capsys.readouterr().err == "RUN is not given: outputs/new, the newest run below outputs/\n"
    arguments.run = "old"
    choose_run("chat", arguments)
    assert arguments.run == "old" and not capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "arguments", "command"),
    [
        (evaluate, ["--text", "my texts"], "cucafera evaluate outputs/new --text 'my texts'"),
        (export, ["--to", "hf", "x"], "cucafera export outputs/new --to hf x"),
        (compare, ["--plot", "x"], "cucafera compare outputs --plot x"),
    ],
)
def test_without_run_and_terminal_the_command_that_names_it_is_printed(
    saved, monkeypatch, capsys, module, arguments, command
):
    in_terminal(monkeypatch, False)
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    monkeypatch.setattr(module, "protect_output", lambda **settings: None)
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"To take it: {command}\n")


def test_without_any_run_training_and_the_published_model_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match="cucafera run`, or try the published model: cucafera chat pauhidalgoo/cucafera"
    ):
        choose_run("chat", argparse.Namespace(run=None))


def test_what_is_loaded_is_said_with_its_size(runs, tmp_path):
    folder = str(runs / "outputs" / "chat")
    checkpoint = str(runs / "outputs" / "chat" / "checkpoints" / "step-00000012.ckpt")
    for source in (folder, checkpoint):
        size = "57,072 parameters, 228 kB in fp32"
        assert loading_line(source, locate_model(source)) == f"Loading {source} ({size})"
    shape = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 30, "num_attention_heads": 8,
             "num_key_value_heads": 4, "vocab_size": 65_536}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    line = "Loading x (245,020,416 parameters, 980 MB in fp32)"
    assert loading_line("x", ModelLocation("hugging_face", tmp_path)) == line
    for content in ("[]", "{}", "{", '{"num_attention_heads": 0}', '{"num_attention_heads": "x", "hidden_size": []}'):
        (tmp_path / "config.json").write_text(content)
        assert loading_line("x", ModelLocation("hugging_face", tmp_path)).startswith("Loading x")
    (tmp_path / "model.gguf").write_bytes(bytes(200_000))
    assert loading_line("x", ModelLocation("gguf", tmp_path / "model.gguf")) == "Loading x (200 kB)"
    assert "Hugging Face hub" in loading_line("a/b", locate_model("a/b"))


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_takes_long_shows_the_seconds_on_a_terminal_only(monkeypatch):
    monkeypatch.setattr("cucafera.output.SILENT_SECONDS", 0.01)
    screen, file = Screen(), io.StringIO()
    with announced("Loading x", screen):
        while screen.getvalue().count("\n") < 3:
            pass
    with announced("Loading x", file):
        pass
    assert screen.getvalue().startswith("Loading x ...\n... 0 s\n... 0 s\n")
    assert file.getvalue() == "Loading x ...\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokn-file", "x"], "there is no option --tokn-file; did you mean --token-file?"),
        (["--token", "4242:SECRET"], "there is no option --token; did you mean --token-file?"),
        (["--token=4242:SECRET"], "there is no option --token; did you mean --token-file?"),
        (["--zzz"], "there is no option --zzz\n"),
        (["RUN", "other"], "unrecognized arguments: other"),
    ],
)
def test_options_have_their_complete_names_and_no_value_of_an_unknown_one_is_printed(arguments, message, capsys):
    parser = command_parser("telegram")
    parser.add_argument("run", nargs="?")
    parser.add_argument("--token-file")
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(arguments)
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and message in printed and "SECRET" not in printed
