"""The chat command: its terminal, what it refuses, and what it imports."""

import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cucafera import chat
from cucafera.chat import COMMANDS, Terminal, command_line_parser
from cucafera.config.errors import UserError
from cucafera.config.schema import ColumnsConfig, SamplingConfig
from cucafera.data.chatml import Message
from cucafera.data.conversation_formats import conversation_of_row
from cucafera.generation.backend import TorchBackend
from cucafera.generation.engine import Engine
from cucafera.generation.keyboard import Keyboard
from cucafera.generation.request import Finished, GenerationEvent, TextDelta, Usage
from cucafera.generation.session import ChatSession
from cucafera.interop.trained import TrainedModel, load_trained
from cucafera.runs.folder import RunFolder
from tests.support import PseudoTerminal, run_command


@pytest.fixture
def trained(runs: Path) -> TrainedModel:
    return load_trained(str(runs / "outputs" / "chat"))


def session_of(trained: TrainedModel) -> ChatSession:
    sampling = SamplingConfig(max_new_tokens=8, temperature=1.0)
    return ChatSession(Engine(TorchBackend(trained.model), trained.tokenizer), trained.tokenizer, sampling, 0)


def test_a_model_is_loaded_from_its_path_alone(runs, trained):
    assert trained.chats
    best = RunFolder(runs / "outputs" / "chat").checkpoints.best()
    assert best is not None and trained.checkpoint == best.path
    assert not load_trained(str(runs / "outputs" / "base")).chats
    by_file = load_trained(str(best.path))
    for name, value in trained.model.state_dict().items():
        assert torch.equal(value, by_file.model.state_dict()[name])
    assert trained.model.cos.device.type == "cpu" and trained.model.cos[1, 0] == torch.tensor(1.0).cos()


def terminal_of(trained: TrainedModel, is_typed: bool = False) -> Terminal:
    return Terminal(session_of(trained), trained.chats, Keyboard(is_typed))


def converse(terminal: Terminal, monkeypatch: pytest.MonkeyPatch, capsys, *lines: str) -> tuple[int, str]:
    """Type lines and then Ctrl-D; "^C" is Ctrl-C. Returns the exit code and what was printed."""
    inputs = iter(lines)

    def read(prompt: str = "") -> str:
        line = next(inputs, None)
        if line is None:
            raise EOFError
        if line == "^C":
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(Keyboard, "session", lambda keyboard: contextlib.nullcontext())  # there is no terminal
    monkeypatch.setattr(Keyboard, "unshown", Keyboard.session)
    monkeypatch.setattr("cucafera.generation.keyboard._is_waiting", lambda: False)
    code = terminal.run()
    return code, capsys.readouterr().out


def test_commands(trained, monkeypatch, capsys, tmp_path):
    terminal = terminal_of(trained)
    session, path = terminal.session, tmp_path / "saved.jsonl"
    session.history = [Message("user", "a"), Message("assistant", "b")] * 2
    exchanges = {
        "/system": "(system: none)",
        "/system Sigues breu.": "(system: Sigues breu.)",
        "/save": "File name missing: /save FILE.jsonl",
        "/save notes.txt": "notes.txt is not the name of a .jsonl file, which finetuning reads: /save FILE.jsonl",
        f"/save {path}": f"(saved to {path})",
        f"/save {tmp_path}/nowhere/x.jsonl": f"{tmp_path}/nowhere/x.jsonl cannot be written: ",
        "/save ~no-such-user/x.jsonl": "~no-such-user/x.jsonl cannot be written: ",
        "/save a\0b.jsonl": "cannot be written: ",
        "/undo": "(removed: a)",
        "/reset": "(new conversation)",
        "/undo ": "There is no message to remove.",
        "/redo": "There is no answer to redo.",
        "/retry": "There is no answer to redo.",
        "/save x.jsonl": "There is nothing to save.",
        "/temperature": "(temperature: 1.0)",
        "/temperature 0.7": "(temperature: 0.7)",
        "/Top-K 5e1": "(top_k: 50)",
        "/top_k 2.5": "top_k is 2.5; it must be a whole number",
        "/top_p 0": "top_p is 0; it must be above 0 and at most 1",
        "/min_p x": "min_p is x; it must be a number",
        "/repetition_penalty 1.1": "(repetition_penalty: 1.1)",
        "/max_tokens 9": "(max_new_tokens: 9)",
        "/stop la mar": "(stop: la mar)",
        "/stop -": "(stop: none)",
        "/seed": "(seed: random)",
        "/seed 1.5": "seed is 1.5; it must be a whole number",
        "/seed 7": "(seed: 7)",
        "/temprature 1": "There is no command /temprature. Did you mean /temperature? A message",
        "/usr/bin": "There is no command /usr/bin. /help lists the commands. A message that begins with /",
        "/help": COMMANDS,
    }
    code, out = converse(terminal, monkeypatch, capsys, *exchanges, "")
    assert code == 0
    for message in exchanges.values():
        _, found, out = out.partition(message)
        assert found, message
    expected = SamplingConfig(max_new_tokens=9, temperature=0.7, top_k=50, repetition_penalty=1.1)
    assert session.sampling == expected
    assert session._random.getstate() == random.Random(7).getstate()
    (row,) = path.read_text().splitlines()
    expected_messages = [("system", "Sigues breu."), *[("user", "a"), ("assistant", "b")] * 2]
    assert [tuple(message.values()) for message in json.loads(row)["messages"]] == expected_messages
    read = conversation_of_row(json.loads(row), ColumnsConfig(), set())
    assert [message[:2] for message in read] == expected_messages


def test_every_setting_of_the_sampling_is_an_option_and_a_command():
    options = {action.dest for action in command_line_parser()._actions}
    for name in vars(SamplingConfig()):
        assert name in options and f"/{name} " in COMMANDS


def test_messages_that_look_like_commands_are_sent_by_two_slashes_or_in_quotes(trained, monkeypatch, capsys):
    sent: list[str] = []
    terminal = terminal_of(trained)
    monkeypatch.setattr(terminal, "respond", sent.append)
    converse(terminal, monkeypatch, capsys, "//help", '"""', "/reset", "", 'dos"""', "Hola")
    assert sent == ["/help", "/reset\n\ndos", "Hola"]


def test_a_second_ctrl_c_exits_and_so_does_the_first_without_a_terminal(trained, monkeypatch, capsys):
    terminal = terminal_of(trained, is_typed=True)
    hint = "\n(Ctrl-C again, Ctrl-D or /quit exits)\n"
    assert converse(terminal, monkeypatch, capsys, "^C", "", "^C", "^C") == (130, hint * 2 + "\n")
    assert converse(terminal, monkeypatch, capsys, "^C") == (0, hint + "\n")
    assert converse(terminal, monkeypatch, capsys, "/QUIT", "^C") == (0, "")
    assert converse(terminal_of(trained), monkeypatch, capsys, "^C")[0] == 130


def interrupted() -> Iterator[GenerationEvent]:
    yield TextDelta("la ")
    raise KeyboardInterrupt


def test_ctrl_c_stops_an_answer_and_keeps_it_as_far_as_it_came(trained, monkeypatch, capsys):
    monkeypatch.setattr(Engine, "stream", lambda *arguments: interrupted())
    terminal = terminal_of(trained, is_typed=True)
    code, out = converse(terminal, monkeypatch, capsys, "Hola", "^C")
    assert (code, out) == (0, "la  [stopped]\n\n\n(Ctrl-C again, Ctrl-D or /quit exits)\n\n")
    assert [message.content for message in terminal.session.history] == ["Hola", "la "]
    assert converse(terminal_of(trained), monkeypatch, capsys, "Hola", "Bon dia") == (130, "la  [stopped]\n\n\n")


def test_an_empty_response_is_shown_as_such(trained, capsys):
    terminal = terminal_of(trained)
    terminal.show(iter([TextDelta(""), Finished("stop", Usage(3, 1))]))
    assert capsys.readouterr().out == "(empty response)\n\n"
    terminal.show(iter([TextDelta("la "), TextDelta(""), TextDelta("mar"), Finished("length", Usage(3, 3))]))
    assert capsys.readouterr().out == "la mar\n\n"


def test_saving_appends_a_line_even_to_a_file_without_a_last_newline(trained, tmp_path):
    terminal = terminal_of(trained)
    terminal.session.history = [Message("user", "a"), Message("assistant", "b")] * 2
    path = tmp_path / "mine.jsonl"
    path.write_text('{"messages": []}')
    for _ in range(2):
        terminal.execute(f"/save {path}")
    first, *others = path.read_text().splitlines()
    assert first == '{"messages": []}'
    assert [len(json.loads(line)["messages"]) for line in others] == [4, 4]


def test_a_base_model_has_no_conversation(runs):
    terminal = terminal_of(load_trained(str(runs / "outputs" / "base")))
    for command in ("/redo", "/retry", "/undo", "/system x", "/save x", "/reset"):
        with pytest.raises(UserError, match="needs a model that was trained on conversations"):
            terminal.execute(command)


# The command


def run_chat(runs: Path, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return run_command("-m", "cucafera.chat", *arguments, cwd=runs, text=text)


def test_one_prompt_is_answered_and_a_base_model_continues(runs):
    settings = ("--seed", "1", "--max-new-tokens", "6")
    answered = run_chat(runs, "outputs/chat", "--prompt", "Hola", *settings)
    assert (answered.returncode, answered.stderr) == (0, "")
    assert answered.stdout == run_chat(runs, "outputs/chat", "--prompt", "Hola", *settings).stdout
    continued = run_chat(runs, "base", "--prompt", "la mar", *settings)
    assert continued.returncode == 0 and continued.stdout.strip()
    assert continued.stderr == (
        "This is a base model: it continues a text, and does not answer; `cucafera run +experiment=finetune "
        "init_from=outputs/base` makes a chat model of it.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["outputs/nowhere"], "outputs/nowhere: there is no such run folder or checkpoint"),
        (["corpus.jsonl"], "corpus.jsonl is not a checkpoint: checkpoint files end with .ckpt"),
        (["outputs/chat", "--temperature", "-1"], "temperature is -1; it must be 0 or at least 0.001"),
        (["outputs/chat", "--top-p", "0"], "top_p is 0; it must be above 0 and at most 1"),
        (["outputs/chat", "--temperature", "inf"], "temperature is inf; it must be a number"),
        (["outputs/chat", "--temperature", "1e-30"], "temperature is 1e-30; it must be 0 or at least 0.001"),
        (["outputs/chat", "--prompt", " "], "--prompt is empty"),
        (["outputs/chat", "--prompt", "la mar i el bosc " * 80], "Shorten it"),
        (["outputs/base", "--system", "x"], "--system needs a model that was trained on conversations"),
        (["outputs/chat/tokenizer.json"], "tokenizer.json is not a checkpoint: checkpoint files end with .ckpt"),
        (["nowhere.gguf"], "nowhere.gguf: there is no such .gguf file"),
        ([""], "RUN is empty"),
        (["outputs/chat", "--top-k", "2.5"], "top_k is 2.5; it must be a whole number"),
        (["--top-k", "9", "--prompt", "a b"], "To take it: cucafera chat outputs/chat --top-k 9 --prompt 'a b'"),
        (["outputs"], "runs in it: outputs/chat, outputs/base"),
        (["outputs/chta"], "there is no such run folder or checkpoint; did you mean outputs/chat?"),
    ],
)
def test_a_wrong_command_line_is_refused_with_exit_code_2(runs, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    monkeypatch.setattr(sys, "argv", ["chat", *arguments])
    for output in ("stdout", "stderr"):  # of a program they can be reconfigured
        monkeypatch.setattr(getattr(sys, output), "reconfigure", lambda **how: None, raising=False)
    with pytest.raises(SystemExit) as exited:
        chat.main()
    assert exited.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def test_a_refusal_of_the_program_is_one_line_without_a_stack_trace(runs):
    result = run_chat(runs, "outputs/nowhere")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "outputs/nowhere: there is no such run folder or checkpoint\n"


HEAVY = ("lightning", "torchmetrics", "transformers", "tensorboard", "sklearn", "scipy", "hydra")
IMPORTS = """
import sys
sys.argv[0] = "chat"
from cucafera import chat
try:
    chat.main()
finally:
    print(sorted({name.partition(".")[0] for name in sys.modules} & set(%r)), file=sys.stderr)
"""


def imported(runs: Path, modules: tuple[str, ...], *arguments: str) -> str:
    """Run the chat command in a fresh interpreter; return which of these modules it imported."""
    result = subprocess.run(
        [sys.executable, "-c", IMPORTS % (modules,), *arguments], cwd=runs, capture_output=True, text=True, timeout=60
    )
    return result.stderr.splitlines()[-1] if result.returncode in (0, 2) else result.stderr


def test_chatting_imports_nothing_of_training(runs):
    assert imported(runs, HEAVY, "outputs/chat", "--prompt", "Hola", "--max-new-tokens", "2") == "[]"


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["outputs/nowhere"], ["nowhere.gguf"], ["outputs/chat", "--top-p", "0"], ["outputs/chat", "--nope"]],
    ids=" ".join,
)
def test_help_and_refusals_come_before_torch_is_imported(runs, arguments):
    assert imported(runs, ("torch", "tokenizers", "numpy", *HEAVY), *arguments) == "[]"


def test_lines_from_a_pipe_are_answered_until_they_end(runs):
    lines = 'Hola\n/system Sigues breu.\nBon dia\n"""\nun\ndos\n'
    result = run_chat(runs, "outputs/chat", "--max-new-tokens", "4", text=lines + '"""\n/quit\nx\n')
    assert (result.returncode, result.stderr) == (0, "")
    assert run_chat(runs, "outputs/chat", "--max-new-tokens", "4", text=lines).returncode == 2
    assert "(system: Sigues breu.)" in result.stdout
    assert "> " not in result.stdout


SLOW_MODEL = """
import time
import cucafera.generation.engine as engine
import cucafera.chat

next_tokens = engine.SamplingBatch.next_tokens
def slowly(*arguments):
    time.sleep(0.05)
    return [20 for _ in next_tokens(*arguments)]
engine.SamplingBatch.next_tokens = slowly
cucafera.chat.main()
"""


@pytest.mark.slow
def test_a_session_in_a_real_terminal(runs):
    terminal = PseudoTerminal(["-c", SLOW_MODEL, "chat"], runs)
    try:
        terminal.wait_for("Loading outputs/chat (57,072 parameters, 228 kB in fp32) ...")
        terminal.wait_for("parameters, after 12 steps")
        terminal.wait_for("\n/help lists the commands.")
        terminal.wait_for("> ")
        terminal.type("Hola, què tal?\n")
        terminal.wait_for("Hola, què tal?")
        terminal.wait_for("++")
        terminal.type("/max_tokens 3\n/retry\n")  # typed ahead
        terminal.type("\x03")  # Ctrl-C stops the answer and not the program
        assert "/max" not in terminal.wait_for("[stopped]")
        terminal.wait_for("> /max_tokens 3")
        terminal.wait_for("(max_new_tokens: 3)")
        terminal.wait_for("> /retry")
        terminal.wait_for("+++\r\n")
        terminal.wait_for("> ")
        time.sleep(0.5)  # as a person would; readline must be waiting
        terminal.type("\x03")
        terminal.wait_for("(Ctrl-C again, Ctrl-D or /quit exits)")
        terminal.wait_for("> ")
        terminal.type("/save saved.jsonl\n")
        terminal.wait_for("(saved to saved.jsonl)")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.exit_code() == 0
    finally:
        terminal.process.kill()
    (row,) = (runs / "saved.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(row)["messages"][0] == {"role": "user", "content": "Hola, què tal?"}
